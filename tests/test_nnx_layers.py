"""Injection into nnx models: which of a model's layers it reaches, and mistakes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from nnx_models import BITS, MLP, NOISY, distance, made, normal

import qtrain
from qtrain.errors import UsageError
from qtrain.inject import Rule
from qtrain.inject.nnx import QuantizedModule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import DoubleRounding, Uniform


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
