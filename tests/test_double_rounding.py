"""Double Rounding against numpy: values, codes, gradients at every width; and integers narrowed by a shift."""

import doctest
import functools
import importlib

import double_rounding_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference

from qtrain.errors import UsageError
from qtrain.quantizers import LSQ, distance_to_transition
from qtrain.quantizers.double_rounding import DoubleRounding, bare_shift, shift

quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE = (6, 8, 5)
rng = np.random.default_rng(0)
X, G = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
VIEWS = [
    ("tensor", None, "float32"),
    ("tensor", None, "bfloat16"),
    ("channel", (0, 1), "float32"),
    (4, (1,), "float32"),
]
HIGHS = (8, 4, 12)


@functools.cache
def program(high):
    """One program for all widths and all views."""
    cases = []
    for per, axes, dtype in VIEWS:
        q = DoubleRounding(high=high, per=per, gradient_scale=per != "channel")
        params = q.init(jnp.asarray(X), axes=axes)
        # Between 1.5 and 3.5 standard deviations: both ends clip at every width.
        size = np.random.default_rng(2).uniform(0.5, 1.1, np.shape(params["scale"]))
        cases.append((q, axes, dtype, {"scale": jnp.asarray(params["scale"] * size, jnp.float32)}))

    @quickly
    def run(bits, gs):
        results = []
        for (q, axes, dtype, params), g in zip(cases, gs, strict=True):
            x = jnp.asarray(X, dtype)
            y, vjp = jax.vjp(lambda x, p, b, q=q, axes=axes: q(x, b, p, axes=axes), x, params, bits)
            codes, scale = q.encode(x, bits, params, axes=axes)
            stored, stored_scale = q.encode_high(x, params, axes=axes)
            results.append(
                {
                    "y": y,
                    "gradients": vjp(g.astype(dtype)),
                    "codes": codes,
                    "encoded": scale,
                    "decoded": q.decode(codes, scale, axes=axes),
                    "high": stored,
                    "high_scale": stored_scale,
                    "narrowed": q.narrowed(stored.astype(jnp.int16), stored_scale, bits),
                    "position": q.position(x, bits, params, axes=axes),
                    "distance": distance_to_transition(q, x, bits, params, axes=axes),
                    "bounds": q.bounds(bits),
                    "transitions": q.transitions(bits),
                    "scale": q.scale(x, bits, params, axes=axes),
                }
            )
        return results

    return cases, run


