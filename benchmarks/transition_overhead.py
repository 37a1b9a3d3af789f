"""What scaling by the transition rate adds to a quantized train step of a ResNet-20, as a ratio to the step without.

Both arms are compiled once and timed in turn in one process, in an order that alternates: the ratio of a round is that
of two neighbouring measurements, which a busy machine disturbs alike. The bits are traced, so that the codes are
evaluated on two grids, as under a precision schedule. Prints the median ratio with its quartiles. A busy
machine, or another fusion of the same step, drowns a difference of a hundredth: so also the time of the arm's update
alone, and what it takes beyond SGD's as a share of the fastest step.

    python benchmarks/transition_overhead.py --rounds 40 --out benchmarks/transition_overhead.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qtrain
from qtrain.metrics import cross_entropy
from qtrain.models.resnet import CifarResNet
from qtrain.optim import codes_per_leaf, scale_by_transition_rate

BATCH, RATE = 64, 0.1


def codes(path: str, weight: jax.Array, bits: Any, scales: Any = None) -> jax.Array | None:
    """Codes of a kernel on a grid of frozen scale 3σ, γ-scaled."""
    if weight.ndim < 2:
        return None
    high = jnp.left_shift(1, jnp.asarray(4 if bits is None else bits, jnp.int32) - 1)
    per_step = high / (1.0 if scales is None else scales[path])
    return jnp.clip(jnp.round(weight * per_step), -high, high - 1).astype(jnp.int32)


def make_step(qmodel: Any, optimizer: optax.GradientTransformationExtraArgs, scales: Any) -> Callable[..., Any]:
    """A jitted train step ``(params, others, opt_state, inputs, labels, bits, weight_bits)``."""

    def step(params: Any, others: Any, opt_state: Any, inputs: Any, labels: Any, bits: Any, weight_bits: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            logits, updated = qmodel.apply(
                {"params": params, **others}, inputs, train=True, bits=bits, mutable=list(others)
            )
            return cross_entropy(logits, labels).mean(), updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, bits=weight_bits, scales=scales)
        return optax.apply_updates(params, updates), dict(updated), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def update_ms(optimizer: optax.GradientTransformationExtraArgs, params: Any, scales: Any) -> float:
    """Milliseconds of an update alone, the fastest of 20 measurements."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, bits: Any) -> Any:
        grads = jax.tree.map(lambda leaf: 0.01 * leaf, params)
        updates, opt_state = optimizer.update(grads, opt_state, params, bits=bits, scales=scales)
        return optax.apply_updates(params, updates), opt_state

    state, times = (jax.tree.map(jnp.copy, params), optimizer.init(params)), []
    for _ in range(22):
        start = time.perf_counter()
        for _ in range(10):
            state = update(*state, jnp.float32(4))
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / 10)
    return 1e3 * min(times[2:])


def kernels(tree: Any) -> Any:
    """Which leaves learn at a transition rate."""
    return jax.tree.map(lambda leaf: "latent" if leaf.ndim > 1 else "rest", tree)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rules", nargs="*", default=["additive"])
    parser.add_argument("--repeats", type=int, default=1, help="steps a measurement")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(arguments.batch, 32, 32, 3)).astype("f")
    labels = rng.integers(0, 10, arguments.batch)
    qmodel = qtrain.quantize(CifarResNet(10), qtrain.default_rules())
    ordinary = optax.sgd(RATE, momentum=0.9)
    arms: dict[str, Any] = {"sgd": optax.partition({"latent": ordinary, "rest": ordinary}, kernels)}
    for rule in arguments.rules:
        scale = scale_by_transition_rate(
            codes_per_leaf(codes), optax.cosine_decay_schedule(5e-3, 10_000), RATE, rule=rule, target_scale="sqrt_bits"
        )
        latent = optax.chain(optax.sgd(1.0, momentum=0.9), scale)
        arms[f"sgdt_{rule}"] = optax.partition({"latent": latent, "rest": ordinary}, kernels)
    running, alone = {}, {}
    for arm, optimizer in arms.items():
        variables = qmodel.init(jax.random.key(0), inputs[:2])
        others = {key: value for key, value in variables.items() if key not in ("params", "quant")}
        params = variables["params"]
        flat = jax.tree_util.tree_leaves_with_path(params)
        scales = {jax.tree_util.keystr(path, simple=True, separator="/"): 3 * jnp.std(leaf) for path, leaf in flat}
        alone[arm] = update_ms(optimizer, params, scales)
        running[arm] = (make_step(qmodel, optimizer, scales), (params, others, optimizer.init(params)))
    bits, weight_bits = qtrain.Precision(jnp.float32(4), jnp.float32(4), jnp.float32(8)), jnp.float32(4)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(arguments.rounds + 2):
        for arm in list(arms) if turn % 2 else list(arms)[::-1]:
            step, state = running[arm]
            start = time.perf_counter()
            for _ in range(arguments.repeats):
                *state, loss = step(*state, inputs, labels, bits, weight_bits)
            jax.block_until_ready((loss, state))
            times[arm].append((time.perf_counter() - start) / arguments.repeats)
            running[arm] = (step, tuple(state))
    rows = []
    fastest = 1e3 * min(times["sgd"][2:])
    for arm in arms:
        measured = np.array(times[arm][2:])
        low, median, high = np.percentile(measured / np.array(times["sgd"][2:]), (25, 50, 75))
        rows.append(
            {
                "case": "resnet20",
                "arm": arm,
                "batch": arguments.batch,
                "step_ms": round(1e3 * float(np.median(measured)), 3),
                "fastest_ms": round(1e3 * float(np.min(measured)), 3),
                "ratio_to_sgd": round(float(median), 4),
                "quartiles": [round(float(low), 4), round(float(high), 4)],
                "update_ms": round(alone[arm], 3),
                "update_share": round((alone[arm] - alone["sgd"]) / fastest, 4),
                "rounds": arguments.rounds,
                "jax": jax.__version__,
                "backend": jax.default_backend(),
                "device": jax.devices()[0].device_kind,
                "machine": platform.machine(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
