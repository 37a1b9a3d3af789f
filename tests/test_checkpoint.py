"""Checkpoints: what goes in comes out bit for bit, and what does not fit is said."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import assert_identical, fill, flip, make_state
from orbax.checkpoint import v1 as ocp

from qtrain.checkpoint import Checkpoints, restore
from qtrain.errors import UsageError


@pytest.fixture
def lines():
    return []


@pytest.fixture
def checkpoints(tmp_path, lines):
    with Checkpoints(tmp_path / "checkpoints", keep=3, report=lines.append) as checkpoints:
        yield checkpoints


# --- round trip


def test_restored_state_is_bit_identical(checkpoints, lines, capfd):
    state = make_state(3)
    metadata = {"data": {"next": 7, "fingerprint": "a"}, "lr": 0.1, "pair": (1, 2), "none": None, "inf": float("inf")}
    checkpoints.save(5, state, metadata)
    metadata["data"]["next"] = 8  # later changes must not reach the disk
    restored = checkpoints.restore_latest(jax.eval_shape(lambda: state)._replace(quant=state.quant))
    assert restored.step == 5
    assert restored.metadata == {**metadata, "data": {"next": 7, "fingerprint": "a"}, "pair": [1, 2]}
    assert_identical(restored.state, state)
    assert lines == []
    assert capfd.readouterr() == ("", "")


def test_nothing_saved_is_none(checkpoints):
    assert checkpoints.restore_latest(make_state()) is None
    assert checkpoints.all_steps() == []
    assert not checkpoints.directory.exists()


def test_state_may_be_donated_or_changed_at_once(checkpoints):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    mine = np.zeros(4)
    tree = {"a": jnp.zeros(300_000), "b": jnp.ones(300_000)}
    checkpoints.save(1, {"tree": tree, "mine": mine})
    mine += 1
    for _ in range(20):
        tree = advance(tree)
    jax.block_until_ready(tree)
    expected = {"tree": {"a": np.zeros(300_000, np.float32), "b": np.ones(300_000, np.float32)}, "mine": np.zeros(4)}
    assert_identical(checkpoints.restore_latest(expected).state, expected)


def test_arrays_go_where_the_abstract_state_says(checkpoints):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    fresh = {"w": jnp.arange(8.0), "key": jax.random.split(jax.random.key(0), 2), "host": np.arange(3)}
    placed = {**jax.device_put({name: fresh[name] for name in ("w", "key")}, sharding), "host": fresh["host"]}
    checkpoints.save(1, placed)
    for abstract in (fresh, jax.eval_shape(lambda: fresh) | {"host": fresh["host"]}):
        state = checkpoints.restore_latest(abstract).state
        assert_identical(state, fresh)
        assert not state["w"].committed  # as a new array: free to go where jit wants it
    assert_identical(checkpoints.restore_latest(placed).state, placed)
    assert all(checkpoints.restore_latest(placed).state[name].sharding == sharding for name in ("w", "key"))


def test_a_checkpoint_is_an_ordinary_orbax_checkpoint(checkpoints):
    checkpoints.save(7, {"params": {"kernel": jnp.arange(3.0)}}, wait=True)
    loaded = ocp.load(checkpoints.directory / "7")
    np.testing.assert_array_equal(loaded["params"]["kernel"], np.arange(3.0))


# --- which are kept


def test_keeps_the_newest_and_the_best(tmp_path):
    values = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.9, 5: 0.7, 6: 0.6}
    abstract = {"w": jnp.zeros(2)}
    for mode, best in (("max", 2), ("min", 1)):
        directory = tmp_path / mode
        for step, value in values.items():  # a new object each time: the choice must survive a restart
            with Checkpoints(directory, 2, "accuracy", mode) as checkpoints:
                checkpoints.save(step, abstract, metrics={"accuracy": jnp.float32(value), "loss": 1.0})
        assert checkpoints.all_steps() == [best, 5, 6]
        assert checkpoints.best_step() == best
        assert sorted(path.name for path in directory.iterdir()) == sorted(map(str, [best, 5, 6]))


def test_saves_without_metrics_do_not_count_as_best(tmp_path):
    with Checkpoints(tmp_path, 1, "accuracy") as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(1)}, metrics={"accuracy": 0.1})
        checkpoints.save(2, {"w": jnp.zeros(1)})
        checkpoints.save(3, {"w": jnp.zeros(1)})
    assert checkpoints.all_steps() == [1, 3]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"keep": 0}, "checkpoint.keep: 0"),
        ({"keep": 2.5}, "checkpoint.keep: 2.5"),
        ({"keep": True}, "checkpoint.keep: True"),
        ({"best_mode": "best"}, "'max' or 'min'"),
    ],
)
def test_bad_options(tmp_path, kwargs, words):
    with pytest.raises(UsageError, match=words):
        Checkpoints(tmp_path, **kwargs)


def test_bad_saves(checkpoints, tmp_path):
    with pytest.raises(TypeError, match="leaf a/b is a str"):
        checkpoints.save(1, {"a": {"b": "text"}})
    with pytest.raises(TypeError, match="two leaves are called 'a/1'"):
        checkpoints.save(1, {"a": {1: jnp.ones(1)}, "b": 0} | {"a": [jnp.ones(1), jnp.ones(1)]} | {"a": Twice()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, {"w": jnp.ones(1)}, {"key": jnp.ones(1)})
    assert checkpoints.all_steps() == []
    with Checkpoints(tmp_path / "b", best_metric="accuracy") as best, pytest.raises(UsageError, match="mean 'acuracy'"):
        best.save(1, {"w": jnp.ones(1)}, metrics={"acuracy": 1.0})


@jax.tree_util.register_pytree_with_keys_class
class Twice:
    """A container with the keys 1 and "1"."""

    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey
        return [(key(1), jnp.ones(1)), (key("1"), jnp.ones(1))], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls()


# --- mismatch


def test_a_mismatch_is_an_error_and_never_a_fallback(checkpoints, lines):
    fill(checkpoints)
    with pytest.raises(UsageError) as caught:
        checkpoints.restore_latest(make_state(width=32))
    message = str(caught.value)
    assert "\n" not in message and "30" in message and "does not fit" in message
    assert "params/Dense_0/kernel is float32[64,10] in it, float32[32,10] here" in message
    assert lines == []


def test_a_mismatch_names_every_kind_of_difference(checkpoints):
    checkpoints.save(1, {"a": jnp.ones(2), "b": jnp.ones(2), "key": jax.random.key(0), "gone": jnp.ones(1)}, wait=True)
    wanted = {"a": jnp.ones(2, jnp.bfloat16), "b": None, "key": jax.random.key(0, impl="rbg"), "new": jnp.ones(1)}
    with pytest.raises(UsageError) as caught:
        checkpoints.restore_latest(wanted)
    assert str(caught.value).endswith(
        "does not fit this model and optimizer: a is float32[2] in it, bfloat16[2] here; key is key<fry>[] in it, "
        "key<rbg>[] here; new is not in it; b is in it, but not here; gone is in it, but not here"
    )
    many = {f"layer_{i}": jnp.ones(1) for i in range(20)}
    with pytest.raises(UsageError, match=r"layer_0 is not in it; .*; and 18 more$"):
        checkpoints.restore_latest(many)


# --- restore: evaluation and initialisation


def test_restore_part_of_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        fill(checkpoints)
        abstract = {"params": jax.eval_shape(lambda: make_state().params)}
        for restored in (
            restore(tmp_path / "run", abstract, partial=True),
            restore(tmp_path / "run" / "checkpoints", abstract, partial=True),
            restore(tmp_path / "run" / "checkpoints" / "30", abstract, partial=True),
            checkpoints.restore(30, abstract, partial=True),
        ):
            assert restored.step == 30 and restored.metadata == {"step": 30}
            assert_identical(restored.state, {"params": make_state(30).params})
        assert checkpoints.restore(20, make_state()).step == 20
        with pytest.raises(UsageError, match=r"opt_state.* is in it, but not here"):
            checkpoints.restore(30, abstract)
        with pytest.raises(UsageError, match="there are: 10, 20, 30"):
            checkpoints.restore(31, abstract)


def test_restore_names_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        restore(tmp_path / "nowhere", {"w": jnp.ones(1)})
    with pytest.raises(UsageError, match="none in"):
        restore(tmp_path, {"w": jnp.ones(1)})


def test_restore_falls_back_in_a_run_but_not_from_a_named_checkpoint(tmp_path, lines, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        fill(checkpoints)
    flip(tmp_path / "30")
    assert restore(tmp_path, make_state(), report=lines.append).step == 20
    assert len(lines) == 1
    with pytest.raises(UsageError, match="damaged"):
        restore(tmp_path / "30", make_state())
    assert capfd.readouterr() == ("", "")


def test_another_programs_checkpoint(tmp_path, lines, capfd):
    state = {"params": {"kernel": jnp.arange(3.0)}, "opt": [optax.ScaleByScheduleState(jnp.int32(3)), None], "note": 3}
    ocp.save(tmp_path / "100", state)
    capfd.readouterr()
    wanted = {"params": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    restored = restore(tmp_path / "100", wanted, partial=True, report=lines.append)
    assert restored.step == 100 and restored.metadata == {}
    assert_identical(restored.state, {"params": state["params"]})
    assert "not checked for damage" in lines[0]
    whole = restore(tmp_path / "100", {"opt": state["opt"]}, partial=True, report=lines.append)
    assert_identical(whole.state, {"opt": state["opt"]})
    with pytest.raises(UsageError, match="params/bias is not in it"):
        restore(tmp_path / "100", {"params": {"bias": wanted["params"]["kernel"]}}, partial=True, report=lines.append)

    assert capfd.readouterr() == ("", "")


FOREIGN = """
import pathlib, sys
import numpy as np
from orbax.checkpoint import v1 as ocp
from qtrain.checkpoint import restore
from qtrain.errors import UsageError

