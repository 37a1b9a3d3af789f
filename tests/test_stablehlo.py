"""StableHLO: a program that needs nothing beside it gives the logits of what it was made from, bit for bit."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qtrain
from qtrain import Precision, Rule, export
from qtrain.errors import UsageError
from qtrain.quantizers import LSQ, DoubleRounding

KEY = jax.random.key(0)


class Net(nn.Module):
    """A convolution, batch norm, and a head that has nearly all of the weights."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(100)(nn.relu(nn.Dense(200)(x)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model at 8 bits, loaded from its file, and a batch."""
    act = LSQ(signed=False, offset=True, across_bits="table", widths=(2, 4, 8))
    qmodel = qtrain.quantize(Net(), Rule(weight_quantizer=DoubleRounding(), act_quantizer=act), per_width=(8, 4, 2))
    inputs = jax.random.normal(KEY, (6, 6, 6, 3))
    variables = jax.jit(lambda: qmodel.init(KEY, inputs))()
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x * random.uniform(0.7, 1.3, x.shape) + 0.01, jax.device_get(variables))
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    export.save(path, qmodel, variables, Precision(8, 8), inputs)
    return export.load(path, module=Net()), inputs


def test_a_program_for_any_batch_gives_the_same_logits_from_integers(model, tmp_path):
    loaded, inputs = model
    switched = loaded.at(4)
    path = tmp_path / "m.jax"
    size = export.write_stablehlo(path, switched)
    assert os.listdir(tmp_path) == ["m.jax"] and size == path.stat().st_size
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == (jax.export.default_export_platform(),)
    for batch in (inputs, inputs[:2]):
        expected = np.asarray(switched.logits(batch))
        assert np.ptp(expected, 0).max() > 0
        np.testing.assert_array_equal(np.asarray(program.call(batch)), expected)
    # One byte a weight, and the rest of the program: not four.
    weights = sum(one.codes.size for one in switched.stored.values())
    assert weights < size < 1.6 * weights
    text = program.mlir_module()
    assert f"tensor<{8 * 36}x200xi8>" in text and "optimization_barrier" in text
    assert os.fspath(qtrain.__path__[0]) not in text


def test_a_program_for_one_batch_and_several_platforms_as_text(model, tmp_path):
    loaded, inputs = model
    program = export.stablehlo(loaded, batch_size=6, platforms=("cpu", "tpu"))
    assert program.platforms == ("cpu", "tpu") and program.in_avals[0].shape == inputs.shape
    size = export.write_stablehlo(tmp_path / "m.mlir", loaded, batch_size=6)
    text = (tmp_path / "m.mlir").read_text()
    assert len(text) == size and "module @jit_logits" in text and "stablehlo.convolution" in text


class Halves(nn.Module):
    """Needs an even batch."""

    @nn.compact
    def __call__(self, x, train=False):
        first, second = jnp.split(nn.Dense(4)(x), 2)
        return first + second


def test_mistakes_are_one_line_and_write_nothing(model, tmp_path):
    loaded, _ = model
    with pytest.raises(UsageError, match=r"platform 'gpu': give one or several of cpu, cuda, rocm, tpu"):
        export.stablehlo(loaded, platforms=["gpu"])
    with pytest.raises(UsageError, match="batch_size=0; give a whole number of at least 1"):
        export.stablehlo(loaded, batch_size=0)
    with pytest.raises(UsageError, match="cannot be written: no such file or directory; give another file"):
        export.write_stablehlo(tmp_path / "no" / "m", loaded, batch_size=1)
    qmodel, inputs = qtrain.quantize(Halves(), Rule()), jnp.ones((2, 3))
    export.save(tmp_path / "m", qmodel, qmodel.init(KEY, inputs), Precision(4, 4), inputs)
    halves = export.load(tmp_path / "m", module=Halves())
    with pytest.raises(UsageError, match=r"cannot be written for a batch of any size .* give batch_size") as error:
        export.stablehlo(halves)
    assert "\n" not in str(error.value)
    assert export.stablehlo(halves, batch_size=2).out_avals[0].shape == (1, 4)
