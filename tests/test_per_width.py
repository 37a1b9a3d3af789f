"""Norm layers with variables for each width: a row computes what a plain model does, the others stay as they are."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import Scanned, Stack
from norm_models import InputNorm, batches

from qtrain.errors import UsageError
from qtrain.inject import Rule, per_width, quantize
from qtrain.inject.rows_in_use import _longer, table_widths
from qtrain.precision import Precision
from qtrain.quantizers import EWGS, LSQ, DoubleRounding
from qtrain.reestimate import make_reestimate_step, reestimate

WIDTHS = (8, 6, 4, 2)
TABLE = LSQ(signed=False, offset=True, across_bits="table", widths=tuple(reversed(WIDTHS)))
WEIGHTS = DoubleRounding(high=8)
RULES = (Rule(weight_quantizer=WEIGHTS, act_quantizer=TABLE),)
MATRIX, IMAGE = (5, 6), (4, 6, 6, 3)


class CNN(nn.Module):
    """Three kinds of norms between convolutions, one of them before any layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.GroupNorm(3, name="before")(x)
        x = nn.Conv(4, (3, 3), name="conv0")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm0")(x))
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        x = nn.relu(nn.GroupNorm(2, use_scale=False, name="norm1")(x))
        x = nn.InstanceNorm(name="norm2")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
    """Norms inside of a layer of linen's own, and one that is called twice."""

    @nn.compact
    def __call__(self, x):
        norm = nn.RMSNorm(name="twice")
        x = norm(x[:, None, :] * jnp.ones((1, 3, 1)))
        x = nn.MultiHeadDotProductAttention(2, normalize_qk=True, name="attention")(x)
        return nn.Dense(3, name="head")(norm(x))


class Own(nn.Module):
    """Statistics and a parameter of somebody's own."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        gain = self.param("gain", lambda key: {"inner": jnp.full(x.shape[1:], 1.5)})
        return gain["inner"] * (x - mean.value)


class WithOwn(nn.Module):
    """A norm of somebody's own between layers, and an auxiliary head in training."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(6, name="first")(x)
        if train:
            nn.LayerNorm(name="auxiliary_norm")(nn.Dense(2, name="auxiliary")(x))
        return nn.Dense(3, name="head")(Own(name="own")(x))


# name → model, its inputs' shape, norm → the layer it follows
MODELS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, str]]] = {
    "cnn": (CNN(), IMAGE, {"before": "conv0", "norm0": "conv0", "norm1": "conv1", "norm2": "conv1"}),
    "scanned": (Scanned(axes={"quant": 0}, length=4), MATRIX, {"layers/block/LayerNorm_0": "stem"}),
    "own": (WithOwn(), MATRIX, {"own": "auxiliary", "auxiliary_norm": "auxiliary"}),
}
# The same of models that are not run.
SHAPES = {
    **MODELS,
    "stack": (Stack(depth=2), MATRIX, {"block0/LayerNorm_0": "block0/up", "block1/LayerNorm_0": "block0/down"}),
    "attention": (
        Attention(),
        MATRIX,
        {"twice": "attention/query"} | {f"attention/{name}_ln": "attention/value" for name in ("query", "key")},
    ),
}


