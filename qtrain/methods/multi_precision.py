"""One network at several widths: Double Rounding, ALRS, per-width updates, distillation (arXiv 2502.01199)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qtrain import schedules
from qtrain.additions import Additions, Bits
from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import QuantizedModel, Rule
from qtrain.methods.alrs import SIGNS, scale_by_alrs
from qtrain.methods.distillation import FromTheWidest
from qtrain.methods.hasb_training import Switching
from qtrain.optim import only_rows_in_use
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS, LSQ, DoubleRounding
from qtrain.schedules import PrecisionSchedule, Rounds

RECIPE = "multi_precision"
UPDATES = ("sequential", "accumulated")
ALRS = ("none", *SIGNS)
NARROWEST, WIDEST = 2, 16
"""Codes of one bit are no grid to train on, and the widest codes are kept in int8 or int16."""


def multi_precision_rules(widths: Sequence[int], ends: int = 8) -> tuple[Rule, ...]:
    """Weights by Double Rounding with h = the widest, activations by LSQ+ with a scale and an offset of each width.

    The cotangent, norms and biases stay in float. The first and the last layer keep `ends` bits at every width, with
    scales of their own; from 24 bits on they stay in float.

    Raises:
      UsageError: for `ends` that weights cannot be rounded to.
    """
    if ends >= FLOAT_BITS:
        first_and_last = Rule(position="ends", weight_quantizer=None, act_quantizer=None)
    elif ends < NARROWEST:
        raise UsageError(f"quant.ends={ends}: with quant.recipe={RECIPE!r} give {NARROWEST} or more bits")
    else:
        first_and_last = Rule(
            position="ends",
            weights=ends,
            acts=ends,
            weight_quantizer=DoubleRounding(high=ends),
            act_quantizer=LSQ(signed=False, offset=True, across_bits="keep"),
        )
    return (
        first_and_last,
        Rule(
            weight_quantizer=DoubleRounding(high=max(widths)),
            act_quantizer=LSQ(signed=False, offset=True, across_bits="table", widths=tuple(sorted(widths))),
        ),
    )


@dataclasses.dataclass(frozen=True)
class MultiPrecision:
    """What the config's section ``multi_precision`` says; see `from_config`."""

    widths: tuple[int, ...]
    updates: str
    alrs: str
    distill_rate: float
    temperature: float
    switching: Switching

    @property
    def high(self) -> int:
        """The widest of the widths."""
        return max(self.widths)

    def check_schedule(self, schedule: PrecisionSchedule, total_steps: int, repeat: int) -> None:
        """Refuse a schedule that the method has no grids for, or that does not go with how it updates.

        Raises:
          UsageError: naming the key.
        """
        for kind in ("weights", "acts"):
            of_kind = getattr(schedule, kind)
            if isinstance(of_kind, Rounds):
                strange = [bits for bits in of_kind.values if bits not in self.widths]
                if strange:
                    raise UsageError(
                        f"schedule.values={of_kind.values}: {strange[0]} is not among "
                        f"multi_precision.widths={self.widths}; add it there, or take it out"
                    )
                continue
            highest = getattr(schedule.q_max, kind)
            if highest > self.high:
                raise UsageError(
                    f"schedule: {kind} reach {highest} bits, and multi_precision.widths={self.widths} are made of "
                    f"integers of {self.high}; lower the schedule, or give a wider width first"
                )
            lowest = int(schedules.evaluate(of_kind, total_steps).min())
            if lowest < NARROWEST:
                raise UsageError(f"schedule: {kind} fall to {lowest} bits; the method is for {NARROWEST} bits and more")
        rounds = schedule.weights.values if isinstance(schedule.weights, Rounds) else ()
        whole = rounds == self.widths and repeat == len(self.widths)
        for key, value, asked in (
            ("updates", self.updates, self.updates == "accumulated"),
            ("distill.rate", self.distill_rate, self.distill_rate > 0),
        ):
            if asked and not whole:
                raise UsageError(
                    f"multi_precision.{key}={value!r}: it needs each batch at every width in turn; set "
                    f"schedule.name='rounds', schedule.values={self.widths} and data.repeat={len(self.widths)}"
                )

    def optimizer_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The config's section ``optimizer`` with the accumulation that the method asks for.

        Raises:
          UsageError: for another than that.
        """
        steps = len(self.widths) if self.updates == "accumulated" else 1
        if fields["accumulate_steps"] not in (1, steps):
            raise UsageError(
                f"optimizer.accumulate_steps={fields['accumulate_steps']}: with multi_precision.updates="
                f"{self.updates!r} {steps} of the steps make an update; leave it at 1"
            )
        return {**fields, "accumulate_steps": steps}

    def optimizer(self, transform: optax.GradientTransformation) -> optax.GradientTransformation:
        """`transform`, which leaves alone what is held for other widths than the update's."""
        return only_rows_in_use(transform) if self.updates == "sequential" else transform

    def scales(self) -> Callable[[optax.Schedule, optax.GradientTransformation], optax.GradientTransformation] | None:
        """What makes a transform of the scales from their learning rate and their gradient; None: nothing.

        The direction is the gradient, whatever the optimizer: without momentum, and not Adam's. Both would mix the
        widths that share s_h before their rates are applied. Its gradient at l bits grows as 2^Δ, a thousand times from
        8 to 2 bits, which η_l undoes; a momentum of 0.9 carries nearly all of it into the next round's step at 8 bits,
        where η = 1.
        """
        if self.alrs == "none":
            return None
        return lambda rate, direction: scale_by_alrs(None, self.high, rate, sign=self.alrs, base=direction)

    def add_to(self, additions: Additions, qmodel: QuantizedModel, inputs: jax.ShapeDtypeStruct) -> Additions:
        """`additions` and what the method adds: which rows are in use, the width of ALRS, distillation.

        Args:
          additions: of the config's other sections.
          qmodel: the model, of which the plan has been made.
          inputs: shape and dtype of a training batch's.
        """
        inherited = additions.update_arguments

        def update_arguments(precision: Precision, bits: Bits, trained: Any) -> dict[str, Any]:
            found = {**inherited(precision, bits, trained), "width": precision.weights}
            return {**found, "rows": qmodel.rows(bits, trained)} if self.updates == "sequential" else found

        added = dataclasses.replace(additions, update_arguments=update_arguments)
        if not self.distill_rate:
            return added
        key = jax.random.key(0)
        keys = {"params": key, "dropout": key}
        logits, _ = jax.eval_shape(lambda x: qmodel.module.init_with_output(keys, x), inputs)
        return dataclasses.replace(
            added,
            controller=lambda: {**additions.controller(), "teacher": jnp.zeros(logits.shape, logits.dtype)},
            output_penalty=FromTheWidest(self.high, self.distill_rate, self.temperature),
        )


