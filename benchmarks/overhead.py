"""What fake quantization at traced bits adds to a train step, as a ratio to the float32 step.

Both arms are compiled once and timed in turn in one process: the ratio of a round is that of two neighbouring
measurements, which a busy machine disturbs alike. Prints, per model, the median ratio with its quartiles.

    python benchmarks/overhead.py --rounds 40 --out benchmarks/overhead.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qtrain
from qtrain.metrics import cross_entropy
from qtrain.models.mlp import MLP
from qtrain.models.resnet import CifarResNet
from qtrain.models.transformer import TransformerLM
from qtrain.quantizers import Uniform


def cases() -> dict[str, tuple[Any, Any, Any]]:
    """Model, inputs and labels of each case."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (8, 64))
    return {
        "transformer": (TransformerLM(256, 64, num_layers=1, width=256, num_heads=4), tokens, tokens),
        "mlp": (MLP(10, (256, 128)), rng.normal(size=(128, 28, 28, 1)).astype("f"), rng.integers(0, 10, 128)),
        "resnet20": (CifarResNet(10), rng.normal(size=(64, 32, 32, 3)).astype("f"), rng.integers(0, 10, 64)),
    }


def make_step(qmodel: Any, optimizer: Any, quantized: bool) -> Any:
    """A jitted train step ``(params, others, opt_state, inputs, labels, bits, key)``; float ignores the bits."""

    def step(params: Any, others: Any, opt_state: Any, inputs: Any, labels: Any, bits: Any, key: Any) -> Any:
        def loss_fn(params):
            logits, updated = qmodel.apply(
                {"params": params, **others},
                inputs,
                train=True,
                bits=bits if quantized else None,
                rngs={"quant": key},
                mutable=list(others),
            )
            return cross_entropy(logits, labels).mean(), updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), dict(updated), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def measure(name: str, case: tuple[Any, Any, Any], rounds: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, inputs, labels = case
    optimizer = optax.sgd(0.1, momentum=0.9)
    arms = {
        "float32": (qtrain.default_rules(), False),
        "fake": (qtrain.default_rules(), True),
        "fake_stochastic_grads": (
            qtrain.default_rules(grad_quantizer=Uniform("symmetric", "tensor", "stochastic")),
            True,
        ),
    }
    running = {}
    for arm, (rules, quantized) in arms.items():
        qmodel = qtrain.quantize(model, rules)
        variables = qmodel.init(jax.random.key(0), inputs[:2])
        others = {key: value for key, value in variables.items() if key not in ("params", "quant")}
        state = (variables["params"], others, optimizer.init(variables["params"]))
        running[arm] = (make_step(qmodel, optimizer, quantized), state)
    bits, key = qtrain.Precision(jnp.float32(4), jnp.float32(4), jnp.float32(8)), jax.random.key(1)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds + 2):
        for arm, (step, state) in running.items():
            start = time.perf_counter()
            for _ in range(repeats):
                *state, loss = step(*state, inputs, labels, bits, key)
            jax.block_until_ready(loss)
            times[arm].append((time.perf_counter() - start) / repeats)
            running[arm] = (step, tuple(state))
    rows = []
    for arm in arms:
        measured = np.array(times[arm][2:])
        ratios = measured / np.array(times["float32"][2:])
        low, median, high = np.percentile(ratios, (25, 50, 75))
        rows.append(
            {
                "case": name,
                "arm": arm,
                "step_ms": round(1e3 * float(np.median(measured)), 3),
                "ratio_to_float32": round(float(median), 3),
                "quartiles": [round(float(low), 3), round(float(high), 3)],
                "rounds": rounds,
                "jax": jax.__version__,
                "backend": jax.default_backend(),
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cases", nargs="*", default=None)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    for name, case in cases().items():
        if arguments.cases and name not in arguments.cases:
            continue
        rows += measure(name, case, arguments.rounds, repeats=1 if name == "resnet20" else 8)
        for row in rows[-3:]:
            print(json.dumps(row), flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
