"""Parameters outside layers and what modules return, by path, under scan, remat and vmap."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pulled_back import KEY, TENSOR, bits, jit, normal, pulled_back
from quantizer_reference import fake_quantize

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.models.residual import Residual
from qtrain.quantizers import LSQ


class Stream(nn.Module):
    """Branches that meet, and raw parameters, under a scan or a vmap."""

    @nn.compact
    def __call__(self, x, _=None):
        gain = self.param("gain", nn.initializers.normal(), (x.shape[-1],))
        x = Residual(name="residual")(x, nn.Dense(x.shape[-1], name="dense")(x) * gain)
        return x, None


class Streams(nn.Module):
    """Three layers."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        kind = nn.remat(Stream) if self.remat else Stream
        layers = nn.scan(kind, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        ensemble = nn.vmap(Stream, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        return ensemble(name="members")(x)[0].sum(0)


def test_outputs_and_parameters_under_transformations():
    model, x, width = Streams(remat=True), normal(1, 2, 6), 3
    rules = [
        Rule(".*/gain", ops="param", weight_quantizer=TENSOR),
        Rule(".*residual", ops="output", act_quantizer=TENSOR, grad_quantizer=TENSOR),
    ]
    qmodel = quantize(model, rules)
    variables = jit(qmodel.init)(KEY, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    assert jax.tree.all(jax.tree.map(np.array_equal, variables["params"], jit(model.init)(KEY, x)["params"]))

    def quantized(tensor):
        return fake_quantize(tensor, "symmetric", "tensor", width)

    def layer(own, index, x):
        return x @ own["dense"]["kernel"][index] + own["dense"]["bias"][index], quantized(own["gain"][index])

    value = x.astype(np.float64)
    for index in range(3):
        hidden, gain = layer(params["layers"], index, value)
        value = quantized(value + hidden * gain)
    ends = [layer(params["members"], index, value) for index in range(2)]
    expected = sum(quantized(value + hidden * gain) for hidden, gain in ends)
    function = functools.partial(qmodel.apply, bits=bits(float(width)))
    out, cotangent, found = pulled_back(lambda p: function({"params": p}, x), variables["params"])
    np.testing.assert_allclose(out, expected, atol=1e-5)

    for index, (hidden, _) in enumerate(ends):
        of_gain = np.sum(quantized(cotangent) * hidden, axis=0)
        np.testing.assert_allclose(found["members"]["gain"][index], of_gain, atol=1e-5)

    plan = qmodel.plan(x)
    assert {row.path: row.op for row in plan if row.quantized} == {
        "layers/residual/output": "output",
        "members/residual/output": "output",
        "layers/gain": "param",
        "members/gain": "param",
    }
    assert {w.name: (w.shape, w.stacked) for w in qmodel.weights(x)} == {
        "layers/gain": ((3, 6), 1),
        "members/gain": ((2, 6), 1),
    }


def test_learned_parameters_of_raw_parameters_and_outputs():
    model, x = Streams(), normal(1, 2, 6)
    lsq = LSQ(per="tensor")
    rules = [Rule(".*/gain", ops="param", weight_quantizer=lsq), Rule(".*residual", ops="output", act_quantizer=lsq)]
    qmodel = quantize(model, rules)
    variables = qmodel.calibrate(jit(qmodel.init)(KEY, x), x, bits=bits(4.0))
    assert jnp.shape(variables["quant"]["layers"]["gain"]["weights"]["scale"]) == (3,)
    value, gradient = jit(jax.value_and_grad(lambda v: jnp.sum(qmodel.apply(v, x, bits=bits(4.0)) ** 2)))(variables)
    scales = [gradient["quant"][name]["gain"]["weights"]["scale"] for name in ("layers", "members")]
    assert all(np.all(scale != 0) for scale in scales) and np.isfinite(value)
    assert gradient["quant"]["layers"]["residual"]["output"]["acts"]["scale"] != 0
    for weight in qmodel.weights(x):
        assert weight.learned(variables["quant"])["scale"].shape == weight.shape[:1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("absent", ops="param"), "rule path='absent' matches no module"),
        (Rule("layers/gain", ops="output"), "rule path='layers/gain' matches no module"),
        (Rule(".*dense", ops="param"), "matches only what cannot be quantized"),
        (
            Rule(".*gain", ops="param", weight_quantizer=dataclasses.replace(TENSOR, statistics=0.9)),
            "parameter 'layers/gain': weight_quantizer .* keeps a running range",
        ),
        (Rule(".*residual", ops="output", act_quantizer=LSQ(per="channel")), "learns a scale per example"),
    ],
)
def test_mistakes(rule, message):
    with pytest.raises(UsageError, match=message):
        quantize(Streams(), rule).plan(normal(1, 2, 6))


def test_stochastic_rounding_needs_a_key_and_folds_it_by_path():
    model, x = Streams(), normal(1, 2, 6)
    stochastic = dataclasses.replace(TENSOR, rounding="stochastic")
    qmodel = quantize(model, Rule(".*", ops="param", weight_quantizer=stochastic))
    variables = jit(qmodel.init)(KEY, x)
    with pytest.raises(UsageError, match=r"rngs=\{'quant': key\}"):
        qmodel.apply(variables, x, bits=bits(2.0))
    run = jit(lambda key: qmodel.apply(variables, x, bits=bits(2.0), rngs={"quant": key}))
    first, again, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
