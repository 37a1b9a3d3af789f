"""``qtrain export`` and files that are not as written."""

import json
import os
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import final_state, small_config, snapshot
from safetensors import safe_open
from safetensors.numpy import save_file

from qtrain import Precision, data, export, main
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.evaluate import Evaluator
from qtrain.export import file
from qtrain.export.command import export_run
from qtrain.sharding import make_mesh
from qtrain.train import train
from qtrain.trained import check_promise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of an MLP, cyclic from 3 to 8 bits, with learned scales."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config("digits_mlp", quant__weights="lsq/signed", quant__acts="lsq/unsigned", train__steps=6)
    train(config, str(folder), quiet=True)
    return folder, config


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    return path, export_run(run[0], path)


def test_bits_above_those_that_programs_on_codes_were_compiled_for(run, tmp_path, monkeypatch, capsys):
    native = build(small_config(quant__execution="native", quant__residuals="folded"))
    assert native.plan.choices
    check_promise(native, "--bits", 8)
    with pytest.raises(UsageError, match=r"--bits: 12 bits are more than the 8 of the run, which quant\.execution="):
        check_promise(native, "--bits", 12)

    def asked(experiment, what, bits):
        raise UsageError(f"{what} {bits}: refused")

    monkeypatch.setattr("qtrain.trained.check_promise", asked)
    out = str(tmp_path / "m.safetensors")
    assert main.main(["export", "--workdir", str(run[0]), "--out", out, "--bits", "4"]) == 2
    assert "--bits 4: refused" in capsys.readouterr().err and not os.path.exists(out)


def test_a_run_is_exported_at_the_bits_of_its_last_step(run, exported, capsys, tmp_path):
    folder, config = run
    path = tmp_path / "m.safetensors"
    before = snapshot(folder)
    assert main.main(["export", "--workdir", str(folder), "--out", str(path)]) == 0
    assert snapshot(folder) == before and os.listdir(tmp_path) == ["m.safetensors"]
    shown = capsys.readouterr().out
    assert path.read_bytes() == exported[0].read_bytes()  # nothing in it depends on when or where
    assert f"{path.stat().st_size:,} bytes on disk" in shown and "logits bit-identical" in shown
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == [
        "Dense_0/kernel",
        "Dense_1/kernel",
        "logits/kernel",
    ]
    loaded = export.load(path)
    last = build(config).precision_at(5)
    assert loaded.bits == Precision(last.weights, last.acts)
    assert {name: stored.bits for name, stored in loaded.stored.items()} == {
        "Dense_0/kernel": 8,
        "Dense_1/kernel": last.weights,
        "logits/kernel": 8,
    }


def test_what_is_loaded_scores_as_the_evaluator_says(run, tmp_path):
    folder, config = run
    path = tmp_path / "m.safetensors"
    report = export_run(folder, path, bits=8)
    loaded, experiment = export.load(path), build(config)
    assert loaded.bits == Precision(8, 8) and report.difference == 0.0
    expected = Evaluator(experiment, make_mesh())(final_state(config, folder))  # at q_max: 8 bits
    correct = count = 0
    for batch in data.eval_batches(experiment.dataset, "test", 360):
        predicted = np.argmax(np.asarray(loaded.logits(jnp.asarray(batch["image"]))), -1)
        correct += np.sum((predicted == batch["label"]) * batch["mask"])
        count += np.sum(batch["mask"])
    assert correct / count == pytest.approx(expected["test_accuracy"], abs=1e-9)


def test_a_run_is_exported_as_stablehlo_alone(run, exported, tmp_path, capsys):
    path = tmp_path / "m.jax"
    assert main.main(["export", "--workdir", str(run[0]), "--stablehlo", str(path)]) == 0
    assert f"{path.stat().st_size:,} bytes of StableHLO, takes float32 [batch, 8, 8, 1]" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["m.jax"]
    inputs = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    logits = jax.export.deserialize(bytearray(path.read_bytes())).call(inputs)
    np.testing.assert_array_equal(logits, export.load(exported[0]).logits(inputs))


@pytest.mark.slow
def test_a_multi_precision_run_is_stored_once_at_its_widest_and_scores_as_evaluated_at_every_width(tmp_path):
    config = small_config(
        "digits_cnn",
        quant__recipe="multi_precision",
        multi_precision__widths=(8, 4, 2),
        schedule__name="rounds",
        data__repeat=3,
        model__batch_norm=True,
        train__steps=24,
    )
    folder, path = tmp_path / "run", tmp_path / "m.safetensors"
    train(config, str(folder), quiet=True)
    report = export_run(folder, path)  # the last step was at 2 bits
    assert report.difference == 0.0 and list(report.separate) == [8, 4, 2]
    expected = Evaluator(build(config), make_mesh())(final_state(config, folder))
    dataset = build(config).dataset
    for bits in (8, 4, 2):
        loaded, correct, count = export.load(path, bits=bits), 0, 0
        for batch in data.eval_batches(dataset, "test", 360):
            predicted = np.argmax(np.asarray(loaded.logits(jnp.asarray(batch["image"]))), -1)
            correct += np.sum((predicted == batch["label"]) * batch["mask"])
            count += np.sum(batch["mask"])
        assert correct / count == pytest.approx(expected[f"test_accuracy_{bits}bit"], abs=1e-9)
    alone = export_run(folder, tmp_path / "alone", bits=4)
    assert alone.remark and alone.bytes < report.bytes
    with pytest.raises(UsageError, match="was exported at 4 of 8 bits, and 2 bits follow exactly only from all 8"):
        export.load(tmp_path / "alone", bits=2)


