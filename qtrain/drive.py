"""The loop: steps of one run, or of several that read the same batches."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from qtrain import processes, workdir
from qtrain.errors import Preempted
from qtrain.packing import Packed
from qtrain.programs import Programs

if TYPE_CHECKING:
    from qtrain.train import Run

T = TypeVar("T")
_LAUNCHING_THREADS = 8  # each has the memory of a step


class Interleaved:
    """Steps of one run after another by the same program.

    Where one CPU is the device, steps of different runs are under way at once: JAX carries out what one thread of
    Python launches in order, and the steps of small networks do not fill several cores. So each of a few threads
    launches the steps of its share of the runs. What a step computes is the same.

    Args:
      programs: of the runs.
      count: how many runs there are.
    """

    def __init__(self, programs: Programs, count: int = 1):
        self._programs, self._mesh = programs, programs.mesh
        self._packed: dict[Run, Packed] = {}
        several = jax.process_count() > 1
        self._asks = {value: processes.flag(value, self._mesh) for value in (False, True)} if several else None
        # On several devices the steps wait for each other in collectives, and must come in one order.
        alone = jax.default_backend() == "cpu" and self._mesh.size == 1 and not several
        threads = min(count, os.cpu_count() or 1, _LAUNCHING_THREADS) if alone else 1
        self._launching = [ThreadPoolExecutor(1) for _ in range(threads)] if threads > 1 else []
        self._compiled = False  # by one thread: two would both compile it

    def __call__(self, runs: Sequence[Run], batch: Any, stop: bool) -> Iterator[tuple[Run, Mapping[str, Any]]]:
        """Take a step of each of `runs`, and give it with what the step leaves; `stop`: this process is asked to."""
        asks = () if self._asks is None else (self._asks[stop],)

        def take(run: Run) -> tuple[Packed, Mapping[str, Any]]:
            packed = self._packed.pop(run, None)
            if packed is None:
                packed = self._programs.packed(run.state)
            return self._programs.step(packed, batch, run.key, run.tables, *asks)

        threads = itertools.cycle(self._launching if self._compiled else ())
        launched = [thread.submit(take, run) for run, thread in zip(runs, threads, strict=False)]
        for i, run in enumerate(runs):
            self._packed[run], out = launched[i].result() if launched else take(run)
            self._compiled = True
            yield run, out

    def at_once(self, calls: Sequence[Callable[[], T]]) -> Iterable[Callable[[], T]]:
        """What gives the result of each of `calls`, or raises what it raised, once the threads have made them."""
        if not self._launching or not calls:
            return calls
        first = self._launching[0].submit(calls[0])
        wait([first])  # what it compiles the others find
        rest = (thread.submit(call) for call, thread in zip(calls[1:], itertools.cycle(self._launching), strict=False))
        return [future.result for future in (first, *rest)]

    def settle(self, run: Run) -> None:
        """Bring ``run.state`` up to date."""
        if run in self._packed:
            run.state = self._programs.unpacked(self._packed[run])


def drive(
    runs: Sequence[Run],
    dispatch: Any,
    stopped: threading.Event,
    failed: Callable[[Run, Exception], None] | None = None,
    ended: Callable[[Run, dict[str, Any]], None] = lambda run, summary: None,
    progress: Callable[[int, int], Any] = lambda step, active: None,
) -> list[dict[str, Any]]:
    """Take the steps of runs that read the same batches, from where each of them is to the end.

    Args:
      runs: of the same length and dispatch.
      dispatch: `Interleaved`, or what takes the steps otherwise.
      stopped: set to stop after the step in progress.
      failed: told of a run that fails, without which the others go on; None: the failure is raised.
      ended: told of a run that is finished, and of its summary.
      progress: told of each dispatch: steps so far, and how many runs are under way.

    Returns:
      The summaries of the runs that did not fail.

    Raises:
      Preempted: when stopped, once every run is saved.
    """
    leader, total = runs[0], runs[0].experiment.total_steps
    step = min(run.start for run in runs)
    active = list(runs)

    def attempt(run: Run, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except Exception as error:
            if failed is None:
                raise
            active.remove(run)
            failed(run, error)
            with suppress(Exception):  # what failed may fail again, and the others go on
                run.close()
        return None

    def before(run: Run, step: int, stop: bool) -> None:
        if stop or run.due(step):
            dispatch.settle(run)
        run.before(step, stop)

    def after(run: Run, step: int, out: Mapping[str, Any]) -> None:
        if run.measured(step):
            dispatch.settle(run)
        run.after(step, out)

    def finish(run: Run) -> dict[str, Any]:
        dispatch.settle(run)
        summary = run.end()
        run.close()
        processes.on_first(lambda: workdir.finish(run.folder, summary))
        return summary

    batches = leader.experiment.train_batches(start_step=step, repeat=leader.config.data.repeat)
    with batches, ExitStack() as opened:
        for run in runs:
            opened.enter_context(run)
        while step < total and active:
            stop = stopped.is_set() if jax.process_count() == 1 else leader.asked
            here = [run for run in active if run.start <= step]
            calls: Iterable[Callable[[], None]] = [functools.partial(before, run, step, stop) for run in here]
            if stop or any(run.due(step) for run in here):
                calls = dispatch.at_once(calls)
            for run, call in zip(here, calls, strict=True):
                attempt(run, call)
            if stop:
                raise Preempted(f"stopped by SIGTERM at step {step} of {total}; start again to resume")
            batch = leader._next(batches)
            here = [run for run in active if run.start <= step]
            step += leader.per_dispatch
            for run, out in dispatch(here, batch, stopped.is_set()):
                attempt(run, functools.partial(after, run, step, out))
            progress(step, len(active))
        summaries = []
        ending = list(active)
        for run, call in zip(ending, dispatch.at_once([functools.partial(finish, run) for run in ending]), strict=True):
            if (summary := attempt(run, call)) is not None:
                ended(run, summary)
                summaries.append(summary)
        return summaries
