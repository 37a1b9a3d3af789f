"""The command line: every mistake is one line and exit code 2, before compilation, with nothing written or lost."""

import os
import re

import pytest
from program import CONFIGS, MLP, snapshot

from qtrain import main

CONFIG_FILE = """
from qtrain.config import base_config, finish
def get_config(argument=""):
    config = base_config("digits_mlp")
    config.schedule.update(name="constant", bits=4)
    {lines}
    return finish(config, argument)
"""


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """``fails(arguments, *patterns)``: exit code 2, one line that matches, nothing compiled, `tmp_path` as it was."""

    def too_late(*_, **__):
        raise AssertionError("the mistake was not found before the run began")

    # The first of these evaluates the schedule, the second compiles the model.
    monkeypatch.setattr("qtrain.train.describe", too_late)
    monkeypatch.setattr("qtrain.train.Run", too_late)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_data"))

    def check(arguments, *patterns):
        before = snapshot(tmp_path)
        assert main.main([str(argument) for argument in arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.count("\n") == 1 and error.startswith("qtrain: "), error
        for pattern in patterns:
            assert re.search(pattern, error), error
        assert snapshot(tmp_path) == before
        return error

    return check


def config_file(folder, *lines):
    path = folder / "config.py"
    path.write_text(CONFIG_FILE.format(lines="\n    ".join(lines)))
    return path


# --- the commands themselves


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        (
            ["trian"],
            ["unknown command 'trian'; there are train, sweep, plan, .*. Did you mean 'train'"],
        ),
        (["train"], ["--config is missing; give a config file: qtrain train --config"]),
        (["plan"], ["--config is missing"]),
        (["train", "--config"], ["--config is missing"]),
        (["train", "--config="], ["--config is missing"]),
        (["train", "--config", MLP], ["--workdir is missing; give the folder of the run"]),
        (["train", "--config", MLP, "--workdir="], ["--workdir is missing"]),
        (["train", "--config", MLP, "--workdir"], ["workdir"]),
        (["train", "--config", MLP, "--workdirr", "x"], ["--workdirr: no such flag", "Did you mean '--workdir'"]),
        (["train", "--config", MLP, "--quite"], ["--quite: no such flag", "Did you mean '--quiet'"]),
        (["plan", "--config", MLP, "--workdir", "x"], ["--workdir: no such flag of plan, which has --json, --config"]),
        (["train", "--config", MLP, "extra"], ["'extra' is not a flag"]),
        (["train", "--config", MLP, "--profile=maybe"], ["profile", "maybe"]),
        (["schedules", "--low", "nine"], ["--low", "nine"]),
    ],
)
def test_commands_and_flags(arguments, patterns, fails):
    fails(arguments, *patterns)


# --- config files


