"""What the runs of `sweep.py` say: results.jsonl, figures and tables.

    python experiments/critical_periods/analyse.py runs/critical  # its folders FAMILY-PART: results.jsonl, PNGs, tables
    python experiments/critical_periods/analyse.py --table        # the tables, from results.jsonl

Lines of runs that the folder does not have stay as they are.
A line for each finished run: family, part, what it is called, seed, overrides, numbers, command, versions, hardware and
date. Sensitivity is, seed by seed, the accuracy of the run without the deficit, of the same length and learning rates,
less that of the run with it, in points; intervals are 95 % bootstrap intervals over seeds, of the difference
between early and late windows those of Student's t as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sweep import FAMILIES, ONSETS, PARTS, labelled

from qtrain.statistics import Interval, bootstrap_interval

HERE = Path(__file__).parent
SUMMARY = ("test_accuracy", "test_loss", "train_loss", "steps", "effective_bitops", "compilations", "wall_seconds")
FLAGS = "--vectorized --separate --share interleave"
COURSES = {
    "patterns": ("loss", "norms/gradient", "norms/update", "norms/update_ratio"),
    "fisher": ("loss", "fisher/trace", "fisher/trace_error", "fisher/trace_q_max", "fisher/trace_q_max_error"),
}
"""What is kept of the rows of a part, besides the traces of each kernel (seed 0)."""
Lines = list[dict[str, Any]]


def collected(folder: Path) -> Lines:
    """The lines of all finished runs below `folder`."""
    return [line for name in FAMILIES for part in PARTS for line in _of_sweep(folder / f"{name}-{part}", name, part)]


def _run(line: dict[str, Any]) -> tuple[str, ...]:
    """What tells a run from others; 0 steps are 0.0."""
    overrides = json.loads(json.dumps(line["overrides"]), parse_int=float)
    return line["family"], line["part"], json.dumps(overrides, sort_keys=True)


def _of_sweep(folder: Path, family: str, part: str) -> Iterator[dict[str, Any]]:
    if not (folder / "sweep.json").exists():
        return
    source = json.loads((folder / "sweep.json").read_text())
    expected = labelled(source["source"].partition(":")[2])
    for point, (label, overrides) in zip(source["points"], expected, strict=True):
        if point["overrides"] != json.loads(json.dumps(overrides)):
            raise SystemExit(f"{folder}: point {point['index']} is not what sweep.py says; was it changed since?")
        run = folder / point["name"]
        if (run / "DONE").exists():
            summary = json.loads((run / "summary.json").read_text())
            config = json.loads((run / "config.json").read_text())
            yield {
                "family": family,
                "part": part,
                **label,
                "overrides": point["overrides"],
                "numbers": {key: summary[key] for key in SUMMARY},
                "course": _course(run / "metrics.jsonl", part, by_layer=label["seed"] == 0),
                "command": f"qtrain sweep --config {source['source']} --workdir runs/critical/{folder.name} {FLAGS}",
                "versions": config["versions"],
                "hardware": f"{config['cores']} CPU cores" if config["backend"] == "cpu" else config["device"],
                "date": datetime.date.fromtimestamp((run / "DONE").stat().st_mtime).isoformat(),
            }


def _course(path: Path, part: str, by_layer: bool) -> dict[str, list[Any]]:
    """Name → its values, row by row; empty for parts that are about the end alone."""
    if part not in COURSES:
        return {}
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "train"]
    kernels = [name for name in rows[0] if name.startswith("fisher/") and name.endswith("kernel/trace")] * by_layer
    return {
        name: [_short(row.get(name)) for row in rows] for name in ("step", *COURSES[part], *kernels) if name in rows[0]
    }


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def select(lines: Lines, **labels: Any) -> dict[int, dict[str, Any]]:
    """Seed → the line with these labels."""
    return {line["seed"]: line for line in lines if all(line.get(key, ...) == value for key, value in labels.items())}


def accuracy(line: dict[str, Any]) -> float:
    """In percent."""
    return 100 * line["numbers"]["test_accuracy"]


def differences(with_: dict[int, Any], without: dict[int, Any], loss: bool = False) -> dict[int, float]:
    """Seed → accuracy without less accuracy with, in points, of the seeds that both have.

    Of the `loss`, finer where test images are few: that with less that without, in hundredths.
    """
    of = (lambda line: -100 * line["numbers"]["test_loss"]) if loss else accuracy
    return {seed: of(without[seed]) - of(with_[seed]) for seed in sorted(with_.keys() & without.keys())}


def sensitivity(with_: dict[int, Any], without: dict[int, Any], loss: bool = False) -> Interval | None:
    """The mean of `differences` over seeds; None where there are none."""
    found = differences(with_, without, loss)
    return bootstrap_interval(list(found.values())) if found else None


def by_seed(
    lines: Lines, family: str, part: str, kind: str, rate: str, loss: bool = False
) -> dict[int, dict[int, float]]:
    """Steps of the deficit ("removal"), or its onset ("window") → seed → difference to the run without it."""
    at = "removal" if part == "removal" else "onset"
    here = [line for line in lines if (line["family"], line["part"], line.get("rate")) == (family, part, rate)]
    found = {}
    for position in sorted({line[at] for line in here if line["kind"] == kind}):
        # Where the rates are those of the whole run whatever the onset, one run without the deficit serves all.
        shared = part == "window" and rate != "held"
        without = select(here, kind="none", **{at: None if shared else position})
        found[position] = differences(select(here, kind=kind, **{at: position}), without, loss)
    return {position: values for position, values in found.items() if values}


def curve(lines: Lines, family: str, part: str, kind: str, rate: str, loss: bool = False) -> list[tuple[int, Interval]]:
    """Sensitivity against the steps of the deficit ("removal"), or against its onset ("window")."""
    positions = by_seed(lines, family, part, kind, rate, loss)
    return [(position, bootstrap_interval(list(values.values()))) for position, values in positions.items()]


def early_less_late(lines: Lines, family: str, kind: str, rate: str, loss: bool = False) -> list[float] | None:
    """Sensitivity at the first three onsets less that at the next two, means, for each seed.

    The last window is left out: it ends with the run, and nothing recovers it. Above 0: an early period.
    """
    onsets = list(by_seed(lines, family, "window", kind, rate, loss).values())
    if len(onsets) != len(ONSETS):
        return None
    seeds = sorted(set.intersection(*map(set, onsets)))
    values = np.array([[one[seed] for one in onsets[:-1]] for seed in seeds])
    return list(values[:, :3].mean(axis=1) - values[:, 3:].mean(axis=1))


def half_width(values: list[float]) -> str:
    """Of the 95 % interval of Student's t around the mean: wide where there are three seeds, and right if normal."""
    if len(values) < 2:
        return "—"
    return f"{stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.2f}"


