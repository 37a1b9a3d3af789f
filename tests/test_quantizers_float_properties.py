"""Small floats: one program for all widths, calibrated ranges, gradients, rounding, what stays as it is, mistakes."""

import doctest
import functools
import importlib

import float_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference
from float_inputs import KEY, SHAPE, normal, tensor
from float_reference import widths
from refusals import refused

from qtrain.quantizers import Float, noise
from qtrain.quantizers.formats import format_of


def test_one_program_for_all_widths_and_all_kinds_of_bits():
    """Python and NumPy numbers, traced int32 and float32, a vector for each column, and vmap over widths."""
    x, q = jnp.asarray(normal((16, 5), 3)), Float("e4m3", per="column")
    given = np.array([5, 6, 7, 8, 24])
    traces = []

    @jax.jit
    def traced(x, bits):
        traces.append(bits)
        return q(x, bits)

    every = np.stack([traced(x, jnp.float32(bits)) for bits in given])
    results = {np.asarray(traced(x, jnp.float32(bits))).tobytes() for bits in range(1, 33)}
    assert len(traces) == 1 and len(results) == 5  # 1 … 5, 6, 7, 8 … 23, 24 and above
    diagonal = np.stack([every[i][:, i] for i in range(5)], axis=1)

    @jax.jit
    def otherwise(x, integers):
        return {
            "static": jnp.stack([q(x, bits) for bits in (7, np.int64(7), np.float32(7), np.array(7), 7.0)]),
            "static_vector": q(x, given),
            "traced_vector": q(x, integers.astype(jnp.float32)),
            "vmap_over_bits": jax.vmap(q, (None, 0))(x, integers),
            "vmap_over_both": jax.vmap(q)(jnp.stack([x] * 5), integers.astype(jnp.float32)),
        }

    results = otherwise(x, jnp.asarray(given))
    np.testing.assert_array_equal(results.pop("static"), np.stack([every[2]] * 5))
    for kind, result in results.items():
        np.testing.assert_array_equal(result, diagonal if "vector" in kind else every, kind)
    for bits in (5, 8, 24):  # and outside jit
        np.testing.assert_array_equal(q(x, jnp.int32(bits)), q(x, bits))
        np.testing.assert_array_equal(q(x, bits), every[list(given).index(bits)])
    np.testing.assert_array_equal(q.decode(*q.encode(x, 8)), q(x, 8))
    assert q(x, 24) is x and q(x, 10**30) is x


@pytest.mark.parametrize("name", ["e4m3fn", "e2m3fn"])
def test_calibrated_range(name):
    """A range from another tensor: the same grid for every tensor, what lies outside goes to its ends."""
    seen, x = tensor(1), 2 * tensor(2)
    for per, axes in [("tensor", None), ("channel", (0, 1)), (3, None)]:
        q = Float(name, per=per)
        ranges = q.range(jnp.asarray(seen), axes=axes)
        assert set(ranges) == {"absmax"} and ranges["absmax"].dtype == jnp.float32
        run = jax.jit(lambda x, bits, q=q, ranges=ranges, axes=axes: q.encode(x, bits, ranges, axes=axes))
        for bits in widths(name):
            codes, scale = run(x, jnp.int32(bits))
            full = reference.expand(scale, SHAPE, per, axes)
            expected_scale = float_reference.scales(x, name, bits, per, axes, calibration=seen)
            np.testing.assert_allclose(full, expected_scale, rtol=2.0**-18)
            expected = float_reference.cast(x / full, name, bits)
            codes = np.asarray(codes, np.float64)
            assert np.mean(codes == expected) > 0.98  # a tie of x/s is not one of x·(1/s)
            assert codes.max() == -codes.min() == float_reference.magnitudes(name, bits)[-1]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn"])
