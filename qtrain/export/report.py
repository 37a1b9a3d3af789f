"""What an export reports: bytes of each parameter, of the file, and of what it replaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Row:
    """What storing one parameter takes: elements, bits it was quantized to, stored width, bytes with its scales."""

    name: str
    elements: int
    bits: int
    width: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `save` wrote.

    Attributes:
      path, bytes: the file and its size on disk, metadata and unquantized variables included.
      weight_bytes: of the quantized parameters alone: packed codes, tables, scales and offsets.
      weight_float_bytes, float_bytes: in float32, of the quantized parameters and of all variables that are stored.
      rows: one for each quantized parameter.
      difference: the largest absolute difference of logits between the exported model and the evaluation of the
        original on a batch, at any of the widths of `separate`, or of the one it was exported at; 0: bit-identical.
      separate: width → bytes of the tensors that a model of that width alone takes: packed codes, scales, norms and all
        else; empty for a file of one width.
      shared: bytes of the tensors of the one file that stands for all of these.
      remark: what keeps the file from giving other widths, though its quantizers could; "" for nothing.
    """

    path: str
    bytes: int
    weight_bytes: int
    weight_float_bytes: int
    float_bytes: int
    rows: tuple[Row, ...]
    difference: float
    separate: Mapping[int, int] = dataclasses.field(default_factory=dict)
    shared: int = 0
    remark: str = ""

    @property
    def compression(self) -> float:
        """Float32 bytes of the quantized parameters for each byte that storing them takes."""
        return self.weight_float_bytes / max(self.weight_bytes, 1)

    def __str__(self) -> str:
        header = ("parameter", "elements", "bits", "stored bits", "bytes")
        body = [(row.name, f"{row.elements:,}", f"{row.bits}", f"{row.width}", f"{row.bytes:,}") for row in self.rows]
        widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]

        def line(cells: tuple[str, ...]) -> str:
            first, *others = zip(cells, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

        same = "bit-identical" if not self.difference else f"within {self.difference:.3g} of the original's"
        lines = [self._widths()] if self.separate else []
        return "\n".join(
            [
                *map(line, (header, *body)),
                f"quantized parameters: {self.weight_bytes:,} bytes with their scales, float32 "
                f"{self.weight_float_bytes:,} ({self.compression:.2f} times smaller)",
                f"{self.path}: {self.bytes:,} bytes on disk, float32 variables {self.float_bytes:,} "
                f"({self.float_bytes / self.bytes:.2f} times smaller); logits {same}",
                *lines,
                *filter(None, [self.remark]),
            ]
        )

    def _widths(self) -> str:
        widths = ", ".join(map(str, self.separate))
        sizes = list(self.separate.values())
        total, each = sum(sizes), ", ".join(f"{size:,}" for size in sizes)
        return (
            f"one model for {widths} bits: {self.shared:,} bytes of tensors; separate models {each}, together "
            f"{total:,} ({total / self.shared:.2f} times as much)"
        )