def shown(value: Interval | None) -> str:
    """``0.42 [0.10, 0.80]``, the ends where there are several seeds."""
    if value is None:
        return "—"
    return f"{value.estimate:.2f} [{value.low:.2f}, {value.high:.2f}]" if value else f"{value.estimate:.2f}"


def mean(lines: Iterable[dict[str, Any]]) -> str:
    """Mean accuracy and how many seeds."""
    values = [accuracy(line) for line in lines]
    return f"{np.mean(values):.2f} (n = {len(values)})" if values else "—"


def families(lines: Lines, part: str) -> list[str]:
    """Those with runs of a part."""
    return [name for name in FAMILIES if any((line["family"], line["part"]) == (name, part) for line in lines)]


def tables(lines: Lines) -> str:
    """All tables, Markdown."""
    found = []
    for part, at in (("removal", "first steps R"), ("window", "onset, step")):
        for family in families(lines, part):
            here = [line for line in lines if (line["family"], line["part"]) == (family, part)]
            series = list(dict.fromkeys((line["kind"], line["rate"]) for line in here if line["kind"] != "none"))
            plain = select(here, kind="none", rate="held" if part == "removal" else "decayed", **_first(part)).values()
            mean_loss = np.mean([line["numbers"]["test_loss"] for line in plain])
            for loss, what in ((False, "accuracy lost, points"), (True, "test loss gained, hundredths")):
                curves = {one: dict(curve(lines, family, part, *one, loss)) for one in series}
                places = sorted({place for one in curves.values() for place in one})
                rows = [
                    [f"{kind}, {rate}", *(shown(curves[kind, rate].get(x)) for x in places)] for kind, rate in series
                ]
                level = f"{mean_loss:.4f} (n = {len(plain)})" if loss else f"{mean(plain)} %"
                title = f"{part}, {family}: {what}; without a deficit {level}"
                found.append(markdown(title, [f"deficit, rate \\ {at}", *map(str, places)], rows))
    found.append(_early(lines))
    for family in families(lines, "patterns"):
        found.append(_patterns(lines, family))
    found += [text for family in families(lines, "fisher") for text in _fisher(lines, family)]
    for family in families(lines, "calibration"):
        here = [line for line in lines if (line["family"], line["part"]) == (family, "calibration")]
        plain = select(here, kind="none")
        cells = list(
            dict.fromkeys((line["kind"], line["low"], line["onset"]) for line in here if line["kind"] != "none")
        )
        rows = [
            [
                kind,
                "—" if low is None else str(low),
                str(onset),
                shown(sensitivity(select(here, kind=kind, low=low, onset=onset), plain)),
            ]
            for kind, low, onset in cells
        ]
        title = f"calibration, {family}: without a deficit {mean(plain.values())}"
        found.append(markdown(title, ["deficit", "bits", "onset", "sensitivity, points"], rows))
    return "\n\n".join(found)