weights = np.random.default_rng(0).standard_normal(5000)
ocp.save(sys.argv[1], {"a": weights, "b": weights[:5]})
wanted = {"a": weights, "b": weights[:5]}
for pattern, size in (("ocdbt.process_0/d/*", 2000), ("d/*", 50)):  # the arrays; the tree that leads to them
    for path in pathlib.Path(sys.argv[1], "state").glob(pattern):
        path.write_bytes(path.read_bytes()[:size])
    try:
        restore(sys.argv[1], wanted)
    except UsageError as error:
        print(error)
"""


def test_orbax_is_quiet_when_it_fails(tmp_path):
    """In a process of its own: pytest would swallow what Orbax and asyncio log."""
    command = [sys.executable, "-c", FOREIGN, str(tmp_path / "other")]
    result = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    first, second = result.stdout.splitlines()
    assert "could not be loaded: " in first and "cannot be read: " in second
    assert "tensorstore_spec" not in first
    # Not compared with "": on a loaded machine uvloop may remark that Orbax's event loop was closed under its feet.
    assert "ERROR" not in result.stderr and "orbax" not in result.stderr.lower()


# --- several devices

EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from qtrain.checkpoint import Checkpoints

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
place = lambda *names: NamedSharding(mesh, P(*names))
value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
state = {"w": jax.device_put(value, place("data", "model")), "b": jax.device_put(value[0], place())}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state)
    for names in (("data", "model"), ("model",), ()):
        abstract = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place(*names)), "b": state["b"]}
        restored = checkpoints.restore_latest(abstract).state
        assert restored["w"].sharding == place(*names) and restored["b"].sharding == place()
        assert all((np.asarray(restored[name]) == np.asarray(state[name])).all() for name in state)
"""


def test_eight_devices_and_another_layout(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error::UserWarning", "-c", EIGHT, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_many_runs_of_a_process_save_at_once(tmp_path):
    """As a sweep in one program does: Orbax called from several threads at a time hangs, and loses callbacks."""
    state = {f"leaf_{i}": jnp.full(100, float(i)) for i in range(30)}
    runs = [Checkpoints(tmp_path / str(index), keep=1) for index in range(24)]
    for run in runs:
        run.save(1, state)
    for run in runs:
        run.close()
    assert all(run.all_steps() == [1] for run in runs)
