"""`qtrain bench`: its rows, arms, counts of programs, timing, and what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.bench import ARMS, arms, command, programs, suites, timing
from qtrain.bench.rows import table
from qtrain.errors import UsageError
from qtrain.quantizers import Conv, Operands, Traced

ROOT = Path(__file__).parent.parent
KEYS = {
    "suite",
    "case",
    "arm",
    "bits",
    "step_ms",
    "ratio_to_float32",
    "compile_s",
    "compilations",
    "peak_bytes",
    "note",
}
PEERS = {name: importlib.util.find_spec(name) is not None for name in ("aqt", "qwix")}


def bench(folder, *flags):
    """The rows that the command writes."""
    out = folder / "bench.json"
    assert command.run(["--quick", "--out", str(out), *flags]) == 0
    return json.loads(out.read_text())


def by_arm(rows):
    found = {row["arm"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("block"), "--suite", "block", "--rounds", "3")


def test_block_has_one_row_an_arm(block):
    names = ["float32", "bfloat16", "qtrain_fake", "qtrain_native", "aqt_qat", "aqt_int8", "qwix_qat", "qwix_int8"]
    assert [row["arm"] for row in block] == names == list(ARMS)
    for row in block:
        assert row.keys() >= KEYS
        assert (row["suite"], row["bits"], row["backend"]) == ("block", 8, jax.default_backend())
        if PEERS.get(row["arm"].split("_")[0], True):
            low, high = row["ratio_quartiles"]
            assert 0 < row["ratio_range"][0] <= low <= row["ratio_to_float32"] <= high <= row["ratio_range"][1]
            assert row["step_ms"] > 0 and row["compile_s"] > 0 and row["peak_bytes"] > 0
            assert (row["compilations"], row["rounds"]) == (1, 3)
            # It is the same step: at 8 bits and in bfloat16 loss and update are nearly those of float32.
            for key in ("first_loss", "first_update_norm"):
                assert row[key] == pytest.approx(block[0][key], rel=0.03), row["arm"]
        else:
            assert row["step_ms"] is None and "pip install" in row["note"]
    assert block[0]["ratio_to_float32"] == 1.0 and block[0]["ratio_range"] == [1.0, 1.0]


def test_what_the_products_of_an_arm_run_on(block):
    # Six layers forward, and backward twice; the two products of attention and their gradients stay in float.
    layers, attention = 3 * 6, 3 * 2
    expected = {
        "float32": {"float32": layers + attention},
        "bfloat16": {"bfloat16": layers + attention},
        "qtrain_fake": {"float32": layers + attention},
        "qtrain_native": {"int8": layers, "float32": attention},
        "aqt_qat": {"int8": 6, "float32": layers + attention - 6},
        "aqt_int8": {"int8": layers, "float32": attention},
        "qwix_qat": {"int8": 6, "float32": layers + attention - 6},
        "qwix_int8": {"int8": layers, "float32": attention},
    }
    rows = by_arm(block)
    for arm, products in expected.items():
        if rows[arm]["step_ms"] is not None:
            assert rows[arm]["products"]["requested"] == products, arm
    assert "2 to 8 bits" in rows["qtrain_native"]["note"]


def test_schedule_counts_programs(tmp_path):
    rows = bench(tmp_path, "--suite", "schedule", "--arms", "qtrain_fake,aqt_qat", "--rounds", "1")
    assert {row["bits"] for row in rows} == {"2-8"}
    found = {(row["arm"], row["case"]): row for row in rows}
    assert found["float32", "one program"]["compilations"] == found["qtrain_fake", "traced"]["compilations"] == 1
    if PEERS["aqt"]:
        seven, switch = found["aqt_qat", "seven programs"], found["aqt_qat", "lax.switch"]
        assert (seven["compilations"], switch["compilations"]) == (7, 1)
        # Every width has products of its own, in seven programs as in seven branches.
        assert seven["products"]["requested"] == switch["products"]["requested"] == {"int8": 7, "float32": 14}
        assert seven["compile_s"] > found["qtrain_fake", "traced"]["compile_s"]
        for row in (seven, switch, found["float32", "one program"]):
            assert row["visit_ms"] == pytest.approx(7 * row["step_ms"], rel=1e-3)


def test_resnet_has_a_second_baseline():
    symmetric, affine = suites.cases("resnet", quick=True)
    assert (symmetric.name, affine.name) == ("symmetric", "affine")
    plain, materialised, aqt = command.measure(symmetric, ("aqt_int8",), 1)
    assert [row["arm"] for row in (plain, materialised, aqt)] == ["float32", "float32_materialised", "aqt_int8"]
    assert materialised["ratio_to_materialised"] == 1.0 and plain["ratio_to_materialised"] > 0
    assert materialised["products"]["compiled"] == plain["products"]["compiled"]
    assert aqt["step_ms"] is None and aqt["compilations"] == 0
    assert ("no backward pass for convolutions" if PEERS["aqt"] else "pip install") in aqt["note"]


def test_missing_peer_is_a_row_with_its_install_command(tmp_path, monkeypatch, capsys):
    for name in ("qwix", "aqt", "aqt.jax.v2.config"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = bench(tmp_path, "--suite", "matmul", "--bits", "8", "--arms", "aqt_qat,aqt_int8,qwix_qat,qwix_int8")
    assert [row["arm"] for row in rows] == ["float32", "aqt_qat", "aqt_int8", "qwix_qat", "qwix_int8"]
    for row in rows[1:]:
        assert row["step_ms"] is None and row["ratio_to_float32"] is None and row["compilations"] == 0
        assert ("pip install 'qtrain[peers]'" if "qwix" in row["arm"] else "pip install 'aqtp>=0.9'") in row["note"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(rows) and all("not installed" in line for line in printed[2:])


@pytest.mark.skipif(not PEERS["qwix"], reason="qwix is not installed (pip install 'qtrain[peers]')")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what does not run on a CPU")
def test_a_width_that_a_peer_cannot_run_is_a_row(tmp_path):
    rows = by_arm(bench(tmp_path, "--suite", "matmul", "--bits", "4", "--arms", "qwix_qat"))
    assert rows["qwix_qat"]["step_ms"] is None and "does not run here: " in rows["qwix_qat"]["note"]
    assert rows["float32"]["bits"] == 4 and rows["float32"]["step_ms"] > 0


@pytest.mark.parametrize("arm", ["aqt_qat", "qwix_qat"])
def test_a_peer_without_the_grid_is_a_row(arm):
    _, affine = suites.cases("resnet", quick=True)
    runner = arms._runner(arm, affine, "", None)
    assert not runner.programs and "no affine grid" in runner.note


ERRORS = {
    "suite": (["--suite", "matmul,blok"], "--suite: there is no 'blok'; there are matmul, .* Did you mean 'block'"),
    "no suite": (["--suite", ","], "--suite is empty"),
    "arm": (["--arms", "qtrain_nativ"], "--arms: there is no 'qtrain_nativ'; .* Did you mean 'qtrain_native'"),
    "width": (["--bits", "9"], "--bits: there is no '9'"),
    "width without its suite": (["--suite", "block", "--bits", "4"], "--bits is for suite matmul"),
    "rounds": (["--rounds", "0"], "--rounds 0; give at least 1"),
    "rounds in words": (["--rounds", "ten"], "invalid int value: 'ten'"),
    "flag": (["--suites", "block"], "--suites: no such flag; .* Did you mean '--suite'"),
    "folder": (["--out", "missing/bench.json"], "there is no folder 'missing'; create it"),
    "out is a folder": (["--out", "."], "is not a file"),
}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that nobody can write to")
def test_out_that_cannot_be_written():
    with pytest.raises(UsageError, match="cannot be written"):
        command.run(["--out", "/proc/bench.json"])


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_stop_before_anything_compiles(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    arguments, message = ERRORS[name]
    with pytest.raises(UsageError, match=message) as error:
        command.run(arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_settings_that_change_the_baseline_are_refused(monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    with jax.default_matmul_precision("bfloat16"), pytest.raises(UsageError, match="MATMUL_PRECISION=bfloat16"):
        command.run(["--suite", "matmul"])
    with jax.enable_x64(True), pytest.raises(UsageError, match="JAX_ENABLE_X64"):
        command.run(["--suite", "matmul"])
    (case,) = suites.cases("matmul", (8,), quick=True)
    state = programs.initial_state(case)

    def halved(variables, inputs, bits, key):
        return case.model(jnp.bfloat16).apply(variables, inputs), {}

    program = programs.compile_step(
        programs.train_step(case, halved), (state, case.inputs, None, None, jax.random.key(0))
    )
    with pytest.raises(UsageError, match="baseline's products are 3 in bfloat16"):
        programs.check_baseline(program)


def test_products_in_an_optimized_program():
    text = """
