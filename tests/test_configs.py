"""The shipped configs: they load, plan what their golden file says, and train.

A golden file is the plan of a config at full size; it changes only on purpose. To write them anew, and read the
difference in the review: ``QTRAIN_UPDATE_GOLDEN=1 pytest tests/test_configs.py``.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from program import CONFIGS, Steps, final_state, initial_state, rows

from qtrain import overrides
from qtrain.build import build
from qtrain.config import TASKS, base_config, finish
from qtrain.data.graph_sets import CORA
from qtrain.errors import UsageError
from qtrain.experiment import describe
from qtrain.train import train

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
# These run from the command to the summary; the others differ in schedule or data alone, and take two steps.
ONE_OF_EACH_MODEL = ["cifar10_resnet20_cpt", "digits_cnn_cpt", "digits_mlp_cpt", "tiny_shakespeare_transformer_cpt"]
# A plan needs shapes, not data: generated arrays of a set's shape stand for one that has to be prepared.
STAND_INS = {
    "mnist": {"name": "synthetic", "image_shape": (28, 28, 1), "num_classes": 10},
    "cifar10": {"name": "synthetic", "image_shape": (32, 32, 3), "num_classes": 10},
    "cifar100": {"name": "synthetic", "image_shape": (32, 32, 3), "num_classes": 100},
    "voc": {"name": "synthetic_boxes", "num_classes": 20, "num_train": 16, "num_test": 2},
    "imagenette": {"name": "synthetic", "num_classes": 10, "central_crop": 1.0, "num_train": 256, "num_test": 8},
    "tfds:imagenet2012": {"name": "synthetic", "central_crop": 1.0, "num_train": 1024, "num_test": 8},
    "tiny_shakespeare": {"name": "synthetic_text"},
    "lm1b": {"name": "synthetic_text"},
    "python_reference": {"name": "synthetic_text"},
    "text": {"name": "synthetic_text"},
    "ogbn_arxiv": {"name": "digits_graph"},
    "sequential_mnist": {"name": "sequential_digits"},
    "sequential_cifar10": {"name": "sequential_digits"},
}


def load(name, argument=None):
    return overrides.load(f"{CONFIGS / name}.py" + (f":{argument}" if argument else ""))


def values(config):
    """Every leaf of a config, by dotted key."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in values(value))
        else:
            yield key, value


@pytest.mark.parametrize("argument", [None, "smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_loads_locked_and_as_json(name, argument):
    config = load(name, argument)
    assert config.is_locked and config.smoke == (argument == "smoke")
    with pytest.raises((KeyError, AttributeError)):
        config.train.stepz = 3
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(plain, default=list))
    assert dict(values(load(name, argument))) == dict(values(config)), "the same each time"


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    text = (CONFIGS / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert len(docstring.splitlines()[0]) > 30
    assert f"qtrain train --config configs/{name}.py --workdir" in docstring


# Deep networks take long to trace, and each has a sibling of the same network or method.
LONG_PLANS = (
    "imagenet_resnet18_multi_precision",
    "imagenet_resnet18_trs",
    "imagenet_resnet50_multi_precision",
    "imagenet_vit_trs",
    "lm1b_transformer_cpt",
    "sequential_cifar10_s5_cpt",
    "sequential_mnist_s5_cpt",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG_PLANS else []) for name in NAMES]
)
def test_golden_plan(name):
    config = load(name).copy_and_resolve_references()
    if config.data.name == "cora" and not CORA.is_file():
        pytest.skip("no shared/data/cora/cora.npz beside the checkout")
    with config.unlocked():
        config.data.update(STAND_INS.get(config.data.name, {}))
        config.data.batch_size = load(name).data.batch_size
    found = describe(build(config)).split("\n", 1)[1]  # all but the line about the data
    path = GOLDEN / f"plan_{name}.txt"
    if os.environ.get("QTRAIN_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), "no golden plan yet: QTRAIN_UPDATE_GOLDEN=1 pytest tests/test_configs.py"
    assert found == path.read_text()


def test_no_golden_plan_is_left_over():
    assert sorted(path.stem for path in GOLDEN.iterdir()) == [f"plan_{name}" for name in NAMES]


def assert_trained(before, after):
    same = jax.tree.map(np.array_equal, jax.device_get(before), jax.device_get(after))
    assert not any(jax.tree.leaves(same)), "every parameter is trained"


# Each has a sibling of the same network and method.
SLOW = (
    "cifar100_mobilenet_cpt",
    "cifar100_resnet20_trs",
    "cifar10_cnn_nested",
    "cifar10_resnet20_multi_precision",
    "cifar10_resnet20_trs",
    "cylinder_bell_funnel_s5_cpt",
    "digit_scenes_detect_cpt",  # tests/test_detector.py trains it",
    "digits_cnn_adaptive",
    "digits_cnn_budget_keeper",  # tests/test_controllers_training.py trains the controllers
    "digits_cnn_deficit",
    "digits_cnn_fractrain",
    "digits_cnn_muppet",
    "digits_cnn_suite",
    "digits_resnet_cpt",
    "digits_resnet_finetune",
    "digits_resnet_multi_precision",
    "imagenet_resnet18_multi_precision",
    "imagenet_resnet18_trs",
    "imagenet_resnet50_multi_precision",
    "imagenet_vit_trs",
    "lm1b_transformer_cpt",
    "mnist_cnn_multi_precision",
    "sequential_cifar10_s5_cpt",
    "sequential_mnist_s5_cpt",
    "text_lstm_cpt",
    "voc_detect_cpt",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in sorted(set(NAMES) - set(ONE_OF_EACH_MODEL))
    ],
)
def test_two_steps(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_data"))  # the smoke form needs no prepared set
    steps = Steps(load(name, "smoke"), quick=True)
    before = steps.state.params
    with steps.batches() as batches:
        found = [steps(next(batches)) for _ in range(2)]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in found)
    assert found[1]["update_norm"] > 0  # a warmup begins at a rate of 0
    assert int(steps.state.step) == 2 and steps.step._cache_size() == 1
    assert_trained(before, steps.state.params)


