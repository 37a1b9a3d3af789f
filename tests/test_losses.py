"""Loss terms of learned scales against numpy: values and gradients, in models, and what they refuse."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import nested_reference as reference
import numpy as np
import pytest
from inject_models import Scanned, normal

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.losses import LOSSES, bin_count, deviation, inverse_scale, penalty_from_config
from qtrain.losses.thresholds import thresholds_from_config
from qtrain.precision import Precision
from qtrain.quantizers import LSQ, TRS, Float, LearnedWidth, Nested, Uniform

quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
BITS = Precision(weights=4, acts=4)
TERMS = {"inverse_scale": inverse_scale, "bin_count": bin_count, "deviation": deviation}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), bias_init=nn.initializers.normal(0.1))(x))
        return nn.Dense(3, bias_init=nn.initializers.normal(0.1))(x.mean((1, 2)))


BIASED = {"act_quantizer": None, "bias_quantizer": Nested(scale_gradient="loss")}
COLUMNS = Rule(weight_quantizer=Nested("column"), act_quantizer=None)
CASES = {
    "dense and conv": (
        Net(),
        (2, 6, 6, 2),
        [
            Rule("Conv_0", weight_quantizer=Nested("filter"), **BIASED),
            Rule("Dense_0", weight_quantizer=Nested("row", scale_gradient="loss"), **BIASED),
        ],
    ),
    "stacked": (Scanned(axes={"quant": 0}, length=2), (4, 6), [COLUMNS]),
    "stacked, one set": (Scanned(length=2), (4, 6), [COLUMNS]),
}


def begin(qmodel, x, bits=BITS):
    variables = quickly(lambda: qmodel.init(KEY, x, bits=bits))()
    return qmodel.weights(x), variables["params"], variables["quant"]


def slices(weight, value, learned):
    """(index, tensor, its steps) of each layer of a stack."""
    if not weight.stacked:
        yield (), value, learned
        return
    for index in range(value.shape[0]):
        yield (index,), value[index], learned[index] if learned.ndim == value.ndim else learned


def expected(name, weights, params, quant):
    """The term, and its gradients by name of the parameter, from its definition."""
    total, d_params, d_scales = 0.0, {}, {}
    for weight in weights:
        value = np.asarray(weight.value(params), np.float64)
        scale = np.asarray(weight.learned(quant)["scale"], np.float64)
        d_value, d_scale = np.zeros(value.shape), np.zeros(scale.shape)
        for index, own, steps in slices(weight, value, scale):
            grads = np.zeros(own.shape)
            each = []
            for group, s in zip(reference.groups(own.shape, weight.quantizer.per), np.ravel(steps), strict=True):
                values = own.ravel()[group]
                if name == "inverse_scale":
                    total += 1 / s
                    each.append(-1 / s**2)
                elif name == "bin_count":
                    total += (values.max() - values.min()) / s
                    each.append(-(values.max() - values.min()) / s**2)
                    if len(values) > 1:
                        grads.ravel()[group[values.argmax()]] += 1 / s
                        grads.ravel()[group[values.argmin()]] -= 1 / s
                else:
                    u = values / s
                    rounded = np.array([reference.code(v, s, "float32") for v in values])
                    total += ((values - rounded * s) ** 2).sum() / own.size
                    each.append((2 * s * (u - rounded) ** 2).sum() / own.size)
            d_value[index] = grads
            each = np.array(each).reshape(steps.shape)
            if scale.shape == steps.shape:
                d_scale = d_scale + each
            else:
                d_scale[index] = each
        d_params[weight.name], d_scales[weight.name] = d_value, d_scale
    return total, d_params, d_scales


@pytest.mark.parametrize("case", CASES)
def test_terms_against_numpy(case):
    model, shape, rules = CASES[case]
    x = normal(*shape)
    weights, params, quant = begin(quantize(model, rules), x)
    assert {weight.kind for weight in weights} == ({"weights"} if "stacked" in case else {"weights", "bias"})

    def everything(params, quant, bits):
        return {
            name: jax.value_and_grad(term, argnums=(1, 2))(weights, params, quant, Precision(weights=bits))
            for name, term in TERMS.items()
        }

    program = quickly(everything)
    found = program(params, quant, jnp.int32(4))
    for name, (value, (d_params, d_quant)) in found.items():
        total, want_params, want_scales = expected(name, weights, params, quant)
        np.testing.assert_allclose(value, total, rtol=1e-5, err_msg=name)
        for weight in weights:
            message = f"{name} {weight.name}"
            np.testing.assert_allclose(
                weight.value(d_params), want_params[weight.name], rtol=1e-5, atol=1e-6, err_msg=message
            )
            learned = weight.learned(d_quant)
            np.testing.assert_allclose(learned["scale"], want_scales[weight.name], rtol=1e-5, err_msg=message)
            assert np.all(np.asarray(learned.get("threshold", 0.0)) == 0), message
        scales = [np.asarray(weight.learned(d_quant)["scale"]) for weight in weights]
        sign = 1 if name == "deviation" else -1
        assert all(np.all(sign * scale >= 0) for scale in scales) and any(np.any(scale != 0) for scale in scales), name
    again = program(params, quant, jnp.int32(7))
    jax.tree.map(np.testing.assert_array_equal, found, again)  # the bits of a step are nothing to these scales
    at_float = program(params, quant, jnp.int32(24))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(at_float))
    assert program._cache_size() == 1


def test_equal_extremes_share_the_gradient_of_bin_count():
    """As the gradients of a maximum and a minimum do; a group of equal elements has none."""
    weights, params, quant = begin(quantize(nn.Dense(3), [COLUMNS]), normal(4, 5))
    kernel = jnp.array([[2.0, 7.0, 1.0], [-1.0, 7.0, 2.0], [2.0, 7.0, -3.0], [0.5, 7.0, -3.0], [2.0, 7.0, -3.0]])
    scale = quant["weights"]["scale"] = jnp.array([[0.5, 2.0, 0.25]])
    gradient = quickly(jax.grad(bin_count, argnums=1), static_argnums=0)(
        weights, params | {"kernel": kernel}, quant, BITS
    )
    thirds = np.array([[1 / 3, 0, 0], [-1, 0, 1], [1 / 3, 0, -1 / 3], [0, 0, -1 / 3], [1 / 3, 0, -1 / 3]])
    np.testing.assert_allclose(gradient["kernel"], thirds / scale, rtol=1e-6)


def test_terms_see_other_quantizers_that_learn_a_scale():
    """LSQ rescaled to the step's bits, LearnedWidth at its own; frozen and dynamic scales have no part."""
    x = normal(4, 5)
    rules = [
        Rule("layers_0", weight_quantizer=LSQ(gradient_scale=False), act_quantizer=None),
        Rule("layers_1", weight_quantizer=LearnedWidth(per="column"), act_quantizer=None),
        Rule("layers_2", weight_quantizer=TRS(), act_quantizer=None),
        Rule("layers_3", weight_quantizer=Uniform(), act_quantizer=None),
    ]
    model = nn.Sequential([nn.Dense(size) for size in (5, 4, 6, 3)])
    weights, params, quant = begin(quantize(model, rules), x)
    quant["layers_0"]["weights"]["scale"] *= 0.4
    quant["layers_1"]["weights"]["width"] += 0.3
    lsq, wide = quant["layers_0"]["weights"]["scale"] * 4.0, quant["layers_1"]["weights"]["scale"] / 8.0
    bits = Precision(weights=jnp.int32(2))
    program = quickly(
        lambda quant, params, bits: [
            jax.value_and_grad(term, argnums=(2, 1))(weights, params, quant, bits) for term in TERMS.values()
        ]
    )
    (inverse, (d_inverse, _)), (bins, _), (away, (d_away, d_params)) = program(quant, params, bits)
    wide = wide * 4.0  # two bits are the cap
    np.testing.assert_allclose(inverse, 1 / lsq + np.sum(1 / wide), rtol=1e-6)
    np.testing.assert_allclose(d_inverse["layers_0"]["weights"]["scale"], -4.0 / lsq**2, rtol=1e-6)
    np.testing.assert_allclose(d_inverse["layers_1"]["weights"]["scale"], -0.5 / np.asarray(wide) ** 2, rtol=1e-6)
    assert np.all(d_inverse["layers_1"]["weights"]["width"] == 0) and d_inverse["layers_2"]["weights"]["scale"] == 0
    kernels = [np.asarray(params[f"layers_{i}"]["kernel"], np.float64) for i in range(2)]
    spans = np.ptp(kernels[0]) / lsq, np.sum(np.ptp(kernels[1], 0) / np.ravel(wide))
    np.testing.assert_allclose(bins, sum(spans), rtol=1e-5)
    rounded = quickly(lambda: [weight.apply("__call__", params, quant, 2) for weight in weights[:2]])()
    np.testing.assert_allclose(
        away, sum(np.mean((k - np.asarray(r)) ** 2) for k, r in zip(kernels, rounded, strict=True)), rtol=1e-4
    )
    assert np.all(np.asarray(d_away["layers_1"]["weights"]["width"]) == 0)  # above the cap, and it would rise
    assert np.any(
        np.asarray(program(quant, params, Precision(weights=jnp.int32(8)))[2][1][0]["layers_1"]["weights"]["width"])
    )
    # Inside its grid a weight moves with its level; beyond the end it is drawn in.
    scale = float(lsq)
    outside = (kernels[0] <= -2 * scale) | (kernels[0] >= scale)
    assert outside.any() and not outside.all()
    gradient = np.asarray(d_params["layers_0"]["kernel"])
    np.testing.assert_array_equal(gradient != 0, outside)
    np.testing.assert_allclose(
        gradient[outside], 2 * (kernels[0] - np.asarray(rounded[0]))[outside] / kernels[0].size, rtol=1e-4
    )


