"""`qtrain plan-budget`: the published laws against the papers' numbers, memory, plans, and what is outside a range."""

import dataclasses
import doctest
import importlib
import json
import math
import re

import numpy as np
import pytest

from qtrain import main, planner
from qtrain.errors import UsageError
from qtrain.planner import LAWS, FractionLaw, Setting, plan_budget
from qtrain.planner.command import text
from qtrain.planner.memory import params_that_fit, parse_bytes, parse_count, show_bytes, weight_bytes

ISSUE = ["plan-budget", "--params", "1e8", "--tokens", "2e9", "--memory", "50MB"]


def command(arguments, capsys):
    """Exit code, what was printed, and the lines on stderr."""
    code = main.main(arguments)
    out = capsys.readouterr()
    return code, out.out, out.err.splitlines()


# --- laws


@pytest.mark.parametrize(("S", "share"), [(20, 0.106), (100, 0.232), (1e3, 0.378), (1e4, 0.482), (1e5, 0.557)])
def test_the_fraction_of_the_paper(S, share):
    assert planner.optimal_fraction(S) == pytest.approx(share, abs=6e-4)
    # S is tokens over bytes, whichever of the three it comes from
    for params, bits in ((1e6, 8), (4e6, 2), (2e6, 4)):
        assert planner.tokens_per_parameter_byte(params, S * 1e6, bits) == pytest.approx(S)


def test_the_fraction_is_clipped_below_alone():
    law = FractionLaw()
    assert law(3.0) == law(20.0) == planner.optimal_fraction(20)
    assert law(1e6) == planner.optimal_fraction(1e6) > law(1.3e5)
    assert law.warnings(50.0, 1e9, 4) == []
    for ratio, params, bits, pattern in (
        (3.0, 1e9, 4, "S = 3 .* below 20.*clipped to 20"),
        (1e6, 1e9, 4, "S = 1e.06 .*above 130000.*extrapolated"),
        (50.0, 1e6, 4, "params 1e.06 is outside 8.6e.07 to 2.2e.09.*extrapolated"),
        (50.0, 1e9, 3, "3 bits is none of the widths.*interpolated"),
        (50.0, 1e9, 8, "8 bits is none of the widths.*extrapolated"),
    ):
        (warning,) = law.warnings(ratio, params, bits)
        assert re.search(pattern, warning), warning


@pytest.mark.parametrize("S", [1.0, 0.5, -1.0, math.nan])
def test_the_fraction_has_no_value_below_one(S):
    with pytest.raises(UsageError, match="above 1 alone"):
        planner.optimal_fraction(S)


def test_quest():
    eff = {1: 0.0205, 2: 0.152, 3: 0.433, 4: 0.692, 8: 1.016}
    for bits, worth in eff.items():
        expected = 8.134 * (3e8 * worth) ** -0.06273 + 86.41 * 3e10**-0.24129 + 0.00142
        assert planner.quest_loss(3e8, 3e10, bits) == pytest.approx(expected, rel=1e-12)
    # The paper's claim: 4 bits are the best use of a given memory, whatever it and the tokens are.
    for memory, tokens in ((5e7, 2e9), (1e9, 1e11)):
        losses = {bits: planner.quest_loss(8 * memory / bits, tokens, bits) for bits in eff}
        assert min(losses, key=losses.get) == 4


def test_kumar():
    assert planner.compute_optimal_width() == pytest.approx(7.00, abs=0.005)
    # An independent minimum over parameters, tokens and width under one compute N·D·P.
    params, bits = np.meshgrid(np.geomspace(1e7, 1e11, 4001), np.arange(5.0, 10.0, 0.25), indexing="ij")
    tokens = 1e19 / (params * bits)
    worth = np.ones_like(bits)
    for gamma, offset in ((2.6745, 0.3037), (2.2102, 1.4072), (0.9578, 2.4185)):
        worth = worth * (1 - np.exp(-bits / gamma + offset))
    losses = 4299 / (params * worth) ** 0.4965 + 18060 / tokens**0.4965 + 2.7648
    assert bits.ravel()[losses.argmin()] == 7.0
    index = (1234, 7)
    here = planner.kumar_loss(params[index], tokens[index], bits[index])
    assert here == pytest.approx(losses[index], rel=1e-12)
    assert planner.kumar_loss(1e8, 2e9, 4, acts=16) < planner.kumar_loss(1e8, 2e9, 4)
    with pytest.raises(UsageError, match="kv=2 bits: Kumar's law leaves no effective parameters there"):
        planner.effective_parameters(1e8, 4, 4, 2)


