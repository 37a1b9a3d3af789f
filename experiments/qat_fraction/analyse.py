"""From the runs of this study alone: results.jsonl, figures, tables and the fitted fraction law.

python experiments/qat_fraction/analyse.py runs/qat_fraction     # reads the runs, writes results.jsonl and the PNGs
python experiments/qat_fraction/analyse.py --table               # the tables, from results.jsonl

Lines of runs that the folder does not have stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grid
import numpy as np

from qtrain.planner import FractionLaw, Row, fit
from qtrain.planner.runs import FLOAT_BITS, read_runs
from qtrain.report.runs import find_runs
from qtrain.statistics import bootstrap_interval
from qtrain.workdir import CONFIG, DONE, read_config, read_summary

HERE = Path(__file__).parent
ARMS = (*grid.ARMS, "fixed")
LABELS = {"fixed": "fixed decay"}
DECAY = grid.COOLDOWN / 100
RESULTS = HERE / "results.jsonl"
NUMBERS = ("test_loss_scheduled", "test_accuracy_scheduled", "test_loss_float", "parameters", "steps")
COMMAND = (
    "qtrain sweep --config experiments/qat_fraction/{family}.py{controls} --workdir runs/qat_fraction/{sweep} "
    "--vectorized --separate"
)
CONTROLS = "-controls"
"""How the folder of a family's `grid.controls` ends."""


def main() -> None:
    """Read the runs, or the lines there are; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", help="the folder with a sweep for each family below it")
    parser.add_argument("--table", action="store_true", help="from results.jsonl alone")
    arguments = parser.parse_args()
    if arguments.runs:
        lines = list(read(Path(arguments.runs)))
        measured = set(map(_run, lines))
        before = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
        lines += [line for line in before if _run(line) not in measured]
        lines.sort(key=_run)
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw(lines)
    elif arguments.table:
        lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    else:
        parser.error("give the folder of the runs, or --table")
    print(tables(lines))


def _run(line: dict[str, Any]) -> tuple[str, bool, str]:
    """What tells a run from others: family, whether it is a control, and its name."""
    return line["family"], line["arm"] in ("fixed", "float"), line["run"]


def read(root: Path) -> Iterable[dict[str, Any]]:
    """A line for each finished run."""
    for sweep in sorted(path.name for path in root.iterdir() if path.is_dir()):
        family, controls = sweep.removesuffix(CONTROLS), sweep.endswith(CONTROLS)
        for folder in find_runs([root / sweep]):
            if not (folder / DONE).exists():
                print(f"{folder} has not finished: left out")
                continue
            ((row,), _), config, summary = read_runs([folder]), read_config(folder), read_summary(folder)
            environment = json.loads((folder / CONFIG).read_text())
            # The decay of a float run is as long as the quantized part that it is compared with. One quantized step of
            # so many is rounding after training.
            fraction = config["optimizer"]["decay_percent"] / 100 if row.bits >= FLOAT_BITS else row.fraction
            fraction = 0.0 if fraction * summary["steps"] < 1.5 else fraction
            if controls:
                arm = "float" if row.bits >= FLOAT_BITS else "fixed"
            else:
                arm = "cooldown" if config["optimizer"]["restart_percent"] else "fused"
                arm = "both" if fraction in (0.0, 1.0) else arm
            yield {
                "family": family,
                "run": folder.name,
                "command": COMMAND.format(family=family, controls=":controls" * controls, sweep=sweep),
                "bits": row.bits,
                "fraction": fraction,
                "arm": arm,
                "seed": config["seed"],
                "params": row.params,
                "tokens": row.tokens,
                **{name: summary[name] for name in NUMBERS},
                "versions": environment["versions"],
                "hardware": f"{environment['device']}, {environment.get('cores')} cores, {platform.machine()}",
                "date": datetime.datetime.fromtimestamp((folder / DONE).stat().st_mtime).date().isoformat(),
            }


def cells(lines: Sequence[dict[str, Any]]) -> dict[Any, dict[str, dict[float, dict[int, float]]]]:
    """(family, params, tokens, bits) → arm → fraction → seed → loss; what belongs to several arms is in each."""
    found: Any = defaultdict(lambda: {arm: defaultdict(dict) for arm in ARMS})
    for line in lines:
        key = line["family"], line["params"], line["tokens"], line["bits"]
        for arm in ARMS if line["arm"] != "float" else ():
            if belongs(line, arm):
                found[key][arm][line["fraction"]][line["seed"]] = line["test_loss_scheduled"]
    return dict(sorted(found.items()))


def belongs(line: dict[str, Any], arm: str) -> bool:
    """Whether a run is one of an arm: without a quantized part, and with nothing else, the arms are the same.

    With one decay for all (fixed), a part of that length is a run of the fused arm.
    """
    if arm != "fixed":
        return line["arm"] in (arm, "both")
    return line["arm"] == "fixed" or line["fraction"] == 0 or (line["arm"] == "fused" and line["fraction"] == DECAY)


def swept(losses: dict[float, Any]) -> bool:
    """Whether an arm has runs of its own there, and not what all arms share alone."""
    return len([fraction for fraction in losses if 0 < fraction < 1]) > 1


def rows(lines: Sequence[dict[str, Any]], arm: str) -> list[Row]:
    """What `fit` takes, of one arm."""
    return [
        Row(
            line["params"],
            line["tokens"],
            line["bits"],
            line["test_loss_scheduled"],
            line["fraction"],
            f"{line['seed']}",
        )
        for line in lines
        if belongs(line, arm)
    ]


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Losses by fraction; fused against cooldown; the measured optima against the law."""
    parts = []
    fractions = sorted({round(line["fraction"], 3) for line in lines})
    header = ["family", "tokens", "bits", "arm", "n", *(f"{100 * fraction:g} %" for fraction in fractions)]
    losses = [_row(header), _row(["---"] * len(header))]
    compared = [
        "| family | tokens | bits | cooldown − fused, loss, mean over fractions [95 %] | n |",
        _row(["---"] * 5),
    ]
    for (family, _, tokens, bits), arms in cells(lines).items():
        for arm, sweep in arms.items():
            if not swept(sweep):
                continue
            means = {round(fraction, 3): np.mean(list(seeds.values())) for fraction, seeds in sweep.items()}
            best = min(means.values())
            shown = [f"{m:.4f}" if (m := means.get(fraction)) is not None else "–" for fraction in fractions]
            shown = [f"**{text}**" if means.get(f) == best else text for f, text in zip(fractions, shown, strict=True)]
            n = min(len(seeds) for seeds in sweep.values())
            losses.append(_row([family, f"{tokens:.3g}", str(bits), arm, str(n), *shown]))
        differences = _differences(arms)
        if differences:
            interval = bootstrap_interval(differences)
            text = f"{interval.estimate:+.4f}{_ends(interval.low, interval.high, '+.4f')}"
            compared.append(_row([family, f"{tokens:.3g}", str(bits), text, str(interval.n)]))
    parts += ["\n".join(losses), _controls(lines), "\n".join(compared)]
    parts += [_optima(lines, arm) for arm in ARMS]
    return "\n\n".join(part for part in parts if part)


