"""Transition-rate scheduling: learning rates that make a scheduled share of each tensor's codes change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain.errors import UsageError
from qtrain.optim.codes import Codes, by_path, low_byte, named_leaves, observe, place, quantized_leaves
from qtrain.optim.transition_rules import Scalars, checked_rule

Array = jax.Array


class TransitionState(NamedTuple):
    """State of `scale_by_transition_rate`: one int8 a quantized weight, and a few numbers a tensor.

    The numbers are float32 vectors with an entry for each quantized leaf, in the order of the leaves of `last`: the
    rule is then a handful of operations, however many leaves there are. `transition_metrics` gives them names.

    Attributes:
      count: updates so far, int32.
      transitions: k, the share of codes that the last update changed.
      running: K, its running average.
      rate: U, the transition-adaptive learning rate.
      target: R.
      step: mean |U·g|, the effective step.
      bits: width of the codes in `last`; 0 before the leaf's first update on a grid, and if no bits are given.
      last: low byte of the codes, int8: a tree like the parameters, with None for leaves without codes.
      mean_rate: proportional rule: Ū, U averaged as K is; otherwise ().
      factor: proportional rule: V = U/R; otherwise ().
    """

    count: Array  # type: ignore[assignment]  # as optax calls it; hides tuple.count
    transitions: Array
    running: Array
    rate: Array
    target: Array
    step: Array
    bits: Array
    last: Any
    mean_rate: Any
    factor: Any


def scale_by_transition_rate(
    codes: Codes,
    target: float | optax.Schedule,
    initial_rate: float,
    momentum: float = 0.99,
    rule: str = "additive",
    gain: float | None = None,
    max_rate: float | None = None,
    target_scale: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each quantized tensor's update by a rate U that makes its codes change as often as `target` says.

    Per tensor of N weights with integer codes c, at update t::

        k_t = (1/N) Σ 1[c_t ≠ c_{t−1}]                  transition rate
        K_t = m·K_{t−1} + (1−m)·k_t                     running rate
        additive        U_t = max(0, U_{t−1} + η·(R_t − K_t))
        multiplicative  U_t = m·U_{t−1} + (1−m)·U_{t−1}·R_t / (K_t + 1e-8)
        proportional    Ū_t = m·Ū_{t−1} + (1−m)·U_{t−1},  V_t = Ū_t/K_t within V_{t−1}·e^{±γ},  U_t = V_t·R_t
        update ← U_t·g_t

    It multiplies by **+U**: the transform before it carries the sign, as ``optax.sgd(1.0)`` and ``optax.adam(1.0)`` do.
    Leaves without codes pass through unchanged. The first update counts no transition: K = R_0 and U = U_0.

    The additive rule moves U by at most η·R a step, so it lags where R falls faster. The proportional rule is ours: as
    few weights move far, k is nearly proportional to the U that made it, so V = Ū/K is what a unit of target needs,
    both averaged over the same updates, and U follows R at once. V changes by at most a factor e^γ an update.

    Where weights oscillate on the edge between two codes, as straight-through gradients make them do, k hardly depends
    on U: only the additive rule then reaches U = 0 and stops them; the other two lower U geometrically.

    A change of precision is no transition: update t compares Q_{b_{t−1}}(w_t) with the stored Q_{b_{t−1}}(w_{t−1}) and
    then stores Q_{b_t}(w_t). Whatever else moves a grid (a learned or dynamic weight scale) does count: freeze it. At
    24 bits and above there is no grid: k is 0; K, U and R are held until the second update back on a grid.

    Args:
      codes: see `qtrain.optim.Codes`; called as ``codes(params)`` in init (for shapes), and in each update as
        ``codes(params, bits=bits, **extra)`` once, or, with bits, twice.
      target: R, share of a tensor's weights that is to change per update: a number, or a schedule over the updates. A
        negative number is an error, also at the schedule's first update; later it counts as 0.
      initial_rate: U_0, > 0.
      momentum: m, from 0 to below 1.
      rule: "additive" (the paper's), "multiplicative" (the authors' code) or "proportional" (ours).
      gain: η of the additive rule, U_0 by default; γ of the proportional one, 0.02 by default. The multiplicative rule
        has none.
      max_rate: upper limit of U. By default none for the additive rule, which can not grow by more than η·ΣR, and
        100·U_0 for the other two, which grow geometrically in a tensor that makes no transitions.
      target_scale: "sqrt_bits" takes R_t = target(t)·√b_t, with this update's width of the tensor.

    Returns:
      The transform. ``update(updates, state, params, *, bits=None, **extra)`` needs the parameters; `bits` is a number
      or a tree with a number at or above each quantized leaf, may be traced, and is given in all updates or in none.
      State: `TransitionState`. A weight that moves by a multiple of 256 codes in one update is taken not to have moved.

    Raises:
      UsageError: a number out of range, an unknown name; in init, or when update is traced: codes that are not integer,
        not of the parameter's shape, or no leaf's; no leaf with codes; no bits where `target_scale` needs them.

    Lee et al., "Scheduling Weight Transitions for Quantization-Aware Training", ICCV 2025 (arXiv 2404.19248). Their
    code has the multiplicative rule, without an upper limit.

    >>> codes = lambda params: {"w": jnp.round(params["w"] / 0.5).astype(jnp.int32), "b": None}
    >>> transform = optax.chain(optax.trace(0.9), optax.scale(-1.0), scale_by_transition_rate(codes, 1e-3, 0.1))
    >>> params = {"w": jnp.array([0.2, 0.6]), "b": jnp.array(1.0)}
    >>> updates, state = transform.update(params, transform.init(params), params)
    >>> print(updates["w"], updates["b"])
    [-0.02 -0.06] -1.0
    """
    apply_rule = checked_rule(rule, target, initial_rate, momentum, gain, max_rate, target_scale)
    schedule: Callable[[Array], Any] = target if callable(target) else lambda count: target
    proportional = rule == "proportional"

    def init_fn(params: Any) -> TransitionState:
        weights = quantized_leaves(codes, params)

        def scalars(value: Any) -> Any:
            # A buffer for each field: a state that is donated must not hold one twice.
            return jnp.full(len(weights), value, jnp.float32)

        first = schedule(jnp.zeros((), jnp.int32))
        return TransitionState(
            count=jnp.zeros((), jnp.int32),
            transitions=scalars(0.0),
            running=scalars(first),
            rate=scalars(initial_rate),
            target=scalars(first),
            step=scalars(0.0),
            bits=scalars(0.0),
            last=place(params, {path: jnp.zeros_like(leaf, jnp.int8) for path, leaf in weights.items()}),
            mean_rate=scalars(initial_rate) if proportional else (),
            factor=scalars(initial_rate / first) if proportional else (),
        )

    def update_fn(
        updates: Any, state: TransitionState, params: Any = None, *, bits: Any = None, **extra: Any
    ) -> tuple[Any, TransitionState]:
        if params is None:
            raise UsageError("transition rates: update needs the parameters; call update(updates, state, params)")
        if bits is None and target_scale is not None:
            raise UsageError("target_scale: 'sqrt_bits' needs bits; call update(updates, state, params, bits=bits)")
        gradients, last = by_path(updates), by_path(state.last)
        paths = list(last)
        if missing := last.keys() - gradients.keys():
            raise UsageError(f"updates: there is none for {min(missing)!r}, which has codes")
        seen = observe(codes, params, bits, extra, state.count, paths, state.bits)
        # Whole numbers add up to the same count in any order, so on any number of devices.
        moved = [jnp.sum(low_byte(seen.old[path]) != last[path], dtype=jnp.int32) for path in paths]
        sizes = np.array([max(last[path].size, 1) for path in paths], np.float32)
        transitions = jnp.where(seen.active & ~seen.begins, jnp.stack(moved) / sizes, 0.0)
        target_now = jnp.maximum(jnp.asarray(schedule(state.count), jnp.float32), 0.0)
        if target_scale is not None and seen.width is not None:
            target_now = target_now * jnp.sqrt(seen.width)
        target_now = jnp.broadcast_to(target_now, transitions.shape)
        own = (state.mean_rate, state.factor) if proportional else (None, None)
        old = Scalars(state.running, state.rate, state.target, *own)
        after = jax.tree.map(
            lambda first, later, held: jnp.where(seen.begins, first, jnp.where(seen.active, later, held)),
            apply_rule.begin(old, target_now),
            apply_rule(old, transitions, target_now),
            old,
        )
        mean = jnp.stack([jnp.mean(jnp.abs(gradients[path]), dtype=jnp.float32) for path in paths])
        for path, rate in zip(paths, after.rate, strict=True):
            gradients[path] = (rate * gradients[path]).astype(gradients[path].dtype)
        places, treedef = named_leaves(updates)
        scaled = jax.tree.unflatten(treedef, [gradients.get(path, leaf) for path, leaf in places])
        return scaled, TransitionState(
            count=optax.safe_increment(state.count),
            transitions=transitions,
            running=after.running,
            rate=after.rate,
            target=after.target,
            step=after.rate * mean,
            bits=seen.bits,
            last=place(params, {path: low_byte(seen.new[path]) for path in paths}),
            mean_rate=after.mean_rate if proportional else (),
            factor=after.factor if proportional else (),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
