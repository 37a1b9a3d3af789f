"""Small floats: bit for bit the casts of ml_dtypes, a search over the values of every width, gradients, properties."""

import doctest
import functools
import importlib

import float_reference
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantizer_reference as reference
from float_reference import TYPES, widths

from qtrain.errors import UsageError
from qtrain.quantizers import FORMATS, Float, noise
from qtrain.quantizers.formats import format_of

ALIASES = {"e4m3": "e4m3fn", "e3m2": "e3m2fn", "e2m3": "e2m3fn", "e2m1": "e2m1fn"}
KEY = jax.random.key(3)
LARGEST = float(np.finfo(np.float32).max)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


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


SHAPE = (4, 6, 8)
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


def tensor(seed=0):
    """Entries of both signs, some on a coarse grid, a row of zeros and one of a constant."""
    x = normal(SHAPE, seed)
    x[0] = np.round(4 * x[0]) / 4
    x[1, 0] = 0.0
    x[1, 1] = 0.7
    return x


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
    with pytest.raises(UsageError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_describe():
    assert Float().describe() == "e4m3fn/tensor"
    assert Float("e5m2", scaled=False).describe() == "e5m2 unscaled"
    q = Float("e5m2", per=[0, 1], rounding="stochastic", clip_gradient=True, statistics=0.9)
    assert q.describe() == "e5m2/(0, 1) stochastic clip_gradient ema=0.9"
    assert q.ema == 0.9 and Float().ema is None and hash(q) == hash(Float(**{**vars(q), "per": (0, 1)}))


@pytest.mark.parametrize("module", ["small_float", "formats", "scales"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"qtrain.quantizers.{module}")).failed == 0
