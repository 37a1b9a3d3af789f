"""Checkpoints: what goes in comes out bit for bit; nothing a kill or a bad disk does is trusted or in the way."""

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from qtrain import checkpoint, manifest, storage
from qtrain.checkpoint import Checkpoints, restore
from qtrain.errors import UsageError
from qtrain.manifest import MANIFEST


class State(NamedTuple):
    params: Any
    opt_state: Any
    quant: Any
    key: Any
    step: Any


def make_state(seed: int = 0, width: int = 64) -> State:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {"Dense_0": {"kernel": jax.random.normal(keys[0], (width, 10)), "bias": jnp.full(10, -0.0)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    odd = {
        "": {"scale": jnp.float32(np.nan)},  # the root module's path
        "a.b": {"c": jnp.arange(3)},  # Orbax would write these two to one place
        "a": {"b.c": jnp.arange(3) + 7},
        "Block/Dense": jax.random.normal(keys[1], (5,)).astype(jnp.bfloat16),
        "100%": np.arange(4, dtype=np.int64),
        "absent": None,
        "empty": jnp.zeros((0, 3)),
        "codes": jnp.arange(-8, 8, dtype=jnp.int8).astype(jnp.int4),
        "mask": jnp.array([True, False]),
    }
    rng = (
        jax.random.key(seed + 1),
        jax.random.split(jax.random.key(seed), 0),
        jax.random.split(jax.random.key(seed, impl="rbg"), 3),
    )
    return State(params, optimizer.init(params), odd, rng, jnp.int32(seed))


def assert_identical(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype and one.shape == other.shape
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def checkpoints(tmp_path, lines):
    with Checkpoints(tmp_path / "checkpoints", keep=3, report=lines.append) as checkpoints:
        yield checkpoints


def fill(checkpoints, steps=(10, 20, 30)):
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()


def data_file(folder):
    """The file that holds the arrays' bytes."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


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


# --- damage


def truncate(folder):
    path = data_file(folder)
    path.write_bytes(path.read_bytes()[:-1])
    return path.relative_to(folder).as_posix()


def flip(folder):
    path = data_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.relative_to(folder).as_posix()


def remove(folder):
    (folder / "state" / "_METADATA").unlink()
    return "state/_METADATA: missing"


def remove_manifest(folder):
    (folder / MANIFEST).unlink()
    return f"{MANIFEST}: missing"


def garbage(folder):
    (folder / MANIFEST).write_text('{"crc32": ')
    return f"{MANIFEST}: not readable"


def other_json(folder):
    (folder / MANIFEST).write_text('["a list"]')
    return f"{MANIFEST}: not readable"


def flip_manifest(folder):
    path = folder / MANIFEST
    text = path.read_text()
    assert '"step": 30\n' in text
    path.write_text(text.replace('"step": 30\n', '"step": 70\n'))
    return f"{MANIFEST}: its checksum differs"


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return f"{MANIFEST}: missing"


DAMAGES = [truncate, flip, remove, remove_manifest, garbage, other_json, flip_manifest, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_replaced(checkpoints, lines, capfd, damage):
    fill(checkpoints)
    words = damage(checkpoints.directory / "30")
    restored = checkpoints.restore_latest(make_state())
    assert restored.step == 20 and restored.metadata == {"step": 20}
    assert_identical(restored.state, make_state(20))
    (line,) = lines
    assert line.startswith("checkpoint 30 is damaged (") and words in line and "checkpoint 20" in line
    assert "\n" not in line
    with pytest.raises(UsageError, match="damaged"):
        checkpoints.restore(30, make_state())

    with Checkpoints(checkpoints.directory, keep=2) as resumed:  # the resumed run comes to step 30 again
        assert resumed.restore_latest(make_state()).step == 20
        fill(resumed, [30])
        assert resumed.all_steps() == [20, 30]
        assert_identical(resumed.restore_latest(make_state()).state, make_state(30))
    assert capfd.readouterr().err.count("\n") == 1  # the line of `resumed`


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        fill(checkpoints, [20])
    os.rename(tmp_path / "20", tmp_path / "aside")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        fill(checkpoints, [30])
    os.rename(tmp_path / "aside", tmp_path / "20")
    flip(tmp_path / "30")
    with Checkpoints(tmp_path, keep=1, report=lambda line: None) as checkpoints:
        assert checkpoints.restore_latest(make_state()).step == 20
        fill(checkpoints, [25])  # a save out of turn, as on SIGTERM
        assert checkpoints.all_steps() == [25]


def test_all_damaged_is_an_error(checkpoints, lines):
    fill(checkpoints)
    for step, damage in ((10, flip), (20, garbage), (30, empty)):
        damage(checkpoints.directory / str(step))
    with pytest.raises(UsageError, match=r"all in .* are damaged \(30: manifest.json: missing; 20: .*; 10: state/"):
        checkpoints.restore_latest(make_state())


def test_two_damaged_fall_back_twice(checkpoints, lines):
    fill(checkpoints)
    truncate(checkpoints.directory / "30")
    remove(checkpoints.directory / "20")
    assert checkpoints.restore_latest(make_state()).step == 10
    assert [line.split()[1] for line in lines] == ["30", "20"]


def test_orbax_alone_does_not_notice_a_flipped_byte(checkpoints):
    """Why there is a manifest. If this fails, Orbax has learnt to check, and the manifest may go."""
    weights = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    checkpoints.save(1, {"w": weights}, wait=True)
    flip(checkpoints.directory / "1")
    loaded = ocp.load(checkpoints.directory / "1", {"w": weights})
    assert not np.array_equal(loaded["w"], weights)
    with pytest.raises(UsageError, match="its checksum differs"):
        checkpoints.restore_latest({"w": weights})


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


# --- failures and kills while saving


class Killed(BaseException):
    """Stops the background save where a kill would: what is on the disk stays as it is."""


def stop_at(monkeypatch, where):
    """Let the next save get as far as `where`."""

    def killed(*args, **kwargs):
        raise Killed

    if where == "while Orbax writes":

        def write_half(path, tree, **kwargs):
            (path.with_name(path.name + ".orbax-checkpoint-tmp") / "state").mkdir(parents=True)
            raise Killed

        monkeypatch.setattr(storage.ocp, "save", write_half)
    elif where == "before the seal":
        monkeypatch.setattr(manifest, "seal", killed)
    elif where == "after the seal":
        monkeypatch.setattr(checkpoint.os, "replace", replace_but(".partial", when="before"))
    elif where == "between the renames":
        monkeypatch.setattr(checkpoint.os, "replace", replace_but(".replaced", when="after"))
    elif where == "before the removal":
        monkeypatch.setattr(checkpoint, "sync_folder", killed)
    elif where == "within the removal":
        monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)


def replace_but(suffix, when):
    replace = os.replace

    def patched(source, target):
        hit = str(source).endswith(suffix) or str(target).endswith(suffix)
        if hit and when == "before":
            raise Killed
        replace(source, target)
        if hit:
            raise Killed

    return patched


PLACES = {  # where the save of 30 is stopped: the step that is restored then
    "while Orbax writes": 20,
    "before the seal": 20,
    "after the seal": 20,
    "before the removal": 30,
    "within the removal": 30,
}


@pytest.mark.parametrize(("where", "newest"), PLACES.items())
def test_a_save_stopped_anywhere_leaves_a_whole_checkpoint(tmp_path, lines, where, newest):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        fill(checkpoints, [20])
    with Checkpoints(tmp_path, keep=1) as stopped, pytest.MonkeyPatch.context() as patch:
        stop_at(patch, where)
        stopped.save(30, make_state(30))
        with pytest.raises(Killed):
            stopped.wait()
    with Checkpoints(tmp_path, keep=1, report=lines.append) as resumed:
        restored = resumed.restore_latest(make_state())
        assert restored.step == newest
        assert_identical(restored.state, make_state(newest))
        assert len(lines) == (newest == 20) and all("checkpoint 30 is half-written" in line for line in lines)
        fill(resumed, [30])
        assert_identical(resumed.restore_latest(make_state()).state, make_state(30))
        assert [path.name for path in tmp_path.iterdir()] == ["30"]


@pytest.mark.parametrize("where", ["before the seal", "after the seal", "between the renames", "within the removal"])
def test_replacing_a_checkpoint_is_safe_too(tmp_path, lines, where):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        fill(checkpoints, [30])
    with Checkpoints(tmp_path, keep=1) as stopped, pytest.MonkeyPatch.context() as patch:
        stop_at(patch, where)
        stopped.save(30, make_state(31))
        with pytest.raises(Killed):
            stopped.wait()
    written = 31 if where == "within the removal" else 30
    with Checkpoints(tmp_path, keep=1, report=lines.append) as resumed:
        restored = resumed.restore_latest(make_state())
        assert restored.step == 30
        assert_identical(restored.state, make_state(written))
        assert resumed.all_steps() == [30]
        resumed.save(40, make_state(40), wait=True)
        assert [path.name for path in tmp_path.iterdir()] == ["40"]


def test_stopped_in_the_first_save_begins_anew(tmp_path, lines):
    with Checkpoints(tmp_path) as stopped, pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "while Orbax writes")
        stopped.save(10, make_state())
        with pytest.raises(Killed):
            stopped.wait()
    with Checkpoints(tmp_path, report=lines.append) as checkpoints:
        assert checkpoints.restore_latest(make_state()) is None
        assert len(lines) == 1 and "half-written" in lines[0]


def test_a_failed_save_is_reported_and_does_not_block_the_next(checkpoints, monkeypatch, capfd):
    def full(path, tree, **kwargs):
        (path.with_name(path.name + ".orbax-checkpoint-tmp") / "state").mkdir(parents=True)
        raise ValueError("wrapped [tensorstore_spec=...]") from OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.ocp, "save", full)
        checkpoints.save(1, make_state(1))
        with pytest.raises(UsageError, match=r"checkpoint 1 could not be written to .*: .*No space left on device$"):
            checkpoints.save(2, make_state(2))
    checkpoints.save(1, make_state(1), wait=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, "before the removal")
        checkpoints.save(2, make_state(2), wait=True)
    fill(checkpoints, [3, 4, 5])
    assert checkpoints.all_steps() == [3, 4, 5]
    assert_identical(checkpoints.restore_latest(make_state()).state, make_state(5))
    assert capfd.readouterr() == ("", "")


def test_an_unwritable_directory_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with Checkpoints(tmp_path / "file" / "checkpoints") as checkpoints:
        with pytest.raises(UsageError, match="could not be written"):
            checkpoints.save(1, {"w": jnp.ones(1)})
        assert checkpoints.restore_latest({"w": jnp.ones(1)}) is None


CHILD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from qtrain.checkpoint import Checkpoints

def state_at(step):
    return {f"leaf_{i}": jnp.full(400, step + i / 8) for i in range(12)} | {"key": jax.random.key(step)}

with Checkpoints(sys.argv[1], keep=int(sys.argv[2])) as checkpoints:
    restored = checkpoints.restore_latest(state_at(0))
    step = 0 if restored is None else restored.step
    if restored is not None:
        assert restored.metadata == {"step": step}
        for one, other in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_at(step)), strict=True):
            assert bool((one == other).all())
    print("at", step, flush=True)
    while True:
        checkpoints.save(step + 1, state_at(step + 1), {"step": step + 1})
        print("saved", step, flush=True)  # the save of step + 1 waited for that of step
        step += 1
"""


def test_kill_minus_nine(tmp_path):
    """A process that saves all the time is killed three times; what was on the disk is found again, bit for bit."""
    delays = random.Random(0)
    done = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "checkpoints"), "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        first = process.stdout.readline().split()
        if not first:
            pytest.fail(process.communicate()[1])
        assert first[0] == "at" and int(first[1]) >= done  # nothing that was saved is lost
        if attempt == 3:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            break
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delays.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert not [line for line in errors.splitlines() if "half-written" not in line], errors
        done = max([int(first[1]) + 2, *(int(line.split()[1]) for line in rest.splitlines() if line.count(" ") == 1)])
    assert done >= 6


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
