"""The run of a precision range test: one compiled step, whose bits go up a width at a time."""

from __future__ import annotations

import copy
from typing import Any

from ml_collections import ConfigDict

from qtrain.errors import UsageError
from qtrain.schedules import PrecisionSchedule, lowest_that_trains
from qtrain.schedules.schedule import FLOAT_BITS, whole_number

LOWEST = 2
"""Bits that the test begins at."""


def range_test(
    config: ConfigDict,
    workdir: str,
    *,
    first: int = LOWEST,
    last: int | None = None,
    steps: int = 100,
    average: int = 20,
    threshold: float = 0.05,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `config` briefly at each width in turn, in `workdir`, and say at which the training accuracy first rises.

    Weights and activations are at `first` bits for `steps` steps, then a bit more, and so on up to `last`; gradients
    keep their highest bits. It is one run of ``qtrain train`` under a piecewise schedule, at the config's initial
    learning rate without warmup and decay, and without a deficit, by one compiled step; a run that was stopped goes on
    where it was.

    Args:
      config: the config whose bounds are asked for.
      workdir: folder of the test's run.
      first, last: widths, bits; last: by default the most bits of the config's weights, its static counterpart's.
      steps: at each width.
      average: steps that an accuracy is averaged over, the last ones at a width; a divisor of `steps`.
      threshold: what the accuracy has to gain, see `qtrain.schedules.lowest_that_trains`.
      quiet: no plan and no progress.

    Returns:
      ``widths``, ``accuracy`` (A_{−1} first), ``gain``, ``low`` (None: no width passes), ``high``, ``threshold``,
      ``steps``, ``average``, ``compilations``.

    Raises:
      UsageError: a number out of range; a task without a training accuracy; a config whose widths are no data.
    """
    from qtrain.build import build
    from qtrain.train import train
    from qtrain.writers import read_metrics

    for section, off in (("quant.backend", config.quant.backend == "qtrain"), ("widths", not _widths(config))):
        if not off:
            key = "quant.backend='aqt'" if section == "quant.backend" else "multi_precision.widths"
            raise UsageError(f"range-test: {key} has widths that are fixed before the run; leave it out")
    steps, average = whole_number("--steps", steps, 1), whole_number("--average", average, 1)
    if steps % average:
        raise UsageError(f"--average {average}: give a divisor of --steps {steps}")
    if not 0 <= threshold < 1:
        raise UsageError(f"--threshold {threshold:g}: give a share of the examples, at least 0 and below 1")
    experiment = build(config)
    if "accuracy" not in experiment.task.measured:
        raise UsageError(f"range-test: model.name={config.model.name!r} has no training accuracy to go by")
    high = last if last is not None else highest(experiment.schedule)
    first = whole_number("--first", first, 1, FLOAT_BITS - 1)
    if not first < high < FLOAT_BITS:
        raise UsageError(
            f"--first {first}, --last {high}: give the widths to test, from 1 to 31 bits, last above first"
        )
    widths = tuple(range(first, high + 1))
    # A new object: what the caller has may be locked, and is theirs.
    tested = staircase(config, widths, steps, average, experiment.q_max.grads)
    summary = train(tested, workdir, quiet=quiet)
    rows = {row["step"]: row["accuracy"] for row in read_metrics(workdir, "train")}
    accuracies = [rows[average], *(rows[steps * (index + 1)] for index in range(len(widths)))]
    found = lowest_that_trains(widths, accuracies, threshold)
    return {
        "widths": list(widths),
        "accuracy": accuracies,
        "gain": list(found.gains),
        "low": found.low,
        "high": high,
        "threshold": threshold,
        "steps": steps,
        "average": average,
        "compilations": summary["compilations"],
    }


def staircase(config: ConfigDict, widths: tuple[int, ...], steps: int, average: int, grads: int | None) -> ConfigDict:
    """`config` for a run that goes through `widths`, `steps` at each."""
    tested = copy.deepcopy(config)
    with tested.unlocked():
        for kind in (tested.schedule, tested.schedule.weights, tested.schedule.acts, tested.schedule.grads):
            for key in kind:
                if not isinstance(kind[key], ConfigDict):
                    kind[key] = None
        boundaries = tuple(steps * index for index in range(1, len(widths)))
        tested.schedule.update(name="piecewise", boundaries_steps=boundaries, values=widths)
        tested.schedule.grads.update(name="constant", bits=FLOAT_BITS if grads is None else grads)
        for part in ("warmup", "hold_start", "hold", "restart"):
            tested.optimizer.update({f"{part}_steps": 0, f"{part}_epochs": 0.0, f"{part}_percent": 0.0})
        tested.optimizer.schedule = "constant"
        for part in ("start", "length"):  # a window of the run it was meant for
            tested.deficit.update({f"{part}_steps": 0, f"{part}_epochs": 0.0, f"{part}_percent": 0.0})
        tested.deficit.name = "none"
        per_dispatch = tested.train.steps_per_dispatch
        tested.train.update(
            steps=steps * len(widths),
            epochs=0.0,
            log_every_steps=average,
            steps_per_dispatch=per_dispatch if average % per_dispatch == 0 else 1,
        )
        tested.eval.update(every_steps=0, every_epochs=0.0, every_percent=0.0)
        tested.checkpoint.update(every_steps=0, every_epochs=0.0, every_percent=0.0)
    return tested


def highest(schedule: PrecisionSchedule) -> int:
    """The most bits of the weights.

    Raises:
      UsageError: where they are not quantized.
    """
    bits = schedule.q_max.weights
    if bits is None or bits >= FLOAT_BITS:
        raise UsageError("range-test: the config's weights are not quantized, or up to float; give --last, such as 8")
    return int(bits)


def _widths(config: ConfigDict) -> bool:
    return bool(config.multi_precision.widths)
