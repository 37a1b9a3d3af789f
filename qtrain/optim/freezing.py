"""Iterative weight freezing: what oscillates too often is set to its most frequent code and stays there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qtrain.errors import UsageError
from qtrain.optim.codes import Codes, by_path, named_leaves, place, quantized_leaves
from qtrain.optim.oscillation import OscillationState, begin, check_momentum, track

Array = jax.Array


class FreezeState(NamedTuple):
    """State of `freeze_oscillations`: 11 bytes a quantized weight.

    Attributes:
      tracked: the oscillations, 6 bytes.
      anchor: float32; of a weight that is free the running average of its integer code, of a frozen one its value.
      frozen: bool.
    """

    tracked: OscillationState
    anchor: Any
    frozen: Any


def freeze_oscillations(
    codes: Codes,
    decode: Callable[..., Any],
    threshold: float | optax.Schedule,
    momentum: float = 0.001,
) -> optax.GradientTransformationExtraArgs:
    """Iterative weight freezing: a weight that oscillates too often is set to its most frequent code and stays there.

    ::

        e_t = m·c_t + (1−m)·e_{t−1},  e_1 = c_1          running average of the integer code
        f_t > f_th(t)  →  w ← decode(round(e_t)), for good

    Put it last in a chain: the update of a frozen weight is the difference to its value, which nothing may scale. The
    value is exact after two updates, within a rounding error after the first (w + (v − w) is not always v in floating
    point), whatever weight decay or momentum do meanwhile. Frozen weights stay at their value when precision changes;
    the averages of the others begin anew then, as codes of two grids have no average.

    Args:
      codes: see `qtrain.optim.Codes`.
      decode: ``decode(codes_tree, params, bits=None, **extra)`` → tree of the weights' values, float, where
        `codes_tree` has codes; the codes are float32 whole numbers.
      threshold: f_th, a share of updates: a number, or a schedule over the updates such as `freezing_threshold`.
      momentum: m of f and e, above 0, at most 1.

    Returns:
      The transform; ``update(updates, state, params, *, bits=None, **extra)``. State: `FreezeState`.

    Raises:
      UsageError: a number out of range; codes as for `scale_by_transition_rate`; decoded values that are missing, of
        another shape, or integer.

    Nagel et al., ICML 2022 (arXiv 2203.11086), algorithm 1.
    """
    check_momentum(momentum)
    if not callable(threshold) and not 0 <= threshold < math.inf:
        raise UsageError(f"threshold={threshold!r}: give a number of at least 0, or a schedule")
    schedule: Callable[[Array], Any] = threshold if callable(threshold) else lambda count: threshold

    def init_fn(params: Any) -> FreezeState:
        weights = quantized_leaves(codes, params)
        anchor, frozen = (
            place(params, {path: jnp.zeros_like(leaf, dtype) for path, leaf in weights.items()})
            for dtype in (jnp.float32, jnp.bool_)
        )
        return FreezeState(begin(codes, params), anchor, frozen)

    def update_fn(
        updates: Any, state: FreezeState, params: Any = None, *, bits: Any = None, **extra: Any
    ) -> tuple[Any, FreezeState]:
        tracked, seen = track(codes, momentum, state.tracked, params, bits, extra)
        limit = schedule(state.tracked.count)
        anchors, frozen = by_path(state.anchor), by_path(state.frozen)
        # No average over two grids, nor over a beginning that was never observed.
        anew = seen.begins | ~seen.active | (seen.bits != state.tracked.bits)
        averages = {}
        for begun, (path, anchor) in zip(anew, anchors.items(), strict=True):
            current = seen.new[path].astype(jnp.float32)
            averages[path] = jnp.where(begun, current, momentum * current + (1 - momentum) * anchor)
        whole = {path: jnp.round(average) for path, average in averages.items()}
        tree = place(params, whole)
        values = by_path(decode(tree, params, **extra) if bits is None else decode(tree, params, bits=bits, **extra))
        frequency, weights, gradients = by_path(tracked.frequency), by_path(params), by_path(updates)
        new_anchor, new_frozen = {}, {}
        for active, (path, average) in zip(seen.active, averages.items(), strict=True):
            value = values.get(path)
            if value is None or value.shape != average.shape or not jnp.issubdtype(value.dtype, jnp.floating):
                given = "nothing" if value is None else f"{value.dtype} of shape {value.shape}"
                raise UsageError(f"decode: {path!r} is {given}; give float values of shape {average.shape}")
            stops = ~frozen[path] & (frequency[path] > limit) & active
            new_frozen[path] = frozen[path] | stops
            new_anchor[path] = jnp.where(frozen[path], anchors[path], jnp.where(stops, value, average))
            weight, gradient = weights[path], gradients[path]
            rest = (new_anchor[path].astype(weight.dtype) - weight).astype(gradient.dtype)
            gradients[path] = jnp.where(new_frozen[path], rest, gradient)
        places, treedef = named_leaves(updates)
        changed = jax.tree.unflatten(treedef, [gradients.get(path, leaf) for path, leaf in places])
        return changed, FreezeState(tracked, place(params, new_anchor), place(params, new_frozen))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def freezing_threshold(
    total_updates: int, start: float = 0.1, end: float = 0.01, first: float = 0.25
) -> optax.Schedule:
    """The threshold of iterative freezing over a run: none (1, which no frequency passes) at first, then half a cosine.

    ::

        f_th(t) = end + (start − end)·(1 + cos(π·u))/2,   u = (t/N − first)/(1 − first) from 0 to 1

    Args:
      total_updates: N.
      start, end: thresholds, shares of updates; 0 ≤ end ≤ start ≤ 1.
      first: share of the run before freezing begins, from 0 to below 1.

    Raises:
      UsageError: a number out of range.

    >>> [round(float(freezing_threshold(100)(t)), 3) for t in (0, 24, 25, 62, 100)]
    [1.0, 1.0, 0.1, 0.056, 0.01]
    """
    if total_updates < 1:
        raise UsageError(f"total_updates={total_updates!r}: give a whole number of at least 1")
    if not 0 <= end <= start <= 1:
        raise UsageError(f"start={start!r}, end={end!r}: give 0 ≤ end ≤ start ≤ 1")
    if not 0 <= first < 1:
        raise UsageError(f"first={first!r}: give a number from 0 to below 1")

    def threshold(count: Any) -> Array:
        progress = jnp.asarray(count, jnp.float32) / total_updates
        u = jnp.clip((progress - first) / (1 - first), 0.0, 1.0)
        return jnp.where(progress < first, 1.0, end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * u)))

    return threshold
