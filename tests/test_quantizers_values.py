"""Values of the uniform quantizers: every grid × granularity × rounding × dtype × width against a float64 reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference

from qtrain.quantizers import GRIDS, ROUNDINGS, Uniform, noise

BITS = (1, 2, 3, 4, 8, 16, 23)
SHAPE = (4, 6, 8)
DTYPES = (jnp.float32, jnp.bfloat16)
PERS = [  # per, contracted axes
    ("tensor", None),
    ("channel", (0, 1)),
    (3, None),
    ("channel", None),
    ("channel", (2,)),
    ("row", None),
    ((0, -1), None),
    (4, (0, -1)),
]
# Every granularity; and every rounding × dtype for one of each sort of them.
CASES = [(per, axes, "nearest", jnp.float32) for per, axes in PERS[3:]]
CASES += itertools.starmap(lambda per, *rest: (*per, *rest), itertools.product(PERS[:3], ROUNDINGS, DTYPES))


def tensor(shape=SHAPE, seed=0):
    """Entries of both signs, some on a coarse grid (so that ties occur), a row of zeros and one of a constant."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    x[0] = np.round(4 * x[0]) / 4
    x[1, 0] = 0.0
    x[1, 1] = 0.7
    return x


KEY = jax.random.key(3)


@functools.cache
def compiled(grid):
    """Three programs over all of CASES, so that none can share the work of another: call, encode, decode."""

    def quantizers(x):
        for per, axes, rounding, dtype in CASES:
            yield Uniform(grid, per=per, rounding=rounding), x.astype(dtype), axes

    def call(x, bits):
        return [q(v, bits, key=KEY, axes=axes) for q, v, axes in quantizers(x)]

    def encode(x, bits):
        return [q.encode(v, bits, key=KEY, axes=axes) for q, v, axes in quantizers(x)]

    def decode(x, encoded):
        return [q.decode(*pair, axes=axes) for (q, _, axes), pair in zip(quantizers(x), encoded, strict=True)]

    return jax.jit(call), jax.jit(encode), jax.jit(decode)


@functools.cache
def computed(grid, bits):
    call, encode, decode = compiled(grid)
    x = tensor()
    encoded = encode(x, jnp.float32(bits))
    return call(x, jnp.float32(bits)), encoded, decode(x, encoded)


def name_of(case):
    per, axes, rounding, dtype = case
    return f"per={per} contracted={axes} {rounding} {dtype.__name__}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", GRIDS)
def test_against_float64_reference(grid, bits):
    """Scale to float32 (bfloat16) rounding; codes exactly, except within 2⁻²² |x/s| of where rounding turns over."""
    quantized, encoded, _ = computed(grid, bits)
    words = np.asarray(noise.seed(KEY))
    for case, x_q, (codes, scale) in zip(CASES, quantized, encoded, strict=True):
        per, axes, rounding, dtype = case
        message = f"{grid} {bits} bits {name_of(case)}"
        x = np.asarray(jnp.asarray(tensor()).astype(dtype), np.float64)
        eps = reference.EPS[dtype.__name__]
        offset = np.zeros(SHAPE)
        step = scale
        if grid == "affine":
            step, offset = scale.scale, reference.expand(scale.offset, SHAPE, per, axes)
        step_full = reference.expand(step, SHAPE, per, axes)
        assert step.size == len(reference.groups(SHAPE, per, axes)), message

        expected_step, expected_offset = reference.steps(x, grid, per, bits, axes)
        sums = grid == "sign" or (bits == 1 and grid in ("symmetric", "aqt"))  # a mean, rounded at each addition
        rtol = eps / 2 + (1e-6 if sums else 2.0**-22)
        np.testing.assert_allclose(step_full, expected_step, rtol=rtol, err_msg=message)
        np.testing.assert_array_equal(offset, expected_offset, err_msg=message)

        shape = reference.blocked(SHAPE, per, axes)
        u = reference.hashed_uniform(words, shape, np.asarray(step, np.float32)).reshape(SHAPE)
        expected = reference.codes(x, grid, bits, step_full, offset, rounding, u)
        assert codes.dtype == jnp.int32 and codes.shape == SHAPE, message
        low, high = reference.bounds(grid, bits)
        assert low <= codes.min() and codes.max() <= high, message
        assert len(np.unique(codes)) <= 2**bits, message
        off = np.abs(np.asarray(codes, np.int64) - expected.codes)
        np.testing.assert_array_equal(off[expected.certain], 0, err_msg=message)
        assert np.all(off <= 1 + np.abs(expected.in_steps) * 2.0**-20), message
        if bits <= 8:
            assert expected.certain.mean() > 0.9, message  # a tie is not certain, and this tensor has a few

        assert x_q.dtype == dtype and x_q.shape == SHAPE, message
        values = np.asarray(codes, np.float64) * step_full + offset
        magnitude = np.abs(np.asarray(codes, np.float64) * step_full) + np.abs(offset)
        assert np.all(np.abs(np.asarray(x_q, np.float64) - values) <= eps * magnitude), message


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", GRIDS)
def test_decoded_codes_equal_the_call_exactly(grid, bits):
    quantized, _, decoded = computed(grid, bits)
    for case, x_q, again in zip(CASES, quantized, decoded, strict=True):
        assert again.dtype == x_q.dtype
        np.testing.assert_array_equal(np.asarray(again), np.asarray(x_q), err_msg=f"{grid} {bits} {name_of(case)}")


