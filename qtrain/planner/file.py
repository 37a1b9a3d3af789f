"""Fitted laws as a file: JSON that ``qtrain plan-budget --law`` reads."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from qtrain.errors import UsageError
from qtrain.planner.constants import Constant
from qtrain.planner.fit import Fitted
from qtrain.planner.fit_fraction import Cell, FittedFraction
from qtrain.planner.fit_loss import FittedLoss, Residual

_KIND = "qtrain fit"


def save(path: str | os.PathLike[str], fitted: Fitted) -> None:
    """Write the laws, all or nothing.

    Raises:
      UsageError: a file that cannot be written.
    """
    from qtrain.workdir import write_json

    try:
        write_json(path, {"program": _KIND, **dataclasses.asdict(fitted)})
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"--out {os.fspath(path)!r} cannot be written: {reason}; name another file") from None


def load(path: str | os.PathLike[str]) -> Fitted:
    """What `save` wrote.

    Raises:
      UsageError: a file that cannot be read, or that `save` did not write.
    """
    where = f"--law {os.fspath(path)!r}"
    try:
        stored = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise UsageError(f"{where}: no JSON; give a file that qtrain fit wrote") from None
    if not isinstance(stored, dict) or stored.get("program") != _KIND:
        raise UsageError(f"{where}: not written by qtrain fit; give a file that it wrote")
    try:
        return Fitted(_loss(stored["loss"]), _fraction(stored["fraction"]), tuple(stored["notes"]), stored["runs"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where} is damaged ({error!r}); fit anew with qtrain fit") from None


def _loss(stored: dict[str, Any] | None) -> FittedLoss | None:
    if stored is None:
        return None
    return FittedLoss(
        constants={name: Constant(**value) for name, value in stored["constants"].items()},
        efficiency={int(bits): Constant(**value) for bits, value in stored["efficiency"].items()},
        reference=stored["reference"],
        params=_pair(stored["params"]),
        tokens=_pair(stored["tokens"]),
        residuals=tuple(Residual(**value) for value in stored["residuals"]),
        runs=stored["runs"],
    )


def _fraction(stored: dict[str, Any] | None) -> FittedFraction | None:
    if stored is None:
        return None
    lists = ("fractions", "losses")
    cells = [Cell(**{**value, **{name: tuple(value[name]) for name in lists}}) for value in stored["cells"]]
    return FittedFraction(Constant(**stored["constant"]), tuple(cells), stored["runs"])


def _pair(values: list[float]) -> tuple[float, float]:
    low, high = values
    return low, high
