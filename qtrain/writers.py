"""Metrics on disk: JSON lines for programs, TensorBoard event files for eyes; both exact across a kill and a resume."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.workdir import replace_file

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and, unless told not to, scalars to TensorBoard event files.

    A row is one line, ``{"step": 100, "kind": "train", "loss": 0.31, ...}``: the step the numbers belong to, what they
    are (``train`` or ``eval``), then the values in the order given. In TensorBoard a value is the scalar ``kind/name``.

    Numbers may be Python's, NumPy's or JAX's; arrays become lists (and stay out of TensorBoard). NaN and the infinities
    become ``null``: JSON has no word for them, every reader takes null as a missing number, and a string would turn a
    numeric column into a mixed one. TensorBoard gets them as they are. Floats are written so that they read back equal.

    On resume the file is cut back to the checkpoint: rows with ``step <= resume_step`` stay, byte for byte, later ones
    and a last line without its end go. So the file of a run that was killed and resumed is the file of one that was
    not, timing fields apart, provided that the rows of step s are written, and `flush` called, before checkpoint s is.

    Args:
      workdir: the run's folder, which exists.
      resume_step: the step of the restored checkpoint, or None to begin with an empty file.
      tensorboard: whether to write event files, under ``tensorboard/``.
      enabled: False makes every method do nothing, for all hosts but the first.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricsWriter(folder, resume_step=None, tensorboard=False) as writer:
    ...     writer.write(1, "train", {"loss": np.float32(0.5), "grad_norm": float("nan")})
    >>> read_metrics(folder)
    [{'step': 1, 'kind': 'train', 'loss': 0.5, 'grad_norm': None}]
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None,
        *,
        tensorboard: bool = True,
        enabled: bool = True,
    ):
        self._lines = None
        self._events: _EventFile | None = None
        if not enabled:
            return
        path = Path(workdir) / METRICS
        cut_back(path, -1 if resume_step is None else resume_step)
        self._lines = open(path, "ab")  # noqa: SIM115  it lives as long as the writer
        if tensorboard:
            self._events = _EventFile(Path(workdir) / TENSORBOARD, 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one row. It survives a kill of the process from here on, and a power cut from the next `flush` on.

        Raises:
          ValueError: a value is called ``step`` or ``kind``.
          TypeError: a value is neither a number, a string, None, nor a list or array of those.
        """
        if self._lines is None:
            return
        if taken := {"step", "kind"} & values.keys():
            raise ValueError(f"a metric cannot be called {min(taken)!r}: the row has a field of that name")
        plain = {name: _plain(name, value) for name, value in values.items()}
        row = {"step": int(step), "kind": kind, **{name: _finite(value) for name, value in plain.items()}}
        self._lines.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._lines.flush()
        if self._events is not None:
            scalars = {
                f"{kind}/{name}": float(value) for name, value in plain.items() if isinstance(value, int | float)
            }
            self._events.write(int(step), scalars)

    def flush(self) -> None:
        """Put every row on the disk. Call it before each checkpoint, so that no checkpoint is ahead of its rows."""
        if self._lines is not None:
            os.fsync(self._lines.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close; the writer does nothing afterwards."""
        self.flush()
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()
        self._lines = self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run, all or those of one `kind`; a last line that is still being written is left out."""
    lines = (Path(workdir) / METRICS).read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if kind is None or row["kind"] == kind]


def cut_back(path: str | os.PathLike[str], step: int) -> None:
    """Keep the rows of a JSON-lines file with a ``step`` up to `step`, unchanged; drop the others and a partial line.

    The file is replaced in one rename, or not touched if nothing is to go. A line in the middle that is not a row (a
    damaged disk) goes too, and is reported on stderr.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    partial = lines.pop()
    kept, damaged = [], 0
    for line in lines:
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            keep, damaged = False, damaged + 1
        if keep:
            kept.append(line + b"\n")
    if damaged:
        print(f"warning: {path}: {damaged} damaged lines dropped", file=sys.stderr)
    if len(kept) == len(lines) and not partial:
        return
    replace_file(path, b"".join(kept))


def _plain(name: str, value: Any) -> Any:
    """A Python number, string, None, or nested list of those. Floats keep their exact value."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    array = np.asarray(value)
    if array.dtype.kind in "biuf":
        return array.tolist()
    try:
        return array.astype(np.float64, casting="safe").tolist()  # bfloat16 and the like
    except TypeError:
        raise TypeError(
            f"metric {name!r} is a {type(value).__name__}; a number, a string or an array is needed"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _EventFile:
    """One TensorBoard event file, written in the calling thread.

    tensorboardX's ``SummaryWriter`` hands events to a queue that its ``flush`` does not wait for, so a kill would lose
    points that are older than the checkpoint; its ``EventsWriter`` below that writes them at once.
    """

    def __init__(self, folder: Path, purge_step: int):
        # Imported here: it takes a tenth of a second, and runs without TensorBoard files need none of it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # protobuf's remarks on the library's generated code
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        resumed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        # The library's file name has whole seconds: a resume within the same second would overwrite the file.
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if resumed:  # tells TensorBoard to forget what an earlier process wrote from `purge_step` on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._file.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._file.write_event(event)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
