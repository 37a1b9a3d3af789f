"""Which rule an operation goes by, and the refusal of rules that do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.rules import Rule, offset


def check_rules(
    rules: Sequence[Rule],
    modules: Iterable[str],
    quantizable: Mapping[str, str],
    order: Mapping[str, str] | None = None,
    skipped: Collection[str] = (),
) -> None:
    """Refuse rules that do nothing.

    Args:
      rules: in order.
      modules: every module path of the model.
      quantizable: path → operation of those that can be quantized.
      order: the same of a whole pass, whose order says what is first and last; by default those given.
      skipped: paths that this pass does not reach, so that nothing is known about them: a rule that matches one stands.

    Raises:
      UsageError: for a rule that matches no module, none of whose matches can be quantized, or none of whose matches is
        where it wants them.
    """
    modules = list(modules)
    order = quantizable if order is None else order
    everything = [*modules, *(path for path in quantizable if path not in set(modules))]
    for rule in rules:
        if any(rule.matches(path) for path in skipped):
            continue
        matched = [path for path in everything if rule.matches(path)]
        listed = ", ".join(repr(path) for path in list(quantizable)[:6])
        if not matched:
            near = did_you_mean(rule.path, everything)
            raise UsageError(f"rule path={rule.path!r} matches no module; quantizable are {listed}{near}")
        fitting = [path for path, op in quantizable.items() if rule.covers(path, op)]
        if not fitting:
            near = did_you_mean(matched[0], quantizable)
            other = dict.fromkeys(
                op for path, op in quantizable.items() if dataclasses.replace(rule, ops=(op,)).covers(path, op)
            )
            advice = f"; ops={tuple(other)} would" if other else ""
            raise UsageError(
                f"rule path={rule.path!r} (ops={rule.ops}) matches only what cannot be quantized "
                f"({', '.join(repr(path) for path in matched[:6])}); quantizable are {listed}{near}{advice}"
            )
        if rule.position == "any":
            continue
        where = _positions(rule, order, quantizable)
        if where <= set(everything) and not where & set(fitting):
            raise UsageError(
                f"rule path={rule.path!r} (ops={rule.ops}) has position={rule.position!r}, which is "
                f"{' and '.join(repr(path) for path in sorted(where))} and not among what it matches"
            )


def assign(
    rules: Sequence[Rule], quantizable: Mapping[str, str], order: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Path → index of its rule (see `expanded`), for every quantizable path, in order, that a rule covers.

    `order`: as for `check_rules`.
    """
    order = quantizable if order is None else order
    where = [None if rule.position == "any" else _positions(rule, order, quantizable) for rule in rules]
    assigned = {}
    for path, op in quantizable.items():
        for index, (rule, places) in enumerate(zip(rules, where, strict=True)):
            if rule.covers(path, op) and (places is None or path in places):
                assigned[path] = offset(op) * len(rules) + index
                break
    return assigned


def _positions(rule: Rule, order: Mapping[str, str], quantizable: Mapping[str, str]) -> set[str]:
    """The first, last or both of the layers of a pass that have an operation of the rule's; a cell is one layer."""
    ops = {**order, **quantizable}
    fitting = [path for path in order if ops[path] in rule.ops]

    def layer(path: str) -> set[str]:
        if ops[path] != "recurrent":
            return {path}
        cell = path.rpartition("/")[0]
        return {gate for gate in fitting if ops[gate] == "recurrent" and gate.rpartition("/")[0] == cell}

    ends = [*(fitting[:1] if rule.position != "last" else ()), *(fitting[-1:] if rule.position != "first" else ())]
    return {gate for end in ends for gate in layer(end)}
