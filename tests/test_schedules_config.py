"""Schedules from a config's mapping: what each name builds, what is shared, inherited and refused."""

import re

import jax
import ml_collections
import pytest

from qtrain import schedules as S
from qtrain.errors import UsageError
from qtrain.precision import Precision

N = 1000
base = {"name": "cyclic", "profile": "cosine", "low": 3, "high": 8, "cycles": 4}
cr = S.cyclic("cosine", 3, 8, 4, total_steps=N)

BUILT = [
    ({"name": "constant", "bits": 6}, S.constant(6)),
    ({"name": "constant", "high": 8, "low": 3}, S.constant(8)),
    ({"name": "constant", "high": 8, "bits": 4}, S.constant(4)),
    ({**base, "name": "constant"}, S.constant(8)),  # the static counterpart by one override
    ({**base, "name": "float"}, S.constant(32)),
    ({"name": "linear", "low": 3, "high": 8}, S.linear(8, 3, N)),
    ({"name": "linear", "start_bits": 4, "end_bits": 9, "begin_steps": 10}, S.linear(4, 9, N, begin=10)),
    ({"name": "linear", "start_bits": 4, "end_bits": 9, "begin_percent": 25}, S.linear(4, 9, N, begin=250)),
    ({"name": "linear", "low": 3, "high": 8, "begin_percent": 100}, S.linear(8, 3, N, begin=N - 1)),
    ({"name": "piecewise", "boundaries_steps": [10, 20], "values": [3, 4, 5]}, S.piecewise([10, 20], [3, 4, 5])),
    ({"name": "piecewise", "boundaries_percent": (50, 75.0), "values": (3, 4, 5)}, S.piecewise([500, 750], [3, 4, 5])),
    (
        {"name": "piecewise", "boundaries_percent": [50, 50.01, 75], "values": [3, 4, 5, 6]},
        S.piecewise([500, 750], [3, 5, 6]),
    ),
    ({"name": "rounds", "values": (8, 6, 4)}, S.rounds([8, 6, 4])),
    (base, cr),
    ({**base, "pattern": "repeated", "bits": None, "boundaries_steps": None, "nonsense": None}, cr),
    (
        {
            **base,
            "profile": "rex",
            "pattern": "triangular",
            "reflection": "horizontal",
            "beta": 0.5,
            "cycle_length": "floor",
        },
        S.cyclic(
            "rex", 3, 8, 4, total_steps=N, pattern="triangular", reflection="horizontal", beta=0.5, cycle_length="floor"
        ),
    ),
    ({**base, "profile": "exponential", "rate": 2}, S.cyclic("exponential", 3, 8, 4, total_steps=N, rate=2)),
    *[({**base, "name": name}, schedule) for name, schedule in S.suite(3, 8, 4, N).items()],
    ({**base, "name": "RTV", "beta": 0.5}, S.by_name("RTV", 3, 8, 4, N, beta=0.5)),
    (
        {**base, "name": "ER", "rate": 2, "cycle_length": "floor"},
        S.by_name("ER", 3, 8, 4, N, rate=2, cycle_length="floor"),
    ),
    ({"name": "window", "low": 3, "high": 8, "start_percent": 10, "length_percent": 20}, S.window(100, 200, 3, 8)),
    (
        {**base, "name": "window", "start_steps": 0, "length_steps": 9, "inside": 2, "outside": {"name": "CR"}},
        S.window(0, 9, 2, cr),
    ),
    ({"name": "delayed", "bits": 4, "start_percent": 40}, S.delayed(400, 4)),
    ({"name": "delayed", "high": 8, "start_steps": 5}, S.delayed(5, 8)),
    (
        {**base, "name": "delayed", "start_percent": 40, "then": {"name": "cyclic", "low": 4}},
        S.delayed(400, S.cyclic("cosine", 4, 8, 4, total_steps=N)),
    ),
    (
        {**base, "name": "delayed", "start_percent": 40, "restart": True, "then": {"name": "CR"}},
        S.delayed(400, S.cyclic("cosine", 3, 8, 4, total_steps=600), restart=True),
    ),
]


@pytest.mark.parametrize(("mapping", "expected"), BUILT)
def test_builds(mapping, expected):
    before = dict(mapping)
    assert S.from_config(mapping, N) == expected
    assert S.from_config(ml_collections.ConfigDict(mapping), N) == expected
    assert mapping == before


