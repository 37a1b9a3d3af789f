"""What a whole run costs under a precision schedule, exactly, before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.cost.bitops import bitops
from qtrain.cost.bits import Precisions
from qtrain.cost.ops import PASSES, Ops
from qtrain.errors import UsageError
from qtrain.precision import Precision

_STEPS_AT_ONCE = 1 << 16


def effective(
    ops: Ops,
    schedule: Callable[[Any], Precision | Mapping[str, Precision]],
    total_steps: int,
    passes: Iterable[str] = PASSES,
) -> int:
    """Σ_t `bitops`(ops, schedule(t)) for t = 0 … total_steps − 1: bit operations of the run, an exact int.

    `schedule` maps a step (traced, int32) to the `Precision` of the step, or to one per path, as the train step's does.
    It is evaluated in one compiled sweep; steps of equal precision are priced once, so long runs cost little. The train
    state's running total agrees with it to float32's rounding of each increment.
    """
    _check_steps(total_steps)
    return sum(times * bitops(ops, precision, passes) for precision, times in _occurrences(schedule, total_steps))


def tabulated(
    ops: Ops,
    bits: Precision,
    price: Callable[[Ops, Precision], Any] = bitops,
) -> Any:
    """Σ_t `price`(ops, bits at t) of a schedule that is a table, exact as `price` is; nothing is compiled.

    Args:
        ops: from `count`.
        bits: of each kind at every step, [steps]; None where it is not quantized.
        price: `bitops`, `linear`, or another function of the ops and the precision of a step.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(bits)
    if not leaves:
        raise UsageError("bits: no kind has a table; the cost of a run in float is that of a step times their number")
    rows, times = np.unique(np.stack([np.asarray(leaf) for leaf in leaves], axis=-1), axis=0, return_counts=True)
    pairs = zip(rows.tolist(), times.tolist(), strict=True)
    return sum(count * price(ops, structure.unflatten(row)) for row, count in pairs)


def static(ops: Ops, precision: Precisions | float, total_steps: int, passes: Iterable[str] = PASSES) -> int:
    """The bit operations of a run that keeps one precision at every step, an exact int.

    A plain number q stands for ``Precision(q, q, q)``: at q_max it is what `effective` is compared with (`saving`).
    """
    _check_steps(total_steps)
    fixed = Precision(precision, precision, precision) if isinstance(precision, int | float | np.number) else precision
    return total_steps * bitops(ops, fixed, passes)


def _occurrences(schedule: Callable[[Any], Any], total_steps: int) -> Iterable[tuple[Any, int]]:
    """The distinct precisions of a schedule, with Python numbers, and how many steps have each."""

    def arrays(step: Any) -> Any:
        return jax.tree.map(lambda bits: jnp.asarray(bits, jnp.float32), schedule(step))

    sweep = jax.jit(jax.vmap(arrays))
    size = min(_STEPS_AT_ONCE, total_steps)
    counts: Counter[tuple[float, ...]] = Counter()
    structure: Any = None
    for start in range(0, total_steps, size):
        # The last part runs past the end at the same shape, so that it compiles no second time; the rest is dropped.
        leaves, structure = jax.tree.flatten(sweep(start + np.arange(size, dtype=np.int32)))
        table = np.stack([np.asarray(leaf)[: total_steps - start] for leaf in leaves], axis=-1) if leaves else None
        if table is None:
            counts[()] += min(size, total_steps - start)
        else:
            rows, times = np.unique(table, axis=0, return_counts=True)
            counts.update({tuple(row): int(n) for row, n in zip(rows.tolist(), times, strict=True)})
    return [(structure.unflatten(row), times) for row, times in counts.items()]


def _check_steps(total_steps: int) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int | np.integer) or total_steps < 1:
        raise UsageError(f"total_steps={total_steps!r} is not allowed: a whole number of at least 1")
