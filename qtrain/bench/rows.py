"""A case's measurements as rows of plain data, and as a table."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import jax
import numpy as np

from qtrain.bench import REFERENCE
from qtrain.bench.arms import Runner
from qtrain.bench.suites import WIDTHS
from qtrain.bench.timing import Times

Row = dict[str, Any]

_ENVIRONMENT = ("XLA_FLAGS", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "JAX_DEFAULT_MATMUL_PRECISION", "OMP_NUM_THREADS")


def rows(found: list[Runner], times: dict[int, Times], repeats: int) -> list[Row]:
    """One row a runner.

    ``suite``, ``case``, ``arm``, ``bits`` (the case's, also of the float arms it is compared with; "2-8" in suite
    schedule), ``step_ms`` (median), ``ratio_to_float32`` (median over the rounds; 1 for the baseline itself),
    ``compile_s`` and ``compilations`` (all programs of the arm together), ``peak_bytes`` (temporaries of the largest of
    them) and ``note``; null where there is no measurement, and the note then says why. Further: quartiles and range of
    the ratio, ``ratio_to_materialised`` where there is that baseline, loss and parameter change of the first step, what
    the products run on, and where and when it was measured.
    """
    reference = next((times[id(runner)] for runner in found if runner.arm == REFERENCE), None)
    return [_row(runner, times.get(id(runner)), reference, repeats) for runner in found]


def _row(runner: Runner, times: Times | None, reference: Times | None, repeats: int) -> Row:
    case = runner.case
    schedule = case.suite == "schedule"
    row: Row = {
        "suite": case.suite,
        "case": runner.how if schedule else case.name,
        "arm": runner.arm,
        "bits": f"{WIDTHS[0]}-{WIDTHS[-1]}" if schedule else case.bits,
        "step_ms": None,
        "ratio_to_float32": None,
        "compile_s": None,
        "compilations": 0,
        "peak_bytes": None,
        "note": runner.note,
    }
    if times is not None:
        ratios = list(times.ratios.values())
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        requested, compiled = _total(runner, "requested"), _total(runner, "compiled")
        peaks = [program.peak_bytes for program in runner.programs if program.peak_bytes is not None]
        row |= {
            "step_ms": _round(1e3 * float(np.median(times.seconds))),
            "ratio_to_float32": _round(middle),
            "compile_s": _round(sum(program.seconds for program in runner.programs)),
            "compilations": len(runner.programs),
            "peak_bytes": max(peaks, default=None),
            "ratio_quartiles": [_round(low), _round(high)],
            "ratio_range": [_round(min(ratios)), _round(max(ratios))],
            "step_ms_range": [_round(1e3 * min(times.seconds)), _round(1e3 * max(times.seconds))],
            "rounds": len(ratios),
            "steps_per_round": repeats * len(runner.visits),
            "first_loss": runner.first_loss,
            "first_update_norm": runner.first_update_norm,
            "products": {"requested": requested, "compiled": compiled},
        }
        if set(requested) != {"float32"} and compiled:
            # A narrow product that the backend has widened gains nothing, and only the optimized program shows it.
            counts = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(compiled.items()))
            row["note"] += f"; products as compiled: {counts}"
        if schedule:
            row["visit_ms"] = _round(1e3 * float(np.median(times.seconds)) * len(runner.visits))
        if reference is not None:
            against = [ratio / reference.ratios[number] for number, ratio in times.ratios.items()]
            row["ratio_to_materialised"] = _round(np.median(against))
    if schedule:
        row["model"] = case.name
    return row | where()


def where() -> Row:
    """The software, the machine and the day."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": _device(),
        "date": datetime.date.today().isoformat(),
        "environment": environment,
    }


def _device() -> str:
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def _total(runner: Runner, kind: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for program in runner.programs:
        for dtype, count in getattr(program, kind).items():
            total[dtype] = total.get(dtype, 0) + count
    return total


def _round(value: Any) -> float:
    """Four significant digits."""
    return float(f"{float(value):.4g}")


_COLUMNS = ("suite", "case", "arm", "bits", "ms/step", "ratio", "quartiles", "compile s", "programs", "MB", "note")
_WIDTHS = (8, 33, 20, 4, 9, 6, 13, 9, 8, 7, 0)


def table(found: list[Row], markdown: bool = False, header: bool = True) -> str:
    """The rows as text, or as a Markdown table."""
    lines = [_line(_COLUMNS, markdown)] if header else []
    if header and markdown:
        lines.append("|" + "---|" * len(_COLUMNS))
    return "\n".join(lines + [_line(_cells(row), markdown) for row in found])


def _cells(row: Row) -> tuple[str, ...]:
    quartiles = row.get("ratio_quartiles")
    peak = row["peak_bytes"]
    return (
        row["suite"],
        row["case"],
        row["arm"],
        str(row["bits"]),
        _number(row["step_ms"], 3),
        _number(row["ratio_to_float32"], 2),
        "-" if quartiles is None else f"{quartiles[0]:.2f} to {quartiles[1]:.2f}",
        _number(row["compile_s"], 2),
        str(row["compilations"]),
        "-" if peak is None else f"{peak / 1e6:.1f}",
        row["note"],
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(cells: tuple[str, ...], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    left = 3  # words; numbers stand to the right
    padded = [
        cell.ljust(width) if column < left or not width else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]
    return "  ".join(padded).rstrip()
