"""Controllers: bits decided inside the compiled step, from what the step computes, by a state that goes with it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.packing import Packed, pack, unpack
from qtrain.precision import Precision
from qtrain.schedules.schedule import MOST_STEPS, Schedule, shown, whole_bits, whole_number

Array = jax.Array
State = dict[str, Any]


class Signals(NamedTuple):
    """What a step shows a controller; arrays, traced.

    Attributes:
      step: the step t that was taken, int32.
      loss: of its batch at its precision, without penalties; float32.
      grad_norm: global L2 norm of its gradient, before clipping; float32.
      grads: the gradient of each layer's weights, by name. Under `optimizer.accumulate_steps` those of this one batch.
      bitops: BitOps spent so far, those of step t included: ``high + low``, see `qtrain.cost.Total`.
    """

    step: Array
    loss: Array
    grad_norm: Array
    grads: Mapping[str, Array]
    bitops: Any


@dataclasses.dataclass(frozen=True)
class Controller(abc.ABC):
    """Bits that follow a state: ``init`` once, ``bits`` before a step, ``update`` after it, like an optax transform.

    All three are pure, and may be traced and vmapped; what is decided after step t applies from step t + 1 on. A state
    is a dict of arrays with the ``level`` in force, an index into `levels`. A controller is a pytree: its numbers are
    data to a compiled step, so that runs which differ in them share it. Build one by `fractrain`, `muppet` or
    `budget_keeper`, or derive another: a frozen dataclass registered by ``jax.tree_util.register_dataclass``.

    Attributes:
      levels: bits of each level, float32 [levels], of the kinds that are decided; None for the others.
    """

    name: ClassVar[str]
    levels: Precision

    @abc.abstractmethod
    def init(self, grads: Mapping[str, Any]) -> State:
        """The state before the first step; `grads`: shapes and dtypes of `Signals.grads`."""

    @abc.abstractmethod
    def update(self, state: State, signals: Signals) -> State:
        """The state after a step."""

    def where_ends(self, ends: Array, decide: Callable[..., State], state: State, *seen: Any) -> State:
        """``decide(self, state, *seen)`` where an interval `ends`, else `state`; computed only there: for `update`.

        Numbers, those of the controller too, go in and out as one vector of each dtype: every array that enters costs
        something at each step. It is a loop of no or one turn, since what a loop carries stays in place, where a
        select, and a cond on a CPU, would copy every array of the state at each step.
        """
        of_state, of_known = jax.eval_shape(lambda: (state, (self, *seen)))
        known = pack((self, *seen))

        def decided(carried: tuple[Array, Packed]) -> tuple[Array, Packed]:
            # The barrier keeps in the loop what does not depend on what it carries: XLA would compute it at each step.
            packed, numbers = jax.lax.optimization_barrier((carried[1], known))
            controller, *rest = unpack(numbers, of_known)
            return jnp.zeros((), bool), pack(decide(controller, unpack(packed, of_state), *rest))

        begun = jax.lax.optimization_barrier(pack(state))
        _, after = jax.lax.while_loop(lambda carried: carried[0], decided, (ends, begun))
        found: State = unpack(after, of_state)
        return found

    def bits(self, state: State) -> Precision:
        """The bits of the next step, float32; None where a kind is not decided."""
        return jax.tree.map(lambda bits: jnp.asarray(bits)[state["level"]], self.levels)

    def metrics(self, state: State) -> dict[str, Array]:
        """Scalars to look at, by name."""
        return {"level": state["level"]}

    @property
    def count(self) -> int:
        """Number of levels."""
        return len(jax.tree.leaves(self.levels)[0])

    @abc.abstractmethod
    def describe(self) -> str:
        """Its parameters, in a line."""


@dataclasses.dataclass(frozen=True, repr=False)
class Decided(Schedule):
    """Bits that a controller decides while training: before it only their range is known.

    Attributes:
      name: of the controller.
      values: bits of each level.
      settings: the controller's other parameters, name and value.
    """

    builder: ClassVar[str] = "decided"
    name: str
    values: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if isinstance(self.values, str) or not hasattr(self.values, "__len__") or len(self.values) < 2:
            raise UsageError(f"values={shown(self.values)}: must be a list of bits, two at least")
        values = tuple(whole_bits(f"values[{i}]", bits) for i, bits in enumerate(self.values))
        object.__setattr__(self, "values", values)

    def _bits(self, step: jax.Array) -> jax.Array:
        raise UsageError(f"{self.name}: its bits are decided while training, and no function of the step")

    def _highest(self, total_steps: int | None) -> int:
        return max(self.values)

    def __repr__(self) -> str:
        return f"{self.name}: one of {', '.join(map(str, self.values))}, decided while training"


def levels_of(levels: Precision) -> Precision:
    """`levels` as float32 arrays of one length.

    Raises:
      UsageError: no kind, or lists of different lengths, or fewer than two levels, or what is no bit width.
    """
    kinds = {kind: values for kind, values in vars(levels).items() if values is not None}
    if not kinds:
        raise UsageError("levels: no kind is decided; give bits for weights, acts or grads")
    checked = {}
    for kind, values in kinds.items():
        whole = [whole_bits(f"levels.{kind}[{i}]", bits) for i, bits in enumerate(values)]
        if len(whole) < 2:
            raise UsageError(f"levels.{kind}={shown(list(whole))}: give two or more")
        checked[kind] = whole
    lengths = {kind: len(whole) for kind, whole in checked.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{kind}: {length}" for kind, length in lengths.items())
        raise UsageError(f"levels: give as many values for each kind ({listed})")
    return Precision(**{kind: np.asarray(whole, np.float32) for kind, whole in checked.items()})


def whole(key: str, value: Any, least: int, most: int = MOST_STEPS) -> np.ndarray:
    """A whole number as data, int32 []."""
    return np.asarray(whole_number(key, value, least, most), np.int32)


def number(key: str, value: Any, low: float, high: float, *, open_low: bool = False) -> np.ndarray:
    """A number as data, float32 [].

    Raises:
      UsageError: outside [low, high], or (low, high] if `open_low`.
    """
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not low <= float(value) <= high or (open_low and float(value) == low):
        bounds = f"above {low:g}" if open_low else f"of at least {low:g}"
        raise UsageError(f"{key}={shown(value)}: must be a number {bounds}, at most {high:g}")
    return np.asarray(value, np.float32)


def shown_levels(levels: Precision) -> str:
    """The levels for people: ``weights, acts 3 4 6 8; grads 6 6 8 8``."""
    together: dict[str, list[str]] = {}
    for kind, values in vars(levels).items():
        if values is not None:
            together.setdefault(" ".join(f"{bits:g}" for bits in np.asarray(values)), []).append(kind)
    return "; ".join(f"{', '.join(kinds)} {bits}" for bits, kinds in together.items())
