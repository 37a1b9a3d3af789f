"""Products of int8 codes against explicit sums in float64, which are exact: every layout, stride and window."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qtrain.quantizers import Conv, Dot, integer, integer_cpu

DOTS = {  # shapes, dimension numbers
    "matrices": ((8, 32), (32, 12), (((1,), (0,)), ((), ()))),
    "three axes": ((3, 5, 16), (16, 12), (((2,), (0,)), ((), ()))),
    "first axis": ((16, 8), (16, 12), (((0,), (0,)), ((), ()))),
    "first with last": ((16, 8), (12, 16), (((0,), (1,)), ((), ()))),
    "middle axis": ((4, 16, 6), (12, 16), (((1,), (1,)), ((), ()))),
    "middle of both": ((4, 6, 3), (5, 6, 2), (((1,), (1,)), ((), ()))),
    "several": ((3, 4, 6), (4, 6, 10), (((1, 2), (0, 1)), ((), ()))),
    "several, crossed": ((3, 4, 6), (6, 4, 10), (((2, 1), (0, 1)), ((), ()))),
    "several, first axes": ((4, 6, 3), (6, 10, 4), (((1, 0), (0, 2)), ((), ()))),
    "three, shuffled": ((3, 4, 5, 6), (6, 7, 3, 5), (((2, 0, 3), (3, 2, 0)), ((), ()))),
    "apart": ((4, 3, 6), (6, 10, 4), (((0, 2), (2, 0)), ((), ()))),
    "vector": ((16,), (16, 12), (((0,), (0,)), ((), ()))),
    "two vectors": ((16,), (16,), (((0,), (0,)), ((), ()))),
    "all contracted": ((4, 6), (6, 4), (((0, 1), (1, 0)), ((), ()))),
    "outer": ((5,), (2, 3), (((), ()), ((), ()))),
    "size one": ((1, 1), (1, 1), (((1,), (0,)), ((), ()))),
    "batch": ((3, 5, 8), (3, 8, 7), (((2,), (1,)), ((0,), (0,)))),
    "batch, last": ((5, 8, 3), (8, 3, 7), (((1,), (0,)), ((2,), (1,)))),
    "attention": ((2, 5, 3, 8), (2, 7, 3, 8), (((3,), (3,)), ((0, 2), (0, 2)))),
    "values of attention": ((2, 3, 5, 7), (2, 7, 3, 8), (((3,), (1,)), ((0, 1), (0, 2)))),
    "batch, crossed": ((2, 3, 4, 6), (3, 6, 2, 4), (((3, 2), (1, 3)), ((0, 1), (2, 0)))),
    "transformer": ((4, 64, 64), (64, 96), (((2,), (0,)), ((), ()))),
}

FLAX = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
CHANNELS = ((3, 16), (5, 7), (16, 16), (16, 32), (32, 32))
WINDOWS = tuple(itertools.product((1, 3), (1, 2, 3), ("SAME", "VALID", ((1, 2), (0, 1)))))


def convolution(channels, width, kernel, stride, padding, height=5):
    return (2, height, width, channels[0]), (kernel, kernel, *channels), {"window_strides": stride, "padding": padding}


# Every window with two choices of channels and width; all of them together are the slow test.
CONVS = {
    f"{kernel}×{kernel} stride {stride} {padding} {channels} width {width}": convolution(
        channels, width, kernel, (stride, stride), padding
    )
    for index, (kernel, stride, padding) in enumerate(WINDOWS)
    for channels, width in ((CHANNELS[index % 5], 7 + index % 2), (CHANNELS[(index + 2) % 5], 8 - index % 2))
}
CONVS |= {
    # Pixels read two, four and eight at a time, and where this cannot be: odd widths, a result of another width.
    "16 channels": convolution((16, 16), 8, 3, (1, 1), "SAME"),
    "16 channels, odd width": convolution((16, 16), 7, 3, (1, 1), "SAME"),
    "16 channels, 5×5": convolution((16, 16), 6, 5, (1, 1), "SAME"),
    "16 channels, stride 2": convolution((16, 16), 8, 3, (2, 2), "SAME"),
    "16 channels, stride 2 padded": convolution((16, 16), 8, 3, (2, 2), ((1, 1), (1, 1))),
    "16 channels, stride 2 across": convolution((16, 16), 8, 3, (1, 2), "SAME"),
    "16 channels, stride 2 down": convolution((16, 16), 8, 3, (2, 1), "SAME"),
    "16 channels, all padding before": convolution((16, 16), 8, 3, (1, 1), ((2, 0), (2, 0))),
    "16 channels, all padding behind": convolution((16, 16), 8, 3, (1, 1), ((0, 2), (0, 2))),
    "8 channels": convolution((8, 8), 8, 3, (1, 1), "SAME"),
    "8 channels, width 6": convolution((8, 8), 6, 3, (1, 1), "SAME"),
    "8 channels, 2×2": convolution((8, 8), 8, 2, (1, 1), "SAME"),
    "4 channels": convolution((4, 4), 16, 3, (1, 1), "SAME"),
    "2 channels": convolution((2, 2), 16, 3, (1, 1), "SAME"),
    "1 channel": convolution((1, 3), 15, 3, (1, 1), "SAME"),
    "3 channels": convolution((3, 16), 16, 3, (1, 1), "SAME"),
    "3 channels, stride 2": convolution((3, 16), 16, 3, (2, 2), "SAME"),
    "32 channels": convolution((32, 32), 8, 3, (1, 1), "SAME", height=8),
    "result of the input's width, none of it SAME": convolution((16, 16), 8, 3, (1, 1), ((0, 0), (3, -1))),
    # Windows
    "rectangle": ((2, 7, 6, 4), (3, 2, 4, 5), {"window_strides": (2, 1), "padding": ((1, 0), (0, 2))}),
    "row": ((2, 6, 8, 16), (1, 3, 16, 16), {"window_strides": (1, 1), "padding": "SAME"}),
    "column": ((2, 6, 8, 16), (3, 1, 16, 16), {"window_strides": (1, 1), "padding": "SAME"}),
    "dilated": ((2, 9, 8, 16), (3, 3, 16, 16), {"padding": "SAME", "rhs_dilation": (2, 2)}),
    "dilated, VALID": ((2, 9, 8, 3), (3, 3, 3, 4), {"padding": "VALID", "rhs_dilation": (2, 1)}),
    "dilated, stride 2": ((2, 9, 8, 5), (3, 3, 5, 4), dict(window_strides=(2, 2), padding="SAME", rhs_dilation=(2, 2))),
    "padded by more than the window": convolution((5, 7), 6, 3, (1, 1), ((3, 3), (4, 5))),
    "padded by more than the window, stride 2": convolution((5, 7), 6, 3, (2, 2), ((3, 4), (4, 3))),
    "cropped": convolution((5, 7), 9, 3, (1, 1), ((-1, 0), (-1, -2)), height=9),
    "as large as the image": convolution((5, 7), 5, 5, (1, 1), "VALID"),
    "16 channels, image narrower than its pixels": convolution((4, 4), 3, 3, (1, 1), "SAME"),
    "32 channels, window larger than the image": convolution((32, 32), 2, 3, (1, 1), "SAME", height=2),
    "32 channels, VALID": convolution((32, 32), 6, 3, (1, 1), "VALID"),
    "larger than the image": convolution((5, 7), 3, 5, (1, 1), "SAME", height=3),
    "1×1, padded": convolution((16, 32), 6, 1, (1, 1), ((1, 1), (1, 1))),
    "1×1, stride 2, even": convolution((16, 32), 8, 1, (2, 2), "SAME", height=8),
    "1×1, stride 2, shortcut of a residual network": convolution((32, 64), 16, 1, (2, 2), "VALID", height=16),
    "1×1, dilated": ((2, 5, 5, 16), (1, 1, 16, 8), {"padding": "VALID", "rhs_dilation": (2, 2)}),
    # One and three dimensions
    "1-D": ((3, 9, 16), (3, 16, 16), {"window_strides": (1,), "padding": "SAME"}),
    "1-D, stride 2": ((3, 9, 5), (4, 5, 7), {"window_strides": (2,), "padding": ((2, 1),)}),
    "1-D, causal": ((3, 9, 16), (3, 16, 32), {"window_strides": (1,), "padding": ((4, 0),), "rhs_dilation": (2,)}),
    "1-D, 1×1 stride 2": ((3, 9, 16), (1, 16, 32), {"window_strides": (2,), "padding": "SAME"}),
    "3-D": ((2, 4, 5, 6, 4), (3, 3, 3, 4, 5), {"window_strides": (1, 1, 1), "padding": "SAME"}),
    "3-D, stride 2": ((2, 5, 4, 6, 3), (3, 2, 3, 3, 5), {"window_strides": (2, 1, 2), "padding": "VALID"}),
    "3-D, 1×1 stride 2": ((2, 5, 4, 6, 16), (1, 1, 1, 16, 8), {"window_strides": (2, 2, 2), "padding": "SAME"}),
}
FORWARD_ONLY = {
    "grouped": ((2, 6, 6, 32), (3, 3, 8, 32), {"padding": "SAME", "feature_group_count": 4}),
    "depthwise": ((2, 6, 8, 16), (3, 3, 1, 16), {"padding": "SAME", "feature_group_count": 16}),
    "grouped, 1×1 stride 2": ((2, 6, 6, 8), (1, 1, 2, 12), dict(window_strides=(2, 2), feature_group_count=4)),
    "input dilated": ((2, 4, 5, 16), (3, 3, 16, 16), {"padding": ((2, 2), (1, 2)), "lhs_dilation": (2, 2)}),
    "input dilated, 1×1": ((2, 4, 5, 16), (1, 1, 16, 32), {"lhs_dilation": (2, 2)}),
    "input dilated, 1×1 stride 3": ((2, 4, 5, 16), (1, 1, 16, 32), dict(window_strides=(3, 3), lhs_dilation=(2, 2))),
}


def conv_of(options, dimensions=2):
    numbers = FLAX[dimensions]
    options = {"window_strides": (1,) * dimensions, "padding": ((0, 0),) * dimensions, **options}
    return Conv(dimension_numbers=numbers, **options)


def dot_sums(op, lhs, rhs, g=None):
    """The product, or with the cotangent's codes both gradients: sums over letters for the axes."""
    (left, right), (batch_left, batch_right) = op.dimension_numbers
    letters = iter("abcdefghijklmnop")
    a, b = [None] * lhs.ndim, [None] * rhs.ndim
    for i, j in itertools.chain(zip(batch_left, batch_right, strict=True), zip(left, right, strict=True)):
        a[i] = b[j] = next(letters)
    a, b = [x or next(letters) for x in a], [x or next(letters) for x in b]
    free_a = [x for i, x in enumerate(a) if i not in left and i not in batch_left]
    free_b = [x for i, x in enumerate(b) if i not in right and i not in batch_right]
    a, b, out = "".join(a), "".join(b), "".join([a[i] for i in batch_left] + free_a + free_b)
    if g is None:
        return np.einsum(f"{a},{b}->{out}", lhs, rhs, optimize=True)
    return np.einsum(f"{out},{b}->{a}", g, rhs, optimize=True), np.einsum(f"{a},{out}->{b}", lhs, g, optimize=True)