@pytest.mark.parametrize("command", ["train", "plan"])
def test_no_such_config_file(command, fails):
    mistyped = MLP.replace("_cpt.py", "_cp.py")
    fails([command, "--config", mistyped], "no such file", "Did you mean 'digits_mlp_cpt.py'")
    fails([command, f"--config={mistyped}:smoke"], "no such file")
    fails([command, "--config", "no/such/folder/config.py"], "no such file")
    fails([command, "--config", CONFIGS], "is a folder")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("def get_config(:\n", ["line 1: invalid syntax"]),
        ("\n\nimport no_such_module\n", ["line 3: ModuleNotFoundError: No module named 'no_such_module'"]),
        ("x = 1\n", ["no function get_config"]),
        ("get_config = 3\n", ["no function get_config"]),
        ("def get_config():\n    raise KeyError('abc')\n", ["line 2: KeyError: 'abc'"]),
        ("def get_config():\n    open('no/such/file')\n", ["line 2: FileNotFoundError"]),
        ("def get_config():\n    return {'seed': 3}\n", ["get_config.. returned {'seed': 3}; return the ConfigDict"]),
        ("def get_config():\n    pass\n", ["get_config.. returned None"]),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'steps': 3})\n",
            ["steps: no such key"],
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 3})\n",
            ["is missing from the config"],
        ),
        (
            "from qtrain.config import base_config\ndef get_config():\n    return base_config('digits_mpl')\n",
            ["task 'digits_mpl'", "Did you mean 'digits_mlp'"],
        ),
    ],
)
def test_config_files_that_do_not_give_a_config(text, patterns, fails, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(text)
    error = fails(["train", "--config", path, "--workdir", tmp_path / "run"], *patterns)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("line", "patterns"),
    [
        ("config.train.steps = 'many'", ["config.py", "line 6: TypeError", "train|steps|int"]),
        ("config.train.stepz = 3", ["train.stepz: no such key", "Did you mean 'steps'"]),
        ("config.optimiser = 3", ["optimiser: no such key", "Did you mean 'optimizer'"]),
        ("del config.train.log_every_steps", ["train.log_every_steps is missing"]),
        ("config.schedule.bitz = 3", ["schedule.bitz", "Did you mean 'bits'"]),
        ("config.quant.rules = ({'path': 'Dence_0', 'weights': 4},)", ["'Dence_0' matches no", "'Dense_0'"]),
        ("config.quant.rules = ({'path': '', 'weights': 4},)", ["''", "quantizable"]),
        ("config.quant.rules = ({'path': 'Dense_0', 'weights': 0},)", ["Dense_0", "weights=0"]),
        ("config.quant.rules = ({'path': 'Dense_0', 'weights': 4.5},)", ["Dense_0", "weights=4.5"]),
        ("config.quant.rules = ({'path': 'Dense_0', 'acts': 'four'},)", ["Dense_0", "acts='four'"]),
        ("config.quant.rules = ({'pat': 'Dense_0'},)", ["quant.rules.0..pat", "Did you mean 'path'"]),
        ("config.quant.rules = ({'path': '('},)", ["not a regular expression"]),
        ("config.quant.rules = ({'weight_quantizer': 'symetric'},)", ["weight_quantizer", "'symmetric'"]),
    ],
)
def test_config_files_with_a_mistake(line, patterns, fails, tmp_path):
    fails(["train", "--config", config_file(tmp_path, line), "--workdir", tmp_path / "run"], *patterns)


def test_config_argument(fails, tmp_path):
    fails(["plan", "--config", f"{MLP}:smok"], "config argument 'smok'", "Did you mean 'smoke'")
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    pass\n")
    fails(["plan", "--config", f"{path}:smoke"], "takes no argument; leave out ':smoke'")


def test_reading_a_config_writes_nothing_beside_it(tmp_path, capsys):
    path = config_file(tmp_path)
    assert main.main(["plan", "--config", f"{path}:smoke"]) == 0
    assert os.listdir(tmp_path) == ["config.py"]
    path.write_text(path.read_text().replace("bits=4", "bits=6"))  # same size, same second: not to be mistaken
    capsys.readouterr()
    assert main.main(["plan", "--config", f"{path}:smoke"]) == 0
    assert "constant(bits=6)" in capsys.readouterr().out


