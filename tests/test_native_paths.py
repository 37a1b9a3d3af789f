"""Which products of a native contraction run on codes, and that any choice works under jit, vmap, scan and remat."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from native_program import (
    OPERATIONS,
    close,
    conv,
    data,
    distance,
    native_paths,
    normal,
    operands_of,
    per,
    program,
    traced,
)

from qtrain.errors import UsageError
from qtrain.quantizers import Conv, Dot, Float, Operands, Paths, Traced, contract, native

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

    results = run(x, w, jnp.float32(6))
    with jax.checking_leaks():  # which traces every small function anew at every use, so only what nests most
        jax.eval_shape(jax.grad(lambda x: scanned(x, w, jnp.float32(6), remat)), x)
        jax.eval_shape(jax.vmap(jax.grad(lambda x, b: jnp.sum(layer(x, w, b))), (None, 0)), x, jnp.array([4.0, 6.0]))
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
