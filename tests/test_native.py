"""Native execution against its float twin and against float64: the same codes, the same gradients, one program."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference
from native_program import OPERATIONS, WIDTHS, close, data, distance, native_paths, operands_of, per, program, traced

from qtrain.quantizers import GRIDS, RESIDUALS, Float, Paths, Uniform, native


def cases(rows):
    """Rows of (operation, grids, granularities, residuals): each value beside many others, not all beside all."""
    grids, granularities = itertools.cycle(GRIDS), itertools.cycle([("tensor", "channel"), ("channel", "channel")])
    for index, (name, residuals) in enumerate(rows):
        lhs, rhs, grad = next(grids), GRIDS[(index * 2 + 1) % 5], GRIDS[(index // 2 + index // 5) % 5]
        if name == "attention":
            lhs, rhs, grad = (("symmetric", "aqt", "sign")[(index + k) % 3] for k in range(3))
        pers = next(granularities) if residuals in ("folded", "requantized") else ("tensor", "tensor")
        rounding = "stochastic" if grad != "sign" and index % 2 else "nearest"
        yield name, per(lhs, pers[0]), per(rhs, pers[1]), per(grad, "tensor", rounding=rounding), residuals


QUICK = list(cases(zip(itertools.chain(*[OPERATIONS] * 4), sorted(RESIDUALS * 6), strict=True)))


def check_against_fake(name, lhs, rhs, grad, residuals):
    op, left, right, _ = OPERATIONS[name]
    fake = operands_of(lhs, rhs, grad, residuals)
    paths = native_paths(op, fake, left, right)
    assert paths.forward == "int8"
    assert (paths.dlhs, paths.drhs) == (("float",) * 2 if residuals == "original" else ("int8",) * 2)
    run = program(op, fake, dataclasses.replace(fake, paths=paths))
    with jax.default_matmul_precision("highest"):
        for widths in WIDTHS:
            expected, actual = run(*data(name), traced(widths))
            close(actual, expected, words=f"{widths}")
    assert run._cache_size() == 1


@pytest.mark.parametrize(("name", "lhs", "rhs", "grad", "residuals"), QUICK, ids=lambda v: getattr(v, "grid", v))
def test_every_width_in_one_program_equals_the_float_twin(name, lhs, rhs, grad, residuals):
    check_against_fake(name, lhs, rhs, grad, residuals)


def test_the_quick_cases_hold_every_choice():
    for index, values in ((0, OPERATIONS), (4, RESIDUALS)):
        assert {case[index] for case in QUICK} == set(values)
    for index in (1, 2, 3):
        assert {case[index].grid for case in QUICK} == set(GRIDS)
    assert {case[3].rounding for case in QUICK} == {"nearest", "stochastic"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("residuals", RESIDUALS)
def test_every_pair_of_grids_equals_the_float_twin(name, residuals):
    grids = ("symmetric", "aqt", "sign") if name == "attention" else GRIDS
    pers = (
        [("tensor", "channel"), ("channel", "tensor")] if residuals in ("folded", "requantized") else [("tensor",) * 2]
    )
    for index, (lhs, rhs) in enumerate(itertools.product(grids, grids)):
        grad = per(grids[index % len(grids)], "tensor", rounding="stochastic")
        left, right = pers[index % len(pers)]
        check_against_fake(name, per(lhs, left), per(rhs, right), grad, residuals)
        program.cache_clear()


# The definition, in float64.


def multiplied(name, x, w, g=None):
    """The product, or both gradients, in float64."""
    op, *_, equation = OPERATIONS[name]
    if equation:
        left, right = equation.split("->")[0].split(",")
        out = equation.split("->")[1]
        if g is None:
            return np.einsum(equation, x, w)
        return np.einsum(f"{out},{right}->{left}", g, w), np.einsum(f"{left},{out}->{right}", x, g)
    exact = op.explicit(x.shape, w.shape)
    canvas = np.pad(x, ((0, 0), *exact.padding, (0, 0)))
    counts = [(canvas.shape[1 + i] - w.shape[i]) // op.window_strides[i] + 1 for i in (0, 1)]
    out, d_canvas, dw = np.zeros((len(x), *counts, w.shape[-1])), np.zeros_like(canvas), np.zeros_like(w)
    for i, j in np.ndindex(*w.shape[:2]):
        (stride, _), (rows, columns) = op.window_strides, counts
        place = np.s_[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        if g is None:
            out += canvas[place] @ w[i, j]
        else:
            d_canvas[place] += g @ w[i, j].T
            dw[i, j] = np.einsum("bhwc,bhwf->cf", canvas[place], g)
    if g is None:
        return out
    inside = tuple(slice(low, low + size) for (low, _), size in zip(exact.padding, x.shape[1:3], strict=True))
    return d_canvas[:, *inside], dw


def factor_of(x, quantizer, bits, contracted):
    """Every element's scale where there are several; a group without any range takes the largest of the others'."""
    scale, _ = reference.steps(x, quantizer.grid, quantizer.per, bits, contracted)
    if len(np.unique(reference.group_ids(x.shape, quantizer.per, contracted))) == 1:
        return np.ones(x.shape)
    dead = scale < 1e-37
    return np.where(dead, scale[~dead].max() if np.any(~dead) else 1.0, scale)


def defined(name, lhs, rhs, grad, residuals, widths, x, w, g):
    """Operands' docstring in numpy: the result and both gradients, rounding to nearest."""
    op, *_, equation = OPERATIONS[name]
    axes = op.contracted
    quantized = lambda v, q, b, a, per=None: reference.fake_quantize(v, q.grid, per or q.per, b, a)  # noqa: E731
    x, w, g = (np.asarray(v, np.float64) for v in (x, w, g))
    x_q, w_q = quantized(x, lhs, widths[0], axes[0]), quantized(w, rhs, widths[1], axes[1])
    out = multiplied(name, x_q, w_q)
    if residuals == "requantized":
        x_b, w_b = quantized(x_q, lhs, widths[0], None, "tensor"), quantized(w_q, rhs, widths[1], None, "tensor")
        x_b = x_b if lhs.per == "channel" else x_q
        w_b = w_b if rhs.per == "channel" else w_q
        return out, *multiplied(name, x_b, w_b, quantized(g, grad, widths[2], None))
    f_x, f_w = factor_of(x, lhs, widths[0], axes[0]), factor_of(w, rhs, widths[1], axes[1])
    # One number for every contracted element: its first stands for all of them.
    if equation:
        first = lambda v, contracted: np.expand_dims(v.take(0, contracted[0]), contracted[0])  # noqa: E731
        for axis in axes[0]:
            f_x = first(f_x, (axis,))
        for axis in axes[1]:
            f_w = first(f_w, (axis,))
        factor = np.einsum(equation, f_x, f_w)
    else:
        factor = f_x[:, :1, :1, :1] * f_w[:1, :1, :1, :]
    g_q = quantized(g * factor, grad, widths[2], None) / factor
    return out, *multiplied(name, x_q, w_q, g_q)