MISTAKES = {
    "no flags": ([], "the following arguments are required: --workdir; example:"),
    "no file": (["--workdir", "{run}"], "give --out FILE, --stablehlo FILE or both; example:"),
    "no program": (["--workdir", "{run}", "--out", "{tmp}/m", "--platforms", "cpu"], "give --stablehlo FILE with it"),
    "platform": (
        ["--workdir", "{run}", "--stablehlo", "{tmp}/m", "--platforms", "cpu,gpu"],
        "platform 'gpu': give one",
    ),
    "batch": (["--workdir", "{run}", "--stablehlo", "{tmp}/m", "--batch-size", "0"], "'0' is not a size; give a whole"),
    "program's parent": (["--workdir", "{run}", "--stablehlo", "{tmp}/a/m"], "--stablehlo '{tmp}/a/m': there is no"),
    "no run": (["--workdir", "{tmp}/none", "--out", "{tmp}/m"], "is not a qtrain run"),
    "flag": (["--workdir", "{run}", "--out", "{tmp}/m", "--bit", "4"], "--bit: no such flag.*mean '--bits'"),
    "bits": (["--workdir", "{run}", "--out", "{tmp}/m", "--bits", "2.5"], "--bits '2.5' is not a width of integers"),
    "zero": (["--workdir", "{run}", "--out", "{tmp}/m", "--bits", "0"], "give a whole number from 1 to 23"),
    "float": (["--workdir", "{run}", "--out", "{tmp}/m", "--bits", "32"], "give a whole number from 1 to 23"),
    "folder": (["--workdir", "{run}", "--out", "{tmp}"], "is a folder; give a file"),
    "parent": (["--workdir", "{run}", "--out", "{tmp}/a/m"], "there is no folder '{tmp}/a'; create it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(name, run, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    places = {"run": run[0], "tmp": tmp_path}
    assert main.main(["export", *(argument.format(**places) for argument in arguments)]) == main.USAGE_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("qtrain: ")
    assert re.search(message.format(**places), error)
    assert not list(tmp_path.iterdir())


def test_a_float_run_and_an_unstarted_one_are_refused(run, tmp_path):
    folder, config = run
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UsageError, match="has no finished checkpoint yet"):
        export_run(tmp_path, tmp_path / "m")
    stored = json.loads((folder / "config.json").read_text())
    stored["config"]["quant"].update(weights=None, acts=None, grads=None)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    config = small_config("digits_mlp", quant__weights=None, quant__acts=None, quant__grads=None)
    experiment = build(config)
    state = jax.eval_shape(lambda: experiment.qmodel.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1))))
    with pytest.raises(UsageError, match=r"no weight of the model is quantized below 24 bits \(a float run\)"):
        export.save(tmp_path / "m", experiment.qmodel, state, experiment.precision_at(0), experiment.inputs())
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json"]


def test_a_truncated_file_is_refused_at_every_length(exported, tmp_path):
    whole = exported[0].read_bytes()
    path = tmp_path / "m.safetensors"
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="truncated, altered or no safetensors file") as error:
            export.load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UsageError, match="truncated, altered"):
        export.load(path)


def test_an_altered_byte_is_found_wherever_it_is(exported, tmp_path):
    whole = bytearray(exported[0].read_bytes())
    path = tmp_path / "m.safetensors"
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    random = np.random.default_rng(0)
    for place in [0, 3, 9, *random.integers(8, header, 40), *random.integers(header, len(whole), 20)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = export.load(path)
        except UsageError as error:
            assert "\n" not in str(error)
        else:  # white space of the header, which means nothing
            assert json.loads(damaged[8:header]) == json.loads(whole[8:header])
            assert loaded.stored


def test_foreign_files_and_other_versions_are_refused(exported, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UsageError, match="there is no file"):
        export.load(path)
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(UsageError, match="was not written by qtrain export"):
        export.load(path)
    with safe_open(exported[0], framework="np") as opened:
        document = {**json.loads(opened.metadata()["qtrain-export"]), "version": 3, "qtrain": "9.1"}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, path, {"qtrain-export": json.dumps(document)})
    with pytest.raises(UsageError, match=r"format version 3, written by qtrain 9\.1; qtrain .* reads version 2"):
        export.load(path)


def test_a_file_without_a_config_needs_the_module(run, exported, tmp_path):
    tensors, content = file.read(exported[0])
    path = tmp_path / "m.safetensors"
    file.write(path, tensors, {**content, "config": None})
    with pytest.raises(UsageError, match="was stored without a config; give module="):
        export.load(path)
    inputs = np.ones((2, 8, 8, 1), np.float32)
    module = build(run[1]).qmodel.module
    np.testing.assert_array_equal(
        export.load(path, module=module).logits(inputs), export.load(exported[0]).logits(inputs)
    )


def test_an_interrupted_write_leaves_the_file_that_was_there(exported, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtrain.workdir.os.fsync", full)
    with pytest.raises(UsageError, match="cannot be written: no space left on device; give another file"):
        file.write(path, *file.read(exported[0]))
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["m.safetensors"]
