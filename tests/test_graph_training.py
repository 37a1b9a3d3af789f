"""The trainer on graphs: whose labels count, that it learns and resumes, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.build import build
from qtrain.config import base_config, finish
from qtrain.errors import UsageError
from qtrain.state import make_train_step
from qtrain.train import train


def config(**changes):
    found = base_config("cora_gcn")
    found.quant.recipe = "cpt"
    found.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    found.schedule.grads.update(name="constant", bits=8)
    finish(found, "smoke").unlock()
    found.train.steps = 60
    found.eval.every_steps = found.checkpoint.every_steps = 30
    for key, value in changes.items():
        section, name = key.split("__")
        found[section][name] = value
    return found.lock()


def test_only_labels_that_the_mask_keeps_count():
    """Loss, accuracy and the step are the same whatever is said of the other nodes."""
    experiment = build(config())
    step = jax.jit(
        make_train_step(
            experiment.qmodel,
            experiment.optimizer,
            experiment.precision,
            experiment.plan.ops,
            1,
            task=experiment.task,
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    batch = jax.tree.map(jnp.asarray, experiment.dataset.train.batch)
    others = {**batch, "label": jnp.where(batch["mask"] > 0, batch["label"], 3)}
    state = experiment.initial_state()
    results = [step(state, rows, jax.random.key(0)) for rows in (batch, others)]
    jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])
    wrong = {**batch, "label": jnp.where(batch["mask"] > 0, (batch["label"] + 1) % 4, batch["label"])}
    assert step(state, wrong, jax.random.key(0))[1]["loss"] != results[0][1]["loss"]


def test_trains_and_evaluates_by_the_mask(tmp_path):
    summary = train(config(), str(tmp_path / "run"), quiet=True)
    assert summary["test_accuracy"] > 0.9 and summary["compilations"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert all({"validation_accuracy", "test_accuracy", "validation_loss_float"} <= set(row) for row in evaluations)
    assert any(row["validation_loss"] != row["test_loss"] for row in evaluations)
    # 20 of the 60 nodes are tested: other numbers would be of all.
    found = [value * 20 for row in rows for name, value in row.items() if name == "test_accuracy"]
    assert found and all(value == pytest.approx(round(value), abs=1e-4) for value in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch_size": 2}, r"more than the 1 training examples of 'smoke:cora'; choose at most 1"),
        ({"data__name": "digits"}, "model.name='gcn' does not suit data.name='digits', which is no graph"),
        ({"data__augment": ("flip",)}, "data.augment is .* leave it at"),
        ({"data__normalize_rows": False}, "which is for data.name='graph', not 'cora'"),
        ({"eval__splits": ("valid",)}, "eval.splits has 'valid'; 'smoke:cora' has 'validation', 'test'.*'validation'"),
        ({"eval__splits": ()}, r"eval.splits=\(\): give a tuple of different splits"),
        ({"model__norm": "layers"}, "model.norm='layers' is not allowed: one of none, layer"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        build(config(**changes))
