"""The detector: sizes by hand, anchors, names for rules; that it trains, and what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import CONFIGS, Steps, rows

import qtrain
from qtrain import cost, models, overrides
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.export.command import export_run
from qtrain.inject import Rule
from qtrain.models.detector import Detector
from qtrain.search.run import search_run
from qtrain.train import train

CONFIG = str(CONFIGS / "digit_scenes_detect_cpt.py")
SMALL = {"backbone": "cifar", "width": 0.25, "levels": (2, 3, 4), "features": 8, "head_depth": 1, "octaves": 2}


def config(**changes):
    found = overrides.load(f"{CONFIG}:smoke").unlock()
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = found
        for part in sections:
            section = section[part]
        section[name] = value
    return found.lock()


def test_parameters_of_the_published_network():
    """Those of the usual RetinaNet of 91 classes, whose other version has norms in the subnets in place of biases."""
    model = Detector(91)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 256, 256, 3), "float32"))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 38_196_887
    assert len(model.anchors(256, 256)) == 9 * (32**2 + 16**2 + 8**2 + 4**2 + 2**2)


@pytest.mark.parametrize("shape", [(64, 64, 1), (50, 37, 3)])
def test_outputs_are_those_of_the_anchors(shape):
    model = models.build({"name": "detector", **SMALL}, num_classes=3, input_shape=shape)
    out, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), jax.ShapeDtypeStruct((2, *shape), "float32")
    )
    anchors = model.anchors(*shape[:2])
    assert out["logits"].shape == (2, len(anchors), 3) and out["deltas"].shape == (2, len(anchors), 4)
    assert set(variables["params"]) == {"backbone", "pyramid", "class_subnet", "box_subnet"}
    names = {"lateral2", "lateral3", "output2", "output3", "extra4"}
    assert set(variables["params"]["pyramid"]) == names


def test_anchors_by_hand():
    model = Detector(1, levels=(3, 4), anchor_scale=2.0, octaves=2, ratios=(1.0, 4.0))
    anchors = model.anchors(16, 24)
    assert anchors.shape == (4 * (2 * 3 + 1 * 2), 4) and anchors.dtype == np.float32
    large = 16 * math.sqrt(2)
    sides = [(16, 16), (32, 8), (large, large), (2 * large, large / 2)]
    for index, (tall, wide) in enumerate(sides):  # the first place: its centre is (4, 4)
        np.testing.assert_allclose(anchors[index], [4 - tall / 2, 4 - wide / 2, 4 + tall / 2, 4 + wide / 2], rtol=1e-6)
    centres = (anchors[::4, :2] + anchors[::4, 2:]) / 2
    expected = [(4, 4), (4, 12), (4, 20), (12, 4), (12, 12), (12, 20), (8, 8), (8, 24)]
    np.testing.assert_allclose(centres, expected, atol=1e-5)


def test_every_anchor_sees_its_own_place():
    """An output changes with the pixels under its anchor: order of anchors and of outputs are the same."""
    model = models.build({"name": "detector", **SMALL, "levels": (2, 3)}, num_classes=2, input_shape=(64, 96, 1))
    anchors = model.anchors(64, 96)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 96, 1)).astype(np.float32)
    quick = {"xla_backend_optimization_level": 0}
    variables = jax.jit(model.init, compiler_options=quick)(jax.random.key(0), jnp.zeros((1, 64, 96, 1)))
    # The subnets see around themselves 3x3 steps and what the backbone sees; statistics are fixed.
    call = jax.jit(lambda x: model.apply(variables, x)["logits"], compiler_options=quick)
    y, x0 = 40, 84
    x2 = x.copy()
    x2[0, y, x0] += 100
    changed = np.abs(np.asarray(call(x2) - call(x))).max(axis=-1)[0]
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    for level, first, last in ((2, 0, 16 * 24 * 6), (3, 16 * 24 * 6, len(anchors))):
        most = centres[first + np.argmax(changed[first:last])]
        assert np.abs(most - (y, x0)).max() < 3 * 2**level, (level, most)


def test_rules_reach_both_subnets_and_every_level_counts():
    module = Detector(2, **SMALL)
    qmodel = qtrain.quantize(module, [Rule(path="(class|box)_subnet/(logits|deltas)", weights=8, acts=8), Rule()])
    plan = qmodel.plan(jax.ShapeDtypeStruct((1, 64, 64, 1), "float32"))
    assert plan.coverage == 1.0
    steps = 16**2 + 8**2 + 4**2
    shapes = 6
    assert plan["class_subnet/logits"].macs == steps * 9 * 8 * 2 * shapes
    assert plan["box_subnet/deltas"].macs == steps * 9 * 8 * 4 * shapes
    assert plan["class_subnet/conv0"].macs == plan["box_subnet/conv0"].macs == steps * 9 * 8 * 8
    assert plan["pyramid/extra4"].macs == 4**2 * 9 * 16 * 8  # of the last stage, 16 channels
    fixed = {path for path in ("class_subnet/logits", "box_subnet/deltas") if plan[path].bits.weights == 8}
    assert len(fixed) == 2 and "class_subnet/conv0" in plan.followers
    assert cost.static(plan.ops, qtrain.Precision(), 1) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "resnet19"}, "model.backbone='resnet19' is not allowed: one of cifar, resnet18"),
        ({"levels": (2, 4)}, "consecutive whole numbers"),
        ({"levels": (4, 5)}, r"the stages of model.backbone='cifar' are of the levels 1, 2, 3; begin with one of them"),
        (
            {"levels": (2, 3, 4, 5, 6, 7)},
            "a step of level 7 is 128 pixels, and the images have 64x64; end at 6 or before",
        ),
        ({"ratios": (0.5, 0)}, "a list of numbers above 0"),
        ({"backbone": "resnet18", "blocks": 2}, "model.blocks=2 is for model.backbone='cifar'"),
        ({"octave": 2}, r"model.octave is not a key of the model 'detector'.* Did you mean 'octaves'\?"),
    ],
)
def test_refused_models(fields, message):
    with pytest.raises(UsageError, match=message) as caught:
        models.build({"name": "detector", **SMALL, **fields}, num_classes=2, input_shape=(64, 64, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__name": "digits"},
            "model.name='detector' does not suit data.name='digits', which has no boxes to find",
        ),
        (
            {"model__name": "resnet"},
            "does not suit data.name='digit_scenes', which has boxes to find; give one of detector",
        ),
        ({"data__name": "cora", "data__batch_size": 1}, "does not suit data.name='cora', which is a graph"),
    ],
)
def test_data_and_model_that_do_not_suit(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(config(**changes))
    assert "\n" not in str(caught.value)


def several_widths(**changes):
    return config(
        quant__recipe="multi_precision",
        quant__rules=(),
        multi_precision__widths=(8, 4),
        data__repeat=2,
        **{f"schedule__{key}": None for key in ("profile", "low", "high", "cycles", "pattern")},
        schedule__name="rounds",
        schedule__grads__name="float",
        schedule__grads__bits=None,
        **changes,
    )


def test_distillation_is_refused():
    build(several_widths())
    with pytest.raises(UsageError, match=r"multi_precision\.distill\.rate=1.0: distillation compares logits") as caught:
        build(several_widths(multi_precision__distill__rate=1.0))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_trains_evaluates_and_refuses_what_needs_logits(tmp_path):
    # One level, weights and activations alone: what takes the time is compiling.
    small = config(model__levels=(3,), quant__grads="none", quant__rules=())
    summary = train(small, str(tmp_path / "run"), quiet=True)
    assert summary["compilations"] == 1 and summary["steps"] == 6
    found = {name: summary[f"test_{name}"] for name in ("loss", "map50", "map", "map50_scheduled", "map_float")}
    assert all(math.isfinite(value) for value in found.values()) and 0 <= found["map"] <= found["map50"] <= 1
    assert "test_accuracy" not in summary
    trained, evaluated = (rows(tmp_path / "run", kind) for kind in ("train", "eval"))
    assert {"loss", "class_loss", "box_loss"} < set(trained[0]) and "accuracy" not in trained[0]
    assert trained[0]["loss"] == pytest.approx(trained[0]["class_loss"] + trained[0]["box_loss"], rel=1e-5)
    assert evaluated[-1]["test_map50"] == found["map50"]
    # The best checkpoint is told by it.
    manifest = json.loads(next((tmp_path / "run" / "checkpoints").glob("6/*anifest*")).read_text())
    assert "test_map50" in json.dumps(manifest)
    for refused in (
        lambda: search_run(tmp_path / "run", "bits", 4, (8, 4)),
        lambda: export_run(tmp_path / "run", tmp_path / "x.safetensors"),
    ):
        with pytest.raises(UsageError, match=r"model.name='detector' finds boxes") as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_learns_to_find_rectangles():
    """Loss falls and boxes are found; the outputs at 4 bits differ from those at 8 by one program."""
    steps = Steps(
        config(
            train__steps=150,
            model__width=0.5,
            model__features=16,
            optimizer__warmup_percent=0.0,
            optimizer__learning_rate=5e-3,
            data__batch_size=16,
        )
    )
    with steps.batches() as batches:
        losses = [steps(next(batches))["loss"] for _ in range(120)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10]) and steps.step._cache_size() == 1


@pytest.mark.slow
def test_switching_by_sensitivity_works(tmp_path):
    """HASB draws Hessian traces of the detection loss: nothing in it is of classifiers alone."""
    found = several_widths(multi_precision__hasb__sigma=0.5, train__steps=4, train__log_every_steps=2)
    summary = train(found, str(tmp_path / "run"), quiet=True)
    assert math.isfinite(summary["test_map50_4bit"]) and math.isfinite(summary["train_loss"])
