"""Cyclic precision schedules (Wolfe & Kyrillidis 2024, arXiv 2403.02243; Fu et al. 2021, arXiv 2101.09868)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.schedules.schedule import (
    MOST_STEPS,
    Schedule,
    one_of,
    rounded_ratio,
    shown,
    whole_bits,
    whole_number,
)

PROFILES = ("cosine", "linear", "exponential", "rex")
PATTERNS = ("repeated", "triangular")
REFLECTIONS = ("vertical", "horizontal")
CYCLE_LENGTHS = ("floor_plus_one", "floor")

SUITE: dict[str, dict[str, str]] = {
    "CR": {"profile": "cosine", "pattern": "repeated"},
    "CT": {"profile": "cosine", "pattern": "triangular"},
    "LR": {"profile": "linear", "pattern": "repeated"},
    "LT": {"profile": "linear", "pattern": "triangular"},
    "ER": {"profile": "exponential", "pattern": "repeated"},
    "ETV": {"profile": "exponential", "pattern": "triangular", "reflection": "vertical"},
    "ETH": {"profile": "exponential", "pattern": "triangular", "reflection": "horizontal"},
    "RR": {"profile": "rex", "pattern": "repeated"},
    "RTV": {"profile": "rex", "pattern": "triangular", "reflection": "vertical"},
    "RTH": {"profile": "rex", "pattern": "triangular", "reflection": "horizontal"},
}
"""What each of the paper's ten names stands for, in the paper's order."""

GROUPS: dict[str, tuple[str, ...]] = {
    "large_saving": ("RR", "RTH"),
    "medium_saving": ("LR", "LT", "CR", "CT", "ETV", "RTV"),
    "small_saving": ("ER", "ETH"),
}
"""The ten schedules by how much compute they save. The paper calls its groups small, medium and large after what they
*spend*: its small group is our ``large_saving``."""


@dataclasses.dataclass(frozen=True, repr=False)
class Cyclic(Schedule):
    """Bits that go from low to high and back, cycle after cycle; see `cyclic`."""

    builder = "cyclic"
    profile: str
    low: int
    high: int
    cycles: int
    total_steps: int
    pattern: str = "repeated"
    reflection: str = "vertical"
    rate: float = 4.0
    beta: float = 0.9
    cycle_length: str = "floor_plus_one"

    def __post_init__(self):
        one_of("profile", self.profile, PROFILES)
        one_of("pattern", self.pattern, PATTERNS)
        one_of("reflection", self.reflection, REFLECTIONS)
        one_of("cycle_length", self.cycle_length, CYCLE_LENGTHS)
        low, high = whole_bits("low", self.low), whole_bits("high", self.high)
        if low > high:
            raise UsageError(f"low={low}: must not be above high={high}")
        total_steps = whole_number("total_steps", self.total_steps, 1, MOST_STEPS)
        note = f" (no more cycles than total_steps={total_steps})"
        cycles = whole_number("cycles", self.cycles, 1, total_steps, note)
        rate, beta = _real("rate", self.rate), _real("beta", self.beta)
        if not 0 < rate < math.inf:
            raise UsageError(f"rate={shown(self.rate)}: must be a finite number above 0")
        if not 0 <= beta < 1:
            raise UsageError(f"beta={shown(self.beta)}: must be a number in [0, 1)")
        for name, value in (("low", low), ("high", high), ("total_steps", total_steps), ("cycles", cycles)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "beta", beta)

    @property
    def steps_per_cycle(self) -> int:
        """T, the steps of one cycle."""
        return self.total_steps // self.cycles + (self.cycle_length == "floor_plus_one")

    def _bits(self, step: jax.Array) -> jax.Array:
        T = self.steps_per_cycle
        # The position in the cycle is found in integers: at a million steps t/T in float32 is off by whole steps.
        cycle, r = jnp.divmod(jnp.minimum(step, self.total_steps - 1), T)
        bits = self._rounded(r, falls=False)
        if self.pattern == "triangular":
            bits = jnp.where(cycle % 2 == 0, self._rounded(r, falls=True), bits)
        return bits

    def _rounded(self, r: jax.Array, falls: bool) -> jax.Array:
        """Bits at step `r` of a cycle that grows, or `falls`."""
        T, D = self.steps_per_cycle, self.high - self.low
        if self.profile == "linear":
            return rounded_ratio(self.high, -D, r, T) if falls else rounded_ratio(self.low, D, r, T)
        if falls and self.reflection == "vertical":
            bits = self.high - D * self._growth(r)
        else:
            bits = self.low + D * self._growth(T - r if falls else r)
        return jnp.clip(jnp.round(bits), self.low, self.high)

    def _growth(self, r: jax.Array) -> jax.Array:
        """g(u) at u = r/T, float32, each profile in the form that loses no digits."""
        T = self.steps_per_cycle
        u, z = r.astype(jnp.float32) / T, (T - r).astype(jnp.float32) / T
        if self.profile == "cosine":
            # cos πu = sin π(T − 2r)/2T, which is exactly 0 at the middle, where the bits tie when D is odd.
            return (1 - jnp.sin((T - 2 * r).astype(jnp.float32) * (math.pi / (2 * T)))) / 2
        if self.profile == "exponential":
            return -jnp.expm1(-self.rate * u)
        # REX, 1 − z/((1−β) + βz), with the difference taken by hand.
        return (1 - self.beta) * u / ((1 - self.beta) + self.beta * z)

    def _highest(self, total_steps: int | None) -> int:
        return self.high


def cyclic(
    profile: str,
    low: int,
    high: int,
    cycles: int,
    *,
    total_steps: int,
    pattern: str = "repeated",
    reflection: str = "vertical",
    rate: float = 4.0,
    beta: float = 0.9,
    cycle_length: str = "floor_plus_one",
) -> Cyclic:
    """Bits that run between `low` and `high` in cycles.

    With N = total_steps, n = cycles, T steps in a cycle, k = ⌊t/T⌋, u = (t mod T)/T and D = high − low, a cycle that
    grows has ``q(t) = rint(low + D·g(u))``, rounded half to even, where g is

    ============= =============================================
    cosine        (1 − cos πu)/2
    linear        u
    exponential   1 − e^(−rate·u)
    rex           1 − z/((1−β) + βz), z = 1 − u
    ============= =============================================

    ``pattern="repeated"`` grows in every cycle and jumps back to `low` at the start of the next. ``"triangular"`` falls
    in even cycles (k = 0, 2, …) and grows in odd ones, so it starts at `high` and, with an even n, ends there.

    T = ⌊N/n⌋ + 1 by default, as in nearly all of the authors' training scripts; so where n is a large part of N, fewer
    than n cycles fit. ``cycle_length="floor"`` takes ⌊N/n⌋, as CPT and the authors' cost scripts do: where n does not
    divide N, the trailing steps then open another cycle, and a repeated schedule ends its run near `low`.

    Bits are float32, equal to a float64 evaluation at every step but those within 1e-4 of a tie (the linear profile is
    exact there too). Steps beyond the run take the bits of the last step, N − 1; steps below 0 those of step 0.

    Args:
      profile: "cosine" (CPT's), "linear", "exponential" or "rex".
      low: q_min, bits, 1 to 32.
      high: q_max, bits, from `low` to 32.
      cycles: n, from 1 to `total_steps`.
      total_steps: N, the steps of the run.
      pattern: "repeated" or "triangular".
      reflection: how a triangular schedule falls: "vertical" is ``high − D·g(u)``, "horizontal" ``low + D·g(1 − u)``.
        They are the same for cosine and linear. A repeated schedule never falls and does not look at it.
      rate: of the exponential profile only; above 0.
      beta: β of the rex profile only, in [0, 1). 0.9 is what the authors' code has; the REX paper's curve has ½.
      cycle_length: "floor_plus_one" or "floor".

    Raises:
      UsageError: when an argument is outside what is said above.

    >>> s = cyclic("cosine", low=3, high=8, cycles=8, pattern="repeated", total_steps=64_000)
    >>> [int(s(t)) for t in (0, 2000, 4000, 6000, 8000, 8001)]
    [3, 4, 5, 7, 8, 3]
    """
    return Cyclic(
        profile=profile,
        low=low,
        high=high,
        cycles=cycles,
        total_steps=total_steps,
        pattern=pattern,
        reflection=reflection,
        rate=rate,
        beta=beta,
        cycle_length=cycle_length,
    )


def by_name(
    name: str,
    low: int,
    high: int,
    cycles: int,
    total_steps: int,
    *,
    rate: float = 4.0,
    beta: float = 0.9,
    cycle_length: str = "floor_plus_one",
) -> Cyclic:
    """One of the paper's ten schedules by its name: CR CT LR LT ER ETV ETH RR RTV RTH.

    The first letter is the profile (cosine, linear, exponential, rex), R and T the pattern, V and H the reflection.

    Raises:
      UsageError: for another name, and as `cyclic` does.

    >>> by_name("LT", low=3, high=8, cycles=8, total_steps=64_000)
    cyclic(profile='linear', low=3, high=8, cycles=8, total_steps=64000, pattern='triangular')
    """
    choice: dict[str, Any] = dict(SUITE[one_of("name", name, SUITE)])
    return cyclic(
        low=low,
        high=high,
        cycles=cycles,
        total_steps=total_steps,
        rate=rate,
        beta=beta,
        cycle_length=cycle_length,
        **choice,
    )


def suite(low: int, high: int, cycles: int, total_steps: int, **options: Any) -> dict[str, Cyclic]:
    """The paper's ten schedules, in its order.

    Args:
      low: q_min, bits.
      high: q_max, bits.
      cycles: n; the paper trains with 8, and with 2 where it fine-tunes.
      total_steps: N.
      **options: `rate`, `beta` and `cycle_length` of `cyclic`.

    Raises:
      UsageError: as `cyclic` does.

    >>> list(suite(low=3, high=8, cycles=8, total_steps=64_000))
    ['CR', 'CT', 'LR', 'LT', 'ER', 'ETV', 'ETH', 'RR', 'RTV', 'RTH']
    """
    return {name: by_name(name, low, high, cycles, total_steps, **options) for name in SUITE}


def _real(key: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except TypeError:
        raise UsageError(f"{key}={shown(value)}: must be a number") from None