def _early(lines: Lines) -> str:
    rows = []
    for family in families(lines, "window"):
        here = [line for line in lines if (line["family"], line["part"]) == (family, "window")]
        for kind, rate in dict.fromkeys((line["kind"], line["rate"]) for line in here if line["kind"] != "none"):
            both = [early_less_late(lines, family, kind, rate, loss) for loss in (False, True)]
            cells = [cell for one in both for cell in (shown(one and bootstrap_interval(one)), half_width(one or []))]
            rows.append([family, f"{kind}, {rate}", *cells])
    title = "window: sensitivity at the first three onsets less that at the next two (the last left out), by seed"
    return markdown(title, ["family", "deficit, rate", "accuracy, points", "t ±", "test loss, hundredths", "t ±"], rows)


def _first(part: str) -> dict[str, Any]:
    return {"removal": 0} if part == "removal" else {"onset": None}


def _patterns(lines: Lines, family: str) -> str:
    here = [line for line in lines if (line["family"], line["part"]) == (family, "patterns")]
    plain, rows = select(here, pattern="high"), []
    for pattern in dict.fromkeys(line["pattern"] for line in here):
        own = select(here, pattern=pattern)
        early = [early_means(line) for line in own.values()]
        norms = [f"{np.mean([one[name] for one in early]):.3g}" for name in COURSES["patterns"][1:]]
        rows.append([pattern, mean(own.values()), "" if pattern == "high" else shown(sensitivity(own, plain)), *norms])
    head = ["first fifth", "accuracy", "below high, points", "‖gradient‖", "‖update‖", "‖update‖/‖weights‖"]
    return markdown(f"patterns, {family}: norms are means over that fifth", head, rows)


def early_means(line: dict[str, Any]) -> dict[str, float]:
    """Norm → its mean over the rows of the first fifth of the run."""
    course, total = line["course"], line["numbers"]["steps"]
    kept = [index for index, step in enumerate(course["step"]) if step <= 0.2 * total]
    return {name: float(np.mean([course[name][i] for i in kept])) for name in COURSES["patterns"][1:]}


def _fisher(lines: Lines, family: str) -> Iterator[str]:
    here = [line for line in lines if (line["family"], line["part"]) == (family, "fisher")]
    rows = []
    for kind, onset, samples in dict.fromkeys((line["kind"], line["onset"], line["samples"]) for line in here):
        own = select(here, kind=kind, onset=onset, samples=samples)
        for name in ("fisher/trace", "fisher/trace_q_max"):
            values = np.mean([line["course"][name] for line in own.values()], axis=0)
            steps = next(iter(own.values()))["course"]["step"]
            peak = int(np.argmax(values))
            bits = "of the step" if name == "fisher/trace" else "8"
            label = kind if onset is None else f"{kind} from {onset}"
            which = f"{samples} label" if samples else "exact"
            halves = [f"{half.mean():.4g}" for half in np.array_split(values, 2)]
            rows.append([label, bits, which, f"{values[peak]:.4g} at {steps[peak]}", *halves, str(len(own))])
    head = ["deficit", "bits", "labels", "peak, step", "mean of the first half", "of the second", "n"]
    yield markdown(f"fisher, {family}: tr F", head, rows)
    ratios = [ratio for one in exact_and_sampled(here) for ratio in one[1] / one[0]]
    if ratios:
        yield (
            f"Sampled over exact trace, {family}, {len(ratios)} rows: mean {np.mean(ratios):.3f}, "
            f"standard deviation {np.std(ratios, ddof=1):.3f}."
        )


def exact_and_sampled(here: Lines) -> list[tuple[np.ndarray, np.ndarray]]:
    """Traces at 8 bits, row by row, of pairs of runs that differ in the estimator alone."""
    found = []
    for line in here:
        if line["samples"] == 0:
            other = select(here, kind=line["kind"], onset=line["onset"], samples=1).get(line["seed"])
            if other is not None:
                found.append(tuple(np.array(one["course"]["fisher/trace_q_max"]) for one in (line, other)))
    return found


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A titled table."""
    lines = [f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])]
    return "\n".join(lines)


def main() -> None:
    """Collect, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="with the folders FAMILY-PART of the sweeps")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.jsonl and the figures are written")
    parser.add_argument("--table", action="store_true", help="print the tables of results.jsonl")
    arguments = parser.parse_args()
    path = arguments.out / "results.jsonl"
    if arguments.folder is not None:
        lines = collected(arguments.folder)
        if not lines:
            raise SystemExit(f"{arguments.folder}: no finished run in a folder FAMILY-PART, such as mnist_mlp-window")
        from figures import draw

        measured = set(map(_run, lines))
        before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        lines = [line for line in before if _run(line) not in measured] + lines
        order = [(name, part) for name in FAMILIES for part in PARTS]
        lines.sort(key=lambda line: order.index((line["family"], line["part"])))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw(lines, arguments.out)
    elif not arguments.table:
        parser.error("give the folder of the sweeps, or --table")
    print(tables([json.loads(line) for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
