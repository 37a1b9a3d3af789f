"""HASB, Hessian-aware stochastic bit-switching: mixed widths within a step of joint training (arXiv 2502.01199)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.precision import Precision

Array = jax.Array


def roulette(widths: Sequence[int], traces: Any) -> Array:
    """How likely a layer takes each width: p_i = 1/n where t_l < mean(t), else p_i = b_i/Σb; float32 [layers, n].

    A layer to whose weights the loss is more sensitive than on average prefers the wide ones.

    Args:
      widths: b, n of them, bits.
      traces: t, the trace of each layer's block of the Hessian; [layers], may be traced.

    Raises:
      UsageError: widths that are no whole numbers of bits, or none; traces that are no vector.

    >>> print(roulette((8, 6, 4, 2), jnp.array([1.0, 5.0])))
    [[0.25 0.25 0.25 0.25]
     [0.4  0.3  0.2  0.1 ]]
    """
    bits = _checked(widths)
    traces = jnp.asarray(traces, jnp.float32)
    if traces.ndim != 1 or not traces.size:
        raise UsageError(f"roulette: traces of shape {traces.shape}; give a vector, one number for each layer")
    sensitive = traces >= jnp.mean(traces)
    even = np.full(len(bits), 1 / len(bits), np.float32)
    return jnp.where(sensitive[:, None], bits / np.float32(bits.sum()), even)


@dataclasses.dataclass(frozen=True)
class Hasb:
    """Which layers switch, when, and to what: ``assign`` is the rule of a step.

    Attributes:
      layers: paths of the layers that may switch; in the order of the traces.
      widths: what they switch between, bits.
      sigma: σ, the probability to switch in the last epoch, 0 … 1.
      steps_per_epoch: steps (updates, whatever their width) of an epoch.
      total_steps: of the run.
      followers: paths of all layers that follow the schedule; those not in `layers` never switch.
      acts: whether a layer's activations take the width that its weights do; else they keep theirs.

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    sigma: float
    steps_per_epoch: int
    total_steps: int
    followers: tuple[str, ...] = ()
    acts: bool = True

    def __post_init__(self) -> None:
        _checked(self.widths)
        if not self.layers:
            raise UsageError("hasb: no layer follows the schedule, so none can switch; free one from its fixed bits")
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, int | float) or not 0 <= self.sigma <= 1:
            raise UsageError(f"hasb: sigma={self.sigma!r}; give the last epoch's probability to switch, from 0 to 1")
        for name in ("steps_per_epoch", "total_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"hasb: {name}={getattr(self, name)!r}; give at least 1")

    def probability(self, step: Any) -> Array:
        """σ·(epoch + 1)/epochs at `step`, float32, at most σ; a run of less than an epoch has one."""
        epochs = max(-(-self.total_steps // self.steps_per_epoch), 1)
        epoch = jnp.asarray(step) // self.steps_per_epoch
        return jnp.float32(self.sigma / epochs) * jnp.minimum(epoch + 1, epochs).astype(jnp.float32)

    def assign(self, key: Array, step: Any, precision: Precision, probabilities: Array) -> dict[str, Precision]:
        """The bits of each layer at a step: those of the step, or of a width drawn from the layer's roulette.

        Each layer switches by itself, with the probability of the step's epoch, to a width b drawn from its row of
        `probabilities`; that may be the one it has. Its weights take b bits, and so do its activations (see `acts`)
        where the step quantizes them; gradients keep the step's. Bits that a rule fixes are not affected.

        Args:
          key: of this step.
          step: may be traced, as may be all that follow.
          precision: the step's.
          probabilities: [layers, n], from `roulette`.

        Returns:
          path → `Precision`, for each of `layers` and `followers`; bits are float32 scalars where a layer may switch.
        """
        switch, choose = jax.random.split(key)
        switched = jax.random.uniform(switch, (len(self.layers),)) < self.probability(step)
        drawn = jnp.asarray(self.widths, jnp.float32)[jax.random.categorical(choose, jnp.log(probabilities), axis=-1)]

        def bits(scheduled: Any) -> Array:
            return jnp.where(switched, drawn, jnp.asarray(scheduled, jnp.float32))

        weights = None if precision.weights is None else bits(precision.weights)
        acts = None if precision.acts is None else bits(precision.acts)
        assigned: dict[str, Precision] = dict.fromkeys(self.followers, precision)
        for index, path in enumerate(self.layers):
            assigned[path] = Precision(
                weights=None if weights is None else weights[index],
                acts=acts[index] if acts is not None and self.acts else precision.acts,
                grads=precision.grads,
            )
        return assigned

    def ordered(self, traces: Mapping[str, float]) -> Array:
        """`traces` (path → number) as the vector that `roulette` takes, in the order of `layers`.

        Raises:
          UsageError: for a layer without one.
        """
        missing = [path for path in self.layers if path not in traces]
        if missing:
            raise UsageError(f"hasb: there is no trace for {missing[:6]}; give one for each layer that may switch")
        return jnp.asarray([traces[path] for path in self.layers], jnp.float32)


def _checked(widths: Sequence[int]) -> np.ndarray:
    whole = all(isinstance(width, int) and not isinstance(width, bool) and width >= 1 for width in widths)
    if not widths or not whole:
        raise UsageError(f"hasb: widths={tuple(widths)!r}; give whole numbers of bits, such as (8, 6, 4, 2)")
    return np.asarray(widths, np.float32)
