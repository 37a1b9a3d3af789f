"""Native execution against its float twin and against float64: the same codes, the same gradients, one program."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_reference as reference
from jax import lax

from qtrain.errors import UsageError
from qtrain.quantizers import GRIDS, RESIDUALS, Conv, Dot, Float, Operands, Paths, Traced, Uniform, contract, native

FLAX = ("NHWC", "HWIO", "NHWC")


def conv(stride=1, padding="SAME", **options):
    return Conv((stride, stride), padding, dimension_numbers=FLAX, **options)


OPERATIONS = {  # the operation, shapes, and for a dot the same as an einsum
    "dense": (Dot((((2,), (0,)), ((), ()))), (4, 6, 32), (32, 24), "abk,kn->abn"),
    "crossed": (Dot((((1, 2), (1, 0)), ((), ()))), (16, 4, 6), (6, 4, 10), "mij,jin->mn"),
    "attention": (Dot((((3,), (3,)), ((0, 2), (0, 2)))), (2, 5, 3, 8), (2, 7, 3, 8), "bqhd,bkhd->bhqk"),
    "conv": (conv(), (4, 8, 8, 16), (3, 3, 16, 16), None),
    "strided": (conv(2, ((1, 1), (1, 1))), (4, 9, 7, 5), (3, 3, 5, 7), None),
    "pointwise": (conv(2, "VALID"), (4, 8, 8, 16), (1, 1, 16, 32), None),
}
WIDTHS = (*((b, b, max(b, 2)) for b in range(1, 9)), (4, 3, 8), (8, 1, 4))
SEED = np.array([3, 4], np.uint32)


def normal(shape, seed, mean=0.3):
    return (np.random.default_rng(seed).standard_normal(shape) + mean).astype(np.float32)


def operands_of(lhs, rhs, grad, residuals="quantized", paths=None):
    return Operands(lhs, rhs, grad, residuals, Paths() if paths is None else paths)


def native_paths(op, operands, left, right, kind="int8"):
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (left, right))
    stuck = native.obstacles(op, operands, *shapes)
    return Paths(*("float" if product in stuck else kind for product in native.PRODUCTS))


@functools.cache
def program(op, *operands):
    """One compilation: result and both gradients for each of the `operands`, at traced widths."""

    @jax.jit
    def run(x, w, g, traced):
        results = []
        for choice in operands:
            out, vjp = jax.vjp(lambda x, w, c=choice: contract(op, c, x, w, traced), x, w)
            results.append((out, *vjp(g.astype(out.dtype))))
        return results

    return run


def traced(widths, **more):
    return Traced(*(None if b is None else jnp.float32(b) for b in widths), seed=jnp.asarray(SEED), **more)


def distance(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def close(results, expected, tolerance=1e-6, words=""):
    for product, a, b in zip(native.PRODUCTS, results, expected, strict=True):
        assert distance(a, b) <= tolerance, f"{words} {product}: {distance(a, b):.1e}"


def data(name, mean=0.3):
    op, left, right, _ = OPERATIONS[name]
    x, w = normal(left, 1, mean), normal(right, 2, mean)
    return x, w, normal(jax.eval_shape(op, x, w).shape, 3, 0.2) * np.float32(1e-3)


def per(grid, granularity, **options):
    return Uniform(grid, per=granularity, **options)


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


# Choices that are made apart.


def test_each_product_takes_its_own_path():
    op, _left, _right, _ = OPERATIONS["strided"]
    paths = [Paths(*choice) for choice in itertools.product(("float", "int8"), repeat=3)]
    quantizers = per("affine", "channel"), per("symmetric", "channel"), per("affine", "tensor", rounding="stochastic")
    choices = [operands_of(*quantizers, "requantized", p) for p in paths]
    with jax.default_matmul_precision("highest"):
        fake, *others = program(op, *choices)(*data("strided"), traced((4, 4, 8)))
    for path, results in zip(paths[1:], others, strict=True):
        close(results, fake, words=str(path))

    def products(operands):
        call = lambda x, w: contract(op, operands, x, w, traced((4, 4, 8)))  # noqa: E731
        pass_ = lambda x, w, g: jax.vjp(call, x, w)[1](g)  # noqa: E731
        text = str(jax.make_jaxpr(pass_)(*data("strided")))
        return text.count("preferred_element_type=int32")

    assert [products(choice) for choice in choices] == [
        sum(p == "int8" for p in choice) for choice in itertools.product(("float", "int8"), repeat=3)
    ]


def test_a_cotangent_without_a_width_is_multiplied_in_float():
    op, _left, _right, _ = OPERATIONS["dense"]
    quantizers = per("symmetric", "channel"), per("affine", "channel"), per("symmetric", "tensor")
    choices = [
        operands_of(*quantizers, residuals, paths)
        for residuals in ("quantized", "folded", "requantized")
        for paths in (Paths(), Paths("int8", "int8", "int8"))
    ]
    with jax.default_matmul_precision("highest"):
        results = program(op, *choices)(*data("dense"), traced((4, 4, None)))
    for fake, on_codes in (
        itertools.batched(results, 2)
        if hasattr(itertools, "batched")
        else zip(results[::2], results[1::2], strict=True)
    ):
        close(on_codes, fake)


SWITCH = Paths("int8", "int8", "int8", switch=True)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_one_program_switches_between_codes_and_float(name):
    op, _left, _right, _ = OPERATIONS[name]
    quantizers = (
        per("affine", "channel"),
        per("symmetric", "channel"),
        per("symmetric", "tensor", rounding="stochastic"),
    )
    run = program(op, *(operands_of(*quantizers, "folded", paths) for paths in (Paths(), SWITCH)))
    x, w, g = data(name)
    with jax.default_matmul_precision("highest"):
        for widths in ((4, 4, 4), (8, 8, 8), (9, 9, 9), (12, 8, 8), (4, 4, 12), (8, 12, 16), (32, 32, 32), (4, 32, 32)):
            fake, switched = run(x, w, g, traced(widths))
            close(switched, fake, words=f"{widths}")
        assert run._cache_size() == 1
        plain = jax.vjp(op, jnp.asarray(x), jnp.asarray(w))
        close(run(x, w, g, traced((32, 32, 32)))[1], (plain[0], *plain[1](jnp.asarray(g))))


def test_a_switch_with_fixed_widths_and_over_a_batch_of_them():
    op, _left, _right, _ = OPERATIONS["dense"]
    fake = operands_of(*(per("symmetric", "tensor"),) * 3)
    x, w, g = data("dense")

    def results(operands, widths):
        out, vjp = jax.vjp(lambda x, w: contract(op, operands, x, w, Traced(*widths)), x, w)
        return out, *vjp(g)

    @jax.jit
    def run(widths):
        pairs = [fake, dataclasses.replace(fake, paths=SWITCH)]
        fixed = [[results(o, b) for o in pairs] for b in ((4, 4, 8), (4, 4, 12), (12, 8, 8), (4, 32, None))]
        half = [[results(o, (4, widths[0], 12)) for o in pairs]]
        return fixed + half, [jax.vmap(lambda b, o=o: results(o, (b, b, b)))(widths) for o in pairs]

    with jax.default_matmul_precision("highest"):
        pairs, (expected, actual) = run(jnp.array([3.0, 8.0, 9.0, 32.0]))
    for fake, switched in pairs:
        close(switched, fake)
    close(actual, expected)


def test_widths_that_do_not_fit():
    op, _left, _right, _ = OPERATIONS["dense"]
    x, w, _ = data("dense")
    operands = operands_of(*(per("symmetric", "tensor"),) * 3, paths=Paths("int8", "int8", "int8"))
    for widths in ((9, 8, 8), (8, 12, 8), (8, 8, 16)):
        with pytest.raises(UsageError, match="do not fit 8-bit codes"):
            contract(op, operands, x, w, Traced(*widths))
    for widths in ((0, 8, 8), (8, 2.5, 8), (8, 8, "eight")):
        with pytest.raises(UsageError, match="whole number"):
            contract(op, operands, x, w, Traced(*widths))
    stochastic = dataclasses.replace(operands, grad=per("symmetric", "tensor", rounding="stochastic"))
    with pytest.raises(UsageError, match="needs a key"):
        jax.grad(lambda x: contract(op, stochastic, x, w, Traced(4, 4, 8)).sum())(x)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_widths_of_their_own_and_operands_without_are_carried_out_in_float(kind):
    op, _left, _right, _ = OPERATIONS["dense"]
    x, w, _ = data("dense")
    fake = operands_of(*(per("symmetric", "channel"),) * 2, per("symmetric", "tensor"))
    on_codes = dataclasses.replace(fake, paths=Paths("int8", "int8", "int8"))
    several = kind(np.resize([2.0, 4.0, 8.0, 12.0], (1, 24)).astype(np.float32))
    for widths in ((4, several, 8), (None, 4, 8), (4, None, 8)):
        both = [jax.jit(lambda x, w, o=o, b=widths: contract(op, o, x, w, Traced(*b)))(x, w) for o in (fake, on_codes)]
        np.testing.assert_array_equal(*both)
    half = dataclasses.replace(on_codes, lhs=None)
    plain = dataclasses.replace(half, paths=Paths())
    np.testing.assert_array_equal(*(contract(op, o, x, w, Traced(4, 4, 8)) for o in (half, plain)))


# Transformations, dtypes, memory.


@pytest.mark.parametrize("residuals", ["folded", "requantized"])
def test_in_every_transformation(residuals):
    """jit, vmap (over examples, over widths), scan, remat and their gradients; no tracer escapes."""
    op = Dot((((1,), (0,)), ((), ())))
    operands = operands_of(
        per("affine", "tensor"),
        per("symmetric", "channel"),
        per("symmetric", "tensor"),
        residuals,
        Paths(*["int8"] * 3),
    )
    x, w = normal((8, 16), 1), normal((16, 16), 4, 0.0) / 4

    def layer(x, w, bits):
        return jnp.tanh(contract(op, operands, x, w, Traced(bits, bits, bits + 2)))

    def loss(x, w, bits, body=layer):
        return jnp.sum(body(body(x, w, bits), w, bits) ** 2)

    def scanned(x, w, bits, body):
        return jnp.sum(lax.scan(lambda h, _: (body(h, w, bits), None), x, length=2)[0] ** 2)

    remat = jax.checkpoint(layer)

    @jax.jit
    def run(x, w, bits):
        return {
            "plain": jax.value_and_grad(loss, (0, 1))(x, w, bits),
            "remat": jax.value_and_grad(lambda x, w, b: loss(x, w, b, remat), (0, 1))(x, w, bits),
            "scan": jax.value_and_grad(lambda x, w, b: scanned(x, w, b, layer), (0, 1))(x, w, bits),
            "remat in a scan": jax.value_and_grad(lambda x, w, b: scanned(x, w, b, remat), (0, 1))(x, w, bits),
            "widths": jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, None, 0))(x, w, jnp.stack([bits, bits - 2])),
            "examples": jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None, None))(jnp.stack([2 * x, x]), w, bits),
        }

    with jax.checking_leaks():
        results = run(x, w, jnp.float32(6))
    for name, index in [("remat", ...), ("scan", ...), ("remat in a scan", ...), ("widths", 0), ("examples", 1)]:
        for a, b in zip(jax.tree.leaves(results[name]), jax.tree.leaves(results["plain"]), strict=True):
            assert distance(a[index], b) < 2e-6, name
    assert abs(results["widths"][0][1] / results["plain"][0] - 1) > 1e-3


def test_what_cannot_be_differentiated_says_so():
    op, _left, _right, _ = OPERATIONS["dense"]
    x, w, _ = data("dense")
    operands = operands_of(*(per("symmetric", "tensor"),) * 3, paths=Paths("int8", "int8", "int8"))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: contract(op, operands, x, w, Traced(4, 4, 8)), (x,), (x,))


@pytest.mark.parametrize("residuals", ["quantized", "folded", "requantized", "original"])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_bfloat16(name, residuals):
    op, left, right, _ = OPERATIONS[name]
    granularity = "tensor" if residuals == "quantized" else "channel"
    fake = operands_of(per("affine", "tensor"), per("symmetric", granularity), per("symmetric", "tensor"), residuals)
    run = program(op, fake, dataclasses.replace(fake, paths=native_paths(op, fake, left, right)))
    halves = [jnp.asarray(v, jnp.bfloat16) for v in data(name)]
    expected, actual = run(*halves, traced((8, 8, 8)))
    assert all(v.dtype == jnp.bfloat16 for v in actual)
    close(actual, expected, 0.02)
    full = run(*(v.astype(jnp.float32) for v in halves), traced((8, 8, 8)))[1]
    close(actual, full, 0.02)


def test_a_result_of_another_dtype_than_the_operands():
    op = dataclasses.replace(OPERATIONS["dense"][0], preferred_element_type=jnp.float32)
    operands = operands_of(*(per("symmetric", "tensor"),) * 3, paths=Paths("int8", "int8", "int8"))
    x, w, _ = (jnp.asarray(v, jnp.bfloat16) for v in data("dense"))
    out, vjp = jax.vjp(lambda x, w: contract(op, operands, x, w, Traced(4, 4, 8)), x, w)
    assert out.dtype == jnp.float32 and [v.dtype for v in vjp(out)] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_what_is_saved_for_the_backward_pass_are_codes(name):
    """A quarter of the bytes; the originals only where they are asked for, the masks of clipping one byte each."""
    op, _left, _right, _ = OPERATIONS[name]
    x, w, _ = map(jnp.asarray, data(name))
    sizes = x.size + w.size
    quantizers = per("affine", "tensor"), per("symmetric", "channel"), per("symmetric", "tensor")

    def saved(operands):
        vjp = jax.vjp(lambda x, w: contract(op, operands, x, w, Traced(4, 4, 8)), x, w)[1]
        leaves = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "dtype")]
        floats = sum(leaf.nbytes for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
        return floats, sum(leaf.nbytes for leaf in leaves if leaf.dtype in (jnp.int8, jnp.bool_))

    scales = 4 * w.shape[-1]
    for residuals in ("folded", "requantized"):
        on_codes = operands_of(*quantizers, residuals, Paths("int8", "int8", "int8"))
        floats, codes = saved(on_codes)
        assert codes == sizes and scales <= floats <= 2 * scales + 64
        assert saved(dataclasses.replace(on_codes, paths=Paths()))[0] >= 4 * sizes
    floats, codes = saved(operands_of(*quantizers, "original", Paths("int8")))
    assert floats >= 4 * sizes and codes <= sizes
    clipped = (*(dataclasses.replace(q, clip_gradient=True) for q in quantizers[:2]), quantizers[2])
    assert saved(operands_of(*clipped, "folded", Paths("int8", "int8", "int8")))[1] == 2 * sizes


# Why not.

TENSOR, CHANNEL = per("symmetric", "tensor"), per("symmetric", "channel")
AFFINE = per("affine", "tensor")
PLAIN = OPERATIONS["dense"][:3]
IMAGES = OPERATIONS["conv"][:3]
ALL = set(native.PRODUCTS)
BACKWARD = {"dlhs", "drhs"}
OBSTACLES = [  # products, words of the reason, operation, operands, widths
    (set(), "", PLAIN, (TENSOR, TENSOR, TENSOR), (8, 8, 8)),
    (set(), "", PLAIN, (CHANNEL, CHANNEL, TENSOR, "folded"), (None, None, None)),
    (set(), "", IMAGES, (CHANNEL, CHANNEL, TENSOR, "requantized"), (1, 1, 2)),
    (set(), "", PLAIN, (Float("e4m3"), Float("e4m3"), Float("e4m3")), (8, 8, 8)),
    (ALL, "activations are not quantized (act_quantizer=None)", PLAIN, (None, TENSOR, TENSOR), ()),
    (ALL, "weights are not quantized (weight_quantizer=None)", PLAIN, (TENSOR, None, TENSOR), ()),
    (BACKWARD, "gradients are not quantized (grad_quantizer=None)", PLAIN, (TENSOR, TENSOR, None), ()),
    (ALL, "act_quantizer e2m1fn/tensor has no 8-bit codes", PLAIN, (Float("e2m1"), TENSOR, TENSOR), ()),
    (BACKWARD, "grad_quantizer e3m2fn/tensor has no 8-bit codes", PLAIN, (TENSOR, TENSOR, Float("e3m2")), ()),
    (ALL, "12 bits of its weights do not fit int8 codes (at most 8)", PLAIN, (TENSOR, TENSOR, TENSOR), (8, 12, 8)),
    (BACKWARD, "9 bits of its gradients do not fit", PLAIN, (TENSOR, TENSOR, TENSOR), (8, 8, 9)),
    (
        ALL,
        "act_quantizer symmetric/column has scales that vary along",
        PLAIN,
        (per("symmetric", "column"), TENSOR, TENSOR),
        (),
    ),
    (ALL, "weight_quantizer symmetric/8 has scales that vary along", PLAIN, (TENSOR, per("symmetric", 8), TENSOR), ()),
    (ALL, "codes of two kinds (int8, float8_e4m3fn)", PLAIN, (TENSOR, Float("e4m3"), TENSOR), ()),
    (BACKWARD, "codes are of another kind", PLAIN, (TENSOR, TENSOR, Float("e5m2")), ()),
    (ALL, "not corrected in a batched product", OPERATIONS["attention"][:3], (AFFINE, TENSOR, TENSOR), ()),
    (ALL, "not laid out channels last", (Conv((1, 1), "SAME"), (4, 16, 8, 8), (16, 16, 3, 3)), (TENSOR,) * 3, ()),
    (ALL, "in groups of examples", (conv(batch_group_count=2), (4, 8, 8, 16), (3, 3, 16, 16)), (TENSOR,) * 3, ()),
    (
        ALL,
        "not corrected in a grouped convolution",
        (conv(feature_group_count=2), (4, 8, 8, 16), (3, 3, 8, 16)),
        (AFFINE, TENSOR, TENSOR),
        (),
    ),
    (
        BACKWARD,
        "backward pass of a grouped convolution",
        (conv(feature_group_count=2), (4, 8, 8, 16), (3, 3, 8, 16)),
        (TENSOR,) * 3,
        (),
    ),
    (
        BACKWARD,
        "convolution with a dilated input",
        (conv(padding="VALID", lhs_dilation=(2, 2)), (4, 8, 8, 16), (3, 3, 16, 16)),
        (TENSOR,) * 3,
        (),
    ),
    (ALL, "window has 147,456 elements", (conv(), (1, 4, 4, 16384), (3, 3, 16384, 8)), (TENSOR,) * 3, ()),
    (BACKWARD, "elements of the cotangent", (conv(), (1, 4, 4, 8), (3, 3, 8, 16384)), (TENSOR,) * 3, ()),
    (BACKWARD, "more than 131,071 pixels", (conv(), (1, 512, 512, 8), (3, 3, 8, 8)), (TENSOR,) * 3, ()),
    (BACKWARD, "residuals='original' multiplies with float", PLAIN, (TENSOR, TENSOR, TENSOR, "original"), ()),
    (BACKWARD, "grad_quantizer symmetric/row has several scales", PLAIN, (TENSOR, TENSOR, per("symmetric", "row")), ()),
    ({"drhs"}, "scales of the activations vary along it; residuals='folded'", PLAIN, (CHANNEL, TENSOR, TENSOR), ()),
    ({"dlhs"}, "scales of the weights vary along it; residuals='folded'", IMAGES, (TENSOR, CHANNEL, TENSOR), ()),
]


@pytest.mark.parametrize(("products", "words", "operation", "operands", "bits"), OBSTACLES)
def test_obstacles(products, words, operation, operands, bits):
    op, left, right = operation
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (left, right))
    found = native.obstacles(op, Operands(*operands), *shapes, bits or (None, None, None))
    assert set(found) == products
    for reason in found.values():
        assert words in reason and "\n" not in reason


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
