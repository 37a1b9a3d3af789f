"""Starting from a float run: what is read, what is left, and what is said when it does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import final_state, initial_state, small_config

from qtrain import sharding
from qtrain.build import build
from qtrain.checkpoint import Checkpoints
from qtrain.errors import UsageError
from qtrain.init_from import load_float
from qtrain.train import train

FLOAT = {"quant__weights": None, "quant__acts": None, "quant__grads": None}
QUANTIZED = {"quant__recipe": "cpt"}  # running ranges


def config_of(**overrides):
    return small_config("digits_cnn", **{"model__hidden": 8, "train__steps": 3, "data__augment": (), **overrides})


@pytest.fixture(scope="module", params=["float", "quantized"])
def run(request, tmp_path_factory):
    """A finished run of three steps: its folder and the state it ended with."""
    config = config_of(**(FLOAT if request.param == "float" else QUANTIZED))
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(config, str(folder), quiet=True)
    return folder, final_state(config, folder)


@pytest.fixture(scope="module")
def abstract():
    """The variables of a quantized model with running ranges."""
    experiment = build(config_of(**QUANTIZED))
    return jax.eval_shape(lambda: initial_state(experiment)).variables


@pytest.fixture
def saved(tmp_path):
    """``saved(state)``: the folder of a run that has nothing but one checkpoint of `state`."""

    def save(state, step=3):
        with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
            checkpoints.save(step, state, wait=True)
        (tmp_path / "run" / "config.json").write_text("{}")
        return tmp_path / "run"

    return save


def small_state(**params):
    return {
        "params": params or {"kernel": jnp.arange(6.0).reshape(2, 3)},
        "quant": {"scale": jnp.ones(())},
        "collections": {"batch_stats": {"mean": jnp.full(3, 2.0)}, "quant_stats": {"acts": jnp.ones(())}},
        "opt_state": (jnp.zeros(5),),
    }


def small_variables(state):
    return {"params": state["params"], "quant": {}, **state["collections"]}


def refusal(path, variables):
    with pytest.raises(UsageError) as error:
        load_float(path, variables)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"init_from={str(path)!r}: ")
    return message


def test_parameters_and_norm_statistics_are_those_of_the_run(run, abstract):
    folder, state = run
    assert "quant_stats" in abstract
    for path in (folder, folder / "checkpoints", folder / "checkpoints" / "3"):
        loaded = load_float(path, abstract)
        assert set(loaded) == {"params", "batch_stats"}
        expected = {"params": state.params, "batch_stats": state.collections["batch_stats"]}
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(loaded["batch_stats"]))


def test_the_newest_checkpoint_is_meant_and_an_unfinished_run_reported(saved):
    old, new = small_state(), small_state(kernel=jnp.full((2, 3), 7.0))
    saved(old, step=9)
    folder, said = saved(new, step=10), []
    loaded = load_float(folder, small_variables(new), report=said.append)
    np.testing.assert_array_equal(loaded["params"]["kernel"], new["params"]["kernel"])
    assert len(said) == 1 and "has not finished" in said[0] and "checkpoint 10" in said[0]
    np.testing.assert_array_equal(
        load_float(folder / "checkpoints" / "9", small_variables(new), report=said.append)["params"]["kernel"],
        old["params"]["kernel"],
    )
    (folder / "DONE").touch()
    load_float(folder, small_variables(new), report=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_floats_are_cast(stored, wanted, saved):
    values = jnp.linspace(-3, 3, 7)
    folder = saved(small_state(bias=values.astype(stored), steps=jnp.arange(3)))
    variables = small_variables(small_state(bias=values.astype(wanted), steps=jnp.arange(3)))
    found = load_float(folder, jax.eval_shape(lambda: variables))["params"]
    assert found["bias"].dtype == wanted and found["steps"].dtype == jnp.int32
    np.testing.assert_array_equal(found["bias"], values.astype(stored).astype(wanted))


def test_integers_are_not_cast(saved):
    folder = saved(small_state(bias=jnp.arange(3)))
    message = refusal(folder, small_variables(small_state(bias=jnp.zeros(3))))
    assert "params/bias is int32[3] in it, float32[3] here" in message


def test_arrays_are_placed(saved):
    state = small_state()
    placement = sharding.replicated(sharding.make_mesh())
    loaded = load_float(saved(state), small_variables(state), sharding=placement)
    assert all(leaf.sharding == placement and leaf.committed for leaf in jax.tree.leaves(loaded))
    assert jax.tree.leaves(load_float(saved(state), small_variables(state)))[0].committed is False


def test_a_row_for_each_width_begins_as_the_one_there_is(saved):
    state = small_state(**{"norm.0": jnp.arange(3.0), "kernel": jnp.ones((2, 3))})
    wanted = jax.tree.map(lambda x: x, small_variables(state))
    wanted["params"]["norm.0"] = jnp.zeros((4, 3), jnp.bfloat16)
    wanted["batch_stats"]["mean"] = jnp.zeros((4, 3))
    per_width = {("params", "norm.0"), ("batch_stats", "mean")}
    placement = sharding.replicated(sharding.make_mesh())
    folder = saved(state)
    loaded = load_float(folder, wanted, per_width=per_width, sharding=placement)
    for leaf, value in ((loaded["params"]["norm.0"], np.arange(3)), (loaded["batch_stats"]["mean"], np.full(3, 2))):
        np.testing.assert_array_equal(leaf, np.broadcast_to(value, (4, 3)))
        assert leaf.sharding == placement
    assert loaded["params"]["norm.0"].dtype == jnp.bfloat16
    # Nor is one that has as many rows changed, or one of another number taken.
    with pytest.raises(UsageError, match=r"norm%2E0 is float32\[3\] in it, bfloat16\[4,3\] here"):
        load_float(folder, wanted)
    rows = saved({**state, "params": {**state["params"], "norm.0": jnp.ones((3, 3))}}, step=4)
    with pytest.raises(UsageError, match=r"norm%2E0 is float32\[3,3\] in it"):
        load_float(rows, wanted, per_width=per_width)


def test_every_kind_of_difference_is_listed(saved):
    folder = saved(small_state(kernel=jnp.ones((2, 3)), old=jnp.ones(2)))
    other = small_state(kernel=jnp.ones((3, 2)), new=jnp.ones(4))
    other["collections"]["batch_stats"] = {"mean": jnp.ones(5)}
    message = refusal(folder, small_variables(other))
    for part in (
        "checkpoint 3 does not fit",
        "params/kernel is float32[2,3] in it, float32[3,2] here",
        "params/new is not in it",
        "params/old is in it, but not here",
        " batch_stats/mean is float32[3] in it, float32[5] here",
    ):
        assert part in message
    assert "more" not in message and "opt_state" not in message and "quant" not in message


def test_six_differences_are_shown(saved):
    folder = saved(small_state(**{f"layer{index}": jnp.ones(2) for index in range(10)}))
    message = refusal(folder, small_variables(small_state(**{f"layer{index}": jnp.ones(3) for index in range(10)})))
    assert message.count("float32[3] here") == 6 and "; and 4 more; " in message


def test_differences_of_a_real_model(run):
    folder, _ = run
    wider = build(config_of(**QUANTIZED, model__hidden=16))
    variables = jax.eval_shape(lambda: initial_state(wider)).variables
    message = refusal(folder, variables)
    assert "params/Dense_0/kernel is float32[32,8] in it, float32[32,16] here" in message
    assert "params/logits/kernel is float32[8,10] in it, float32[16,10] here" in message and "Conv" not in message


def folder_is_missing(path):
    (path / "teacher").mkdir()
    return path / "teachre", "no such folder", "Did you mean 'teacher'?"


def folder_is_empty(path):
    return path, "holds no run"


def file_instead(path):
    (path / "file").touch()
    return path / "file", "no such folder"


def no_checkpoint(path):
    (path / "config.json").write_text("{}")
    return path, "has no finished checkpoint"


def only_half_written(path):
    (path / "checkpoints" / ".5.partial").mkdir(parents=True)
    return path, "has no finished checkpoint"


def no_manifest(path):
    (path / "checkpoints" / "5").mkdir(parents=True)
    return path, "damaged (manifest.json: missing)", "it has no other"


def no_manifest_itself(path):
    (path / "checkpoints" / "5").mkdir(parents=True)
    return path / "checkpoints" / "5", "is no finished checkpoint (it has no manifest.json)"


@pytest.mark.parametrize(
    "make",
    [
        folder_is_missing,
        folder_is_empty,
        file_instead,
        no_checkpoint,
        only_half_written,
        no_manifest,
        no_manifest_itself,
    ],
)
def test_no_checkpoint_there(make, tmp_path):
    path, *parts = make(tmp_path)
    message = refusal(path, {"params": {"kernel": jnp.ones(3)}})
    for part in parts:
        assert part in message


def test_no_path():
    assert "None for none" in refusal("", {"params": {"kernel": jnp.ones(3)}})


def test_another_programs_checkpoint(saved):
    folder = saved({"weights": jnp.ones(3)})
    assert "has no params" in refusal(folder, {"params": {"kernel": jnp.ones(3)}})


def test_a_flipped_byte_is_found(saved):
    state = small_state(kernel=jax.random.normal(jax.random.key(0), (64, 64)))
    folder = saved(state)
    largest = max((folder / "checkpoints" / "3").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert "damaged" in refusal(folder, small_variables(state))


def test_a_manifest_that_was_changed_is_found(saved):
    state = small_state()
    folder = saved(state, step=2)
    saved(state, step=3)
    manifest = folder / "checkpoints" / "3" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["content"]["step"] = 4
    manifest.write_text(json.dumps(content))
    message = refusal(folder, small_variables(state))
    assert "its checksum differs" in message and str(folder / "checkpoints" / "2") in message
    shutil.rmtree(folder / "checkpoints" / "3")
    load_float(folder, small_variables(state))
