"""Cora and the graph of the digits: float, static precision and the cyclic schedule CR 3–8, in full-batch steps.

Kipf and Welling's setting (arXiv 1609.02907, section 5.2): two layers of width 16, dropout 0.5 on the features and
between the layers, Adam at 0.01, L2 5e-4 on the kernel of the first layer, 200 steps; here without early stopping, what
counts is the last step. Nothing was chosen on test or validation accuracy.

    python experiments/graphs/run.py --sets cora digits --models gcn sage --seeds 0 1 2
    python experiments/graphs/run.py --table          # means and 95 % intervals of what is in results.jsonl

Every layer follows the schedule, the first and last too: a network of two layers has no other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import qtrain
from qtrain import cost
from qtrain.data.graph_sets import load_cora, load_digits
from qtrain.data.graphs import SPLITS, GraphSplit
from qtrain.metrics import cross_entropy
from qtrain.models.gcn import GCN, Messages
from qtrain.models.graph_sage import GraphSAGE
from qtrain.precision import Precision
from qtrain.quantizers import Uniform
from qtrain.schedules import PrecisionSchedule, by_name

HERE = Path(__file__).parent
SETS = {"cora": load_cora, "digits": load_digits}
MODELS = {"gcn": GCN, "sage": GraphSAGE}
MODEL = {"num_layers": 2, "width": 16, "dropout": 0.5, "input_dropout": 0.5}
STEPS, RATE, L2 = 200, 0.01, 5e-4
CYCLES = 8

MESSAGES = Uniform("affine", per="tensor")
RULES = {
    "rows": qtrain.Rule(),  # a scale for each node's features
    "cpt": qtrain.Rule(  # the quantizers of `cpt_rules`, on the last layer too
        weight_quantizer=Uniform("affine", per="channel"),
        act_quantizer=Uniform("affine", per="tensor", statistics=0.9),
        grad_quantizer=Uniform("affine", per="tensor", rounding="stochastic"),
    ),
}


def _cyclic(low: int, grads: int | None) -> PrecisionSchedule:
    bits = by_name("CR", low=low, high=8, cycles=CYCLES, total_steps=STEPS)
    return PrecisionSchedule(weights=bits, acts=bits, grads=grads, total_steps=STEPS)


# name: quantizers, schedule, whether messages are quantized too (at the bits of the activations)
ARMS: dict[str, tuple[str, PrecisionSchedule | None, bool]] = {
    "float": ("rows", None, False),
    "static 8": ("rows", PrecisionSchedule(weights=8, acts=8), False),
    "static 4": ("rows", PrecisionSchedule(weights=4, acts=4), False),
    "CR 3-8": ("rows", _cyclic(3, None), False),
    "CPT static 8": ("cpt", PrecisionSchedule(weights=8, acts=8, grads=8), False),
    "CPT CR 3-8": ("cpt", _cyclic(3, 8), False),
    "CPT CR 3-8, messages": ("cpt", _cyclic(3, 8), True),
}


@contextlib.contextmanager
def quantized_messages(bits: Any) -> Iterator[None]:
    """What passes a `Messages` is on the grid of `bits`, one scale a tensor, straight through; None: as it is."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        return MESSAGES(out, bits) if isinstance(context.module, Messages) and bits is not None else out

    with nn.intercept_methods(intercept):
        yield