REFUSED = [
    ({}, "schedule.name: not set; must be one of constant"),
    (None, "schedule=None: must be a mapping"),
    ({"name": "cyclc"}, "schedule.name='cyclc'.*Did you mean 'cyclic'"),
    ({"name": "ct"}, "Did you mean 'CT'"),
    ({"name": 3}, "schedule.name=3"),
    ({"name": "constant"}, "schedule: name='constant' needs bits or high"),
    ({"name": "constant", "bits": 0}, "schedule: bits=0"),
    (
        {"name": "constant", "bits": 4, "value": 3},
        "schedule.value: not used by schedule.name='constant'.*takes bits, high",
    ),
    ({"name": "float", "start_steps": 3}, "schedule.start_steps: .*takes no keys"),
    ({**base, "cycels": 3}, "schedule.cycels.*Did you mean 'cycles'"),
    ({**base, "boundaries_steps": [3]}, "schedule.boundaries_steps: not used"),
    ({**base, "cycles": 1001}, "schedule: cycles=1001.*total_steps=1000"),
    ({**base, "cycles": 0}, "schedule: cycles=0"),
    ({**base, "low": 9}, "schedule: low=9: must not be above high=8"),
    ({**base, "profile": "cosin"}, "schedule: profile='cosin'.*Did you mean 'cosine'"),
    ({**base, "beta": 0.5}, "schedule.beta: not used by schedule.name='cyclic'.*profile='rex'"),
    ({**base, "profile": "rexx", "beta": 0.5}, "schedule: profile='rexx'.*Did you mean 'rex'"),
    ({**base, "pattern": "triangle", "reflection": "vertical"}, "schedule: pattern='triangle'"),
    ({**base, "reflection": "horizontal"}, "schedule.reflection: not used.*pattern='triangular'"),
    ({**base, "name": "CR", "rate": 3}, "schedule.rate: not used by schedule.name='CR'"),
    ({**base, "name": "ETV", "reflection": "horizontal"}, "schedule.reflection: not used by schedule.name='ETV'"),
    ({"name": "cyclic", "low": 3, "high": 8, "cycles": 4}, "needs profile"),
    ({"name": "CR", "low": 3, "high": 8}, "needs cycles"),
    ({"name": "linear", "high": 8}, "needs end_bits or low"),
    ({"name": "linear", "low": 3, "high": 8, "start": 4}, "schedule.start: not used.*Did you mean 'start_bits'"),
    (
        {"name": "window", "low": 3, "high": 8, "start": 4, "length_steps": 5},
        "schedule.start: .*Did you mean 'start_steps'",
    ),
    ({"name": "window", "low": 3, "high": 8, "length_steps": 5}, "needs start_steps or start_percent"),
    (
        {"name": "window", "low": 3, "high": 8, "start_steps": 5, "start_percent": 5, "length_steps": 5},
        "start_steps and start_percent are both set",
    ),
    ({"name": "window", "low": 3, "high": 8, "start_percent": 101, "length_steps": 5}, "schedule.start_percent=101"),
    ({"name": "window", "low": 3, "high": 8, "start_steps": "x", "length_steps": 5}, "schedule.start_steps='x'"),
    ({"name": "window", "low": 3, "high": 8, "start_steps": 5, "length_steps": -5}, "schedule.length_steps=-5"),
    ({"name": "window", "inside": 0, "high": 8, "start_steps": 5, "length_steps": 5}, "schedule: inside=0"),
    (
        {"name": "window", "inside": {"name": "CR", "low": 3}, "high": 8, "start_steps": 5, "length_steps": 5},
        "schedule.inside: name='CR' needs cycles",
    ),
    (
        {"name": "window", "inside": {"low": 3}, "high": 8, "start_steps": 5, "length_steps": 5},
        "schedule.inside.name: not set",
    ),
    ({"name": "piecewise", "boundaries_steps": [5, 3], "values": [1, 2, 3]}, "schedule.boundaries_steps=.*increase"),
    (
        {"name": "piecewise", "boundaries_percent": [50, 30], "values": [1, 2, 3]},
        "schedule.boundaries_percent=.*increase",
    ),
    ({"name": "piecewise", "boundaries_percent": 50, "values": [1, 2]}, "schedule.boundaries_percent=50.*list"),
    ({"name": "piecewise", "boundaries_percent": [50], "values": [1]}, "need 2 values"),
    ({"name": "piecewise", "boundaries_percent": ["x"], "values": [1, 2]}, r"schedule.boundaries_percent\[0\]='x'"),
    ({"name": "piecewise", "boundaries_steps": [5]}, "needs values"),
    ({"name": "rounds"}, "name='rounds' needs values"),
    ({"name": "delayed", "bits": 4, "start_steps": 5, "then": {"name": "float"}}, "exactly one"),
    ({"name": "delayed", "start_steps": 5, "then": 4}, "schedule.then=4"),
    ({"name": "delayed", "start_steps": "x", "restart": True, "then": {"name": "float"}}, "schedule.start_steps='x'"),
    ({"name": "delayed", "start_steps": 5, "restart": "yes", "then": {"name": "float"}}, "restart='yes'"),
]


@pytest.mark.parametrize(("mapping", "message"), REFUSED)
def test_refused_in_one_line(mapping, message):
    with pytest.raises(UsageError) as caught:
        S.from_config(mapping, N)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        S.precisions_from_config(mapping, N)


