"""Injection into nnx models: the same numbers as the linen twin's, and a module that is as it was afterwards."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qtrain
from qtrain import inject
from qtrain.errors import UsageError
from qtrain.inject import Rule
from qtrain.inject.nnx import Quant, QuantizedModule, QuantStat, quantize
from qtrain.precision import Precision
from qtrain.quantizers import LSQ, DoubleRounding, Uniform

GRID = Uniform("symmetric", per="channel")
NOISY = dataclasses.replace(GRID, rounding="stochastic")
WIDTHS = (2.0, 3.0, 8.0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BITS = Precision(weights=4, acts=4)
TOKENS = np.arange(8) % 5


def normal(*shape):
    """Standard normal numbers; by numpy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


class LinenResidual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), strides=2, use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=False, name="norm1")(y))
        y = nn.BatchNorm(use_running_average=False, name="norm2")(nn.Conv(4, (3, 3), name="conv2")(y))
        return nn.relu(y + nn.Conv(4, (1, 1), strides=2, name="shortcut")(x))


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, rngs=rngs)
        self.shortcut = nnx.Conv(3, 4, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attend")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(8, name="up")(x)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(nn.LSTMCell(4, name="cell"), name="rnn")(x))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(5, 4, rngs=rngs))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.Embed(5, 6, name="table")
        x = nn.ConvTranspose(6, (3,), strides=2, name="up")(nn.Einsum((6, 4), "bti,io->bto", name="merge")(x))
        return table.attend(nn.remat(nn.Einsum)((6, 6), "bti,io->bto", name="again")(x + table(TOKENS)))


class Layers(nnx.Module):
    """Those that call jax themselves, one inside ``nnx.remat``."""

    def __init__(self, rngs):
        self.merge = nnx.Einsum("bti,io->bto", (6, 4), (4,), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 6, (3,), strides=2, rngs=rngs)
        self.again = nnx.Einsum("bti,io->bto", (6, 6), (6,), rngs=rngs)
        self.table = nnx.Embed(5, 6, rngs=rngs)

    def __call__(self, x):
        x = self.up(self.merge(x)) + self.table(TOKENS)
        return self.table.attend(nnx.remat(lambda layer, x: layer(x))(self.again, x))


class MLP(nnx.Module):
    def __init__(self, rngs, first=nnx.Linear, **kwargs):
        self.up, self.down = first(6, 8, rngs=rngs, **kwargs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))

    def fails(self, x):
        return self.down(self.up(x)) / jnp.zeros((7, 7))


TWINS = {
    "residual block": (LinenResidual(), Residual, normal(2, 6, 6, 3)),
    "attention block": (LinenAttention(), Attention, normal(2, 3, 6)),
    "lstm": (LinenRecurrent(), Recurrent, normal(2, 3, 5)),
    "layers": (LinenLayers(), Layers, normal(2, 4, 6)),
}


def linen_path(path):
    """The name that the linen twins have for a module or variable."""
    return path.removeprefix("module/").removeprefix("rnn/").replace("if_", "if")


def flat_state(state):
    """Path, as linen has it → array."""
    found = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    return {linen_path(path): np.asarray(variable.get_value()) for path, variable in found.items()}


def flat_tree(tree):
    """Path without the collection → array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path[1:]): np.asarray(leaf) for path, leaf in leaves}


def made(cls, *args, **kwargs):
    """A model with normal numbers for parameters; no initialisation to compile."""
    model = nnx.eval_shape(lambda: cls(nnx.Rngs(0), *args, **kwargs))
    rng = np.random.default_rng(1)

    def number(variable):
        leaf = variable.get_value()
        if isinstance(variable, nnx.Param):
            return variable.replace(jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype))
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return variable.replace(jax.random.key(0) if is_key else jnp.asarray(np.ones(leaf.shape), leaf.dtype))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(number, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def twin_variables(linen, model, x):
    """The linen twin's variables with the numbers of `model`."""
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x)
    known = flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(known["/".join(key.key for key in path[1:])]), shapes
    )


