"""Running ranges: the average against numpy, when it is used, and that nothing else touches it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import MLP, Block, DecoratedBlock, RematDense, Scanned, Shared, Stack, normal, vmapped

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform

KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MOMENTUM = 0.75
BITS = Precision(weights=4, acts=4, grads=4)


def rule(grid="affine", **kwargs):
    return Rule(act_quantizer=Uniform(grid, per="tensor", statistics=MOMENTUM), **kwargs)


def trainer(qmodel):
    """``step(variables, x, bits) -> (output, new variables)``."""

    @jit
    def step(variables, x, bits):
        out, state = qmodel.apply(variables, x, bits=bits, mutable=["quant_stats"])
        return out, {**variables, **state}

    return step


def batch(index, *shape):
    return normal(*(shape or (4, 6))) * (1 + index) + index


NUMPY = {"min": np.min, "max": np.max, "absmax": lambda x: np.abs(x).max(), "absmean": lambda x: np.abs(x).mean()}


@pytest.mark.parametrize("grid", ["affine", "unsigned", "symmetric", "aqt", "sign"])
def test_the_running_range_against_numpy(grid):
    """r ← m·r + (1 − m)·range(x), and the first batch's range to begin with."""
    qmodel = quantize(nn.Dense(3), rule(grid))
    variables = qmodel.init(KEY, batch(9))
    assert variables["quant_stats"]["acts"]["count"] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(variables["quant_stats"]))  # initialisation sees no data
    names = set(variables["quant_stats"]["acts"]) - {"count"}
    assert names == {"affine": {"min", "max"}, "unsigned": {"max"}}.get(grid, {"absmax", "absmean"})
    step, expected = trainer(qmodel), {}
    for index in range(5):
        x = batch(index)
        _, variables = step(variables, x, BITS)
        for name in names:
            own = np.float64(NUMPY[name](np.asarray(x, np.float64)))
            expected[name] = own if index == 0 else MOMENTUM * expected[name] + (1 - MOMENTUM) * own
            np.testing.assert_allclose(variables["quant_stats"]["acts"][name].squeeze(), expected[name], rtol=1e-5)
        assert variables["quant_stats"]["acts"]["count"] == index + 1
    assert step._cache_size() == 1


def test_training_uses_its_own_range_and_evaluation_the_running_one():
    model, quantizer = nn.Dense(6, use_bias=False), Uniform("affine", per="tensor", statistics=MOMENTUM)
    qmodel = quantize(model, Rule(weight_quantizer=None, act_quantizer=quantizer))
    variables = {**qmodel.init(KEY, batch(0)), "params": {"kernel": jnp.eye(6)}}
    step = trainer(qmodel)
    evaluate = jit(lambda v, x: qmodel.apply(v, x, bits=BITS))
    by_hand = jit(lambda x, low, high: quantizer(x, BITS.acts, {"min": low, "max": high}))

    x = batch(3)
    np.testing.assert_allclose(evaluate(variables, x), by_hand(x, x.min(), x.max()), rtol=1e-6)  # nothing seen yet
    for index in range(3):
        x = batch(index)
        out, variables = step(variables, x, BITS)
        np.testing.assert_allclose(out, by_hand(x, x.min(), x.max()), rtol=1e-6, atol=1e-6)
    running = variables["quant_stats"]["acts"]
    x = batch(7)
    expected = by_hand(x, running["min"].squeeze(), running["max"].squeeze())
    np.testing.assert_allclose(evaluate(variables, x), expected, rtol=1e-6, atol=1e-6)
    assert float(expected.max()) < float(x.max())  # clipped to what was seen
    frozen, state = qmodel.apply(variables, x, bits=BITS, mutable=["batch_stats"])
    np.testing.assert_allclose(frozen, expected, rtol=1e-6, atol=1e-6)
    assert "quant_stats" not in state


def test_off_and_on_again():
    """Float steps leave the ranges alone; bits of 24 and above go on watching."""
    qmodel = quantize(MLP(), rule())
    step, variables = trainer(qmodel), qmodel.init(KEY, batch(0))
    _, variables = step(variables, batch(0), BITS)
    before = jax.device_get(variables["quant_stats"])
    _, state = qmodel.apply(variables, batch(5), mutable=["quant_stats"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state["quant_stats"]))
    assert "quant_stats" in state
    _, after = step({**variables, **state}, batch(5), BITS)
    assert after["quant_stats"]["Dense_0"]["acts"]["count"] == 2
    _, watched = step(variables, batch(5), Precision(32, 32, 32))
    np.testing.assert_array_equal(
        watched["quant_stats"]["Dense_0"]["acts"]["max"], after["quant_stats"]["Dense_0"]["acts"]["max"]
    )


def test_weights_keep_ranges_per_channel():
    quantizer = Uniform("symmetric", per="channel", statistics=MOMENTUM)
    qmodel = quantize(nn.Dense(3), Rule(weight_quantizer=quantizer))
    variables = qmodel.init(KEY, batch(0))
    assert set(variables["quant_stats"]) == {"weights"}
    _, variables = trainer(qmodel)(variables, batch(0), BITS)
    expected = np.abs(variables["params"]["kernel"]).max(0, keepdims=True)
    np.testing.assert_allclose(variables["quant_stats"]["weights"]["absmax"], expected, rtol=1e-6)


