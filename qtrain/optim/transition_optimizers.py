"""SGDT, AdamT and AdamWT: a base optimizer with learning rate 1, scaled by the transition-adaptive learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qtrain.errors import UsageError
from qtrain.optim.codes import Codes, by_path, named_leaves, quantized_leaves
from qtrain.optim.transition import scale_by_transition_rate

Array = jax.Array


def sgdt(
    codes: Codes,
    target: float | optax.Schedule,
    initial_rate: float = 0.1,
    *,
    momentum: float | None = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_mask: Any = None,
    others: float | optax.Schedule | None = None,
    **transition: Any,
) -> optax.GradientTransformationExtraArgs:
    """SGD at a scheduled transition rate: ``w ← w − U·buf``, ``buf ← µ·buf + (g + λ·w)``.

    Weight decay is coupled: λ·w joins the gradient, so that U scales it, too.

    Args:
      codes, target, initial_rate: of `scale_by_transition_rate`.
      momentum, nesterov: µ of ``optax.sgd``, None for none.
      weight_decay: λ.
      decay_mask: which leaves decay, as in ``optax.add_decayed_weights``.
      others: learning rate, or schedule over the updates, of leaves without codes. None where there are none, as inside
        ``optax.partition``.
      **transition: further arguments of `scale_by_transition_rate`; its running average's momentum is
        ``running_momentum`` here.

    Raises:
      UsageError: as `scale_by_transition_rate`; leaves without codes and no `others`.

    Lee et al., ICCV 2025 (arXiv 2404.19248).

    >>> codes = lambda params: jax.tree.map(lambda w: jnp.round(w / 0.5).astype(jnp.int32), params)
    >>> optimizer = sgdt(codes, optax.cosine_decay_schedule(5e-3, 1000), 0.1, rule="proportional")
    >>> params = {"w": jnp.array([0.2, 0.6])}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> print(updates["w"])
    [-0.02 -0.06]
    """
    base = optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask), optax.sgd(1.0, momentum=momentum, nesterov=nesterov)
    )
    return _scaled(base, codes, target, initial_rate, others, transition)


def adamt(
    codes: Codes,
    target: float | optax.Schedule,
    initial_rate: float = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Any = None,
    others: float | optax.Schedule | None = None,
    **transition: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam at a scheduled transition rate: ``w ← w − U·m̂/(√v̂ + ε)``, moments of ``g + λ·w``.

    Arguments and errors as `sgdt`; `b1`, `b2`, `eps` of ``optax.adam``. Weight decay is an L2 penalty, part of the
    gradient.
    """
    base = optax.chain(optax.add_decayed_weights(weight_decay, decay_mask), optax.adam(1.0, b1=b1, b2=b2, eps=eps))
    return _scaled(base, codes, target, initial_rate, others, transition)


def adamwt(
    codes: Codes,
    target: float | optax.Schedule,
    initial_rate: float = 3e-4,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    decay_mask: Any = None,
    others: float | optax.Schedule | None = None,
    **transition: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdamW at a scheduled transition rate: ``w ← w − U·(m̂/(√v̂ + ε) + λ·w)``.

    Arguments and errors as `sgdt`; the others of ``optax.adamw``. λ·w is no part of the moments but is scaled by U, as
    AdamW's is by its learning rate.
    """
    base = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return _scaled(base, codes, target, initial_rate, others, transition)


class OthersState(NamedTuple):
    """State of the learning rate of leaves without codes: updates so far, int32."""

    count: Array  # type: ignore[assignment]  # as optax calls it; hides tuple.count


def _scaled(
    base: optax.GradientTransformation,
    codes: Codes,
    target: float | optax.Schedule,
    initial_rate: float,
    others: float | optax.Schedule | None,
    transition: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    if "running_momentum" in transition:
        transition = {**transition, "momentum": transition["running_momentum"]}
        del transition["running_momentum"]
    scale = scale_by_transition_rate(codes, target, initial_rate, **transition)
    return optax.chain(base, scale, _scale_others(codes, others))


def _scale_others(codes: Codes, rate: float | optax.Schedule | None) -> optax.GradientTransformation:
    """Multiply the leaves without codes by `rate`."""

    def without_codes(params: Any) -> set[str]:
        return by_path(params).keys() - quantized_leaves(codes, params).keys()

    def init_fn(params: Any) -> OthersState:
        if rate is None and (found := without_codes(params)):
            raise UsageError(
                f"others=None, but {min(found)!r} has no codes and would learn at rate 1; give others=<learning rate>"
            )
        return OthersState(jnp.zeros((), jnp.int32))

    def update_fn(updates: Any, state: OthersState, params: Any = None) -> tuple[Any, OthersState]:
        if rate is not None:
            factor = rate(state.count) if callable(rate) else rate
            other = without_codes(params)
            places, treedef = named_leaves(updates)
            updates = jax.tree.unflatten(
                treedef, [(factor * leaf).astype(leaf.dtype) if path in other else leaf for path, leaf in places]
            )
        return updates, OthersState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)
