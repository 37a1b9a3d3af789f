"""Switching: one file of h-bit integers is the trained model at every width, bit for bit."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from inject_models import MLP
from safetensors import safe_open
from safetensors.numpy import save_file

import qtrain
from qtrain import Precision, Rule, export
from qtrain.errors import UsageError
from qtrain.export import file
from qtrain.inject.per_width import row
from qtrain.quantizers import LSQ, DoubleRounding

KEY = jax.random.key(0)
WIDTHS = (8, 6, 4, 2)
TABLE = LSQ(signed=False, offset=True, across_bits="table", widths=tuple(sorted(WIDTHS)))


class CNN(nn.Module):
    """Three convolutions with batch norm, one of them with a bias that is quantized, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        for index, width in enumerate((6, 8, 8)):
            x = nn.Conv(width, (3, 3), use_bias=index == 2, name=f"conv_{index}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm_{index}")(x))
        return nn.Dense(10, name="head")(jnp.mean(x, (1, 2)))


def rules(widest=8, table=TABLE, **options):
    """First and last at 8 bits, the others at those of the step."""
    ends = DoubleRounding(high=8)
    return (
        Rule(position="ends", weights=8, acts=8, weight_quantizer=ends, act_quantizer=LSQ(across_bits="keep")),
        Rule(
            weight_quantizer=DoubleRounding(high=widest, per="channel"),
            bias_quantizer=DoubleRounding(high=widest),
            act_quantizer=table,
            **options,
        ),
    )


def as_if_trained(tree, seed=0):
    """`tree` with every element moved by itself: no two rows are equal, and no layer is dead at 2 bits."""
    random = np.random.default_rng(seed)

    def moved(path, x):
        kind = jax.tree_util.keystr(path, simple=True, separator="/")
        factor = 2.0 if kind.endswith("kernel") else 0.5 if kind.endswith("acts/scale") else 1.0
        shift = 0.5 if "norm" in kind and kind.endswith("bias") else 0.01
        return jnp.asarray(
            factor * x * random.uniform(0.7, 1.3, x.shape) + shift * random.uniform(1, 2, x.shape), x.dtype
        )

    return jax.tree_util.tree_map_with_path(moved, jax.device_get(tree))


def evaluation(qmodel):
    """Logits as an evaluation step computes them: one program, bits traced."""

    @jax.jit
    def logits(variables, inputs, bits):
        return qmodel.apply(variables, inputs, bits=bits, rngs={"quant": jax.random.key(0)}, train=False)

    return lambda variables, inputs, bits: np.asarray(logits(variables, inputs, jax.tree.map(np.float32, bits)))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """A CNN with norms per width, its variables, its file, the report, and its evaluation."""
    qmodel = qtrain.quantize(CNN(), rules(), per_width=WIDTHS)
    inputs = jax.random.normal(KEY, (6, 8, 8, 3))
    variables = as_if_trained(jax.jit(lambda key: qmodel.init(key, inputs, bits=Precision(8, 8)))(KEY))
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    report = export.save(path, qmodel, variables, Precision(8, 8), inputs)
    return qmodel, variables, inputs, path, report, evaluation(qmodel)


REQUESTS = {
    "8": (8, Precision(8, 8)),
    "6": (6, Precision(6, 6)),
    "4": (4, Precision(4, 4)),
    "2": (2, Precision(2, 2)),
    "between the trained": (5, Precision(5, 5)),
    "weights alone": (Precision(weights=2, acts=8), Precision(2, 8)),
    "a layer each": (
        {"conv_1": 4, "conv_2": 2},
        {"conv_1": Precision(4, 4), "conv_2": Precision(2, 2)},
    ),
    "some layers": (
        {"conv_2": Precision(2, 6)},
        {"conv_1": Precision(8, 8), "conv_2": Precision(2, 6)},
    ),
}


