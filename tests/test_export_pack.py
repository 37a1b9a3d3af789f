"""Codes as bytes: packing at every width, the smaller of two encodings."""

import time
import tracemalloc

import numpy as np
import pytest

from qtrain.export.coding import distinct, from_bytes, storage, to_bytes
from qtrain.export.pack import pack, packed_size, unpack


def reference(codes, width):
    """Bit i of code k is bit (k·width + i) of the stream: written down bit by bit."""
    bits = [(int(code) >> i) & 1 for code in codes for i in range(width)]
    bits += [0] * (-len(bits) % 8)
    return np.array([sum(bit << j for j, bit in enumerate(bits[n : n + 8])) for n in range(0, len(bits), 8)], np.uint8)


@pytest.mark.parametrize("width", range(33))
def test_a_stream_holds_the_bits_in_order_and_unpacks_to_the_codes(width):
    random = np.random.default_rng(width)
    for count in (0, 1, 7, 8, 9, 61):
        codes = random.integers(0, 2**width, count, dtype=np.int64)
        codes[:1], codes[1:2] = 0, 2**width - 1
        stream = pack(codes, width)
        assert stream.size == packed_size(count, width)
        np.testing.assert_array_equal(stream, reference(codes, width))
        np.testing.assert_array_equal(unpack(stream, width, count), codes)


@pytest.mark.parametrize("width", [3, 8, 11, 27])
def test_pieces_that_are_packed_one_after_the_other_join(width, monkeypatch):
    monkeypatch.setattr("qtrain.export.pack._CHUNK", 16)
    codes = np.random.default_rng(0).integers(-5, 2**width - 5, (3, 41))
    stream = pack(codes, width, minimum=-5)
    np.testing.assert_array_equal(stream, reference(codes.ravel() + 5, width))
    np.testing.assert_array_equal(unpack(stream, width, codes.size).astype(np.int64) - 5, codes.ravel())


def test_what_does_not_fit_is_refused():
    for codes, width, minimum in (([8], 3, 0), ([-1], 3, 0), ([3, 12], 3, 4), ([1], 0, 0)):
        with pytest.raises(ValueError, match="do not all fit"):
            pack(np.array(codes), width, minimum)
    with pytest.raises(ValueError, match="give 0 to 32 bits"):
        pack(np.array([1]), 33)
    with pytest.raises(ValueError, match="2 bytes do not hold 9 codes of 3 bits, which take 4"):
        unpack(np.zeros(2, np.uint8), 3, 9)


@pytest.mark.parametrize("width", [3, 4, 9])
def test_millions_of_codes_take_moments_and_little_memory(width):
    codes = np.random.default_rng(0).integers(0, 2**width, 4_000_000).astype(np.int16)
    start = time.perf_counter()
    stream = pack(codes, width)
    found = unpack(stream, width, codes.size)
    seconds = time.perf_counter() - start
    np.testing.assert_array_equal(found, codes)
    assert seconds < 3.0  # about 0.1 on a machine that has nothing else to do
    tracemalloc.start()
    unpack(pack(codes, width), width, codes.size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < stream.nbytes + found.nbytes + 40e6


CODES = {
    "narrow": (np.array([-3, -1, 0, 2, 2]), ("range", 3)),
    "constant": (np.full(9, -4), ("range", 0)),
    "one": (np.array([7]), ("range", 0)),
    "empty": (np.zeros(0, np.int32), ("range", 0)),
    "signs": (np.resize([-1, 1, 1], 100), ("levels", 1)),
    "few signs": (np.array([-1, 1, 1]), ("range", 2)),
    "gaps": (np.resize([-100_000, 5, 6], 400), ("levels", 2)),
    "wide": (np.array([-(2**31), 2**31 - 1, 0, 5]), ("range", 32)),
    "far from zero": (np.array([1000, 1001, 1003]), ("range", 2)),
    "int8 all": (np.arange(-128, 128), ("range", 8)),
    "small floats": (np.resize(np.array([-448, 0.5, 1.5, 3], np.float32), 50), ("levels", 2)),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_come_back_from_the_smaller_encoding(name):
    codes, expected = CODES[name]
    narrowest = np.min_scalar_type(min(codes.min(initial=0), -codes.max(initial=0) - 1))
    # The narrowest dtype that holds the codes does not hold their differences.
    for dtype in (np.int32, narrowest) if codes.dtype.kind == "i" else (codes.dtype,):
        _check_coding(codes.astype(dtype), expected)


def _check_coding(codes, expected):
    how, arrays, lowest = to_bytes(codes)
    assert (how.encoding, how.width) == expected
    assert how.bytes == sum(array.nbytes for array in arrays.values())
    back = from_bytes(how.encoding, how.width, codes.size, lowest, arrays.get("codes"), arrays.get("levels"))
    np.testing.assert_array_equal(back, codes)
    if codes.size and codes.dtype.kind == "i":
        assert back.dtype.itemsize == np.min_scalar_type(min(codes.min(), -codes.max() - 1)).itemsize


def test_the_smaller_encoding_is_chosen():
    for count, lowest, highest, levels in ((100, 0, 1000, 3), (100, -1, 1, 2), (3, -1, 1, 2), (10_000, 0, 15, 16)):
        entry = 1 if highest < 128 else 2
        plain = packed_size(count, (highest - lowest).bit_length())
        table = packed_size(count, (levels - 1).bit_length()) + levels * entry
        assert storage(count, lowest, highest, levels).bytes == min(plain, table)


@pytest.mark.parametrize("spread", [30, 10**8])
def test_distinct_codes_are_counted(spread, monkeypatch):
    monkeypatch.setattr("qtrain.export.coding._CHUNK", 100)
    codes = np.random.default_rng(0).integers(-spread, spread, 1000).astype(np.int32) // 2
    values, counts = np.unique(codes, return_counts=True)
    for found, expected in zip(distinct(codes.reshape(10, 100)), (values, counts), strict=True):
        np.testing.assert_array_equal(found, expected)
