"""Points in one program: what differs between them is data to the one compiled step that they share."""

from __future__ import annotations

import dataclasses
import math
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from qtrain import workdir
from qtrain.drive import Interleaved, drive
from qtrain.errors import Preempted, UsageError
from qtrain.programs import Programs
from qtrain.progress import Progress
from qtrain.start import as_started, loaded, prepared
from qtrain.sweep.expand import Point
from qtrain.sweep.folder import Folder
from qtrain.sweep.sharing import NotTogether, program_key, vary
from qtrain.sweep.stacked import Stacked, chosen, known, measured
from qtrain.train import Run

Say = Callable[[str], None]
Failed = Callable[[Point, Exception], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command asked for.

    share: "auto", "vmap" or "interleave". separate: whether points that need another program get one of their own,
    after the others. quiet: no progress.
    """

    share: str = "auto"
    separate: bool = False
    quiet: bool = False


def train_together(
    points: Sequence[Point],
    folder: Folder,
    asked: Asked,
    stopped: threading.Event,
    failed: Failed,
    ended: Callable[[Point, dict[str, Any]], None],
    say: Say,
) -> None:
    """Train points of one structure (`qtrain.sweep.sharing.structure`), each in its folder, by one compiled step.

    Every point writes the files of a run of its own. Where the points take turns, its numbers are, bit for bit, those
    of that run, whose program this is; under vmap equal but for the order of sums. A point that fails is handed to
    `failed`, and the others go on.

    Args:
      points: unfinished ones.
      folder: of the sweep.
      asked: see `Asked`.
      stopped: set to save all and stop.
      failed, ended: told of each point.
      say: shows a line.

    Raises:
      NotTogether: a schedule needs another program, and `asked.separate` is False; nothing has been compiled.
      Preempted: when stopped.
    """
    runs, owners, rest, programs = _prepare(points, folder, asked, failed)
    over: set[Run] = set()

    def run_failed(run: Run, error: Exception) -> None:
        over.add(run)
        failed(owners[run], error)

    def run_ended(run: Run, summary: dict[str, Any]) -> None:
        over.add(run)
        ended(owners[run], summary)

    if runs:
        assert programs is not None
        try:
            _drive(runs, programs, folder, asked, stopped, run_failed, run_ended, say)
        except Preempted:
            raise
        except Exception as error:  # of what they share: compiling, memory, data
            for run in runs:
                if run not in over:
                    run_failed(run, error)
                    with suppress(Exception):
                        run.close()
    if rest:
        train_together(rest, folder, asked, stopped, failed, ended, say)


def _prepare(
    points: Sequence[Point], folder: Folder, asked: Asked, failed: Failed
) -> tuple[list[Run], dict[Run, Point], list[Point], Programs | None]:
    """The runs with their points, the points that need another program, and the program."""
    base: Any = None
    parts, rest = [], []
    for point in points:
        where = str(folder.run(point))
        try:
            if base is None:
                base, mesh, parameters = prepared(point.config, where)
                experiment = base
            else:
                experiment = vary(base, point)
                parameters = loaded(experiment, where, mesh)
        except NotTogether:
            if not asked.separate:
                raise
            rest.append(point)
        except Exception as error:
            failed(point, error)
        else:
            parts.append((point, experiment, parameters))

    programs: Programs | None = None
    runs, owners = [], {}
    for point, experiment, parameters in parts:
        path = folder.run(point)
        try:
            status = workdir.prepare(path, point.config.to_dict(), workdir.package_versions())
            experiment = as_started(experiment, str(path))
            if programs is None:
                programs = Programs(experiment, mesh)
            if experiment.plan.choices != programs.experiment.plan.choices:
                raise UsageError(
                    f"{str(path)!r} was begun with other kernels than the points it shares a program with; continue it "
                    "by itself: qtrain sweep --points"
                )
            run = Run(experiment, path, mesh, status == "resume", True, False, parameters, programs)
        except Exception as error:
            failed(point, error)
        else:
            runs.append(run)
            owners[run] = point
    return runs, owners, rest, programs


def _drive(
    runs: list[Run],
    programs: Programs,
    folder: Folder,
    asked: Asked,
    stopped: threading.Event,
    failed: Callable[[Run, Exception], None],
    ended: Callable[[Run, dict[str, Any]], None],
    say: Say,
) -> None:
    total, start = runs[0].experiment.total_steps, min(run.start for run in runs)
    key = f"share {zlib.crc32(program_key(runs[0].experiment).encode()):08x}"
    dispatch = _dispatch(runs, programs, key, folder, asked, say) if start < total else Interleaved(programs)
    with Progress(total, start, enabled=not asked.quiet) as progress:
        drive(
            runs,
            dispatch,
            stopped,
            failed,
            ended,
            lambda step, active: progress.update(step, points=active),
        )
    say(f"{len(runs)} points, {programs.compilations()} compiled train step{'s' * (programs.compilations() != 1)}")


def _dispatch(
    runs: list[Run], programs: Programs, key: str, folder: Folder, asked: Asked, say: Say
) -> Interleaved | Stacked:
    """How the runs take their steps: as asked, as an earlier start of the sweep did, as is known, or as is faster."""
    fixed = known(programs, len(runs))
    recorded = folder.choice(key)
    stacked: Stacked | None = None
    if asked.share != "auto":
        way, why = asked.share, "as asked"
    elif recorded is not None:
        way, why = recorded, "as before"
    elif fixed is not None:
        way, why = fixed
    else:
        with runs[0].experiment.train_batches() as batches:
            rows = [next(batches) for _ in range(programs.per_dispatch)]
        seconds, stacked = measured(programs, runs, runs[0].on_devices(rows))
        way = chosen(seconds)
        shown = {name: "too large" if math.isinf(value) else f"{1e3 * value:.3g} ms" for name, value in seconds.items()}
        why = f"measured, a step of all: vmap {shown['vmap']}, interleaved {shown['interleave']}"
    if recorded is None and (asked.share != "auto" or fixed is None):
        folder.choose(key, way)
    devices = math.gcd(len(runs), programs.mesh.size) if way == "vmap" else programs.mesh.size
    say(f"{len(runs)} points share one train step by {way} on {devices} device{'s' * (devices > 1)}: {why}")
    if way == "interleave":
        return Interleaved(programs, len(runs))
    if stacked is None:
        return Stacked(programs, runs)
    stacked.load(runs)
    return stacked
