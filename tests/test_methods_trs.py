"""The recipe of transition-rate scheduling: what it quantizes, that its grids stand still, what a config may say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import CONFIGS, Steps, small_config

from qtrain import overrides, quantize
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.methods.trs import trs_rules
from qtrain.models import CNN
from qtrain.optim import transition_metrics
from qtrain.precision import Precision


def trs_config(**values):
    config = small_config("digits_cnn", schedule="constant", quant__recipe="trs", **values)
    with config.unlocked():
        config.schedule.bits = 2
        config.schedule.grads.update(name="float", bits=None)
    return config


def test_plan():
    plan = quantize(CNN(num_classes=10, features=(4, 8), hidden=16), trs_rules()).plan(jnp.zeros((2, 8, 8, 1)))
    found = {row.path: (row.weights, row.acts, row.grads) for row in plan}
    assert found["Conv_0"] == found["logits"] == ("float", "float", "float")
    inner = ("trs/signed/tensor", "trs/unsigned/tensor", "float")
    assert found["Conv_1"] == found["Dense_0"] == inner


def reference(x, bits, s, signed):
    """The paper's equation 2 in float64, times s."""
    gamma = 2.0 ** (bits - 1 if signed else bits)
    low, high = (-gamma, gamma - 1) if signed else (0.0, gamma - 1)
    if signed and bits == 1:
        return s * np.where(x >= 0, 1.0, -1.0)
    return s / gamma * np.rint(np.clip(gamma * x / s, low, high))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_layer_is_the_papers_equation(bits):
    """Of three layers the middle one is quantized, with the initial scales that the paper gives."""
    model = nn.Sequential([nn.Dense(16, name="a"), nn.relu, nn.Dense(12, name="b"), nn.Dense(4, name="c")])
    x = jax.random.normal(jax.random.key(0), (64, 8))
    qmodel = quantize(model, trs_rules())
    variables = qmodel.init(jax.random.key(1), x)
    variables = qmodel.calibrate(variables, x, bits=Precision(weights=bits, acts=bits))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    (path,) = {path for path in params if params[path]["kernel"].shape == (16, 12)}
    names = sorted(params, key=lambda name: [8, 16, 12].index(params[name]["kernel"].shape[0]))
    first, _, last = (params[name] for name in names)

    hidden = np.maximum(np.asarray(x, np.float64) @ first["kernel"] + first["bias"], 0)
    weight = params[path]["kernel"]
    s_w, s_a = 3 * weight.std(), 3 * hidden.std() / np.sqrt(1 - 2 / np.pi)
    np.testing.assert_allclose(variables["quant"][path]["weights"]["scale"], s_w, rtol=1e-5)
    np.testing.assert_allclose(variables["quant"][path]["acts"]["scale"], s_a, rtol=1e-5)
    out = reference(hidden, bits, s_a, False) @ reference(weight, bits, s_w, True) + params[path]["bias"]
    expected = out @ last["kernel"] + last["bias"]
    found = jax.jit(lambda v: qmodel.apply(v, x, bits=Precision(weights=bits, acts=bits)))(variables)
    # A value within float32 of an edge between two codes may fall to either side of it: few do, each by one step.
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.97


@pytest.mark.parametrize("name", ["adam", "adamt"])
def test_weight_scales_stand_still_and_activation_scales_learn(name):
    steps = Steps(trs_config(optimizer__name=name))
    before = jax.device_get(steps.state.quant)
    with steps.batches() as batches:
        for _ in range(3):
            steps(next(batches))
    after = jax.device_get(steps.state.quant)
    assert set(before) == {"Conv_1", "Dense_0"}
    for layer in before:
        np.testing.assert_array_equal(before[layer]["weights"]["scale"], after[layer]["weights"]["scale"])
        assert before[layer]["acts"]["scale"] != after[layer]["acts"]["scale"]


def test_the_target_follows_the_bits():
    """A precision schedule and a transition rate at once: R = λ·√b·cosine at the bits of the very step."""
    steps = Steps(overrides.load(f"{CONFIGS / 'digits_cnn_trs_cpt.py'}:smoke"))
    total, factor = steps.experiment.total_steps, steps.config.optimizer.transition.factor
    widths = []
    with steps.batches() as batches:
        for step in range(total):
            steps(next(batches))
            widths.append(float(steps.state.previous.bits[0]))
            decay = 0.5 * (1 + np.cos(np.pi * step / total))
            found = transition_metrics(steps.state.opt_state)
            assert len(found) == 3, "all, and each of the two layers that are not first or last"
            for metrics in found.values():
                np.testing.assert_allclose(metrics["target"], factor * np.sqrt(widths[-1]) * decay, rtol=1e-5)
    assert len(set(widths)) > 1, "or nothing was followed"


def test_what_else_a_config_says_reaches_it():
    rules = build(trs_config(quant__residuals="original", quant__execution="auto")).qmodel.rules
    assert [(rule.residuals, rule.execution) for rule in rules] == [("quantized", "fake"), ("original", "auto")]
    own = ({"path": "Dense_0", "weights": 8, "acts": 8},)
    plan = build(trs_config(quant__rules=own)).plan
    assert {row.path: row.weights for row in plan}["Dense_0"] == "symmetric/channel"


@pytest.mark.parametrize("recipe", ["cpt", "trs"])
@pytest.mark.parametrize(
    ("key", "value"), [("weights", "lsq"), ("acts", "none"), ("grads", "affine/tensor"), ("ends", 4)]
)
def test_what_a_recipe_brings_cannot_be_given(recipe, key, value):
    config = trs_config(**{f"quant__{key}": value})
    with config.unlocked():
        config.quant.recipe = recipe
    with pytest.raises(UsageError, match=f"quant.{key}=.*quant.recipe='{recipe}' brings its own") as caught:
        build(config)
    assert "\n" not in str(caught.value)
