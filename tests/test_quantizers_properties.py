"""What holds of every uniform quantizer: odd tensors, invariances, the kinds of `bits`, layouts, and mistakes."""

import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference
from refusals import refused

from qtrain import quantizers
from qtrain.errors import UsageError
from qtrain.quantizers import GRIDS, ROUNDINGS, Uniform, layout
from qtrain.quantizers.base import static_bits

BITS = (1, 2, 3, 4, 8, 16)
DETERMINISTIC = ("nearest", "floor")
KEY = jax.random.key(0)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


TENSORS = {
    "zeros": np.zeros((4, 6), np.float32),
    "ones": np.ones((4, 6), np.float32),
    "constant": np.full((4, 6), -0.3, np.float32),
    "huge": normal((4, 6), 1, 1e30),
    "tiny": normal((4, 6), 2, 1e-30),
    "subnormal": np.full((4, 6), 1e-40, np.float32),
    "one_outlier": np.where(np.arange(24).reshape(4, 6) == 5, 1e30, normal((4, 6), 3)).astype(np.float32),
    "single": np.array([[0.37]], np.float32),
    "scalar": np.float32(-0.37),
    "vector": normal((6,), 4),
    "no_rows": np.zeros((0, 6), np.float32),
    "no_columns": np.zeros((4, 0), np.float32),
    "empty_vector": np.zeros((0,), np.float32),
    "with_nan": np.where(np.arange(24).reshape(4, 6) == 8, np.nan, normal((4, 6), 5)).astype(np.float32),
}


@functools.cache
def of_odd_tensors(grid):
    @jax.jit
    def run(bits):
        return {
            (name, per, rounding, dtype.__name__): Uniform(grid, per=per, rounding=rounding)(
                jnp.asarray(x, dtype), bits, key=KEY
            )
            for name, x in TENSORS.items()
            for per, rounding, dtype in [
                ("tensor", "nearest", jnp.float32),
                ("row", "stochastic", jnp.bfloat16),
            ]
        }

    return run


@pytest.mark.parametrize("grid", GRIDS)
def test_odd_tensors(grid):
    for bits in (1, 2, 8, 16, 23, 24):
        for (name, per, rounding, dtype), y in of_odd_tensors(grid)(jnp.int32(bits)).items():
            message = f"{grid} {bits} bits {name} {per} {rounding} {dtype}"
            x = np.asarray(jnp.asarray(TENSORS[name], dtype), np.float32)
            y = np.asarray(y, np.float32)
            assert y.shape == x.shape, message
            if name == "with_nan":
                # A NaN is never hidden: it spoils every element that shares its scale, and no other.
                spoilt = reference.group_ids(x.shape, per) == reference.group_ids(x.shape, per)[1, 2]
                expected = np.isnan(x) if bits >= 24 else spoilt
                np.testing.assert_array_equal(np.isnan(y), expected, message)
                continue
            assert np.all(np.isfinite(y)), message
            if name == "zeros":
                assert np.all(np.abs(y) <= 1.2e-38), message
            if name in ("ones", "single", "constant", "scalar") and grid != "aqt" and dtype == "float32":
                # One value is on every grid but AQT's, whose end lies below the maximum, and of a negative, unsigned's.
                if grid != "unsigned" or x.max() > 0:
                    np.testing.assert_allclose(y, x, rtol=1e-6, err_msg=message)
                else:
                    np.testing.assert_array_equal(y, x if bits >= 24 else 0 * x, err_msg=message)
            if name in ("huge", "tiny") and bits in (8, 16) and grid != "sign":
                kept = np.maximum(x, 0) if grid == "unsigned" else x
                assert np.abs(y - kept).max() <= 0.02 * np.abs(x).max(), message


@pytest.mark.parametrize("grid", ["symmetric", "affine", "sign"])
def test_infinity_is_not_hidden(grid):
    for value in (jnp.inf, -jnp.inf):
        y = Uniform(grid, per="row")(jnp.array([[1.0, value], [1.0, 2.0]]), 4)
        assert not np.any(np.isfinite(y[0, 1])) and np.all(np.isfinite(y[1]))


