"""Loss laws by name: what a plan compares widths by, and the range that each is supported in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from qtrain.errors import UsageError, did_you_mean
from qtrain.planner.chen import chen_loss
from qtrain.planner.kumar import kumar_loss
from qtrain.planner.quest import EFFICIENCY, quest_loss

GROUP = 128.0
"""Elements that share a scale in Chen's law unless a plan says otherwise."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a loss is asked for. params: N; tokens: D; bits: of the weights; acts: of the activations, None: as the
    weights; group_size: weights that share a scale, None: not said."""

    params: float
    tokens: float
    bits: int
    acts: float | None = None
    group_size: float | None = None


@dataclasses.dataclass(frozen=True)
class LossLaw:
    """A loss as a function of a `Setting`, in nats a token (or what the runs it was fitted to measure).

    name, equation, source: for reports. widths: bits it has a value for. ranges: quantity (``params``, ``tokens``,
    ``group_size``) → the least and the most of the runs behind it. supported: widths of those runs. remark: what else
    to know. takes: the fields of a setting besides params, tokens and bits that it uses. doubts: what those runs do not
    identify, a line each, which every plan warns of.
    """

    name: str
    equation: str
    source: str
    widths: tuple[int, ...]
    ranges: Mapping[str, tuple[float, float]]
    evaluate: Callable[[Setting], float]
    supported: tuple[int, ...] = ()
    remark: str = ""
    takes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def __call__(self, setting: Setting) -> float:
        """The loss.

        Raises:
          UsageError: bits that the law has no constant for; an activation width that it does not know of.
        """
        if setting.bits not in self.widths:
            raise UsageError(
                f"{setting.bits} bits: the law {self.name!r} has constants for {', '.join(map(str, self.widths))} bits "
                "alone; give one of these, or another --law"
            )
        if setting.acts is not None and setting.acts != setting.bits and "acts" not in self.takes:
            raise UsageError(
                f"activations of {setting.acts:g} bits beside weights of {setting.bits}: the law {self.name!r} has no "
                "term for these; use --law kumar, or leave out --acts"
            )
        return self.evaluate(setting)

    def warnings(self, setting: Setting) -> list[str]:
        """A line for each quantity that is outside the range of the runs behind the law, and for each of its doubts."""
        found = list(self.doubts)
        for name, (low, high) in self.ranges.items():
            value = getattr(setting, name)
            if value is not None and not low <= value <= high:
                found.append(
                    f"{name} {value:.4g} is outside {low:.4g} to {high:.4g}, the range of the loss law {self.name!r}: "
                    "extrapolated"
                )
        if self.supported and setting.bits not in self.supported:
            found.append(
                f"{setting.bits} bits is none of the widths of the runs behind the loss law {self.name!r} "
                f"({', '.join(map(str, self.supported))}): extrapolated"
            )
        return found


LAWS: dict[str, LossLaw] = {
    law.name: law
    for law in (
        LossLaw(
            name="quest",
            equation="L = 8.134/(params*eff(bits))^0.06273 + 86.41/tokens^0.24129 + 0.00142; eff(1,2,3,4,8) = "
            + ", ".join(f"{value:g}" for value in EFFICIENCY.values()),
            source="Panferov et al. 2025 (QuEST), arXiv 2502.05003",
            widths=tuple(EFFICIENCY),
            ranges={"params": (30e6, 1.6e9)},
            evaluate=lambda setting: quest_loss(setting.params, setting.tokens, setting.bits),
            remark="weights and activations at the same bits, about 100 tokens a parameter",
        ),
        LossLaw(
            name="kumar",
            equation="L = 4299/N_eff^0.4965 + 18060/tokens^0.4965 + 2.7648; N_eff = params*prod(1 - exp(-P/g + n))",
            source="Kumar et al. 2024, arXiv 2411.04330",
            widths=tuple(range(3, 17)),
            ranges={"params": (30e6, 220e6), "tokens": (1.5e9, 26e9)},
            evaluate=lambda setting: kumar_loss(setting.params, setting.tokens, setting.bits, setting.acts),
            supported=tuple(range(3, 13)),
            remark="key-value cache at the bits of the activations",
            takes=("acts",),
        ),
        LossLaw(
            name="chen",
            equation="L = 237.7042/params^0.3022 + 596.249/tokens^0.3022 + 1.9279 + d; "
            "d = 0.1582*tokens^0.0745*(log2 G)^0.7779/params^0.2186",
            source="Chen et al. 2025, arXiv 2505.14302",
            widths=(4,),
            ranges={"params": (74e6, 595e6), "tokens": (10e9, 100e9), "group_size": (32, 256)},
            evaluate=lambda setting: chen_loss(setting.params, setting.tokens, setting.group_size or GROUP),
            remark="4-bit weights and activations, quantized from the start, groups of G = --group-size (128)",
            takes=("group_size",),
        ),
    )
}
"""The laws with published constants."""


def loss_law(name: str) -> LossLaw:
    """A published law by name.

    Raises:
      UsageError: for another name.
    """
    if name not in LAWS:
        near = did_you_mean(name, LAWS)
        raise UsageError(f"--law {name!r}: give one of {', '.join(LAWS)}, or a file that qtrain fit wrote.{near}")
    return LAWS[name]
