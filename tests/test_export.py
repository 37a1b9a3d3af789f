"""Export: what is loaded computes what was trained, bit for bit, from a file that is as small as it says."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import MLP
from program import small_config

import qtrain
from qtrain import Precision, Rule, export
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.metrics import cross_entropy
from qtrain.quantizers import EWGS, LSQ, TRS, DoReFa, Float, LearnedWidth, Nested, Uniform
from qtrain.state import make_eval_step

KEY = jax.random.key(0)


def random_like(tree, seed=0):
    """`tree` with parameters as if trained: nothing is zero or one any more, scales stay positive."""
    random = np.random.default_rng(seed)

    def drawn(path, x):
        if path[-1].key == "bits":  # the width that an LSQ scale is for
            return x
        noise = random.uniform(0.0, 0.01, x.shape)
        return x * jnp.asarray(random.uniform(0.7, 1.3, x.shape), x.dtype) + jnp.asarray(noise, x.dtype)

    return jax.tree_util.tree_map_with_path(drawn, tree)


def trained(qmodel, inputs, bits, **call):
    """Variables as if trained at `bits`."""
    created = jax.jit(lambda key: qmodel.init(key, inputs, bits=bits, **call))(KEY)
    return random_like(created)


def evaluated(qmodel, variables, inputs, bits, call):
    """Logits as `make_eval_step` computes them: jitted, bits traced."""

    def original(variables, inputs, bits):
        return qmodel.apply(variables, inputs, bits=bits, rngs={"quant": jax.random.key(0)}, **call)

    return np.asarray(jax.jit(original)(variables, inputs, jax.tree.map(np.float32, bits)))


def round_trip(path, qmodel, variables, bits, inputs, call=None, **options):
    """Save, load, and compare logits with evaluation's, exactly."""
    call = call or {}
    report = export.save(path, qmodel, variables, bits, inputs, call=call, **options)
    loaded = export.load(path, module=None if "config" in options else qmodel.module)
    expected = evaluated(qmodel, variables, inputs, bits, call)
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(np.asarray(loaded.logits(inputs)), expected)
    assert report.difference == 0.0
    assert report.bytes == os.path.getsize(path)
    return report, loaded, expected


class ScannedBlocks(nn.Module):
    """Transformer blocks under one scan: kernels are stacks, attention and a residual MLP in each."""

    width: int = 8
    depth: int = 3
    quant_axis: bool = True

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            width: int

            @nn.compact
            def __call__(self, x, _):
                normed = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(num_heads=2)(normed, normed)
                hidden = nn.gelu(nn.Dense(2 * self.width, name="up")(nn.LayerNorm()(x)))
                return x + nn.Dense(self.width, name="down")(hidden), None

        axes = {"params": 0, **({"quant": 0} if self.quant_axis else {})}
        stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=self.depth)
        x, _ = stack(self.width, name="blocks")(x, None)
        return nn.Dense(5, name="head")(x)


QUANTIZERS = {
    "symmetric": (Uniform("symmetric", per="channel"), Uniform("symmetric", per="channel")),
    "affine": (Uniform("affine", per="channel"), Uniform("affine", per="tensor")),
    "aqt groups": (Uniform("aqt", per=4), Uniform("unsigned", per="tensor")),
    "stochastic": (Uniform("symmetric", rounding="stochastic"), Uniform("symmetric", rounding="stochastic")),
    "lsq": (LSQ(per="channel"), LSQ(signed=False, offset=True)),
    "trs": (TRS(), TRS(signed=False)),
    "dorefa": (DoReFa("weights"), DoReFa("acts")),
    "ewgs": (EWGS(LSQ(), delta=0.1), None),
    "nested": (Nested("row"), Uniform("unsigned", per="tensor")),
    "learned width": (LearnedWidth(), LSQ(signed=False)),
    "float": (Float("e4m3", per="channel"), Float("e2m1")),
}


@pytest.mark.parametrize(
    "name, bits", [(name, 6 if name == "float" else 3) for name in QUANTIZERS] + [("symmetric", 1)]
)
def test_a_loaded_mlp_computes_the_logits_of_evaluation(name, bits, tmp_path):
    weight, act = QUANTIZERS[name]
    rules = [Rule(path="Dense_0", weights=8, acts=8, weight_quantizer=weight, act_quantizer=act)]
    rules.append(Rule(weight_quantizer=weight, act_quantizer=act, bias_quantizer=Uniform("symmetric", per="tensor")))
    qmodel = qtrain.quantize(MLP(), rules)
    inputs = jax.random.normal(KEY, (6, 12))
    variables = trained(qmodel, inputs, Precision(bits, bits))
    _, loaded, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, Precision(bits, bits), inputs)
    assert set(loaded.stored) == {f"Dense_{i}/kernel" for i in range(3)} | {f"Dense_{i}/bias" for i in (1, 2)}
    assert {leaf.bits for key, leaf in loaded.stored.items() if "Dense_0" not in key} == {bits}