def test_gradients(name):
    """g; with `clip_gradient` 0 where x is more than half a spacing beyond the largest value. None to bits, ranges."""
    cases = [
        (kind, rounding, dtype, clip)
        for kind in ("own", "calibrated", "unscaled")
        for rounding in ("nearest", "stochastic")
        for dtype in (jnp.float32, jnp.bfloat16)
        for clip in (False, True)
    ]
    x, narrow, g = normal(SHAPE, 0), normal(SHAPE, 1, 0.5), normal(SHAPE, 2)
    factor = {"own": 1.0, "calibrated": 1.0, "unscaled": 0.5 * format_of(name).largest}

    @jax.jit
    def run(bits):
        results = []
        for kind, rounding, dtype, clip in cases:
            scaled = kind != "unscaled"
            q = Float(name, "channel" if scaled else "tensor", rounding, scaled=scaled, clip_gradient=clip)
            ranges = q.range(jnp.asarray(narrow, dtype), axes=(0, 1)) if kind == "calibrated" else None
            call = functools.partial(q, key=KEY, axes=(0, 1))
            v = jnp.asarray(x * factor[kind], dtype)
            _, vjp = jax.vjp(lambda v, b, r, call=call: call(v, b, r), v, bits, ranges)
            results.append(vjp(jnp.asarray(g, dtype)))
        return results

    for bits in (*widths(name), 23, 24):
        for case, (dx, d_bits, d_ranges) in zip(cases, run(jnp.float32(bits)), strict=True):
            kind, _, dtype, clip = case
            message = f"{name} {bits} bits {case}"
            given, v = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (g, x * factor[kind]))
            assert dx.dtype == dtype and d_bits == 0.0, message
            assert all(np.all(d == 0) for d in jax.tree.leaves(d_ranges)), message
            dx = np.asarray(dx, np.float64)
            if not clip or bits >= 24 or kind == "own":
                np.testing.assert_array_equal(dx, given, message)
                continue
            source = np.asarray(jnp.asarray(narrow, dtype), np.float64)
            scale = float_reference.scales(v, name, bits, "channel", (0, 1), source) if kind == "calibrated" else 1.0
            largest = float_reference.magnitudes(name, bits)[-1]
            spacing = 2.0 ** (np.floor(np.log2(largest)) - float_reference.mantissa_bits(name, bits))
            beyond = np.abs(v / scale) / (largest + spacing / 2)
            room = 0.0 if kind == "unscaled" else 2.0**-17 if dtype == jnp.float32 else 2.0**-6
            np.testing.assert_array_equal(dx[beyond <= 1 - room], given[beyond <= 1 - room], message)
            np.testing.assert_array_equal(dx[beyond > 1 + room], 0.0, message)
            assert 0 < np.mean(dx == 0) < 1, message


def test_edge_of_the_clipped_gradient():
    x = jnp.array([-500.0, -464.5, -464.0, -448.0, 0.0, 463.0, 465.0, jnp.inf])
    gradient = jax.jit(jax.grad(lambda x, q: q(x, 8).sum()), static_argnums=1)
    unscaled = Float("e4m3", scaled=False, clip_gradient=True)
    np.testing.assert_array_equal(gradient(x, unscaled), [0, 0, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(gradient(x, Float("e4m3", scaled=False)), 1)
    x = jnp.array([-2.0, 1.0, 3.0])
    call = jax.jit(Float("e4m3"), static_argnums=1)
    first = jax.grad(lambda x: (call(x, 6) ** 3).sum())
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: first(x).sum()))(x), 6 * call(x, 6), rtol=1e-6)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_stochastic_rounding_is_unbiased(name):
    """Means over many seeds within 5 standard errors; only the two neighbours appear, and a value stays itself."""
    trials, canonical = 2048, Float(name).format
    form = format_of(name)
    x = np.concatenate([normal(24, 1, 0.3), normal(24, 2, 0.003)]) * np.float32(form.largest)
    x = np.clip(x, -form.largest, form.largest)
    seeds = jax.random.bits(KEY, (trials, 2), jnp.uint32)
    q = Float(name, rounding="stochastic", scaled=False)
    run = jax.jit(lambda bits: jax.vmap(lambda seed: q(x, bits, key=seed))(seeds))
    for bits in (form.width, form.width - form.mantissa):
        rounded = np.asarray(run(jnp.int32(bits)), np.float64)
        inside = np.clip(x, *(s * float_reference.magnitudes(canonical, bits)[-1] for s in (-1, 1))).astype(np.float64)
        lower, _ = float_reference.cast_with_noise(x, canonical, bits, np.ones(x.shape))
        upper, fraction = float_reference.cast_with_noise(x, canonical, bits, np.zeros(x.shape))
        assert np.all((rounded == lower) | (rounded == upper))
        error = (upper - lower) * np.sqrt(fraction * (1 - fraction) / trials)
        assert np.all(np.abs(rounded.mean(0) - inside) <= 5 * error + 1e-6 * np.abs(inside))
        values = jnp.asarray(float_reference.magnitudes(canonical, bits), jnp.float32)
        np.testing.assert_array_equal(q(values, bits, key=KEY), values)
    scaled = Float(name, rounding="stochastic")
    mean = jax.jit(lambda: jax.vmap(lambda seed: scaled(x, form.width, key=seed))(seeds).mean(0))()
    spacing = np.max(np.abs(x)) * 2.0**-form.mantissa
    np.testing.assert_allclose(mean, x, atol=5 * spacing / 2 / np.sqrt(trials))


