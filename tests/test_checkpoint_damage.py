"""Checkpoints: nothing a kill or a bad disk does is trusted or in the way."""

import os
import random
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_identical, data_file, fill, flip, make_state
from orbax.checkpoint import v1 as ocp

from qtrain import checkpoint, manifest, storage
from qtrain.checkpoint import Checkpoints
from qtrain.errors import UsageError
from qtrain.manifest import MANIFEST


@pytest.fixture
def lines():
    return []


@pytest.fixture
def checkpoints(tmp_path, lines):
    with Checkpoints(tmp_path / "checkpoints", keep=3, report=lines.append) as checkpoints:
        yield checkpoints


# --- damage


def truncate(folder):
    path = data_file(folder)
    path.write_bytes(path.read_bytes()[:-1])
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
