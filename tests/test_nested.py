"""The nested quantizer: values, codes and every gradient against numpy; its steps."""

import functools

import jax
import jax.numpy as jnp
import nested_reference as reference
import numpy as np
import optax
import pytest
from nested_tensors import MATRIX, quickly

from qtrain.errors import UsageError
from qtrain.quantizers import Nested, distance_to_transition

SHAPES = {"vector": (11,), "dense": (6, 7), "conv": (3, 2, 4, 5), "conv 1d": (3, 4, 5)}
FITTING = {
    "vector": ("tensor",),
    "dense": ("tensor", "row", "column"),
    "conv": ("tensor", "spatial", "channel", "filter"),
    "conv 1d": ("spatial",),
}
PLACES = [(kind, per) for kind, fitting in FITTING.items() for per in fitting]
GRADIENTS = {
    "ratio": {},
    "ratio, its mean": {"reduce": "mean", "threshold": 3.0, "epsilon": 1e-2},
    "loss": {"scale_gradient": "loss"},
}


def arrays(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 1, shape)
    g = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0, shape)
    return jnp.asarray(x, dtype), jnp.asarray(g, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in GRADIENTS), ("ratio", "bfloat16"), ("loss", "bfloat16")]
)
def test_against_reference(name, dtype):
    """At every granularity, with steps from coarse to fine: all values and codes, and gradients to 1e-6."""

    def measure(q, x, g, params, bits):
        y, vjp = jax.vjp(lambda x, p: q(x, bits, p), x, params)
        codes, scale = q.encode(x, bits, params)
        position = q.position(x, bits, params)
        return y, vjp(g), codes, q.decode(codes, scale), position, q.scale(x, bits, params), q.width(x, bits, params)

    cases, references = {}, {}
    for seed, (kind, per) in enumerate(PLACES):
        q = Nested(per=per, **GRADIENTS[name])
        x, g = arrays(SHAPES[kind], dtype, seed)
        params = q.init(x, 4)
        spread = np.random.default_rng(seed).uniform(-4, 1, params["scale"].shape)
        params["scale"] = jnp.asarray(params["scale"] * 2.0**spread, jnp.float32)
        cases[kind, per] = (q, x, g, params)
        references[kind, per] = reference.nested(
            np.asarray(x, np.float64),
            np.asarray(g, np.float64),
            params["scale"],
            per,
            threshold=float(np.float32(q.threshold or 0)),
            epsilon=float(np.float32(q.epsilon or 0)),
            reduce=q.reduce,
            scale_gradient=q.scale_gradient,
            dtype=dtype,
        )
    program = quickly(lambda bits: [measure(*case, bits) for case in cases.values()])
    found = program(jnp.float32(3))
    other = program(jnp.float32(7))
    assert program._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, found, other)  # bits have no influence
    for (place, (_, x, g, params)), got in zip(cases.items(), found, strict=True):
        y, (dx, d_params), codes, decoded, position, scale, width = got
        want_codes, want_values, want_gradient, want_width = references[place]
        message = f"{name} {place} {dtype}"
        assert y.dtype == decoded.dtype == dx.dtype == dtype and codes.dtype == jnp.int32, message
        np.testing.assert_array_equal(codes, want_codes, message)
        np.testing.assert_array_equal(np.asarray(y, np.float64), want_values, message)
        np.testing.assert_array_equal(decoded, y, message)
        np.testing.assert_array_equal(np.signbit(decoded), np.signbit(y), message)
        np.testing.assert_array_equal(dx, g, message)
        assert d_params["scale"].shape == params["scale"].shape == (() if place[1] == "tensor" else scale.shape)
        gradient = np.ravel(np.asarray(d_params["scale"], np.float64))
        if name == "loss":
            shared = reference.groups(x.shape, place[1])
            room = np.array([np.abs(np.asarray(g, np.float64)).ravel()[group].sum() for group in shared])
        else:
            room = np.abs(want_gradient)
            assert d_params["threshold"] == 0.0, message
        assert np.all(np.abs(gradient - want_gradient) <= 1e-6 * room), message
        assert np.any(want_gradient != 0), message
        assert np.max(np.abs(np.asarray(position) + 0.5 - want_codes)) <= 1 + 1e-3, message
        assert float(width) == pytest.approx(want_width), message


