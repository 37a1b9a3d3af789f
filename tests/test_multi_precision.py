"""Several widths trained at once: against a loop written by hand, resumed within a round, evaluated at each width."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import Steps, final_state, rows, small_config

import qtrain
import qtrain.train
from qtrain import data
from qtrain.build import build
from qtrain.data import fingerprint
from qtrain.errors import UsageError
from qtrain.methods.alrs import alrs_rate, mean_clipped_gradient
from qtrain.methods.distillation import distillation
from qtrain.methods.multi_precision import multi_precision_rules
from qtrain.metrics import cross_entropy
from qtrain.precision import Precision
from qtrain.state import make_eval_step
from qtrain.train import train

WIDTHS = (8, 4, 2)
NORMS = {"BatchNorm_0", "BatchNorm_1"}


def config_of(task="digits_cnn", **overrides):
    """A small run whose every batch is trained on at each of `WIDTHS`."""
    method = {
        "quant__recipe": "multi_precision",
        "multi_precision__widths": WIDTHS,
        "data__repeat": 3,
        "data__batch_size": 16,
        "data__augment": (),
        "optimizer__name": "sgd",
        "optimizer__learning_rate": 0.05,
        "optimizer__schedule": "constant",
        "eval__batch_size": 180,
    }
    config = small_config(task, "constant", 32).unlock()
    config.schedule.update(name="rounds", bits=None)
    for key, value in {**method, **overrides}.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config.lock()


def tree_close(left, right, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=jax.tree_util.keystr(path))


class ByHand:
    """The same training without the rooms it is made of: rows are picked and put back by index, momentum is a loop.

    Only the model's forward pass is shared. Its variables are those of one width, as the plain model has them.
    """

    def __init__(self, steps, momentum=0.9):
        self.config, self.momentum = steps.config, momentum
        self.plain = qtrain.quantize(steps.experiment.qmodel.module, multi_precision_rules(WIDTHS))
        self.state = jax.device_get(
            {"params": steps.state.params, "quant": steps.state.quant, **steps.state.collections}
        )
        self.buffer = jax.tree.map(np.zeros_like, {name: self.state[name] for name in ("params", "quant")})
        self.teacher = None
        options = {"xla_backend_optimization_level": 0}
        self.grad = jax.jit(jax.value_and_grad(self.loss, has_aux=True), compiler_options=options)

    def loss(self, trained, statistics, batch, width, teacher, rate, temperature):
        bits = Precision(weights=width, acts=width)
        logits, updated = self.plain.apply(
            {**trained, "batch_stats": statistics}, batch["image"], train=True, bits=bits, mutable=["batch_stats"]
        )
        soft = jax.nn.softmax(teacher / temperature)
        student = jax.nn.log_softmax(logits / temperature)
        divergence = jnp.mean(jnp.sum(soft * (jnp.log(soft) - student), -1))
        loss = cross_entropy(logits, batch["label"]).mean() + rate * temperature**2 * divergence
        return loss, (updated["batch_stats"], logits)

    def gradients(self, batch, width, rate=0.0, temperature=1.0):
        """Of one width: gradients of the plain variables (and whole tables), and new statistics."""
        row = WIDTHS.index(width)
        params = {
            module: {name: leaf[row] for name, leaf in leaves.items()} if module in NORMS else leaves
            for module, leaves in self.state["params"].items()
        }
        statistics = jax.tree.map(lambda leaf: leaf[row], self.state["batch_stats"])
        teacher = np.zeros((16, 10), np.float32) if self.teacher is None else self.teacher
        used = rate if width != WIDTHS[0] else 0.0
        arguments = {"params": params, "quant": self.state["quant"]}, statistics, batch
        (_, (updated, logits)), found = self.grad(*arguments, np.float32(width), teacher, used, temperature)
        if width == WIDTHS[0]:
            self.teacher = jax.device_get(logits)
        return row, jax.device_get(found), jax.device_get(updated)

    def step(self, batch, width, alrs=None, **distill):
        lr = self.config.optimizer.learning_rate
        row, found, updated = self.gradients(batch, width, **distill)
        scales = {
            jax.tree_util.keystr(path): value
            for path, value in jax.tree_util.tree_leaves_with_path(found["quant"])
            if path[-1].key == "scale"
        }
        rate = None if alrs is None else float(alrs_rate(lr, mean_clipped_gradient(scales), width, WIDTHS[0], alrs))
        for collection, name in (("params", "params"), ("quant", "quant")):
            for path, gradient in jax.tree_util.tree_leaves_with_path(found[collection]):
                keys = [entry.key for entry in path]
                value, buffer = self.state[name], self.buffer[name]
                for key in keys[:-1]:
                    value, buffer = value[key], buffer[key]
                last, at = keys[-1], ...
                if keys[0] in NORMS:
                    at = row
                elif name == "quant" and np.ndim(gradient) and len(gradient) == len(WIDTHS):
                    at = len(WIDTHS) - 1 - row  # tables ascend
                    gradient = gradient[at]
                own, memory = np.array(value[last], copy=True), np.array(buffer[last], copy=True)
                if name == "params" and np.ndim(gradient) > 1:
                    gradient = gradient + self.config.optimizer.weight_decay * own
                if alrs is not None and name == "quant" and last == "scale":
                    own[at] -= rate * gradient
                else:
                    memory[at] = self.momentum * memory[at] + gradient
                    own[at] -= lr * memory[at]
                value[last], buffer[last] = own, memory
        for module, leaves in updated.items():
            for name, leaf in leaves.items():
                own = np.array(self.state["batch_stats"][module][name], copy=True)
                own[row] = leaf
                self.state["batch_stats"][module][name] = own


def run_both(updates, momentum=0.9, **overrides):
    """The program's train step and the loop by hand, over the batches of the run."""
    config = config_of(model__hidden=0, **overrides)  # the fewest layers that have norms before and after
    steps = Steps(config)
    with data.train_iterator(steps.experiment.dataset, 16, 0) as batches:
        found = [next(batches) for _ in range(-(-updates // 3))]
    variables = steps.experiment.qmodel.calibrate(
        steps.state.variables, found[0]["image"], bits=Precision(8.0, 8.0, 32.0), train=True
    )
    steps.state = steps.state.replace(quant=variables["quant"])
    by_hand = ByHand(steps, momentum)
    method = config.multi_precision
    options = {"rate": method.distill.rate, "temperature": method.distill.temperature}
    for update in range(updates):
        steps(found[update // 3])
        if method.updates == "sequential":
            by_hand.step(
                found[update // 3], WIDTHS[update % 3], None if method.alrs == "none" else method.alrs, **options
            )
    assert steps.step._cache_size() == 1
    return steps, by_hand, found


def test_a_joint_step_is_an_update_for_each_width():
    """With all at once: own rows under momentum and weight decay, ALRS, a teacher; the last round is not complete."""
    options = {"alrs": "one_minus", "distill__rate": 0.7, "distill__temperature": 2.0}
    steps, by_hand, _ = run_both(
        5, optimizer__weight_decay=0.1, **{f"multi_precision__{key}": value for key, value in options.items()}
    )
    found = {"params": steps.state.params, "quant": steps.state.quant, **steps.state.collections}
    tree_close(found, by_hand.state)
    # Rows of different widths have gone different ways.
    scale = np.asarray(found["params"]["BatchNorm_1"]["scale"])
    assert all(np.any(scale[a] != scale[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_accumulated_is_one_step_of_the_mean_gradient():
    steps, by_hand, found = run_both(3, multi_precision__updates="accumulated")
    gradients = [by_hand.gradients(found[0], width)[1] for width in WIDTHS]
    before = by_hand.state["params"]
    assert steps.experiment.steps_per_update == 3
    for module, leaves in before.items():
        for name, leaf in leaves.items():
            each = [gradient["params"][module][name] for gradient in gradients]
            mean = np.stack(each) / 3 if module in NORMS else np.mean(each, axis=0)
            np.testing.assert_allclose(steps.state.params[module][name], leaf - 0.05 * mean, rtol=1e-4, atol=1e-6)
    scales = [gradient["quant"]["Conv_1"]["weights"]["scale"] for gradient in gradients]
    expected = by_hand.state["quant"]["Conv_1"]["weights"]["scale"] - 0.05 * np.mean(scales)
    np.testing.assert_allclose(steps.state.quant["Conv_1"]["weights"]["scale"], expected, rtol=1e-4)


def test_distillation_against_numpy():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 6, 5)).astype(np.float32) * 3

    def softmax(x):
        return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)

    for temperature in (1.0, 4.0):
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
        np.testing.assert_allclose(distillation(student, teacher, temperature), expected, rtol=1e-5)
        gradients = jax.grad(distillation, argnums=(0, 1))(jnp.asarray(student), jnp.asarray(teacher), temperature)
        np.testing.assert_allclose(gradients[0], temperature * (q - p) / len(student), rtol=1e-4, atol=1e-6)
        assert not np.any(gradients[1])


class Stopped(Exception):
    pass


def test_resumes_within_a_round_bit_for_bit(tmp_path, monkeypatch):
    """With a teacher in the state, and layers that switch; a checkpoint after the first step of the second round."""
    options = {
        "train__steps": 8,
        "model__hidden": 0,
        "optimizer__learning_rate": 0.005,
        "train__log_every_steps": 2,
        "checkpoint__every_steps": 4,
        "multi_precision__alrs": "one_minus",
        "multi_precision__distill__rate": 0.5,
        "multi_precision__hasb__sigma": 1.0,
        "multi_precision__hasb__batches": 1,
        "multi_precision__hasb__draws": 2,
        "data__augment": ("crop",),
        "data__crop_padding": 1,
    }
    config = config_of(**options)
    whole = train(config, str(tmp_path / "whole"), quiet=True)
    real, calls = qtrain.train.Run._next, []

    def interrupted(self, batches):
        calls.append(1)
        if len(calls) == 6:
            self.checkpoints.wait()
            raise Stopped
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(qtrain.train.Run, "_next", interrupted)
        train(config, str(tmp_path / "again"), quiet=True)
    again = train(config, str(tmp_path / "again"), quiet=True)
    assert {**whole, "wall_seconds": 0} == {**again, "wall_seconds": 0} and whole["compilations"] == 1
    assert rows(tmp_path / "whole") == rows(tmp_path / "again")
    left, right = (final_state(config, tmp_path / name) for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert np.any(left.controller["teacher"]) and left.controller["roulette"].shape == (1, 3)
    with pytest.raises(UsageError, match=r"data\.repeat was 3 and is absent"):
        qtrain.data.check_fingerprint(*(fingerprint(build(config).dataset, 16, 0, repeat) for repeat in (3, 1)))
    # Evaluation at each width, by the step that evaluates one, of what the run has left.
    experiment = build(config)
    evaluate = jax.jit(make_eval_step(experiment.qmodel))
    batches = list(data.eval_batches(experiment.dataset, "test", 180))
    for width in WIDTHS:
        sums = [
            evaluate(left.variables, batch, Precision(np.float32(width), np.float32(width), np.float32(32)))
            for batch in batches
        ]
        accuracy = sum(s["correct"] for s in sums) / sum(s["count"] for s in sums)
        assert whole[f"test_accuracy_{width}bit"] == pytest.approx(float(accuracy))
        loss = sum(s["loss"] for s in sums) / sum(s["count"] for s in sums)
        assert whole[f"test_loss_{width}bit"] == pytest.approx(float(loss), rel=1e-5)
    assert whole["test_loss_8bit"] == whole["test_loss"] != whole["test_loss_2bit"]
    assert set(rows(tmp_path / "whole", "eval")[-1]) >= {f"test_accuracy_{width}bit" for width in WIDTHS}


@pytest.mark.parametrize("start", [0, 1, 5])
def test_the_stream_repeats_each_batch(start):
    dataset = data.load({"name": "synthetic", "num_train": 40, "num_test": 8, "batch_size": 8})
    plain = data.train_batches(dataset, 8, seed=3)
    with data.train_iterator(dataset, 8, 3, start_step=start, repeat=3) as batches:
        before = None
        for step in range(start, 11):
            batch = next(batches)
            np.testing.assert_array_equal(batch["image"], plain[step // 3]["image"])
            assert (step == start or step % 3 == 0) or batch is before
            before = batch
        assert batches.get_state() == {"next_step": 11}
        batches.set_state({"next_step": 4})
        np.testing.assert_array_equal(next(batches)["label"], plain[1]["label"])
    epoch = build(config_of("digits_mlp", train__steps=0, train__epochs=1.0)).total_steps
    assert epoch == 3 * build(config_of("digits_mlp", train__steps=0, train__epochs=1.0, data__repeat=1)).total_steps


def test_layers_that_switch_are_charged_and_stepped_at_their_own_widths():
    """An assignment by a simple function: what is applied, priced and kept still is the layer's, not the step's."""
    experiment = build(config_of(multi_precision__hasb__sigma=1.0))
    additions = experiment.additions
    assert sorted(experiment.plan.followers) == ["Conv_1", "Dense_0"]
    precision = Precision(jnp.float32(8), jnp.float32(8), jnp.float32(32))
    always_two = {"roulette": jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])}
    last = jnp.int32(experiment.total_steps - 1)
    assigned = additions.assigned(jax.random.key(0), last, precision, always_two)
    assert {path: (float(p.weights), float(p.acts)) for path, p in assigned.items()} == {
        "Conv_1": (2, 2),
        "Dense_0": (4, 4),
    }
    state = jax.eval_shape(experiment.initial_state)
    trained = {"params": state.params, "quant": state.quant}
    found = additions.update_arguments(precision, assigned, trained)
    assert float(found["width"]) == 8 and int(found["rows"]["params", "BatchNorm_1", "scale"].index) == 2
    assert additions.priced(state.params, state.quant, assigned) is assigned


MISTAKES = [
    ({"multi_precision__widths": (2, 4, 8)}, r"multi_precision.widths=\(2, 4, 8\): give each once, the widest first"),
    ({"multi_precision__widths": (8, 8, 2)}, "give each once"),
    ({"multi_precision__widths": (17, 8)}, "17 is no whole number from 2 to 16"),
    ({"multi_precision__widths": (8, 1)}, "1 is no whole number from 2 to 16"),
    ({"multi_precision__widths": ()}, "quant.recipe='multi_precision': multi_precision.widths is empty"),
    ({"quant__recipe": "default"}, "multi_precision.widths=.*quant.recipe='multi_precision', and it is 'default'"),
    ({"quant__recipe": "multi_precison"}, "Did you mean 'multi_precision'"),
    ({"quant__weights": "lsq"}, "quant.weights='lsq': quant.recipe='multi_precision' brings its own"),
    ({"quant__acts": "lsq"}, "quant.acts='lsq'"),
    ({"quant__bias": "nested"}, "quant.bias='nested'"),
    ({"quant__ends": 1}, "quant.ends=1: with quant.recipe='multi_precision' give 2 or more"),
    ({"schedule__values": (8, 3)}, r"schedule.values=\(8, 3\): 3 is not among multi_precision.widths=\(8, 4, 2\)"),
    ({"schedule__name": "linear", "schedule__high": 9, "schedule__low": 2}, "weights reach 9 bits"),
    ({"schedule__name": "constant", "schedule__bits": 1}, "weights fall to 1 bits"),
    ({"multi_precision__updates": "sequental"}, "multi_precision.updates='sequental'.*Did you mean 'sequential'"),
    ({"multi_precision__updates": "accumulated", "data__repeat": 1}, "updates='accumulated'.*data.repeat=3"),
    ({"multi_precision__updates": "accumulated", "multi_precision__alrs": "clamp"}, "alrs='clamp': it is a rate"),
    ({"multi_precision__updates": "accumulated", "multi_precision__hasb__sigma": 0.5}, "hasb.sigma=0.5: updates="),
    ({"multi_precision__alrs": "clam"}, "multi_precision.alrs='clam'.*Did you mean 'clamp'"),
    ({"multi_precision__distill__rate": 1.0, "schedule__values": (4, 2, 8)}, "distill.rate=1.0: it needs each batch"),
    ({"multi_precision__distill__rate": -1.0}, "distill.rate=-1.0"),
    ({"multi_precision__distill__temperature": 0.0}, "distill.temperature=0.0"),
    ({"multi_precision__hasb__sigma": 1.5}, "hasb.sigma=1.5"),
    ({"multi_precision__hasb__draws": 0}, "hasb.draws=0"),
    (
        {"optimizer__accumulate_steps": 2},
        "optimizer.accumulate_steps=2: with multi_precision.updates='sequential' 1 of",
    ),
    ({"quant__backend": "aqt"}, r"multi_precision.widths=\(8, 4, 2\): quant.backend='aqt' freezes one width"),
    ({"data__repeat": 0}, "data.repeat is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes(overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(config_of("digits_mlp", **overrides))
    assert "\n" not in str(caught.value)


def test_adaptive_schedules_and_a_list_of_one_width():
    for schedule in (
        {"schedule__name": "linear", "schedule__high": 8, "schedule__low": 2},
        {"schedule__name": "CR", "schedule__high": 8, "schedule__low": 2, "schedule__cycles": 2},
    ):
        experiment = build(config_of("digits_mlp", data__repeat=1, **schedule))
        assert experiment.trained_widths == WIDTHS and experiment.q_max.weights == 8
    alone = build(config_of("digits_mlp", multi_precision__widths=(2,), data__repeat=1))
    assert alone.schedule.weights == qtrain.schedules.rounds([2])


def test_examples():
    for name in ("qtrain.methods.distillation", "qtrain.schedules.basic"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0
