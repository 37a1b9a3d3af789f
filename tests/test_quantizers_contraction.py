"""Quantized dots and convolutions against explicit formulas in float64, forward and both gradients."""

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
from qtrain.quantizers import (
    RESIDUALS,
    Conv,
    Dot,
    Operands,
    Quantizer,
    Traced,
    Uniform,
    contract,
    noise,
    quantize_cotangent,
    straight_through,
)


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


DOTS = {  # shapes, dimension numbers, the same as an einsum
    "plain": ((8, 16), (16, 12), (((1,), (0,)), ((), ())), "ik,kj->ij"),
    "three_axes": ((2, 5, 16), (16, 12), (((2,), (0,)), ((), ())), "bik,kj->bij"),
    "vector": ((16,), (16, 12), (((0,), (0,)), ((), ())), "k,kj->j"),
    "several": ((3, 4, 6), (4, 6, 10), (((1, 2), (0, 1)), ((), ())), "ikl,klj->ij"),
    "several_crossed": ((3, 4, 6), (6, 4, 10), (((2, 1), (0, 1)), ((), ())), "ikl,lkj->ij"),
    "batch": ((3, 5, 8), (3, 8, 7), (((2,), (1,)), ((0,), (0,))), "bik,bkj->bij"),
    "attention": ((2, 5, 3, 8), (2, 7, 3, 8), (((3,), (3,)), ((0, 2), (0, 2))), "bqhd,bkhd->bhqk"),
    "all_contracted": ((4, 6), (4, 6), (((0, 1), (0, 1)), ((), ())), "kl,kl->"),
}
NUMBERS = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
CONVS = {  # input, kernel, options
    "plain": ((2, 6, 6, 4), (3, 3, 4, 5), {"padding": ((1, 1), (1, 1))}),
    "strided": ((2, 7, 6, 4), (3, 2, 4, 5), {"window_strides": (2, 1), "padding": ((1, 0), (0, 2))}),
    "dilated": ((2, 8, 8, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 1), "padding": ((0, 0), (1, 1))}),
    "input_dilated": ((2, 4, 4, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 2), "padding": ((2, 2), (1, 1))}),
    "grouped": ((2, 5, 5, 6), (3, 3, 2, 9), {"feature_group_count": 3, "padding": ((1, 1), (1, 1))}),
    "depthwise": ((2, 5, 5, 6), (3, 3, 1, 12), {"feature_group_count": 6, "window_strides": (2, 2)}),
    "pointwise": ((2, 5, 5, 6), (1, 1, 6, 3), {}),
}


def conv_of(options):
    options = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0)), **options}
    return Conv(dimension_numbers=NUMBERS, **options)