def test_levels_are_their_own_values_and_the_floor_is_exact():
    """What quantized weights hold, quantized once more, is the same: also where the quotient rounds below its code."""
    codes = jnp.arange(-3000, 3000, dtype=jnp.float32)
    q = Nested(scale_gradient="loss")
    program = jax.jit(lambda x, s: (q(x, 8, {"scale": s}), q.encode(x, 8, {"scale": s})))
    for step in (0.1, 0.3, 1 / 49, 1e-3, 7e5):
        levels = codes * jnp.float32(step)
        again, (found, _) = program(levels, jnp.float32(step))
        np.testing.assert_array_equal(again, levels)
        np.testing.assert_array_equal(found, codes)
        beneath = jnp.where(codes == 0, -1e-30, jnp.nextafter(levels, -jnp.inf))
        below, _ = program(beneath, jnp.float32(step))
        np.testing.assert_array_equal(below[1:], levels[:-1])


@pytest.mark.parametrize(("mode", "dtype"), [("ratio", "float32"), ("loss", "bfloat16")])
def test_float_widths_leave_the_tensor_alone(mode, dtype):
    q = Nested(scale_gradient=mode)
    x, g = arrays((5, 6), dtype, 0)
    params = q.init(x)

    def both(bits):
        y, vjp = jax.vjp(lambda x, p: q(x, bits, p), x, params)
        return y, vjp(g), q.width(x, bits, params)

    many = jax.jit(jax.vmap(both))(jnp.array([2, 23, 24, 32]))
    single = jax.jit(both)(jnp.int32(2))
    for index, bits in enumerate((2, 23, 24, 32)):
        y, (dx, d_params), width = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        np.testing.assert_array_equal(dx, g)
        if bits < 24:
            np.testing.assert_array_equal(y, single[0])
            np.testing.assert_allclose(d_params["scale"], single[1][1]["scale"], rtol=1e-5)
            assert width == single[2] and np.any(np.asarray(y) != np.asarray(x)) and d_params["scale"] != 0
        else:
            np.testing.assert_array_equal(y, x)
            assert width == bits and d_params["scale"] == 0
    assert q(x, 24) is x  # no parameters needed
    with pytest.raises(UsageError, match="no integer codes"):
        q.encode(x, 24, params)


@pytest.mark.parametrize("mode", ["ratio", "loss"])
def test_zero_constant_and_extreme_tensors(mode):
    q = Nested(per="row", scale_gradient=mode)

    @functools.partial(quickly, static_argnums=2)
    def run(x, factor, dtype):
        x = x.astype(dtype)
        params = q.init(x, 4)
        params["scale"] = jnp.minimum(params["scale"] * factor, 1e38)
        y, vjp = jax.vjp(lambda x, p: q(x, 8, p), x, params)
        codes, s = q.encode(x, 8, params)
        return params, y, vjp(jnp.full_like(y, 1e-3)), codes, q.decode(codes, s), q.width(x, 8, params)

    half = np.zeros((4, 6), np.float32)
    half[0] = 3.0
    tiny = np.full((4, 6), 1e-38, np.float32)
    for values in (
        np.zeros((4, 6), np.float32),
        np.full((4, 6), -0.7, np.float32),
        half,
        tiny,
        tiny * 1e-6,
        1e37 * half,
    ):
        for factor in (1.0, 0.0, -1.0, 1e-30, 1e30):
            for dtype in ("float32", "bfloat16"):
                params, y, (dx, d_params), codes, decoded, width = run(jnp.asarray(values), jnp.float32(factor), dtype)
                message = f"{values[0, 0]} {values[1, 0]} {factor} {dtype}"
                for leaf in jax.tree.leaves((params, y, dx, d_params, width)):
                    assert np.all(np.isfinite(np.asarray(leaf, np.float64))), message
                np.testing.assert_array_equal(decoded, y, message)
                assert np.abs(np.asarray(codes, np.int64)).max() <= 2**23 * (1 + 2**-7), message
                assert np.all(np.asarray(y, np.float64) <= np.asarray(jnp.asarray(values, dtype), np.float64)), message
                assert factor != 1.0 or np.all(np.asarray(params["scale"]) > 0), message
    begun = q.init(jnp.asarray(half), 4)["scale"]
    np.testing.assert_allclose(begun, 3.0 / 8)  # a row of zeros begins as the tensor does
    np.testing.assert_allclose(q.init(jnp.zeros((4, 6)), 4)["scale"], 1 / 8)
    np.testing.assert_allclose(q.init(jnp.zeros((4, 6)), 32)["scale"], 1 / 128)
    assert q(jnp.full((2, 2), jnp.nan), 4, begun_params(q, (2, 2))).shape == (2, 2)
    codes, step = q.encode(jnp.array([[1.0, jnp.nan], [1.0, 0.5]]), 4, begun_params(q, (2, 2)))
    np.testing.assert_array_equal(q.decode(codes, step), [[np.nan, np.nan], [1.0, 0.5]])  # codes hold no NaN, steps do
    assert np.all(np.isnan(q(jnp.full((2, 2), jnp.nan), 4, begun_params(q, (2, 2)))))


