"""Metrics on disk: valid JSON, exact numbers, and a resumed run's file equal to an uninterrupted one's."""

import json
import math
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.writers import MetricsWriter, cut_back, read_metrics


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def event_points(folder):
    """Step, tag and value of every point, and the step of every restart, read from the record format itself."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points, restarts = [], []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while len(content) >= 16:
            (length,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + length:  # cut off by a kill
                break
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                restarts.append(event.step)
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return points, restarts


VALUES = [  # name, value, what JSON reads back, what TensorBoard has (None: nothing)
    ("python_float", 0.1, 0.1, 0.1),
    ("python_int", 3, 3, 3.0),
    ("boolean", True, True, 1.0),
    ("numpy_float32", np.float32(0.1), float(np.float32(0.1)), 0.1),
    ("numpy_int", np.int64(2**60 + 1), 2**60 + 1, 2.0**60),
    ("jax_float32", jnp.float32(1 / 3), float(np.float32(1 / 3)), 1 / 3),
    ("jax_bfloat16", jnp.bfloat16(1.5), 1.5, 1.5),
    ("jax_int", jnp.int32(-4), -4, -4.0),
    ("jax_bool", jnp.array(False), False, 0.0),
    ("nan", float("nan"), None, math.nan),
    ("infinity", np.float32("inf"), None, math.inf),
    ("minus_infinity", jnp.float32(-jnp.inf), None, -math.inf),
    ("none", None, None, None),
    ("text", 'a "quoted" ü', 'a "quoted" ü', None),
    ("bits_per_layer", jnp.array([3.0, jnp.nan, 8.0]), [3.0, None, 8.0], None),
    ("pair", (1, np.float32(2.5)), [1, 2.5], None),
]


@pytest.mark.parametrize(("name", "value", "expected", "point"), VALUES, ids=[case[0] for case in VALUES])
def test_values(tmp_path, name, value, expected, point):
    with MetricsWriter(tmp_path, None) as writer:
        writer.write(np.int32(7), "train", {name: value})
    line = (tmp_path / "metrics.jsonl").read_bytes()
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    row = strict(line)
    assert list(row) == ["step", "kind", name] and row["step"] == 7 and row["kind"] == "train"
    assert row[name] == expected and type(row[name]) is type(expected)
    points, restarts = event_points(tmp_path / "tensorboard")
    assert restarts == []
    if point is None:
        assert points == []
    else:
        ((step, tag, written),) = points
        assert (step, tag) == (7, f"train/{name}")
        np.testing.assert_allclose(written, point, rtol=1e-7)


@pytest.mark.parametrize("value", [{"a": 1}, object(), 1j, np.array("text")])
def test_values_that_are_not_numbers(tmp_path, value):
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer, pytest.raises(TypeError, match="metric 'x' is a"):
        writer.write(1, "train", {"x": value})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("name", ["step", "kind"])
def test_reserved_names(tmp_path, name):
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer, pytest.raises(ValueError, match=name):
        writer.write(1, "train", {name: 1})


def run(folder, start, stop, resume_step):
    """What a trainer does: rows of step s, flush, checkpoint s (every 4th step)."""
    with MetricsWriter(folder, resume_step) as writer:
        for step in range(start + 1, stop + 1):
            writer.write(step, "train", {"loss": 1 / step, "bits": jnp.float32(step % 8)})
            if step % 4 == 0:
                writer.write(step, "eval", {"accuracy": step / 100})
                writer.flush()


@pytest.mark.parametrize("tail", [b"", b'{"step": 8, "ki', b'{"step": 99', b"\x00\x00", b"\n"])
@pytest.mark.parametrize("killed_at", [4, 5, 7, 8, 11])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, capsys, killed_at, tail):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    run(tmp_path / "whole", 0, 12, None)
    run(tmp_path / "parts", 0, killed_at, None)
    with open(tmp_path / "parts" / "metrics.jsonl", "ab") as file:
        file.write(tail)
    checkpoint = killed_at // 4 * 4
    run(tmp_path / "parts", checkpoint, 12, checkpoint)
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole
    assert read_metrics(tmp_path / "parts", "eval") == [
        {"step": step, "kind": "eval", "accuracy": step / 100} for step in (4, 8, 12)
    ]
    points, restarts = event_points(tmp_path / "parts" / "tensorboard")
    assert restarts == [checkpoint + 1]
    first = event_points(tmp_path / "whole" / "tensorboard")[0]
    # TensorBoard forgets, of the first process, the points from the restart on.
    boundary = len([1 for step in range(1, killed_at + 1) for _ in range(2 + (step % 4 == 0))])
    assert [point for point in points[:boundary] if point[0] <= checkpoint] + points[boundary:] == first
    assert capsys.readouterr().err.count("damaged lines") == (tail == b"\n")


def test_without_a_checkpoint_the_file_begins_anew(tmp_path):
    run(tmp_path, 0, 3, None)
    run(tmp_path, 0, 2, None)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert event_points(tmp_path / "tensorboard")[1] == [0]


def test_rows_of_the_checkpoints_step_stay_as_they_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": 3,  "x": 1.50}\n', b'{"step": 4}\n', b'{"step": 4}\n', b'{"step": 5}\n', b'{"step": 2}\n']
    path.write_bytes(b"".join(rows))
    cut_back(path, 4)
    assert path.read_bytes() == b"".join(rows[:3] + rows[4:])
    before = path.stat().st_ino
    cut_back(path, 4)
    assert path.stat().st_ino == before  # nothing to do, nothing touched
    cut_back(tmp_path / "nowhere", 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_lines_in_the_middle_are_dropped_and_reported(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[1]\n{"no": 1}\n{"step": "x"}\n{"step": 2}\n')
    cut_back(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert capsys.readouterr().err == f"warning: {path}: 4 damaged lines dropped\n"


def test_cutting_back_is_atomic(tmp_path, monkeypatch):
    run(tmp_path, 0, 8, None)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cut_back(tmp_path / "metrics.jsonl", 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_reading_leaves_out_a_line_that_is_being_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train"}]


def test_switched_off(tmp_path):
    with MetricsWriter(tmp_path, None, enabled=False) as writer:
        writer.write(1, "train", {"x": 1.0})
        writer.flush()
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        writer.write(1, "train", {"x": 1.0})
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


CHILD = """
import os, signal, sys
from qtrain.writers import MetricsWriter
assert "tensorboardX" not in sys.modules
writer = MetricsWriter(sys.argv[1], None)
for step in range(1, 31):
    writer.write(step, "train", {"loss": 1.0 / step})
    if step == 20:
        writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_minus_nine_loses_no_row(tmp_path):
    result = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == -9 and result.stderr == "", result.stderr
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 31))
    points, _ = event_points(tmp_path / "tensorboard")
    assert [step for step, _, _ in points][:20] == list(range(1, 21))  # those before the flush