def distance(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.mark.parametrize("name", TWINS)
def test_values_and_gradients_are_the_linen_twins_with_one_trace_for_all_widths(name):
    linen, cls, x = TWINS[name]
    model = made(cls)
    variables = twin_variables(linen, model, x)
    # Noise is drawn by a layer's path and shape: the gates of the two cells have different names, the products of the
    # two attentions other axes.
    grads = GRID if name in ("lstm", "attention block") else NOISY
    rule = Rule(ops="all", grad_quantizer=grads, bias_quantizer=Uniform("symmetric", per="tensor"))
    qmodel, twin, target, traces = quantize(model, rule), inject.quantize(linen, rule), normal(5000), []

    def loss(out):
        return jnp.sum(out * target[: out.size].reshape(out.shape)), out

    @jit
    def step(state, bits, key):
        traces.append(1)
        merged = nnx.merge(graphdef, state)
        of_x = nnx.value_and_grad(lambda m, x: loss(m(x, bits=bits, key=key)), argnums=(0, 1), has_aux=True)
        return *of_x(merged, x), nnx.state(merged)

    @jit
    def twin_step(variables, bits, key):
        def function(params, x):
            out, state = twin.apply(
                {**variables, "params": params}, x, bits=bits, rngs={"quant": key}, mutable=["batch_stats"]
            )
            value, out = loss(out)
            return value, (out, state)

        return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(variables["params"], x)

    graphdef, qstate = nnx.split(qmodel)
    for width in WIDTHS:
        bits, key = Precision(*map(jnp.float32, (width, width, 8.0))), jax.random.key(int(width))
        (_, out), (gradient, of_x), qstate = step(qstate, bits, key)
        (_, (twin_out, state)), (twin_gradient, twin_of_x) = twin_step(variables, bits, key)
        assert distance(out, twin_out) <= 1e-6
        assert distance(of_x, twin_of_x) <= 1e-6
        gradient, twin_gradient = flat_state(gradient), flat_tree({"params": twin_gradient})
        assert gradient.keys() == twin_gradient.keys()
        whole = np.linalg.norm([np.linalg.norm(leaf) for leaf in twin_gradient.values()])
        for path, leaf in twin_gradient.items():  # that of the keys' bias is zero but for rounding
            assert np.linalg.norm(gradient[path] - leaf) <= 1e-6 * max(np.linalg.norm(leaf), 1e-2 * whole), path
        variables = {**variables, **state}
        stats = flat_state(nnx.filter_state(qstate, nnx.BatchStat))
        for path, leaf in flat_tree({key: state[key] for key in state}).items():
            assert distance(stats[path], leaf) <= 1e-6, path
    assert len(traces) == 1

    plan, twin_plan = qmodel.plan(x), twin.plan(x)
    rows, twin_rows = ({linen_path(row.path): row for row in each if row.macs} for each in (plan, twin_plan))
    assert rows.keys() == twin_rows.keys() and plan.macs == twin_plan.macs and plan.coverage == twin_plan.coverage
    for path, row in twin_rows.items():
        own = dataclasses.replace(rows[path], path=row.path, module=row.module)
        assert dataclasses.replace(own, bits=row.bits) == row
        assert dataclasses.replace(rows[path].bits, path=row.path) == row.bits
    assert [linen_path(weight.path) for weight in qmodel.weights(x)] == [weight.path for weight in twin.weights(x)]
    owners = {(linen_path(path), kind): quantizer for (path, kind), quantizer in qmodel.quantizers(x).items()}
    assert owners == twin.quantizers(x)


@pytest.mark.parametrize("name", TWINS)
def test_without_bits_it_is_the_plain_module_bit_for_bit_and_so_is_its_state(name):
    _, cls, x = TWINS[name]
    model = made(cls)
    plain = nnx.clone(model)
    fields = {path: dict(vars(module)) for path, module in nnx.iter_modules(model)}
    call = nnx.jit(lambda module, x: module(x))
    np.testing.assert_array_equal(call(quantize(model), x), call(plain, x))
    quantize(plain).plan(x)
    jax.tree.map(np.testing.assert_array_equal, *map(flat_with_keys, (model, plain)))
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    for path, module in nnx.iter_modules(model):
        assert all(vars(module)[field] is value for field, value in fields[path].items() if callable(value))


def flat_with_keys(model):
    values = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
    keys = {path: jnp.issubdtype(value.dtype, jax.dtypes.prng_key) for path, value in values.items()}
    return {str(path): jax.random.key_data(value) if keys[path] else value for path, value in values.items()}


@pytest.mark.parametrize("method", [None, "fails"])
def test_the_live_module_gets_its_functions_back_also_after_an_exception(method):
    model = made(MLP)
    qmodel = quantize(model, Rule(bias_quantizer=GRID))
    before = {path: dict(vars(module)) for path, module in nnx.iter_modules(model)}
    graphdef = nnx.graphdef(qmodel)
    if method:
        with pytest.raises(TypeError, match="incompatible shapes"):
            qmodel(normal(2, 6), bits=BITS, method=method)
    else:
        jaxpr = str(jax.make_jaxpr(lambda x: qmodel(x, bits=BITS))(normal(2, 6)))
        assert "round" in jaxpr and "round" not in str(jax.make_jaxpr(model)(normal(2, 6)))
    assert nnx.graphdef(qmodel) == graphdef
    assert {path: dict(vars(module)) for path, module in nnx.iter_modules(model)} == before


def test_learned_parameters_are_found_by_type_and_trained_by_an_optimizer():
    x, model = normal(8, 6), made(MLP)
    qmodel = quantize(model, Rule(weight_quantizer=LSQ(), act_quantizer=LSQ()))
    with pytest.raises(UsageError, match=r"'up': its acts have no learned parameters.*qmodel\.init"):
        qmodel(x, bits=BITS)
    qmodel.init(x, bits=BITS)
    begun = float(qmodel.quant.up.weights.scale[...])
    np.testing.assert_allclose(begun, LSQ().init(model.up.kernel[...], 4)["scale"], rtol=1e-6)
    qmodel.calibrate(x, bits=Precision(weights=3, acts=4))
    assert float(qmodel.quant.up.weights.scale[...]) > begun
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(qmodel, nnx.Param))} == {"kernel", "bias"}
    trained = nnx.Any(nnx.Param, Quant)
    optimizer = nnx.Optimizer(qmodel, optax.adam(0.02), wrt=trained)
    target = normal(9, 6)[1:]

    @nnx.jit
    def step(qmodel, optimizer, bits):
        def loss(qmodel):
            return jnp.mean((qmodel(x, bits=bits) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(qmodel)
        optimizer.update(qmodel, gradient)
        return value, nnx.to_pure_dict(nnx.filter_state(gradient, Quant))

    losses, initial = [], flat_tree({"quant": nnx.to_pure_dict(nnx.state(qmodel, Quant))})
    for index in range(12):
        value, gradient = step(qmodel, optimizer, Precision(weights=jnp.float32(3 + index % 2), acts=jnp.float32(4)))
        losses.append(float(value))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    for path, leaf in flat_tree({"quant": gradient}).items():
        moved = flat_tree({"quant": nnx.to_pure_dict(nnx.state(qmodel, Quant))})[path]
        assert path.endswith("/bits") or (np.all(leaf != 0) and np.all(moved != initial[path])), path


def test_scales_inside_a_scan_are_calibrated_by_the_average_over_its_iterations():
    _, cls, x = TWINS["lstm"]
    model = made(cls)
    qmodel = quantize(model, [Rule(".*/ii", act_quantizer=LSQ()), Rule()])
    qmodel.calibrate(x, bits=BITS)
    each = [LSQ().init(x[:, time], 4)["scale"] for time in range(x.shape[1])]
    np.testing.assert_allclose(qmodel.quant.rnn.cell.ii.acts.scale[...], np.mean(each), rtol=1e-6)
    assert "one learned scale for every iteration" in qmodel.plan(x)["rnn/cell/ii"].note


def test_running_ranges_move_in_training_and_rest_in_evaluation():
    quantizer, model = Uniform("unsigned", per="tensor", statistics=0.75), made(MLP)
    qmodel = quantize(model, Rule(act_quantizer=quantizer))
    with pytest.raises(UsageError, match=r"'up' keeps running ranges .* has none yet: call qmodel\.init"):
        qmodel(normal(4, 6), bits=BITS)
    qmodel.init(normal(4, 6))
    call = nnx.jit(lambda qmodel, x: qmodel(x, bits=BITS))
    seen = [normal(4, 6) * scale for scale in (1.0, 3.0)]
    for x in seen:
        call(qmodel, x)
    kept = qmodel.quant_stats.up.acts
    expected = 0.75 * float(seen[0].max()) + 0.25 * float(seen[1].max())
    np.testing.assert_allclose(kept.max[...], expected, rtol=1e-6)
    assert kept.count[...] == 2
    qmodel.eval()
    call(qmodel, 9 * seen[0])
    np.testing.assert_allclose(kept.max[...], expected, rtol=1e-6)
    assert nnx.view(qmodel, use_running_average=False).use_running_average is False
    assert len(nnx.state(qmodel, QuantStat)["quant_stats"]) == 2
    recurrent = quantize(made(Recurrent), Rule(act_quantizer=quantizer))
    with pytest.raises(UsageError, match="cannot be updated from inside a transformation"):
        recurrent.init(normal(2, 3, 5))


class Stacked(nnx.Module):
    """Blocks under ``nnx.scan``."""

    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(MLP, in_axes=(0,)))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: x + block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Transformed(MLP):
    """Layers inside ``nnx.remat`` and ``nnx.jit``."""

    def __call__(self, x):
        x = nnx.jit(lambda layer, x: layer(x))(self.up, x)
        return nnx.remat(lambda layer, x: layer(x))(self.down, nnx.relu(x))


class Tied(nnx.Module):
    """A layer at two paths, a list, layers without a field for their product, and what the injection does not reach."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.blocks = nnx.List([MLP(rngs), nnx.Sequential(nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs), nnx.relu)])
        self.second = self.first
        self.own = nnx.Linear(6, 6, dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs), rngs=rngs)
        self.einsum = nnx.Einsum("ni,io->no", (6, 6), rngs=rngs)
        self.embed = nnx.Embed(6, 6, rngs=rngs)

    def __call__(self, x):
        x = self.second(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.einsum(self.own(x)))


@pytest.mark.parametrize("form", ["scan", "jit and remat"])
def test_layers_inside_transformations_of_the_model(form):
    x, rule = normal(2, 6), Rule(act_quantizer=Uniform("symmetric", per="tensor"))
    call = nnx.jit(lambda m, x, bits: m(x, bits=bits))
    model = made(Stacked) if form == "scan" else made(Transformed)
    qmodel, plain, expected = quantize(model, rule), quantize(made(MLP), rule), x
    out = call(qmodel, x, BITS)
    for index in range(2) if form == "scan" else ():
        nnx.update(plain.module, jax.tree.map(lambda leaf, i=index: leaf[i], nnx.state(model.blocks)))
        expected = expected + call(plain, expected, BITS)
    expected = expected if form == "scan" else call(plain, x, BITS)
    assert distance(out, expected) <= 1e-6
    plan = qmodel.plan(x)
    assert plan.coverage == 1 and plan.macs == 2 * 96 * (2 if form == "scan" else 1)


def test_shared_listed_subclassed_and_unreachable_layers_are_all_in_the_plan():
    qmodel = quantize(made(Tied), Rule())
    plan = qmodel.plan(normal(2, 6))
    quantized = [row.path for row in plan if row.quantized]
    assert quantized == ["first", "blocks/0/up", "blocks/0/down", "blocks/1/layers/0", "einsum", "embed/attend"]
    assert plan["first"].macs == 2 * 72 and plan["second"].note == "the module of 'first', whose rules it follows"
    for path, note in {
        "own": "sets a dot_general of its own",
        "blocks/1/layers/0/lora": "LoRA is not reached by the injection",
    }.items():
        assert plan[path].note == note and plan[path].macs == (48 if "lora" in path else 72)
    assert plan.macs == 2 * 72 + 2 * 96 + 72 + 48 + 3 * 72


class Closed(nnx.Module):
    """A layer behind a function that closes over it, compiled or not."""

    def __init__(self, rngs, compiled):
        self.first, self.layer = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.function = (jax.jit if compiled else lambda function: function)(lambda x: self.layer(x))

    def __call__(self, x):
        return self.function(self.first(x))


def test_a_layer_that_is_called_through_a_closure_is_quantized_or_refused():
    qmodel = quantize(Closed(nnx.Rngs(0), compiled=False), Rule())
    jaxpr = jax.make_jaxpr(lambda x: qmodel(x, bits=BITS))(normal(2, 6))
    assert str(jaxpr).count("dot_general") == 2 and len(qmodel.quantizers(normal(2, 6))) == 4
    qmodel = quantize(Closed(nnx.Rngs(0), compiled=True), Rule())
    with pytest.raises(UsageError, match=r"layers \['layer'\] are planned but were not reached in this trace"):
        jax.eval_shape(lambda x: qmodel(x, bits=BITS), normal(2, 6))


MISTAKES = {
    "matches nothing": (Rule("uq"), {}, "rule path='uq' matches no module.*Did you mean 'up'"),
    "not a rule": ("up", {}, "quantize: rules hold 'u'"),
    "wrong op": (Rule(ops=("conv",)), {}, "matches only what cannot be quantized"),
    "no width": (Rule(), {"bits": Precision(weights=0, acts=4)}, "give"),
    "no precision": (Rule(), {"bits": 4}, "bits=4: give a qtrain.Precision"),
    "path": (Rule(), {"bits": {"upp": BITS}}, r"bits\['upp'\]: no layer.*Did you mean 'up'"),
    "no key": (Rule(weight_quantizer=NOISY), {"bits": BITS}, "rounds stochastically and has no key"),
    "method": (Rule(), {"bits": BITS, "method": "fail"}, "method='fail': MLP has no such method. Did you mean 'fails'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name):
    rules, kwargs, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message) as error:
        quantize(made(MLP), rules)(normal(2, 6), **{"bits": BITS, **kwargs})
    assert "\n" not in str(error.value)


def test_what_is_no_module_or_has_no_layer_is_refused():
    with pytest.raises(UsageError, match=r"int is not a flax\.nnx\.Module instance"):
        quantize(3)
    with pytest.raises(UsageError, match="LayerNorm has no layer that can be quantized"):
        quantize(nnx.LayerNorm(6, rngs=nnx.Rngs(0)), Rule()).plan(normal(2, 6))
    with pytest.raises(UsageError, match=r"reaches none of its layers \('down', 'up'\)"):
        quantize(made(MLP), Rule())(normal(2, 6), bits=BITS, method=lambda module, x: x)
    with pytest.raises(UsageError, match="a quantized convolution takes no out_sharding"):
        conv = quantize(nnx.Conv(3, 3, (3,), rngs=nnx.Rngs(0)), Rule())
        conv.plan(normal(2, 5, 3), out_sharding=jax.P(None))


def test_one_quantize_for_both_kinds_of_module():
    qmodel = qtrain.quantize(made(MLP), Rule(), widest=8)
    assert isinstance(qmodel, QuantizedModule) and qmodel.settings.widest == Precision(8, 8, 8)
    with pytest.raises(UsageError, match=r"per_width=\(8, 4\) is for linen models"):
        qtrain.quantize(made(MLP), Rule(), per_width=(8, 4))


def test_widths_below_eight_are_all_that_some_quantizers_know():
    rule = Rule(weight_quantizer=DoubleRounding(high=4), act_quantizer=None)
    qmodel = quantize(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rule)
    assert qmodel.plan(jnp.ones((1, 3))).macs == 6