def from_config(config: Mapping[str, Any], recipe: str) -> MultiPrecision | None:
    """The method of a config's section ``multi_precision``, or None where it is off (``widths`` is empty).

    ================  ============================================================================================
    key               meaning
    ================  ============================================================================================
    widths            the widths to train, the widest first: each 2 … 16 bits
    updates           "sequential": an update at each width; "accumulated": one for the mean gradient of them all
    alrs              learning rate of the scales: "none" (the ordinary one), or `alrs_rate`'s "clamp", "one_minus" or
                      "signed"
    distill           ``rate`` (0: none) and ``temperature`` of `distillation`, from the widest to the others
    hasb              ``sigma`` (0: none): how likely layers switch to another width, by their sensitivity, in the last
                      epoch; it is the trace of a Hessian from ``batches``, at most ``draws``, or until its relative
                      change is below ``tolerance``. See `qtrain.methods.hasb`
    ================  ============================================================================================

    Args:
      config: the section.
      recipe: ``quant.recipe``.

    Raises:
      UsageError: for a value out of range, or values that do not go together.
    """
    widths, updates, alrs = config["widths"], config["updates"], config["alrs"]
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise UsageError(f"multi_precision.widths={widths!r}: give a list of widths, such as (8, 6, 4, 2)")
    widths = tuple(widths)
    if not widths:
        if recipe == RECIPE:
            raise UsageError(f"quant.recipe={RECIPE!r}: multi_precision.widths is empty; give it, such as (8, 6, 4, 2)")
        return None
    if recipe != RECIPE:
        raise UsageError(
            f"multi_precision.widths={widths}: they are trained by quant.recipe={RECIPE!r}, and it is {recipe!r}; set "
            "it, or leave the widths empty"
        )
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or not NARROWEST <= width <= WIDEST:
            raise UsageError(
                f"multi_precision.widths={widths}: {width!r} is no whole number from {NARROWEST} to {WIDEST} (of "
                "which the stored integers have at most 16 bits)"
            )
    if list(widths) != sorted(set(widths), reverse=True):
        raise UsageError(f"multi_precision.widths={widths}: give each once, the widest first, such as (8, 6, 4, 2)")
    for key, value, allowed in (("updates", updates, UPDATES), ("alrs", alrs, ALRS)):
        if value not in allowed:
            raise UsageError(f"multi_precision.{key}={value!r}: give one of {allowed}.{did_you_mean(value, allowed)}")
    if updates == "accumulated" and alrs != "none":
        raise UsageError(
            f"multi_precision.alrs={alrs!r}: it is a rate for each width, and updates='accumulated' has one step for "
            "them all; set alrs='none', or updates='sequential'"
        )
    rate, temperature = config["distill"]["rate"], config["distill"]["temperature"]
    if not _number(rate) or rate < 0:
        raise UsageError(f"multi_precision.distill.rate={rate!r}: give a number of at least 0; 0 leaves it out")
    if not _number(temperature) or temperature <= 0:
        raise UsageError(f"multi_precision.distill.temperature={temperature!r}: give a number above 0")
    hasb = config["hasb"]
    sigma = hasb["sigma"]
    if not _number(sigma) or not 0 <= sigma <= 1:
        raise UsageError(f"multi_precision.hasb.sigma={sigma!r}: give a probability from 0 to 1; 0 leaves it out")
    if sigma and updates == "accumulated":
        raise UsageError(
            f"multi_precision.hasb.sigma={sigma}: updates='accumulated' is one step for whole widths; set it to 0, or "
            "updates='sequential'"
        )
    for key in ("batches", "draws"):
        if isinstance(hasb[key], bool) or not isinstance(hasb[key], int) or hasb[key] < 1:
            raise UsageError(f"multi_precision.hasb.{key}={hasb[key]!r}: give a whole number of at least 1")
    if not _number(hasb["tolerance"]) or hasb["tolerance"] < 0:
        raise UsageError(f"multi_precision.hasb.tolerance={hasb['tolerance']!r}: give a number of at least 0")
    switching = Switching(float(sigma), hasb["batches"], hasb["draws"], float(hasb["tolerance"]))
    return MultiPrecision(widths, updates, alrs, float(rate), float(temperature), switching)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
