"""The loop: steps of one run, or of several that read the same batches."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import jax

from qtrain import processes, workdir
from qtrain.errors import Preempted
from qtrain.programs import Programs

if TYPE_CHECKING:
    from qtrain.train import Run

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
        self._step, self._mesh = programs.step, programs.mesh
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

        def take(run: Run) -> tuple[Any, Mapping[str, Any]]:
            return self._step(run.state, batch, run.key, run.tables, *asks)

        threads = itertools.cycle(self._launching if self._compiled else ())
        launched = [thread.submit(take, run) for run, thread in zip(runs, threads, strict=False)]
        for i, run in enumerate(runs):
            run.state, out = launched[i].result() if launched else take(run)
            self._compiled = True
            yield run, out

    def settle(self, run: Run) -> None:
        """Bring ``run.state`` up to date."""


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

    def each(of: Sequence[Run], work: Callable[..., Any], *arguments: Any) -> list[Any]:
        found = []
        for run in of:
            try:
                found.append(work(run, *arguments))
            except Exception as error:
                if failed is None:
                    raise
                active.remove(run)
                failed(run, error)
                with suppress(Exception):  # what failed may fail again, and the others go on
                    run.close()
        return found

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
        ended(run, summary)
        return summary

    batches = leader.experiment.train_batches(start_step=step, repeat=leader.config.data.repeat)
    with batches, ExitStack() as opened:
        for run in runs:
            opened.enter_context(run)
        while step < total and active:
            stop = stopped.is_set() if jax.process_count() == 1 else leader.asked
            each([run for run in active if run.start <= step], before, step, stop)
            if stop:
                raise Preempted(f"stopped by SIGTERM at step {step} of {total}; start again to resume")
            batch = leader._next(batches)
            here = [run for run in active if run.start <= step]
            step += leader.per_dispatch
            for run, out in dispatch(here, batch, stopped.is_set()):
                each([run], after, step, out)
            progress(step, len(active))
        return each(list(active), finish)
