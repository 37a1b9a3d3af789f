"""Points as runs of their own: one after another in this process, or several processes side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

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
      Preempted: when stopped, once they all have ended.
    """

    waiting = list(points)
    under_way: dict[int, tuple[Point, subprocess.Popen[bytes]]] = {}
    (folder.path / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or under_way:
            while waiting and len(under_way) < count and not stopped.is_set():
                point = waiting.pop(0)
                under_way[point.index] = point, _start(point, folder, arguments, count)
            if stopped.is_set():
                break
            for index, (point, process) in list(under_way.items()):
                if process.poll() is not None:
                    del under_way[index]
                    _conclude(point, process, folder, failed, ended)
            time.sleep(_POLL_SECONDS)
    finally:
        for _, process in under_way.values():
            _close(process.stdin)
        for point, process in under_way.values():
            process.wait()
            _conclude(point, process, folder, failed, ended)
    if stopped.is_set():
        raise Preempted("stopped; start again to resume")


def _start(point: Point, folder: Folder, arguments: Sequence[str], count: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ}
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / count:.3f}")  # each would take most of a GPU
    command = [sys.executable, "-m", "qtrain.sweep.worker", str(point.index), str(folder.run(point)), *arguments]
    with open(_log(point, folder), "ab") as log:
        # In a session of its own, so that Ctrl-C comes to this process alone, which then stops them.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _conclude(point: Point, process: subprocess.Popen[bytes], folder: Folder, failed: Failed, ended: Ended) -> None:
    _close(process.stdin)
    if process.returncode == PREEMPTED:
        return
    if folder.finished(point):
        ended(point, json.loads((folder.run(point) / SUMMARY).read_bytes()))
        return
    last = _last_line(_log(point, folder))
    try:
        told = json.loads(last)
        error: Exception = Refused(told["kind"], told["error"])
    except (ValueError, KeyError, TypeError):
        error = Crashed(f"the process ended with {process.returncode}: {last or 'it wrote nothing'}")
    failed(point, error)


def _log(point: Point, folder: Folder) -> Path:
    return folder.path / LOGS / f"{point.name}.txt"


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None and not stream.closed:
        stream.close()
