"""Gradients of the uniform quantizers: straight through, or cut off outside the grid, and none to ranges or bits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference

from qtrain.quantizers import GRIDS, Uniform, straight_through, straight_through_inside

BITS = (1, 2, 3, 4, 8, 16, 23, 24, 32)
SHAPE = (4, 6, 8)
CASES = list(
    itertools.product(
        [("channel", (0, 1)), (3, None)],
        ["nearest", "stochastic"],
        [jnp.float32, jnp.bfloat16],
        [False, True],  # clip_gradient
        [False, True],  # a range from another, narrower tensor
    )
)
KEY = jax.random.key(5)


def normal(seed, scale=1.0, shape=SHAPE):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


X, NARROW, G = normal(0), normal(1, 0.5), normal(2)


@functools.cache
def gradients(grid):
    @jax.jit
    def run(bits):
        results = []
        for (per, axes), rounding, dtype, clip, calibrated in CASES:
            q = Uniform(grid, per=per, rounding=rounding, clip_gradient=clip)
            ranges = q.range(jnp.asarray(NARROW, dtype), axes=axes) if calibrated else None
            call = functools.partial(q, key=KEY, axes=axes)
            _, vjp = jax.vjp(lambda x, b, r, call=call: call(x, b, r), jnp.asarray(X, dtype), bits, ranges)
            results.append(vjp(jnp.asarray(G, dtype)))
        return results

    return run


@pytest.mark.parametrize("grid", GRIDS)
def test_against_reference(grid):
    """g, or with `clip_gradient` g where x lies at most half a step outside the grid; exactly 0 to bits and ranges."""
    for bits in BITS:
        for case, (dx, d_bits, d_ranges) in zip(CASES, gradients(grid)(jnp.float32(bits)), strict=True):
            (per, axes), _, dtype, clip, calibrated = case
            message = f"{grid} {bits} bits {case}"
            g = np.asarray(jnp.asarray(G, dtype), np.float64)
            assert dx.dtype == dtype, message
            assert d_bits == 0.0 and all(np.all(d == 0) for d in jax.tree.leaves(d_ranges)), message
            dx = np.asarray(dx, np.float64)
            if not clip or bits >= 24:
                np.testing.assert_array_equal(dx, g, message)
                continue
            x, narrow = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (X, NARROW))
            scale, offset = reference.steps(x, grid, per, bits, axes, narrow if calibrated else None)
            in_steps = (x - offset) / scale
            low, high = reference.bounds(grid, bits)
            outside = np.maximum(low - in_steps, in_steps - high)
            # The scale is known to the precision of the dtype, of which the edge is allowed twice.
            room = 0.5 + 3 * reference.EPS[dtype.__name__] * (max(abs(low), abs(high)) + 0.5)
            np.testing.assert_array_equal(dx[outside <= 0.5], g[outside <= 0.5], message)
            np.testing.assert_array_equal(dx[outside > room], 0.0, message)
            if not calibrated and grid in ("symmetric", "aqt", "affine") and bits > 1:
                np.testing.assert_array_equal(dx, g, message)  # nothing lies outside a range of its own
            elif dtype == jnp.float32 and bits in (2, 3, 4, 8):
                assert 0 < np.mean(dx == 0) < 1, message
                assert np.mean((outside > 0.5) & (outside <= room)) < 0.01, message


def test_clipped_gradient_keeps_the_largest_element_of_every_group():
    """On AQT's grid max|x| lies exactly half a step outside, wherever the scale happens to be rounded to."""
    x = normal(3, shape=(16, 2048))
    q = Uniform("aqt", clip_gradient=True)
    run = jax.jit(jax.vmap(jax.grad(lambda x, bits: q(x, bits).astype(jnp.float32).sum()), (None, 0)))
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(run(jnp.asarray(x, dtype), jnp.arange(2.0, 9.0)), 1.0)


