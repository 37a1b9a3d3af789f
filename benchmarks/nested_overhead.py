"""What nested quantization layers add to a train step: the MNIST perceptron and the CIFAR-10 CNN, against float32.

Each arm is the step of ``qtrain train`` of a shipped config, and of the same config with its weights and biases in
float, both compiled once and timed in turn in one process, in an order that alternates: the ratio of a round is that of
two neighbouring measurements, which a busy machine disturbs alike. Prints the median ratio with its quartiles, and the
ratio of the fastest steps. Data are generated images of the right shape. "lsq" is the same network with kernels by LSQ
and biases in float, for comparison. ``--clock cpu`` counts the time of the process on all cores, not that of the wall:
what a machine that others use can still measure, best pinned to one core.

    python benchmarks/nested_overhead.py --rounds 30 --out benchmarks/nested_overhead.jsonl
    taskset -c 1 python benchmarks/nested_overhead.py --clock cpu --cases mnist_mlp
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain import overrides
from qtrain.build import build
from qtrain.state import create, make_train_step

ROOT = Path(__file__).parents[1]
CASES = ("mnist_mlp", "cifar10_cnn")
REPEATS = {"mnist_mlp": 10, "cifar10_cnn": 1}
ARMS = ("float32", "nested", "nested without loss term", "lsq")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def config_of(case: str, arm: str, batch_size: int | None) -> Any:
    """The shipped config, on generated data; without its loss term; or its float counterpart."""
    # `smoke` generates the data; the model and the batch are then the config's own again.
    config = overrides.load(f"{ROOT / 'configs' / case}_nested.py:smoke")
    whole = overrides.load(f"{ROOT / 'configs' / case}_nested.py")
    with config.unlocked():
        config.model.update(whole.model)
        config.data.batch_size = whole.data.batch_size if batch_size is None else batch_size
        if arm == "float32":
            config.quant.update(weights="none", bias="none", rules=())
            config.quant.ends = config.schedule.bits = 32
        if arm == "lsq":
            config.quant.update(weights="lsq", bias="none", rules=())
        if arm != "nested":
            for term in config.losses:
                config.losses[term].rate = 0.0
    return config


def prepared(config: Any) -> tuple[Any, Any, Any]:
    """The compiled step, its first state, and a batch."""
    experiment = build(config)
    shape = experiment.inputs()
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=shape.shape), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, shape.shape[0])),
    }
    arguments = experiment.qmodel, experiment.optimizer
    state = jax.jit(lambda: create(*arguments, 0, batch["image"], experiment.additions))()
    step = make_train_step(*arguments, experiment.precision, experiment.plan.ops, 50, experiment.additions)
    return jax.jit(step, donate_argnums=0), state, batch


def measure(case: str, rounds: int, batch_size: int | None, clock: str = "wall") -> list[dict[str, Any]]:
    """The rows of a case."""
    arms = {arm: prepared(config_of(case, arm, batch_size)) for arm in ARMS}
    key, times = jax.random.key(0), {arm: [] for arm in arms}
    for turn in range(rounds + 2):
        for arm in list(arms) if turn % 2 else list(arms)[::-1]:
            step, state, batch = arms[arm]
            start = CLOCKS[clock]()
            for _ in range(REPEATS[case]):
                state, out = step(state, batch, key)
            jax.block_until_ready((state, out))
            times[arm].append((CLOCKS[clock]() - start) / REPEATS[case])
            arms[arm] = step, state, batch
    rows = []
    base = np.array(times["float32"][2:])
    for arm in arms:
        measured = np.array(times[arm][2:])
        low, median, high = np.percentile(measured / base, (25, 50, 75))
        rows.append(
            {
                "case": case,
                "arm": arm,
                "clock": clock,
                "batch": arms[arm][2]["label"].shape[0],
                "step_ms": round(1e3 * float(np.median(measured)), 3),
                "fastest_ms": round(1e3 * float(measured.min()), 3),
                "ratio_to_float32": round(float(median), 4),
                "quartiles": [round(float(low), 4), round(float(high), 4)],
                "ratio_of_fastest": round(float(measured.min() / base.min()), 4),
                "rounds": rounds,
                "date": datetime.date.today().isoformat(),
                "load": round(os.getloadavg()[0], 1),
                "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "jax": jax.__version__,
                "backend": jax.default_backend(),
                "device": jax.devices()[0].device_kind,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, help="the config's own unless given")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--out", help="a file that the rows are appended to")
    arguments = parser.parse_args()
    rows = []
    for case in arguments.cases:
        for row in measure(case, arguments.rounds, arguments.batch, arguments.clock):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
