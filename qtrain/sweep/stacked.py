"""The steps of several runs at once: one program over their stacked states, and the choice between that and turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qtrain.drive import Interleaved
from qtrain.programs import Programs
from qtrain.tables import Tables
from qtrain.train import Run

Array = jax.Array
T = TypeVar("T")
AXIS = "points"
SHARES = ("vmap", "interleave")
_ROUNDS = 3
_MEASURED_POINTS = 8  # taking turns costs the same for each


class Stacked:
    """Steps of all runs by one program, the step mapped over a leading axis of states, keys and tables.

    Where several devices are, the axis is split over the most of them that divide it. A run that has failed, or has not
    been reached yet, keeps its place and its state.
    """

    def __init__(self, programs: Programs, runs: Sequence[Run]):
        self._programs, self._places = programs, {run.folder: index for index, run in enumerate(runs)}
        count = math.gcd(len(runs), programs.mesh.size)
        mesh = Mesh(programs.mesh.devices.reshape(-1)[:count], (AXIS,), axis_types=(AxisType.Auto,))
        self._split, self._whole = NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(self._steps, donate_argnums=0, out_shardings=self._split)
        self._take = jax.jit(lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree))
        self.load(runs)

    def load(self, runs: Sequence[Run]) -> None:
        """Begin with the states that the runs have now, all of them and in the order they were in at first."""
        parts = zip(*((run.state, run.key, run.tables) for run in runs), strict=True)
        self._state, self._key, self._tables = map(self._stack, parts)
        self._programs.in_use = self._step

    def __call__(self, runs: Sequence[Run], batch: Any, stop: bool) -> Iterator[tuple[Run, Mapping[str, Any]]]:
        """Take a step of each of `runs`, and give it with what the step leaves."""
        active = np.zeros(len(self._places), bool)
        active[[self._places[run.folder] for run in runs]] = True
        batch, active = jax.device_put((batch, active), (self._whole, self._split))
        self._state, out = self._step(self._state, batch, self._key, self._tables, active)
        shared = _OnHost(out)
        for run in runs:
            yield run, _Slice(shared, self._places[run.folder])

    def at_once(self, calls: Sequence[Callable[[], T]]) -> Sequence[Callable[[], T]]:
        """What gives the result of each of `calls`: here themselves, to be made in turn."""
        return calls

    def settle(self, run: Run) -> None:
        """Bring ``run.state`` up to date."""
        state = self._take(self._state, self._places[run.folder])
        run.state = jax.device_put(state, run.shardings)

    def _steps(self, state: Any, batch: Any, key: Array, tables: Tables, active: Array) -> tuple[Any, dict[str, Any]]:
        new, out = jax.vmap(self._programs.train_step, in_axes=(0, None, 0, 0))(state, batch, key, tables)

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(active.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(kept, new, state), out

    def _stack(self, trees: Sequence[Any]) -> Any:
        alone = jax.device_put(trees, self._whole)
        return jax.jit(
            lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), out_shardings=self._split
        )(alone)


class _OnHost:
    """What a step of all leaves, fetched when the first of them asks for it."""

    def __init__(self, out: Any):
        self._out, self._fetched = out, False

    def get(self) -> Any:
        if not self._fetched:
            self._out, self._fetched = jax.device_get(self._out), True
        return self._out


class _Slice(Mapping[str, Any]):
    """What a step leaves of one of the runs."""

    def __init__(self, shared: _OnHost, index: int):
        self._shared, self._index = shared, index

    def __getitem__(self, name: str) -> Any:
        return jax.tree.map(lambda leaf: leaf[self._index], self._shared.get()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared.get())

    def __len__(self) -> int:
        return len(self._shared.get())


def known(programs: Programs, count: int) -> tuple[str, str] | None:
    """How `count` runs share the step where that needs no measurement, and why; None where it does."""
    if count == 1:
        return "interleave", "there is one point"
    if programs.experiment.config.mesh.fsdp != 1:
        return "interleave", "mesh.fsdp splits each state over the devices"
    kinds = {op.kind for op in programs.experiment.plan.ops}
    if jax.default_backend() == "cpu" and "conv" in kinds:
        return "interleave", "convolutions on a CPU run about 3 times slower under vmap"
    return None


def measured(programs: Programs, runs: Sequence[Run], batch: Any) -> tuple[dict[str, float], Stacked | None]:
    """Seconds that a step of every run takes, each way, infinite where memory does not suffice; and the vmapped steps.

    The fastest of a few rounds after a first one that compiles. Taking turns is measured on a few of the runs. The
    states are left alone.
    """
    some = list(runs[:_MEASURED_POINTS])
    turns = _seconds(Interleaved(programs, len(some)), some, batch) * len(runs) / len(some)
    try:
        stacked = Stacked(programs, runs)
        return {"interleave": turns, "vmap": _seconds(stacked, runs, batch)}, stacked
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"interleave": turns, "vmap": math.inf}, None
    finally:
        programs.in_use = programs.step


def _seconds(dispatch: Interleaved | Stacked, runs: Sequence[Run], batch: Any) -> float:
    before = [run.state for run in runs]
    try:
        for run in runs:
            run.state = jax.tree.map(jnp.copy, run.state)  # steps donate it
        seconds = []
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            left = [out for _, out in dispatch(runs, batch, False)]
            jax.block_until_ready([out["numbers"] for out in left])
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])
    finally:
        for run, state in zip(runs, before, strict=True):
            run.state = state


def chosen(seconds: Mapping[str, float]) -> str:
    """The faster way."""
    return min(SHARES, key=lambda name: seconds[name])
