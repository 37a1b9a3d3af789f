"""What is reported of transitions, its picture, and the mistakes that are answered."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest

from qtrain.errors import UsageError
from qtrain.optim import (
    RULES,
    named_rows,
    plot_transition_rates,
    scale_by_transition_rate,
    transition_metrics,
)
from qtrain.writers import MetricsWriter


def codes(params, bits=None):
    return {"a": jnp.round(params["a"]).astype(jnp.int32), "b": {"c": jnp.round(params["b"]["c"]).astype(jnp.int32)}}


PARAMS = {"a": jnp.zeros(30), "b": {"c": jnp.zeros((2, 5)), "d": jnp.zeros(2)}}


# --- metrics


def test_overall_values_count_weights():
    transform = scale_by_transition_rate(codes, 0.1, 0.5, rule="multiplicative")
    state = transform.init(PARAMS)
    _, state = transform.update(PARAMS, state, PARAMS)
    moved = {"a": jnp.zeros(30).at[:3].set(1.0), "b": {"c": jnp.ones((2, 5)), "d": jnp.ones(2)}}
    grads = jax.tree.map(lambda leaf: leaf + 2.0, PARAMS)
    _, state = transform.update(grads, state, moved)
    metrics = transition_metrics((optax.EmptyState(), {"inner": state}))
    assert list(metrics) == ["", "a", "b/c"]
    assert float(metrics["a"]["rate"]) == pytest.approx(0.1) and float(metrics["b/c"]["rate"]) == 1.0
    assert float(metrics[""]["rate"]) == pytest.approx(13 / 40)
    for values in metrics.values():
        assert set(values) == {"rate", "running", "target", "talr", "step"}
        assert float(values["step"]) == pytest.approx(2 * float(values["talr"]), rel=1e-6)
    names = named_rows(metrics)
    assert {"transition/rate", "transition/a/talr", "transition/b/c/running"} < set(names) and len(names) == 15


# --- picture


def run_rows(steps, layers=("", "Dense_0/kernel/")):
    for t in range(0, steps, 10):
        values = {"rate": 5e-3 * (1 - t / steps), "running": 4e-3 * (1 - t / steps), "target": 5e-3 * (1 - t / steps)}
        values["talr"] = 0.1
        named = {f"transition/{layer}{name}": value for layer in layers for name, value in values.items()}
        yield {"step": t, "kind": "train", "loss": 0.1, "transition/distance": 0.2, **named}
        if t % 50 == 0:
            yield {"step": t, "kind": "eval", "test_accuracy": 0.5 + 0.4 * t / steps}


def test_picture_of_runs(tmp_path):
    rows = list(run_rows(200))
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        for row in rows:
            writer.write(row["step"], row["kind"], {k: v for k, v in row.items() if k not in ("step", "kind")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "ki')  # a run that goes on
    plain = [{"step": t, "kind": "eval", "test_accuracy": 0.4} for t in (0, 100)]
    runs = {"folder": tmp_path, "file": str(tmp_path / "metrics.jsonl"), "rows": rows, "without rates": plain}
    for name in ("a.png", "b.svg"):
        assert plot_transition_rates(runs, tmp_path / name).stat().st_size > 5000
    drawn = (tmp_path / "b.svg").read_text()
    assert drawn.count('<g id="axes_') == 4
    other = plot_transition_rates({"rows": rows}, tmp_path / "layer.svg", layer="Dense_0/kernel").read_text()
    without = [row for row in rows if row["kind"] == "train"]
    alone = plot_transition_rates({"rows": without}, tmp_path / "alone.svg").read_text()
    assert other.count('<g id="axes_') == 3 and alone.count('<g id="axes_') == 3


def test_mistakes_of_pictures(tmp_path):
    rows = list(run_rows(50))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no json\n")
    for runs, out, message in (
        ({}, "a.png", "runs: there is none"),
        ({"x": rows}, "a.gif", "must be one of"),
        ({"x": rows}, "none/a.png", "does not exist"),
        ({"x": tmp_path / "missing"}, "a.png", "cannot be read"),
        ({"x": bad}, "a.png", "no file of JSON lines"),
        ({"x": [{"step": 1, "loss": 0.1}]}, "a.png", "no transition rates at all"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            plot_transition_rates(runs, tmp_path / out)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"there are .*'transition/Dense_0/kernel/running'"):
        plot_transition_rates({"x": rows}, tmp_path / "a.png", layer="Dense_1/kernel")
    assert not list(tmp_path.glob("a.*"))


# --- mistakes


def make(**given):
    return scale_by_transition_rate(**{"codes": codes, "target": 0.01, "initial_rate": 0.1, **given})


SETTINGS = [
    ({"target": -0.1}, "target=-0.1: give a number of at least 0"),
    ({"target": float("nan")}, "target=nan"),
    ({"target": lambda t: -0.5 - t}, r"target\(0\)=.*-0.5.*: give a number of at least 0"),
    ({"target": 0.0, "rule": "proportional"}, "target=0.0: give a number above 0"),
    ({"target": lambda t: 0.1 * t, "rule": "proportional"}, r"target\(0\)="),
    ({"initial_rate": 0.0}, "initial_rate=0.0: give a number above 0"),
    ({"initial_rate": "0.1"}, "initial_rate='0.1'"),
    ({"momentum": 1.0}, "momentum=1.0: give a number from 0 to below 1"),
    ({"momentum": -0.1}, "momentum=-0.1"),
    ({"rule": "addditive"}, "Did you mean 'additive'"),
    ({"gain": 0.0}, "gain=0.0"),
    ({"gain": 0.1, "rule": "multiplicative"}, "gain=0.1: the multiplicative rule has none"),
    ({"max_rate": 0.05}, "max_rate=0.05: give a number of at least initial_rate, 0.1"),
    ({"target_scale": "sqrt"}, "Did you mean 'sqrt_bits'"),
]


@pytest.mark.parametrize("given, message", SETTINGS)
def test_mistakes_in_settings(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        make(**given)
    assert "\n" not in str(caught.value)


CODES = [
    (lambda p: {"a": jnp.round(p["a"])}, "'a' is float32; give an integer array"),
    (lambda p: {"a": p["a"] > 0}, "'a' is bool; give an integer array"),
    (lambda p: {"b": {"c": jnp.zeros((5, 2), int)}}, r"'b/c' has shape \(5, 2\); give the parameter's, \(2, 5\)"),
    (lambda p: {"b": {"e": jnp.zeros(2, int)}}, "'b/e' is no leaf of the parameters; they have a, b/c, b/d"),
    (lambda p: {"a": None, "b": {"c": None, "d": None}}, "no leaf has any; .* of a, b/c, b/d"),
]


@pytest.mark.parametrize("wrong, message", CODES)
def test_mistakes_in_codes_name_the_leaf(wrong, message):
    for call in (make(codes=wrong).init, jax.jit(make(codes=wrong).init)):
        with pytest.raises(UsageError, match=message) as caught:
            call(PARAMS)
        assert "\n" not in str(caught.value)


def test_mistakes_in_updates_name_the_leaf():
    for rule in RULES:
        transform = make(rule=rule, target_scale="sqrt_bits")
        state = transform.init(PARAMS)
        with pytest.raises(UsageError, match="needs bits"):
            transform.update(PARAMS, state, PARAMS)
        with pytest.raises(UsageError, match="needs the parameters"):
            transform.update(PARAMS, state, bits=4)
        with pytest.raises(UsageError, match="there is none for 'b/c'"):
            transform.update(PARAMS, state, PARAMS, bits={"a": 4})
        with pytest.raises(UsageError, match=r"'a' has an array of shape \(2,\)"):
            transform.update(PARAMS, state, PARAMS, bits=jnp.ones(2))

    def changing(params, bits=None):
        return codes(params) if bits is None else {"a": codes(params)["a"]}

    transform = make(codes=changing)
    with pytest.raises(UsageError, match="'b/c' had codes either in init or now"):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS, bits=4)


def test_rows_survive_json():
    transform = make()
    rows = named_rows(transition_metrics(transform.init(PARAMS)))
    assert json.loads(json.dumps({name: float(value) for name, value in rows.items()}))["transition/talr"] > 0
