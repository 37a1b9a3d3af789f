"""One device against four and eight, parameters whole and in parts: reductions are global, so a run does not depend on
how many share its batches.

What differs is the order in which floats are summed. Where no code lands on the other side of a rounding boundary for
it, twelve steps of Adam stay within 1e-4 of each other, relative to the largest entry of a tensor; measured are 1e-7
for the perceptrons, 7e-6 for the convolutional network at 8 bits. At 3 bits that drifts by 2 %: pre-activations whose
terms cancel come out as 0 or as ±1e-9, and the gradient of the ReLU is 0 or 1 accordingly.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from program import final_state, finished, rows, small_config, start

from qtrain import sharding
from qtrain.errors import UsageError
from qtrain.train import train

IN_PARTS = {"mesh__fsdp": 2, "mesh__fsdp_min_size": 16}
MLP = {"task": "digits_mlp", "quant__recipe": "cpt"}  # one scale per tensor, running ranges, stochastic gradients
CNN = {"task": "digits_cnn", "quant__grads": "symmetric/tensor"}
QUICK = {"one": {**MLP, "mesh__data": 1}, "four": {**MLP, **IN_PARTS}}  # twice two devices with half of the state each
LONG = {
    "MLP, in parts": {**MLP, **IN_PARTS},  # four times two devices with half of the state each
    "CNN, 8 bits": {**CNN, "schedule": "constant", "schedule__bits": 8},
    "CNN, 8 bits, in parts": {**CNN, "schedule": "constant", "schedule__bits": 8, **IN_PARTS},
}
LOW_BITS = {"CNN, 3 to 8 bits": CNN}

PROGRAM = """
import json, sys
import jax
import numpy as np
import qtrain.train
from program import small_config
from qtrain import sharding

