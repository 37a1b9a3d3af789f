"""The codes of one tensor as bytes, in the smaller of two encodings, and back."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from qtrain.export.pack import pack, packed_size, unpack

_CHUNK = 1 << 22  # codes at a time, so that temporaries stay small


class Storage(NamedTuple):
    """How the codes of one tensor are stored in the fewest bytes.

    Attributes:
      encoding: "range": c − min, in bits for max − min; "levels": the index of c among the distinct codes, which are
        stored as a table.
      width: bits of an element, 0 where all are equal.
      bytes: of the packed codes and the table.
    """

    encoding: Literal["range", "levels"]
    width: int
    bytes: int


def storage(count: int, lowest: int, highest: int, levels: int) -> Storage:
    """The smaller of the two encodings for `count` whole codes of `levels` distinct values from `lowest` to `highest`.

    >>> storage(1000, -1, 1, 2)
    Storage(encoding='levels', width=1, bytes=127)
    >>> storage(1000, -7, 7, 15)
    Storage(encoding='range', width=4, bytes=500)
    """
    width = (highest - lowest).bit_length()
    plain = Storage("range", width, packed_size(count, width))
    table = level_storage(count, levels, _entry_bytes(lowest, highest))
    return plain if plain.bytes <= table.bytes else table


def level_storage(count: int, levels: int, entry_bytes: int) -> Storage:
    """Indices into a table of `levels` entries, and the table."""
    width = max(levels - 1, 0).bit_length()
    return Storage("levels", width, packed_size(count, width) + levels * entry_bytes)


def distinct(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of `codes`, ascending (those that are not whole as float32), and how often each is."""
    codes = np.ravel(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        return np.unique(codes.astype(np.float32), return_counts=True)
    if codes.size:
        lowest, highest = int(codes.min()), int(codes.max())
        if highest - lowest < 1 << 20:  # counting is many times faster than sorting
            counts = np.zeros(highest - lowest + 1, np.int64)
            for first in range(0, codes.size, _CHUNK):
                counts += np.bincount(codes[first : first + _CHUNK].astype(np.int64) - lowest, minlength=counts.size)
            present = np.flatnonzero(counts)
            return present + lowest, counts[present]
    return np.unique(codes, return_counts=True)


def to_bytes(codes: np.ndarray) -> tuple[Storage, dict[str, np.ndarray], int]:
    """`codes` as what is stored of them: how, the arrays ``codes`` and ``levels`` (those there are), and the minimum.

    Raises:
      ValueError: for codes that are more than 2^32 apart.
    """
    values, _ = distinct(codes)
    flat = np.ravel(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        found, table, lowest = level_storage(flat.size, values.size, 4), values, 0
        flat = flat.astype(np.float32)
    else:
        lowest, highest = (int(values[0]), int(values[-1])) if flat.size else (0, 0)
        found = storage(flat.size, lowest, highest, values.size)
        table = values.astype(f"int{8 * _entry_bytes(lowest, highest)}")
    arrays = {}
    if found.encoding == "levels":
        arrays["levels"] = table
        flat, lowest = np.searchsorted(values, flat).astype(np.uint32), 0
    if found.width:
        arrays["codes"] = pack(flat, found.width, lowest)
    return found, arrays, lowest


def from_bytes(encoding: str, width: int, count: int, lowest: int, stream: Any, levels: Any) -> np.ndarray:
    """The codes that `to_bytes` stored, flat: the narrowest of int8, int16 and int32, or float32 of small floats."""
    unsigned = unpack(np.zeros(0, np.uint8) if stream is None else stream, width, count)
    if encoding == "levels":
        return levels[unsigned]
    highest = lowest + (int(unsigned.max()) if count else 0)
    bits = 8 * _entry_bytes(lowest, highest)
    codes = unsigned.astype(f"uint{bits}").view(f"int{bits}")
    codes += codes.dtype.type(lowest)  # modulo 2^bits, so that a difference of more than the largest does no harm
    return codes


def _entry_bytes(lowest: int, highest: int) -> int:
    """Of an entry of the table: the narrowest of int8, int16 and int32."""
    for size in (1, 2):
        if -(1 << 8 * size - 1) <= lowest and highest < 1 << 8 * size - 1:
            return size
    return 4