def test_descent_on_each_term_does_what_it_says():
    model, shape, rules = CASES["dense and conv"]
    weights, params, quant = begin(quantize(model, rules), normal(*shape))
    for name, coarser in (("inverse_scale", True), ("bin_count", True), ("deviation", False)):
        penalty = penalty_from_config({name: {"rate": 1e-3, "schedule": "constant"}}, weights, 10)
        gradient = quickly(jax.grad(penalty, argnums=2))(jnp.int32(0), params, quant, BITS)
        for weight in weights:
            moved = -np.asarray(weight.learned(gradient)["scale"])
            assert np.all(moved >= 0 if coarser else moved <= 0) and np.any(moved != 0), (name, weight.name)


@pytest.mark.parametrize("name", TERMS)
def test_a_rate_needs_a_learned_scale(name):
    x = normal(4, 5)
    entry = {name: {"rate": 0.1, "schedule": "constant"}}
    for quantizer in (Uniform(), TRS()):
        qmodel = quantize(nn.Dense(3), Rule(weight_quantizer=quantizer, act_quantizer=LSQ()))
        message = rf"losses\.{name}\.rate=0\.1: no quantizer of a weight learns a scale.*or set it to 0"
        with pytest.raises(UsageError, match=message) as error:
            penalty_from_config(entry, qmodel.weights(x), 10)
        assert "\n" not in str(error.value)
        assert penalty_from_config({name: {"rate": 0, "schedule": "constant"}}, qmodel.weights(x), 10) is None
    with pytest.raises(UsageError, match="no quantized weight"):
        penalty_from_config(entry, (), 10)
    biased = quantize(nn.Dense(3), Rule(weight_quantizer=None, act_quantizer=None, bias_quantizer=Nested()))
    assert penalty_from_config(entry, biased.weights(x), 10) is not None
    assert set(TERMS) < set(LOSSES)


