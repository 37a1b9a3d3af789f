"""What stops a run, by divergence or by data that do not fit, and that a resumed run computes as it was started."""

import math
import os
import re

import jax.numpy as jnp
import pytest
from program import assert_equal, final_state, rows, small_config, snapshot

from qtrain import main, workdir
from qtrain.build import build
from qtrain.data import ImageArrays, digits
from qtrain.errors import UsageError
from qtrain.quantizers import native
from qtrain.start import as_started
from qtrain.state import make_train_step
from qtrain.train import Diverged, Run, train

# --- what stops a run


def test_divergence_stops_with_step_batch_and_bits(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(
        "from program import small_config\n"
        "def get_config():\n"
        "    return small_config(optimizer__name='sgd', optimizer__learning_rate=1e30, checkpoint__every_steps=1)\n"
    )
    arguments = ["train", "--config", str(path), "--workdir", str(tmp_path / "run"), "--quiet"]
    assert main.main(arguments) == main.DIVERGED == 1
    out, error = capsys.readouterr()
    match = re.fullmatch(
        r"qtrain: loss is (\S+), its gradient's norm (\S+) at step (\d+) \(batch (\d+), "
        r"bits (\d)/(\d)/8 of weights/acts/grads\); last checkpoint: (\d+|none)\n",
        error,
    )
    assert match and out == "", error
    assert not (math.isfinite(float(match[1])) and math.isfinite(float(match[2])))
    step, batch = int(match[3]), int(match[4])
    assert batch == step - 1 <= 4
    experiment = build(small_config())
    assert int(match[5]) == experiment.precision_at(batch).weights
    # Nothing of the diverged state was kept, and the run is not done.
    steps = sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints") if name.isdigit())
    assert max(steps, default=0) < step
    assert not (tmp_path / "run" / "DONE").exists()
    assert main.main(arguments) == 1, "and again when it is resumed"


def test_a_gradient_that_is_not_finite_stops_a_run_whose_loss_is(tmp_path, monkeypatch):
    real = make_train_step

    def poisoned(*args):
        step = real(*args)

        def train_step(state, batch, key):
            state, out = step(state, batch, key)
            return state, {**out, "grad_norm": jnp.where(state.step == 5, jnp.inf, out["grad_norm"])}

        return train_step

    monkeypatch.setattr("qtrain.programs.make_train_step", poisoned)
    config = small_config(checkpoint__every_steps=1, train__log_every_steps=1, data__repeat=2)
    with pytest.raises(Diverged, match=r"norm inf at step 5 \(batch 2, bits .*last checkpoint: 4$"):
        train(config, str(tmp_path / "run"), quiet=True)
    assert rows(tmp_path / "run", "train")[-1]["step"] == 4


def test_divergence_inside_a_dispatch_names_its_step(tmp_path):
    config = small_config(optimizer__name="sgd", optimizer__learning_rate=1e30, train__steps_per_dispatch=3)
    with pytest.raises(Diverged, match=r"at step [1-4] \(batch [0-3], "):
        train(config, str(tmp_path / "run"), quiet=True)


def test_other_data_under_the_same_config_is_refused(tmp_path, monkeypatch):
    config, folder = small_config(train__steps=2, train__log_every_steps=1), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workdir, "finish", _interrupt)
        train(config, str(folder), quiet=True)
    training, test = digits.load()
    monkeypatch.setattr(digits, "load", lambda: (ImageArrays(training.images[::-1].copy(), training.labels), test))
    before = snapshot(folder)
    with pytest.raises(UsageError, match=r"other data.*train_content was \d+ and is \d+.*another --workdir"):
        train(config, str(folder), quiet=True)
    assert snapshot(folder) == before


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path, monkeypatch):
    class Mesh:
        size = 5

    monkeypatch.setattr("qtrain.sharding.make_mesh", lambda _: Mesh())
    with pytest.raises(UsageError, match=r"data\.batch_size=32: does not divide evenly among 5 devices"):
        train(small_config(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- execution, as the run was started


def native_config(**overrides):
    fields = {"model__features": (16,), "quant__execution": "auto", "quant__residuals": "folded"}
    return small_config(train__log_every_steps=1, **fields, **overrides)


def slow_weight_gradients(op, operands, lhs, rhs, backend):
    return {"drhs": "measured"} if rhs.shape == (64, 16) else {}


def slow_throughout(*_):
    return dict.fromkeys(native.PRODUCTS, "measured anew")


def test_execution_is_recorded_before_anything_runs(tmp_path, monkeypatch):
    config, folder = native_config(), tmp_path / "run"
    monkeypatch.setattr(native, "slower", slow_weight_gradients)
    workdir.prepare(folder, config.to_dict(), {})
    first = as_started(build(config), folder)  # also after a kill between the two
    assert workdir.recorded(folder)["execution"] == {path: c.to_json() for path, c in first.plan.choices.items()}
    monkeypatch.setattr(native, "slower", slow_throughout)
    assert {row.execution for row in build(config).plan} == {"float"}
    again = as_started(build(config), folder)
    assert {path: c.paths for path, c in again.plan.choices.items()} == {
        p: c.paths for p, c in first.plan.choices.items()
    }
    assert again.plan["Dense_0"].execution_reason == "recorded; dW float: measured"
    assert again.qmodel.choices == again.plan.choices
    workdir.record(folder, "execution", {"Dense_0": {"forward": "int4"}})
    with pytest.raises(UsageError, match=r"execution\['Dense_0'\]\.forward='int4': give one of"):
        as_started(build(config), folder)


def test_a_resumed_run_computes_as_it_was_started(tmp_path, monkeypatch, capsys):
    config = native_config(train__steps=4, checkpoint__every_steps=2, quant__ends=4)
    monkeypatch.setattr(native, "slower", slow_weight_gradients)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    summary = train(config, str(whole), quiet=True)
    assert summary["compilations"] == 1
    batches, taken = Run._next, iter([False, False, False])
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Run, "_next", lambda *args: next(taken) or batches(*args))
        train(config, str(folder), quiet=True)
    monkeypatch.setattr(native, "slower", slow_throughout)
    resumed = train(config, str(folder))
    assert "recorded; dW float: measured" in capsys.readouterr().out
    assert {**resumed, "wall_seconds": 0} == {**summary, "wall_seconds": 0}
    assert rows(folder) == rows(whole)
    assert_equal(final_state(config, folder), final_state(config, whole))
