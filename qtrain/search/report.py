"""What was found, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """What `search_run` returned, for people."""
    widths = found["widths"]
    header = ("layer", "weights", "trace", "trace/weight", *(f"Ω at {width}" for width in widths), "bits")
    body = []
    for layer in found["layers"]:
        parameters = layer["parameters"].values()
        trace = sum(p["trace"] for p in parameters)
        body.append(
            (
                layer["path"] or "(root)",
                f"{layer['elements']:,}",
                f"{trace:.3g}",
                f"{trace / layer['elements']:.2e}" + ("*" if any(p["trace"] <= 0 for p in parameters) else ""),
                *(f"{layer['omega'][str(width)]:.2e}" for width in widths),
                str(found["assignment"][layer["path"]]),
            )
        )
    lines = _columns([header, *body])
    if any(p["trace"] <= 0 for layer in found["layers"] for p in layer["parameters"].values()):
        lines.append("* a trace that is not above zero: the smallest trace/weight above zero takes its place in Ω")
    fixed = [
        f"{row['path'] or '(root)'} ({row['weights']} bits)" if row["weights"] != "float" else f"{row['path']} (float)"
        for row in found["fixed"]
    ]
    if fixed:
        lines.append(f"not searched, counted in bytes and bitops: {', '.join(fixed)}")
    lines.append("")
    rows = [("", "average bits", "bytes", "BitOps", "Ω", "test loss", "test accuracy")]
    for name, row in (("chosen", found["result"]), *((f"{b} bits", row) for b, row in found["uniform"].items())):
        rows.append(
            (
                name,
                f"{row['bits']:.3f}",
                f"{row['bytes']:,.0f}",
                f"{row['bitops']:.4g}",
                f"{row['omega']:.3e}",
                f"{row['loss']:.4f}",
                f"{100 * row['accuracy']:.2f} %",
            )
        )
    hessian = found["hessian"]
    lines += _columns(rows)
    lines.append(
        f"budget {found['unit']}={found['budget']:.10g}; traces of the float model from {hessian['draws']} draws over "
        f"{hessian['batches']} batches; {len(found['front'])} points on the front; nothing was retrained"
    )
    return "\n".join(lines)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
