"""S5 on digits read pixel by pixel, and what happens to it when A is rounded.

Trains a small S5 classifier in float (64 steps of one pixel, 10 classes), and then asks of A, the diagonal of the
recurrence, at 2 … 8 bits: is |λ̄| still below 1, and what are loss and accuracy on the test set? Also with each pixel
held for 16 steps of a sixteenth of the length (1024 steps), of which the float network makes nearly the same. The two
parametrisations are of one trained function: A as the logarithms of decay and frequency, and as real and imaginary part
of λ̄. "after training" rounds, "fine-tuned" trains on with A rounded in every step (``--bits``), in each
parametrisation and at each length.

    python experiments/state_space/run.py             # JSON lines in results.jsonl
    python experiments/state_space/run.py --plot      # the figure, from what is there

Everything but A stays in float, so that what is seen is A's doing. A's grid is affine, one scale for each of its two
vectors: the logarithms are not centred on 0, and the largest |Re λ̄| is on the grid.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain.data import load
from qtrain.data.augment import normalize
from qtrain.data.sequences import sequential
from qtrain.models.s5 import S5Classifier
from qtrain.models.s5_ssm import as_naive
from qtrain.quantizers import Uniform

HERE = Path(__file__).parent
PARAMETRISATIONS = ("magnitude_phase", "naive")
BITS = (2, 3, 4, 5, 6, 7, 8)
HELD = (1, 16)  # steps for which a pixel is shown
A_PATH = r".*/A/\w+"
QUANTIZER = Uniform("affine", per="tensor")
MODEL = {"num_classes": 10, "num_layers": 2, "width": 32, "state_size": 32, "dropout": 0.1}
TRAIN = {"steps": 1500, "batch_size": 64, "rate": 4e-3, "ssm_rate": 1e-3, "weight_decay": 0.05}
# By the steps a pixel is held for.
FINE_TUNE = {
    1: {"steps": 400, "batch_size": 64, "rate": 2e-3, "ssm_rate": 1e-3, "weight_decay": 0.05},
    16: {"steps": 120, "batch_size": 32, "rate": 2e-3, "ssm_rate": 1e-3, "weight_decay": 0.05},
}


def rounded(params: Any, pattern: str, bits: Any) -> Any:
    """`params` with those on the grid of width `bits` whose ``/``-joined path `pattern` matches; straight through."""

    def one(path: Any, value: jax.Array) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        return QUANTIZER(value, bits) if re.fullmatch(pattern, name) else value

    return jax.tree_util.tree_map_with_path(one, params)


def naive(params: Any) -> Any:
    """The same function, every state-space model in the naive parametrisation."""
    layers = {name: layer for name, layer in params.items() if "ssm" in layer}
    return {**params, **{name: {**layer, "ssm": as_naive(layer["ssm"], "zoh")} for name, layer in layers.items()}}


def finer(params: Any, factor: int) -> Any:
    """The same continuous time in steps shorter by `factor`; of the "magnitude_phase" parametrisation."""

    def one(path: Any, value: jax.Array) -> jax.Array:
        return value - jnp.log(float(factor)) if path[-1].key == "log_step" else value

    return jax.tree_util.tree_map_with_path(one, params)


def radius(params: Any) -> float:
    """The largest |λ̄| of all layers, computed as the model does; `params` in either parametrisation."""
    if "log_decay" in params["layer_0"]["ssm"]["A"]:
        params = naive(params)
    found = [layer["ssm"]["A"] for layer in params.values() if "ssm" in layer]
    return max(float(jnp.max(jnp.hypot(a["real"], a["imag"]))) for a in found)


def data() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Standardised sequences ``[N, 64, 1, 1]`` and labels, of training and test."""
    dataset = sequential(load({"name": "digits"}))

    def whole(source: Any) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = source.gather(np.arange(len(source)))
        return normalize(pixels, dataset.max_value, dataset.mean, dataset.std), labels

    return whole(dataset.train), whole(dataset.eval["test"])


def optimizer(steps: int, rate: float, ssm_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW; A, discretisation and B with a rate of their own and no decay, as S5's authors have it."""

    def labels(params: Any) -> Any:
        own = re.compile(r".*/ssm/(A/.*|discretisation/.*|B_.*)")
        names = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)
        return jax.tree.map(lambda name: "ssm" if own.fullmatch(name) else "rest", names)

    def schedule(peak: float) -> Any:
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20, steps)

    arms = {"ssm": optax.adam(schedule(ssm_rate)), "rest": optax.adamw(schedule(rate), weight_decay=weight_decay)}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(arms, labels))