def test_chen():
    assert planner.chen_excess(594e6, 1e11, 128) == pytest.approx(0.0573, abs=5e-5)
    floor = 237.7042 / 594e6**0.3022 + 596.249 / 1e11**0.3022 + 1.9279
    assert planner.chen_loss(594e6, 1e11, 128) == pytest.approx(floor + 0.0573, abs=5e-5)
    assert planner.chen_excess(594e6, 1e11, 32) < planner.chen_excess(594e6, 1e11, 256)
    with pytest.raises(UsageError, match="at least 2"):
        planner.chen_excess(594e6, 1e11, 1)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_properties_of_every_law(law):
    params, tokens = law.ranges["params"][0] * 2, law.ranges.get("tokens", (1e10, 1e10))[0] * 1.5
    bits = law.widths[-1] if law.name != "kumar" else 8
    here = Setting(params, tokens, bits)
    assert law.warnings(here) == []
    assert law(Setting(2 * params, tokens, bits)) < law(here) > law(Setting(params, 2 * tokens, bits))
    losses = [law(Setting(params, tokens, width)) for width in law.widths if width > 3 or law.name != "kumar"]
    assert losses == sorted(losses, reverse=True)
    (warning,) = law.warnings(Setting(params * 1e6, tokens, bits))
    assert re.search(r"params .* is outside .*extrapolated$", warning)
    with pytest.raises(UsageError, match="has constants for"):
        law(Setting(params, tokens, 19))
    if law.name != "kumar":
        with pytest.raises(UsageError, match="no term for these"):
            law(Setting(params, tokens, bits, acts=bits + 4))


# --- memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50MB", 50e6),
        ("50 mb", 50e6),
        ("1.5GiB", 1.5 * 2**30),
        ("5e7", 5e7),
        ("12B", 12),
        (".5KiB", 512),
        ("2TB", 2e12),
    ],
)
def test_memory(text, expected):
    assert parse_bytes(text) == expected
    assert parse_bytes(show_bytes(expected)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "50XB", "0", "nan", "1e999", "50MBs", "5 0"])
def test_no_memory(text):
    with pytest.raises(UsageError, match=r"--memory .*: give bytes such as 50MB"):
        parse_bytes(text)
    with pytest.raises(UsageError, match=r"--params .*: give a number above 0"):
        parse_count(text, "--params")


def test_parameters_that_fit():
    for bits in (1, 3, 8):
        for group_size in (None, 32, 128.0):
            params = params_that_fit(1e6, bits, group_size)
            assert weight_bytes(params, bits, group_size) == pytest.approx(1e6)
    assert weight_bytes(128, 4, 128) == 64 + 4


# --- plans


def test_the_plan_of_given_parameters_is_the_widest_that_fits():
    for memory, bits in ((50e6, 4), (49e6, 3), (99e6, 4), (100e6, 8), (13e6, 1)):
        plan = plan_budget(params=1e8, tokens=2e9, memory=memory)
        assert plan.chosen.bits == bits
        assert [option.fits for option in plan.options] == [option.bits <= bits for option in plan.options]
        assert plan.chosen.fraction == pytest.approx(planner.optimal_fraction(max(2e9 / (1e8 * bits / 8), 20)))
    assert plan_budget(params=1e8, tokens=2e9, memory=50e6, group_size=128).chosen.bits == 3  # scales count


def test_the_plan_without_parameters_trades_size_against_width():
    plan = plan_budget(tokens=2e9, memory=50e6)
    assert plan.chosen.bits == 4 and plan.chosen.params == pytest.approx(1e8)
    assert all(option.weight_bytes == pytest.approx(50e6) for option in plan.options)
    assert plan.chosen.loss == min(option.loss for option in plan.options)
    assert any("8 bits fits too" in note for note in plan.notes)
    by_compute = plan_budget(compute=6e17, memory=50e6)
    assert all(option.tokens * option.params * 6 == pytest.approx(6e17) for option in by_compute.options)


def test_the_plan_says_all_in_json(capsys):
    code, out, warnings = command([*ISSUE, "--json"], capsys)
    plan = json.loads(out)
    assert code == 0 and warnings == plan["warnings"] == []
    assert (plan["bits"], plan["tokens_per_byte"]) == (4, 40.0)
    assert plan["fraction"] == pytest.approx(math.exp(-6.7297 / math.log(40)))
    assert plan["float_percent"] == pytest.approx(100 * (1 - plan["fraction"]))
    assert plan["fraction_law"]["tokens_per_byte_range"] == [20, 1.3e5]
    assert "2509.22935" in plan["fraction_law"]["source"] and "2502.05003" in plan["loss_law"]["source"]