def test_keys_of_every_sort_are_those_of_uniform():
    q = Float("e4m3", rounding="stochastic")
    run = jax.jit(lambda key: q(tensor(), 8, key=key))
    np.testing.assert_array_equal(run(KEY), run(noise.seed(KEY)))
    np.testing.assert_array_equal(run(KEY), run(KEY))
    assert np.any(run(KEY) != run(jax.random.key(4)))
    assert q.stochastic and not Float().stochastic


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_error_falls_with_every_bit(rounding):
    x = np.random.default_rng(0).uniform(-1, 1, (64, 64)).astype(np.float32)
    for name in ("e3m4", "e4m3", "e5m2"):
        q = Float(name, rounding=rounding)
        run = jax.jit(lambda x, bits, q=q: jnp.sqrt(jnp.mean((q(x, bits, key=KEY) - x) ** 2)))
        errors = np.array([run(x, jnp.float32(bits)) for bits in widths(q.format)])
        assert np.all(errors[1:] < 0.7 * errors[:-1]) and run(x, jnp.float32(24)) == 0.0


def test_powers_of_two_and_signs_pass_through():
    x = normal((5, 12), 7)
    for name in ("e4m3", "e5m2", "e2m1"):
        q = Float(name)
        factors = jnp.array([1.0, 2.0**20, 2.0**-20, -1.0])
        results = jax.jit(jax.vmap(lambda f, q=q: q(x * f, 8) / f))(factors)
        np.testing.assert_array_equal(results, jnp.stack([results[0]] * 4))
        assert np.all(np.diff(np.asarray(results[0]).ravel()[np.argsort(x, axis=None)]) >= 0)


MISTAKES = [
    (lambda: Float("e4m4"), ["format='e4m4'", "'e5m2'", "Did you mean 'e4m3'?"]),
    (lambda: Float(rounding="floor"), ["rounding='floor'", "'stochastic'"]),
    (lambda: Float(rounding="stocastic"), ["Did you mean 'stochastic'?"]),
    (lambda: Float(per="chanel"), ["per='chanel'", "Did you mean 'channel'?"]),
    (lambda: Float(statistics=1.0), ["statistics=1.0", "[0, 1)"]),
    (lambda: Float(per="channel", scaled=False), ["per='channel'", "scaled=False has no scale"]),
    (lambda: Float(statistics=0.9, scaled=False), ["statistics=0.9", "scaled=False has no scale"]),
    (lambda: Float(scaled=False)(jnp.ones(3), 8, {"absmax": jnp.ones(1)}), ["params", "scaled=False"]),
    (lambda: Float("e4m3")(jnp.ones(3), 4), ["bits: 4", "'e4m3fn'", "at least 5", "Uniform"]),
    (lambda: Float("e5m2").encode(jnp.ones(3), 5), ["bits: 5", "'e5m2'", "at least 6"]),
    (lambda: Float("e2m1")(jnp.ones(3), np.array([8, 2, 4])), ["bits: 2", "at least 3"]),
    (lambda: Float()(jnp.ones(3), 6.5), ["bits: 6.5 is not a width"]),
    (lambda: Float()(jnp.ones(3), "8"), ["bits: '8' is not a width"]),
    (lambda: Float().encode(jnp.ones(3), 24), ["bits: 24", "at most 23"]),
    (lambda: Float(rounding="stochastic")(jnp.ones(3), 8), ["stochastic", "key"]),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES, ids=[" ".join(words[:2]) for _, words in MISTAKES])
def test_mistakes_are_named_in_one_line(call, words):
    refused(call, *words)


def test_describe():
    assert Float().describe() == "e4m3fn/tensor"
    assert Float("e5m2", scaled=False).describe() == "e5m2 unscaled"
    q = Float("e5m2", per=[0, 1], rounding="stochastic", clip_gradient=True, statistics=0.9)
    assert q.describe() == "e5m2/(0, 1) stochastic clip_gradient ema=0.9"
    assert q.ema == 0.9 and Float().ema is None and hash(q) == hash(Float(**{**vars(q), "per": (0, 1)}))


@pytest.mark.parametrize("module", ["small_float", "formats", "scales"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"qtrain.quantizers.{module}")).failed == 0