@pytest.mark.parametrize("name, quant_axis", [("lsq", True), ("symmetric", False)])
def test_a_loaded_scan_of_transformer_blocks_computes_the_logits_of_evaluation(name, quant_axis, tmp_path):
    weight, act = QUANTIZERS[name]
    rule = Rule(weight_quantizer=weight, act_quantizer=act, bias_quantizer=weight)
    qmodel = qtrain.quantize(ScannedBlocks(quant_axis=quant_axis), rule)
    inputs = jax.random.normal(KEY, (2, 4, 8))
    variables = trained(qmodel, inputs, Precision(4, 6))
    report, loaded, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, Precision(4, 6), inputs)
    assert loaded.stored["blocks/up/kernel"].codes.shape == (3, 8, 16)
    assert loaded.stored["blocks/up/kernel"].codes.dtype == jnp.int8
    assert {row.bits for row in report.rows} == {4}


def test_layers_that_compute_in_bfloat16_are_stored_as_their_quantizers_see_them(tmp_path):
    qmodel = qtrain.quantize(MLP(dtype="bfloat16"), Rule(act_quantizer=LSQ()))
    inputs = jax.random.normal(KEY, (6, 12))
    variables = trained(qmodel, inputs, Precision(4, 6))
    _, loaded, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, Precision(4, 6), inputs)
    assert loaded.stored["Dense_2/kernel"].scale.dtype == jnp.bfloat16


def test_running_ranges_and_parameters_in_bfloat16_are_kept(tmp_path):
    kept = Uniform("affine", per="tensor", statistics=0.9)
    model = nn.Dense(5, param_dtype="bfloat16")
    qmodel = qtrain.quantize(model, Rule(weight_quantizer=kept, act_quantizer=kept))
    inputs = jax.random.normal(KEY, (6, 12))
    variables = qmodel.init(KEY, inputs)
    bits = Precision(4, 4)
    _, updated = qmodel.apply(variables, 0.5 * inputs, bits=bits, mutable=["quant_stats"])
    # Weights that moved on: the running range is not their own any more.
    variables = {**variables, **updated, "params": random_like(variables["params"])}
    _, loaded, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, bits, inputs)
    assert loaded.rest["params"]["bias"].dtype == jnp.bfloat16
    assert set(loaded.rest["quant_stats"]) == {"acts"}


@pytest.mark.parametrize(
    "quantizers",
    [
        {},
        {"quant__weights": "affine/channel", "quant__acts": "affine/tensor"},
        {"quant__weights": "lsq/signed", "quant__acts": "lsq/unsigned"},
    ],
    ids=["symmetric", "affine", "lsq"],
)
def test_a_loaded_digits_cnn_gives_the_numbers_of_the_evaluation_step(quantizers, tmp_path):
    config = small_config("digits_cnn", schedule="constant", model__batch_norm=True, **quantizers)
    experiment = build(config)
    inputs = jax.random.normal(KEY, (16, 8, 8, 1))
    bits = Precision(4, 5, 8)
    variables = trained(experiment.qmodel, inputs, bits, train=False)
    options = {"config": config.to_dict(), "num_classes": 10}
    path = tmp_path / "m.safetensors"
    report, loaded, logits = round_trip(path, experiment.qmodel, variables, bits, inputs, {"train": False}, **options)
    batch = {"image": inputs, "label": jnp.arange(16) % 10, "mask": jnp.ones(16)}
    sums = jax.jit(make_eval_step(experiment.qmodel))(variables, batch, jax.tree.map(np.float32, bits))
    assert float(sums["loss"]) == pytest.approx(float(cross_entropy(logits, batch["label"]).sum()), rel=1e-6)
    assert loaded.config["model"]["features"] == [4, 8]
    # The first and the last layer stay at 8 bits; packed bytes and scales are what the rows say.
    assert [row.bits for row in report.rows] == [8, 4, 4, 8]
    assert report.weight_bytes == sum(row.bytes for row in report.rows)
    decoded = experiment.qmodel.module.apply(loaded.variables, inputs, train=False)
    assert decoded.shape == logits.shape and not np.array_equal(decoded, logits)  # activations are not quantized


