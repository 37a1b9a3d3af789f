"""What a run is judged by: its quality metric, and what its cost is measured in."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from qtrain.errors import UsageError, did_you_mean
from qtrain.report.runs import Run

TEXT = ("tiny_shakespeare", "lm1b", "python_reference", "text", "synthetic_text")
"""Data sets whose models predict the next token, and are judged by their loss; `qtrain.data` has them, and JAX."""
LOWER = ("loss", "perplexity", "error", "bytes", "bits", "bitops", "cost", "seconds")
"""Words in the name of a metric that say that less is better."""
SHARES = ("accuracy", "map")
"""Words in the name of a metric that is a share of 1, shown in percent."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A name in the summaries, and how it is shown: `label` with its unit, numbers times `factor`."""

    name: str

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return not set(self.name.split("_")) & set(LOWER)

    @property
    def direction(self) -> str:
        """For people."""
        return "more is better" if self.maximize else "less is better"

    @property
    def factor(self) -> float:
        """What numbers are multiplied with before they are shown."""
        return 100.0 if any(word in self.name for word in SHARES) else 1.0

    @property
    def label(self) -> str:
        """For an axis or a column."""
        return self.name.replace("_", " ") + (", %" if self.factor == 100 else "")

    @property
    def unit(self) -> str:
        """Of a difference."""
        return "points" if self.factor == 100 else "units of " + self.name.replace("_", " ")

    def of(self, run: Run, suffix: str = "") -> float:
        """The run's number, shown as the metric is; NaN where it has none."""
        return self.factor * run.values.get(self.name + suffix, math.nan)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A name in the summaries, what to call it on an axis, and the short name of files and columns."""

    name: str
    label: str
    short: str
    stored: bool = (
        False  # of the widths of the last step, at which a run's weights are stored; else of its whole training
    )

    def of(self, run: Run) -> float:
        """The run's number; NaN where it has none."""
        return run.values.get(self.name, math.nan)


COSTS = (
    Cost("effective_bitops", "bit operations of training (BitOps)", "BitOps"),
    Cost("stored_bytes", "bytes of the stored weights", "bytes", stored=True),
)


def quality_at(run: Run, metric: Metric, cost: Cost) -> float:
    """The quality that belongs to a cost: for one of stored weights that at the widths they are stored in.

    A schedule may end below its highest bits. The metric itself is measured at the highest, ``…_scheduled`` at those of
    the last step, which the bytes are of. Of a run that trains several widths the widest is what is stored.
    """
    several = re.compile(re.escape(metric.name) + r"_\d+bit")
    if cost.stored and not any(map(several.fullmatch, run.values)):
        value = metric.of(run, "_scheduled")
        if math.isfinite(value):
            return value
    return metric.of(run)


def quality_label(metric: Metric, cost: Cost) -> str:
    """What `quality_at` is, for an axis or a column."""
    name, comma, unit = metric.label.partition(",")
    return f"{name} at the stored widths{comma}{unit}" if cost.stored else metric.label


def metric_of(run: Run) -> Metric | None:
    """What the run is judged by: its mAP@50 if it has one, the loss of a model of text, else the accuracy; or nothing.

    >>> metric_of(Run("", {"data.name": "text"}, True, 1, 1, {"test_loss": 2.0, "test_accuracy": 0.3}, {}, None)).name
    'test_loss'
    """
    names = ["test_map50", "test_accuracy", "test_loss"]
    if run.config.get("data.name") in TEXT:
        names = ["test_loss"]
    return next((Metric(name) for name in names if math.isfinite(run.values.get(name, math.nan))), None)


def asked_metric(name: str, runs: Sequence[Run]) -> Metric:
    """The metric called `name`.

    Raises:
      UsageError: no run has it.
    """
    names = sorted({each for run in runs for each in run.values})
    if name not in names:
        tests = [each for each in names if each.startswith("test_")] or names
        raise UsageError(f"--metric {name}: no run has it; there are {', '.join(tests)}.{did_you_mean(name, names)}")
    return Metric(name)
