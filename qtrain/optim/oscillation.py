"""Weights that oscillate between two codes: counting how often each turns back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qtrain.errors import UsageError
from qtrain.optim.codes import Codes, Seen, by_path, low_byte, observe, place, quantized_leaves

Array = jax.Array


class OscillationState(NamedTuple):
    """State of `track_oscillations`: 6 bytes a quantized weight.

    Trees are like the parameters, with None for leaves without codes.

    Attributes:
      count: updates so far, int32.
      frequency: f, running share of updates that turned a weight's code back, float32.
      direction: sign of the code's last change, int8; 0 before the first.
      last: low byte of the codes, int8.
      bits: width of the codes in `last`, a float32 vector with an entry a leaf; see `TransitionState`.
    """

    count: Array  # type: ignore[assignment]  # as optax calls it; hides tuple.count
    frequency: Any
    direction: Any
    last: Any
    bits: Array


def track_oscillations(codes: Codes, momentum: float = 0.001) -> optax.GradientTransformationExtraArgs:
    """Count how often each weight's code turns back; updates pass through unchanged.

    ::

        o_t = 1 if c_t ≠ c_{t−1} and sign(c_t − c_{t−1}) = −(sign of that weight's previous change), else 0
        f_t = m·o_t + (1−m)·f_{t−1}

    Codes are compared on one grid, so that a change of precision is no change of code; the direction of the last change
    outlives it. At 24 bits and above f is held.

    Args:
      codes: see `qtrain.optim.Codes`; evaluated as in `scale_by_transition_rate`.
      momentum: m, above 0, at most 1.

    Returns:
      The transform; ``update(updates, state, params, *, bits=None, **extra)``. State: `OscillationState`. A code that
      changes by more than 127 in one update may be given the wrong direction.

    Raises:
      UsageError: momentum out of range; codes as for `scale_by_transition_rate`.

    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022 (arXiv 2203.11086), eq. 7 and 8.
    """
    check_momentum(momentum)

    def update_fn(
        updates: Any, state: OscillationState, params: Any = None, *, bits: Any = None, **extra: Any
    ) -> tuple[Any, OscillationState]:
        return updates, track(codes, momentum, state, params, bits, extra)[0]

    return optax.GradientTransformationExtraArgs(lambda params: begin(codes, params), update_fn)


def check_momentum(momentum: float) -> None:
    """Refuse a momentum out of range."""
    if not 0 < momentum <= 1:
        raise UsageError(f"momentum={momentum!r}: give a number above 0, at most 1")


def begin(codes: Codes, params: Any) -> OscillationState:
    """The state before the first update."""
    weights = quantized_leaves(codes, params)
    frequency, direction, last = (
        place(params, {path: jnp.zeros_like(leaf, dtype) for path, leaf in weights.items()})
        for dtype in (jnp.float32, jnp.int8, jnp.int8)
    )
    return OscillationState(jnp.zeros((), jnp.int32), frequency, direction, last, jnp.zeros(len(weights)))


def track(
    codes: Codes, momentum: float, state: OscillationState, params: Any, bits: Any, extra: Any
) -> tuple[OscillationState, Seen]:
    """The state after an update, and the codes it saw."""
    if params is None:
        raise UsageError("oscillations: update needs the parameters; call update(updates, state, params)")
    directions, last = by_path(state.direction), by_path(state.last)
    seen = observe(codes, params, bits, extra, state.count, list(last), state.bits)
    frequency, direction = {}, {}
    for counts, (path, before) in zip(seen.active & ~seen.begins, by_path(state.frequency).items(), strict=True):
        # The difference of two low bytes, itself an int8, is the codes' own wherever that is between −128 and 127.
        change = jnp.sign(low_byte(seen.old[path]) - last[path])
        change = jnp.where(counts, change, jnp.int8(0))
        turned = (change != 0) & (change == -directions[path])
        frequency[path] = jnp.where(counts, momentum * turned + (1 - momentum) * before, before)
        direction[path] = jnp.where(change != 0, change, directions[path])
    after = OscillationState(
        optax.safe_increment(state.count),
        place(params, frequency),
        place(params, direction),
        place(params, {path: low_byte(code) for path, code in seen.new.items()}),
        seen.bits,
    )
    return after, seen
