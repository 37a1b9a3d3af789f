"""The diagonal state-space model of S5, as modules whose every part has a name."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.models.s5_dynamics import discretise, initial_eigenvalues, parallel_recurrence

DISCRETISATIONS = ("zoh", "bilinear")
PARAMETRISATIONS = ("magnitude_phase", "naive")
RECURRENCES = ("parallel", "sequential")

Array = jax.Array


class State(nn.Module):
    """The state as it leaves the recurrence, real and imaginary part: a name for rules, and nothing else."""

    @nn.compact
    def __call__(self, real: Array, imaginary: Array) -> tuple[Array, Array]:
        """Both parts as they are, float32, one shape."""
        return real, imaginary


class Recurrence(nn.Module):
    """x_k = λ̄·x_{k−1} + v_k over axis 1, complex64; each x passes the submodule ``value``.

    With ``kind="parallel"`` all states pass at once, after the scan: what is done to them there is not fed back. With
    ``"sequential"`` they pass one by one, and what comes out is what the next step begins with.
    """

    kind: str
    reverse: bool = False

    @nn.compact
    def __call__(self, transition: Array, inputs: Array) -> Array:
        """λ̄ ``[P]`` and v ``[B, L, P]`` to x ``[B, L, P]``."""
        value = State(name="value")
        if self.kind == "parallel":
            states = parallel_recurrence(transition, inputs, reverse=self.reverse)
            return lax.complex(*value(states.real, states.imag))

        def advance(value: State, x: Array, v: Array) -> tuple[Array, Array]:
            x = transition * x + v
            x = lax.complex(*value(x.real, x.imag))
            return x, x

        scan = nn.scan(advance, variable_broadcast=True, split_rngs={}, in_axes=1, out_axes=1, reverse=self.reverse)
        return scan(value, jnp.zeros_like(inputs[:, 0]), inputs)[1]


class MagnitudePhase(nn.Module):
    """λ = −exp(log_decay) ± i·exp(log_frequency): whatever these are rounded to, the state decays.

    The sign of the frequency is that of the initial one, which is + for what is kept of conjugate pairs. A grid that is
    uniform in the logarithm has a relative error. HiPPO-N of size N has frequencies from 0.2 … 0.6 to N²/π, most of
    them near the lower end: a grid that is uniform in the frequency rounds those to the same few values.
    """

    initial: tuple[complex, ...]

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """The decay above 0, and the frequency in radians a unit of time, float32 ``[P]``."""
        decay, frequency = -np.real(self.initial), np.imag(self.initial)
        sign = np.where(np.abs(frequency) < 1e-6, 0.0, np.sign(frequency)).astype(np.float32)
        log_decay = self.param("log_decay", lambda key: jnp.log(jnp.asarray(decay, jnp.float32)))
        log_frequency = self.param(
            "log_frequency", lambda key: jnp.log(jnp.asarray(np.where(sign == 0, 1.0, np.abs(frequency)), jnp.float32))
        )
        return jnp.exp(log_decay), jnp.asarray(sign) * jnp.exp(log_frequency)


class Discretisation(nn.Module):
    """λ̄ and γ from λ and the learned step Δ = exp(log_step), initially log-uniform."""

    method: str
    least_step: float
    most_step: float

    @nn.compact
    def __call__(self, decay: Array, frequency: Array) -> tuple[Array, Array]:
        """complex64 ``[P]`` each; see `discretise`."""
        log_step = self.param("log_step", _log_steps(self.least_step, self.most_step), decay.shape)
        return discretise(self.method, decay, frequency, jnp.exp(log_step))


class Parts(nn.Module):
    """λ̄ = real + i·imag, as it is: nothing keeps |λ̄| below 1."""

    initial: Array

    @nn.compact
    def __call__(self) -> Array:
        """complex64 ``[P]``."""
        real = self.param("real", lambda key: self.initial.real)
        return lax.complex(real, self.param("imag", lambda key: self.initial.imag))


class Gain(nn.Module):
    """γ = exp(log_gain) of a model that knows no continuous time; its phase is left to B."""

    initial: Array

    @nn.compact
    def __call__(self) -> Array:
        """float32 ``[P]``."""
        return jnp.exp(self.param("log_gain", lambda key: jnp.log(jnp.abs(self.initial))))


def _log_steps(least: float, most: float) -> Any:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, math.log(least), math.log(most))


class SSM(nn.Module):
    """The S5 state-space model: all features of a sequence drive one diagonal state, which gives all features.

    x_k = λ̄ ⊙ x_{k−1} + γ ⊙ (B·u_k),  y_k = 2·Re(C·x_k) + D ⊙ u_k  (no factor 2 without `conjugate_symmetry`).

    What rules can name, below the module's own path: ``A`` (its parameters ``log_decay`` and ``log_frequency``, or
    ``real`` and ``imag``), ``B_real``, ``B_imag``, ``C_real``, ``C_imag`` (bias-free dense layers), the parameter
    ``D``, ``discretisation`` (``log_step``, or ``log_gain``), ``state`` and ``state_backward``, each with a ``value``
    through which the states pass. The input of the ``C`` layers is the state, so their activation bits are the state's
    width as it is read; real and imaginary parts have quantizers of their own everywhere.

    Fields:
      features: of the input and the output, H.
      state_size: P, complex numbers; with `conjugate_symmetry` one of each pair is kept, P/2.
      blocks: HiPPO-N matrices on the initial diagonal, each of size P/blocks.
      discretisation: ``"zoh"`` or ``"bilinear"``.
      parametrisation: of A. ``"magnitude_phase"``: log(−Re λ) and log |Im λ|, so |λ̄| < 1 whatever the values
        (`MagnitudePhase`, `discretise`). ``"naive"``: real and imaginary part of λ̄ itself and a gain; the
        discretisation gives their initial values alone.
      bidirectional: a second state runs from the end to the beginning, with the same A and B, and C reads both.
      recurrence: ``"parallel"`` (an associative scan) or ``"sequential"``; see `Recurrence`.
      least_step, most_step: between which Δ begins, in units of time.
      dtype: of the products; the recurrence and the discretisation are in float32.

    Smith, Warrington and Linderman 2023, arXiv 2208.04933. B and C are drawn in the eigenbasis: B̃ = Vᴴ·B for a normal B
    is normal again, with independent real and imaginary parts of variance 1/(2H), since those of an eigenvector are
    orthogonal and as long as one another; likewise C with 1/(2P). The authors transform a truncated normal; C begins
    with twice this variance there.
    """

    features: int
    state_size: int = 64
    blocks: int = 1
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    parametrisation: Literal["magnitude_phase", "naive"] = "magnitude_phase"
    conjugate_symmetry: bool = True
    bidirectional: bool = False
    recurrence: Literal["parallel", "sequential"] = "parallel"
    least_step: float = 0.001
    most_step: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, u: Array) -> Array:
        """``[B, L, H]`` to the same shape, in `dtype`."""
        self._check()
        eigenvalues = initial_eigenvalues(self.state_size, self.blocks, self.conjugate_symmetry)
        transition, gain = self._discrete(eigenvalues)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        into = functools.partial(
            dense, len(eigenvalues), kernel_init=nn.initializers.normal((2 * self.features) ** -0.5)
        )
        real, imaginary = into(name="B_real")(u), into(name="B_imag")(u)
        driven = gain * lax.complex(real.astype(jnp.float32), imaginary.astype(jnp.float32))
        x = Recurrence(self.recurrence, name="state")(transition, driven)
        if self.bidirectional:
            backward = Recurrence(self.recurrence, reverse=True, name="state_backward")(transition, driven)
            x = jnp.concatenate([x, backward], axis=-1)
        out = functools.partial(dense, self.features, kernel_init=nn.initializers.normal((2 * self.state_size) ** -0.5))
        y = out(name="C_real")(x.real) - out(name="C_imag")(x.imag)
        skip = self.param("D", nn.initializers.normal(1.0), (self.features,))
        return (2.0 if self.conjugate_symmetry else 1.0) * y + skip.astype(self.dtype) * u.astype(self.dtype)

    def _discrete(self, eigenvalues: np.ndarray) -> tuple[Array, Array]:
        """λ̄ and γ."""
        if self.parametrisation == "magnitude_phase":
            sample = Discretisation(self.discretisation, self.least_step, self.most_step, name="discretisation")
            return sample(*MagnitudePhase(tuple(eigenvalues.tolist()), name="A")())
        # A and the gain begin from one draw of steps. Where parameters are given, Flax asks the initial value's shape.
        drawn = (jnp.zeros(eigenvalues.shape, jnp.complex64),) * 2
        if self.is_initializing():
            steps = _log_steps(self.least_step, self.most_step)(self.make_rng("params"), eigenvalues.shape)
            start = jnp.asarray(eigenvalues, jnp.complex64)
            drawn = discretise(self.discretisation, -start.real, start.imag, jnp.exp(steps))
        return Parts(drawn[0], name="A")(), Gain(drawn[1], name="discretisation")()

    def _check(self) -> None:
        for key, allowed in (
            ("discretisation", DISCRETISATIONS),
            ("parametrisation", PARAMETRISATIONS),
            ("recurrence", RECURRENCES),
        ):
            value = getattr(self, key)
            if value not in allowed:
                names = ", ".join(map(repr, allowed))
                raise UsageError(f"{key}={value!r} is not one of {names}.{did_you_mean(value, allowed)}")
        if not 0.0 < self.least_step <= self.most_step:
            raise UsageError(
                f"least_step={self.least_step:g}, most_step={self.most_step:g}: give 0 < least_step <= most_step"
            )


def as_naive(params: Any, method: str = "zoh") -> Any:
    """The parameters of a "naive" `SSM` that computes what `params` of a "magnitude_phase" one do.

    λ̄ and |γ| are taken as they are, and the phase of γ goes into B. For comparing how the two round.

    Args:
      params: of one `SSM` with `conjugate_symmetry`: ``A``, ``discretisation``, ``B_real``, ``B_imag``, ...
      method: its discretisation.
    """
    decay, frequency = jnp.exp(params["A"]["log_decay"]), jnp.exp(params["A"]["log_frequency"])
    transition, gain = discretise(method, decay, frequency, jnp.exp(params["discretisation"]["log_step"]))
    b = lax.complex(params["B_real"]["kernel"], params["B_imag"]["kernel"]) * jnp.exp(1j * jnp.angle(gain))
    return {
        **params,
        "A": {"real": transition.real, "imag": transition.imag},
        "discretisation": {"log_gain": jnp.log(jnp.abs(gain))},
        "B_real": {"kernel": b.real},
        "B_imag": {"kernel": b.imag},
    }
