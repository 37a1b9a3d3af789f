"""What every schedule does, whatever it is: a table of schedules crossed with properties; and what they refuse."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import schedules as S
from qtrain.errors import UsageError

N = 60


def own_function(step):
    """A user's schedule that is a plain function."""
    return jnp.where(step % 2 == 0, 3, 5)


cosine = S.cyclic("cosine", 3, 8, 4, total_steps=N)
TABLE = {
    "constant": S.constant(4),
    "linear": S.linear(8, 3, total_steps=N, begin=7),
    "piecewise": S.piecewise([10, 30], [4, 6, 8]),
    "piecewise without boundaries": S.piecewise([], [5]),
    "rounds": S.rounds([8, 6, 2]),
    **S.suite(3, 8, 4, N),
    "window": S.window(10, 20, 3, 8),
    "window of schedules": S.window(10, 20, cosine, S.linear(8, 4, N)),
    "delayed": S.delayed(20, 4),
    "delayed schedule": S.delayed(20, cosine),
    "delayed restart": S.delayed(20, cosine, restart=True),
    "join": S.join([8, cosine, S.linear(3, 8, 10)], [10, 45]),
    "clip": S.clip(S.delayed(20, cosine), 4, 6),
    "shift": S.shift(cosine, 9),
    "shift back": S.shift(cosine, -9),
    "own function": S.clip(own_function, 1, 4),
}
FLOAT = {"delayed", "delayed schedule", "delayed restart"}


@pytest.fixture(params=TABLE, scope="module")
def named(request):
    s = TABLE[request.param]
    return request.param, s, np.asarray(jax.jit(s)(np.arange(N)))


def test_bits_are_whole_float32_in_bounds(named):
    name, _, bits = named
    assert bits.dtype == np.float32 and bits.shape == (N,)
    np.testing.assert_array_equal(bits, np.rint(bits))
    assert bits.min() >= 1 and bits.max() <= (32 if name in FLOAT else 8)


def test_one_program_serves_every_step_and_vmap_equals_it(named):
    _, s, bits = named
    traces = []

    @jax.jit
    def at(step):
        traces.append(step)
        return s(step)

    assert [float(at(t)) for t in range(N)] == bits.tolist()
    assert len(traces) == 1
    np.testing.assert_array_equal(jax.jit(jax.vmap(s))(jnp.arange(N)), bits)
    _, scanned = jax.lax.scan(lambda t, _: (t + 1, s(t)), jnp.int32(0), length=N)
    np.testing.assert_array_equal(scanned, bits)


def test_takes_any_integer_step_of_any_shape(named):
    _, s, bits = named
    for step in (np.int64(11), np.uint8(11), 11, jnp.uint32(11), jnp.int8(11), np.array(11)):
        result = s(step)
        assert isinstance(result, jax.Array) and result.shape == () and result.dtype == jnp.float32
        assert result == bits[11]
    grid = np.arange(N).reshape(3, 4, 5)
    np.testing.assert_array_equal(s(grid), bits.reshape(3, 4, 5))
    assert s(np.zeros((0,), np.int32)).shape == (0,)


def test_steps_outside_the_run(named):
    _, s, bits = named
    assert s(-1) == s(np.int64(-(2**40))) == bits[0]
    far = s(np.array([2**31 - 1, 2**40, 2**63 - 1]))
    assert np.unique(np.asarray(far)).size == 1 and s(2**70) == far[0]
    if isinstance(s, S.Cyclic):
        assert far[0] == bits[-1]


def test_equal_parameters_make_equal_schedules_that_print_as_their_call(named):
    name, s, _ = named
    if name == "own function":
        assert "own_function" in repr(s)
        return
    again = eval(repr(s), vars(S))
    assert again == s and hash(again) == hash(s)
    assert sum(s == other for other in TABLE.values()) == 1