def test_bits_may_differ_from_layer_to_layer(tmp_path):
    qmodel = qtrain.quantize(MLP(), Rule())
    inputs = jax.random.normal(KEY, (6, 12))
    variables = trained(qmodel, inputs, Precision(4, 4))
    bits = {f"Dense_{i}": Precision(weights=2 + i, acts=8 - i) for i in range(3)}
    report, loaded, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, bits, inputs)
    assert [row.bits for row in report.rows] == [2, 3, 4]
    assert loaded.bits == bits
    wide = {**bits, "Dense_1": Precision(weights=32, acts=8)}
    report, loaded, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, wide, inputs)
    assert [row.name for row in report.rows] == ["Dense_0/kernel", "Dense_2/kernel"]
    np.testing.assert_array_equal(loaded.rest["params"]["Dense_1"]["kernel"], variables["params"]["Dense_1"]["kernel"])


def test_apply_is_the_model_and_logits_is_compiled_once(tmp_path):
    qmodel = qtrain.quantize(MLP(), Rule())
    inputs = jax.random.normal(KEY, (6, 12))
    variables = qmodel.init(KEY, inputs)
    _, loaded, expected = round_trip(tmp_path / "m.safetensors", qmodel, variables, Precision(4, 4), inputs)
    np.testing.assert_allclose(loaded.apply(inputs), expected, rtol=1e-5, atol=1e-6)
    loaded.logits(2 * inputs)
    assert loaded.program._cache_size() == 1


def test_native_execution_is_exported_in_float_and_the_report_says_how_near(tmp_path):
    qmodel = qtrain.quantize(MLP(), Rule(execution="native"), widest=8)
    inputs = jax.random.normal(KEY, (6, 12))
    variables = trained(qmodel, inputs, Precision(8, 8))
    path = tmp_path / "m.safetensors"
    report = export.save(path, qmodel, variables, Precision(8, 8), inputs, call={})
    expected = evaluated(qmodel, variables, inputs, Precision(8, 8), {})
    found = np.asarray(export.load(path, module=MLP()).logits(inputs))
    assert report.difference == np.max(np.abs(found.astype(np.float64) - expected)) < 0.02 * np.ptp(expected)


def test_a_constant_tensor_takes_no_bits_and_a_sign_one(tmp_path):
    qmodel = qtrain.quantize(nn.Sequential([nn.Dense(64), nn.Dense(8)]), Rule(act_quantizer=None))
    inputs = jax.random.normal(KEY, (2, 32))
    variables = qmodel.init(KEY, inputs)
    variables["params"]["layers_0"]["kernel"] = jnp.full((32, 64), 0.5)
    report, _, _ = round_trip(tmp_path / "m.safetensors", qmodel, variables, Precision(weights=1), inputs)
    first, second = report.rows
    assert (first.width, first.bytes) == (0, 64 * 4)
    assert (second.width, second.bytes) == (1, 64 * 8 // 8 + 2 + 8 * 4)


@pytest.mark.parametrize(
    "rules, bits, message",
    [
        (Rule(), Precision(), "a float run"),
        (Rule(), Precision(weights=32, acts=8), "a float run"),
        (Rule(weight_quantizer=None), Precision(4, 4), "a float run"),
    ],
)
def test_a_float_run_has_nothing_to_export(rules, bits, message, tmp_path):
    qmodel = qtrain.quantize(MLP(), rules)
    inputs = jnp.ones((2, 12))
    with pytest.raises(UsageError, match=message):
        export.save(tmp_path / "m.safetensors", qmodel, qmodel.init(KEY, inputs), bits, inputs, call={})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path):
    class Own(Uniform):
        pass

    inputs = jnp.ones((2, 12))
    for quantizer, spoil, message in (
        (Own(), 1.0, "only the quantizers of qtrain.quantizers can be stored"),
        (Uniform(), np.nan, "'Dense_1/kernel' cannot be stored as integers: it holds values that are not finite"),
    ):
        qmodel = qtrain.quantize(MLP(), Rule(weight_quantizer=quantizer))
        variables = qmodel.init(KEY, inputs)
        variables["params"]["Dense_1"]["kernel"] *= spoil
        with pytest.raises(UsageError, match=message):
            export.save(tmp_path / "m.safetensors", qmodel, variables, Precision(4, 4), inputs, call={})
    qmodel = qtrain.quantize(MLP(), Rule())
    with pytest.raises(UsageError, match="cannot be written: no such file or directory; give another file"):
        export.save(tmp_path / "no" / "m", qmodel, qmodel.init(KEY, inputs), Precision(4, 4), inputs, call={})
    assert not list(tmp_path.iterdir())
