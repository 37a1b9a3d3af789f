"""The section ``quant`` of a config made into rules: a recipe's, and a config's own before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from qtrain.config import QUANT
from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import Rule, default_rules, quantizer_from_config, rules_from_config
from qtrain.inject.rules import EXECUTIONS, OPS
from qtrain.methods import multi_precision
from qtrain.methods.cpt import cpt_rules
from qtrain.methods.multi_precision import MultiPrecision, multi_precision_rules
from qtrain.methods.trs import trs_rules
from qtrain.quantizers import RESIDUALS

PAPERS: dict[str, Callable[[], tuple[Rule, ...]]] = {"cpt": cpt_rules, "trs": trs_rules}
"""Recipes with quantizers of their own."""
RECIPES = ("default", *PAPERS, multi_precision.RECIPE)
BACKENDS = ("qtrain", "aqt")


def check_values(config: ConfigDict) -> None:
    """Refuse values of ``quant`` and of a few other keys that nothing else checks before a model is built.

    Raises:
      UsageError: naming the key.
    """
    for key, value, allowed in (
        ("quant.recipe", config.quant.recipe, RECIPES),
        ("quant.backend", config.quant.backend, BACKENDS),
        ("quant.execution", config.quant.execution, EXECUTIONS),
        ("quant.residuals", config.quant.residuals, RESIDUALS),
    ):
        if value not in allowed:
            raise UsageError(f"{key}={value!r}: give one of {allowed}.{did_you_mean(value, allowed)}")
    if config.quant.recipe != "default":
        own = ["weights", "acts", "grads", "bias"] + ["ends"] * (config.quant.recipe in PAPERS)
        for key in own:
            if config.quant[key] != QUANT[key]:
                raise UsageError(
                    f"quant.{key}={config.quant[key]!r}: quant.recipe={config.quant.recipe!r} brings its own; leave it "
                    f"at {QUANT[key]!r}, or use quant.rules, or quant.recipe='default'"
                )
    for key, value, low, high in (
        ("seed", config.seed, 0, 2**32 - 1),
        ("quant.ends", config.quant.ends, 1, 32),
        ("eval.batch_size", config.eval.batch_size, 1, 2**31 - 1),
        ("checkpoint.keep", config.checkpoint.keep, 1, 2**31 - 1),
    ):
        if not low <= value <= high:
            raise UsageError(f"{key}={value}: give a whole number from {low} to {high}")


def rules_of(config: ConfigDict, method: MultiPrecision | None) -> tuple[Rule, ...]:
    """The rules of ``quant``: its own, then those of its recipe. `method`: of a run that trains several widths.

    Raises:
      UsageError: for a value that a quantizer or a rule refuses.
    """
    quant = config.quant
    own = rules_from_config(quant.rules) if quant.rules else ()
    chosen = {"residuals": quant.residuals, "execution": quant.execution}
    if quant.recipe != "default":
        paper = PAPERS[quant.recipe]() if method is None else multi_precision_rules(method.widths, quant.ends)
        # A layer that stays in float by intention is one of which no execution could make anything else.
        paper = tuple(dataclasses.replace(rule, **chosen) if rule.weight_quantizer else rule for rule in paper)
        return (*own, *_for_ops(paper, quant.ops))
    recipe = default_rules(
        weight_quantizer=quantizer_from_config(quant.weights, "quant.weights"),
        act_quantizer=quantizer_from_config(quant.acts, "quant.acts"),
        grad_quantizer=quantizer_from_config(quant.grads, "quant.grads"),
        bias_quantizer=quantizer_from_config(quant.bias, "quant.bias"),
        ends=quant.ends,
    )
    return (*own, *_for_ops([dataclasses.replace(rule, **chosen) for rule in recipe], quant.ops))


def _for_ops(rules: Sequence[Rule], ops: Any) -> tuple[Rule, ...]:
    """`rules`, for the operations that ``quant.ops`` names."""
    if not ops:
        raise UsageError(f"quant.ops={ops!r}: give a tuple of {OPS}, or ('weighted',) or ('all',)")
    try:
        return tuple(dataclasses.replace(rule, ops=ops) for rule in rules)
    except UsageError as error:
        raise UsageError(f"quant.ops: {error}") from None