def test_highest_is_reached_or_is_the_upper_bound(named):
    name, s, bits = named  # at 15 steps a cycle REX does not get to its upper bound
    if name == "own function":
        with pytest.raises(UsageError, match="total_steps"):
            s.highest()
        assert s.highest(N) == 4
        return
    assert s.highest(N) == (s.high if isinstance(s, S.Cyclic) else bits.max())
    assert isinstance(s.highest(), int) and s.highest() >= bits.max()


def test_highest_counts_only_what_a_run_reaches():
    assert S.piecewise([10, 30], [4, 6, 8]).highest(30) == 6
    assert S.linear(4, 8, 100, begin=50).highest(50) == 4
    assert S.window(10, 5, inside=8, outside=3).highest(10) == 3
    assert S.window(0, 5, inside=3, outside=8).highest(5) == 3
    assert S.window(0, 0, inside=8, outside=3).highest() == 3
    assert S.delayed(0, 4).highest() == 4 and S.delayed(1, 4).highest(1) == 32
    assert S.join([3, 8], [10]).highest(10) == 3 and S.join([8, 3], [0]).highest() == 3
    assert S.cyclic("exponential", 3, 8, 1, total_steps=4, rate=0.1).highest(4) == 8
    assert S.highest(own_function, 10) == 5 and S.highest(None) is None
    assert S.highest(lambda step: step + 30, 100) == 32


def test_a_callable_object_is_a_schedule_even_if_it_has_no_hash():
    class Own(list):
        def __call__(self, step):
            return step % 3 + 2

    assert S.evaluate(Own(), 4).tolist() == S.evaluate(S.clip(Own(), 1, 9), 4).tolist() == [2, 3, 4, 2]
    assert S.relative_cost(Own(), 2, 8) == 4 + 32 + 9 + 48


def test_default_parameters_are_not_printed():
    assert repr(S.by_name("CR", 3, 8, 8, 64_000)) == (
        "cyclic(profile='cosine', low=3, high=8, cycles=8, total_steps=64000)"
    )
    assert repr(S.delayed(5, 4)) == "delayed(start=5, bits=constant(bits=4))"
    assert S.step is S.piecewise


def python(s):
    return [int(b) for b in np.asarray(jax.jit(s)(np.arange(N)))]


def test_combinators_equal_plain_python():
    c = python(cosine)
    falling = python(S.linear(8, 4, N))
    rising = python(S.linear(3, 8, 10))
    assert python(TABLE["window of schedules"]) == [c[t] if 10 <= t < 30 else falling[t] for t in range(N)]
    assert python(TABLE["delayed schedule"]) == [c[t] if t >= 20 else 32 for t in range(N)]
    assert python(TABLE["delayed restart"]) == [c[t - 20] if t >= 20 else 32 for t in range(N)]
    assert python(TABLE["join"]) == [8] * 10 + c[:35] + [rising[min(t - 45, 9)] if t < 55 else 8 for t in range(45, N)]
    assert python(TABLE["clip"]) == [6] * 20 + [min(max(b, 4), 6) for b in c[20:]]
    assert python(TABLE["shift"]) == [c[max(t - 9, 0)] for t in range(N)]
    assert python(TABLE["shift back"]) == [c[min(t + 9, N - 1)] for t in range(N)]
    assert python(TABLE["piecewise"]) == [4] * 10 + [6] * 20 + [8] * 30
    assert python(TABLE["own function"]) == [3, 4] * 30


