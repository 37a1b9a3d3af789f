"""Each formulation for XLA's CPU backend gets what it is for; canaries say whether it is still needed.

Not timed: the compiled program says which kernel it calls. A canary (`pytest -m canary`) that fails is good news about
XLA: its message names what can go from `qtrain.quantizers.integer_cpu` and `qtrain.quantizers.integer` (measure first:
`qtrain bench`). The canaries are no part of the suite, which must pass with another XLA and on another processor, too:
what a miscompiled program returns is not even the same from run to run.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qtrain.quantizers import Conv, Dot, integer, integer_cpu

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="formulations for XLA's CPU backend")

FLAX = ("NHWC", "HWIO", "NHWC")
KERNEL = "__ynn_fusion"
"""How a compiled program names the kernels that multiply int8 on integer instructions."""


def compiled(function, *shapes, dtype=jnp.int8):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile().as_text()


def fast(function, *shapes):
    return KERNEL in compiled(function, *shapes)


@pytest.fixture(autouse=True, scope="module")
def integer_kernels():
    """The plainest product there is has such a kernel; where it has none there is nothing to compare with."""
    if not fast(plain_dot(1, 0), (64, 128), (128, 64)):
        pytest.skip(f"this build of XLA, or this processor, has no {KERNEL} for a product of int8 matrices")


def plain_dot(left, right):
    numbers = (((left,), (right,)), ((), ()))
    return lambda x, y: lax.dot_general(x, y, numbers, preferred_element_type=jnp.int32)


def plain_conv(x, kernel, padding=((1, 1), (1, 1)), **options):
    options = {"window_strides": (1, 1), "dimension_numbers": FLAX, "preferred_element_type": jnp.int32, **options}
    return lax.conv_general_dilated(x, kernel, padding=padding, **options)


def turned(kernel):
    return jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)


def same(stride=1, padding=((1, 1), (1, 1))):
    return Conv((stride, stride), padding, dimension_numbers=FLAX)


def kernel_gradient(x, g):
    out = plain_conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3))
    return out.transpose(1, 2, 0, 3)


IMAGE, WINDOW = (4, 8, 8, 32), (3, 3, 32, 32)
FEW, FEW_WINDOW = (4, 8, 8, 16), (3, 3, 16, 16)
MATRICES = Dot((((1,), (0,)), ((), ())))

TRICKS = {  # what can go once the plain form has the kernel; the plain form, ours, their shapes
    "dot_rhs: materialise of the transposed left operand (xᵀ·g)": (
        plain_dot(0, 0),
        lambda x, g: integer.dot_rhs(MATRICES, g, x, 2),
        ((64, 128), (64, 96)),
    ),
    "_batches: the same in a batched product (the gradient of attention's values)": (
        lambda p, g: lax.dot_general(p, g, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.int32),
        lambda p, g: integer.dot_rhs(Dot((((3,), (1,)), ((0, 1), (0, 2)))), g, p, 4),
        ((2, 4, 32, 48), (2, 4, 32, 24)),
    ),
    "conv_lhs: materialise of the turned kernel": (
        lambda g, kernel: plain_conv(g, turned(kernel)),
        lambda g, kernel: integer.conv_lhs(same(), g, kernel, IMAGE),
        (IMAGE, WINDOW),
    ),
    "conv_rhs: materialise of both transposed operands": (
        kernel_gradient,
        lambda x, g: integer.conv_rhs(same(), g, x, WINDOW),
        (IMAGE, IMAGE),
    ),
    "widen: pixels of few channels put together": (
        plain_conv,
        lambda x, kernel: integer.conv(same(), x, kernel),
        (FEW, FEW_WINDOW),
    ),
    "widen: the same with a stride": (
        lambda x, kernel: plain_conv(x, kernel, window_strides=(2, 2)),
        lambda x, kernel: integer.conv(same(2), x, kernel),
        (FEW, FEW_WINDOW),
    ),
    "_within: padding that makes the result larger than the image, written out": (
        lambda g, kernel: plain_conv(g, integer.hold(turned(kernel)), ((2, 2), (2, 2))),
        lambda g, kernel: integer.conv_lhs(same(1, "VALID"), g, kernel, (4, 10, 10, 32)),
        (IMAGE, WINDOW),
    ),
    "_within: the padding of an image smaller than the window, written out": (
        plain_conv,
        lambda x, kernel: integer.conv(same(), x, kernel),
        ((4, 2, 2, 32), WINDOW),
    ),
    "place: a dilated cotangent written out": (
        lambda g, kernel: plain_conv(g, integer.hold(turned(kernel)), ((1, 2), (1, 2)), lhs_dilation=(2, 2)),
        lambda g, kernel: integer.conv_lhs(same(2), g, kernel, (4, 16, 16, 32)),
        (IMAGE, WINDOW),
    ),
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_formulation_holds(name):
    _, ours, shapes = TRICKS[name]
    assert fast(ours, *shapes), f"{name}: XLA sees through it, the product is no longer on integer instructions"


@pytest.mark.canary
@pytest.mark.parametrize("name", TRICKS)
def test_a_formulation_is_needed(name):
    plain, _, shapes = TRICKS[name]
    assert not fast(plain, *shapes), f"{name}: no longer needed, the plain form has the kernel too"


@pytest.mark.canary
@pytest.mark.parametrize(
    ("name", "trick"),
    {
        "a barrier": lax.optimization_barrier,
        "a copy": jnp.copy,
        "a loop of one trip": lambda x: lax.fori_loop(0, 1, lambda _, v: v, x),
        "a slice of all of it": lambda x: lax.dynamic_slice(x, (0, 0), x.shape),
    }.items(),
)
def test_nothing_simpler_materialises(name, trick):
    dot = lambda x, g: plain_dot(1, 0)(trick(x.T), g)  # noqa: E731
    assert not fast(dot, (64, 128), (64, 96)), f"materialise: {name} would do now, instead of a gather"


@pytest.mark.canary
def test_a_gather_that_fills_does_more():
    take = lambda mode: compiled(lambda x: jnp.take(x, jnp.arange(8), axis=0, mode=mode), (8, 16))  # noqa: E731
    assert " select(" not in take("clip")
    assert " select(" in take(None), 'materialise: jnp.take without mode="clip" is a plain gather now, too'


@pytest.mark.canary
def test_how_many_channels_have_a_kernel():
    """Where `widen` ends: as many channels have none, one more on either side has."""
    few = integer_cpu._FEW
    for inputs, outputs in ((few, few), (few, 1), (4, few), (few + 1, 1), (1, few + 1), (few + 1, few + 1)):
        has_one = fast(plain_conv, (4, 8, 8, inputs), (3, 3, inputs, outputs))
        assert has_one == (max(inputs, outputs) > few), f"_FEW: XLA now draws the line elsewhere, at {inputs, outputs}"


@pytest.mark.canary
def test_which_convolutions_have_a_kernel():
    """What `_within` leaves as it is: window and result no larger than the image, with a stride or without."""
    for taps, stride, padding in (
        (3, 1, (1, 1)),
        (3, 2, (0, 1)),
        (3, 1, (2, 0)),
        (4, 1, (1, 2)),
        (1, 2, (3, 3)),
        (8, 1, (0, 0)),
    ):
        assert fast(
            lambda x, kernel, s=stride, p=padding: plain_conv(x, kernel, (p, p), window_strides=(s, s)),
            IMAGE,
            (taps, taps, 32, 32),
        ), f"_within: XLA has no kernel for {taps}×{taps}, stride {stride}, padding {padding}"


def gaps(interior, low=0, high=0):
    """Zeros between and around the pixels, as a pad."""
    sides = (low, high, interior)
    return lambda x: lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), sides, sides, (0, 0, 0)])


GARBAGE = {  # a pad that XLA moves into a convolution, the window, the convolution's own padding
    "1×1, gaps (the input gradient of a stride)": (gaps(1), 1, 0),
    "1×1, gaps and an end": (gaps(1, 0, 1), 1, 0),
    "1×1, a frame": (gaps(0, 1, 1), 1, 0),
    "3×3, gaps": (gaps(1, 1, 2), 3, 0),
    "3×3, more behind than before": (gaps(0, 0, 1), 3, 1),
    "3×3, gaps behind a gather": (lambda x: integer_cpu.materialise(gaps(1, 1, 2)(x)), 3, 0),
}


@pytest.mark.canary
@pytest.mark.parametrize("name", GARBAGE)
def test_a_pad_moved_into_a_convolution_still_gives_garbage(name):
    """A miscompile: XLA has chosen its kernel, then moves the pad into the window, and the kernel cannot do that.

    What `place` and `_within` avoid, whose products `tests/test_integer.py` compares bit for bit.
    """
    pad, window, own = GARBAGE[name]
    rng = np.random.default_rng(0)
    x, kernel = (rng.integers(-128, 128, s).astype(np.int8) for s in ((2, 4, 4, 32), (window, window, 32, 32)))
    own = ((own, own), (own, own))
    actual = jax.jit(lambda x, kernel: plain_conv(pad(x), kernel, own))(x, kernel)
    # In two programs, so that there is nothing to be moved: the same operation is exact.
    apart = jax.jit(lambda x, kernel: plain_conv(x, kernel, own))(jax.jit(pad)(x), kernel)
    floats = lambda a: a.astype(jnp.float32)  # noqa: E731
    exact = jax.jit(lambda x, k: plain_conv(x, k, own, preferred_element_type=None, precision=lax.Precision.HIGHEST))(
        floats(jax.jit(pad)(x)), floats(kernel)
    )
    np.testing.assert_array_equal(apart, exact)
    assert np.any(actual != exact), f"{name}: XLA computes this correctly now; place and _within may use pads"


@pytest.mark.canary
def test_a_residual_chain_is_computed_anew_in_every_consumer():
    """What `integer.hold` of activations and cotangents is for: the number of operations is quadratic without it."""

    def operations(hold, depth):
        def chain(x, kernels):
            for kernel in kernels:
                x = hold(x)
                x = jnp.maximum(x + x @ kernel, 0.0)
            return x

        matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32)
        text = jax.jit(chain).lower(matrix, [matrix] * depth).compile().as_text()
        return len(re.findall(r"= f32\[64,64\]\S* (?:add|maximum)\(", text))

    assert operations(integer.hold, 8) == 16 and operations(integer.hold, 16) == 32
    for hold in (lambda x: x, lax.optimization_barrier):
        growth = operations(hold, 16) / operations(hold, 8)
        assert growth > 3, (
            f"hold: XLA no longer repeats a residual chain in its consumers (×{growth:.1f} for twice the depth)"
        )