DEFINED = [
    ("dense", per("symmetric", "channel"), per("symmetric", "channel"), per("symmetric", "tensor"), "folded"),
    ("crossed", per("affine", "tensor"), per("affine", "channel"), per("affine", "tensor"), "folded"),
    ("conv", per("unsigned", "channel"), per("affine", "channel"), per("symmetric", "tensor"), "folded"),
    ("strided", per("affine", "channel"), per("sign", "channel"), per("affine", "tensor"), "folded"),
    ("dense", per("affine", "channel"), per("affine", "channel"), per("affine", "tensor"), "requantized"),
    ("conv", per("affine", "tensor"), per("symmetric", "channel"), per("symmetric", "tensor"), "requantized"),
    ("pointwise", per("aqt", "channel"), per("affine", "channel"), per("unsigned", "tensor"), "requantized"),
]


@pytest.mark.parametrize(("name", "lhs", "rhs", "grad", "residuals"), DEFINED, ids=lambda v: getattr(v, "grid", v))
def test_folded_and_requantized_are_what_they_say(name, lhs, rhs, grad, residuals):
    op, _left, _right, _ = OPERATIONS[name]
    operands = operands_of(lhs, rhs, grad, residuals, Paths("int8", "int8", "int8"))
    run = program(op, dataclasses.replace(operands, paths=Paths()), operands)
    x, w, g = data(name)
    x[0], w[..., 1] = 0.0, 0.0  # an example and a filter without a range
    with jax.default_matmul_precision("highest"):
        for widths in ((2, 3, 4), (4, 4, 8), (8, 8, 8)):
            expected = defined(name, lhs, rhs, grad, residuals, widths, x, w, g)
            for results in run(x, w, g, traced(widths)):
                close(results, expected, 2e-6, words=f"{widths}")
    # Nor are they the same: the choices differ by more than any tolerance here.
    plain = program(op, operands_of(lhs, rhs, grad))(x, w, g, traced(widths))[0]
    assert max(distance(a, b) for a, b in zip(plain[1:], expected[1:], strict=True)) > 1e-3