cyclic = {"profile": "cosine", "low": 3, "high": 8, "cycles": 8, "total_steps": 100}
BITS = [0, -1, 4.5, "four", True, float("nan"), float("inf"), None, 33, [4], np.zeros(2), 2**70]
REFUSED = [
    *[(S.constant, {"bits": bits}, "bits=") for bits in BITS],
    *[(S.cyclic, {**cyclic, "low": bits}, "low=") for bits in BITS],
    (S.cyclic, {**cyclic, "high": 4.5}, "high=4.5"),
    (S.cyclic, {**cyclic, "low": 9}, "low=9: must not be above high=8"),
    (S.cyclic, {**cyclic, "cycles": 0}, "cycles=0"),
    (S.cyclic, {**cyclic, "cycles": 101}, "cycles=101.*total_steps=100"),
    (S.cyclic, {**cyclic, "cycles": 2.5}, "cycles=2.5"),
    (S.cyclic, {**cyclic, "total_steps": 0}, "total_steps=0"),
    (S.cyclic, {**cyclic, "total_steps": 2**31}, "total_steps=2147483648"),
    (S.cyclic, {**cyclic, "profile": "cosin"}, "Did you mean 'cosine'"),
    (S.cyclic, {**cyclic, "pattern": "triangle"}, "Did you mean 'triangular'"),
    (S.cyclic, {**cyclic, "reflection": "Vertical"}, "Did you mean 'vertical'"),
    (S.cyclic, {**cyclic, "cycle_length": "ceil"}, "floor_plus_one, floor"),
    (S.cyclic, {**cyclic, "rate": 0}, "rate=0"),
    (S.cyclic, {**cyclic, "rate": float("inf")}, "rate=inf"),
    (S.cyclic, {**cyclic, "rate": "4"}, "rate='4'"),
    (S.cyclic, {**cyclic, "beta": 1.0}, "beta=1.0"),
    (S.cyclic, {**cyclic, "beta": float("nan")}, "beta=nan"),
    (S.suite, {"low": 8, "high": 3, "cycles": 8, "total_steps": 100}, "low=8"),
    (S.by_name, {"name": "cr", "low": 3, "high": 8, "cycles": 8, "total_steps": 100}, "Did you mean 'CR'"),
    (S.by_name, {"name": "CH", "low": 3, "high": 8, "cycles": 8, "total_steps": 100}, "name='CH'.*CR, CT, LR"),
    (S.linear, {"start": 0, "end": 4, "total_steps": 9}, "start=0"),
    (S.linear, {"start": 8, "end": "x", "total_steps": 9}, "end='x'"),
    (S.linear, {"start": 8, "end": 4, "total_steps": 0}, "total_steps=0"),
    (S.linear, {"start": 8, "end": 4, "total_steps": 9, "begin": 9}, "begin=9.*total_steps=9"),
    (S.piecewise, {"boundaries": [5, 5], "values": [1, 2, 3]}, "boundaries=.*increase"),
    (S.piecewise, {"boundaries": [5, 4], "values": [1, 2, 3]}, "boundaries=.*increase"),
    (S.piecewise, {"boundaries": [-1], "values": [1, 2]}, r"boundaries\[0\]=-1"),
    (S.piecewise, {"boundaries": 5, "values": [1, 2]}, "boundaries=5"),
    (S.piecewise, {"boundaries": [5], "values": [1]}, "need 2 values, got 1"),
    (S.piecewise, {"boundaries": [5], "values": [1, 0]}, r"values\[1\]=0"),
    (S.piecewise, {"boundaries": [5], "values": "48"}, "values='48'"),
    (S.rounds, {"values": []}, "values=.*one at least"),
    (S.rounds, {"values": "84"}, "values='84'"),
    (S.rounds, {"values": [8, 0]}, r"values\[1\]=0"),
    (S.window, {"start": -1, "length": 2, "inside": 3, "outside": 8}, "start=-1"),
    (S.window, {"start": 1, "length": -2, "inside": 3, "outside": 8}, "length=-2"),
    (S.window, {"start": 1, "length": 2, "inside": 0, "outside": 8}, "inside=0.*schedule"),
    (S.window, {"start": 1, "length": 2, "inside": 3, "outside": "CR"}, "outside='CR'"),
    (S.delayed, {"start": 1.5, "bits": 4}, "start=1.5"),
    (S.delayed, {"start": 1, "bits": None}, "bits=None"),
    (S.delayed, {"start": 1, "bits": 4, "restart": 1}, "restart=1"),
    (S.join, {"schedules": [3, 8], "boundaries": []}, "need 1 schedules, got 2"),
    (S.join, {"schedules": [3, 8, 3], "boundaries": [9, 3]}, "increase"),
    (S.join, {"schedules": cosine, "boundaries": []}, "list of schedules"),
    (S.join, {"schedules": [3, "x"], "boundaries": [4]}, r"schedules\[1\]='x'"),
    (S.clip, {"schedule": 4, "low": 5, "high": 3}, "low=5"),
    (S.clip, {"schedule": "x", "low": 3, "high": 5}, "schedule='x'"),
    (S.shift, {"schedule": 4, "steps": 1.5}, "steps=1.5"),
    (S.relative_cost, {"schedule": 4, "total_steps": 0, "backward_bits": 8}, "total_steps=0"),
    (S.relative_cost, {"schedule": 4, "total_steps": 5, "backward_bits": 4.5}, "backward_bits=4.5"),
    (S.saving, {"schedule": 4, "static_bits": 0, "backward_bits": 8, "total_steps": 5}, "static_bits=0"),
    (S.constant(4), {"step": 1.5}, "step=1.5"),
    (S.constant(4), {"step": True}, "step=True"),
    (S.constant(4), {"step": jnp.float32(1)}, "step: must be of an integer type, got float32"),
    (S.PrecisionSchedule, {"weights": "x"}, "weights='x'"),
    (S.PrecisionSchedule, {"grads": 0}, "grads=0"),
    (S.PrecisionSchedule, {"weights": 4, "total_steps": 0}, "total_steps=0"),
]