def test_gradients_never_reach_them():
    model = MLP()
    qmodel, without = quantize(model, rule()), quantize(model, Rule(act_quantizer=Uniform("affine", per="tensor")))
    variables = qmodel.init(KEY, batch(0))
    _, variables = trainer(qmodel)(variables, batch(0), BITS)

    def loss(apply):
        def fn(params, stats, x):
            out = apply({"params": params, "quant_stats": stats}, x)
            return jnp.sum(jax.tree.leaves(out)[0] ** 2)

        return jit(jax.grad(fn, argnums=(0, 1), allow_int=True))

    for mutable in (False, ["quant_stats"]):
        apply = loss(lambda v, x, mutable=mutable: qmodel.apply(v, x, bits=BITS, mutable=mutable))
        of_params, of_stats = apply(variables["params"], variables["quant_stats"], batch(0))
        floats = [g for g in jax.tree.leaves(of_stats) if g.dtype != jax.dtypes.float0]
        assert floats and not any(np.any(g) for g in floats)
        assert all(np.any(g) for g in jax.tree.leaves(of_params))
    plain = loss(lambda v, x: without.apply({"params": v["params"]}, x, bits=BITS))
    expected, _ = plain(variables["params"], variables["quant_stats"], batch(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of_params, expected)


@pytest.mark.parametrize(
    ("block", "path"),
    [
        (nn.remat(Block), ("block1", "down")),
        (nn.jit(Block), ("block1", "down")),
        (DecoratedBlock, ("block1", "down")),
        (lambda name: nn.remat(nn.Dense)(6, name=name), ("block1",)),
        (lambda name: nn.jit(nn.Dense)(6, name=name), ("block1",)),
        (lambda name: RematDense(6, name=name), ("block1",)),
    ],
    ids=["remat", "jit", "jit_method", "remat_layer", "jit_layer", "remat_super"],
)
def test_inside_transformations(block, path):
    """The same ranges as in straight-line code, and gradients flow."""
    qmodel = quantize(Stack(block), rule())
    variables = jit(qmodel.init)(KEY, batch(0))  # under nn.jit an eager one would compile twice

    @jit
    def step(variables, x):
        def loss(params):
            out, state = qmodel.apply({**variables, "params": params}, x, bits=BITS, mutable=["quant_stats"])
            return jnp.sum(out**2), state

        grads, state = jax.grad(loss, has_aux=True)(variables["params"])
        return grads, {**variables, **state}

    grads, variables = step(variables, batch(0))
    grads, variables = step(variables, batch(1))
    stats = variables["quant_stats"]
    first = stats["block0"] if len(path) == 1 else stats["block0"]["up"]
    if len(path) == 1 or block is DecoratedBlock:  # no norm before it: it sees the batch itself
        expected = MOMENTUM * batch(0).max() + (1 - MOMENTUM) * batch(1).max()
        np.testing.assert_allclose(first["acts"]["max"].squeeze(), expected, rtol=1e-5)
    for name in path:
        stats = stats[name]
    assert stats["acts"]["count"] == 2 and float(stats["acts"]["max"].squeeze()) != 0
    assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_inside_a_scan_one_for_each_iteration():
    qmodel = quantize(Scanned(axes={"quant_stats": 0}), rule())
    variables = jit(qmodel.init)(KEY, batch(0))
    inside = variables["quant_stats"]["layers"]["block"]["up"]["acts"]
    assert inside["count"].shape == (3,) and inside["max"].shape == (3, 1, 1)
    step = trainer(qmodel)
    _, variables = step(variables, batch(0), BITS)
    _, variables = step(variables, batch(1), BITS)
    inside = variables["quant_stats"]["layers"]["block"]["up"]["acts"]
    np.testing.assert_array_equal(inside["count"], [2, 2, 2])
    assert len(np.unique(inside["max"])) == 3

    # The same blocks written out, fed what the stem gives them.
    dynamic = Rule(act_quantizer=Uniform("affine", per="tensor"))
    stem, unrolled = quantize(nn.Dense(6), dynamic), quantize(Stack(depth=3), [rule(), dynamic])
    layers = variables["params"]["layers"]["block"]
    params = {f"block{i}": jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(3)}
    params["head"] = variables["params"]["head"]
    flat = {**jit(unrolled.init)(KEY, batch(0)), "params": params}
    step = trainer(unrolled)
    for index in range(2):
        x = jit(lambda x: stem.apply({"params": variables["params"]["stem"]}, x, bits=BITS))(batch(index))
        _, flat = step(flat, x, BITS)
    for i in range(3):
        expected = flat["quant_stats"][f"block{i}"]["up"]["acts"]["max"]
        np.testing.assert_allclose(inside["max"][i], expected, rtol=1e-3)
    assert jax.eval_shape(lambda v: qmodel.apply(v, batch(1), bits=BITS), variables).shape == (4, 3)  # evaluation


@pytest.mark.parametrize(
    ("model", "x", "path"),
    [
        (Scanned(), normal(4, 6), "layers/block/up"),
        (Stack(vmapped(Block)), normal(2, 4, 6), "block0/up"),
        (nn.RNN(nn.LSTMCell(4)), normal(2, 3, 6), "cell/ii"),
    ],
    ids=["scan", "vmap", "rnn"],
)
@pytest.mark.parametrize("call", ["init", "plan"])
def test_where_they_cannot_be_kept_is_an_error(model, x, path, call):
    qmodel = quantize(model, rule())
    with pytest.raises(UsageError) as error:
        qmodel.plan(x) if call == "plan" else jax.eval_shape(qmodel.init, KEY, x)
    assert str(error.value).startswith(f"layer '{path}' keeps running ranges")
    assert "add variable_axes={'quant_stats': 0}" in str(error.value) and "\n" not in str(error.value)


def test_dynamic_ranges_always_work_there():
    rules = [Rule("layers/.*"), rule()]
    qmodel = quantize(Scanned(), rules)
    variables = jit(qmodel.init)(KEY, batch(0))
    assert set(variables["quant_stats"]) == {"stem", "head"}
    _, variables = trainer(qmodel)(variables, batch(0), BITS)
    assert variables["quant_stats"]["head"]["acts"]["count"] == 1


def test_variables_without_them_name_the_way_out():
    qmodel = quantize(MLP(), rule())
    float_checkpoint = MLP().init(KEY, batch(0))
    with pytest.raises(UsageError, match=r"layer 'Dense_0' keeps running ranges.*initialise with qmodel.init"):
        qmodel.apply(float_checkpoint, batch(0), bits=BITS)
    np.testing.assert_array_equal(qmodel.apply(float_checkpoint, batch(0)), MLP().apply(float_checkpoint, batch(0)))


@pytest.mark.parametrize("per", ["channel", "row", 2])
def test_a_range_for_each_example_is_refused(per):
    qmodel = quantize(MLP(), [Rule("Dense_1", act_quantizer=Uniform("affine", per=per, statistics=0.9)), Rule()])
    with pytest.raises(UsageError, match=r"layer 'Dense_1': act_quantizer 'affine/.*use per='tensor'"):
        qmodel.plan(batch(0))


def test_a_range_for_each_feature_is_not():
    qmodel = quantize(nn.Dense(3), Rule(act_quantizer=Uniform("affine", per="column", statistics=0.9)))
    variables = qmodel.init(KEY, batch(0))
    _, variables = trainer(qmodel)(variables, batch(0), BITS)
    np.testing.assert_allclose(variables["quant_stats"]["acts"]["max"], batch(0).max(0, keepdims=True), rtol=1e-6)
    qmodel.apply(variables, batch(1)[:2], bits=BITS)  # another batch size


def test_a_shared_layer_counts_every_call():
    qmodel = quantize(Shared(), rule())
    _, variables = trainer(qmodel)(qmodel.init(KEY, batch(0)), batch(0), BITS)
    assert variables["quant_stats"]["twice"]["acts"]["count"] == 2
    assert variables["quant_stats"]["once"]["acts"]["count"] == 1


def test_fixed_layers_and_schedules_mix():
    rules = [Rule("Dense_0", weights=8, acts=8, act_quantizer=rule().act_quantizer), Rule()]
    variables = quantize(MLP(), rules).init(KEY, batch(0))
    assert set(variables["quant_stats"]) == {"Dense_0"}
    assert "quant_stats" not in quantize(MLP(), Rule()).init(KEY, batch(0))


def test_delayed_scaling_quantizes_with_the_range_of_the_step_before():
    quantizer = Uniform("affine", per="tensor", statistics=0.0, delay=True)
    qmodel = quantize(nn.Dense(6, use_bias=False), Rule(weight_quantizer=None, act_quantizer=quantizer))
    variables = {**qmodel.init(KEY, batch(0)), "params": {"kernel": jnp.eye(6)}}
    step, own = trainer(qmodel), Uniform("affine", per="tensor")
    by_hand = jit(lambda x, before: own(x, BITS.acts, own.range(before)))
    batches = [batch(index) for index in (0, 2, 1)]
    for x, before in zip(batches, [batches[0], *batches], strict=False):  # the first has none before it
        out, variables = step(variables, x, BITS)
        np.testing.assert_allclose(out, by_hand(x, before), rtol=1e-6, atol=1e-6)
    assert np.max(batches[1]) > np.max(batches[0]) + 0.5  # so that the second was clipped
    assert float(variables["quant_stats"]["acts"]["max"].squeeze()) == pytest.approx(float(np.max(batches[2])))
    assert step._cache_size() == 1


def test_delayed_scaling_without_a_range_to_delay():
    with pytest.raises(UsageError, match=r"delay=True needs a running range.*statistics=0.0"):
        Uniform(delay=True)