# --- overrides


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        # unknown keys
        (
            "schedule.lo=3",
            [r"--config.schedule.lo: no such key; schedule has .*\blow\b", "Did you mean 'schedule.low'"],
        ),
        ("train.stepz=3", ["--config.train.stepz: no such key", "Did you mean 'train.steps'"]),
        ("trian.steps=3", ["--config.trian.steps: no such key", "Did you mean 'train.steps'"]),
        ("steps=3", ["--config.steps: no such key", "Did you mean 'train.steps'"]),
        ("model.depth=3", ["--config.model.depth: no such key; model has dtype, features, name"]),
        ("train.steps.x=3", ["train.steps is 2000 and has no keys"]),
        ("=3", ["--config.: no such key"]),
        # wrong types
        ("train.steps=many", ["--config.train.steps=many: must be a whole number"]),
        ("train.steps=4.5", ["--config.train.steps=4.5: must be a whole number"]),
        ("optimizer.learning_rate=fast", ["--config.optimizer.learning_rate=fast: must be a number"]),
        ("optimizer.nesterov=maybe", ["--config.optimizer.nesterov=maybe: must be true or false"]),
        ("optimizer=3", ["--config.optimizer=3: must be a section", "--config.optimizer.NAME=VALUE"]),
        ("train={'steps': 3}", ["train.epochs is missing"]),
        ("train.steps", ["train.steps"]),
        ("seed=x", ["--config.seed=x: must be a whole number"]),
        ("seed=-1", ["seed=-1: give a whole number from 0 to 4294967295"]),
        ("smoke=7", ["--config.smoke=7: must be true or false"]),
        # bits
        ("schedule.low=0", ["schedule.*low=0: must be a whole number from 1 to 32"]),
        ("schedule.low=4.5", ["--config.schedule.low=4.5: must be a whole number"]),
        ("schedule.low=four", ["--config.schedule.low=four: must be a whole number"]),
        ("schedule.grads.bits=0", ["schedule.grads.*bits=0: must be a whole number from 1 to 32"]),
        ("schedule.grads.bits=4.5", ["--config.schedule.grads.bits=4.5: must be a whole number"]),
        ("schedule.grads.bits=four", ["--config.schedule.grads.bits=four: must be a whole number"]),
        ("schedule.weights.high=33", ["schedule.weights.*high=33: must be a whole number from 1 to 32"]),
        ("schedule.low=9", ["low=9: must not be above high=8"]),
        ("quant.ends=0", ["quant.ends=0: give a whole number from 1 to 32"]),
        ("quant.ends=40", ["quant.ends=40"]),
        # schedules
        ("schedule.cycles=0", ["cycles=0: must be a whole number from 1 to 2000"]),
        ("schedule.cycles=2001", ["cycles=2001: must be a whole number from 1 to 2000"]),
        ("schedule.name=cyclik", ["schedule.name='cyclik'", "Did you mean 'cyclic'"]),
        ("schedule.profile=cosin", ["profile='cosin'", "Did you mean 'cosine'"]),
        # data and model
        ("data.batch_size=1438", ["data.batch_size is 1438, more than the 1437 training examples"]),
        ("data.batch_size=0", ["data.batch_size is 0"]),
        ("data.name=digit", ["data.name is 'digit'", "Did you mean 'digits'"]),
        ("data.name=mnist", ["'mnist' is not prepared", "data.dir", "tensorflow_datasets"]),
        ("data.name=tfds:no_such_set", ["'no_such_set' is not prepared"]),
        ("data.augment=('croop',)", ["'croop'", "Did you mean 'crop'"]),
        ("model.name=mpl", ["model.name='mpl'", "Did you mean 'mlp'"]),
        ("model.name=resnet", ["model.features is not a key of the model .resnet."]),
        ("model.features=(0,)", ["model.features=.0,."]),
        ("model.dtype=float3", ["model.dtype='float3'", "Did you mean 'float32'"]),
        # quantizers and rules
        ("quant.recipe=defualt", ["quant.recipe='defualt'", "Did you mean 'default'"]),
        ("quant.backend=atq", ["quant.backend='atq'", "Did you mean 'aqt'"]),
        ("quant.weights=symetric/channel", ["quant.weights.grid='symetric'", "Did you mean 'symmetric'"]),
        ("quant.acts=symmetric/chanel", ["quant.acts", "'chanel'", "Did you mean 'channel'"]),
        ("quant.rules=({'path':'Dence_0'},)", ["'Dence_0' matches no", "'Dense_0'"]),
        ("quant.rules=foo", ["quant.rules.0.='foo'"]),
        # optimizer
        ("optimizer.name=adm", ["optimizer.name='adm'", "Did you mean 'adam'"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule='cosin'", "Did you mean 'cosine'"]),
        ("optimizer.learning_rate=0", ["optimizer.learning_rate=0.0: give a number above 0"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate=nan"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate=inf"]),
        ("optimizer.momentum=1.5", ["optimizer.momentum=1.5: give a number from 0 to below 1"]),
        ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1.0"]),
        ("optimizer.clip_norm=nan", ["optimizer.clip_norm=nan"]),
        ("optimizer.final_factor=2", ["optimizer.final_factor=2.0: give a number from 0 to 1"]),
        ("optimizer.decay_factor=0", ["optimizer.decay_factor=0.0: give a number above 0"]),
        ("optimizer.boundaries_percent=half", ["optimizer.boundaries_percent=.'half'.: give percents"]),
        ("optimizer.decay=none", ["optimizer.decay='none'"]),
        ("optimizer.warmup_steps=2000", ["optimizer.warmup is 2000 steps of 2000"]),
        ("optimizer.warmup_percent=101", ["optimizer.warmup_percent=101.0: give at most 100"]),
        ("optimizer.accumulate_steps=0", ["optimizer.accumulate_steps=0: give a whole number from 1 to the 2000"]),
        ("optimizer.options={'b7':3}", ["optimizer.options.b7", "'b1'"]),
        ("optimizer.options={'b1':'x'}", ["optimizer.options={'b1': 'x'}: optax.adam refuses"]),
        # lengths
        ("train.steps=-5", ["train.steps=-5"]),
        ("train.steps=0", ["train: give exactly one of .'steps', 'epochs'"]),
        ("train.epochs=3", ["train.steps=2000, train.epochs=3.0: give exactly one"]),
        ("train.log_every_steps=0", ["train.log_every_steps=0"]),
        ("train.compilation_cache=/proc/no/such", ["train.compilation_cache='/proc/no/such' cannot be created"]),
        ("train.steps_per_dispatch=0", ["train.steps_per_dispatch=0: give a divisor"]),
        ("train.steps_per_dispatch=7", ["train.steps_per_dispatch=7: give a divisor of the 2000 steps"]),
        ("eval.every_percent=200", ["eval.every_percent=200.0: give at most 100"]),
        ("eval.every_epochs=-2", ["eval.every_epochs=-2.0, eval.every_percent=25.0: give exactly one"]),
        ("eval.batch_size=0", ["eval.batch_size=0: give a whole number from 1"]),
        ("checkpoint.every_steps=10", ["checkpoint.every_steps=10, checkpoint.every_percent=10.0: give exactly one"]),
        ("checkpoint.keep=0", ["checkpoint.keep=0: give a whole number from 1"]),
    ],
)
def test_overrides(override, patterns, fails, tmp_path):
    fails(["train", "--config", MLP, "--workdir", tmp_path / "run", f"--config.{override}"], *patterns)


