"""Parameters, by path, with a learning rate or a weight decay of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from qtrain.errors import UsageError, did_you_mean
from qtrain.trees import leaf_name

_KEYS = ("path", "learning_rate", "weight_decay")
_REST = "rest"


def by_path_groups(
    groups: Sequence[Mapping[str, Any]],
    learning_rate: float,
    weight_decay: float,
    make: Callable[[float, float], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One transform for each group of parameters, and one for those that are in none.

    Args:
      groups: mappings of ``path``, a regular expression that matches the whole path of a parameter
        (``layer_0/ssm/A/log_decay``), and ``learning_rate``, ``weight_decay``: what is not given is as for the others.
        The first group that matches counts. The rates follow the one schedule.
      learning_rate, weight_decay: of the others.
      make: ``(factor of the learning rate, weight decay) -> transform``.

    Raises:
      UsageError: for a wrong key or value; and, when the transform is initialised, for a path that matches nothing.
    """
    rest = make(1.0, weight_decay)
    if not groups:
        return rest
    parts, patterns = {_REST: rest}, []
    for index, group in enumerate(groups):
        key = f"optimizer.groups[{index}]"
        patterns.append(_pattern(key, group))
        rate = _at_least_zero(f"{key}.learning_rate", group.get("learning_rate", learning_rate))
        decay = _at_least_zero(f"{key}.weight_decay", group.get("weight_decay", weight_decay))
        parts[str(index)] = make(rate / learning_rate, decay)

    def label(path: Sequence[Any], _: Any) -> str:
        name = leaf_name(path)
        if name[0] != "params":
            return _REST
        matches = (str(index) for index, pattern in enumerate(patterns) if pattern.fullmatch("/".join(name[1:])))
        return next(matches, _REST)

    def labels(tree: Any) -> Any:
        labelled = jax.tree_util.tree_map_with_path(label, tree)
        for index in sorted(set(map(str, range(len(patterns)))) - set(jax.tree.leaves(labelled))):
            names = sorted("/".join(leaf_name(path)[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
            pattern = patterns[int(index)].pattern
            raise UsageError(
                f"optimizer.groups[{index}].path={pattern!r}: matches no parameter that is left to it; there are "
                f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
            )
        return labelled

    return optax.partition(parts, labels)


def _pattern(key: str, group: Any) -> re.Pattern[str]:
    if not isinstance(group, Mapping) and not hasattr(group, "items"):
        raise UsageError(f"{key}={group!r}: give a mapping of {', '.join(_KEYS)}")
    for name in group.keys():  # noqa: SIM118 - a ConfigDict iterates differently
        if name not in _KEYS:
            raise UsageError(f"{key}.{name}: no such key; there are {', '.join(_KEYS)}.{did_you_mean(name, _KEYS)}")
    path = group.get("path")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{key}.path={path!r}: give a regular expression for the whole path of a parameter")
    try:
        return re.compile(path)
    except re.error as error:
        raise UsageError(f"{key}.path={path!r}: not a regular expression ({error})") from None


def _at_least_zero(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(f"{key}={value!r}: give a number of at least 0")
    return float(value)
