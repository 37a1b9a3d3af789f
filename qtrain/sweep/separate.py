"""Points as runs of their own: one after another in this process, or several processes side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from qtrain.errors import Preempted
from qtrain.main import PREEMPTED
from qtrain.sweep.expand import Point
from qtrain.sweep.folder import LOGS, Folder
from qtrain.workdir import SUMMARY

_POLL_SECONDS = 0.1

Failed = Callable[[Point, Exception], None]
Ended = Callable[[Point, dict[str, Any]], None]


class Crashed(Exception):
    """A process ended without saying why."""


class Refused(Exception):
    """What another process says went wrong: the name of its exception, and the message."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def train_in_turn(
    points: Sequence[Point],
    folder: Folder,
    quiet: bool,
    stopped: threading.Event,
    failed: Failed,
    ended: Ended,
) -> None:
    """Train each point, as ``qtrain train`` does, in this process.

    Raises:
      Preempted: when stopped; the run in progress is saved.
    """
    from qtrain.train import train

    for point in points:
        if stopped.is_set():
            raise Preempted(f"stopped before {point.name}; start again to resume")
        try:
            summary = train(point.config, str(folder.run(point)), quiet=quiet, stopped=stopped)
        except Preempted:
            raise
        except Exception as error:
            failed(point, error)
        else:
            ended(point, summary)


def train_in_processes(
    points: Sequence[Point],
    folder: Folder,
    arguments: Sequence[str],
    count: int,
    stopped: threading.Event,
    failed: Failed,
    ended: Ended,
) -> None:
    """Train each point in a process of its own, `count` at a time; what they print goes to ``logs/``.

    A process stops, and saves, when its standard input ends: when this one asks it to, and when this one is gone.

    Args:
      points: unfinished ones.
      folder: of the sweep.
      arguments: ``--config`` and its overrides.
      count: processes at a time.
      stopped: set to stop them all.
      failed, ended: told of each point.

    Raises:
      Preempted: when stopped, once they all have ended; or once the others have, where a process was stopped alone.
    """

    waiting = list(points)
    under_way: list[_Process] = []
    left: list[str] = []
    (folder.path / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or under_way:
            while waiting and len(under_way) < count and not stopped.is_set():
                point = waiting.pop(0)
                under_way.append(_Process(point, folder, arguments, count))
            if stopped.is_set():
                break
            for process in [process for process in under_way if process.has_ended()]:
                under_way.remove(process)
                if not process.conclude(failed, ended):
                    left.append(process.point.name)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in under_way:
            process.ask_to_stop()
        for process in under_way:
            process.conclude(failed, ended)
    if stopped.is_set():
        raise Preempted("stopped; start again to resume")
    if left:
        raise Preempted(f"stopped by a signal of their own: {', '.join(left)}; start again to resume")


class _Process:
    """A point's process, started.

    Args:
      point: that it trains.
      folder: of the sweep.
      arguments: ``--config`` and its overrides.
      count: processes at a time.
    """

    def __init__(self, point: Point, folder: Folder, arguments: Sequence[str], count: int):
        self.point, self._folder = point, folder
        environment = {**os.environ}
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / count:.3f}")  # each would take most of a GPU
        named = str(point.index), point.digest, str(folder.run(point))
        self._log = folder.path / LOGS / f"{point.name}.txt"
        with open(self._log, "ab") as log:
            self._begin = os.fstat(log.fileno()).st_size  # what is before is of an earlier process
            # In a session of its own, so that Ctrl-C comes to this process alone, which then stops them.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qtrain.sweep.worker", *named, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Whether it has, in whatever way."""
        return self._process.poll() is not None

    def ask_to_stop(self) -> None:
        """By closing its standard input."""
        stream = self._process.stdin
        if stream is not None and not stream.closed:
            stream.close()

    def conclude(self, failed: Failed, ended: Ended) -> bool:
        """Wait for its end and tell of it; False: it was stopped, and there is nothing to tell."""
        self._process.wait()
        self.ask_to_stop()  # a pipe to close
        code = self._process.returncode
        if code == PREEMPTED:
            return False
        if self._folder.finished(self.point):
            ended(self.point, json.loads((self._folder.run(self.point) / SUMMARY).read_bytes()))
            return True
        last = self._last_line()
        try:
            told = json.loads(last if code > 0 else "{}")  # one that a signal ended says nothing
            error: Exception = Refused(told["kind"], told["error"])
        except (ValueError, KeyError, TypeError):
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            error = Crashed(f"the process ended with {how}: {last or 'it wrote nothing'}")
        failed(self.point, error)
        return True

    def _last_line(self) -> str:
        with open(self._log, "rb") as file:
            file.seek(self._begin)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
