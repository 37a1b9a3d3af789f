"""``grid="aqt", per="channel"`` against AQT itself: forward and both gradients, at the same widths."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qtrain.quantizers import Conv, Dot, Operands, Traced, Uniform, contract

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from aqt.jax.v2 import aqt_conv_general, config
except Exception as error:  # aqtp 0.9 warns that a coming numpy will break it
    pytest.skip(f"aqt cannot be imported: {error!r}", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BITS = (2, 3, 4, 8)
TOLERANCE = 1e-5  # of the norm; 1.5e-7 was measured
OPERANDS = {
    residuals: Operands(Uniform("aqt"), Uniform("aqt"), None, residuals) for residuals in ("quantized", "original")
}

DOTS = {  # shapes, dimension numbers
    "plain": ((16, 64), (64, 32), (((1,), (0,)), ((), ()))),
    "three_axes": ((4, 10, 32), (32, 24), (((2,), (0,)), ((), ()))),
    "several_contracted": ((6, 5, 16), (5, 16, 12), (((1, 2), (0, 1)), ((), ()))),
    "batch": ((3, 8, 16), (3, 16, 10), (((2,), (1,)), ((0,), (0,)))),
    "attention": ((2, 7, 3, 16), (2, 9, 3, 16), (((3,), (3,)), ((0, 2), (0, 2)))),
}


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def aqt_dot(bits, residuals):
    if residuals == "original":
        return config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
    return config.fully_quantized(fwd_bits=bits, bwd_bits=None, use_stochastic_rounding=False)


def relative(a, b):
    assert a.shape == b.shape
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize(("name"), DOTS)
def test_dot(name):
    lhs_shape, rhs_shape, numbers = DOTS[name]
    lhs, rhs = normal(lhs_shape, 1), normal(rhs_shape, 2)
    g = normal(jax.eval_shape(Dot(numbers), lhs, rhs).shape, 3)
    widths = BITS if name in ("plain", "several_contracted", "batch") else (4,)
    cases = [(bits, residuals) for bits in widths for residuals in OPERANDS]

    def results(dot):
        out, vjp = jax.vjp(dot, lhs, rhs)
        return out, *vjp(g)

    @jax.jit
    def theirs():
        dots = [aqt_dot(*case) for case in cases]
        return [results(lambda a, b, dot=dot: dot(a, b, numbers)) for dot in dots]

    @jax.jit
    def ours(widths):
        return [
            results(lambda a, b, w=w, r=r: contract(Dot(numbers), OPERANDS[r], a, b, Traced(w, w)))
            for w, (_, r) in zip(widths, cases, strict=True)
        ]

    mine = dict(zip(cases, ours([jnp.float32(bits) for bits, _ in cases]), strict=True))
    for case, aqt in zip(cases, theirs(), strict=True):
        for part, a, b in zip(("forward", "lhs gradient", "rhs gradient"), mine[case], aqt, strict=True):
            assert relative(a, b) <= TOLERANCE, (case, part)

    # The comparison has teeth: what the backward pass sees and the grid both show.
    for a, b in zip(mine[4, "quantized"][1:], mine[4, "original"][1:], strict=True):
        assert 0.05 < relative(a, b) < 0.2
    other = contract(Dot(numbers), Operands(Uniform(), Uniform()), lhs, rhs, Traced(4, 4))
    assert relative(other, mine[4, "quantized"][0]) > 0.01


NUMBERS = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
CONVS = {
    "plain": ((2, 8, 8, 6), (3, 3, 6, 10), {"padding": "SAME"}),
    "strided": ((2, 9, 8, 6), (3, 3, 6, 10), {"padding": "VALID", "window_strides": (2, 2)}),
    "dilated": ((2, 9, 9, 6), (3, 3, 6, 10), {"padding": "SAME", "rhs_dilation": (2, 2)}),
    "grouped": ((2, 8, 8, 6), (3, 3, 2, 9), {"padding": "SAME", "feature_group_count": 3}),
    "depthwise": ((2, 8, 8, 6), (3, 3, 1, 6), {"padding": "SAME", "feature_group_count": 6}),
}


def test_convolution():
    """AQT's convolution has no gradient to compare: its codes pass through a rounding that has none."""
    inputs = {name: (normal(x, 4), normal(k, 5)) for name, (x, k, _) in CONVS.items()}
    ops = {
        name: Conv(dimension_numbers=NUMBERS, **{"window_strides": (1, 1), **options})
        for name, (_, _, options) in CONVS.items()
    }

    @jax.jit
    def theirs():
        return {
            (name, bits): aqt_conv_general.make_conv_general_dilated(
                config.conv_general_dilated_make(2, lhs_bits=bits, rhs_bits=bits)
            )(*inputs[name], dimension_numbers=NUMBERS, **{"window_strides": (1, 1), **options})
            for name, (_, _, options) in CONVS.items()
            for bits in BITS
        }

    @jax.jit
    def ours(bits):
        return {
            name: contract(op, OPERANDS["quantized"], *inputs[name], Traced(bits, bits)) for name, op in ops.items()
        }

    for (name, bits), expected in theirs().items():
        assert relative(ours(jnp.float32(bits))[name], expected) <= TOLERANCE, (name, bits)
        assert relative(ours(jnp.float32(bits + 1))[name], expected) > 100 * TOLERANCE, (name, bits)