SHAPE = (5, 12, 8)
PERS = [("tensor", None), (4, (1,))]


@functools.cache
def batch(grid, rounding):
    """Properties computed side by side in one program, for each granularity."""

    @jax.jit
    def run(x, bits):
        results = []
        for per, axes in PERS:
            q = Uniform(grid, per=per, rounding=rounding)
            factors = jnp.array([1.0, 2.0**20, 2.0**-20, -1.0])
            y, larger, smaller, flipped = jax.vmap(lambda f, q=q, axes=axes: q(x * f, bits, axes=axes) / f)(factors)
            twice, fixed = q(y, bits, axes=axes), q(y, bits, q.range(x, axes=axes), axes=axes)
            results.append(
                {"once": y, "twice": twice, "fixed": fixed, "larger": larger, "smaller": smaller, "flipped": flipped}
            )
        return results

    return run


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("grid", GRIDS)
def test_invariances(grid, rounding):
    x = normal(SHAPE, 7)
    order = np.argsort(x, axis=None)
    for bits in BITS:
        for (per, axes), r in zip(PERS, batch(grid, rounding)(x, jnp.float32(bits)), strict=True):
            message = f"{grid} {rounding} {bits} bits per={per}"
            r = {name: np.asarray(value, np.float64) for name, value in r.items()}
            scale, offset = reference.steps(x, grid, per, bits, axes)
            ulp = 2.0**-22 * (np.abs(r["once"]) + np.abs(offset))
            if grid == "affine" and rounding == "floor":
                ulp = ulp + scale  # adding the minimum rounds, and what ends up below its grid point falls a step
            if grid == "aqt" and bits > 1:
                # The end of AQT's grid is not the tensor's maximum, so a second pass has a range of its own.
                assert np.all(np.abs(r["fixed"] - r["once"]) <= ulp), message
            else:
                again = 1e-5 * np.abs(r["once"]) if grid == "sign" or bits == 1 else ulp  # a sum rounds often
                assert np.all(np.abs(r["twice"] - r["once"]) <= again), message
                assert np.all(np.abs(r["fixed"] - r["once"]) <= again), message
            np.testing.assert_array_equal(r["larger"], r["once"], message)  # powers of two pass through exactly
            np.testing.assert_array_equal(r["smaller"], r["once"], message)
            if grid in ("symmetric", "aqt", "sign") and rounding == "nearest":
                np.testing.assert_array_equal(r["flipped"], r["once"], message)
            if per == "tensor":
                assert np.all(np.diff(r["once"].ravel()[order]) >= 0), message
                steps_used = len(np.unique(r["once"]))
                assert steps_used <= 2**bits, message
            if grid not in ("sign", "unsigned") and bits > 1:
                error = np.abs(r["once"] - x) / scale
                assert error.max() <= (0.5 if rounding == "nearest" else 1.0) * (1 + 1e-3) + 2.0 ** (bits - 22), message


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("grid", ["symmetric", "aqt", "affine", "unsigned"])
def test_error_falls_with_every_bit(grid, rounding):
    """Root mean square error, uniform data: about half as large with each bit more."""
    x = np.random.default_rng(0).uniform(0 if grid == "unsigned" else -1, 1, (64, 64)).astype(np.float32)
    q = Uniform(grid, per="tensor", rounding=rounding)
    run = jax.jit(lambda x, bits: jnp.sqrt(jnp.mean((q(x, bits, key=KEY) - x) ** 2)))
    errors = np.array([run(x, jnp.float32(bits)) for bits in range(2, 17)])
    assert np.all(errors[1:] < 0.7 * errors[:-1]) and np.all(errors[1:] > 0.3 * errors[:-1])
    assert run(x, jnp.float32(24)) == 0.0


