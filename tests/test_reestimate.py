"""Norm statistics measured anew: against numpy, in every style of model, at every precision, on several devices."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norm_models import (
    BATCHES,
    ROWS,
    RULES,
    WIDTH,
    Block,
    Deep,
    Dropped,
    Frozen,
    InputNorm,
    OwnStatistics,
    Plain,
    Spectral,
    Subclass,
    Twice,
    ZeroMomentum,
    batches,
    variables_of,
)
from program import finished, start

import qtrain
from qtrain.errors import UsageError
from qtrain.reestimate import check_reestimation, make_reestimate_step, reestimate


def estimate(model, count=BATCHES, bits=None, data=None, rules=RULES, variables=None):
    qmodel = qtrain.quantize(model, rules)
    variables = variables_of(qmodel) if variables is None else variables
    step = jax.jit(make_reestimate_step(qmodel))
    found = reestimate(step, variables, batches() if data is None else data, count, bits)
    assert step._cache_size() == 1
    return variables, found


def numpy_average(arrays):
    """Mean of the batches' means, mean of their variances, in float64."""
    arrays = [np.asarray(each, np.float64) for each in arrays]
    return {
        "mean": np.mean([each.mean(0) for each in arrays], axis=0),
        "var": np.mean([((each - each.mean(0)) ** 2).mean(0) for each in arrays], axis=0),
    }


def assert_close(found, expected, rtol=2e-5):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-5, err_msg=name)


# --- values


@pytest.mark.parametrize("norm", [nn.BatchNorm, Subclass, nn.remat(nn.BatchNorm), nn.jit(nn.BatchNorm)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_average_of_the_batches_statistics(norm, dtype):
    data = batches(dtype=dtype)
    variables, found = estimate(InputNorm(dtype=dtype, norm=norm), data=data)
    assert_close(found["norm"], numpy_average(each["image"] for each in data))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert np.all(variables["batch_stats"]["norm"]["mean"] == 100), "the training's own statistics are another thing"


def test_one_batch_is_exactly_that_batchs():
    """Bit for bit what a momentum of 0 leaves, which the model itself does not have."""
    data = batches(1)
    _, found = estimate(InputNorm(), count=1, data=data)
    model = nn.BatchNorm(momentum=0.0, use_running_average=False)
    variables = model.init(jax.random.key(0), data[0]["image"])
    _, expected = jax.jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))(variables, data[0]["image"])
    jax.tree.map(np.testing.assert_array_equal, found["norm"], expected["batch_stats"])


def numpy_deep(params, arrays):
    """The statistics of `Deep`, each batch normalized by its own."""
    per_norm = [[], [], []]
    for x in arrays:
        x = np.asarray(x, np.float64)
        for index in range(3):
            block = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[index])
            x = x @ block["dense"]["kernel"] + block["dense"]["bias"]
            per_norm[index].append(x)
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * block["norm"]["scale"] + block["norm"]["bias"]
            x = np.maximum(x, 0)
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
            x = x * block["LayerNorm_0"]["scale"] + block["LayerNorm_0"]["bias"]
    return [numpy_average(each) for each in per_norm]


DEEP = {
    "plain": Deep(),
    "remat": Deep(nn.remat(Block)),
    "jit": Deep(nn.jit(Block)),
    "scan": Deep(scanned=True),
    "scan of remat": Deep(nn.remat(Block), scanned=True),
}


@pytest.mark.parametrize("name", DEEP)
def test_float_models_of_every_style(name):
    variables, found = estimate(DEEP[name])
    params, norms = variables["params"], found
    if "scan" in name:  # one axis more, in front
        stacked = params["layers"]["block"], found["layers"]["block"]
        each = [jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(3)]
        params, norms = ({f"block{index}": pair[which] for index, pair in enumerate(each)} for which in (0, 1))
    blocks = [params[f"block{index}"] for index in range(3)]
    statistics = [norms[f"block{index}"]["norm"] for index in range(3)]
    for mine, expected in zip(statistics, numpy_deep(blocks, [each["image"] for each in batches()]), strict=True):
        assert_close(mine, expected, rtol=1e-4)


