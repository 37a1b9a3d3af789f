"""Injection into nnx models: the same numbers as the linen twin's, and a module that is as it was afterwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import BITS, GRID, MLP, NOISY, TWINS, Recurrent, distance, made, normal

from qtrain import inject
from qtrain.errors import UsageError
from qtrain.inject import Rule
from qtrain.inject.nnx import Quant, QuantStat, quantize
from qtrain.precision import Precision
from qtrain.quantizers import LSQ, Uniform

WIDTHS = (2.0, 3.0, 8.0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


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


def twin_variables(linen, model, x):
    """The linen twin's variables with the numbers of `model`."""
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x)
    known = flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(known["/".join(key.key for key in path[1:])]), shapes
    )


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
