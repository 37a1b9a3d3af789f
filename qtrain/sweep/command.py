"""``qtrain sweep``: every point of a config's ``sweep()``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from qtrain.errors import Preempted, UsageError
from qtrain.sweep.expand import Point, resolved, selected
from qtrain.sweep.folder import LOGS, Folder, as_begun
from qtrain.workdir import ERRORS

EMITS = ("none", "commands", "slurm")
SHARES = ("auto", "vmap", "interleave")
CLUSTERS = ("none", "slurm", "local")


def run(arguments: list[str]) -> int:
    """``qtrain sweep --config FILE --workdir FOLDER [flags] [--config.KEY=VALUE ...]``.

    Returns:
      The exit code: 0; 1 where points failed; 75 and 130 where it was stopped by SIGTERM or Ctrl-C, to be begun again.

    Raises:
      UsageError: for a mistake in the flags, the config or its points, before anything runs.
    """
    values = _flags()
    if any(argument in ("-h", "--help", "-help", "--helpfull") for argument in arguments):
        flags.DEFINE_string(
            "config", None, "Config file with a sweep(); FILE:smoke is its small form.", flag_values=values
        )
        print(f"usage: qtrain sweep --config FILE --workdir FOLDER [flags]\n{values.get_help()}")
        return 0
    source, base, points = resolved(arguments, values)
    if not values.workdir:
        raise UsageError("--workdir is missing; give the folder of the sweep, such as --workdir runs/suite")
    if values.processes is not None and values.processes < 1:
        raise UsageError(f"--processes {values.processes}: give at least 1")
    if values.vectorized and values.processes is not None:
        raise UsageError("--vectorized is one process; leave out --processes, or --vectorized")
    others = {"submit": "makes each point a job of its own", "emit": "trains nothing"}
    for flag, does in others.items():
        if values[flag].value == "none":
            continue
        for name in ("vectorized", "processes", *others):
            if name != flag and values[name].value != values[name].default:
                raise UsageError(f"--{flag} {does}; leave out --{name}, or --{flag}")
    if values.submit_options and values.submit == "none":
        raise UsageError("--submit_options: only of --submit; add it, or leave this out")
    for name in ("share", "separate"):
        if values[name].value != values[name].default and not values.vectorized:
            raise UsageError(f"--{name}: only of --vectorized; add it, or leave this out")
    points = as_begun(points, values.workdir)
    chosen = selected(points, values.points)
    rest = _about_the_config(arguments, base)
    if values.emit != "none":
        from qtrain.sweep import emit

        print(getattr(emit, values.emit)(chosen, values.workdir, rest))
        return 0
    if values.submit != "none":
        return _submit(values, Folder(values.workdir, source, base, points), chosen, rest)
    if values.share == "vmap" and any(point.config.mesh.fsdp != 1 for point in chosen):
        raise UsageError("--share vmap: mesh.fsdp splits each state over the devices; give --share interleave")
    if values.vectorized and not values.separate:
        from qtrain.sweep.sharing import check

        check(chosen)
    folder = Folder(values.workdir, source, base, points)
    return _Sweep(values, folder, chosen, rest)()


def _submit(values: flags.FlagValues, folder: Folder, chosen: Sequence[Point], arguments: list[str]) -> int:
    from qtrain.sweep import submit

    options = submit.options_of(values.submit_options)
    made = submit.executor(values.submit, str((folder.path / LOGS).resolve()), options)
    left = [point for point in chosen if not folder.finished(point)]
    if left:
        submit.submit(left, values.workdir, arguments, made)
    done = f", {len(chosen) - len(left)} were finished" if len(left) < len(chosen) else ""
    print(f"{len(left)} jobs submitted{done}; they log in {folder.path / LOGS}; qtrain report {folder.path}")
    return 0


class _Sweep:
    """The points that a command asks for, and what has become of them."""

    def __init__(self, values: flags.FlagValues, folder: Folder, points: Sequence[Point], arguments: list[str]):
        self.values, self.folder, self.points, self.arguments = values, folder, points, arguments
        self.failures: dict[str, str] = {}
        self.finished: dict[str, dict[str, Any]] = {}

    def __call__(self) -> int:
        from qtrain import main

        before = [point for point in self.points if self.folder.finished(point)]
        left = [point for point in self.points if not self.folder.finished(point)]
        for point in before:
            self.folder.succeeded(point)
        if before:
            self.say(f"{len(before)} of {len(self.points)} points are finished")
        with stopping() as (stopped, interrupted):
            try:
                if left:
                    self._train(left, stopped)
            except Preempted as stop:
                print(f"qtrain: sweep: {stop}", file=sys.stderr)
                return main.INTERRUPTED if interrupted.is_set() else main.PREEMPTED
        return self._report(len(before))

    def _train(self, left: list[Point], stopped: threading.Event) -> None:
        if self.values.vectorized:
            from qtrain.sweep.sharing import groups
            from qtrain.sweep.together import Asked, train_together

            asked = Asked(self.values.share, self.values.separate, self.values.quiet)
            for group in groups(left):
                train_together(group, self.folder, asked, stopped, self.failed, self.ended, self.say)
            return
        from qtrain.sweep.separate import train_in_processes, train_in_turn

        if self.values.processes is None:
            train_in_turn(left, self.folder, True, stopped, self.failed, self.ended)
        else:
            count = min(self.values.processes, len(left))
            train_in_processes(left, self.folder, self.arguments, count, stopped, self.failed, self.ended)

    def say(self, line: str) -> None:
        """Show a line, unless asked to be quiet."""
        if not self.values.quiet:
            print(line, flush=True)

    def ended(self, point: Point, summary: dict[str, Any]) -> None:
        """A point is finished."""
        self.finished[point.name] = summary
        self.folder.succeeded(point)
        quality = [f"{name} {summary[name]:.4g}" for name in _shown(summary)]
        self.say("  ".join([point.name, *quality]))

    def failed(self, point: Point, error: Exception) -> None:
        """A point failed: the sweep goes on."""
        self.failures[point.name] = message = self.folder.failed(point, error)
        print(f"qtrain: {point.name} failed: {message}", file=sys.stderr, flush=True)

    def _report(self, before: int) -> int:
        parts = [f"{len(self.points)} points", f"{before + len(self.finished)} finished"]
        if self.failures:
            parts.append(f"{len(self.failures)} failed, see {self.folder.path / ERRORS}")
        print(f"{', '.join(parts)}; qtrain report {self.folder.path}")
        return 1 if self.failures else 0


@contextlib.contextmanager
def stopping() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Events that SIGTERM and Ctrl-C set, and that Ctrl-C sets, while inside; a second Ctrl-C interrupts at once."""
    stopped, interrupted = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped, interrupted
        return

    def interrupt(*_: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)  # whoever handles that now: a run, between its steps, or this

    handlers = {signal.SIGTERM: lambda *_: stopped.set(), signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stopped, interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    of: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "Folder of the sweep, with a run for each point; continued if begun.", **of)
    flags.DEFINE_bool("vectorized", False, "All points in one program, where their differences are data to it.", **of)
    flags.DEFINE_enum("share", "auto", SHARES, "With --vectorized: how the points share it; auto: measured.", **of)
    flags.DEFINE_bool("separate", False, "With --vectorized: a program for each group that can share one.", **of)
    flags.DEFINE_integer("processes", None, "So many processes side by side, one for each point.", **of)
    flags.DEFINE_string("points", None, "These points only, by index: 0,3,10-14.", **of)
    flags.DEFINE_enum("emit", "none", EMITS, "Train nothing: print a command for each point, or a Slurm array.", **of)
    flags.DEFINE_enum("submit", "none", CLUSTERS, "Each point as a job, by submitit, requeued when preempted.", **of)
    flags.DEFINE_list("submit_options", [], "submitit's: timeout_min=240,gpus_per_node=1,slurm_partition=gpu.", **of)
    flags.DEFINE_bool("quiet", False, "No progress, only how many points ended.", **of)
    return values


def _about_the_config(arguments: Sequence[str], base: ConfigDict) -> list[str]:
    """``--config`` and its overrides among the arguments, each as ``--name=value``."""
    kept, following = [], iter(arguments)
    for argument in following:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):  # the value of a flag
            continue
        if name != "config" and not name.removeprefix("no").startswith("config."):
            continue
        flag = base
        for part in name.removeprefix("no").split(".")[1:]:
            flag = flag[part]
        kept.append(argument if equals or isinstance(flag, bool) else f"{argument}={next(following)}")
    return kept


def _shown(summary: dict[str, Any]) -> list[str]:
    """The names of what is shown of a finished point: the first quality that was evaluated, and the cost."""
    qualities = [name for name in summary if name.endswith(("_accuracy", "_map50", "_loss")) and name != "train_loss"]
    return [*sorted(qualities, key=lambda name: name.endswith("_loss"))[:1], "effective_bitops"]
