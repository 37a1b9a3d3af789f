"""Integers of any width in a stream of bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

WIDEST = 32
"""The most bits that a code may take here."""

_CHUNK = 1 << 20  # codes at a time, a multiple of 8: temporaries stay at some megabytes, and in the cache


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take: ⌈count · width/8⌉."""
    return -(-count * width // 8)


def pack(codes: np.ndarray, width: int, minimum: int = 0) -> np.ndarray:
    """``codes − minimum`` as a stream of unsigned bits, little end first.

    Bit i of code k is bit (k·width + i) of the stream, and bit j of the stream is bit j mod 8 of byte ⌊j/8⌋. There is
    no padding between codes; what is left of the last byte is 0.

    Args:
      codes: whole numbers from `minimum` to minimum + 2^width − 1, any shape, taken in C order.
      width: 0 … 32 bits. 0 takes codes that are all `minimum`, and no bytes.
      minimum: the code that is stored as 0.

    Returns:
      uint8 [⌈count·width/8⌉].

    Raises:
      ValueError: for a width out of range, or a code that does not fit it.

    >>> print(pack(np.array([1, 2, 3, 4, 5]), 3))
    [209  88]
    >>> print(unpack(np.array([209, 88], np.uint8), 3, 5))
    [1 2 3 4 5]
    """
    _check_width(width)
    codes = np.ravel(codes)
    stream = np.zeros(packed_size(codes.size, width), np.uint8)
    for first in range(0, codes.size, _CHUNK):
        chunk = codes[first : first + _CHUNK].astype(np.int64) - minimum
        if chunk.min() < 0 or int(chunk.max()) >> width:
            raise ValueError(f"codes from {minimum} on do not all fit {width} bits")
        packed = _pack_eights(chunk.astype(np.uint64 if width > 24 else np.uint32), width)
        start = first // 8 * width
        packed = packed[: stream.size - start]
        stream[start : start + packed.size] = packed
    return stream


def unpack(stream: np.ndarray, width: int, count: int) -> np.ndarray:
    """The `count` codes that `pack` made a `stream` of, less its minimum: the narrowest of uint8, 16 and 32, [count].

    Raises:
      ValueError: for a stream of another length, or a width out of range.
    """
    _check_width(width)
    if stream.size != packed_size(count, width):
        raise ValueError(
            f"{stream.size} bytes do not hold {count} codes of {width} bits, which take {packed_size(count, width)}"
        )
    codes = np.zeros(count, np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32)
    if not width:
        return codes
    step = _CHUNK // 8 * width
    for first in range(0, count, _CHUNK):
        start = first // 8 * width
        chunk = codes[first : first + _CHUNK]
        chunk[:] = _unpack_eights(stream[start : start + step], width)[: chunk.size]
    return codes


def _pack_eights(codes: Any, width: int) -> np.ndarray:
    """Eight codes are `width` whole bytes: their bytes are put together for all eights at once."""
    eights = -(-codes.size // 8)
    codes = np.concatenate([codes, np.zeros(eights * 8 - codes.size, codes.dtype)]).reshape(eights, 8)
    word = codes.dtype.type
    packed: Any = np.zeros((width, eights), np.uint8)
    for place in range(8):
        start, offset = divmod(place * width, 8)
        shifted = codes[:, place] << word(offset)
        for byte in range(_bytes_touched(width, offset)):
            packed[start + byte] |= (shifted >> word(8 * byte)).astype(np.uint8)
    return np.ascontiguousarray(packed.T).reshape(-1)


def _unpack_eights(stream: np.ndarray, width: int) -> np.ndarray:
    eights = -(-stream.size // width)
    stream = np.concatenate([stream, np.zeros(eights * width - stream.size, np.uint8)]).reshape(eights, width)
    packed = np.ascontiguousarray(stream.T)
    word = np.uint64 if width > 24 else np.uint32
    codes = np.empty((eights, 8), np.uint32)
    for place in range(8):
        start, offset = divmod(place * width, 8)
        value: Any = np.zeros(eights, word)
        for byte in range(_bytes_touched(width, offset)):
            value |= packed[start + byte].astype(word) << word(8 * byte)
        codes[:, place] = (value >> word(offset)) & word((1 << width) - 1)
    return codes.reshape(-1)


def _bytes_touched(width: int, offset: int) -> int:
    return math.ceil((width + offset) / 8)


def _check_width(width: int) -> None:
    if not 0 <= width <= WIDEST:
        raise ValueError(f"width={width}: give 0 to {WIDEST} bits")