def test_a_single_scale_leaves_nothing_to_fold_or_to_requantize():
    op, _left, _right, _ = OPERATIONS["conv"]
    choices = [
        operands_of(*(per("affine", "tensor"),) * 3, residuals, Paths("int8", "int8", "int8"))
        for residuals in ("quantized", "folded", "requantized")
    ]
    first, *others = program(op, *choices)(*data("conv"), traced((4, 4, 8)))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


# Values at the edge.

EDGES = (
    "zero input",
    "zero kernel",
    "zero cotangent",
    "constant input",
    "constant kernel",
    "a zero filter",
    "huge",
    "tiny",
)


def edge(kind, x, w, g):
    x, w, g = x.copy(), w.copy(), g.copy()
    if kind.startswith(("zero", "constant")):
        {"input": x, "kernel": w, "cotangent": g}[kind.split()[1]][...] = 0.0 if kind.startswith("zero") else 0.7
    if kind == "a zero filter":
        w[..., 3], x[1] = 0.0, 0.0
    scale = np.float32({"huge": 1e12, "tiny": 1e-12}.get(kind, 1.0))
    return x * scale, w * scale, g * scale


@pytest.mark.parametrize("residuals", ["quantized", "folded", "requantized"])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_zero_constant_huge_and_tiny_tensors(name, residuals):
    granularity = "tensor" if residuals == "quantized" else "channel"
    op, _left, _right, _ = OPERATIONS[name]
    grids = ("symmetric", "affine")
    fakes = [operands_of(*(per(grid, granularity),) * 2, per(grid, "tensor"), residuals) for grid in grids]
    natives = [dataclasses.replace(fake, paths=Paths("int8", "int8", "int8")) for fake in fakes]
    run = program(op, *fakes, *natives)
    with jax.default_matmul_precision("highest"):
        for kind in EDGES:
            x, w, g = edge(kind, *data(name))
            results = run(x, w, g, traced((4, 4, 8)))
            for grid, fake, on_codes in zip(grids, results[:2], results[2:], strict=True):
                for product, a, b in zip(native.PRODUCTS, on_codes, fake, strict=True):
                    assert np.all(np.isfinite(a))
                    # What is left of a scale next to zero is of its order.
                    size = np.linalg.norm(np.float64(b))
                    assert np.linalg.norm(np.float64(a) - np.float64(b)) <= 1e-6 * size + 1e-18, (kind, grid, product)
            if kind == "zero kernel":
                # Not dead: the gradient that takes a kernel away from zero is that of the float product.
                exact = jax.vjp(op, x, w)[1](g)[1]
                for *_, drhs in results:
                    assert distance(drhs, exact) < 0.2


@pytest.mark.parametrize("grid", ["symmetric", "affine"])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_an_all_zero_filter_and_an_all_zero_example_are_not_dead(name, grid):
    """Folding multiplies the cotangent by the scales; that of nothing but zeros must not take the gradient away."""
    op, _left, _right, _ = OPERATIONS[name]
    quantizers = (*(per(grid, "channel"),) * 2, per(grid, "tensor"))
    run = program(op, *(operands_of(*quantizers, "folded", p) for p in (Paths(), Paths("int8", "int8", "int8"))))
    x, w, g = data(name)
    w[..., 3], x[1] = 0.0, 0.0
    exact = [np.asarray(v) for v in jax.vjp(op, x, w)[1](g)]
    for _, dx, dw in run(x, w, g, traced((8, 8, 8))):
        assert distance(dw[..., 3], exact[1][..., 3]) < 0.05
        assert distance(dx[1], exact[0][1]) < 0.05
    only = np.zeros_like(w)  # nothing but dead filters: any common factor will do
    for _, _, dw in run(x, only, g, traced((8, 8, 8))):
        assert distance(dw, exact[1]) < 0.05