def conv_sums(op, lhs, rhs, g=None):
    """The convolution, or with the cotangent's codes both gradients: one matrix product for each tap of each group."""
    spatial = range(len(op.window_strides))
    gaps, steps = op.lhs_dilation or (1,) * len(spatial), op.rhs_dilation or (1,) * len(spatial)
    size = [(lhs.shape[1 + i] - 1) * gaps[i] + 1 for i in spatial]
    window = [(rhs.shape[i] - 1) * steps[i] + 1 for i in spatial]
    padding = op.padding
    if padding == "SAME":
        counts = [-(-size[i] // op.window_strides[i]) for i in spatial]
        totals = [max((counts[i] - 1) * op.window_strides[i] + window[i] - size[i], 0) for i in spatial]
        padding = [(total // 2, total - total // 2) for total in totals]
    elif padding == "VALID":
        padding = [(0, 0)] * len(spatial)
    before, behind = ([max(pair[side], 0) for pair in padding] for side in (0, 1))
    # A canvas that holds the dilated image and its padding; negative padding moves the window into the image.
    canvas = np.zeros((lhs.shape[0], *(size[i] + before[i] + behind[i] for i in spatial), lhs.shape[-1]))
    image = tuple(slice(before[i], before[i] + size[i], gaps[i]) for i in spatial)
    canvas[:, *image] = lhs
    start = [before[i] - padding[i][0] for i in spatial]
    counts = [(size[i] + sum(padding[i]) - window[i]) // op.window_strides[i] + 1 for i in spatial]
    inputs, outputs = rhs.shape[-2], rhs.shape[-1] // op.feature_group_count
    out = np.zeros((lhs.shape[0], *counts, rhs.shape[-1]))
    d_canvas, d_rhs = np.zeros_like(canvas), np.zeros(rhs.shape)
    for *tap, group in np.ndindex(*rhs.shape[:-2], op.feature_group_count):
        low = [start[i] + tap[i] * steps[i] for i in spatial]
        place = tuple(
            slice(low[i], low[i] + (counts[i] - 1) * op.window_strides[i] + 1, op.window_strides[i]) for i in spatial
        )
        c, f = slice(group * inputs, (group + 1) * inputs), slice(group * outputs, (group + 1) * outputs)
        if g is None:
            out[..., f] += canvas[:, *place, c] @ rhs[*tap, :, f]
        else:
            d_canvas[:, *place, c] += g[..., f] @ rhs[*tap, :, f].T
            d_rhs[*tap, :, f] += canvas[:, *place, c].reshape(-1, inputs).T @ g[..., f].reshape(-1, outputs)
    return out if g is None else (d_canvas[:, *image], d_rhs)


def codes(shape, kind, seed):
    """int8 of every value, or of one extreme."""
    if kind == "random":
        return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
    return np.full(shape, kind, np.int8)


KINDS = (("random", "random", "random"), (-128, -128, -128), (-128, 127, 127))


def check(cases, kinds=KINDS):
    """Every case's product and gradients in one program, on several sets of codes."""
    operations = {
        name: (Dot(o) if isinstance(o, tuple) else conv_of(o, len(k) - 2)) for name, (_, k, o) in cases.items()
    }

    @jax.jit
    def run(operands):
        results = {}
        for name, (lhs, rhs, g) in operands.items():
            op = operations[name]
            if isinstance(op, Dot):
                results[name] = [integer.dot(op, lhs, rhs)]
                results[name] += [integer.dot_lhs(op, g, rhs, lhs.ndim), integer.dot_rhs(op, g, lhs, rhs.ndim)]
            else:
                results[name] = [integer.conv(op, lhs, rhs)]
                if name not in FORWARD_ONLY:
                    results[name] += [integer.conv_lhs(op, g, rhs, lhs.shape), integer.conv_rhs(op, g, lhs, rhs.shape)]
        return results

    for kind in kinds:
        operands = {}
        for seed, (name, (left, right, _)) in enumerate(cases.items()):
            lhs, rhs = codes(left, kind[0], 3 * seed), codes(right, kind[1], 3 * seed + 1)
            shape = jax.eval_shape(integer._plain(operations[name], jnp.int8), lhs, rhs).shape
            operands[name] = lhs, rhs, codes(shape, kind[2], 3 * seed + 2)
        for name, results in run(operands).items():
            lhs, rhs, g = (x.astype(np.float64) for x in operands[name])
            sums = dot_sums if isinstance(operations[name], Dot) else conv_sums
            expected = [sums(operations[name], lhs, rhs)]
            if len(results) > 1:
                expected += sums(operations[name], lhs, rhs, g)
            for product, actual, exact in zip(("forward", "lhs", "rhs"), results, expected, strict=False):
                assert actual.dtype == jnp.int32, (name, product)
                np.testing.assert_array_equal(actual, exact, err_msg=f"{name}: {product}, codes {kind}")


def test_dots():
    check(DOTS)


@pytest.mark.parametrize("part", range(2))
def test_convolutions(part):
    cases = list((CONVS | FORWARD_ONLY).items())
    check(dict(cases[part::2]))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [*CHANNELS, (4, 4), (8, 8), (24, 24), (64, 64)], ids=str)
def test_every_window_width_and_number_of_channels(channels):
    windows = itertools.product(
        (6, 7, 8, 16), (1, 2, 3, 5), (1, 2, 3), ("SAME", "VALID", ((1, 1), (1, 1)), ((0, 2), (2, 1)))
    )
    for width, chunk in itertools.groupby(windows, lambda window: window[0]):
        cases = {
            f"{channels} width {width} {k}×{k} stride {s} {p}": convolution(channels, width, k, (s, s), p, 6)
            for _, k, s, p in chunk
        }
        check(cases, KINDS[:1])


def products_of(function, *arguments):
    """The contracted length of each product in a function, in order."""
    found = []
    for equation in jax.make_jaxpr(lambda *x: function(*x))(*arguments).jaxpr.eqns:  # traced anew
        if equation.primitive.name == "dot_general":
            axes = equation.params["dimension_numbers"][0][0]
            found.append(math.prod(equation.invars[0].aval.shape[axis] for axis in axes))
        elif equation.primitive.name == "conv_general_dilated":
            found.append(math.prod(equation.invars[1].aval.shape[:-1]))
    return found


LONG_DOTS = {
    "one axis": ((3, 100), (100, 2), (((1,), (0,)), ((), ()))),
    "several axes": ((7, 3, 9), (9, 7, 2), (((0, 2), (1, 0)), ((), ()))),
    "an axis longer than one allows": ((5, 2, 3, 9), (9, 5, 2, 3), (((0, 1, 2, 3), (1, 2, 3, 0)), ((), ()))),
    "batch": ((2, 3, 50), (2, 50, 4), (((2,), (1,)), ((0,), (0,)))),
}


@pytest.mark.parametrize("name", LONG_DOTS)
def test_a_contraction_that_int32_could_not_hold_is_cut(monkeypatch, name):
    left, right, numbers = LONG_DOTS[name]
    op, lhs, rhs = Dot(numbers), codes(left, "random", 0), codes(right, "random", 1)
    whole = functools.partial(integer.dot, op)
    length = math.prod(lhs.shape[i] for i in op.contracted[0])
    assert products_of(whole, lhs, rhs) == [length] and whole(lhs, rhs).dtype == jnp.int32
    monkeypatch.setattr(integer, "LONGEST", length)
    assert products_of(whole, lhs, rhs) == [length]
    monkeypatch.setattr(integer, "LONGEST", 25)
    parts = products_of(whole, lhs, rhs)
    assert sum(parts) == length and max(parts) <= 25 and len(parts) <= 2 * math.ceil(length / 25)
    cut = whole(lhs, rhs)
    assert cut.dtype == jnp.float32
    np.testing.assert_array_equal(cut, dot_sums(op, *(x.astype(np.float64) for x in (lhs, rhs))))


def test_a_kernel_gradient_that_int32_could_not_hold_is_cut(monkeypatch):
    for options in ({"padding": "SAME"}, {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))}):
        op = conv_of(options)
        lhs, shape = codes((7, 6, 6, 2), "random", 0), (3, 3, 2, 3)
        rhs = codes(shape, "random", 1)
        g = codes(jax.eval_shape(integer._plain(op, jnp.int8), lhs, rhs).shape, "random", 2)
        gradient = lambda g, lhs, op=op: integer.conv_rhs(op, g, lhs, (3, 3, 2, 3))  # noqa: E731
        exact = conv_sums(op, *(x.astype(np.float64) for x in (lhs, rhs, g)))[1]
        assert gradient(g, lhs).dtype == jnp.int32
        pixels = math.prod(g.shape[1:3])
        for longest, parts in ((7 * pixels, 1), (2 * pixels + 1, 4), (pixels - 1, 7)):
            monkeypatch.setattr(integer, "LONGEST", longest)
            assert len(products_of(gradient, g, lhs)) == parts
            np.testing.assert_array_equal(gradient(g, lhs), exact)
        monkeypatch.undo()


def test_the_longest_sum_is_exact_and_a_longer_one_does_not_overflow():
    op = Dot((((0,), (0,)), ((), ())))
    assert integer.LONGEST * 2**14 < 2**31 <= (integer.LONGEST + 1) * 2**14
    for value in (-128, 127):
        for length in (integer.LONGEST, integer.LONGEST + 1, 3 * integer.LONGEST):
            lhs, rhs = np.full(length, value, np.int8), np.full(length, -128, np.int8)
            total = integer.dot(op, lhs, rhs)
            assert total.dtype == (jnp.int32 if length <= integer.LONGEST else jnp.float32)
            np.testing.assert_allclose(
                np.float64(total), length * value * -128.0, rtol=0 if length == integer.LONGEST else 1e-7
            )
    # The kernel gradient sums over examples and pixels: 16·90² of them for the tap in the middle.
    lhs, g = np.full((17, 90, 90, 1), -128, np.int8), np.full((17, 90, 90, 1), -128, np.int8)
    gradient = integer.conv_rhs(conv_of({"padding": "SAME"}), g, lhs, (3, 3, 1, 1))
    taps = np.outer([89, 90, 89], [89, 90, 89]).reshape(3, 3, 1, 1) * 17 * 2.0**14
    assert taps.max() > 2**31 - 1
    np.testing.assert_allclose(gradient, taps, rtol=1e-7)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="pixels are put together on a CPU only")
def test_which_convolutions_see_several_pixels_as_one():
    """The formulation that most needs the cases above is what they have tested, and no other has it."""

    def pixels(case):
        left, right, options = case
        op, found = conv_of(options, len(left) - 2).explicit(left, right), []

        def look(lhs, rhs):
            wide = integer_cpu.widen(op, lhs, rhs)
            found.append(None if wide is None else wide[1].shape[-1] // lhs.shape[-1])

        jax.eval_shape(look, jax.ShapeDtypeStruct(left, jnp.int8), jax.ShapeDtypeStruct(right, jnp.int8))
        return found[0]

    seen = {name: pixels(case) for name, case in (CONVS | FORWARD_ONLY).items()}
    assert seen["16 channels"] == 2 and {2, 4, 8} <= set(seen.values())
    for name in ("5×5", "stride 2", "stride 2 across", "all padding before", "all padding behind"):
        assert seen[f"16 channels, {name}"] == 2
    # Enough channels, and what is no plain convolution of images.
    for name in ("32 channels", "dilated", "1-D", "3-D", "grouped", "depthwise", "input dilated"):
        assert seen[name] is None, name


def test_small_floats_are_added_in_float32():
    """8-bit floats of few bits, whose products and sums float32 holds exactly."""
    lhs, rhs = (jnp.asarray(codes(shape, "random", 0) // 16, jnp.float8_e4m3fn) for shape in ((8, 64), (64, 12)))
    op = Dot((((1,), (0,)), ((), ())))
    out = integer.dot(op, lhs, rhs)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.float64(lhs) @ np.float64(rhs))
    x, k = (jnp.asarray(codes(shape, "random", 0) // 16, jnp.float8_e4m3fn) for shape in ((2, 6, 6, 16), (3, 3, 16, 8)))
    for options in ({"padding": "SAME"}, {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))}):
        op = conv_of(options)
        g = jnp.asarray(codes(jax.eval_shape(integer._plain(op, x.dtype), x, k).shape, "random", 1) // 16, x.dtype)
        floats = [np.float64(v) for v in (x, k, g)]
        results = integer.conv(op, x, k), integer.conv_lhs(op, g, k, x.shape), integer.conv_rhs(op, g, x, k.shape)
        for result, exact in zip(results, (conv_sums(op, *floats[:2]), *conv_sums(op, *floats)), strict=True):
            assert result.dtype == jnp.float32
            np.testing.assert_array_equal(result, exact)


def test_operands_without_elements():
    op = Dot((((1,), (0,)), ((), ())))
    for left, right in (((0, 4), (4, 3)), ((2, 0), (0, 3))):
        out = integer.dot(op, codes(left, 0, 0), codes(right, 0, 0))
        np.testing.assert_array_equal(out, np.zeros((left[0], 3)))
        g = codes(out.shape, 0, 0)
        assert integer.dot_lhs(op, g, codes(right, 0, 0), 2).shape == left
        assert integer.dot_rhs(op, g, codes(left, 0, 0), 2).shape == right


def test_a_held_array_is_itself():
    for shape in ((), (0,), (0, 3), (5,), (3, 4, 2)):
        x = codes(shape, "random", 0)
        np.testing.assert_array_equal(jax.jit(integer.hold)(x), x)
        np.testing.assert_array_equal(jax.jit(integer_cpu.materialise)(x), x)
    tangent = jax.jvp(integer_cpu.materialise, (jnp.ones((3, 2)),), (jnp.full((3, 2), 2.0),))[1]
    np.testing.assert_array_equal(tangent, np.full((3, 2), 2.0))
    assert lax.stop_gradient(tangent).shape == (3, 2)