%fused (p0: s8[4,8], p1: s8[8,2]) -> s32[4,2] {
  %p0 = s8[4,8]{1,0} parameter(0)
  %p1 = s8[8,2]{1,0} parameter(1)
  ROOT %dot.1 = s32[4,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[4,8], p0: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %p0 = f32[8,2]{1,0} parameter(1)
  %c = bf16[4,8]{1,0} convert(%a)
  %conv = f32[4,2]{1,0} convolution(%c, %p0), dim_labels=bf_io->bf
  %tuple = (f32[4,2]{1,0}, s8[16]{0}) custom-call(%a, %p0), custom_call_target="__cublas$gemm"
  ROOT %add = f32[4,2]{1,0} add(%conv, %conv)
}
"""
    assert programs.products_in_hlo(text) == {"s8": 1, "bf16 x f32": 1, "f32": 1}
    # ... and the compiler of this machine writes text of that form.
    compiled = jax.jit(jnp.matmul).lower(jnp.ones((4, 8)), jnp.ones((8, 2))).compile()
    assert programs.products_in_hlo(compiled.as_text()) == {"f32": 1}


class Clock:
    """Runners of known cost on a machine that slows down evenly."""

    def __init__(self, drift=0.0):
        self.now, self.drift = 0.0, drift

    def runner(self, cost):
        runner = arms.Runner("", None, visits=[None])
        runner.run = lambda repeats=1: self.spend(cost, repeats)
        return runner

    def spend(self, cost, repeats):
        self.now += cost * repeats * (1.0 + self.drift * self.now)


def test_ratios_are_to_the_neighbours(monkeypatch):
    for drift, tolerance in ((0.0, 1e-9), (4e-3, 0.02)):
        clock = Clock(drift)
        monkeypatch.setattr(timing.time, "perf_counter", lambda clock=clock: clock.now)
        baseline, others = clock.runner(1.0), [clock.runner(cost) for cost in (0.4, 2.0, 9.0)]
        times, repeats = timing.interleave(baseline, others, rounds=6)
        assert repeats == 1
        for runner, cost in zip(others, (0.4, 2.0, 9.0), strict=True):
            ratios = times[id(runner)].ratios
            assert list(ratios) == ([0, 4] if cost > 5 else list(range(6)))
            np.testing.assert_allclose(list(ratios.values()), cost, rtol=tolerance)
        assert set(times[id(baseline)].ratios.values()) == {1.0}
        # The machine is slower in the end: times of different moments would be off by as much.
        if drift:
            assert times[id(baseline)].seconds[-1] > 1.1 * times[id(baseline)].seconds[0]


def test_short_steps_are_repeated(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    _, repeats = timing.interleave(clock.runner(0.004), [], rounds=1)
    assert repeats == 13  # the fewest that last 0.05 s


def test_the_materialised_convolution_is_the_convolution():
    op = Conv((1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 5, 3), (3, 3, 3, 4), (2, 5, 5, 4)))

    def results(function):
        out, vjp = jax.vjp(function, x, w)
        return out, *vjp(g)

    ours = jax.jit(lambda: results(lambda x, w: arms.materialised(op, Operands(), x, w, Traced())))()
    for own, expected in zip(ours, jax.jit(lambda: results(op))(), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-6)


def test_table_and_picture(block, tmp_path):
    text = table(block, markdown=True).splitlines()
    assert len(text) == 2 + len(block) and all(line.count(" | ") == 10 for line in (text[0], *text[2:]))
    plain = table(block).splitlines()
    assert len(plain) == 1 + len(block) and "1.00 to 1.00" in plain[1]
    spec = importlib.util.spec_from_file_location("speed_plot", ROOT / "experiments" / "speed" / "plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    none = {**block[1], "step_ms": None, "ratio_to_float32": None}
    plot.draw([*block[:-1], none, {**block[1], "suite": "schedule", "case": "traced"}], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
