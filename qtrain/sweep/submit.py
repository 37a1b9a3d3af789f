"""A sweep's points as jobs of a cluster, by submitit (the extra ``qtrain[slurm]``)."""

from __future__ import annotations

import ast
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from qtrain.errors import Preempted, UsageError, one_line
from qtrain.sweep.expand import Point, resolved
from qtrain.sweep.folder import Folder, as_begun

_POLL_SECONDS = 0.2
# submitit's own are 5 minutes (2 locally) and 3 turns: a training run would be cut off, though it can go on.
_DEFAULTS = {"name": "qtrain", "timeout_min": 240}
_TURNS = 100
_LOGGING = "SUBMITIT_LOG_LEVEL"


class Job:
    """One point, trained by a process that the job starts; called, and asked for a checkpoint, by submitit.

    Args:
      workdir: of the sweep.
      index: of the point.
      arguments: ``--config`` and its overrides.
    """

    def __init__(self, workdir: str, index: int, arguments: Sequence[str]):
        self.workdir, self.index, self.arguments = workdir, index, tuple(arguments)

    def __call__(self) -> dict[str, Any]:
        """Train the point, from where its run was left; its summary.

        Raises:
          Preempted: stopped by something else than submitit's signal, such as a SIGTERM to all processes of the job.
          Exception: what went wrong in training, which ``errors.json`` records too.
        """
        self._stopped = threading.Event()
        self._outcome: list[dict[str, Any] | Exception] = []
        # submitit's handler runs in the main thread, between its instructions, and waits there until the run is saved.
        self._thread = threading.Thread(target=self._train)
        self._thread.start()
        self._wait()
        outcome = self._outcome[0] if self._outcome else Preempted("stopped; submit again to go on")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def checkpoint(self) -> Any:
        """Stop the process, which saves its run; what submitit calls when it has put the job into the queue again."""
        from submitit.helpers import DelayedSubmission

        self._stopped.set()
        self._wait()
        return DelayedSubmission(Job(self.workdir, self.index, self.arguments))

    def _wait(self) -> None:
        while self._thread.is_alive():
            time.sleep(_POLL_SECONDS)

    def _train(self) -> None:
        from qtrain.sweep.separate import train_in_processes

        try:
            source, base, points = resolved(self.arguments)
            points = as_begun(points, self.workdir)
            folder = Folder(self.workdir, source, base, points)

            def failed(point: Point, error: Exception) -> None:
                folder.failed(point, error)
                self._outcome.append(error)

            def ended(point: Point, summary: dict[str, Any]) -> None:
                folder.succeeded(point)
                self._outcome.append(summary)

            train_in_processes([points[self.index]], folder, self.arguments, 1, self._stopped, failed, ended)
        except Preempted:
            pass
        except Exception as error:
            self._outcome.append(error)


def options_of(text: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters from ``KEY=VALUE`` texts: Python's literals as such, anything else as text.

    A job has 240 minutes, and another turn, up to 100 times, when they are over.

    Raises:
      UsageError: a text that is no KEY=VALUE.
    """
    options: dict[str, Any] = dict(_DEFAULTS)
    for part in text:
        key, equals, value = part.partition("=")
        if not (key.strip() and equals):
            raise UsageError(f"--submit_options {part!r}: give KEY=VALUE,..., such as timeout_min=240,gpus_per_node=1")
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.strip()] = value
    return options


def executor(cluster: str, folder: str, options: dict[str, Any]) -> Any:
    """submitit's executor for jobs that log into `folder`.

    Args:
      cluster: ``slurm``, or ``local`` (processes of this machine, all at once).
      folder: for the jobs' logs and pickles.
      options: submitit's parameters, such as ``timeout_min`` and ``slurm_partition``.

    Raises:
      UsageError: submitit is not installed, the cluster is not there, or an option is unknown or of the wrong type.
    """
    try:
        submitit = _submitit()
    except ImportError:
        raise UsageError(f"--submit {cluster}: submitit is not installed; pip install 'qtrain[slurm]'") from None
    try:
        made = submitit.AutoExecutor(folder=folder, cluster=cluster, **{f"{cluster}_max_num_timeout": _TURNS})
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"--submit {cluster}: {one_line(error)}; run it where jobs are submitted, or use --emit commands"
        ) from None
    try:
        made.update_parameters(**options)
    except (NameError, AssertionError, ValueError, TypeError) as error:
        raise UsageError(f"--submit_options: {one_line(error)}") from None
    return made


def submit(points: Sequence[Point], workdir: str, arguments: Sequence[str], made: Any) -> list[Any]:
    """A job for each point, one array where the cluster has arrays: submitit's jobs."""
    with made.batch():
        return [made.submit(Job(workdir, point.index, arguments)) for point in points]


def _submitit() -> Any:
    """The module, imported without the logging that it sets up, which closes the handlers that others have."""
    before = os.environ.get(_LOGGING)
    os.environ[_LOGGING] = "NOCONFIG"
    try:
        import submitit
    finally:
        del os.environ[_LOGGING]
        if before is not None:
            os.environ[_LOGGING] = before
    return submitit