mesh, devices = sharding.make_mesh(), jax.device_count()
for axis, shape in ((0, (16 // devices, 24)), (1, (16, 24 // devices))):
    split = sharding.shard_batch({"x": np.zeros((16, 24))}, mesh, axis)["x"]
    assert {shard.data.shape for shard in split.addressable_shards} == {shape}

def share(state):
    leaves = jax.tree.leaves((state.params, state.opt_state))
    return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)

class Run(qtrain.train.Run):
    def __call__(self, stopped):
        shares = [share(self.state)]
        summary = super().__call__(stopped)
        shares.append(share(self.state))
        parts = self.config.mesh.fsdp
        assert all(1 / parts <= each < 1 / parts + 0.05 for each in shares), shares
        return summary

qtrain.train.Run = Run
folder, configs = sys.argv[1], json.loads(sys.argv[2])
for name, overrides in configs.items():
    summary = qtrain.train.train(small_config(train__log_every_steps=1, **overrides), f"{folder}/{name}", quiet=True)
    assert summary["compilations"] == 1
"""

pytestmark = pytest.mark.skipif(jax.device_count() != 1, reason="compares with one device")


def on_one(overrides):
    """A config on the one device of this process."""
    return small_config(**{"train__log_every_steps": 1, **overrides, "mesh__data": 1, "mesh__fsdp": 1})


def on_several(folder, configs, devices=8, flags=""):
    """Start the runs of `configs` in a process with several devices."""
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}"}
    return start([folder, json.dumps(configs)], code=PROGRAM, environment=environment)


def run_both(configs, folder):
    """By name: the config, and the folders of its run on one device and on eight."""
    process = on_several(folder / "eight", configs)
    small = {name: on_one(overrides) for name, overrides in configs.items()}
    for name, config in small.items():
        train(config, str(folder / "one" / name), quiet=True)
    code, _, error = finished(process, timeout=600)
    assert code == 0, error
    return {name: (config, folder / "one" / name, folder / "eight" / name) for name, config in small.items()}


def assert_same_data(one, eight):
    """What is decided before any float is summed is equal; so is the first loss, to the rounding of a sum."""
    left, right = rows(one, "train"), rows(eight, "train")
    for mine, other in zip(left, right, strict=True):
        for key in ("step", "bits_weights", "bits_acts", "bits_grads", "bits_changes", "learning_rate"):
            assert mine[key] == other[key]
    assert right[0]["loss"] == pytest.approx(left[0]["loss"], rel=1e-6)
    assert right[0]["accuracy"] == left[0]["accuracy"]
    return left, right


def assert_same_end(config, one, eight, rtol=1e-4):
    """Parameters, optimizer and statistics, and the evaluation: 360 examples, on eight devices 45 each."""
    states = [final_state(config, folder) for folder in (one, eight)]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path((states[0].params, states[0].quant, states[0].collections)),
        jax.tree.leaves((states[1].params, states[1].quant, states[1].collections)),
        strict=True,
    ):
        atol = rtol * np.max(np.abs(x)) + 1e-7
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
    mine, other = (rows(folder, "eval")[-1] for folder in (one, eight))
    assert other["effective_bitops"] == mine["effective_bitops"]
    for suffix in ("", "_scheduled", "_float"):
        assert other[f"test_loss{suffix}"] == pytest.approx(mine[f"test_loss{suffix}"], rel=rtol)


def assert_same_run(config, one, other):
    for mine, theirs in zip(*assert_same_data(one, other), strict=True):
        for key in ("loss", "grad_norm", "update_norm"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4)
    assert_same_end(config, one, other)


def test_one_device_and_four_agree(tmp_path):
    # Both in one process, compiled without optimization: compiling is most of what this takes.
    code, _, error = finished(on_several(tmp_path, QUICK, 4, "--xla_backend_optimization_level=0"), timeout=600)
    assert code == 0, error
    assert_same_run(on_one(MLP), tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
def test_one_device_and_eight_agree(tmp_path):
    for config, one, eight in run_both(LONG, tmp_path).values():
        assert json.loads((eight / "config.json").read_text())["devices"] == 8
        assert_same_run(config, one, eight)


@pytest.mark.slow
def test_at_few_bits_they_agree_up_to_ties(tmp_path):
    ((_, one, eight),) = run_both(LOW_BITS, tmp_path).values()
    for mine, other in zip(*assert_same_data(one, eight), strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=0.01)
        assert other["grad_norm"] == pytest.approx(mine["grad_norm"], rel=0.05)


LEARNED = {
    "task": "digits_mlp",
    "schedule": "constant",
    "quant__weights": "lsq/signed",
    "quant__acts": "lsq/unsigned",
    "model__dropout": 0.1,
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 3,
}


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(tmp_path):
    """From one to eight with the state in parts, from there to two that have it whole, and back to one."""
    folder, config = tmp_path / "moved", on_one(LEARNED)
    train(config, str(tmp_path / "stayed"), quiet=True)
    shutil.copytree(tmp_path / "stayed", folder / "run")

    def cut_back(step):
        for left in ("DONE", "summary.json"):
            (folder / "run" / left).unlink()
        for later in (4, 8, 12):
            if later > step:
                shutil.rmtree(folder / "run" / "checkpoints" / str(later))

    for step, mesh in ((4, IN_PARTS), (8, {"mesh__data": 2})):
        cut_back(step)
        code, _, error = finished(on_several(folder, {"run": {**LEARNED, **mesh}}), timeout=300)
        assert code == 0, error
        assert "resumed in another environment (then != now): devices: 1 != 8; mesh." in error
        assert_same_end(config, tmp_path / "stayed", folder / "run")
    cut_back(8)
    train(config, str(folder / "run"), quiet=True)
    assert_same_end(config, tmp_path / "stayed", folder / "run")


# --- what needs no devices


PLACES = [
    # shape, elements from which it is split -> where
    ((64, 32), 0, ("fsdp",)),
    ((10, 64), 0, (None, "fsdp")),
    ((16, 16), 0, ("fsdp",)),
    ((3, 3, 4, 8), 0, (None, None, None, "fsdp")),
    ((7, 12), 0, (None, "fsdp")),
    ((7, 9), 0, ()),
    ((), 0, ()),
    ((0, 8), 0, (None, "fsdp")),
    ((64, 32), 64 * 32, ("fsdp",)),
    ((64, 32), 64 * 32 + 1, ()),
]


@pytest.mark.parametrize(("shape", "min_size", "spec"), PLACES)
def test_arrays_are_split_along_the_largest_axis_that_fits(shape, min_size, spec):
    mesh = AbstractMesh((2, 4), sharding.AXES)
    assert sharding.placed(mesh, shape, min_size).spec == PartitionSpec(*spec)
    assert sharding.placed(AbstractMesh((8, 1), sharding.AXES), shape, 0).spec == PartitionSpec()


MISTAKES = [
    ({"mesh__data": 3}, 8, r"mesh\.data=3 x mesh\.fsdp=1: 3 does not divide the 8 devices"),
    ({"mesh__fsdp": 3}, 8, r"mesh\.data=-1 x mesh\.fsdp=3: 3 does not divide the 8 devices"),
    ({"mesh__data": 4, "mesh__fsdp": 4}, 8, "16 does not divide the 8 devices"),
    ({"mesh__data": 0}, 8, r"mesh\.data=0: give a whole number of devices, or -1"),
    ({"mesh__fsdp": -2}, 8, r"mesh\.fsdp=-2: give a whole number of devices, or -1"),
    ({"mesh__fsdp": -1}, 8, r"mesh\.data=-1, mesh\.fsdp=-1: only one axis"),
    ({"mesh__fsdp_min_size": -1}, 8, r"mesh\.fsdp_min_size=-1: give a number of elements"),
    ({"mesh__fsdp": 2}, 1, "2 does not divide the 1 device;"),
]


@pytest.mark.parametrize(("overrides", "devices", "message"), MISTAKES)
def test_meshes_that_are_refused(overrides, devices, message, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with pytest.raises(UsageError, match=message) as refused:
        train(small_config(**overrides), str(tmp_path / "run"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_an_unknown_key_of_the_mesh_is_refused(tmp_path):
    config = small_config().unlock()
    config.mesh.model = 2
    with pytest.raises(UsageError, match=r"mesh\.model: no such key; there are data, fsdp, fsdp_min_size"):
        train(config.lock(), str(tmp_path / "run"))