def _differences(arms: dict[str, dict[float, dict[int, float]]]) -> list[float]:
    """Of each seed: cooldown − fused, the mean over the fractions at which they differ."""
    by_seed = defaultdict(list)
    for fraction, seeds in arms["cooldown"].items():
        for seed, loss in seeds.items():
            if 0 < fraction < 1 and seed in arms["fused"].get(fraction, {}):
                by_seed[seed].append(loss - arms["fused"][fraction][seed])
    return [float(np.mean(values)) for values in by_seed.values()]


def _controls(lines: Sequence[dict[str, Any]]) -> str:
    """Of the fused arm, at each fraction: the loss less that of a float run with the same decay of the rate."""
    plain = {(x["family"], x["steps"], x["seed"], round(x["fraction"], 3)): x for x in lines if x["arm"] == "float"}
    fractions = sorted({fraction for *_, fraction in plain})
    found = [_row(["family", "bits", "loss", "n", *(f"{100 * fraction:g} %" for fraction in fractions)])]
    found.append(_row(["---"] * (4 + len(fractions))))
    for family, steps in sorted({key[:2] for key in plain}):
        seeds = sorted({seed for name, length, seed, _ in plain if (name, length) == (family, steps)})
        floats = [[plain[family, steps, seed, f]["test_loss_scheduled"] for seed in seeds] for f in fractions]
        found.append(_row([family, "float", "test loss", str(len(seeds)), *(f"{np.mean(v):.4f}" for v in floats)]))
        mine = [x for x in lines if (x["family"], x["steps"]) == (family, steps) and belongs(x, "fused")]
        for bits in sorted({x["bits"] for x in mine}, reverse=True):
            at = {(x["seed"], round(x["fraction"], 3)): x["test_loss_scheduled"] for x in mine if x["bits"] == bits}
            cost = [
                [at[s, f] - v for s, v in zip(seeds, row, strict=True)]
                for f, row in zip(fractions, floats, strict=True)
            ]
            found.append(
                _row([family, str(bits), "above float", str(len(seeds)), *(f"{np.mean(v):+.4f}" for v in cost)])
            )
    return "\n".join(found) if plain else ""


