"""Training: exact cost, metrics, evaluation, runs that are functions of their configs, and what reads them."""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import Steps, final_state, rows, small_config, snapshot

from qtrain import cost, workdir
from qtrain.build import build
from qtrain.precision import Precision
from qtrain.train import train


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A small run that logs every step: its config, folder and summary."""
    config, folder = small_config(train__log_every_steps=1), tmp_path_factory.mktemp("reference") / "run"
    return config, folder, train(config, str(folder), quiet=True)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(reference, tmp_path):
    config = small_config(model__dtype="bfloat16")
    experiment = build(config)
    assert {op.lhs.native_bits for op in experiment.plan.ops} == {16}, "the products are of bfloat16"
    summary = train(config, str(tmp_path / "run"), quiet=True)
    state = final_state(config, tmp_path / "run")
    floats = [
        leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    _, _, full = reference
    assert summary["test_loss"] == pytest.approx(full["test_loss"], rel=0.05)
    assert summary["test_loss"] != full["test_loss"]


# --- cost


def test_bitops_add_up_to_the_exact_sum(reference):
    config, folder, summary = reference
    experiment = build(config)
    exact = cost.effective(experiment.plan.ops, experiment.schedule, 12)
    assert summary["effective_bitops"] == pytest.approx(exact, rel=1e-6)
    assert summary["static_bitops"] == cost.static(experiment.plan.ops, Precision(8, 8, 8), 12)
    assert rows(folder, "eval")[-1]["effective_bitops"] == summary["effective_bitops"]


def test_saving_of_a_window_by_hand(tmp_path):
    # Of 12 steps those from 20 % on, for 40 %, that is 2 to 6, are at 3 bits; the others at 8; gradients at 8.
    config = small_config(schedule="window", quant__rules=({"path": ".*", "grad_quantizer": "symmetric/tensor"},))
    summary = train(config, str(tmp_path / "run"), quiet=True)
    macs = [32 * size for size in (64 * 16, 16 * 16, 16 * 10)]

    def step(bits):
        forward, weight_gradient = bits * bits * sum(macs), bits * 8 * sum(macs)
        input_gradient = bits * 8 * sum(macs[1:])  # the first layer's input is data
        return forward + weight_gradient + input_gradient

    assert summary["static_bitops"] == 12 * step(8)
    assert summary["effective_bitops"] == pytest.approx(5 * step(3) + 7 * step(8), rel=1e-6)
    assert summary["saving"] == pytest.approx(1 - (5 * step(3) + 7 * step(8)) / (12 * step(8)), abs=1e-6)
    assert summary["bits_final"] == {"weights": 8, "acts": 8, "grads": 8}


# --- metrics


def test_rows_have_every_metric_and_norms_across_changes(reference):
    config, folder, _ = reference
    experiment = build(config)
    found = rows(folder, "train")
    assert [row["step"] for row in found] == list(range(1, 13))
    before = None
    changes = 0
    for t, row in enumerate(found):
        bits = experiment.precision_at(t)
        assert [row["bits_weights"], row["bits_acts"], row["bits_grads"]] == [bits.weights, bits.acts, bits.grads]
        assert row["learning_rate"] == pytest.approx(2e-3 * (1 + math.cos(math.pi * t / 12)) / 2, rel=1e-4)
        assert row["grad_norm"] > 0 and row["update_norm"] > 0 and 0 <= row["accuracy"] <= 1 and row["loss"] > 0
        changed = t > 0 and row["bits_weights"] != before["bits_weights"]
        assert row["bits_changes"] == changed
        for name in ("grad_norm", "update_norm"):
            ratio = row[f"{name}_ratio_on_change"]
            if changed:
                assert ratio == pytest.approx(row[name] / before[name], rel=1e-5)
            else:
                assert ratio is None
        before, changes = row, changes + changed
    assert changes >= 6


def test_rows_average_over_the_steps_between_them(reference, tmp_path):
    _, folder, _ = reference
    train(small_config(train__log_every_steps=4), str(tmp_path / "four"), quiet=True)
    each, averages = rows(folder, "train"), rows(tmp_path / "four", "train")
    assert [row["step"] for row in averages] == [4, 8, 12]
    for i, row in enumerate(averages):
        group = each[4 * i : 4 * i + 4]
        for name in ("loss", "accuracy", "grad_norm", "update_norm", "bits_changes"):
            assert row[name] == pytest.approx(np.mean([one[name] for one in group]), rel=1e-5)
        ratios = [one["grad_norm_ratio_on_change"] for one in group if one["grad_norm_ratio_on_change"] is not None]
        assert row["grad_norm_ratio_on_change"] == pytest.approx(np.mean(ratios), rel=1e-5)


# --- evaluation


def test_evaluation_at_each_precision(tmp_path):
    # The last step is inside the window: 3 bits are current, 8 are q_max.
    config = small_config(
        schedule="window", schedule__start_percent=50.0, schedule__length_percent=50.0, train__steps=40
    )
    summary = train(config, str(tmp_path / "run"), quiet=True)
    assert summary["bits_final"] == {"weights": 3, "acts": 3, "grads": 8}
    experiment, state = build(config), final_state(config, tmp_path / "run")
    test = experiment.dataset.eval["test"]
    images, labels = test.gather(np.arange(len(test)))
    inputs = (images.astype(np.float32) / 16 - experiment.dataset.mean[0]) / experiment.dataset.std[0]
    losses = set()
    for suffix, bits in (("", Precision(8, 8, 8)), ("_scheduled", Precision(3, 3, 8)), ("_float", None)):
        rngs = {"quant": jax.random.key(0)}  # unused: only gradients round stochastically
        logits = experiment.qmodel.apply(state.variables, jnp.float32(inputs), bits=bits, rngs=rngs)
        logits = np.asarray(logits, np.float64)
        logits -= logits.max(-1, keepdims=True)
        picked = np.take_along_axis(logits, labels[:, None], -1)[:, 0]
        loss = np.mean(np.log(np.exp(logits).sum(-1)) - picked)
        assert summary[f"test_loss{suffix}"] == pytest.approx(loss, rel=1e-3)
        assert summary[f"test_accuracy{suffix}"] == pytest.approx(np.mean(logits.argmax(-1) == labels), abs=0.003)
        losses.add(round(loss, 6))
    assert len(losses) == 3, "three precisions, three losses"
    assert abs(summary["test_loss"] - summary["test_loss_float"]) < abs(
        summary["test_loss_scheduled"] - summary["test_loss_float"]
    )


def test_evaluation_in_small_batches_is_the_same(reference, tmp_path):
    # 360 test examples in batches of 50: the last is padded, and the padding must not count.
    _, _, whole = reference
    parts = train(small_config(eval__batch_size=50), str(tmp_path / "parts"), quiet=True)
    for name in ("test_loss", "test_accuracy", "test_loss_float", "test_accuracy_float", "test_loss_scheduled"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


# --- the library's own door


def test_a_run_is_a_function_of_its_config(reference, tmp_path):
    config, folder, first = reference
    second = train(config, str(tmp_path / "run"), quiet=True)
    assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0}
    assert rows(folder) == rows(tmp_path / "run")
    before = snapshot(folder)
    assert train(config, str(folder), quiet=True) == first, "a finished run is read, not repeated"
    assert snapshot(folder) == before


def test_a_run_in_float_records_no_execution(reference):
    assert workdir.recorded(reference[1]) == {}


def test_seeds_change_what_they_say():
    # `seed`: initial values and rounding; `data.seed`: order.
    plain, seed, data_seed = (Steps(small_config(**kwargs)) for kwargs in ({}, {"seed": 1}, {"data__seed": 1}))
    kernels = [steps.state.params["Dense_0"]["kernel"] for steps in (plain, seed, data_seed)]
    assert np.array_equal(kernels[0], kernels[2]) and not np.array_equal(kernels[0], kernels[1])
    labels = []
    for steps in (plain, seed, data_seed):
        with steps.batches() as batches:
            labels.append(next(batches)["label"])
    assert np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], labels[2])


# --- what reads it afterwards


def test_the_report_reads_what_the_trainer_writes(reference):
    from qtrain.report import find_runs, make_report, read_runs

    _, folder, summary = reference
    notes: list[str] = []
    (run,) = read_runs(find_runs([folder.parent]), notes)
    assert not notes and run.finished and run.step == run.total == 12 and run.seed == (0, 0)
    assert run.values["effective_bitops"] == summary["effective_bitops"] and run.values["stored_bytes"] > 0
    assert run.curve.steps.tolist() == list(range(1, 13)) and np.isfinite(run.curve.loss).all()
    assert run.curve.bits[:, 2].tolist() == [8.0] * 12 and set(run.curve.bits[:, 0]) <= set(range(3, 9))
    text = make_report([run]).files["points_digits_test_accuracy.csv"].decode()
    (row,) = csv.DictReader(text.splitlines())
    assert float(row["test accuracy, %"]) == 100 * summary["test_accuracy"]
    assert row["point"] == "CR 3–8, g 8 bits" and row["test accuracy, % n"] == "1" and row["test accuracy, % low"] == ""
