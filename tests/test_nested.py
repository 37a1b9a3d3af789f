"""The nested quantizer: values, codes and every gradient against numpy; its steps; its place in models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import nested_reference as reference
import numpy as np
import optax
import pytest
from inject_models import MLP, Block, Scanned, Shared, normal, vmapped

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.inject.quantizer_config import quantizer_from_config
from qtrain.precision import Precision
from qtrain.quantizers import EWGS, Nested, distance_to_transition

KEY = jax.random.key(0)
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
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
MATRIX = jnp.asarray(np.random.default_rng(5).standard_normal((6, 8)), jnp.float32)


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


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        return nn.Dense(4)(x.mean((1, 2)))


def rule(per, path=".*", **options):
    return Rule(path, weight_quantizer=Nested(per, **options), act_quantizer=None, bias_quantizer=Nested(**options))


EAGER = {"threshold": 20.0}
MODELS = {
    "conv": (ConvNet(), (2, 8, 8, 3), [rule("filter", "Conv.*", **EAGER), rule("column", **EAGER)]),
    "scan": (Scanned(nn.remat(Block), length=2), (4, 6), rule("row", **EAGER)),
    "scan with the axis": (Scanned(axes={"quant": 0}, length=2), (4, 6), rule("column", **EAGER)),
    "shared layer": (Shared(), (4, 6), rule("row", **EAGER)),
    "vmap": (vmapped(nn.Dense)(5), (2, 4, 6), rule("row", **EAGER)),
}
BITS = Precision(weights=4)


def begin(qmodel, x):
    return quickly(lambda: qmodel.init(KEY, x, bits=BITS))()


@pytest.mark.parametrize("name", MODELS)
def test_in_models_kernels_and_biases_learn_their_steps(name):
    model, shape, rules = MODELS[name]
    x = normal(*shape)
    qmodel = quantize(model, rules)
    variables = begin(qmodel, x)
    table = qmodel.weights(x)
    assert {weight.kind for weight in table} == {"weights", "bias"}

    def loss(trained, bits):
        return jnp.sum(qmodel.apply(trained, x, bits=bits) ** 2)

    @quickly
    def step(trained, bits):
        rounded = {}
        for weight in table:
            codes = weight.apply("encode", trained["params"], trained["quant"], bits.weights)[0]
            decoded = weight.decode(codes, trained["params"], trained["quant"], bits.weights)
            own = weight.apply("__call__", trained["params"], trained["quant"], bits.weights)
            rounded[weight.name] = weight.value(trained["params"]), own, decoded
        return jax.grad(loss)(trained, bits), rounded

    trained = {"params": variables["params"], "quant": variables["quant"]}
    gradient, rounded = step(trained, Precision(weights=jnp.int32(4)))
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, trained)
    again, _ = step(trained, Precision(weights=jnp.int32(3)))
    jax.tree.map(np.testing.assert_array_equal, gradient, again)
    assert step._cache_size() == 1
    for weight in table:
        learned = weight.learned(gradient["quant"])
        assert np.all(np.asarray(learned["scale"]) <= 0) and np.all(np.asarray(learned["threshold"]) == 0), weight.name
        assert weight.kind == "bias" or np.any(np.asarray(learned["scale"]) < 0), weight.name
        value, own, decoded = map(np.asarray, rounded[weight.name])
        assert np.all(own <= value) and (weight.kind == "bias" or np.any(own != value))
        np.testing.assert_array_equal(decoded, own)


def test_calibration_makes_steps_and_thresholds_for_the_parameters_at_hand():
    qmodel = quantize(MLP((2,)), rule("row", **EAGER))
    x = normal(4, 6)
    variables = begin(qmodel, x)
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf + 0.5 * (leaf.ndim == 1), variables["params"])
    found = qmodel.calibrate({"params": doubled}, x, bits=BITS)["quant"]["Dense_0"]
    before = variables["quant"]["Dense_0"]
    np.testing.assert_allclose(found["weights"]["scale"], 2 * before["weights"]["scale"], rtol=1e-6)
    assert before["bias"]["scale"] == 1 / 8 and found["bias"]["scale"] == 0.5 / 8
    assert found["bias"]["threshold"] == 20.0 and found["bias"]["threshold"].dtype == jnp.float32


def round_all(table, params, quant):
    found = quickly(lambda: [weight.apply("__call__", params, quant, 4) for weight in table])()
    rounded = jax.tree.map(lambda leaf: leaf, params)
    for weight, value in zip(table, found, strict=True):
        rounded[weight.leaf[0]][weight.leaf[1]] = value
    return rounded


def test_a_model_computes_with_the_rounded_kernels_and_biases():
    model, shape, rules = MODELS["conv"]
    x = normal(*shape)
    qmodel = quantize(model, rules)
    variables = begin(qmodel, x)
    biased = jax.tree.map(lambda leaf: leaf + 0.03 if leaf.ndim == 1 else leaf, variables["params"])
    rounded = round_all(qmodel.weights(x), biased, variables["quant"])
    jax.tree.map(lambda a, b: np.testing.assert_(np.any(np.asarray(a) != np.asarray(b))), rounded, biased)
    found, want = quickly(
        lambda: (
            qmodel.apply({**variables, "params": biased}, x, bits=BITS),
            model.apply({"params": rounded}, x),
        )
    )()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    plan = qmodel.plan(x)
    assert plan.weight_scales == {"Conv_0": 6, "Dense_0": 4}
    assert plan["Conv_0"].weights == "nested/filter threshold 20" and "bias nested/tensor" in plan["Conv_0"].note
    assert variables["quant"]["Conv_0"]["weights"]["scale"].shape == (1, 1, 1, 6)


def test_the_ratio_is_of_the_gradient_that_reaches_the_rounded_parameter():
    """In a model, by the definition: g = ∂L/∂P_r, from a model that has P_r for its parameters."""
    model, x = MLP((5, 2)), normal(4, 6)
    qmodel = quantize(model, rule("column", threshold=2.0))
    variables = begin(qmodel, x)
    gradient = quickly(jax.grad(lambda quant: jnp.sum(qmodel.apply({**variables, "quant": quant}, x, bits=BITS) ** 2)))(
        variables["quant"]
    )
    table = qmodel.weights(x)
    rounded = round_all(table, variables["params"], variables["quant"])
    upstream = quickly(jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 2)))(rounded)
    options = {"threshold": 2.0, "epsilon": float(np.float32(1e-8)), "reduce": "sum", "scale_gradient": "ratio"}
    for weight in table:
        scale = weight.learned(variables["quant"])["scale"]
        per = weight.quantizer.per
        want = reference.nested(weight.value(variables["params"]), weight.value(upstream), scale, per, **options)[2]
        np.testing.assert_allclose(np.ravel(weight.learned(gradient)["scale"]), want, rtol=1e-4, atol=1e-5)
        assert weight.kind == "bias" or np.any(want < 0)


MISTAKES = [
    ({"threshold": 0.0}, r"threshold=0\.0: give a number above 0"),
    ({"threshold": -0.1}, r"threshold=-0\.1"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"threshold": True}, "threshold=True"),
    ({"epsilon": 0.0}, r"epsilon=0\.0"),
    ({"per": "rows"}, "per='rows': .* Did you mean 'row'"),
    ({"per": 4}, "per=4: give one of"),
    ({"per": (0, 1)}, "per=.*give one of"),
    ({"reduce": "max"}, "reduce='max'"),
    ({"scale_gradient": "ratios"}, "scale_gradient='ratios'.*Did you mean 'ratio'"),
    ({"scale_gradient": "loss", "threshold": 0.1}, r"threshold=0\.1: scale_gradient='loss' has no threshold"),
    ({"scale_gradient": "loss", "reduce": "sum"}, "reduce='sum': .* has no reduce"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES)
def test_fields_are_checked(fields, message):
    with pytest.raises(UsageError, match=message) as error:
        Nested(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "per"),
    [((5,), per) for per in ("row", "column", "spatial", "channel", "filter")]
    + [((5, 4), per) for per in ("spatial", "channel", "filter")]
    + [((3, 3, 5, 4), per) for per in ("row", "column")],
)
def test_a_granularity_must_fit_the_rank(shape, per):
    for call in (lambda q, x: q.init(x), lambda q, x: q(x, 4, {"scale": jnp.float32(1.0), "threshold": 0.1})):
        with pytest.raises(UsageError, match=rf"per={per!r} does not fit a tensor of shape .*'tensor'") as error:
            call(Nested(per), jnp.ones(shape))
        assert "\n" not in str(error.value)


def test_mistakes_in_rules_name_the_layer_before_anything_is_computed():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    for rules, message in (
        ([rule("row", "Conv.*")], r"layer 'Conv_0': its weights by 'nested/row': per='row' does not fit .*'filter'"),
        ([rule("filter", "Dense.*")], r"layer 'Dense_0': its weights by 'nested/filter': .*'column'"),
        (
            [Rule("Dense.*", weight_quantizer=None, act_quantizer=None, bias_quantizer=Nested("column"))],
            r"layer 'Dense_0': its bias by 'nested/column': per='column' does not fit .* give one of \('tensor',\)",
        ),
    ):
        with pytest.raises(UsageError, match=message) as error:
            quantize(ConvNet(), rules).plan(x)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"act_quantizer='nested/tensor' is for weights and biases"):
        Rule(act_quantizer=Nested())
    with pytest.raises(UsageError, match="grad_quantizer='nested/tensor' has parameters"):
        Rule(grad_quantizer=Nested())
    with pytest.raises(UsageError, match="EWGS wraps a quantizer on a grid"):
        EWGS(Nested())
    with pytest.raises(UsageError, match="needs its parameter 'scale'"):
        Nested()(MATRIX, 4)
    with pytest.raises(UsageError, match="needs its parameter 'threshold'"):
        Nested()(MATRIX, 4, {"scale": jnp.float32(1.0)})
    with pytest.raises(UsageError, match=r"'scale' has shape \(3,\)"):
        Nested("row")(MATRIX, 4, {"scale": jnp.ones(3), "threshold": 0.1})
    with pytest.raises(UsageError, match="give x"):
        Nested().width(None, 4, Nested().init(MATRIX))
    with pytest.raises(UsageError, match="is not a width"):
        Nested()(MATRIX, 2.5, Nested().init(MATRIX))


CONFIGS = {
    "nested": Nested(),
    "nested/row": Nested("row"),
    "nested/filter/loss": Nested("filter", scale_gradient="loss"),
    ("kind=nested", "per=spatial", "threshold=0.02", "reduce=mean"): Nested("spatial", 0.02, reduce="mean"),
}


@pytest.mark.parametrize("spec", CONFIGS)
def test_from_a_config(spec):
    given = spec
    if isinstance(spec, tuple):
        given = dict(word.split("=") for word in spec)
        given["threshold"] = float(given["threshold"])
    assert quantizer_from_config(given, "quant.weights") == CONFIGS[spec]
    assert CONFIGS[spec].describe().startswith("nested/") and hash(CONFIGS[spec]) is not None


def test_mistakes_in_a_config_name_the_key():
    for spec, message in (
        ("nested/rows", r"quant\.weights\.per='rows'.*Did you mean 'row'"),
        ("nested/row/ratios", r"quant\.weights\.scale_gradient='ratios'"),
        ("nested/4", r"quant\.weights\.per=4"),
        ("nested/row/ratio/mean", r"quant\.weights='nested/row/ratio/mean': give 'nested/per/scale_gradient'"),
        ({"kind": "nested", "threshold": -1.0}, r"quant\.weights\.threshold=-1\.0: give a number above 0"),
        ({"kind": "nested", "lambda": 1.0}, r"quant\.weights\.lambda: Nested has no such field"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            quantizer_from_config(spec, "quant.weights")
        assert "\n" not in str(error.value)