@pytest.mark.parametrize("grid", GRIDS)
def test_decoded_codes_equal_the_call_exactly_outside_jit(grid):
    x = jnp.asarray(tensor())
    for rounding in ROUNDINGS:
        q = Uniform(grid, rounding=rounding)
        for bits in (1, 4, jnp.float32(8)):
            np.testing.assert_array_equal(q.decode(*q.encode(x, bits, key=KEY)), q(x, bits, key=KEY))


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("grid", GRIDS)
def test_24_bits_and_more_are_the_identity(grid, bits):
    for case, x_q in zip(CASES, compiled(grid)[0](tensor(), jnp.float32(bits)), strict=True):
        x = jnp.asarray(tensor()).astype(case[3])
        np.testing.assert_array_equal(np.asarray(x_q), np.asarray(x), err_msg=name_of(case))
        assert Uniform(grid, per=case[0])(x, bits) is x


@pytest.mark.parametrize("grid", ["symmetric", "aqt"])
def test_one_bit_is_the_sign_grid(grid):
    for index, case in enumerate(CASES):
        for ours, sign in zip(computed(grid, 1)[:2], computed("sign", 1)[:2], strict=True):
            jax.tree.map(
                lambda a, b, case=case: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), name_of(case)),
                ours[index],
                sign[index],
            )


@pytest.mark.parametrize("grid", GRIDS)
def test_trace_happens_once_for_all_widths(grid):
    call, encode, decode = compiled(grid)
    for bits in (*BITS, 24, 32):
        call(tensor(), jnp.float32(bits))
    for bits in BITS:
        computed(grid, bits)
    assert [f._cache_size() for f in (call, encode, decode)] == [1, 1, 1]


def test_the_function_is_traced_once_for_all_widths():
    traces = []

    @jax.jit
    def call(x, bits):
        traces.append(bits)
        return Uniform("symmetric")(x, bits)

    results = [np.asarray(call(tensor(), jnp.float32(bits))) for bits in range(1, 33)]
    assert len(traces) == 1
    assert len({r.tobytes() for r in results}) == 24  # 1 … 23 all differ, 24 and above are one


def test_ties_go_to_even():
    grid_points = np.array([-7, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 7], np.float32)  # a step of 1 at 4 bits
    codes, scale = Uniform(per="tensor").encode(jnp.asarray(grid_points), 4)
    assert scale == 1.0
    np.testing.assert_array_equal(codes, [-7, -2, -2, 0, 0, 2, 2, 4, 7])
    codes, _ = Uniform("unsigned", per="tensor").encode(jnp.array([0.5, 1.5, 2.5, 15.0]), 4)
    np.testing.assert_array_equal(codes, [0, 2, 2, 15])