def test_total_steps_is_checked_and_paths_are_named():
    with pytest.raises(UsageError, match="total_steps=0"):
        S.from_config({"name": "constant", "bits": 4}, 0)
    with pytest.raises(UsageError, match=r"^a\.b\.name"):
        S.from_config({}, N, path="a.b")


def test_one_mapping_serves_all_three():
    p = S.precisions_from_config(base, N)
    assert p == S.PrecisionSchedule(cr, cr, cr, total_steps=N)
    assert S.precisions_from_config({**base, "grads": {}, "acts": None}, N) == p


def test_sub_mappings_start_from_the_keys_around_them():
    p = S.precisions_from_config({**base, "grads": {"name": "constant", "bits": 8}, "acts": {"low": 4}}, N)
    assert p.weights == cr
    assert p.acts == S.cyclic("cosine", 4, 8, 4, total_steps=N)
    assert p.grads == S.constant(8)
    config = ml_collections.ConfigDict({**base, "grads": {"name": "constant"}})
    assert S.precisions_from_config(config, N).grads == S.constant(8)  # bits from the high around it
    # what the parent's name alone uses is nothing to the child
    rex = {**base, "profile": "rex", "beta": 0.5, "grads": {"name": "constant"}}
    assert S.precisions_from_config(rex, N).grads == S.constant(8)
    window = {
        "name": "window",
        "low": 3,
        "high": 8,
        "start_steps": 10,
        "length_steps": 5,
        "acts": {"start_percent": 50},
    }
    assert S.precisions_from_config(window, N).acts == S.window(500, 5, 3, 8)


def test_placeholders_of_a_config_dict_are_unset():
    def part():  # made anew each time: ml_collections takes one placeholder in two places for a reference between them
        keys = {"name": str, "start_steps": float, "bits": int, "low": int, "high": int, "cycles": int}
        return {key: ml_collections.config_dict.placeholder(kind) for key, kind in keys.items()}

    config = ml_collections.ConfigDict({**part(), "weights": part(), "acts": part(), "grads": part()})
    config.update({"name": "delayed", "start_steps": 5.0, "high": 8, "grads": {"name": "constant", "bits": 6}})
    p = S.precisions_from_config(config.lock(), N)
    assert p == S.PrecisionSchedule(S.delayed(5, 8), S.delayed(5, 8), 6, total_steps=N)


def test_three_named_mappings_need_no_name_around_them():
    kinds = {kind: {"name": "CR"} for kind in ("weights", "acts", "grads")}
    p = S.precisions_from_config({"low": 3, "high": 8, "cycles": 4, **kinds}, N)
    assert p.weights == p.acts == p.grads == cr
    with pytest.raises(UsageError, match=r"schedule\.cycels: not a key.*Did you mean 'cycles'"):
        S.precisions_from_config({"low": 3, "high": 8, "cycels": 4, **kinds}, N)
    with pytest.raises(UsageError, match=r"schedule\.name: not set"):
        S.precisions_from_config({"low": 3, "high": 8, "weights": {"name": "CR"}}, N)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"bits": 8}, r"schedule\.grads\.bits: not used by schedule\.grads\.name='cyclic'.*Set schedule\.grads\.name"),
        ({"name": "constant", "bits": 4.5}, r"schedule\.grads: bits=4\.5"),
        ({"name": "constnt"}, r"schedule\.grads\.name='constnt'.*Did you mean 'constant'"),
        ({"name": "constant", "bitz": 4}, r"schedule\.grads\.bitz.*Did you mean 'bits'"),
        (8, r"schedule\.grads=8: must be a mapping"),
    ],
)
def test_refused_sub_mappings(grads, message):
    with pytest.raises(UsageError) as caught:
        S.precisions_from_config({**base, "grads": grads}, N)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_precision_schedule_gives_precision_under_one_jit():
    p = S.PrecisionSchedule(weights=cr, acts=S.linear(8, 3, N), grads=8)
    traces = []

    @jax.jit
    def at(step):
        traces.append(step)
        return p(step)

    for t in (0, 1, 124, 500, 999):
        got = at(t)
        assert isinstance(got, Precision)
        assert (got.weights, got.acts, got.grads) == (cr(t), p.acts(t), 8)
    assert len(traces) == 1
    assert p(5).grads.dtype == "float32"
    assert p.q_max == Precision(8, 8, 8) and all(type(b) is int for b in jax.tree.leaves(p.q_max))


def test_precision_schedule_with_unquantized_kinds():
    p = S.PrecisionSchedule(weights=S.delayed(10, 4), acts=4)
    assert p(0).grads is None and p.q_max == Precision(32, 4, None)
    assert S.PrecisionSchedule(4, 4, 32)(0) == Precision(4, 4, 32)
    foreign = S.PrecisionSchedule(lambda step: step // 100 + 1, 4, total_steps=N)
    assert foreign.q_max == Precision(10, 4, None)
    assert foreign(250) == Precision(3, 4, None) and foreign(250).weights.dtype == "float32"