@pytest.mark.parametrize("name", DEEP)
def test_at_few_bits_it_is_the_quantized_model_that_is_measured(name):
    """Equal to the model with every momentum 0 in its source, run batch by batch as training runs it."""
    bits = qtrain.Precision(weights=3, acts=4)
    variables, found = estimate(DEEP[name], bits=jax.tree.map(np.float32, bits))
    _, in_float = estimate(DEEP[name], variables=variables)
    with_zero = qtrain.quantize(dataclasses.replace(DEEP[name], block=ZeroMomentum), RULES)

    @jax.jit
    def own(batch, bits):
        _, updated = with_zero.apply(variables, batch["image"], train=True, bits=bits, mutable=["batch_stats"])
        return updated["batch_stats"]

    each = [own(batch, jax.tree.map(np.float32, bits)) for batch in batches()]
    expected = jax.tree.map(lambda *leaves: np.mean(np.asarray(leaves, np.float64), axis=0), *each)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), found, expected)
    assert any(np.any(np.abs(x - y) > 1e-3) for x, y in zip(*map(jax.tree.leaves, (found, in_float)), strict=True))


def test_a_norm_that_is_called_twice_averages_its_calls():
    for norm in (nn.BatchNorm, Subclass):
        _, found = estimate(Twice(norm))
        images = [np.asarray(each["image"]) for each in batches()]
        assert_close(found["norm"], numpy_average([*images, *(5 * each + 1 for each in images)]))


def test_what_is_no_batch_norms_is_kept():
    variables, found = estimate(Frozen())
    jax.tree.map(np.testing.assert_array_equal, found["frozen"], variables["batch_stats"]["frozen"])
    assert np.all(found["norm"]["mean"] < 50)
    variables, found = estimate(Spectral())
    jax.tree.map(np.testing.assert_array_equal, found["spectral"], variables["batch_stats"]["spectral"])
    assert np.all(found["norm"]["mean"] < 50)


def test_running_ranges_are_read_as_in_evaluation():
    """A range that was never filled would be the batch's own; one of 0.5 changes what the next norm sees."""
    quantizer = qtrain.quantizers.Uniform("symmetric", per="tensor", statistics=0.9)
    bits = qtrain.Precision(weights=8, acts=2)
    rules = (qtrain.Rule(path=".*", act_quantizer=quantizer),)
    variables, found = estimate(Deep(), bits=bits, rules=rules)
    filled = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, 0.5) if leaf.dtype == jnp.float32 else leaf + 1, variables["quant_stats"]
    )
    _, narrow = estimate(Deep(), bits=bits, rules=rules, variables={**variables, "quant_stats": filled})
    assert set(narrow) == {"block0", "block1", "block2"}
    assert np.all(narrow["block0"]["norm"]["var"] < 0.7 * found["block0"]["norm"]["var"])


def test_the_same_every_time_with_dropout_drawn_anew_for_each_batch():
    same = batches(1) * BATCHES
    variables, first = estimate(Dropped(), data=same)
    _, again = estimate(Dropped(), data=same, variables=variables)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    _, one = estimate(Dropped(), count=1, data=same, variables=variables)
    assert np.all(first["norm"]["var"] != one["norm"]["var"])


def test_training_is_not_touched():
    """The same model trains as before: its momentum is its own again, and nothing was cached."""
    model = Deep(nn.jit(Block))
    qmodel = qtrain.quantize(model, RULES)
    variables = variables_of(qmodel)
    image = batches(1)[0]["image"]

    def train_pass():
        return jax.jit(lambda v: qmodel.apply(v, image, train=True, mutable=["batch_stats"])[1])(variables)

    before = train_pass()
    reestimate(jax.jit(make_reestimate_step(qmodel)), variables, batches(), 2)
    jax.tree.map(np.testing.assert_array_equal, before, train_pass())