def train(
    model: S5Classifier, seed: int, *, params: Any = None, bits: int = 32, factor: int = 1, **settings: Any
) -> tuple[Any, float]:
    """Trained parameters and the seconds it took.

    Args:
      model: the network.
      seed: of the initialisation and the order.
      params: to go on from; None: a new initialisation.
      bits: of A, rounded in every step, straight through; 24 and more are float.
      factor: steps for which each pixel is held.
      **settings: ``steps``, ``batch_size`` and the arguments of `optimizer`.
    """
    (inputs, labels), _ = data()
    batch_size, steps = int(settings.pop("batch_size")), int(settings["steps"])
    transform = optimizer(**settings)
    if params is None:
        params = jax.jit(model.init)(jax.random.key(seed), inputs[:1])["params"]
    params = jax.tree.map(jnp.array, params)  # a copy: the step takes over what it is given
    state = transform.init(params)
    key = jax.random.key(seed)

    def loss(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        variables = {"params": rounded(params, A_PATH, bits)}
        logits = model.apply(variables, jnp.repeat(x, factor, axis=1), train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        gradient = jax.grad(loss)(params, key, x, y)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    started = time.monotonic()
    for index in range(steps):
        rows = order[index * batch_size : (index + 1) * batch_size]
        params, state = step(params, state, jax.random.fold_in(key, index), inputs[rows], labels[rows])
    jax.block_until_ready(params)
    return params, time.monotonic() - started


def evaluator(model: S5Classifier) -> Any:
    """``(params, bits, factor) -> (loss, accuracy)`` on the test set, each pixel held for `factor` steps."""
    _, (inputs, labels) = data()

    @functools.partial(jax.jit, static_argnames="factor")
    def evaluate(params: Any, bits: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": rounded(params, A_PATH, bits)}, jnp.repeat(inputs, factor, axis=1))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits.argmax(-1) == labels).mean()

    return evaluate


def measured(evaluate: Any, params: Any, bits: int, factor: int) -> dict[str, float]:
    """Largest |λ̄|, loss and accuracy with A at `bits`."""
    loss, accuracy = evaluate(params, jnp.float32(bits), factor)
    return {"radius": radius(rounded(params, A_PATH, bits)), "loss": float(loss), "accuracy": float(accuracy)}


def as_parametrised(params: Any, parametrisation: str, factor: int) -> Any:
    """A float network of the "magnitude_phase" parametrisation in either, its steps shorter by `factor`."""
    params = finer(params, factor)
    return params if parametrisation == "magnitude_phase" else naive(params)


def after_training(params: Any) -> Iterator[dict[str, Any]]:
    """What A at every width makes of one trained network."""
    for parametrisation in PARAMETRISATIONS:
        evaluate = evaluator(S5Classifier(**MODEL, parametrisation=parametrisation))
        for factor in HELD:
            own = as_parametrised(params, parametrisation, factor)
            for bits in (*BITS, 32):
                row = {"how": "after training", "parametrisation": parametrisation, "steps": 64 * factor, "bits": bits}
                yield row | measured(evaluate, own, bits, factor)


def fine_tuned(params: Any, seed: int, bits: int) -> Iterator[dict[str, Any]]:
    """What the network makes of A at `bits` when it is trained on with it."""
    for factor in HELD:
        for parametrisation in PARAMETRISATIONS:
            model = S5Classifier(**MODEL, parametrisation=parametrisation)
            own = as_parametrised(params, parametrisation, factor)
            own, seconds = train(model, seed, params=own, bits=bits, factor=factor, **FINE_TUNE[factor])
            row = {"how": "fine-tuned", "parametrisation": parametrisation, "steps": 64 * factor, "bits": bits}
            yield row | measured(evaluator(model), own, bits, factor) | {"seconds": round(seconds, 1)}


def plot(results: list[dict[str, Any]]) -> None:
    """Largest |λ̄| and accuracy over the bits of A, at both lengths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    names = {"magnitude_phase": ("log decay, log frequency", "#1f5fa8"), "naive": ("Re λ̄, Im λ̄", "#c76b12")}
    panels = (("radius", 64, "largest |λ̄|, 64 steps"), ("accuracy", 64, "accuracy, 64 steps"))
    for axis, (key, steps, title) in zip(axes, (*panels, ("accuracy", 1024, "accuracy, 1024 steps")), strict=True):
        for parametrisation, (name, colour) in names.items():
            for how, style in {"after training": "o-", "fine-tuned": "D"}.items():
                wanted = (parametrisation, how, steps)
                chosen = [row for row in results if (row["parametrisation"], row["how"], row["steps"]) == wanted]
                widths = sorted({row["bits"] for row in chosen} - {32})
                values = [np.mean([row[key] for row in chosen if row["bits"] == bits]) for bits in widths]
                axis.plot(widths, values, style, color=colour, ms=4 if style == "o-" else 9, label=f"{name}, {how}")
        axis.set(xlabel="bits of A", title=title)
    axes[0].axhline(1.0, color="#8a8a8a", lw=0.8)
    axes[0].legend(fontsize=7)
    figure.savefig(HERE / "rounding.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Run it, or draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--bits", nargs="*", type=int, default=[4], help="of A, at which to train on")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.plot:
        plot(results)
        return
    for seed in arguments.seeds:
        if any(row["seed"] == seed for row in results):
            print(f"seed {seed} is in {path.name} already")
            continue
        params, seconds = train(S5Classifier(**MODEL), seed, **TRAIN)
        print(f"seed {seed}: trained in {seconds:.0f} s", flush=True)
        tuned = itertools.chain.from_iterable(fine_tuned(params, seed, bits) for bits in arguments.bits)
        for row in itertools.chain(after_training(params), tuned):
            row = {"seed": seed, "training_seconds": round(seconds, 1), **row}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