@pytest.mark.parametrize("residuals", ["quantized", "folded"])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_not_a_number_comes_out_where_it_does_in_float(name, residuals):
    granularity = "tensor" if residuals == "quantized" else "channel"
    op, _left, _right, _ = OPERATIONS[name]
    quantizers = per("symmetric", granularity), per("affine", granularity), per("symmetric", "tensor")
    run = program(op, *(operands_of(*quantizers, residuals, p) for p in (Paths(), Paths("int8", "int8", "int8"))))
    for place, value in itertools.product(range(3), (np.nan, np.inf)):
        tensors = data(name)
        tensors[place][(0,) * tensors[place].ndim] = value
        fake, on_codes = run(*tensors, traced((4, 4, 8)))
        for product, a, b in zip(native.PRODUCTS, on_codes, fake, strict=True):
            finite = np.isfinite(b)
            assert not np.any(np.isfinite(a) & ~finite), (place, value, product)
            if np.isnan(value):
                np.testing.assert_array_equal(np.isnan(a), ~finite, err_msg=f"{place} {product}")
        if place < 2:
            assert np.any(np.isnan(on_codes[0]))
        else:
            assert np.all(np.isnan(on_codes[1])) and np.all(np.isnan(on_codes[2]))


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_clipped_gradients_with_calibrated_ranges(name):
    """The same elements are cut off, natively and in float, and it is those outside the range."""
    op, left, right, _ = OPERATIONS[name]
    lhs, rhs = (Uniform(grid, per="tensor", clip_gradient=True) for grid in ("affine", "symmetric"))
    choices = [
        operands_of(lhs, rhs, per("symmetric", "tensor"), "quantized", paths)
        for paths in (Paths(), Paths("int8", "int8", "int8"), Paths("int8", "float", "int8"))
    ]
    one = jnp.ones((1,) * len(left)), jnp.ones((1,) * len(right))
    ranges = {"lhs_params": {"min": -one[0], "max": one[0]}, "rhs_params": {"absmax": one[1], "absmean": one[1]}}
    x, w, g = data(name)
    with jax.default_matmul_precision("highest"):
        fake, *others = program(op, *choices)(x, w, g, traced((4, 4, 8), **ranges))
    for results in others:
        close(results, fake)
    half = 0.5 * 2 / 15, 0.5 / 7
    for on_codes in others:
        for gradient, outside in ((on_codes[1], np.abs(x) > 1 + half[0]), (on_codes[2], np.abs(w) > 1 + half[1])):
            assert not np.any(np.where(outside, gradient, 0.0))
            assert np.mean((gradient == 0) & ~outside) < 0.01  # a sum of integers may be 0
    assert 0.1 < np.mean(fake[1] == 0) < 0.9 and 0.1 < np.mean(fake[2] == 0) < 0.9


# Small floats.


@pytest.mark.parametrize("name", ["dense", "attention", "conv", "strided", "pointwise"])
@pytest.mark.parametrize(
    ("form", "granularity", "residuals"), [("e4m3", "tensor", "quantized"), ("e5m2", "channel", "folded")]
)
def test_small_floats_equal_their_float_twin(name, form, granularity, residuals):
    op, left, right, _ = OPERATIONS[name]
    quantizer = Float(form, per=granularity)
    fake = operands_of(quantizer, quantizer, Float(form, rounding="stochastic"), residuals)
    paths = native_paths(op, fake, left, right, "fp8")
    assert paths == Paths("fp8", "fp8", "fp8")
    run = program(op, fake, dataclasses.replace(fake, paths=paths))
    with jax.default_matmul_precision("highest"):
        for widths in ((8, 8, 8), (6, 7, 6)):
            expected, actual = run(*data(name), traced(widths))
            close(actual, expected, words=f"{widths}")