def test_nearer_to_what_another_batch_has_than_the_running_average():
    """A running average of momentum 0.99 lags behind, and was taken at other bits."""
    rng = np.random.default_rng(5)
    images = jnp.asarray(3 + 2 * rng.normal(size=(10, 256, WIDTH)), jnp.float32)
    data = [{"image": image, "label": jnp.zeros(256, jnp.int32)} for image in images]
    qmodel = qtrain.quantize(Deep(), RULES)
    variables = qmodel.init(jax.random.key(0), images[0])

    @jax.jit
    def trained(variables, image, bits):
        return {**variables, **qmodel.apply(variables, image, train=True, bits=bits, mutable=["batch_stats"])[1]}

    for batch in data[:4]:
        variables = trained(variables, batch["image"], qtrain.Precision(np.float32(8), np.float32(8)))
    step, bits = jax.jit(make_reestimate_step(qmodel)), qtrain.Precision(np.float32(2), np.float32(2))
    found = reestimate(step, variables, data[4:9], 5, bits)
    held_out = reestimate(step, variables, data[9:], 1, bits)

    def error(statistics):
        pairs = zip(jax.tree.leaves(statistics), jax.tree.leaves(held_out), strict=True)
        return sum(float(np.sum((x - y) ** 2)) for x, y in pairs)

    assert error(found) < 0.1 * error(variables["batch_stats"])


# --- several devices

PROGRAM = """
import json, sys
import jax, numpy as np
import qtrain
from qtrain import sharding
from qtrain.reestimate import make_reestimate_step, reestimate
from norm_models import BATCHES, RULES, Deep, batches, variables_of

mesh = sharding.make_mesh()
assert mesh.size == 8
everywhere = sharding.replicated(mesh)
qmodel = qtrain.quantize(Deep(), RULES)
variables = jax.device_put(variables_of(qmodel), everywhere)
step = jax.jit(make_reestimate_step(qmodel), out_shardings=everywhere)
data = (sharding.shard_batch(batch, mesh) for batch in batches())
found = reestimate(step, variables, data, BATCHES)
assert step._cache_size() == 1
print(json.dumps(jax.tree.map(lambda x: np.asarray(x).tolist(), found)))
"""


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with one device")
def test_statistics_are_those_of_the_global_batch():
    process = start([], code=PROGRAM, environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    _, one = estimate(Deep())
    code, out, error = finished(process)
    assert code == 0, error
    eight = json.loads(out.splitlines()[-1])
    for name, values in one.items():
        assert_close(jax.tree.map(np.asarray, values["norm"]), eight[name]["norm"], rtol=1e-4)


# --- mistakes


def refused(model, count=BATCHES, data=None):
    qmodel = qtrain.quantize(model, RULES)
    image = batches(1)[0]["image"]
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(0), image, train=False))
    inputs = jax.ShapeDtypeStruct(image.shape, image.dtype)
    with pytest.raises(UsageError) as error:
        check_reestimation(qmodel, variables, inputs, count)
    message = str(error.value)
    assert message.startswith("eval.reestimate_batches") and "\n" not in message
    return message


def test_models_it_is_not_for():
    assert "no batch statistics" in refused(Plain())
    assert "OwnStatistics" in refused(OwnStatistics()) and "'mean'" in refused(OwnStatistics())
    qmodel = qtrain.quantize(Plain(), RULES)
    image = batches(1)[0]["image"]
    variables = qmodel.init(jax.random.key(0), image)
    for call in (
        lambda: reestimate(make_reestimate_step(qmodel), variables, batches(), 2),
        lambda: make_reestimate_step(qmodel)({}, 0, variables, batches(1)[0], None),
    ):
        with pytest.raises(UsageError, match="no batch statistics"):
            call()


@pytest.mark.parametrize("count", [-1, 2.0, True, "50"])
def test_counts(count):
    assert repr(count) in refused(InputNorm(), count)


def test_zero_asks_for_nothing_and_a_norm_passes():
    shapes = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    check_reestimation(qtrain.quantize(Plain(), RULES), {"params": {}}, shapes, 0)
    qmodel = qtrain.quantize(Deep(), RULES)
    check_reestimation(qmodel, jax.eval_shape(lambda: variables_of(qmodel)), shapes, 3)


def test_too_few_batches():
    with pytest.raises(UsageError, match=r"eval.reestimate_batches=6: there are only 5 batches"):
        estimate(InputNorm(), count=6)