def _optima(lines: Sequence[dict[str, Any]], arm: str) -> str:
    """The measured optimum of each sweep beside f*, and the constant fitted to all of them."""
    law = FractionLaw()
    found = [_row(["arm", "family", "tokens", "bits", "S", "optimum [95 % over seeds]", "f* (published a)", "remark"])]
    found.append(_row(["---"] * 8))
    for family in sorted({line["family"] for line in lines}):
        mine = [line for line in lines if line["family"] == family and line["arm"] != "float"]
        if arm == "fixed":
            mine = [line for line in mine if line["steps"] in {x["steps"] for x in mine if x["arm"] == "fixed"}]
        if not any(line["arm"] == arm for line in mine):
            continue
        fitted = fit(rows(mine, arm))
        if fitted.fraction is None:
            found.append(_row([arm, family, "", "", "", "", "", "; ".join(fitted.notes)]))
            continue
        for cell in fitted.fraction.cells:
            if len(cell.fractions) < 4:
                continue
            remark = [f"at the {cell.edge} fraction"] if cell.edge else []
            remark += ["S clipped to 20"] if cell.tokens_per_byte < law.low else []
            shown = f"{cell.optimum:.3f}{_ends(cell.low, cell.high, '.3f')}"
            numbers = [f"{cell.tokens:.3g}", str(cell.bits), f"{cell.tokens_per_byte:.3g}", shown]
            found.append(_row([arm, family, *numbers, f"{law(cell.tokens_per_byte):.3f}", ", ".join(remark)]))
        a = fitted.fraction.constant
        text = f"a = {a.value:.2f}{_ends(a.low, a.high, '.2f')}"
        found.append(_row([arm, family, "", "", "", text, "a = 6.73", "" if a.identified else "not identified"]))
    return "\n".join(found)


def _ends(low: float, high: float, form: str) -> str:
    """An interval, where there is one."""
    return f" [{low:{form}}, {high:{form}}]" if np.isfinite([low, high]).all() else ""


def _row(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def draw(lines: Sequence[dict[str, Any]]) -> None:
    """A picture for each family: loss against the fraction, a panel for each length and width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    law = FractionLaw()
    found = cells(lines)
    for family in sorted({key[0] for key in found}):
        mine = {key: arms for key, arms in found.items() if key[0] == family}
        columns = len({bits for _, _, _, bits in mine})  # a row for each length
        rows = len(mine) // columns
        figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), squeeze=False)
        for axis, ((_, params, tokens, bits), arms) in zip(axes.flat, mine.items(), strict=True):
            for (arm, sweep), colour in zip(arms.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True):
                if not swept(sweep):
                    continue
                order = [fraction for fraction in sorted(sweep) if fraction > 0]  # rounding alone is off the scale
                values = [list(sweep[fraction].values()) for fraction in order]
                axis.plot(order, [np.mean(v) for v in values], "o-", ms=3, color=colour, label=LABELS.get(arm, arm))
                axis.fill_between(order, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=colour)
            ratio = tokens / (params * bits / 8)
            axis.axvline(law(ratio), color="grey", ls="--", lw=1, label="f*")
            axis.set_title(f"{bits} bits, {tokens:.2g} tokens, S {ratio:.0f}", fontsize=8)
            axis.set_xlabel("share of training quantized")
            axis.tick_params(labelsize=7)
        for row in axes:
            row[0].set_ylabel("test loss at these bits")
        axes[-1][0].legend(fontsize=7)  # the longest runs have both arms
        figure.suptitle(f"{family}: mean and range over seeds", fontsize=9)
        figure.tight_layout()
        figure.savefig(HERE / f"{family}.png", dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
