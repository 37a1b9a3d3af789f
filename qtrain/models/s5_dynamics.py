"""The dynamics of S5, as functions: initial eigenvalues, discretisation, the recurrence as an associative scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.errors import UsageError

# |λ̄| in float32 at most: far enough below 1 that no rounding brings it there, and no sequence is long enough to notice.
_LARGEST = 1.0 - 2.0**-20

Array = jax.Array


def hippo(size: int) -> np.ndarray:
    """The HiPPO-LegS matrix, float64 ``[size, size]``: the state of a memory that keeps Legendre coefficients.

    A_nk = −√(2n+1)·√(2k+1) for n > k, −(n+1) for n = k, 0 above (Gu et al. 2020, arXiv 2008.07669, equation 5).
    """
    root = np.sqrt(2.0 * np.arange(size) + 1.0)
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(size) + 1.0)


def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and orthonormal eigenvectors of HiPPO-N, the normal part of `hippo`.

    HiPPO-N = A + p·pᵀ = −½·I + S with p_n = √(n + ½) and S skew-symmetric, so that Λ = −½ ± i·ω. Real arithmetic on
    the Hermitian −i·S gives real ω (Smith et al. 2023, arXiv 2208.04933, section 3.3 and appendix B.1).

    Returns:
      Eigenvalues complex128 ``[size]`` by rising imaginary part, eigenvectors complex128 ``[size, size]`` as columns.
    """
    p = np.sqrt(np.arange(size) + 0.5)
    normal = hippo(size) + np.outer(p, p)
    skew = (normal - normal.T) / 2.0
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * frequencies, vectors


def initial_eigenvalues(state_size: int, blocks: int, conjugate_symmetry: bool) -> np.ndarray:
    """Λ of `blocks` HiPPO-N matrices on the diagonal, complex128; of each conjugate pair one with `conjugate_symmetry`.

    Returns:
      ``[state_size]``, or ``[state_size / 2]`` with positive imaginary parts.

    Raises:
      UsageError: a `state_size` that is no multiple of `blocks`, or of twice `blocks` with `conjugate_symmetry`.
    """
    unit = 2 * blocks if conjugate_symmetry else blocks
    if blocks < 1 or state_size < 1 or state_size % unit:
        pairs = " with conjugate pairs" if conjugate_symmetry else ""
        raise UsageError(f"state_size={state_size} in blocks={blocks}{pairs}: give a multiple of {max(unit, 1)}")
    eigenvalues, _ = hippo_normal(state_size // blocks)
    if conjugate_symmetry:
        eigenvalues = eigenvalues[state_size // blocks // 2 :]
    return np.tile(eigenvalues, blocks)


def zero_order_hold(eigenvalues: Array, step: Array) -> tuple[Array, Array]:
    """λ̄ = exp(λΔ) and the input's gain γ = (λ̄ − 1)/λ, for inputs that are constant over a step.

    γ is Δ·(e^z − 1)/z with z = λΔ, Δ where z = 0, and e^z − 1 without cancellation: e^z − 1 = expm1(x)·cos y −
    2·sin²(y/2) + i·e^x·sin y. complex64 ``[P]`` each.
    """
    z = eigenvalues * step
    x, y = z.real, z.imag
    transition = lax.complex(jnp.exp(x) * jnp.cos(y), jnp.exp(x) * jnp.sin(y))
    less_one = lax.complex(jnp.expm1(x) * jnp.cos(y) - 2.0 * jnp.sin(0.5 * y) ** 2, jnp.exp(x) * jnp.sin(y))
    zero = z == 0
    return transition, step * jnp.where(zero, 1.0, less_one / jnp.where(zero, 1.0, z))


def bilinear(eigenvalues: Array, step: Array) -> tuple[Array, Array]:
    """λ̄ = (1 + λΔ/2)/(1 − λΔ/2) and the input's gain γ = Δ/(1 − λΔ/2), the trapezoidal rule. complex64 ``[P]`` each."""
    half = 0.5 * eigenvalues * step
    return (1.0 + half) / (1.0 - half), step / (1.0 - half)


def discretise(method: str, decay: Array, frequency: Array, step: Array) -> tuple[Array, Array]:
    """λ̄ and γ of λ = −decay + i·frequency, with |λ̄| < 1 in float32, too, for every decay ≥ 0.

    In exact arithmetic |λ̄| < 1 for each decay > 0. Where float32 would make 1 of it, λ̄ is brought to 1 − 2⁻²⁰, its
    phase kept.
    """
    sample = zero_order_hold if method == "zoh" else bilinear
    transition, gain = sample(lax.complex(-decay, frequency), step)
    square = transition.real**2 + transition.imag**2
    return transition * jnp.where(square > _LARGEST**2, _LARGEST * lax.rsqrt(jnp.maximum(square, 0.5)), 1.0), gain


def parallel_recurrence(transition: Array, inputs: Array, *, reverse: bool = False) -> Array:
    """x_k = λ̄·x_{k−1} + v_k, x_{−1} = 0, for all k at once: O(log L) steps of an associative scan.

    Pairs (a, v) stand for x ↦ a·x + v and compose as (a₂a₁, a₂v₁ + v₂) (Smith et al. 2023, section 2.2).

    Args:
      transition: λ̄, complex64 ``[P]``.
      inputs: v, complex64 ``[B, L, P]``.
      reverse: from the last step to the first.
    """
    factors = jnp.broadcast_to(transition, (1, inputs.shape[1], inputs.shape[2]))

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    return lax.associative_scan(compose, (factors, inputs), reverse=reverse, axis=1)[1]