def test_the_ratio_below_and_above_where_tanh_is_a_polynomial():
    """λ is data, and on a CPU a branch goes by it: what either says is tanh, of one tensor and of a stack of them."""
    x, g, q = jnp.abs(MATRIX) + 0.1, 0.1 * MATRIX[::-1], Nested("column")
    scale = jnp.full((1, 8), 1e-3)

    def gradient(threshold):
        return jax.vjp(lambda s: q(x, 8, {"scale": s, "threshold": threshold}), scale)[1](g)[0]

    thresholds = jnp.array([0.01, 0.1, 0.4999, 0.5, 0.5001, 2.0, 50.0])
    stacked, single = quickly(jax.vmap(gradient))(thresholds), quickly(gradient)
    options = {"epsilon": 1e-8, "reduce": "sum", "scale_gradient": "ratio"}
    for found, threshold in zip(stacked, thresholds, strict=True):
        want = reference.nested(x, g, np.ravel(scale), "column", threshold=float(threshold), **options)[2]
        assert np.any(want < 0)
        np.testing.assert_allclose(np.ravel(found), want, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(single(threshold)), want, rtol=1e-6)


def begun_params(q, shape):
    return q.init(jnp.ones(shape), 4)


def test_a_step_below_the_finest_acts_as_that_and_can_come_back():
    for mode in ("ratio", "loss"):
        q = Nested(scale_gradient=mode)
        params = q.init(MATRIX) | {"scale": jnp.float32(-1.0)}
        s, gradient = jax.value_and_grad(lambda p, q=q: q.scale(MATRIX, 8, p).sum())(params)
        assert s == np.abs(MATRIX).max() * 2.0**-23 and gradient["scale"] == 1.0
        np.testing.assert_allclose(q(MATRIX, 8, params), MATRIX, rtol=1e-5, atol=1e-6)
    # At its floor the ratio rule still coarsens.
    q = Nested(threshold=100.0)
    params = q.init(MATRIX) | {"scale": jnp.float32(-1.0), "threshold": jnp.float32(100.0)}
    _, vjp = jax.vjp(lambda p: q(MATRIX, 8, p), params)
    assert vjp(jnp.full_like(MATRIX, 1e-4))[0]["scale"] < 0


def test_a_step_grows_where_gradients_are_small_and_stands_where_they_are_not():
    q = Nested(per="row", threshold=0.1)
    x = jnp.abs(MATRIX) + 1.0
    params = q.init(x, 8)
    g = jnp.concatenate([jnp.full((3, 8), 1e-3), jnp.full((3, 8), 10.0)])  # r ≈ 1e-3 in three rows, above λ in three
    optimizer = optax.sgd(1e-6)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: jnp.sum(g * q(x, 8, p)))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    before = params
    for _ in range(5):
        params, state = step(params, state)
    grown = np.ravel(params["scale"] - before["scale"])
    assert np.all(grown[:3] > 0) and np.all(grown[3:] == 0) and params["threshold"] == before["threshold"]
    # λ is data: written into the leaf, it changes the gradient of the same program, and a zero level always resists.
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(g * q(x, 8, p))))
    eager = gradient({**before, "threshold": jnp.float32(50.0)}, x)["scale"]
    assert np.all(np.ravel(eager) < 0)
    assert np.all(np.ravel(gradient({**before, "threshold": jnp.float32(1e-5)}, x)["scale"]) == 0)
    assert np.all(np.ravel(gradient({**before, "threshold": jnp.float32(50.0)}, x * 1e-4)["scale"]) == 0)
    assert gradient._cache_size() == 1


def test_vmap_equals_a_loop():
    q = Nested(per="column")
    x, g = arrays((3, 5, 6), "float32", 9)
    params = jax.vmap(lambda x: q.init(x, 5))(x)
    assert params["scale"].shape == (3, 1, 6) and params["threshold"].shape == (3,)

    def one(x, params, g):
        y, vjp = jax.vjp(lambda x, p: q(x, 5, p), x, params)
        return y, vjp(g), q.width(x, 5, params)

    many = jax.jit(jax.vmap(one))(x, params, g)
    for index in range(3):
        own = jax.jit(one)(*jax.tree.map(lambda leaf, index=index: leaf[index], (x, params, g)))
        jax.tree.map(lambda a, b, index=index: np.testing.assert_allclose(a[index], b, rtol=1e-6), many, own)


def test_distance_to_a_transition_is_that_to_the_nearest_level():
    q, params = Nested(), {"scale": jnp.float32(0.5), "threshold": jnp.float32(0.1)}
    x = jnp.array([0.0, 0.25, 0.45, -0.6])
    np.testing.assert_allclose(distance_to_transition(q, x, 4, params), [0, 0.5, 0.1, 0.2], atol=1e-6)