@pytest.mark.parametrize("high", HIGHS)
def test_against_reference(high):
    cases, run = program(high)
    for bits in sorted({2, 3, high - 1, high}):
        wants, gs = [], []
        for q, axes, dtype, params in cases:
            x = np.asarray(jnp.asarray(X, dtype), np.float64)
            g = np.asarray(jnp.asarray(G, dtype), np.float64)
            groups = quantizer_reference.groups(SHAPE, q.per, axes)
            scales = np.asarray(params["scale"])
            certain = reference.double_rounding(x, g, groups, scales, bits, high, dtype).certain
            assert certain.mean() > 0.95
            wants.append(reference.double_rounding(x, g * certain, groups, scales, bits, high, dtype, q.gradient_scale))
            gs.append(jnp.asarray(g * certain, dtype))
        for (q, _, dtype, params), want, got in zip(cases, wants, run(jnp.float32(bits), gs), strict=True):
            message, sure = f"{q.describe()} {dtype} {bits} bits", want.certain
            eps = quantizer_reference.EPS[dtype]
            assert got["y"].dtype == dtype and got["codes"].dtype == jnp.int32, message
            y = np.asarray(got["y"], np.float64)
            np.testing.assert_array_equal(np.asarray(got["codes"])[sure], want.codes[sure], message)
            np.testing.assert_array_equal(np.asarray(got["high"])[sure], want.high_codes[sure], message)
            np.testing.assert_allclose(y[sure], want.values[sure], rtol=0.5 * eps, err_msg=message)
            np.testing.assert_array_equal(np.asarray(got["decoded"], np.float64), y, message)
            assert not np.signbit(y[y == 0]).any(), message

            # What is stored gives the same codes, by a traced shift and by numpy's.
            codes, scale = got["narrowed"]
            assert codes.dtype == jnp.int16, message
            np.testing.assert_array_equal(codes, got["codes"], message)
            np.testing.assert_array_equal(scale, got["encoded"], message)
            stored = np.asarray(got["high"]).astype(np.int16)
            codes, scale = q.narrowed(stored, np.asarray(got["high_scale"]), bits)
            assert isinstance(codes, np.ndarray) and codes.dtype == np.int16 and scale.dtype == dtype, message
            np.testing.assert_array_equal(codes, got["codes"], message)
            np.testing.assert_array_equal(scale, got["encoded"], message)

            dx, d_params, d_bits = got["gradients"]
            assert dx.dtype == dtype and d_bits == 0.0, message
            np.testing.assert_array_equal(np.asarray(dx, np.float64), want.dx, message)
            assert 0.3 < np.mean(want.dx != 0) < 1.0, message
            assert d_params.keys() == {"scale"} and d_params["scale"].shape == params["scale"].shape, message
            error = np.abs(np.ravel(d_params["scale"]) - want.scale).max()
            # float32's error of u is as large as its code.
            assert error <= 1e-4 * max(np.abs(want.scale).max(), 1e-2 * 2.0**high), message

            low, top = (float(bound) for bound in got["bounds"])
            assert (low, top) == reference.ends(bits) == (want.codes.min(), want.codes.max()), message
            first, last = (float(point) for point in got["transitions"])
            assert (first, last) == (low + 0.5, top - 0.5)
            position = np.asarray(got["position"], np.float64)
            levels = np.rint(np.clip(position, low, top))
            np.testing.assert_array_equal(levels[sure], want.codes[sure], message)
            nearest = np.abs(position - np.clip(np.floor(position) + 0.5, first, last))
            np.testing.assert_allclose(got["distance"], nearest, rtol=1e-5, atol=1e-4, err_msg=message)
            each = np.broadcast_to(np.asarray(got["encoded"], np.float32), got["scale"].shape)
            np.testing.assert_array_equal(got["scale"], each, message)
    assert run._cache_size() == 1


def test_the_highest_width_is_lsq():
    x, g = jnp.asarray(X), jnp.asarray(G)
    q, plain = DoubleRounding(high=5), LSQ(across_bits="keep")
    params = {"scale": jnp.float32(0.13)}

    def both(quantizer):
        return quickly(lambda b: jax.vjp(lambda x, p: quantizer(x, b, p), x, params)[1](g))(jnp.int32(5))

    jax.tree.map(np.testing.assert_array_equal, both(q), both(plain))
    np.testing.assert_array_equal(q(x, 5, params), plain(x, 5, params))


def test_position_is_a_half_integer_where_a_code_changes():
    """For weights that step through the grid, every change of a code lies between positions around a half-integer."""
    q, params = DoubleRounding(high=6), {"scale": jnp.float32(1.0)}
    x = jnp.arange(-48.0, 48.0, 0.0625)
    for bits in (2, 3, 5, 6):
        position = np.asarray(q.position(x, bits, params))
        codes = np.asarray(q.encode(x, bits, params)[0])
        assert np.all(np.diff(position) > 0)
        changes = np.flatnonzero(np.diff(codes))
        assert len(changes) == 2**bits - 1
        midway = np.floor(position[changes + 1] + 0.5) - 0.5
        assert np.all((position[changes] <= midway) & (midway <= position[changes + 1]))
        assert np.all(midway == (codes[changes] + codes[changes + 1]) / 2)
        np.testing.assert_allclose(np.diff(position)[[0, -1]], 0.0625 / 2 ** (6 - bits), rtol=1e-4)


@pytest.mark.parametrize(("high", "dtype"), [(8, np.int8), (8, np.int16), (5, np.int8), (12, np.int16), (16, np.int32)])
def test_shift_is_rint_for_every_code(high, dtype):
    codes = np.arange(*reference.ends(high), dtype=dtype)
    codes = np.append(codes, dtype(2 ** (high - 1) - 1))
    assert len(codes) == 2**high
    traced = quickly(lambda delta: shift(jnp.asarray(codes), delta, high))
    for delta in range(high):
        want = np.clip(np.rint(codes / 2.0**delta), *reference.ends(high - delta))
        found = shift(codes, delta, high)
        assert isinstance(found, np.ndarray) and found.dtype == dtype
        np.testing.assert_array_equal(found, want, f"Δ = {delta}")
        other = traced(jnp.int32(delta))
        assert other.dtype == dtype
        np.testing.assert_array_equal(other, want, f"Δ = {delta}, traced")
        floor = bare_shift(codes, delta, high)
        assert floor.dtype == dtype
        np.testing.assert_array_equal(floor, np.floor(codes / 2.0**delta))
        if 1 <= delta <= high - 2:
            # What is above a tie, every second tie, and not what clips.
            assert np.mean(floor != want) == 0.5 - 2.0 ** -(delta + 1) - 2.0 ** (delta - high - 1)
    assert traced._cache_size() == 1
    np.testing.assert_array_equal(
        shift(codes[:3], np.array([0, 1, 2]), high), [shift(codes[i : i + 1], i, high)[0] for i in range(3)]
    )


def test_a_shift_makes_no_wider_copy():
    text = jax.jit(lambda q, d: shift(q, d)).lower(jnp.zeros(1000, jnp.int8), jnp.int32(2)).as_text()
    assert "tensor<1000xi8>" in text
    assert "1000xf32" not in text and "1000xi32" not in text and "1000xi16" not in text


def test_widths_mapped_concrete_vector_and_beyond_the_ends():
    q, x, g = DoubleRounding(high=6), jnp.asarray(X), jnp.asarray(G)
    params = q.init(x)

    def both(bits):
        y, vjp = jax.vjp(lambda x, p: q(x, bits, p), x, params)
        return y, vjp(g)

    widths = (1, 2, 4, 6, 8, 24, 32)
    many = quickly(jax.vmap(both))(jnp.array(widths))
    traced = quickly(both)
    found = {bits: traced(jnp.int32(bits)) for bits in widths}
    for index, bits in enumerate(widths):
        np.testing.assert_array_equal(many[0][index], found[bits][0])
        np.testing.assert_array_equal(many[1][0][index], found[bits][1][0])
        np.testing.assert_allclose(many[1][1]["scale"][index], found[bits][1][1]["scale"], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found[1], found[2])
    jax.tree.map(np.testing.assert_array_equal, found[8], found[6])
    for bits in (24, 32):
        y, (dx, d_params) = found[bits]
        np.testing.assert_array_equal(y, X)
        np.testing.assert_array_equal(dx, G)
        assert d_params["scale"] == 0
    assert traced._cache_size() == 1
    np.testing.assert_array_equal(quickly(lambda: q(x, 4, params))(), found[4][0])
    np.testing.assert_array_equal(quickly(lambda: q(x, jnp.full((1, 1, 1), 4), params))(), found[4][0])
    assert q(X, 24) is X  # no parameters needed

    per_slice = DoubleRounding(high=6, per=(0,))
    own = per_slice.init(x)
    mixed = quickly(lambda b: per_slice(x, b, own))(jnp.array([2, 3, 4, 5, 6, 24]).reshape(6, 1, 1))
    for index, bits in enumerate((2, 3, 4, 5, 6, 24)):
        np.testing.assert_array_equal(mixed[index], quickly(lambda b: per_slice(x, b, own))(jnp.int32(bits))[index])


def test_initial_scale_and_degenerate_tensors():
    q = DoubleRounding()
    np.testing.assert_allclose(q.init(jnp.asarray(X))["scale"], 3 * X.std() / 128, rtol=1e-5)
    np.testing.assert_array_equal(q.init(jnp.asarray(X), 2)["scale"], q.init(jnp.asarray(X), 24)["scale"])
    two_bits = np.asarray(q.encode(jnp.asarray(X), 2, q.init(jnp.asarray(X)))[0])
    assert 0.05 < np.mean(two_bits != 0) < 0.6  # LSQ's initial scale at 8 bits leaves nothing at 2

    @quickly
    def run(x, bits, scale):
        y, vjp = jax.vjp(lambda x, s: q(x, bits, {"scale": s}), x, scale)
        return y, vjp(jnp.ones_like(y))

    for dtype in ("float32", "bfloat16"):
        zeros = jnp.zeros((4, 3), dtype)
        for x, value in ((zeros + value, value) for value in (0.0, 0.5, -0.5, 1e-38, -1e36)):
            params = q.init(x)
            assert np.isfinite(params["scale"]) and params["scale"] > 0
            for bits in (2, 8):
                y, (dx, ds) = run(x, jnp.int32(bits), params["scale"])
                assert y.dtype == dtype and np.all(np.isfinite(np.asarray(dx, np.float32))) and np.isfinite(ds)
                step = float(params["scale"]) * 2 ** (8 - bits)
                np.testing.assert_allclose(np.asarray(y, np.float32), value, atol=step)
        for scale in (0.0, -1.0):  # acts as the smallest, and can come back
            y, (dx, ds) = run(zeros + 0.5, jnp.int32(2), jnp.float32(scale))
            assert np.all(np.asarray(y, np.float32) >= 0) and np.all(np.asarray(dx, np.float32) == 0) and ds > 0
    assert np.isnan(q(jnp.array([np.nan, 1.0]), 4, {"scale": jnp.float32(0.1)})[0])
    assert q(jnp.zeros((0, 3)), 4, q.init(jnp.zeros((0, 3)))).shape == (0, 3)


def test_mistakes():
    q, params, x = DoubleRounding(high=6), {"scale": jnp.float32(0.1)}, jnp.asarray(X)
    for bits in (1, 7, 23):
        for call in (
            lambda b: q(x, b, params),
            lambda b: q.encode(x, b, params),
            lambda b: q.position(x, b, params),
            lambda b: q.narrowed(np.zeros(3, np.int8), np.float32(1), b),
            lambda b: q(x, np.array([4, b]).reshape(2, 1, 1), params),
        ):
            with pytest.raises(UsageError, match=f"bits: {bits} is none of 2 … 6") as error:
                call(bits)
            assert "\n" not in str(error.value)
    for call in (q.encode, q.position):
        with pytest.raises(UsageError, match="no integer codes; give at most 6"):
            call(x, 24, params)
    with pytest.raises(UsageError, match="bits: 24 is none of"):
        q.narrowed(np.zeros(3, np.int8), np.float32(1), 24)
    with pytest.raises(UsageError, match="needs its parameter 'scale'"):
        q(x, 4)
    for fields, message in (
        ({"high": 1}, "high=1: give"),
        ({"high": 24}, "high=24: give"),
        ({"high": True}, "high=True: give"),
        ({"high": 8.0}, "high=8.0: give"),
        ({"per": "chanel"}, "Did you mean"),
        ({"gradient_scale": "no"}, "gradient_scale='no': give True or False"),
    ):
        with pytest.raises(UsageError, match=message):
            DoubleRounding(**fields)
    codes = np.zeros(3, np.int8)
    for arguments, message in (
        ((codes.astype(np.float32), 1), "dtype float32"),
        ((codes.astype(np.uint8), 1), "dtype uint8"),
        ((codes, 1, 9), "high=9: int8"),
        ((codes, 8), "delta=8: codes of 8 bits can be shifted by 0 … 7"),
        ((codes, -1), "delta=-1"),
    ):
        for function in (shift, bare_shift):
            with pytest.raises(UsageError, match=message):
                function(*arguments)


def test_examples():
    assert doctest.testmod(importlib.import_module("qtrain.quantizers.double_rounding")).failed == 0
