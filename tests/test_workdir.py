"""The run's folder: new, resumed, done or refused; files that are there whole or not at all."""

import errno
import json
import os
import threading

import jax
import numpy as np
import pytest

from qtrain import workdir
from qtrain.errors import UsageError
from qtrain.workdir import finish, prepare, read_config, read_summary, record, recorded, write_json

CONFIG = {
    "seed": 0,
    "train": {"steps": 100, "log": [1, 2]},
    "quant": {"rules": [{"path": ".*", "weights": None}], "bits": (3, 8)},
    "schedule": {"name": "cyclic", "low": 3.0},
}
VERSIONS = {"jax": "0.10.2", "flax": "0.12.8"}


def changed(**changes):
    config = json.loads(json.dumps(CONFIG))
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        branch = config
        for parent in parents:
            branch = branch[parent]
        branch[last] = value
    return config


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*args):
    with pytest.raises(UsageError) as caught:
        prepare(*args)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("workdir: ")
    return message


def test_new_then_resume_then_done(tmp_path, capsys):
    folder = tmp_path / "runs" / "a"
    assert prepare(folder, CONFIG, VERSIONS) == "new"
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"] == json.loads(json.dumps(CONFIG))
    assert stored["versions"] == VERSIONS
    assert stored["backend"] == jax.default_backend() and stored["device"] and stored["python"].count(".") == 2
    assert list(files(folder)) == ["config.json"]
    before = files(folder)
    assert prepare(str(folder), CONFIG, VERSIONS) == "resume"
    assert files(folder) == before
    finish(folder, {"steps": 100, "train_loss": 0.5})
    assert prepare(folder, CONFIG, VERSIONS) == "done"
    assert read_summary(folder) == {"steps": 100, "train_loss": 0.5}
    assert read_config(folder) == stored["config"]
    assert capsys.readouterr() == ("", "")


def test_an_empty_folder_is_new(tmp_path):
    (tmp_path / ".config.json.123.tmp").touch()  # left by a kill within the first write
    assert prepare(tmp_path, CONFIG, VERSIONS) == "new"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: 0 != 1;"),
        ({"schedule__low": 4}, "schedule.low: 3.0 != 4;"),
        ({"schedule__name": "linear"}, 'schedule.name: "cyclic" != "linear";'),
        ({"train__log": [1, 2, 3]}, "train.log: [1, 2] != [1, 2, 3];"),
        ({"train__lr": 0.1}, "train.lr: absent != 0.1;"),
        ({"quant__rules": [{"path": ".*", "weights": 8}]}, "quant.rules.0.weights: null != 8;"),
        ({"quant__rules": []}, 'quant.rules: absent != []; quant.rules.0.path: ".*" != absent;'),
        ({"seed": False}, "seed: 0 != false;"),
        ({"seed": "x" * 100}, "seed: 0 != " + '"' + "x" * 56 + "...;"),
    ],
)
def test_another_run_is_refused_with_the_differing_keys(tmp_path, changes, words):
    prepare(tmp_path, CONFIG, VERSIONS)
    before = files(tmp_path)
    message = refusal(tmp_path, changed(**changes), VERSIONS)
    assert "holds another run" in message and words in message
    assert files(tmp_path) == before
    finish(tmp_path, {})
    assert words in refusal(tmp_path, changed(**changes), VERSIONS)  # a finished run is no different


def test_many_differences_are_counted(tmp_path):
    prepare(tmp_path, {f"key_{i}": i for i in range(20)}, {})
    message = refusal(tmp_path, {f"key_{i}": i + 1 for i in range(20)}, {})
    assert message.count("!=") - 1 == 6 and "; and 14 more; choose" in message


@pytest.mark.parametrize("same", [{"schedule__low": 3}, {"quant__bits": [3, 8]}, {}])
def test_equal_values_are_no_difference(tmp_path, same):
    prepare(tmp_path, CONFIG, VERSIONS)
    assert prepare(tmp_path, changed(**same), VERSIONS) == "resume"


def test_nan_equals_itself(tmp_path):
    for expected in ("new", "resume"):
        assert prepare(tmp_path, {"clip": float("nan"), "limit": float("inf")}, {}) == expected
    assert read_config(tmp_path)["limit"] == float("inf")


