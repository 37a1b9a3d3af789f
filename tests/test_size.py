"""Size accounting against NumPy, and against what export writes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import qtrain
from qtrain import Precision, Rule, export
from qtrain.quantizers import LSQ, Float, Uniform
from qtrain.size import measure, size_metrics, size_summary, traced_size

KEY = jax.random.key(0)


def reference(codes):
    """Levels, span, fixed bits, entropy and bytes, written down from their definitions."""
    values, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    entropy = -sum(p * np.log2(p) for p in share)
    span = int(codes.max()) - int(codes.min()) + 1
    by_span, by_level = int(np.ceil(np.log2(span))), int(np.ceil(np.log2(values.size)))
    entry = max(np.min_scalar_type(v).itemsize for v in (min(codes.min(), -codes.max() - 1),))
    plain, table = -(-codes.size * by_span // 8), -(-codes.size * by_level // 8) + entry * values.size
    bits, size = (by_span, plain) if plain <= table else (by_level, table)
    return values.size, span, bits, entropy, size


CODES = {
    "uniform": np.random.default_rng(0).integers(-7, 8, (40, 30)),
    "peaked": np.round(np.random.default_rng(1).normal(size=1001) * 2).astype(int),
    "constant": np.full(33, 5),
    "one": np.array([[-3]]),
    "signs": np.resize([-1, 1, 1], 301),
    "unbounded": np.round(np.random.default_rng(2).normal(size=500) * 1e5).astype(int),
    "far": np.resize([-40_000, 3, 90_000], 4001),
    "int8": np.arange(-128, 128),
    "int16": np.resize([-129, 0, 1000], 999),
}


@pytest.mark.parametrize("name", CODES)
def test_levels_bits_entropy_and_bytes_are_those_of_their_definitions(name):
    codes = CODES[name].astype(np.int32)
    expected = reference(codes)
    found = measure(codes, scale_bytes=12)
    assert (*found[:3], found.code_bytes, found.bytes) == (*expected[:3], expected[4], expected[4] + 12)
    assert found.entropy_bits == pytest.approx(expected[3], abs=1e-12)
    traced = jax.jit(traced_size)(jnp.asarray(codes))
    np.testing.assert_array_equal([*traced[:3], traced.code_bytes], [*expected[:3], expected[4]])
    assert float(traced.entropy_bits) == pytest.approx(expected[3], rel=2e-6, abs=1e-6)


def test_codes_that_are_small_floats_are_levels():
    codes = np.resize(np.array([0.5, 1, 1.5, -6, 3], np.float32), 100)
    found, traced = measure(codes), jax.jit(traced_size)(jnp.asarray(codes))
    assert (found.levels, found.span, found.bits, found.code_bytes) == (5, 5, 3, 38 + 20)
    assert found.entropy_bits == pytest.approx(np.log2(5))
    np.testing.assert_allclose(np.asarray(traced, np.float32), np.asarray(found, np.float32), rtol=1e-6)


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(4)(x)


@pytest.fixture(scope="module", params=["affine", "lsq", "float"])
def model(request):
    """A quantized model, its variables, and its quantized parameters; bias quantized in the second layer alone."""
    chosen = {"affine": Uniform("affine"), "lsq": LSQ(per="channel"), "float": Float("e5m2")}[request.param]
    rules = [
        Rule(path="Dense_0", weights=8, weight_quantizer=chosen),
        Rule(weight_quantizer=chosen, bias_quantizer=Uniform("symmetric", per="tensor")),
    ]
    qmodel = qtrain.quantize(TwoLayers(), rules)
    inputs = jax.random.normal(KEY, (3, 32))
    variables = jax.jit(lambda key: qmodel.init(key, inputs, bits=Precision(6, 6)))(KEY)
    variables["params"]["Dense_1"]["bias"] = jnp.asarray([0.1, 0.2, -0.3, 0.05])
    return qmodel, variables, inputs, qmodel.weights(inputs)


def test_metrics_summary_and_file_agree(model, tmp_path):
    qmodel, variables, inputs, weights = model
    bits = Precision(weights=6, acts=6)
    path = tmp_path / "m.safetensors"
    report = export.save(path, qmodel, variables, bits, inputs, call={})
    params, quant = variables["params"], variables["quant"]
    summary = size_summary(weights, params, quant, bits)
    compiled = jax.jit(lambda p, q, b: size_metrics(weights, p, q, b))
    metrics = {name: float(value) for name, value in compiled(params, quant, jax.tree.map(np.float32, bits)).items()}
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    payload = sum(value.nbytes for name, value in tensors.items() if name.startswith("weights/"))
    assert summary["stored_bytes"] == metrics["size/bytes"] == report.weight_bytes == payload
    elements = 32 * 16 + 16 * 4 + 4
    assert summary["compression"] == pytest.approx(4 * elements / payload)
    # 16 of the biases are not quantized.
    assert summary["compression_model"] == pytest.approx(4 * (elements + 16) / (payload + 4 * 16))
    assert metrics["size/compression"] == pytest.approx(summary["compression"], rel=1e-6)
    assert metrics["size/compression_model"] == pytest.approx(summary["compression_model"], rel=1e-6)
    assert metrics["size/bits"] == pytest.approx(summary["weight_bits"], rel=1e-6)
    assert metrics["size/entropy_bits"] == pytest.approx(summary["weight_entropy_bits"], rel=1e-5)
    widths = {row.name: row.width for row in report.rows}
    assert {f"size/{name}/bits" for name in widths} <= metrics.keys()
    assert {name: metrics[f"size/{name}/bits"] for name in widths} == widths
    assert 0 < metrics["size/entropy_bits"] <= metrics["size/bits"]
    # The file is the payload, the other variables, and a header.
    others = sum(value.nbytes for name, value in tensors.items() if not name.startswith("weights/"))
    assert payload + others < report.bytes < payload + others + 4000


def test_bits_are_data_and_what_they_leave_in_float_takes_32(model):
    _, variables, _, weights = model
    compiled = jax.jit(lambda b: size_metrics(weights, variables["params"], variables["quant"], b))
    found = [compiled(jax.tree.map(np.float32, Precision(weights=b, acts=8))) for b in (6, 8, 24, 32)]
    assert compiled._cache_size() == 1
    assert float(found[0]["size/bytes"]) < float(found[1]["size/bytes"]) < float(found[2]["size/bytes"])
    fixed = [float(each["size/Dense_0/kernel/bits"]) for each in found]
    assert len(set(fixed)) == 1 and fixed[0] <= 8
    for each in found[2:]:
        assert float(each["size/Dense_1/kernel/bits"]) == float(each["size/Dense_1/bias/entropy_bits"]) == 32.0
    # The summary counts them too: the run that ends in float is not the smaller one.
    summary = size_summary(weights, variables["params"], variables["quant"], Precision(weights=32, acts=8))
    assert summary["stored_bytes"] == float(found[2]["size/bytes"])
    assert summary["weight_bits"] == pytest.approx(float(found[2]["size/bits"]), rel=1e-6)
    assert summary["weight_entropy_bits"] == pytest.approx(float(found[2]["size/entropy_bits"]), rel=1e-5)


def test_a_model_wholly_in_float_has_its_four_bytes_an_element():
    inputs = jnp.ones((1, 8))
    qmodel = qtrain.quantize(TwoLayers(), Rule())
    params = qmodel.init(KEY, inputs)["params"]
    summary = size_summary(qmodel.weights(inputs), params, {}, Precision(weights=32))
    assert summary["stored_bytes"] == 4 * (8 * 16 + 16 * 4)
    assert summary["weight_bits"] == summary["weight_entropy_bits"] == 32
    assert summary["compression"] == summary["compression_model"] == 1


def test_where_no_weight_is_quantized_there_is_nothing_to_say():
    qmodel = qtrain.quantize(TwoLayers(), Rule(weight_quantizer=None))
    inputs = jnp.ones((1, 8))
    params = qmodel.init(KEY, inputs)["params"]
    for weights, bits in ((qmodel.weights(inputs), Precision(4, 4)), ((), Precision(4, 4))):
        assert size_metrics(weights, params, {}, bits) == {}
        assert size_summary(weights, params, {}, bits) == {}
    weights = qtrain.quantize(TwoLayers(), Rule()).weights(inputs)
    assert size_summary(weights, params, {}, Precision()) == {}
