"""Operations on codes beside their float twins, compiled together: what the tests of native execution share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.quantizers import Conv, Dot, Operands, Paths, Traced, Uniform, contract, native

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