@pytest.mark.parametrize("quantizer", [Nested(), LearnedWidth(), Float("e4m3"), Uniform(rounding="stochastic")])
def test_dampening_is_refused_where_bins_have_no_middle(quantizer):
    weights = quantize(nn.Dense(3), Rule(weight_quantizer=quantizer)).weights(normal(4, 5))
    with pytest.raises(UsageError, match=r"losses\.dampening\.rate=1: 'kernel' is quantized by .*or set it to 0"):
        penalty_from_config({"dampening": {"rate": 1, "schedule": "constant"}}, weights, 10)


def test_a_schedule_of_thresholds_needs_one():
    x, settings = normal(4, 5), {"schedule": "linear_up", "final_factor": 0.1}
    weights = quantize(nn.Dense(3), Rule(weight_quantizer=Nested(scale_gradient="loss"))).weights(x)
    with pytest.raises(UsageError, match=r"quant\.threshold\.schedule='linear_up': no weight has a threshold"):
        thresholds_from_config(settings, weights, 10)
    weights = quantize(nn.Dense(3), Rule(weight_quantizer=Nested())).weights(x)
    quant = {"weights": {"threshold": jnp.float32(2.0), "scale": jnp.float32(1.0)}}
    found = thresholds_from_config(settings, weights, 10)(jnp.int32(0), quant)
    assert float(found["weights"]["threshold"]) == pytest.approx(0.2) and float(found["weights"]["scale"]) == 1