def test_a_missing_data_set_is_found_missing_at_once(fails, tmp_path):
    (tmp_path / "no_data").mkdir()
    for config in ("mnist_mlp_cpt.py", "cifar10_resnet20_cpt.py", "tiny_shakespeare_transformer_cpt.py"):
        arguments = ["train", "--config", CONFIGS / config, "--workdir", tmp_path / "run"]
        fails([*arguments, f"--config.data.dir={tmp_path / 'no_data'}"], "is not prepared", re.escape(str(tmp_path)))


# --- workdirs


def test_workdirs_that_cannot_be_a_run(fails, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    for workdir, pattern in (
        (file, "is a file; give a folder"),
        (file / "run", "cannot be created or written: not a directory"),
        (foreign, "not a qtrain run: it holds 'thesis.txt'"),
        ("/proc/no/such/run", "cannot be created or written"),
        (tmp_path / ("x" * 300), "cannot be created or written"),
    ):
        fails(["train", "--config", f"{MLP}:smoke", "--workdir", workdir], pattern, re.escape(str(workdir)[:40]))


def test_a_workdir_of_another_run(fails, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    # A run that was started and killed: its folder is all that the next command sees.
    with monkeypatch.context() as patch:
        patch.setattr("qtrain.train.Run", lambda *_: lambda *_: {"steps": 0})
        assert main.main(["train", "--config", f"{MLP}:smoke", "--workdir", str(run), "--quiet"]) == 0
    assert os.listdir(run) == ["config.json"]
    capsys.readouterr()
    again = ["train", "--config", f"{MLP}:smoke", "--workdir", run]
    fails([*again, "--config.seed=1"], "holds another run", "seed.*0 != 1")
    fails([*again, "--config.schedule.low=4", "--config.optimizer.name=sgd"], "low.*3 != 4", "name.*adam.*sgd")
    fails(["train", "--config", CONFIGS / "digits_cnn_cpt.py", "--workdir", run], "holds another run", "more; choose")