@pytest.mark.parametrize(("build", "arguments", "message"), REFUSED)
def test_refused_in_one_line(build, arguments, message):
    with pytest.raises(UsageError) as caught:
        build(**arguments)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_traced_parameters_are_refused_not_leaked():
    with pytest.raises(UsageError, match="bits="):
        jax.jit(lambda bits: S.constant(bits)(0))(4)


@pytest.mark.parametrize("bits", [4, np.int8(4), np.uint64(4), 4.0, np.float32(4), np.array(4), jnp.int32(4)])
def test_whole_numbers_of_any_type_are_bits(bits):
    assert S.constant(bits) == S.constant(4)
    assert isinstance(S.constant(bits).bits, int)


def test_holds_under_x64_and_strict_promotion():
    code = (
        "import jax, numpy as np\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "jax.config.update('jax_numpy_dtype_promotion', 'strict')\n"
        "jax.config.update('jax_numpy_rank_promotion', 'raise')\n"
        "from qtrain import schedules as S\n"
        "import sys; assert not any(m.split('.')[0] == 'matplotlib' for m in sys.modules)\n"
        "assert not any(m.split('.')[0] == 'flax' for m in sys.modules)\n"
        "c = S.suite(3, 8, 4, 60)\n"
        "t = np.arange(60)\n"
        "more = [S.linear(8, 3, 60), S.piecewise([5], [3, 8]), S.window(1, 9, 3, c['CR']), S.shift(c['RR'], -5),\n"
        "        S.delayed(5, c['CR'], True), S.join([8, c['CT']], [9]), S.clip(c['ER'], 4, 6)]\n"
        "out = [jax.jit(s)(t) for s in (*c.values(), *more)]\n"
        "assert {str(x.dtype) for x in out} == {'float32'}\n"
        "print([int(x.sum()) for x in out])\n"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    c = S.suite(3, 8, 4, 60)
    more = [
        S.linear(8, 3, 60),
        S.piecewise([5], [3, 8]),
        S.window(1, 9, 3, c["CR"]),
        S.shift(c["RR"], -5),
        S.delayed(5, c["CR"], True),
        S.join([8, c["CT"]], [9]),
        S.clip(c["ER"], 4, 6),
    ]
    assert ran.stdout.strip() == str([int(S.evaluate(s, 60).sum()) for s in (*c.values(), *more)])