def test_a_file_gives_the_logits_of_training_at_every_width_and_assignment(cnn):
    _, variables, inputs, path, report, evaluate = cnn
    stored = export.load(path, module=CNN())
    seen = {}
    for name, (request, bits) in REQUESTS.items():
        switched = stored.at(request)
        expected = evaluate(variables, inputs, bits)
        np.testing.assert_array_equal(switched.logits(inputs), expected, err_msg=name)
        assert switched.bits == bits
        seen[name] = expected
    shown = list(seen.values())
    assert all(not np.array_equal(a, b) for i, a in enumerate(shown) for b in shown[:i])  # each is another model
    assert stored.program._cache_size() == 1  # nothing is compiled again
    assert report.difference == 0.0
    # What was switched can be switched again, to wider ones too: all are made from the file's integers.
    for name in ("2", "8", "a layer each"):
        switched = switched.at(REQUESTS[name][0])
        np.testing.assert_array_equal(switched.logits(inputs), seen[name])
    loaded = export.load(path, bits=4, module=CNN())
    np.testing.assert_array_equal(loaded.logits(inputs), seen["4"])
    # Another program, whose sums are in another order: what it is told is what was switched to.
    np.testing.assert_allclose(loaded.apply(inputs, train=False), seen["4"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 6, 4, 2, 3])
