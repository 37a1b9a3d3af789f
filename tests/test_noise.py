"""Noise of stochastic rounding: its distribution, its independence, and what rounding makes of it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference

from qtrain.quantizers import GRIDS, Uniform, noise

COUNT = 1 << 18


def words(number):
    return noise.seed(jax.random.key(number))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5), (0, 3)])
def test_equals_a_numpy_hash_of_the_index(shape):
    seed = words(11)
    salt = np.random.default_rng(0).standard_normal((*shape[:-1], 1) if shape else ()).astype(np.float32)
    for given in (None, salt):
        u = noise.uniform(seed, shape, None if given is None else jnp.asarray(given))
        assert u.dtype == jnp.float32 and u.shape == shape
        np.testing.assert_array_equal(u, reference.hashed_uniform(np.asarray(seed), shape, given))


def draws():
    """Streams that must be uniform, and unrelated to one another."""
    n = (COUNT,)
    yield from ((f"key {i}", noise.uniform(words(i), n)) for i in (0, 1))
    # Raw words, as an older PRNGKey(0), PRNGKey(1) would be: they differ in one bit of one word.
    yield from ((f"words {i} {j}", noise.uniform(jnp.array([i, j], jnp.uint32), n)) for i in (0, 1) for j in (0, 1))
    yield from ((f"fold {data!r}", noise.uniform(noise.fold(words(0), data), n)) for data in (0, 1, 2, "a/b", "a/c"))
    # Scales as they follow one another in a scanned layer, some of them nearly equal.
    salts = (1.0, 1.0001, 2.0, 1.5)
    yield from ((f"salt {salt!r}", noise.uniform(words(0), n, jnp.float32(salt))) for salt in salts)


def test_uniform_and_uncorrelated():
    streams = {name: np.asarray(u, np.float64) for name, u in draws()}
    for name, u in streams.items():
        assert u.min() >= 0.0 and u.max() < 1.0, name
        assert np.all(u * 2**24 == np.rint(u * 2**24)), name
        for bins, values in [(256, u), (256, (u * 256) % 1)]:  # its highest bits, and those below
            counts = np.bincount((values * bins).astype(int), minlength=bins)
            chi_square = np.sum((counts - COUNT / bins) ** 2) / (COUNT / bins)
            # χ² with 255 degrees of freedom: mean 255, standard deviation 22.6.
            assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6, (name, chi_square)
        for lag in (1, 2, 3, 8, 64, 1000, 1024):
            correlation = 12 * np.mean((u[lag:] - 0.5) * (u[:-lag] - 0.5))
            assert abs(correlation) < 5 / np.sqrt(COUNT), (name, lag, correlation)
        # Pairs of neighbours fill the square evenly: 32 × 32 cells, χ² with 1023 degrees of freedom.
        cells = np.bincount((u[::2] * 32).astype(int) * 32 + (u[1::2] * 32).astype(int), minlength=1024)
        chi_square = np.sum((cells - COUNT / 2048) ** 2) / (COUNT / 2048)
        assert abs(chi_square - 1023) < 5 * 45.2, (name, chi_square)
    names = list(streams)
    for i, a in enumerate(names):
        for b in names[:i]:
            # Also a rotation, v = u + c mod 1, would be no independence: compare sines as well as values.
            u, v = streams[a], streams[b]
            turned = np.abs(np.mean(np.exp(2j * np.pi * (u - v))))
            assert abs(12 * np.mean((u - 0.5) * (v - 0.5))) < 5 / np.sqrt(COUNT), (a, b)
            assert turned < 5 / np.sqrt(COUNT), (a, b)


def test_fold_is_deterministic_and_tells_data_apart():
    seed = words(0)
    np.testing.assert_array_equal(noise.fold(seed, "Dense_0"), noise.fold(seed, "Dense_0"))
    folded = [noise.fold(seed, data) for data in (*range(-3, 50), "Dense_0", "Dense_1", "Dense_0/bias")]
    folded += [noise.fold(noise.fold(seed, "Dense_0"), role) for role in range(3)]
    assert len({np.asarray(f).tobytes() for f in folded}) == len(folded)
    assert all(f.dtype == jnp.uint32 and f.shape == (2,) for f in folded)
    # Both words change, so that noise of two layers does not start from one counter.
    assert np.all(np.asarray(folded[0]) != np.asarray(folded[1]))


def test_seed_of_every_kind_of_key():
    for key in (jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(1, impl="rbg")):
        assert noise.seed(key).shape == (2,) and noise.seed(key).dtype == jnp.uint32
    np.testing.assert_array_equal(noise.seed(jax.random.key(1)), noise.seed(jax.random.PRNGKey(1)))


X = np.random.default_rng(4).standard_normal((6, 8)).astype(np.float32)
KEYS = 4096


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "sign"])
def test_stochastic_rounding_is_unbiased_and_takes_neighbours_only(grid):
    x = np.abs(X) if grid == "unsigned" else X
    q = Uniform(grid, per="column", rounding="stochastic")

    @jax.jit
    def run(bits):
        seeds = jax.vmap(noise.seed)(jax.random.split(jax.random.key(1), KEYS))
        return jax.vmap(lambda seed: q.encode(x, bits, key=seed)[0])(seeds)

    for bits in (2, 4, 8, 16):
        drawn = np.asarray(run(jnp.float32(bits)), np.float64)
        scale, offset = reference.steps(x, grid, "column", bits)
        in_steps = (x - offset) / scale
        low, high = reference.bounds(grid, bits)
        error = np.abs(in_steps) * 2.0**-22
        assert np.all(drawn >= np.clip(np.floor(in_steps - error), low, high))
        assert np.all(drawn <= np.clip(np.ceil(in_steps + error), low, high))
        inside = np.abs(in_steps) <= high  # AQT's end lies half a step below the maximum
        fraction = in_steps - np.floor(in_steps)
        deviation = np.sqrt(fraction * (1 - fraction) / KEYS)
        bias = np.abs(drawn.mean(0) - in_steps)
        assert np.all(bias[inside] <= (4.5 * deviation + 1 / KEYS + error)[inside])
        assert np.mean(drawn.std(0) > 0) > 0.5  # it does vary


def test_no_bias_on_grid_points_at_many_bits():
    """⌊x/s + u⌋ would lift a thousandth of the codes of 16 bits, as the sum is rounded."""
    for bits in (12, 16, 20):
        top = 2.0 ** (bits - 1) - 1
        x = jnp.concatenate([jnp.full(100_000, top - 1), jnp.array([top])])
        codes, _ = Uniform(per="tensor", rounding="stochastic").encode(x, bits, key=jax.random.key(0))
        np.testing.assert_array_equal(codes, x)


def test_deterministic_for_a_key_and_different_for_others():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)
    q = Uniform(rounding="stochastic")
    run = jax.jit(lambda key: q(x, 3, key=key))
    first, other = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    np.testing.assert_array_equal(first, run(noise.seed(jax.random.key(0))))  # a key is as good as its seed
    assert 0.1 < np.mean(first != other) < 0.9
    layers = [run(noise.fold(noise.seed(jax.random.key(0)), path)) for path in ("Dense_0", "Dense_1")]
    assert np.mean(layers[0] != layers[1]) > 0.1
    # One seed and two scales, as in the iterations of a scanned layer: rounded apart.
    codes = [q.encode(x * factor, 3, key=jax.random.key(0))[0] for factor in (1.0, 1.001)]
    assert np.mean(codes[0] != codes[1]) > 0.1


def test_the_last_bits_of_a_scale_do_not_change_the_noise():
    """Else a sum in another order, on more devices, would round every element anew."""
    salt = np.float32(0.7)
    other = np.nextafter(salt, np.float32(1))
    u, v = (noise.uniform(words(0), (100,), jnp.float32(s)) for s in (salt, other))
    np.testing.assert_array_equal(u, v)


def test_only_stochastic_rounding_reads_the_key():
    x = jnp.asarray(X)
    for rounding in ("nearest", "floor"):
        q = Uniform(rounding=rounding)
        np.testing.assert_array_equal(q(x, 3, key=jax.random.key(0)), q(x, 3))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from qtrain.quantizers import Dot, Operands, Traced, Uniform, contract, noise
assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x, w, y = (np.random.default_rng(i).standard_normal((64, n)).astype(np.float32) for i, n in enumerate((32, 32, 64)))
dot = Dot((((1,), (1,)), ((), ())))
for grid in ("symmetric", "affine"):
    q = Uniform(grid, rounding="stochastic")
    operands = Operands(q, q, Uniform(grid, per="tensor", rounding="stochastic"))

    @jax.jit
    def run(x, w, bits):
        seed = noise.seed(jax.random.key(0))
        quantizers = [Uniform(grid, per=per, rounding="stochastic") for per in ("tensor", "row", 4)]
        codes = [quantizer.encode(x, bits, key=seed) for quantizer in quantizers]
        def loss(x, w):  # its cotangent is y, which no order of summation changes
            return jnp.sum(y * contract(dot, operands, x, w, Traced(bits, bits, bits, seed)))
        return codes, jax.grad(loss, (0, 1))(x, w)

    one = run(x, w, jnp.float32(4))
    shard = lambda v, *axes: jax.device_put(v, NamedSharding(mesh, P(*axes)))
    eight = run(shard(x, "data", "model"), shard(w, "model", "data"), jnp.float32(4))
    jax.tree.map(np.testing.assert_array_equal, one[0], eight[0])
    for a, b in zip(one[1], eight[1]):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
print("same")
"""


def test_same_noise_and_scales_on_eight_devices():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr
