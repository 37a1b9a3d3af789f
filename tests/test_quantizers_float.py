"""Small floats: bit for bit the casts of ml_dtypes, a search over the values of every width, scales, odd tensors."""

import functools

import float_reference
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantizer_reference as reference
from float_inputs import KEY, SHAPE, normal, tensor
from float_reference import TYPES, widths

from qtrain.quantizers import FORMATS, Float, noise
from qtrain.quantizers.formats import format_of

ALIASES = {"e4m3": "e4m3fn", "e3m2": "e3m2fn", "e2m3": "e2m3fn", "e2m1": "e2m1fn"}
LARGEST = float(np.finfo(np.float32).max)


def same_bits(a, b, message=""):
    """Equal as bit patterns, so that −0 is not 0; any NaN equals any other."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_array_equal(a, b, message)
    np.testing.assert_array_equal(np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b), message)


@functools.cache
def hard_inputs(name):
    """Every value at every width, every midpoint, their float32 neighbours, and magnitudes of every kind."""
    points = []
    for bits in widths(name):
        values = float_reference.magnitudes(name, bits)
        step = values[-1] - values[-2]
        points += [values, (values[1:] + values[:-1]) / 2, values[-1] + step * np.array([0.25, 0.5, 0.75, 1, 2])]
    points = np.unique(np.concatenate(points)).astype(np.float32)
    rng = np.random.default_rng(0)
    largest, smallest = points[-1], points[1]
    points = np.concatenate(
        [
            points,
            np.nextafter(points, np.float32(np.inf)),
            np.nextafter(points[1:], np.float32(0)),
            largest * rng.random(2000, np.float32),
            smallest * 8 * rng.random(500, np.float32),
            np.exp(rng.uniform(-87, 88, 2000)).astype(np.float32),
            np.array([1e-45, 1e-40, 1.17e-38, 1e30, LARGEST, np.inf], np.float32),
        ]
    )
    return np.concatenate([points, -points, [np.float32(np.nan)]])


@functools.cache
def unscaled(name):
    q = Float(name, scaled=False)
    return jax.jit(q), jax.jit(q.encode), jax.jit(q.decode)


@pytest.mark.parametrize("name", TYPES)
def test_the_full_width_is_the_ml_dtypes_cast_bit_for_bit(name):
    """But for saturation: NaN stays NaN, what is infinite or too large becomes the largest value."""
    x, info = hard_inputs(name), ml_dtypes.finfo(TYPES[name])
    cast = np.clip(x, float(info.min), float(info.max)).astype(TYPES[name])
    expected = np.where(np.isnan(x), np.nan, cast.astype(np.float32))
    call, encode, decode = unscaled(name)
    for bits in (info.bits, info.bits + 1, 23):
        same_bits(call(x, jnp.int32(bits)), expected)
    codes, scale = encode(x, jnp.int32(info.bits))
    if info.bits == 8:
        assert codes.dtype == TYPES[name]
        np.testing.assert_array_equal(np.asarray(codes)[:-1].view(np.uint8), cast[:-1].view(np.uint8))
    else:
        assert codes.dtype == jnp.float32
        same_bits(codes, expected)
    same_bits(decode(codes, scale), expected)
    bfloat16 = jnp.asarray(x).astype(jnp.bfloat16)
    x = np.asarray(bfloat16, np.float32)
    cast = np.clip(x, float(info.min), float(info.max)).astype(TYPES[name]).astype(np.float32)
    y = Float(name, scaled=False)(bfloat16, info.bits)
    assert y.dtype == jnp.bfloat16
    same_bits(y, np.where(np.isnan(x), np.nan, cast))


@pytest.mark.parametrize("name", TYPES)
def test_every_width_against_a_search(name):
    """One program for all of them; a width has the values of the next, less every other one in a binade."""
    x = hard_inputs(name)
    call, encode, decode = unscaled(name)
    values = {}
    for bits in widths(name):
        expected = float_reference.cast(x, name, bits)
        if not format_of(name).signed_zero:
            expected = np.where(expected == 0, 0.0, expected)
        y = call(x, jnp.float32(bits))
        same_bits(y, expected, f"{name} {bits} bits")
        codes, scale = encode(x, jnp.int32(bits))
        same_bits(decode(codes, scale), y)
        values[bits] = {float(v) for v in np.unique(np.abs(y[:-1]))}
        assert values[bits] == set(float_reference.magnitudes(name, bits))
    assert all(values[bits] < values[bits + 1] for bits in values if bits + 1 in values)
    least = min(values)
    same_bits(call(x, jnp.float32(least - 1)), call(x, jnp.float32(least)))  # traced: no error to give
    same_bits(call(x, jnp.float32(24)), x)
    assert call._cache_size() <= 2  # for float32 bits, and for int32 bits in the test above


def test_formats():
    """Largest values as the formats' papers have them, and that every name is known."""
    largest = {"e4m3": 448, "e5m2": 57344, "e4m3fnuz": 240, "e3m4": 15.5, "e3m2": 28, "e2m3": 7.5, "e2m1": 6}
    for name, value in largest.items():
        assert Float(name, scaled=False)(jnp.float32(1e9), 8) == value
    assert set(FORMATS) == {*TYPES, *ALIASES}
    for name, canonical in ALIASES.items():
        assert Float(name) == Float(canonical) and hash(Float(name)) == hash(Float(canonical))
        assert format_of(name) == format_of(canonical)


CASES = [  # per, contracted axes, rounding, dtype
    ("tensor", None, "nearest", jnp.float32),
    ("tensor", None, "stochastic", jnp.bfloat16),
    ("channel", (0, 1), "nearest", jnp.bfloat16),
    ("channel", (0, 1), "stochastic", jnp.float32),
    ("channel", (2,), "nearest", jnp.float32),
    ("row", None, "nearest", jnp.float32),
    ((0, -1), None, "nearest", jnp.float32),
    (3, None, "nearest", jnp.float32),
    (4, (0, -1), "stochastic", jnp.float32),
    (3, None, "nearest", jnp.bfloat16),
]
SCALED = ("e4m3fn", "e5m2", "e3m4", "e2m1fn")


@functools.cache
def compiled(name):
    """Call, encode, decode, and the call on what was called, for all of CASES; call and encode twice with a range."""

    def each(x):
        for per, axes, rounding, dtype in CASES:
            yield Float(name, per=per, rounding=rounding), jnp.asarray(x, dtype), {"key": KEY, "axes": axes}

    def call(x, bits):
        return [q(v, bits, **kwargs) for q, v, kwargs in each(x)]

    def encode(x, bits):
        return [q.encode(v, bits, **kwargs) for q, v, kwargs in each(x)]

    def decode(encoded):
        return [q.decode(*e, axes=k["axes"]) for (q, _, k), e in zip(each(tensor()), encoded, strict=True)]

    def again(values, bits):
        return [q(v, bits, **k) for (q, _, k), v in zip(each(tensor()), values, strict=True)]

    return [jax.jit(function) for function in (call, encode, decode, again)]


def name_of(case):
    per, axes, rounding, dtype = case
    return f"per={per} contracted={axes} {rounding} {dtype.__name__}"


@pytest.mark.parametrize("name", SCALED)
def test_scaled_against_float64_reference(name):
    """Scale to its own precision; codes exactly, except within float32's error in x/s of where rounding turns over."""
    words = np.asarray(noise.seed(KEY))
    call, encode, decode, _ = compiled(name)
    for bits in widths(name):
        quantized, encoded = call(tensor(), jnp.float32(bits)), encode(tensor(), jnp.float32(bits))
        for case, x_q, (codes, scale), again in zip(CASES, quantized, encoded, decode(encoded), strict=True):
            per, axes, rounding, dtype = case
            message = f"{name} {bits} bits {name_of(case)}"
            x = np.asarray(jnp.asarray(tensor(), dtype), np.float64)
            assert scale.dtype == dtype and x_q.dtype == dtype and x_q.shape == SHAPE, message
            full = reference.expand(scale, SHAPE, per, axes)
            precision = 2.0**-18 if dtype == jnp.float32 else 2.0**-7
            np.testing.assert_allclose(
                full, float_reference.scales(x, name, bits, per, axes), rtol=precision, err_msg=message
            )
            y = x / full
            error = np.abs(y) * 1.5 * 2.0**-23
            codes = np.asarray(codes, np.float64)
            if rounding == "nearest":
                expected = float_reference.cast(y, name, bits)
                certain = float_reference.cast(y - error, name, bits) == float_reference.cast(y + error, name, bits)
            else:
                shape = reference.blocked(SHAPE, per, axes)
                u = reference.hashed_uniform(words, shape, np.asarray(scale, np.float32)).reshape(SHAPE)
                expected, lower, upper = (
                    float_reference.cast_with_noise(v, name, bits, u)[0] for v in (y, y - error, y + error)
                )
                certain = lower == upper
            np.testing.assert_array_equal(codes[certain], expected[certain], message)
            assert certain.mean() > 0.8, message
            assert set(np.abs(codes).ravel()) <= set(float_reference.magnitudes(name, bits)), message
            same_bits(again, x_q, message)
            rounded = np.asarray(jnp.asarray(codes * full, jnp.float32).astype(dtype), np.float64)
            np.testing.assert_array_equal(np.asarray(x_q, np.float64), rounded, message)


@pytest.mark.parametrize("name", SCALED)
def test_quantizing_twice_is_quantizing_once(name):
    """Exactly: the scale of what was quantized is the scale it was quantized with."""
    call, encode, _, again = compiled(name)
    for bits in widths(name):
        for seed in range(4):
            x = tensor(seed) * np.float32(1 + 0.3 * seed)
            once, encoded = call(x, jnp.float32(bits)), encode(x, jnp.float32(bits))
            for case, y, twice, (_, scale) in zip(CASES, once, again(once, jnp.float32(bits)), encoded, strict=True):
                if case[2] == "nearest":
                    same_bits(y, twice, f"{name} {bits} bits {name_of(case)}")
                    y = np.asarray(y, np.float64).ravel()
                    expected = np.asarray(x, np.float64).ravel()
                    for group in reference.groups(SHAPE, case[0], case[1]):
                        np.testing.assert_allclose(
                            np.abs(y[group]).max(),
                            np.abs(expected[group]).max(),
                            rtol=2.0**-18 if case[3] == jnp.float32 else 2.0**-6,
                        )
                assert np.all(np.asarray(scale, np.float64) > 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantizing_twice_whatever_the_scale(dtype):
    """A row a magnitude, over two binades of them: the scale settles for each."""
    largest = np.exp2(np.random.default_rng(0).uniform(-1, 1, (4096, 1)))
    x = jnp.asarray(np.concatenate([largest, largest * np.random.default_rng(1).uniform(-1, 1, (4096, 7))], 1), dtype)
    for name in SCALED:
        run = jax.jit(Float(name, per="row"))
        for bits in widths(name):
            once = run(x, jnp.int32(bits))
            np.testing.assert_array_equal(np.asarray(run(once, jnp.int32(bits))), np.asarray(once), f"{name} {bits}")


ODD = {
    "zeros": np.zeros((4, 6), np.float32),
    "constant": np.full((4, 6), -0.3, np.float32),
    "huge": normal((4, 6), 1, 1e30),
    "largest": np.full((4, 6), LARGEST, np.float32),
    "tiny": normal((4, 6), 2, 1e-30),
    "subnormal": np.full((4, 6), 1e-40, np.float32),
    "one_outlier": np.where(np.arange(24).reshape(4, 6) == 5, 1e30, normal((4, 6), 3)).astype(np.float32),
    "scalar": np.float32(-0.37),
    "vector": normal((6,), 4),
    "no_rows": np.zeros((0, 6), np.float32),
    "no_columns": np.zeros((4, 0), np.float32),
    "with_nan": np.where(np.arange(24).reshape(4, 6) == 8, np.nan, normal((4, 6), 5)).astype(np.float32),
    "with_nan_of_ones": np.where(np.arange(24) == 8, 0x7FFFFFFF, 0).astype(np.uint32).view(np.float32).reshape(4, 6),
    "with_infinity": np.where(np.arange(24).reshape(4, 6) == 8, -np.inf, normal((4, 6), 5)).astype(np.float32),
}


@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_odd_tensors(name):
    quantizers = {
        "tensor": Float(name),
        "row": Float(name, per="row", rounding="stochastic"),
        "unscaled": Float(name, scaled=False),
    }

    @jax.jit
    def run(tensors, bits):
        return {
            (odd, kind, dtype.__name__): q(x.astype(dtype), bits, key=KEY)
            for odd, x in tensors.items()
            for kind, q in quantizers.items()
            for dtype in (jnp.float32, jnp.bfloat16)
        }

    form = format_of(name)
    for bits in (form.width - form.mantissa, form.width, 23, 24):
        for (odd, kind, dtype), y in run(ODD, jnp.int32(bits)).items():
            message = f"{name} {bits} bits {odd} {kind} {dtype}"
            x = np.asarray(jnp.asarray(ODD[odd]).astype(dtype), np.float32)
            assert y.dtype == dtype and y.shape == x.shape, message
            y = np.asarray(y, np.float32)
            if bits == 24 and odd == "subnormal":
                np.testing.assert_allclose(y, x, atol=1.2e-38, err_msg=message)  # a CPU may take it for 0
            elif bits == 24:
                same_bits(y, x, message)
            elif odd.startswith("with_nan") or (odd == "with_infinity" and kind != "unscaled"):
                # Never hidden: it spoils every element that shares its scale, and no other.
                ids = reference.group_ids(x.shape, () if kind == "tensor" else "row")
                expected = np.isnan(x) if kind == "unscaled" else ids == ids[1, 2]
                np.testing.assert_array_equal(np.isnan(y), expected, message)
            elif not (odd == "largest" and dtype == "bfloat16"):  # which is infinite there
                assert np.all(np.isfinite(y)), message
                if kind == "unscaled":
                    assert np.all(np.abs(y) <= form.largest), message
                elif odd in ("zeros", "constant", "huge", "largest", "tiny", "scalar", "vector"):
                    largest = np.abs(x).max(initial=0)
                    rtol = 2.0**-5 if odd == "largest" else 2.0**-18 if dtype == "float32" else 2.0**-6
                    np.testing.assert_allclose(np.abs(y).max(initial=0), largest, rtol=rtol, err_msg=message)


def test_the_largest_finite_bfloat16_stays_finite():
    x = jnp.full((3,), jnp.finfo(jnp.bfloat16).max, jnp.bfloat16)
    for name in TYPES:
        assert np.all(np.isfinite(np.asarray(jax.jit(Float(name))(x, jnp.int32(8)), np.float32)))