def inputs_of(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def jit(function):
    """Compiled in a hurry."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def scrambled(shapes, seed=2):
    """Variables whose rows nothing could be confused with."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 0.9, leaf.shape), leaf.dtype), shapes)


def names_of(tree):
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def row_of(variables, held, index):
    """The plain model's variables of one row; `index` an int, or by the layer that is followed."""

    def take(path, leaf):
        name = tuple(key.key for key in path)
        if name not in held.leaves:
            return leaf
        return leaf[index if isinstance(index, int) else index[held.leaves[name].follows]]

    return jax.tree_util.tree_map_with_path(take, variables)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@dataclasses.dataclass
class Case:
    """A model, the same without rows, variables of either, and compiled: loss, outputs and gradients by bits."""

    name: str
    rows: Any
    plain: Any
    x: Any
    begun: Any
    plain_begun: Any
    variables: Any
    run: Any
    run_plain: Any


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model, shape, _ = MODELS[request.param]
    x = inputs_of(shape)
    rows, plain, key = quantize(model, RULES, per_width=WIDTHS), quantize(model, RULES), jax.random.key(0)
    begun = jit(lambda key: (rows.init(key, x), plain.init(key, x)))(key)
    # What is compared bit for bit is optimized as usual where it matters most.
    compiled = jax.jit if request.param == "cnn" else jit
    options = {"train": True} if request.param == "cnn" else {}

    def program(qmodel):
        def loss(trained, rest, bits):
            variables = {**trained, **rest}
            out, updated = qmodel.apply(variables, x, bits=bits, mutable=["batch_stats"], **options)
            evaluated = qmodel.apply(variables, x, bits=bits)
            return jnp.sum(out**2) + jnp.sum(evaluated**2), (out, evaluated, dict(updated))

        return compiled(jax.value_and_grad(loss, has_aux=True))

    return Case(request.param, rows, plain, x, *begun, scrambled(begun[0]), program(rows), program(plain))


def parts(variables):
    """What is trained, and the rest."""
    trained = {key: variables[key] for key in ("params", "quant")}
    return trained, {key: value for key, value in variables.items() if key not in trained}


def of_layers(rows):
    """Bits for each layer from rows."""
    return {path: Precision(*[jnp.float32(WIDTHS[row])] * 2) for path, row in rows.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_a_norm_follows_the_layer_before_it_or_else_the_first(name):
    model, shape, norms = SHAPES[name]
    x = jax.ShapeDtypeStruct(shape, "float32")
    qmodel = quantize(model, RULES, per_width=WIDTHS)
    plan = qmodel.plan(x)
    assert plan.norms == norms and plan.per_width == WIDTHS
    assert f"{len(norms)} norm layer" in str(plan) and "8, 6, 4, 2 bits" in str(plan)
    assert list(plan.ops) == list(quantize(model, RULES).plan(x).ops)
    variables = jax.eval_shape(qmodel.init, jax.random.key(0), x)
    assert quantize(model, RULES, per_width=WIDTHS).held(variables, x).modules == norms
    for key, row in qmodel.rows(Precision(8, 8), variables).items():
        # Whether there are as many iterations as widths or not.
        stacked = name == "scanned" and key[:2] == ("quant", "layers")
        assert row.axis == int(stacked) and names_of(variables)[key].shape[row.axis] == len(WIDTHS)


def test_each_row_of_init_is_the_plain_models(case):
    held = case.rows.held(case.begun)
    assert held.leaves and all(names_of(case.begun)[name].shape[0] == len(WIDTHS) for name in held.leaves)
    for row in range(len(WIDTHS)):
        assert_equal(row_of(case.begun, held, row), case.plain_begun)
    assert_equal(case.rows.with_rows(case.plain_begun, case.x), case.begun)


def test_a_width_computes_what_a_plain_model_does_with_its_row_and_leaves_the_others(case):
    """Also where each layer has a width of its own: whatever rows these mix."""
    held, followers = case.rows.held(case.variables), case.rows.plan(case.x).followers
    each = [dict.fromkeys(followers, row) for row in range(len(WIDTHS))]
    each.append({path: index % len(WIDTHS) for index, path in enumerate(followers, start=1)})
    learned = False
    for rows in each:
        bits = of_layers(rows)
        own = row_of(case.variables, held, rows)
        (value, (*outputs, updated)), grads = case.run(*parts(case.variables), bits)
        (expected, (*plain_outputs, written)), plain_grads = case.run_plain(*parts(own), bits)
        assert_equal((value, outputs), (expected, plain_outputs))
        used = case.rows.rows(bits, parts(case.variables)[0])
        assert {key for key in held.leaves if key[0] == "params"} == {key for key in used if key[0] == "params"}
        before, expected = names_of(case.variables), names_of({**plain_grads, **written})
        for key, leaf in names_of({**grads, **updated}).items():
            if key in held.leaves:
                row = rows[held.leaves[key].follows]
                others = np.arange(len(WIDTHS)) != row
                kept = before[key] if key[0] == "batch_stats" else jnp.zeros_like(leaf)
                np.testing.assert_array_equal(leaf[row], expected[key])
                np.testing.assert_array_equal(leaf[others], kept[others])
                assert key[0] == "batch_stats" or (used[key].axis == 0 and used[key].index == row)
            else:
                np.testing.assert_array_equal(leaf, expected[key])
            if key in used and key[0] == "quant":
                others = np.delete(np.arange(len(WIDTHS)), int(used[key].index))
                assert not np.any(np.take(np.asarray(leaf), others, used[key].axis))
                assert used[key].index == len(WIDTHS) - 1 - rows["/".join(key[1:-2])]
                learned |= bool(np.any(leaf))
        if case.name == "cnn":
            statistics = ("batch_stats", "norm0", "mean")
            assert np.all(names_of(updated)[statistics] != before[statistics], axis=1).tolist() == [
                row == rows["conv0"] for row in range(len(WIDTHS))
            ]
    assert learned and case.run._cache_size() == case.run_plain._cache_size() == 1


def test_the_float_model_uses_the_first_row(case):
    variables = {key: value for key, value in case.variables.items() if key != "quant"}
    held = case.rows.held(variables)
    expected, written = jit(lambda v: case.rows.module.apply(v, case.x, mutable=True))(row_of(variables, held, 0))
    found, updated = jit(lambda v: case.rows.apply(v, case.x, mutable=True))(variables)
    np.testing.assert_array_equal(found, expected)
    for name, leaf in names_of(updated).items():
        np.testing.assert_array_equal(leaf[0] if name in held.leaves else leaf, names_of(written)[name])
        np.testing.assert_array_equal(leaf, names_of(variables)[name])


@pytest.mark.parametrize(
    ("bits", "row"),
    [(8, 0), (7, 1), (6, 1), (5, 2), (2, 3), (1, 3), (16, 0), (32, 0), (None, 0)],
)
def test_a_width_that_is_none_of_them_takes_the_nearest_below(bits, row):
    assert per_width.row(WIDTHS, bits) == row
    if bits is not None:
        traced = jax.jit(lambda b: per_width.row(WIDTHS, b))(jnp.float32(bits))
        assert traced == row and traced.dtype == jnp.int32


def test_fixed_layers_choose_no_row_and_have_one_of_their_own_table():
    rules = (Rule("head|conv0", weight_quantizer=WEIGHTS, act_quantizer=TABLE, weights=8, acts=8), *RULES)
    qmodel = quantize(CNN(), rules, per_width=WIDTHS)
    x = jax.ShapeDtypeStruct(IMAGE, "float32")
    variables = jax.eval_shape(qmodel.init, jax.random.key(0), x)
    assert set(qmodel.plan(x).norms.values()) == {"conv1"}
    rows = qmodel.rows(Precision(weights=jnp.float32(4), acts=2), variables)
    assert {name: int(row.index) for name, row in rows.items() if name[-1] == "scale"} == {
        ("params", "before", "scale"): 2,
        ("params", "norm0", "scale"): 2,
        ("params", "norm2", "scale"): 2,
        ("quant", "conv0", "acts", "scale"): 3,
        ("quant", "conv1", "acts", "scale"): 0,
        ("quant", "head", "acts", "scale"): 3,
    }
    # Float activations have no row in use, and neither have those of a step without bits for them.
    for acts in (None, jnp.float32(32)):
        rows = qmodel.rows(Precision(weights=8, acts=acts), variables)
        assert rows["quant", "conv1", "acts", "scale"].index == -1 and rows["params", "before", "scale"].index == 0
    fixed = quantize(CNN(), (Rule(weight_quantizer=WEIGHTS, weights=8),), per_width=WIDTHS)
    assert set(fixed.plan(x).norms.values()) == {None} and "before by none" in str(fixed.plan(x))


def test_rows_of_a_table_that_another_quantizer_wraps():
    table = LSQ(across_bits="table", widths=(2, 4, 8))
    for quantizer in (table, EWGS(table)):
        x = jax.ShapeDtypeStruct((2, 6), "float32")
        qmodel = quantize(nn.Dense(4, name="dense"), Rule(weight_quantizer=quantizer, act_quantizer=None))
        variables = jax.eval_shape(qmodel.init, jax.random.key(0), x)
        rows = qmodel.rows(Precision(weights=jnp.float32(4)), variables)
        assert {name[-1]: (row.axis, int(row.index)) for name, row in rows.items()} == {"scale": (0, 1)}
    rule = Rule(weight_quantizer=EWGS(table))
    assert table_widths(_longer(rule).weight_quantizer) == (1, 2, 4, 8)


def test_models_without_norms_and_rules_without_tables():
    x = jax.ShapeDtypeStruct(MATRIX, "float32")
    model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    qmodel = quantize(model, RULES, per_width=[2, 8, 4, 6])
    assert qmodel.per_width == WIDTHS and "no norm layer" in str(qmodel.plan(x))
    variables = jax.eval_shape(qmodel.init, jax.random.key(0), x)
    assert all(name[0] == "quant" for name in qmodel.rows(Precision(8, 8), variables))
    assert len(qmodel.rows(Precision(8, 8), variables)) == 4
    assert quantize(model, Rule()).per_width == () and "norm" not in str(quantize(model, Rule()).plan(x))


def test_a_call_that_skips_layers_keeps_the_rows_of_those_and_calibration_all():
    model, shape, _ = MODELS["own"]
    x, fresh, rows = inputs_of(shape), *(quantize(model, RULES, per_width=WIDTHS) for _ in range(2))
    variables = scrambled(jax.eval_shape(rows.init, jax.random.key(0), x))
    bits = Precision(jnp.float32(4), jnp.float32(4))
    _, updated = jit(lambda v, b: fresh.apply(v, x, train=False, bits=b, mutable=True))(variables, bits)
    assert_equal(dict(updated), variables)
    with pytest.raises(UsageError, match="'auxiliary', whose width chooses the variables of 'own'"):
        jax.eval_shape(lambda v: rows.apply(v, x, train=False, bits={"first": bits, "head": bits}), variables)
    unseen = quantize(model, RULES, per_width=WIDTHS)
    with pytest.raises(UsageError, match=r"'params/auxiliary/bias'.* call plan or init before"):
        jax.eval_shape(lambda v: unseen.apply(v, x, train=False, bits={"first": bits, "head": bits}), variables)
    calibrated = rows.calibrate(variables, x, bits=bits)
    before, after = ({name: tree[name] for name in tree if name != "quant"} for tree in (variables, calibrated))
    assert_equal(after, before)
    assert jax.tree.structure(calibrated["quant"]) == jax.tree.structure(variables["quant"])


def test_statistics_are_reestimated_in_the_row_of_the_width():
    rows, plain = (quantize(InputNorm(), RULES, per_width=widths) for widths in (WIDTHS, ()))
    given = batches(2)
    variables = scrambled(jax.eval_shape(rows.init, jax.random.key(0), given[0]["image"]))
    bits = Precision(*[jnp.float32(4)] * 2)

    def measured(qmodel, variables):
        return names_of(reestimate(jit(make_reestimate_step(qmodel)), variables, given, 2, bits))

    found = measured(rows, variables)
    expected = measured(plain, row_of(variables, rows.held(variables), 2))
    for name, leaf in names_of(variables["batch_stats"]).items():
        np.testing.assert_array_equal(found[name][2], expected[name])
        np.testing.assert_array_equal(np.delete(found[name], 2, 0), np.delete(leaf, 2, 0))
        assert np.all(found[name][2] != leaf[2])


@pytest.mark.parametrize("widths", [(8, 8), (0, 2), (24,), (4.5,), 8, "84", (True,)])
def test_refused_widths(widths):
    with pytest.raises(UsageError) as error:
        quantize(CNN(), RULES, per_width=widths)
    assert "\n" not in str(error.value) and f"per_width={widths!r}" in str(error.value)


def test_variables_without_rows_are_refused_with_what_to_do():
    x = jax.ShapeDtypeStruct(IMAGE, "float32")
    qmodel = quantize(CNN(), RULES, per_width=WIDTHS)
    variables = jax.eval_shape(CNN().init, jax.random.key(0), x)
    for given, words in (
        (variables, ("has shape (4,)", "(4, 4)", "qmodel.with_rows(variables, *args)")),
        (jax.eval_shape(quantize(CNN(), RULES, per_width=(8, 2)).init, jax.random.key(0), x), ("shape (2, 4)",)),
    ):
        for bits in (Precision(8, 8), None):
            with pytest.raises(UsageError) as error:
                jax.eval_shape(lambda v, x, bits=bits: qmodel.apply(v, x, bits=bits), given, x)
            message = str(error.value)
            assert "\n" not in message and "per_width=(8, 6, 4, 2): 'batch_stats/norm0/mean'" in message
            assert all(word in message for word in words)
    with pytest.raises(UsageError, match="call plan or init"):
        quantize(CNN(), RULES, per_width=WIDTHS).rows(Precision(8, 8), variables)