def test_negative_side_of_unsigned():
    x = jnp.array([-2.0, -0.4, 0.0, 0.6, 3.0])  # a step of 1 at 2 bits
    grad = jax.grad(lambda x, q: q(x, 2).sum())
    np.testing.assert_array_equal(Uniform("unsigned", per="tensor")(x, 2), [0, 0, 0, 1, 3])
    np.testing.assert_array_equal(grad(x, Uniform("unsigned", per="tensor")), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(grad(x, Uniform("unsigned", per="tensor", clip_gradient=True)), [0, 1, 1, 1, 1])


def test_edge_of_a_calibrated_range():
    q = Uniform("symmetric", per="tensor", clip_gradient=True)
    ranges = {"absmax": jnp.array([3.0]), "absmean": jnp.array([1.0])}  # a step of 1 at 3 bits, codes to ±3
    x = jnp.array([-3.6, -3.5, -3.4, 0.0, 3.0, 3.4, 3.5, 3.6])
    grad = jax.grad(lambda x, bits: q(x, bits, ranges).sum())
    np.testing.assert_array_equal(q(x, 3, ranges), [-3, -3, -3, 0, 3, 3, 3, 3])
    np.testing.assert_array_equal(grad(x, 3), [0, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(grad(x, 24), 1)
    # At 1 bit: ±1, half a step beyond is 1.5
    np.testing.assert_array_equal(
        jax.grad(lambda x: q(x, 1, ranges).sum())(jnp.array([-1.6, -1.4, 0.0, 1.4, 1.6])), [0, 1, 1, 1, 0]
    )


@pytest.mark.parametrize("grid", ["symmetric", "aqt", "sign"])
def test_a_nan_outside_the_range_it_is_quantized_with_stays_one(grid):
    """The scale is finite then: a network that has diverged must not look as if it had not."""
    ranges = {"absmax": jnp.array([3.0]), "absmean": jnp.array([1.0])}
    x = jnp.array([jnp.nan, -0.5, 0.0, 2.0])
    for bits in (1, 4):
        y = jax.jit(Uniform(grid))(x, bits, ranges)
        np.testing.assert_array_equal(np.isnan(y), [True, False, False, False])
    np.testing.assert_array_equal(jax.jit(Uniform(grid))(x, 1, ranges)[1:], [-1, 1, 1])


def test_nan_in_the_cotangent_passes():
    g = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    for clip in (False, True):
        _, vjp = jax.vjp(lambda x, clip=clip: Uniform(clip_gradient=clip)(x, 4), jnp.ones((2, 2)))
        np.testing.assert_array_equal(vjp(g)[0], g)


def test_straight_through():
    x, y, inside = jnp.array([1.0, 2.0, 3.0]), jnp.array([7.0, 8.0, 9.0]), jnp.array([True, False, True])
    for function, args, expected in [
        (straight_through, (), [3.0, 3.0, 3.0]),
        (straight_through_inside, (inside,), [3.0, 0.0, 3.0]),
    ]:
        out, vjp = jax.vjp(lambda x, y, function=function, args=args: function(x, y, *args), x, y)
        np.testing.assert_array_equal(out, y)
        dx, dy = vjp(jnp.full(3, 3.0))
        np.testing.assert_array_equal(dx, expected)
        np.testing.assert_array_equal(dy, 0.0)


def test_second_derivatives_in_both_modes():
    """∂/∂x of Q(x)³ is 3 Q(x)² by the straight-through rule, and its derivative 6 Q(x); cut off outside the grid."""
    x = jnp.array([0.3, -0.9, 1.0, -7.0])
    for clip, inside in [(False, jnp.ones(4)), (True, jnp.array([1.0, 1.0, 1.0, 0.0]))]:
        q = Uniform(per="tensor", clip_gradient=clip)
        ranges = q.range(x[:3])
        x_q = q(x, 4, ranges)
        first = jax.grad(lambda x, q=q, ranges=ranges: (q(x, 4, ranges) ** 3).sum())
        np.testing.assert_allclose(first(x), 3 * x_q**2 * inside, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(lambda x, first=first: first(x).sum())(x), 6 * x_q * inside, rtol=1e-6)
        product = jax.jvp(first, (x,), (jnp.ones(4),))[1]
        np.testing.assert_allclose(product, 6 * x_q * inside, rtol=1e-6)
