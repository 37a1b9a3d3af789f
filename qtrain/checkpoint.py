"""Checkpoints: written by Orbax in the background, whole or not there at all, checked before they are trusted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from qtrain import manifest as manifests
from qtrain import storage
from qtrain.errors import UsageError, did_you_mean
from qtrain.manifest import MANIFEST, Damaged, folders, steps_of
from qtrain.workdir import sync_folder

_SHOWN_DIFFERENCES = 6


class Restored(NamedTuple):
    """A checkpoint read back: the step it was saved at, the state, and the metadata (``{}`` for another program's)."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in ``directory/<step>/``; each is an Orbax checkpoint with a manifest added.

    A checkpoint is written to a hidden folder, sealed with a manifest that holds a checksum of every file, and renamed
    to its step. So a folder with a step's name was complete when it appeared, whatever kills the process; older ones
    are removed only after that. Whatever does not match its manifest later is damaged: `restore_latest` then falls
    back to the checkpoint before and says so.

    `save` returns once the arrays are copied to the host; the rest happens in one background thread. Call `close` (or
    use ``with``) before the program ends, or the last checkpoint may not be finished.

    Args:
      directory: where they live; created by the first `save`.
      keep: how many of the newest to keep, at least 1.
      best_metric: the name of a metric; the checkpoint with the best value is kept as well (the first of equals, NaN
        never).
      best_mode: whether the largest or the smallest value is best.
      report: takes the one-line remarks of `restore_latest`; prints to stderr by default.

    Raises:
      UsageError: `keep` is not a whole number of at least 1.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {"params": {"kernel": jnp.arange(3.0)}, "key": jax.random.key(0)}
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     for step in (10, 20, 30):
    ...         checkpoints.save(step, state, {"data": {"next": step}})
    ...     checkpoints.wait()
    ...     checkpoints.all_steps(), checkpoints.restore_latest(jax.eval_shape(lambda: state)).metadata
    ([20, 30], {'data': {'next': 30}})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        *,
        report: Callable[[str], None] | None = None,
    ):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise UsageError(f"checkpoint.keep: {keep!r} is not allowed; a whole number of at least 1 is")
        if best_mode not in ("max", "min"):
            raise UsageError(f"checkpoint.best_mode: {best_mode!r} is not allowed; 'max' or 'min' is")
        self.directory = Path(os.path.abspath(directory))
        self._keep, self._best_metric, self._sign = keep, best_metric, 1 if best_mode == "max" else -1
        self._report = report or _print
        self._background = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, futures.Future[None]] | None = None
        self._metrics: dict[int, dict[str, float]] | None = None  # of the whole checkpoints; None before the first save
        self._damaged: set[int] = set()

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Save `state` as checkpoint `step`, in the background unless `wait`; one of that step is replaced.

        The state may be donated or changed as soon as this returns. A save that is still running is waited for first.

        Args:
          step: completed training steps.
          state: any pytree of arrays, typed PRNG keys among them; None leaves are structure.
          metadata: JSON; comes back from `restore_latest` as ``json`` reads it (tuples as lists).
          metrics: numbers by name, for `best_metric`.
          wait: return only once the checkpoint is on the disk.

        Raises:
          UsageError: this or the previous checkpoint could not be written, or `metrics` lacks `best_metric`.
          TypeError: a leaf is not an array, or `metadata` is not JSON.
        """
        self.wait()
        step = int(step)
        named = manifests.named_leaves(state)
        leaves = manifests.describe(named)
        metadata = json.loads(json.dumps(dict(metadata or {})))
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if self._best_metric and metrics is not None and self._best_metric not in numbers:
            guess = did_you_mean(self._best_metric, numbers)
            raise UsageError(f"checkpoint.best_metric: no metric is called {self._best_metric!r}.{guess}")
        with self._explained(step):
            if self._metrics is None:
                self._tidy()
            write = storage.start_writing(self._hidden(step, "partial"), named)
        content = {"step": step, "metadata": metadata, "metrics": numbers, "leaves": leaves}
        self._pending = step, self._background.submit(self._finish, write, content)
        if wait:
            self.wait()

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole, or None if none was ever completed.

        Damaged and half-written ones are passed over, each with one line that says why.

        Args:
          abstract_state: the state to fill: arrays or ``jax.ShapeDtypeStruct``, as from ``jax.eval_shape``. Where a
            leaf has a sharding the array is placed with it; NumPy leaves stay NumPy; others go where new arrays go.

        Raises:
          UsageError: every checkpoint is damaged; or one is whole but does not fit `abstract_state` (the differing
            leaves are listed), which is never a reason to fall back.
        """
        self.wait()
        restored, damaged = _newest(self.directory, abstract_state, partial=False)
        for step in steps_of(self.directory, r"\.(\d+)\.partial.*"):
            if restored is None or step > restored.step:
                self._report(f"checkpoint {step} is half-written (the run was stopped while saving it); passed over")
        if restored is not None:
            _report_damage(self._report, damaged, restored.step)
            self._damaged = set(damaged)
        return restored

    def restore(self, step: int, abstract_state: Any, *, partial: bool = False) -> Restored:
        """Checkpoint `step`, which must be there and whole; with `partial`, of its leaves those of `abstract_state`."""
        self.wait()
        folder = folders(self.directory).get(step)
        if folder is None:
            there = ", ".join(map(str, self.all_steps())) or "none"
            raise UsageError(f"checkpoint {step}: not in {str(self.directory)!r}; there are: {there}")
        return _load_or_explain(folder, abstract_state, partial=partial)

    def all_steps(self) -> list[int]:
        """The steps of the completed checkpoints, ascending."""
        return sorted(step for step, folder in folders(self.directory).items() if (folder / MANIFEST).exists())

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best `best_metric`, or None if none has it."""
        self.wait()
        return self._best(self._read_metrics() if self._metrics is None else self._metrics)

    def wait(self) -> None:
        """Wait for the save that is running, if any; `UsageError` if it failed."""
        if self._pending is None:
            return
        step, future = self._pending
        futures.wait([future])  # if this is interrupted the save is still pending
        self._pending = None
        if future.exception() is not None:
            self._metrics = None  # the next save tidies up first
        with self._explained(step):
            future.result()

    def close(self) -> None:
        """Wait for the save that is running and stop the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _finish(self, write: Callable[[], None], content: dict[str, Any]) -> None:
        """In the background: write, seal, publish, and only then remove what is no longer kept."""
        write()
        if jax.process_index() != 0:
            return
        step, partial = content["step"], self._hidden(content["step"], "partial")
        manifests.seal(partial, **content)
        final, replaced = self.directory / str(step), self._hidden(step, "replaced")
        if final.exists():  # a rename does not replace a folder; `folders` knows the gap between these two
            os.replace(final, replaced)
        os.replace(partial, final)
        sync_folder(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

        assert self._metrics is not None
        self._metrics[step] = content["metrics"]
        self._damaged.discard(step)
        kept = {other for other in self._metrics if other > step}
        kept |= set(sorted(other for other in self._metrics if other <= step)[-self._keep :])
        kept.update(step for step in [self._best(self._metrics)] if step is not None)
        for other in (self._metrics.keys() | self._damaged) - kept:
            self._metrics.pop(other, None)
            self._remove(other)
        self._damaged.clear()

    def _remove(self, step: int) -> None:
        # Renamed first: a half-removed folder under a step's name would look like a damaged checkpoint.
        deleted = self._hidden(step, "deleted")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.directory / str(step), deleted)
        shutil.rmtree(deleted, ignore_errors=True)

    def _best(self, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
        if self._best_metric is None:
            return None
        values = {step: self._sign * each.get(self._best_metric, math.nan) for step, each in sorted(metrics.items())}
        values = {step: value for step, value in values.items() if not math.isnan(value)}
        return max(values, key=values.__getitem__, default=None)

    def _read_metrics(self) -> dict[int, dict[str, float]]:
        metrics = {}
        for step, folder in folders(self.directory).items():
            with contextlib.suppress(Damaged):
                if step not in self._damaged:
                    metrics[step] = manifests.read(folder).metrics
        return metrics

    def _tidy(self) -> None:
        """Before the first save: remove what killed processes left. Not earlier: a reader must not disturb a run."""
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for step in steps_of(self.directory, r"\.(\d+)\.replaced"):
                if not (self.directory / str(step)).exists():
                    os.replace(self._hidden(step, "replaced"), self.directory / str(step))
            for path in self.directory.iterdir():
                if re.match(r"\.\d+\.(partial|replaced|deleted)", path.name):
                    shutil.rmtree(path)
        self._metrics = self._read_metrics()

    def _hidden(self, step: int, what: str) -> Path:
        return self.directory / f".{step}.{what}"

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (UsageError, TypeError):
            raise
        except Exception as error:
            message = f"checkpoint {step} could not be written to {str(self.directory)!r}: {storage.reason(error)}"
            raise UsageError(message) from error


def restore(
    path: str | os.PathLike[str],
    abstract_state: Any,
    *,
    partial: bool = False,
    report: Callable[[str], None] | None = None,
) -> Restored:
    """Read a checkpoint for evaluation or initialisation: ours or, without a check for damage, any that Orbax can read.

    Args:
      path: one checkpoint; or a run's folder, or a folder of checkpoints, whose newest whole one is then meant.
      abstract_state: see `Checkpoints.restore_latest`. Containers match by the names in them: ``{"params": ...}`` fits
        the field `params` of a state class.
      partial: whether the checkpoint may have more leaves than `abstract_state`, such as the optimizer's.
      report: takes one-line remarks; prints to stderr by default.

    Raises:
      UsageError: there is no checkpoint, it is damaged, or it does not fit `abstract_state`.
    """
    path, report = Path(os.path.abspath(path)), report or _print
    if not path.is_dir():
        raise UsageError(f"checkpoint: no folder {str(path)!r}; name a run's folder or one checkpoint in it")
    if (path / MANIFEST).exists():
        return _load_or_explain(path, abstract_state, partial=partial)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    restored, damaged = _newest(directory, abstract_state, partial=partial)
    if restored is not None:
        _report_damage(report, damaged, restored.step)
        return restored
    if (state := storage.load_foreign(path, abstract_state, partial=partial)) is None:
        raise UsageError(f"checkpoint: none in {str(path)!r}; name a run's folder or one checkpoint in it")
    report(f"checkpoint {str(path)!r} has no {MANIFEST}, so it is not checked for damage")
    return Restored(int(path.name) if path.name.isdigit() else 0, state, {})


def _load_or_explain(folder: Path, abstract_state: Any, *, partial: bool) -> Restored:
    try:
        return Restored(*storage.load(folder, abstract_state, partial=partial))
    except Damaged as damage:
        raise UsageError(f"checkpoint {str(folder)!r} is damaged ({damage}); name another") from damage


def _newest(directory: Path, abstract_state: Any, *, partial: bool) -> tuple[Restored | None, dict[int, str]]:
    """The newest whole checkpoint, and why each newer one is not; `UsageError` if there are some and none is whole."""
    damaged: dict[int, str] = {}
    for step, folder in sorted(folders(directory).items(), reverse=True):
        try:
            return Restored(*storage.load(folder, abstract_state, partial=partial)), damaged
        except Damaged as damage:
            damaged[step] = str(damage)
    if damaged:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in list(damaged.items())[:_SHOWN_DIFFERENCES])
        raise UsageError(
            f"checkpoints: all in {str(directory)!r} are damaged ({reasons}); remove the folder to start anew"
        )
    return None, damaged


def _report_damage(report: Callable[[str], None], damaged: Mapping[int, str], used: int) -> None:
    for step, reason in damaged.items():
        report(f"checkpoint {step} is damaged ({reason}); falling back to checkpoint {used}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