@pytest.mark.parametrize("grid", GRIDS)
def test_every_kind_of_bits_gives_the_same(grid):
    """Python and NumPy numbers, traced int32 and float32, a vector for each channel, and vmap over widths."""
    x = jnp.asarray(normal((16, 6), 3))
    widths = np.array([1, 2, 4, 8, 16, 24])
    q = Uniform(grid, per="column")
    traced = jax.jit(q)
    every = np.stack([traced(x, jnp.float32(bits)) for bits in widths])
    diagonal = np.stack([every[i][:, i] for i in range(6)], axis=1)

    @jax.jit
    def otherwise(x, integers):
        return {
            "static": [q(x, bits) for bits in (4, np.int64(4), np.float32(4), np.array(4), 4.0)],
            "static_vector": q(x, widths),
            "traced_vector": q(x, integers.astype(jnp.float32)),
            "traced_integers": jnp.stack([q(x, integers[i]) for i in range(6)]),
            "vmap_over_bits": jax.vmap(q, (None, 0))(x, integers),
            "vmap_over_both": jax.vmap(q)(jnp.stack([x] * 6), integers.astype(jnp.float32)),
        }

    results = otherwise(x, jnp.asarray(widths))
    for result in results.pop("static"):
        np.testing.assert_array_equal(result, every[2])
    for name, result in results.items():
        np.testing.assert_array_equal(result, diagonal if "vector" in name else every, name)
    codes, scale = jax.jit(q.encode)(x, jnp.asarray(np.minimum(widths, 16)))
    assert codes.shape == x.shape and jax.tree.leaves(scale)[0].shape == (1, 6)


def test_bits_of_each_row():
    x = jnp.asarray(normal((4, 6), 3))
    rows = Uniform(per="row")(x, jnp.array([[2], [4], [8], [24]]))
    for i, bits in enumerate((2, 4, 8, 24)):
        np.testing.assert_array_equal(rows[i], Uniform(per="tensor")(x[i], bits))


def test_outside_jit_traced_and_plain_bits_agree():
    x = jnp.asarray(normal((16, 6), 3))
    for bits in (1, 4, 24):
        np.testing.assert_array_equal(Uniform()(x, jnp.int32(bits)), Uniform()(x, bits))


@pytest.mark.parametrize("bits", [0, -1, 4.5, "four", "4", True, np.True_, float("nan"), float("inf"), None, [4, 4]])
def test_a_width_that_is_none(bits):
    with pytest.raises(UsageError) as error:
        Uniform()(jnp.ones((2, 2)), bits)
    assert str(error.value) == (
        f"bits: {bits!r} is not a width; give a whole number of at least 1 (24 and above: float)"
    )
    with pytest.raises(UsageError):
        Uniform().encode(jnp.ones((2, 2)), bits)


@pytest.mark.parametrize("bits", [[4, 0], [4, 4.5], [4, np.nan], [-3, 2]])
def test_a_vector_of_widths_with_one_that_is_none(bits):
    with pytest.raises(UsageError, match="whole number of at least 1"):
        Uniform()(jnp.ones((2, 2)), np.array(bits))


def test_static_bits():
    assert static_bits(4) == static_bits(4.0) == static_bits(np.float32(4)) == static_bits(np.array(4)) == 4
    assert static_bits(10**30) == 10**30
    assert static_bits(jnp.int32(4)) is None and static_bits(np.array([4, 8])) is None


MISTAKES = [
    (lambda: Uniform("symetric"), ["grid='symetric'", "'affine'", "Did you mean 'symmetric'?"]),
    (lambda: Uniform(rounding="neerest"), ["rounding='neerest'", "'floor'", "Did you mean 'nearest'?"]),
    (lambda: Uniform(per="chanel"), ["per='chanel'", "group size", "Did you mean 'channel'?"]),
    (lambda: Uniform(per=0), ["per=0"]),
    (lambda: Uniform(per=True), ["per=True"]),
    (lambda: Uniform(per=2.0), ["per=2.0"]),
    (lambda: Uniform(per=(0, "x")), ["per=(0, 'x')"]),
    (lambda: Uniform(statistics=1.0), ["statistics=1.0", "[0, 1)"]),
    (lambda: Uniform(statistics=-0.1), ["statistics=-0.1"]),
    (lambda: Uniform(per=5)(jnp.ones((6, 4)), 4), ["per=5", "axis 0", "(6, 4)"]),
    (lambda: Uniform(per=3)(jnp.ones((6, 4)), 4, axes=(1,)), ["per=3", "axis 1", "(6, 4)"]),
    (lambda: Uniform(per=1)(jnp.float32(1), 4), ["per=1", "()"]),
    (lambda: Uniform(per=(2,))(jnp.ones((6, 4)), 4), ["per=(2,)", "(6, 4)"]),
    (lambda: Uniform(per=(-3,))(jnp.ones((6, 4)), 4), ["per=(-3,)", "(6, 4)"]),
    (lambda: Uniform(rounding="stochastic")(jnp.ones((6, 4)), 4), ["stochastic", "key"]),
    (lambda: Uniform().encode(jnp.ones((6, 4)), 24), ["bits: 24", "at most 23"]),
    (lambda: quantizers.Operands(residuals="orignal"), ["residuals='orignal'", "Did you mean 'original'?"]),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES, ids=[words[0] for _, words in MISTAKES])