@functools.cache
def conv_taps(op, x_shape, k_shape):
    """Shape of the output, and (output, kernel, input) positions of every product."""
    lhs_dilation, rhs_dilation = op.lhs_dilation or (1, 1), op.rhs_dilation or (1, 1)
    axes = []
    for axis in (0, 1):
        size, taps, (low, high) = x_shape[axis + 1], k_shape[axis], op.padding[axis]
        padded = (size - 1) * lhs_dilation[axis] + 1 + low + high
        count = (padded - (taps - 1) * rhs_dilation[axis] - 1) // op.window_strides[axis] + 1
        products = []
        for out, tap in itertools.product(range(count), range(taps)):
            place = out * op.window_strides[axis] + tap * rhs_dilation[axis] - low
            if place % lhs_dilation[axis] == 0 and 0 <= place // lhs_dilation[axis] < size:
                products.append((out, tap, place // lhs_dilation[axis]))
        axes.append((count, products))
    return (x_shape[0], axes[0][0], axes[1][0], k_shape[-1]), list(itertools.product(axes[0][1], axes[1][1]))


def conv_reference(op, x, kernel, g=None):
    """Forward pass, or with the cotangent `g` both gradients: every product is visited one by one."""
    count = op.feature_group_count
    inputs, outputs = x.shape[-1] // count, kernel.shape[-1] // count
    shape, taps = conv_taps(op, x.shape, kernel.shape)
    out, dx, dk = np.zeros(shape), np.zeros(x.shape), np.zeros(kernel.shape)
    for ((i, di, row), (j, dj, column)), group in itertools.product(taps, range(count)):
        c = slice(group * inputs, (group + 1) * inputs)
        f = slice(group * outputs, (group + 1) * outputs)
        if g is None:
            out[:, i, j, f] += x[:, row, column, c] @ kernel[di, dj, :, f]
        else:
            dx[:, row, column, c] += g[:, i, j, f] @ kernel[di, dj, :, f].T
            dk[di, dj, :, f] += x[:, row, column, c].T @ g[:, i, j, f]
    return out if g is None else (dx, dk)


def dot_reference(equation, x, w, g=None):
    if g is None:
        return np.einsum(equation, x, w)
    left, out = equation.split("->")
    left, right = left.split(",")
    return np.einsum(f"{out},{right}->{left}", g, w), np.einsum(f"{left},{out}->{right}", x, g)


OPERATIONS = [(f"dot {name}", Dot(case[2]), case[:2], case[3]) for name, case in DOTS.items()]
OPERATIONS += [(f"conv {name}", conv_of(case[2]), case[:2], None) for name, case in CONVS.items()]

CHOICES = [  # quantizers and bits of the two operands and the cotangent
    ((Uniform("symmetric"), 4), (Uniform("symmetric"), 4), (Uniform("affine", per="tensor"), 6)),
    ((Uniform("unsigned", per="tensor", clip_gradient=True), 3), (Uniform("aqt"), 2), (None, 8)),
    ((Uniform("affine", per="tensor"), 5), (Uniform("sign"), 1), (Uniform("aqt", per="tensor"), 24)),
    ((None, 4), (Uniform("affine"), None), (Uniform("symmetric", per="tensor"), 3)),
]


def close(actual, expected, tolerance=2e-6):
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    assert difference <= tolerance * (np.linalg.norm(expected) + 1e-30), difference / np.linalg.norm(expected)


def expected_of(name, op, equation, choice, residuals, x, w, g):
    def quantized(value, quantizer, bits, axes):
        if quantizer is None or bits is None:
            return np.asarray(value, np.float64)
        return reference.fake_quantize(value, quantizer.grid, quantizer.per, bits, axes)

    (lhs, lhs_bits), (rhs, rhs_bits), (grad, grad_bits) = choice
    if name.startswith("dot"):
        axes = op.dimension_numbers[0]
        multiply = lambda *args: dot_reference(equation, *args)  # noqa: E731
    else:
        axes = ((1, 2, 3), (0, 1, 2))
        multiply = lambda *args: conv_reference(op, *args)  # noqa: E731
    x_q, w_q = quantized(x, lhs, lhs_bits, axes[0]), quantized(w, rhs, rhs_bits, axes[1])
    out = multiply(x_q, w_q)
    g_q = quantized(g, grad, grad_bits, None)
    dx, dw = multiply(x_q, w_q, g_q) if residuals == "quantized" else multiply(*map(np.float64, (x, w)), g_q)
    if lhs is not None and lhs_bits is not None and lhs.clip_gradient:
        scale, offset = reference.steps(x, lhs.grid, lhs.per, lhs_bits, axes[0])
        dx = dx * ((x - offset) / scale >= reference.bounds(lhs.grid, lhs_bits)[0] - 0.5)
    return out, dx, dw


@pytest.mark.parametrize(("name", "op", "shapes", "equation"), OPERATIONS, ids=[o[0] for o in OPERATIONS])
def test_against_explicit_formulas(name, op, shapes, equation):
    x, w = normal(shapes[0], 1), normal(shapes[1], 2)
    g = normal(jax.eval_shape(op, x, w).shape, 3)
    assert op.contracted == (op.dimension_numbers[0] if isinstance(op, Dot) else ((1, 2, 3), (0, 1, 2)))

    cases = [*itertools.product(CHOICES[:2], RESIDUALS[:2]), (CHOICES[2], "original"), (CHOICES[3], "quantized")]

    @jax.jit
    def run(bits):
        results = []
        for ((lhs, _), (rhs, _), (grad, _)), residuals in cases:
            operands = Operands(lhs, rhs, grad, residuals)
            traced = bits[len(results)]
            out, vjp = jax.vjp(lambda x, w, o=operands, t=traced: contract(op, o, x, w, t), x, w)
            results.append((out, *vjp(g)))
        return results

    actual = run([Traced(*(None if b is None else jnp.float32(b) for _, b in choice)) for choice, _ in cases])
    for (choice, residuals), results in zip(cases, actual, strict=True):
        for result, expected in zip(results, expected_of(name, op, equation, choice, residuals, x, w, g), strict=True):
            close(result, expected)
    # The two kinds of residuals differ by as much as the operands were moved, so that none passes for the other.
    for a, b in zip(actual[2][1:], actual[3][1:], strict=True):
        assert np.linalg.norm(a - b) > 0.02 * np.linalg.norm(b)


DOT = Dot((((1,), (0,)), ((), ())))
OPERANDS = Operands(Uniform(), Uniform("aqt"), Uniform("affine", per="tensor"))
X, W, G = normal((8, 16), 1), normal((16, 12), 2), normal((8, 12), 3)


def test_python_bits_give_what_traced_bits_give():
    for residuals in RESIDUALS:
        operands = dataclasses.replace(OPERANDS, residuals=residuals)

        def loss(x, w, traced, operands=operands):
            return jnp.sum(jnp.sin(contract(DOT, operands, x, w, traced)))

        grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
        static = jax.jit(jax.value_and_grad(lambda x, w: loss(x, w, Traced(4, 4, 8)), (0, 1)))
        for a, b in zip(
            jax.tree.leaves(grad(X, W, Traced(*map(jnp.float32, (4, 4, 8))))),
            jax.tree.leaves(static(X, W)),
            strict=True,
        ):
            close(a, b)


@pytest.mark.parametrize("residuals", RESIDUALS)
@pytest.mark.parametrize("field", ["lhs_bits", "rhs_bits", "grad_bits"])
def test_a_width_that_is_none(residuals, field):
    operands = dataclasses.replace(OPERANDS, residuals=residuals)
    for bits in (0, 4.5, "four"):
        with pytest.raises(UsageError, match="whole number"):
            contract(DOT, operands, X, W, Traced(**{field: bits}))
        with pytest.raises(UsageError, match="whole number"):
            jax.jit(jax.grad(lambda x, bits=bits: contract(DOT, operands, x, W, Traced(**{field: bits})).sum()))(X)


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_in_every_transformation(residuals):
    """jit, vmap (over widths, over examples), scan, remat and their gradients; no tracer escapes."""
    operands = dataclasses.replace(OPERANDS, rhs=Uniform("affine"), residuals=residuals)
    w = normal((16, 16), 4) / 4

    def layer(x, w, bits):
        return jnp.tanh(contract(DOT, operands, x, w, Traced(bits, bits, bits + 2)))

    def loss(x, w, bits):
        return jnp.sum(layer(layer(x, w, bits), w, bits) ** 2)

    def scanned(x, w, bits, body):
        return jnp.sum(lax.scan(lambda h, _: (body(h, w, bits), None), x, length=2)[0] ** 2)

    remat = jax.checkpoint(layer)

    @jax.jit
    def run(x, w, two, four):
        grad = jax.value_and_grad(loss, (0, 1))
        return {
            "four": grad(x, w, four),
            "remat": jax.value_and_grad(lambda x, w, b: jnp.sum(remat(remat(x, w, b), w, b) ** 2), (0, 1))(x, w, four),
            "scan": jax.value_and_grad(lambda x, w, b: scanned(x, w, b, remat), (0, 1))(x, w, four),
            "widths": jax.vmap(grad, (None, None, 0))(x, w, jnp.stack([two, four, jnp.float32(24)])),
            "examples": jax.vmap(layer, (0, None, None))(jnp.stack([x, 2 * x]), w, four),
            "second": layer(2 * x, w, four),
        }

    results = run(X, w, jnp.float32(2), jnp.float32(4))
    with jax.checking_leaks():  # which traces every small function anew at every use, so only what nests most
        jax.eval_shape(jax.grad(lambda x: scanned(x, w, jnp.float32(4), remat)), X)
        jax.eval_shape(jax.vmap(jax.grad(lambda x, b: jnp.sum(layer(x, w, b))), (None, 0)), X, jnp.array([2.0, 4.0]))
    for name, index in [("remat", ...), ("scan", ...), ("widths", 1)]:
        for a, b in zip(jax.tree.leaves(results[name]), jax.tree.leaves(results["four"]), strict=True):
            close(a[index], b)
    close(results["examples"][1], results["second"])
    assert abs(results["widths"][0][0] - results["four"][0]) > 1e-3 * abs(results["four"][0])


def test_one_compilation_for_all_widths():
    traces = []

    @jax.jit
    def run(x, w, bits):
        traces.append(bits)
        loss = lambda x, w: contract(DOT, OPERANDS, x, w, Traced(bits, bits, bits)).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(x, w)

    for bits in (1, 2, 3, 4, 8, 16, 23, 24, 32):
        run(X, W, jnp.float32(bits))
    assert len(traces) == 1 and run._cache_size() == 1
    plain = jax.grad(lambda x, w: jnp.sum(x @ w), (0, 1))(X, W)
    for a, b in zip(run(X, W, jnp.float32(32)), plain, strict=True):
        close(a, b)


@pytest.mark.parametrize("bits", [1, 4, 16, 32])
def test_gradient_node(bits):
    """Identity forward, bit for bit; the cotangent is quantized, and reaches both operands as one and the same."""
    for quantizer in (Uniform("affine", per="tensor"), Uniform("symmetric"), Uniform("aqt", per="row")):
        y = jnp.asarray(G) * 1e3
        out, vjp = jax.vjp(lambda y, q=quantizer: quantize_cotangent(q, y, jnp.float32(bits), None), y)
        assert np.asarray(out).tobytes() == np.asarray(y).tobytes()
        expected = reference.fake_quantize(G, quantizer.grid, quantizer.per, bits)
        tolerance = 1e-5 if bits == 16 else 2e-6  # codes flip at ties, and a step is then 3e-5 of the range
        close(vjp(jnp.asarray(G))[0], expected, tolerance)
        _, vjp = jax.vjp(
            lambda x, w, q=quantizer: contract(DOT, Operands(grad=q), x, w, Traced(grad_bits=jnp.float32(bits))), X, W
        )
        dx, dw = vjp(jnp.asarray(G))
        close(dx, expected @ W.T.astype(np.float64), tolerance)
        close(dw, X.T.astype(np.float64) @ expected, tolerance)


def test_gradient_node_rounds_once_for_both_operands():
    """With an identity for the other operand each gradient is the quantized cotangent, noise and all."""
    q = Uniform("affine", per="tensor", rounding="stochastic")
    eye, g, seed = jnp.eye(8), jnp.asarray(normal((8, 8), 9)), noise.seed(jax.random.key(0))

    @jax.jit
    def gradients(seed):
        call = lambda x, w: contract(DOT, Operands(grad=q), x, w, Traced(grad_bits=4, seed=seed))  # noqa: E731
        return jax.vjp(call, eye, eye)[1](g)

    dx, dw = gradients(seed)
    np.testing.assert_array_equal(dx, dw)
    assert len(np.unique(dx)) <= 16 and np.abs(dx - g).max() <= (g.max() - g.min()) / 15 * 1.001
    np.testing.assert_array_equal(dx, gradients(seed)[0])
    assert np.any(dx != gradients(noise.fold(seed, 1))[0])


def test_operands_and_cotangent_have_noise_of_their_own():
    q = Uniform(per="tensor", rounding="stochastic")
    square, eye = jnp.asarray(normal((16, 16), 5)), jnp.eye(16)

    @jax.jit
    def run(seed):
        left = contract(DOT, Operands(lhs=q), square, eye, Traced(lhs_bits=3, seed=seed))
        right = contract(DOT, Operands(rhs=q), eye, square, Traced(rhs_bits=3, seed=seed))
        node = lambda x: contract(DOT, Operands(grad=q), x, eye, Traced(grad_bits=3, seed=seed))  # noqa: E731
        return left, right, jax.vjp(node, eye)[1](square)[0]

    for a, b in itertools.combinations(run(noise.seed(jax.random.key(0))), 2):
        assert 0.05 < np.mean(a != b) < 0.95
    for name in ("lhs", "rhs", "grad"):
        traced = Traced(**{f"{name}_bits": 3})
        with pytest.raises(UsageError, match="needs a key"):
            jax.eval_shape(
                jax.grad(lambda x, n=name, t=traced: contract(DOT, Operands(**{n: q}), x, eye, t).sum()), eye
            )


@dataclasses.dataclass(frozen=True)
class Scaled(Quantizer):
    """Rounds to multiples of a learned step, whose gradient is that of the product."""

    def __call__(self, x, bits, params=None, *, key=None, axes=None):
        step = params["step"]
        return straight_through(x, lax.stop_gradient(jnp.round(x / step))) * step


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_learned_parameters_receive_their_gradient(residuals):
    """d(c·s)/ds = c: what the product hands back to an operand goes through that operand's own quantizer."""
    operands = Operands(lhs=Scaled(), residuals=residuals)
    step = jnp.float32(0.25)

    def call(step):
        return contract(DOT, operands, X, W, Traced(lhs_bits=4, lhs_params={"step": step}))

    assert isinstance(operands.lhs, Quantizer) and operands.lhs.describe() == "Scaled"
    d_step = jax.vjp(call, step)[1](jnp.asarray(G))[0]
    expected = np.sum(np.rint(X / 0.25) * (G.astype(np.float64) @ W.T))
    np.testing.assert_allclose(d_step, expected, rtol=1e-5)


def test_calibrated_ranges():
    ranges = {"absmax": jnp.array([[2.0]]), "absmean": jnp.array([[1.0]])}
    operands = Operands(lhs=Uniform(per="tensor"))
    out = contract(DOT, operands, X, W, Traced(lhs_bits=4, lhs_params=ranges))
    close(out, np.clip(np.rint(X * 3.5), -7, 7) / 3.5 @ W.astype(np.float64))


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_bfloat16(residuals):
    operands = dataclasses.replace(OPERANDS, residuals=residuals)

    @jax.jit
    def run(x, w):
        out, vjp = jax.vjp(lambda x, w: contract(DOT, operands, x, w, Traced(4, 4, 8)), x, w)
        return out, *vjp(jnp.asarray(G, out.dtype))

    x, w = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    for half, full in zip(run(x, w), run(x.astype(jnp.float32), w.astype(jnp.float32)), strict=True):
        assert half.dtype == jnp.bfloat16
        close(half, full, 0.02)


@pytest.mark.parametrize("numbers", [None, ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), NUMBERS])
def test_contracted_axes_of_a_convolution_however_its_layout_is_given(numbers):
    op = Conv((1, 1), "SAME", dimension_numbers=numbers)
    filters = 0 if numbers is None or numbers == ("NCHW", "OIHW", "NCHW") else 3
    assert op.contracted == ((1, 2, 3), tuple(axis for axis in range(4) if axis != filters))
    x, w = (
        (normal((2, 5, 5, 4), 1), normal((3, 3, 4, 6), 2))
        if filters
        else (normal((2, 4, 5, 5), 1), normal((6, 4, 3, 3), 2))
    )
    out = contract(op, Operands(Uniform(), Uniform()), x, w, Traced(4, 4))
    close(
        out,
        op(
            *(
                q.astype(np.float32)
                for q in (
                    reference.fake_quantize(x, "symmetric", "channel", 4, (1, 2, 3)),
                    reference.fake_quantize(w, "symmetric", "channel", 4, op.contracted[1]),
                )
            )
        ),
    )
