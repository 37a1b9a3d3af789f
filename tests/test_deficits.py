"""Deficits of the training images: the blur against numpy, its window as data, what is refused; norms by layer."""

import jax
import numpy as np
import pytest
from program import Steps, final_state, rows, small_config

from qtrain import data
from qtrain.build import build
from qtrain.config import base_config
from qtrain.deficits import blur, deficit_from_config
from qtrain.errors import UsageError
from qtrain.metrics import norm_rows
from qtrain.sweep.expand import expand
from qtrain.sweep.sharing import differing
from qtrain.tables import Tables
from qtrain.train import train


def triangle(to, of):
    """Rows of weights that make `to` pixels of `of`, by the formula in the docstring."""
    scale = of / to
    centres, pixels = (np.arange(to) + 0.5) * scale, np.arange(of) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(centres[:, None] - pixels) / max(scale, 1.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("shape", "factor"), [((8, 8, 1), 4), ((8, 8, 1), 2), ((32, 32, 3), 4), ((28, 27, 2), 5)])
def test_blur(shape, factor):
    images = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    expected = images.astype(np.float64)
    for axis in (1, 2):
        n = expected.shape[axis]
        m = max(1, round(n / factor))
        expected = np.moveaxis(np.tensordot(triangle(n, m) @ triangle(m, n), expected, (1, axis)), 0, axis)
    found = jax.jit(blur, static_argnums=1)(images, factor)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.std(found) < 0.5 * np.std(images)
    np.testing.assert_allclose(jax.jit(blur, static_argnums=1)(images * 3 + 2, factor), found * 3 + 2, atol=2e-5)


def test_the_window_is_data_and_evaluation_sees_all():
    """One program: off, the step is that of a run without the deficit; on, that of a run on blurred images."""
    config = small_config(deficit__name="blur", deficit__start_steps=1, deficit__length_steps=2)
    experiment = build(config)
    np.testing.assert_array_equal(experiment.tables().deficit, [0, 1, 1] + [0] * 9)
    plain, blurred = Steps(small_config(train__layer_norms=True)), Steps(config)
    with plain.batches() as batches:
        for step in range(4):
            batch = dict(next(batches))
            found = blurred(batch)
            if step in (1, 2):
                batch["image"] = np.asarray(blur(batch["image"], 4))
            plain.state, expected = plain.step(plain.state, batch, plain.key)
            assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5), step


def test_a_sweep_shares_the_program(tmp_path):
    from sweep_program import run, write

    points = [{"deficit.length_percent": 0.0}, {"deficit.length_steps": 6}, {"optimizer.hold_steps": 6}]
    source = write(tmp_path, points, deficit__name="blur", train__layer_norms=True, train__steps_per_dispatch=3)
    assert run(source, tmp_path / "sweep", "--vectorized", "--share", "vmap") == 0
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in folders]
    assert losses[0][0] > 0 and losses[0] != losses[1] and losses[0] != losses[2]
    rates = [[row["learning_rate"] for row in rows(folder, "train")] for folder in folders]
    assert rates[0] == rates[1] and rates[2][0] == rates[2][1] > rates[2][2]


def test_a_held_transition_rate_is_no_data():
    """Its target is made of the same keys, and is no table."""
    changes = [{"optimizer.hold_steps": 4}, {"optimizer.warmup_steps": 2}]
    for name, found in (("adamt", ["optimizer.hold_steps"]), ("adam", [])):
        assert differing(expand(small_config(optimizer__name=name), changes)) == found


def test_norms_by_layer(tmp_path):
    """Against the states before and after single steps; a row's are averages, ratios those of averages."""
    config = small_config(train__layer_norms=True, train__log_every_steps=2, train__steps=4)
    train(config, str(tmp_path / "run"), quiet=True)
    written = rows(tmp_path / "run", "train")
    steps = Steps(config, log_every=2)
    with steps.batches() as batches:
        before, updates, values = jax.device_get(steps.state.params), [], []
        for _ in range(2):
            steps.state, _ = steps.step(steps.state, dict(next(batches)), steps.key)
            after = jax.device_get(steps.state.params)
            difference = jax.tree.map(np.subtract, after, before)
            for kept, tree in ((updates, difference), (values, before)):
                kept.append({"/".join(p): np.linalg.norm(leaf) for p, leaf in flat(tree)})
            before = after
    for name in updates[0]:
        update, value = (np.mean([one[name] for one in kept]) for kept in (updates, values))
        assert written[0][f"norms/{name}/update"] == pytest.approx(update, rel=1e-3)
        if value:
            assert written[0][f"norms/{name}/update_ratio"] == pytest.approx(update / value, rel=1e-3)
    for row in written:
        squares = [row[f"norms/{name}/gradient"] for name in updates[0]]
        assert max(squares) < row["norms/gradient"] < sum(squares)
        assert row["norms/gradient"] == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["norms/update"] == pytest.approx(row["update_norm"], rel=1e-5)
    averaged = final_state(config, tmp_path / "run").metrics["arrays"]
    assert [array.shape for array in averaged] == [(3, 7)]


def flat(tree, path=()):
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [found for name, value in tree.items() for found in flat(value, (*path, name))]


def test_a_ratio_to_nothing_is_nan():
    means = np.array([[5.0, 3.0, 4.0], [0.5, 0.3, 0.4], [1.0, 1.0, 0.0]])
    found = norm_rows(means, {"kernel": np.ones(1), "scale": np.ones(1)})
    assert found["norms/kernel/update_ratio"] == pytest.approx(0.3) and np.isnan(found["norms/scale/update_ratio"])
    assert found["norms/gradient"] == 5.0 and found["norms/update_ratio"] == 0.5


@pytest.mark.parametrize(
    ("source", "changed", "message"),
    [
        ("digits", {"name": "blurr"}, "deficit.name='blurr': give one of .*Did you mean 'blur'"),
        ("digits", {"name": "none", "length_steps": 3}, "deficit.name is 'none'"),
        ("digits", {"factor": 9}, "deficit.factor=9: give a whole number from 2 to 8"),
        ("digits", {"factor": 1}, "deficit.factor=1"),
        ("digits", {"length_steps": 3, "length_percent": 3.0}, "give exactly one of"),
        ("digits", {"start_percent": 101.0}, "at most 100"),
        ("sequential_digits", {}, "sequences of pixels"),
        ("synthetic_text", {}, "of kind 'tokens'"),
        ("digits_graph", {}, "of kind 'graph'"),
    ],
)
def test_mistakes(source, changed, message):
    config = {**base_config("digits_mlp").deficit.to_dict(), "name": "blur", **changed}
    with pytest.raises(UsageError, match=message) as caught:
        deficit_from_config(config, data.load({"name": source, "batch_size": 1}), 100, 10)
    assert "\n" not in str(caught.value)


def test_runs_without_a_deficit_have_no_table():
    assert Tables(None, None, {}).deficit is None and build(small_config()).tables().deficit is None