ENDS = [  # grid, input, bits, expected codes and values at the ends of the grid
    ("symmetric", [-1.0, 0.5, 1.0], 3, [-3, 2, 3], [-1.0, 2 / 3, 1.0]),
    ("symmetric", [-1.0, 0.25, 0.5], 3, [-3, 1, 2], [-1.0, 1 / 3, 2 / 3]),
    ("symmetric", [-2.0, 0.0, 1.0], 2, [-1, 0, 0], [-2.0, 0.0, 0.0]),
    ("aqt", [-3.5, 1.2, 3.5], 3, [-3, 1, 3], [-3.0, 1.0, 3.0]),
    ("aqt", [-1.5, 0.4, 1.5], 2, [-1, 0, 1], [-1.0, 0.0, 1.0]),
    ("affine", [-1.0, 0.0, 2.0], 2, [0, 1, 3], [-1.0, 0.0, 2.0]),
    ("affine", [-1.0, 0.1, 2.0], 1, [0, 0, 1], [-1.0, -1.0, 2.0]),
    ("unsigned", [-5.0, 0.9, 3.0], 2, [0, 1, 3], [0.0, 1.0, 3.0]),
    ("unsigned", [-5.0, 0.9, 3.0], 1, [0, 0, 1], [0.0, 0.0, 3.0]),
    ("sign", [-3.0, 0.0, 1.0, 4.0], 8, [-1, 1, 1, 1], [-2.0, 2.0, 2.0, 2.0]),
    ("symmetric", [-3.0, -0.0, 1.0, 4.0], 1, [-1, 1, 1, 1], [-2.0, 2.0, 2.0, 2.0]),
]


@pytest.mark.parametrize(("grid", "x", "bits", "codes", "values"), ENDS)
def test_ends_of_the_grid(grid, x, bits, codes, values):
    q = Uniform(grid, per="tensor")
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(q.encode(x, bits)[0], codes)
    np.testing.assert_allclose(q(x, bits), np.asarray(values, np.float32), rtol=2.0**-22)


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("grid", GRIDS)
def test_calibrated_range(grid, rounding):
    """A range from another tensor: the same grid for every tensor, what lies outside goes to its ends."""
    seen, x = tensor(seed=1), 2 * tensor(seed=2)
    for per, axes in [("tensor", None), ("channel", (0, 1)), (3, None)]:
        q = Uniform(grid, per=per, rounding=rounding)
        ranges = q.range(jnp.asarray(seen), axes=axes)
        run = jax.jit(lambda x, bits, q=q, ranges=ranges, axes=axes: q.encode(x, bits, ranges, axes=axes))
        for bits in (1, 2, 8):
            codes, scale = run(x, jnp.int32(bits))
            step = reference.expand(scale.scale if grid == "affine" else scale, SHAPE, per, axes)
            expected_step, offset = reference.steps(x, grid, per, bits, axes, calibration=seen)
            np.testing.assert_allclose(step, expected_step, rtol=2.0**-22)
            expected = reference.codes(x, grid, bits, step, offset, rounding)
            np.testing.assert_array_equal(np.asarray(codes)[expected.certain], expected.codes[expected.certain])
            low, high = reference.bounds(grid, bits)
            assert codes.min() == low and codes.max() == high


def test_range_names_and_shapes():
    x = jnp.asarray(tensor())
    names = {"symmetric": {"absmax", "absmean"}, "affine": {"min", "max"}, "unsigned": {"max"}}
    for grid in GRIDS:
        ranges = Uniform(grid, per="channel").range(x.astype(jnp.bfloat16), axes=(0, 1))
        assert set(ranges) == names.get(grid, {"absmax", "absmean"})
        assert all(value.shape == (1, 1, 8) and value.dtype == jnp.float32 for value in ranges.values())
    np.testing.assert_array_equal(Uniform("affine").range(x)["min"], tensor().min((0, 1), keepdims=True))
    np.testing.assert_allclose(Uniform().range(x)["absmean"], np.abs(tensor()).mean((0, 1), keepdims=True), rtol=1e-6)
