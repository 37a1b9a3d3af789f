"""The nested quantizer in models and configs: what is rounded, how steps begin and learn, and mistakes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import nested_reference as reference
import numpy as np
import pytest
from inject_models import MLP, Block, Scanned, Shared, normal, vmapped
from nested_tensors import MATRIX, quickly

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.inject.quantizer_config import quantizer_from_config
from qtrain.precision import Precision
from qtrain.quantizers import EWGS, Nested

KEY = jax.random.key(0)


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