def test_mistakes_are_named_in_one_line(call, words):
    refused(call, *words)


LAYOUTS = [  # shape, per, contracted, shape of the scales
    ((4, 6), "tensor", None, (1, 1)),
    ((4, 6), "channel", None, (1, 6)),
    ((4, 6), "channel", (0,), (1, 6)),
    ((4, 6), "channel", (1,), (4, 1)),
    ((4, 6), "channel", (-1,), (4, 1)),
    ((4, 6), "channel", (), (4, 6)),
    ((4, 6), "row", None, (4, 1)),
    ((4, 6), "column", (1,), (1, 6)),
    ((3, 3, 8, 16), "channel", (0, 1, 2), (1, 1, 1, 16)),
    ((3, 3, 8, 16), "channel", None, (1, 1, 1, 16)),
    ((3, 3, 8, 16), (2, 3), None, (1, 1, 8, 16)),
    ((3, 3, 8, 16), (-1, 0), None, (3, 1, 1, 16)),
    ((3, 3, 8, 16), 4, (0, 1, 2), (3, 3, 2, 1, 16)),
    ((4, 6), (), None, (1, 1)),
    ((4, 6), 2, None, (2, 1, 6)),
    ((4, 6), 3, (1,), (4, 2, 1)),
    ((6,), 3, None, (2, 1)),
    ((6,), (0,), None, (6,)),
    ((6,), "channel", None, (1,)),
    ((6,), "row", None, (1,)),
    ((6,), "row", (0,), (1,)),
    ((6,), "column", (0,), (1,)),
    ((6,), "channel", (0,), (1,)),
    ((), "tensor", None, ()),
    ((), "channel", None, ()),
    ((), "row", None, ()),
    ((0, 6), "channel", None, (1, 6)),
    ((0, 6), 2, None, (0, 1, 6)),
]


@pytest.mark.parametrize(("shape", "per", "contracted", "scales"), LAYOUTS)
def test_layout(shape, per, contracted, scales):
    view = layout(shape, per, contracted)
    assert view.scale_shape == scales
    assert view.num_scales == np.prod(scales)
    x = jnp.asarray(normal(shape, 1))
    codes, scale = jax.eval_shape(lambda x: Uniform(per=per).encode(x, 4, axes=contracted), x)
    assert scale.shape == scales and codes.shape == shape
    assert view.num_scales in (0, len(np.unique(reference.group_ids(shape, per, contracted)))) or not x.size


def test_a_list_of_axes_is_a_tuple():
    assert Uniform(per=[0, 1]) == Uniform(per=(0, 1))
    assert hash(Uniform(per=[0, 1])) == hash(Uniform(per=(0, 1)))


def test_describe():
    assert Uniform().describe() == "symmetric/channel"
    q = Uniform("affine", per=64, rounding="stochastic", clip_gradient=True, statistics=0.9)
    assert q.describe() == "affine/64 stochastic clip_gradient ema=0.9"
    assert q.stochastic and q.ema == 0.9 and not Uniform().stochastic and Uniform().ema is None


@pytest.mark.parametrize("module", ["base", "granularity", "uniform", "noise", "contraction"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"qtrain.quantizers.{module}")).failed == 0
