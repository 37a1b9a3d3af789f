"""The running total loses nothing where a float32 does, under jit, in loops and step by step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.cost import accumulate

COUNT = 1_000_000


def increments(count):
    """Whole numbers below 2¹⁵, irregular, each exact in float32."""
    return (np.arange(count, dtype=np.int64) * 7919 + 13) % 32749 + 1


@pytest.mark.parametrize("start", [0, 1 << 24, 1 << 40])
def test_a_million_increments_are_exact(start):
    numbers = increments(COUNT)
    exact = start + int(numbers.sum())

    @jax.jit
    def run(total, plain, x):
        def step(carry, x):
            total, plain = carry
            return (accumulate.add(total, x), plain + x), None

        return jax.lax.scan(step, (total, plain), x)[0]

    total = accumulate.add(accumulate.zero(), float(start))
    total, plain = run(total, jnp.float32(start), jnp.asarray(numbers, jnp.float32))
    assert accumulate.value(total) == exact
    assert abs(float(plain) - exact) > 1e-7 * exact  # one float32 would have failed


def test_one_jitted_donated_step_at_a_time():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(total, bits):
        # As in a train step: the increment is a product, which a compiler may fuse into the additions.
        increment = 1.23456e12 * bits * bits + 3e11 * bits
        return accumulate.add(total, increment), increment

    total, increments = accumulate.zero(), []
    for i in range(2000):
        total, increment = step(total, np.float32(3 + i % 6))
        increments.append(float(increment))
    assert accumulate.value(total) == pytest.approx(math.fsum(increments), rel=1e-12)
    plain = np.cumsum(np.array(increments, np.float32), dtype=np.float32)[-1]
    assert float(plain) != pytest.approx(math.fsum(increments), rel=1e-12)


def test_products_fused_into_the_sum_keep_their_low_parts():
    """Tiny products beside a huge total: fused multiply-adds must not disturb the error term."""

    @jax.jit
    def run(scale):
        return jax.lax.fori_loop(
            0,
            100_000,
            lambda i, total: accumulate.add(total, scale * (1 + i % 7)),
            accumulate.Total(jnp.float32(2.0**50), jnp.float32(0)),
        )

    total = accumulate.value(run(jnp.float32(1.0))) - 2.0**50
    assert total == sum(1 + i % 7 for i in range(100_000))


def test_the_pair_stays_normalized():
    def step(total, x):
        total = accumulate.add(total, x)
        return total, total

    _, totals = jax.jit(lambda x: jax.lax.scan(step, accumulate.zero(), x))(jnp.asarray(increments(5000), jnp.float32))
    assert np.all(np.abs(totals.low) <= np.spacing(np.asarray(totals.high)) / 2)


def test_vmap_and_shape():
    totals = accumulate.zero((3,))
    totals = jax.jit(jax.vmap(accumulate.add))(totals, jnp.array([1.0, 2.0, 3.0]))
    totals = jax.jit(accumulate.add)(totals, 2.0**30)
    np.testing.assert_array_equal(accumulate.value(totals), np.array([1.0, 2.0, 3.0]) + 2.0**30)
    assert isinstance(accumulate.value(accumulate.zero()), float)
    assert len(jax.tree.leaves(totals)) == 2