@pytest.mark.parametrize("name", ONE_OF_EACH_MODEL)
def test_smoke_trains(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_data"))
    config = load(name, "smoke")
    summary = train(config, str(tmp_path / "run"), quiet=True)
    assert_trained(initial_state(build(config), config.seed).params, final_state(config, tmp_path / "run").params)
    assert summary["steps"] == 6 and summary["compilations"] == 1
    assert np.isfinite([summary[key] for key in ("train_loss", "test_loss", "test_loss_float")]).all()
    assert 0 < summary["saving"] < 0.7, "some layer follows the schedule in the small form too"
    written = rows(tmp_path / "run")
    assert [(row["step"], row["kind"]) for row in written] == [
        (2, "train"),
        (3, "eval"),
        (4, "train"),
        (6, "train"),
        (6, "eval"),
    ]
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[pytest.mark.slow] if task.startswith(("imagenet", "voc", "lm1b")) else [])
        for task in sorted(TASKS)
    ],
)
def test_one_line_changes_the_task(task, tmp_path):
    text = (CONFIGS / "digits_cnn_cpt.py").read_text()
    assert text.count('base_config("digits_cnn")') == 1
    path = tmp_path / "config.py"
    path.write_text(text.replace('base_config("digits_cnn")', f'base_config("{task}")'))
    experiment = build(overrides.load(f"{path}:smoke"))
    assert experiment.dataset.name == f"smoke:{TASKS[task]['data']['name']}"
    assert experiment.config.model.name == TASKS[task]["model"]["name"]
    assert experiment.plan.followers and 0 < experiment.plan.coverage <= 1


def test_smoke_of_a_long_run():
    # Lengths that suit the whole run must not keep its small form from starting.
    config = base_config("digits_cnn")
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=1000, pattern="repeated")
    config.optimizer.update(warmup_epochs=3.0, accumulate_steps=16)
    config.train.update(steps=0, epochs=100.0, steps_per_dispatch=10, log_every_steps=100)
    config.eval.update(every_epochs=1.0, every_percent=0.0)
    experiment = build(finish(config, "smoke"))
    assert experiment.total_steps == 6 and experiment.eval_every == 4


@pytest.mark.parametrize(("key", "value"), [("train", 3), ("optimizer", None), ("data", {}), ("extra", 1)])
def test_incomplete_configs_are_refused(key, value):
    config = base_config("digits_mlp")
    config.schedule.update(name="constant", bits=4)
    config = ConfigDict({**config.to_dict(), key: value})
    with pytest.raises(UsageError, match=key) as caught:
        build(config)
    assert "\n" not in str(caught.value)