def test_integers_stay_int8_and_are_the_weights_rounded_twice(cnn, bits):
    _, variables, _, path, _, _ = cnn
    for name, one in export.load(path, bits, module=CNN()).stored.items():
        layer, leaf = name.split("/")
        width = 8 if layer in ("conv_0", "head") else bits
        learned = variables["quant"][layer]["bias" if leaf == "bias" else "weights"]["scale"]
        scale = np.float32(learned).reshape(-1 if np.ndim(learned) else ())
        wide = np.clip(np.rint(np.asarray(variables["params"][layer][leaf]) * (np.float32(1) / scale)), -128, 127)
        codes = np.clip(np.rint(wide / 2 ** (8 - width)), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
        assert one.codes.dtype == jnp.int8 and one.bits == width
        np.testing.assert_array_equal(one.codes, codes)
        np.testing.assert_array_equal(np.ravel(one.scale), np.ravel(scale) * 2 ** (8 - width))


def test_norms_are_those_of_the_layer_before_at_its_width(cnn):
    _, variables, _, path, _, _ = cnn
    stored = export.load(path, module=CNN())
    assert {"conv_2/kernel", "conv_2/bias"} <= stored.stored.keys()
    switched = stored.at({"conv_1": 2, "conv_2": 5})
    # norm_0 has no layer before it that follows the schedule, and goes by the first one after it.
    for norm, width in {"norm_0": 2, "norm_1": 2, "norm_2": 5}.items():
        for collection, leaf in (("params", "scale"), ("batch_stats", "mean")):
            rows = variables[collection][norm][leaf]
            found = switched.rest[collection][norm][leaf]
            np.testing.assert_array_equal(found, rows[row(WIDTHS, width)])
    assert stored.source.rest["params"]["norm_0"]["scale"].shape == (4, 6)
    shapes = jax.eval_shape(CNN().init, KEY, jnp.ones((1, 8, 8, 3)))  # the plain model's
    assert jax.tree.map(jnp.shape, switched.rest["batch_stats"]) == jax.tree.map(jnp.shape, shapes["batch_stats"])


def test_the_report_counts_separate_models_and_the_file_is_near_the_widest_of_them(cnn, tmp_path):
    qmodel, variables, inputs, path, report, _ = cnn
    assert list(report.separate) == list(WIDTHS)
    tensors, _ = file.read(path)
    assert report.shared == sum(value.nbytes for value in tensors.values())
    assert list(report.separate.values()) == sorted(report.separate.values(), reverse=True)
    assert sum(report.separate.values()) > 1.5 * report.shared
    # A file of one width has what is counted for it, but for the tables of activations, which keep their rows.
    alone = export.save(tmp_path / "m", qmodel, variables, Precision(4, 4), inputs)
    tables = 2 * 2 * 4 * (len(WIDTHS) - 1)
    tensors, content = file.read(tmp_path / "m")
    assert sum(value.nbytes for value in tensors.values()) == report.separate[4] + tables
    assert content["per_width"] == {"widths": [], "rows": {}}
    assert not alone.separate and "conv_1/kernel is at 4 of 8 bits" in str(alone)
    shown = str(report)
    assert f"one model for 8, 6, 4, 2 bits: {report.shared:,} bytes of tensors" in shown and "bit-identical" in shown


MISTAKES = {
    "wider": (9, "'conv_1/kernel' is stored in 8 bits, and 9 cannot be made from them; give 2 to 8"),
    "narrower": (1, "give 2 to 8"),
    "float": (32, "and 32 cannot be made from them; give 2 to 8"),
    "no width": (2.5, "bits=2.5 is no width; give a whole number of bits of at least 1"),
    "text": ("4", "bits='4' is no width"),
    "zero": (Precision(0, 4), "bits=0 is no width"),
    "none": (Precision(acts=4), "weights=None leaves 'conv_1' in float, and the file holds its integers alone"),
    "unknown": ({"conv1": 4}, r"bits\['conv1'\]: no layer of that path is quantized. Did you mean 'conv_1'"),
    "parameter": ({"conv_1/kernel": 4}, r"bits\['conv_1/kernel'\]: no layer of that path is quantized"),
    "fixed": ({"conv_0": 4}, r"bits\['conv_0'\]: a rule of the run fixes this layer at 8 bits"),
    "wider, one layer": ({"conv_2": 12}, "'conv_2/kernel' is stored in 8 bits, and 12"),
    "layer without": ({"conv_2": None}, r"bits\['conv_2'\]=None is no width"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bits_that_cannot_be_had_are_refused_in_one_line(name, cnn):
    bits, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message) as error:
        export.load(cnn[3], bits, module=CNN())
    assert "\n" not in str(error.value)


def test_a_file_that_was_altered_or_is_of_another_version_is_refused_at_any_width(cnn, tmp_path):
    path = tmp_path / "m.safetensors"
    whole = bytearray(cnn[3].read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)
    with pytest.raises(UsageError, match="its checksum differs; export again"):
        export.load(path, bits=4, module=CNN())
    with safe_open(cnn[3], framework="np") as opened:
        metadata = opened.metadata()[file.FORMAT].replace('"version":2', '"version":1')
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, path, {file.FORMAT: metadata})
    with pytest.raises(UsageError, match=r"is of format version 1, written by qtrain .* export again"):
        export.load(path, bits=4, module=CNN())


def test_what_is_no_full_set_of_integers_keeps_its_width(cnn):
    source = export.load(cnn[3], module=CNN()).source

    def other(precision=source.bits, without=(), **changes):
        stored = {name: one for name, one in source.stored.items() if name not in without}
        stored["conv_1/kernel"] = dataclasses.replace(stored["conv_1/kernel"], **changes)
        return dataclasses.replace(source, stored=stored, bits=precision)

    layers = {"conv_1": Precision(8, 8), "conv_2": Precision(32, 8)}
    for changed, message in (
        (
            other(quantizer=LSQ()),
            r"'conv_1/kernel' was quantized by 'lsq/.*' to 8 bits, and only the integers",
        ),
        (other(Precision(6, 6), bits=6), "'conv_1/kernel' was exported at 6 of 8 bits, and 4 bits follow exactly only"),
        (other(layers, ("conv_2/kernel", "conv_2/bias")), r"'conv_2' was exported in float \(32 bits\) and has no"),
    ):
        with pytest.raises(UsageError, match=message):
            changed.narrowed(changed.requested(4))
    stored, _ = other(quantizer=LSQ()).narrowed(source.requested({"conv_1": 8, "conv_2": 4}))
    assert {name: one.bits for name, one in stored.items() if not one.fixed} == {
        "conv_1/kernel": 8,
        "conv_2/kernel": 4,
        "conv_2/bias": 4,
    }


@pytest.mark.parametrize("dtype, high", [("bfloat16", 8), (None, 12)])
def test_other_dtypes_and_widths_above_8_bits(dtype, high, tmp_path):
    inputs = jax.random.normal(KEY, (4, 12))
    model = MLP((8, 8), dtype=dtype)
    qmodel = qtrain.quantize(model, Rule(weight_quantizer=DoubleRounding(high=high), act_quantizer=None))
    variables = jax.jit(lambda: qmodel.init(KEY, inputs))()
    export.save(tmp_path / "m", qmodel, variables, Precision(high, 8), inputs, call={})
    loaded = export.load(tmp_path / "m", module=model)
    expected = jax.jit(lambda bits: qmodel.apply(variables, inputs, bits=bits))
    for bits in (high, 7, 3):
        switched = loaded.at(Precision(bits, 8))
        found = np.asarray(expected(jax.tree.map(np.float32, Precision(bits, 8))))
        np.testing.assert_array_equal(np.asarray(switched.logits(inputs)), found)
        assert switched.stored["Dense_0/kernel"].codes.dtype == (jnp.int8 if high == 8 else jnp.int16)
    assert loaded.program._cache_size() == 1
    if dtype:
        assert switched.source.stored["Dense_0/kernel"].scale.dtype == ml_dtypes.bfloat16