def test_other_versions_are_a_warning(tmp_path, capsys):
    prepare(tmp_path, CONFIG, VERSIONS)
    assert prepare(tmp_path, CONFIG, {**VERSIONS, "jax": "0.11.0"}) == "resume"
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert 'versions.jax: "0.10.2" != "0.11.0"' in output.err


def test_a_config_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"config: optimizer\.rate is a float32"):
        prepare(tmp_path / "run", {"optimizer": {"rate": np.float32(1)}}, {})
    assert not (tmp_path / "run").exists()


def test_choices_are_kept_apart(tmp_path):
    prepare(tmp_path, CONFIG, VERSIONS)
    assert recorded(tmp_path) == {}
    record(tmp_path, "execution", "scan")
    record(tmp_path, "steps_per_dispatch", 4)
    record(tmp_path, "execution", "unrolled")
    assert recorded(tmp_path) == {"execution": "unrolled", "steps_per_dispatch": 4}
    assert prepare(tmp_path, CONFIG, VERSIONS) == "resume"
    assert read_config(tmp_path) == json.loads(json.dumps(CONFIG))


# --- folders that cannot be used


def a_file(path):
    path.touch()
    return path, "is not a folder"


def under_a_file(path):
    path.touch()
    return path / "run", "not a directory"


def name_too_long(path):
    return path.with_name("x" * 300), "file name too long"


def null_byte(path):
    return str(path) + "\0", "null byte"


def no_name(path):
    return "", "is not a folder"


def dangling_link(path):
    path.symlink_to(path.with_name("nowhere") / "deep")
    return path, "cannot be created"


def unrelated(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    return path, "is not a qtrain run: it holds 'thesis.tex'"


def of_another_program(path):
    path.mkdir()
    (path / "config.json").write_text('{"model": "other"}')
    return path, "its config.json was written by something else"


def damaged_config(path):
    path.mkdir()
    (path / "config.json").write_text('{"program": "qtr')
    return path, "is damaged"


@pytest.mark.parametrize(
    "case",
    [
        a_file,
        under_a_file,
        name_too_long,
        null_byte,
        no_name,
        dangling_link,
        unrelated,
        of_another_program,
        damaged_config,
    ],
)
def test_folders_that_are_refused(tmp_path, case):
    path, words = case(tmp_path / "run")
    before, names = files(tmp_path), sorted(tmp_path.rglob("*"))
    assert words in refusal(path, CONFIG, VERSIONS)
    assert files(tmp_path) == before and sorted(tmp_path.rglob("*")) == names


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("status", ["new", "resume"])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, status, number):
    """By a fake, since the tests may run as root, whom no permission stops."""
    if status == "resume":
        prepare(tmp_path, CONFIG, VERSIONS)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    before = files(tmp_path)
    monkeypatch.setattr(workdir.os, "replace", refuse)
    monkeypatch.setattr(workdir.tempfile, "TemporaryFile", refuse)
    assert f"cannot be created or written: {os.strerror(number).lower()}" in refusal(tmp_path, CONFIG, VERSIONS)
    assert files(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "permission denied" in refusal(tmp_path / "run", CONFIG, VERSIONS)
    finally:
        tmp_path.chmod(0o700)


def test_a_system_folder(tmp_path):
    assert "cannot be created or written" in refusal("/proc/qtrain_run", CONFIG, VERSIONS)


# --- reading what is not there


@pytest.mark.parametrize("read", [read_config, read_summary, recorded, lambda path: record(path, "key", 1)])
def test_reading_what_is_no_run(tmp_path, read):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is not a qtrain run"):
            read(path)


def test_the_summary_of_an_unfinished_run(tmp_path):
    prepare(tmp_path, CONFIG, VERSIONS)
    write_json(tmp_path / "summary.json", {})  # the kill came between the two files
    with pytest.raises(UsageError, match="has not finished"):
        read_summary(tmp_path)
    assert prepare(tmp_path, CONFIG, VERSIONS) == "resume"


# --- the atomic writer


def test_write_json_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(workdir.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "disk")))
    with pytest.raises(OSError, match="disk"):
        write_json(path, {"a": 2})
    assert files(tmp_path) == {"a.json": b'{\n  "a": 1\n}\n'}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"values": [0] * 2000})
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            seen.append(json.loads(path.read_text())["values"])

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        write_json(path, {"values": [i] * 2000})
    stop.set()
    reader.join()
    assert seen and all(len(values) == 2000 and len(set(values)) == 1 for values in seen)
