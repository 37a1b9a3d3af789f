"""Learned quantizer parameters under injection: where they live, how they begin, that they are trained."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import MLP, DecoratedBlock, RematDense, Scanned, Shared, Stack, normal, vmapped

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer, straight_through

KEY = jax.random.key(0)
BITS = Precision(weights=4, acts=4)


@dataclasses.dataclass(frozen=True)
class Scaled(Quantizer):
    """x̂ = s·round(x/s), the gradient of s as it follows; s = mean|x| + bits/100 to begin with."""

    per: str = "tensor"

    @property
    def learns(self):
        return True

    @property
    def frozen(self):
        return frozenset({"fixed"})

    def init(self, x, bits=8, *, axes=None):
        mean = jnp.mean(jnp.abs(x), axes, keepdims=True) if self.per == "channel" else jnp.mean(jnp.abs(x))
        return {"scale": mean.astype(jnp.float32) + bits / 100, "fixed": jnp.float32(2.0)}

    def __call__(self, x, bits, params=None, *, key=None, axes=None):
        in_steps = x / params["scale"]
        return straight_through(in_steps, jnp.round(in_steps)) * params["scale"]


LEARN = Rule(weight_quantizer=Scaled(), act_quantizer=Scaled())
MODELS = {
    "mlp": (MLP(), (4, 6)),
    "scan": (Scanned(), (4, 6)),
    "scan with the axis": (Scanned(axes={"quant": 0}), (4, 6)),
    "remat": (RematDense(3), (4, 6)),
    "shared layer": (Shared(), (4, 6)),
    "vmap": (vmapped(MLP)(), (3, 4, 6)),
    "nn.jit": (Stack(DecoratedBlock), (4, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_learned_parameters_begin_are_calibrated_and_get_a_gradient(name):
    model, shape = MODELS[name]
    x = normal(*shape)
    qmodel = quantize(model, LEARN)
    variables = qmodel.init(KEY, x, bits=BITS)
    plain = model.init(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain["params"])
    calibrated = qmodel.calibrate(plain, x, bits=BITS)
    assert jax.tree.structure(calibrated["quant"]) == jax.tree.structure(variables["quant"])
    assert jax.tree.map(jnp.shape, calibrated["quant"]) == jax.tree.map(jnp.shape, variables["quant"])
    step = jax.jit(
        jax.grad(lambda quant, bits: jnp.sum(qmodel.apply({**calibrated, "quant": quant}, x, bits=bits) ** 2))
    )
    gradient = step(calibrated["quant"], BITS)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    scales = [leaf for path, leaf in leaves if path[-1].key == "scale"]
    assert all(np.any(leaf != 0) for leaf in scales) and len(scales) == 2 * len(
        [row for row in qmodel.plan(x) if row.quantized]
    )
    assert not any(np.any(leaf) for path, leaf in leaves if path[-1].key == "fixed")


def test_weights_begin_with_their_own_values_and_activations_with_what_reaches_them():
    model, x = MLP(), normal(4, 6)
    qmodel = quantize(model, LEARN)
    plain = model.init(KEY, x)
    found = jax.device_get(qmodel.calibrate(plain, x, bits=Precision(weights=2, acts=3)))["quant"]
    kernel = np.asarray(plain["params"]["Dense_0"]["kernel"])
    np.testing.assert_allclose(found["Dense_0"]["weights"]["scale"], np.abs(kernel).mean() + 0.02, rtol=1e-6)
    np.testing.assert_allclose(found["Dense_0"]["acts"]["scale"], np.abs(np.asarray(x)).mean() + 0.03, rtol=1e-6)
    # The second layer begins with the output of the quantized first one.
    _, state = quantize(model, LEARN).apply(
        {**plain, "quant": found}, x, bits=Precision(weights=2, acts=3), capture_intermediates=True, mutable=True
    )
    hidden = nn.relu(state["intermediates"]["Dense_0"]["__call__"][0])
    np.testing.assert_allclose(found["Dense_1"]["acts"]["scale"], np.abs(hidden).mean() + 0.03, rtol=1e-5)


def test_a_scanned_layer_has_one_set_the_average_of_its_iterations_or_one_each():
    x = normal(4, 6)
    each = Scanned(axes={"quant": 0})
    plain = Scanned().init(KEY, x)
    own = quantize(each, LEARN).calibrate(plain, x, bits=BITS)["quant"]["layers"]["block"]["up"]["weights"]["scale"]
    shared = quantize(Scanned(), LEARN).calibrate(plain, x, bits=BITS)["quant"]["layers"]["block"]["up"]["weights"]
    kernels = np.asarray(plain["params"]["layers"]["block"]["up"]["kernel"])
    np.testing.assert_allclose(own, np.abs(kernels).mean((1, 2)) + 0.04, rtol=1e-6)
    np.testing.assert_allclose(shared["scale"], np.mean(own), rtol=1e-6)
    plan = quantize(Scanned(), LEARN).plan(x)
    assert "one learned scale for every iteration" in plan["layers/block/up"].note and not plan["stem"].note
    assert "iteration" not in quantize(each, LEARN).plan(x)["layers/block/up"].note


def test_the_bias_learns_too():
    x = normal(4, 6)
    qmodel = quantize(nn.Dense(3), Rule(weight_quantizer=None, act_quantizer=None, bias_quantizer=Scaled()))
    variables = qmodel.init(KEY, x)
    np.testing.assert_allclose(variables["quant"]["bias"]["scale"], 0.08)  # a bias begins as 0
    out = qmodel.apply({**variables, "params": {**variables["params"], "bias": jnp.full(3, 0.1)}}, x, bits=BITS)
    np.testing.assert_allclose(out, x @ variables["params"]["kernel"] + 0.08, rtol=1e-5)


def test_the_table_of_quantized_weights():
    x = normal(4, 6)
    rules = [Rule(path="head", weights=8, weight_quantizer=Scaled("channel")), LEARN]
    for model in (Scanned(), Scanned(axes={"quant": 0})):
        qmodel = quantize(model, rules)
        variables = qmodel.init(KEY, x)
        table = {weight.name: weight for weight in qmodel.weights(x)}
        assert set(table) == {
            "stem/kernel",
            "head/kernel",
            "layers/block/up/kernel",
            "layers/block/down/kernel",
        }
        stacked = table["layers/block/up/kernel"]
        assert stacked.stacked == 1 and table["stem/kernel"].stacked == 0
        assert table["head/kernel"].bits(BITS) == 8 and stacked.bits(BITS) == 4
        assert stacked.bits({"layers/block/up": Precision(weights=3)}) == 3
        own = stacked.apply("__call__", variables["params"], variables["quant"], 4)
        kernel = stacked.value(variables["params"])
        scale = variables["quant"]["layers"]["block"]["up"]["weights"]["scale"]
        for index in range(3):
            s = scale[index] if scale.ndim else scale
            np.testing.assert_allclose(own[index], np.round(kernel[index] / s) * s, rtol=1e-6)


def test_mistakes_are_named():
    x = normal(4, 6)
    qmodel = quantize(MLP(), LEARN)
    with pytest.raises(UsageError, match=r"'Dense_0': its acts have no learned parameters.*qmodel\.calibrate"):
        qmodel.apply(MLP().init(KEY, x), x, bits=BITS)
    with pytest.raises(UsageError, match=r"'Dense_0': act_quantizer .* learns a scale per example.*per='tensor'"):
        quantize(MLP(), Rule(act_quantizer=Scaled("channel"))).init(KEY, x)
    scanned = quantize(Scanned(), LEARN)
    variables = Scanned().init(KEY, x)
    with pytest.raises(UsageError, match="outside jit"):
        jax.jit(lambda v: scanned.calibrate(v, x, bits=BITS))(variables)


def test_the_float_model_needs_no_learned_parameters():
    x = normal(4, 6)
    variables = MLP().init(KEY, x)
    np.testing.assert_array_equal(quantize(MLP(), LEARN).apply(variables, x), MLP().apply(variables, x))