def test_the_plan_as_text(capsys):
    code, out, warnings = command(ISSUE, capsys)
    assert code == 0 and not warnings
    (row,) = [line for line in out.splitlines() if line.startswith("->")]
    assert row.split() == ["->", "4", "1e+08", "50", "MB", "yes", "40", "16.1%", "3.115"]
    for part in ("S 20 to 130000", "arXiv 2509.22935", "fraction 0.1613", "schedule.start_percent=83.9", "fusion"):
        assert part in out, part
    assert "it would not fit" in out  # 4 bits fill the memory to the last byte, scales left out


def test_a_plan_in_float_switches_nothing_on():
    law = dataclasses.replace(LAWS["quest"], widths=(32,), ranges={}, evaluate=lambda setting: 3.0)
    shown = text(plan_budget(params=1e6, tokens=1e8, bits=32, loss_law=law))
    assert "float throughout, 1e+08 tokens" in shown and "config    --config.schedule.name=float\n" in shown
    assert "delayed" not in shown and "then quantized" not in shown


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        (
            ["--params", "1M", "--tokens", "1e6", "--memory", "1MB"],
            ["clipped", "8 bits", "params.*frac", "params.*quest"],
        ),
        (["--params", "1B", "--tokens", "1e15", "--bits", "4"], ["S = 2e.06.*extrapolated"]),
        (
            ["--params", "1B", "--tokens", "1e11", "--bits", "14", "--law", "kumar"],
            ["14 bits", "par", "tok", "14 bits"],
        ),
        (
            ["--params", "3e8", "--tokens", "2e10", "--bits", "4", "--law", "chen", "--group-size", "1024"],
            ["group_size"],
        ),
    ],
)
def test_outside_a_range_is_never_silent(arguments, patterns, capsys):
    code, out, lines = command(["plan-budget", *arguments], capsys)
    assert code == 0 and "plan " in out and len(lines) == len(patterns)
    for pattern in patterns:
        assert any(line.startswith("warning: ") and re.search(pattern, line) for line in lines), (pattern, lines)
    plan = json.loads(command(["plan-budget", *arguments, "--json"], capsys)[1])
    assert [f"warning: {text}" for text in plan["warnings"]] == lines


def test_a_width_that_a_law_has_no_loss_for_is_left_out():
    plan = plan_budget(params=1e8, tokens=2e9, memory=50e6, loss_law=LAWS["kumar"])
    assert plan.chosen.bits == 4 and plan.options[0].bits == 4
    assert plan.notes[0].startswith("3 bits left out: acts=3 bits: Kumar's law leaves no effective parameters")
    plan = plan_budget(params=1e8, tokens=2e9, memory=40e6, loss_law=LAWS["kumar"], acts=8)
    assert plan.chosen.bits == 3


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "--tokens, --compute: neither is given"),
        (["--tokens", "2e9", "--compute", "1e18", "--memory", "1MB"], "both are given"),
        (["--tokens", "2e9"], "--memory, --bits: neither is given"),
        (["--tokens", "2e9", "--bits", "4"], "--params is missing"),
        (["--tokens", "many", "--params", "1e8", "--memory", "1MB"], "--tokens 'many': give a number above 0"),
        (["--tokens", "2e9", "--params", "1e8", "--memory", "5MB"], "the weights at 1 bits take 12.5 MB"),
        (
            ["--tokens", "2e9", "--params", "1e8", "--bits", "5"],
            "5 bits: the law 'quest' has constants for 1, 2, 3, 4, 8",
        ),
        (["--tokens", "2e9", "--params", "1e8", "--bits", "-2"], "--bits -2: give a number above 0"),
        (["--tokens", "2e9", "--params", "1e8", "--bits", "4", "--law", "qest"], "--law 'qest'.*Did you mean 'quest'"),
        (["--tokens", "2e9", "--params", "1e8", "--bits", "4", "--acts", "8"], "use --law kumar"),
        (["--tokens", "2e9", "--params", "1e8", "--bits", "4", "--law", "no.json"], "'no.json' cannot be read"),
        (["fit", "runs"], "a command of its own: qtrain fit RUNS"),
        (["--tokns", "2e9"], "--tokns: no such flag.*Did you mean '--tokens'"),
    ],
)
def test_mistakes(arguments, pattern, capsys):
    code, out, lines = command(["plan-budget", *arguments], capsys)
    assert code == 2 and not out and len(lines) == 1 and re.search(pattern, lines[0]), lines


def test_help_lists_the_commands(capsys):
    for arguments, names in ((["--help"], ("plan-budget", "fit")), (["plan-budget", "--help"], ("--memory", "--law"))):
        code, out, _ = command(arguments, capsys)
        assert code == 0 and all(name in out for name in names)


@pytest.mark.parametrize("name", ["fraction", "quest", "kumar", "chen", "memory", "plan", "fit_fraction"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"qtrain.planner.{name}")
    failed, tried = doctest.testmod(module)
    assert tried and not failed
