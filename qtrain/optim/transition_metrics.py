"""What is worth writing down about transitions: from the state of an optimizer, however it is wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.optim.codes import by_path
from qtrain.optim.freezing import FreezeState
from qtrain.optim.oscillation import OscillationState
from qtrain.optim.transition import TransitionState

Array = jax.Array

FIELDS = {"rate": "transitions", "running": "running", "target": "target", "talr": "rate", "step": "step"}
"""Name of a metric → field of `TransitionState`."""


def transition_metrics(opt_state: Any) -> dict[str, dict[str, Array]]:
    """The last update's transition metrics of each quantized leaf, and of all together under the path ``""``.

    ===========  ==========================================================================
    rate         k, share of codes that changed
    running      K, its running average
    target       R
    talr         U, the transition-adaptive learning rate
    step         mean |U·g|, in units of the weights
    ===========  ==========================================================================

    Overall values are averages over weights: leaves count by their number of elements.

    Args:
      opt_state: any optimizer's state; every `TransitionState` in it is found, inside ``optax.chain``, ``masked``,
        ``partition``, ``MultiSteps`` and the like. May be traced.

    Returns:
      path (``Dense_0/kernel``) → name → float32 scalar; empty if the state holds no `TransitionState`.
    """
    found: dict[str, dict[str, Array]] = {}
    sizes: dict[str, int] = {}
    for state in find_states(opt_state, TransitionState):
        fields = {name: getattr(state, field) for name, field in FIELDS.items()}
        for index, (path, last) in enumerate(by_path(state.last).items()):
            found[path] = {name: values[..., index] for name, values in fields.items()}
            sizes[path] = last.size
    return with_overall(found, sizes)


def oscillation_metrics(opt_state: Any, threshold: float = 0.005) -> dict[str, dict[str, Array]]:
    """Oscillations of each quantized leaf, and of all together (by number of weights) under the path ``""``.

    ``oscillation`` is the mean frequency f, ``oscillating`` the share of weights with f above `threshold`, and, from
    `freeze_oscillations`, ``frozen`` the share of frozen weights.

    Args:
      opt_state: any optimizer's state; see `transition_metrics`.
      threshold: the paper's 0.005 by default.

    Returns:
      path → name → float32 scalar; empty if nothing in the state tracks oscillations.
    """
    found: dict[str, dict[str, Array]] = {}
    sizes: dict[str, int] = {}
    frozen = {
        path: flags for state in find_states(opt_state, FreezeState) for path, flags in by_path(state.frozen).items()
    }
    for state in find_states(opt_state, OscillationState):
        for path, frequency in by_path(state.frequency).items():
            found[path] = {"oscillation": jnp.mean(frequency), "oscillating": jnp.mean(frequency > threshold)}
            if frozen:
                found[path]["frozen"] = jnp.mean(frozen[path]) if path in frozen else jnp.zeros(())
            sizes[path] = frequency.size
    return with_overall(found, sizes)


def with_overall(found: dict[str, dict[str, Array]], sizes: Mapping[str, int]) -> dict[str, dict[str, Array]]:
    """`found` with the average over elements of each metric under ``""``, first; empty stays empty."""
    if not found:
        return {}
    total = max(sum(sizes.values()), 1)
    names = next(iter(found.values()))
    overall = {
        name: sum((found[path][name] * (sizes[path] / total) for path in found), jnp.zeros(())) for name in names
    }
    return {"": overall, **found}


def find_states(opt_state: Any, kind: type) -> list[Any]:
    """Every state of that kind inside an optimizer's state, in order."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def named_rows(metrics: Mapping[str, Mapping[str, Any]], prefix: str = "transition") -> dict[str, Any]:
    """Metrics by path as the flat names of a row: ``transition/Dense_0/kernel/rate``, overall ``transition/rate``.

    >>> named_rows({"": {"rate": 0.1}, "Dense_0/kernel": {"rate": 0.1}})
    {'transition/rate': 0.1, 'transition/Dense_0/kernel/rate': 0.1}
    """
    return {
        "/".join(filter(None, (prefix, path, name))): value
        for path, values in metrics.items()
        for name, value in values.items()
    }