def runner(graph: Any, model: Any, quantizers: str, schedule: PrecisionSchedule | None, messages: bool) -> Any:
    """``seed -> accuracies of the splits``, compiled whole: training by one scan, evaluation at the most bits."""
    qmodel = qtrain.quantize(model, RULES[quantizers])
    batches = {split: jax.tree.map(jnp.asarray, GraphSplit(graph, split).batch) for split in SPLITS}

    def first_kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[0].key == "layer_0" and path[-1].key == "kernel", params
        )

    decay = optax.add_decayed_weights(L2, mask=lambda trained: {**trained, "params": first_kernels(trained["params"])})
    transform = optax.chain(decay, optax.adam(RATE))

    def apply(variables: Any, batch: Any, bits: Any, **kwargs: Any) -> Any:
        with quantized_messages(bits.acts if messages and bits is not None else None):
            return qmodel.apply(variables, batch, bits=bits, **kwargs)

    def run(key: Any, batches: Any) -> dict[str, Any]:
        variables = qmodel.init({"params": key, "dropout": key}, batches["train"])
        trained = {"params": variables["params"]}
        collections = {name: value for name, value in variables.items() if name not in ("params", "quant")}

        def step(carry: Any, index: Any) -> Any:
            trained, collections, state = carry
            dropout, quant = jax.random.split(jax.random.fold_in(key, index))
            bits = None if schedule is None else schedule(index)

            def loss(trained: Any) -> Any:
                logits, updated = apply(
                    {**trained, **collections},
                    batches["train"],
                    bits,
                    train=True,
                    rngs={"dropout": dropout, "quant": quant},
                    mutable=list(collections),
                )
                mask = batches["train"]["mask"]
                return jnp.sum(mask * cross_entropy(logits, batches["train"]["label"])) / mask.sum(), updated

            (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
            updates, state = transform.update(gradient, state, trained)
            return (optax.apply_updates(trained, updates), dict(updated), state), value

        start = trained, collections, transform.init(trained)
        (trained, collections, _), losses = jax.lax.scan(step, start, jnp.arange(STEPS))
        bits = None if schedule is None else jax.tree.map(jnp.float32, schedule.q_max)
        rngs = {"quant": jax.random.key(0)}
        logits = apply({**trained, **collections}, batches["test"], bits, rngs=rngs)
        accuracies = {
            split: jnp.sum(b["mask"] * (logits.argmax(-1) == b["label"])) / b["mask"].sum()
            for split, b in batches.items()
        }
        return {**accuracies, "loss": losses[-1]}

    compiled = jax.jit(run)
    return lambda seed: {name: float(value) for name, value in compiled(jax.random.key(seed), batches).items()}


def costs(graph: Any, model: Any, quantizers: str, schedule: PrecisionSchedule | None) -> dict[str, float]:
    """MACs of a forward pass, the share of the dense layers' that are quantized, and BitOps relative to float."""
    batch = GraphSplit(graph, "train").batch
    plan = qtrain.quantize(model, RULES[quantizers]).plan(batch)
    whole = cost.static(plan.ops, Precision(), STEPS)
    spent = whole if schedule is None else cost.effective(plan.ops, schedule, STEPS)
    macs = model.aggregation_macs(len(graph.nodes), len(graph.senders))
    coverage = 0.0 if schedule is None else plan.coverage
    return {"macs": plan.macs, "aggregation_macs": macs, "coverage": coverage, "relative_bitops": spent / whole}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (Student's t); NaN for one value."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    return float(np.mean(values)), float(half) if len(values) > 1 else float("nan")


def table(results: list[dict[str, Any]]) -> None:
    """Means over seeds, and of the difference to float, paired by seed."""
    print("| set | model | arm | seeds | test accuracy | minus float | BitOps | seconds a run |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model in dict.fromkeys((row["set"], row["model"]) for row in results):
        for arm in ARMS:
            rows = {r["seed"]: r for r in results if (r["set"], r["model"], r["arm"]) == (name, model, arm)}
            floats = {r["seed"]: r for r in results if (r["set"], r["model"], r["arm"]) == (name, model, "float")}
            if not rows:
                continue
            mean, half = interval([100 * row["test"] for row in rows.values()])
            paired = [100 * (rows[seed]["test"] - floats[seed]["test"]) for seed in rows if seed in floats]
            gain = "" if arm == "float" or not paired else "{:+.2f} ± {:.2f}".format(*interval(paired))
            spent = next(iter(rows.values()))["relative_bitops"]
            seconds = np.median([row["seconds"] for row in rows.values()])
            print(
                f"| {name} | {model} | {arm} | {len(rows)} | {mean:.2f} ± {half:.2f} | {gain} | {100 * spent:.1f} % | "
                f"{seconds:.1f} |"
            )


def main() -> None:
    """Run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--models", nargs="*", default=["gcn"], choices=MODELS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        table(results)
        return
    done = {(row["set"], row["model"], row["arm"], row["seed"]) for row in results}
    load = functools.cache(lambda name: SETS[name]())
    for name in arguments.sets:
        for kind in arguments.models:
            model = MODELS[kind](num_classes=load(name).num_classes, **MODEL)
            for arm in arguments.arms:
                seeds = [seed for seed in arguments.seeds if (name, kind, arm, seed) not in done]
                if not seeds:
                    continue
                quantizers, schedule, messages = ARMS[arm]
                train, fixed = runner(load(name), model, quantizers, schedule, messages), None
                for seed in seeds:
                    started = time.monotonic()
                    found = train(seed)
                    fixed = fixed or costs(load(name), model, quantizers, schedule)
                    seconds = round(time.monotonic() - started, 2)
                    row = {"set": name, "model": kind, "arm": arm, "seed": seed, **found, "seconds": seconds, **fixed}
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


if __name__ == "__main__":
    main()
