"""Random numbers as a function of position, so that any batch can be made without the ones before it.

All come from Philox-4x64, whose raw words are a function of a key and a counter: `(seed, purpose)` is the key, and the
epoch or the example's position in the stream is the counter. Only raw words are used: they are the part of numpy's
generators that stays the same from release to release.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import functools

import numpy as np

_ORDER, _DRAWS, _PHASE, _SCENE = 1, 2, 3, 4

WORDS_PER_EXAMPLE = 4  # one Philox block


def _words(seed: int, purpose: int, counter: tuple[int, int], count: int) -> np.ndarray:
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([*counter, 0, 0], dtype=np.uint64)).random_raw(count)


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which `epoch` visits `size` examples: a permutation, int64 `[size]`, read-only.

    It sorts `size` random words. Epochs and seeds are independent of one another; 3 ms for 50,000 examples.
    """
    order = np.argsort(_words(seed, _ORDER, (0, epoch), size), kind="stable")
    order.flags.writeable = False
    return order


def example_draws(seed: int, first: int, count: int) -> np.ndarray:
    """Random words of the stream's examples `first … first + count − 1`: uint64 `[count, WORDS_PER_EXAMPLE]`."""
    return _words(seed, _DRAWS, (first, 0), count * WORDS_PER_EXAMPLE).reshape(count, WORDS_PER_EXAMPLE)


def epoch_phase(seed: int, epoch: int, high: int) -> int:
    """A whole number in `0 … high − 1`, uniform up to 2⁻³²: where an epoch's text windows begin."""
    return int(below(_words(seed, _PHASE, (epoch, 0), 1), high)[0])


def scene_words(seed: int, index: int, count: int) -> np.ndarray:
    """Random words of which a generated example is made: uint64 `[count]`, a function of `seed` and `index`."""
    return _words(seed, _SCENE, (0, index), count)


def below(words: np.ndarray, high: int) -> np.ndarray:
    """Maps random words to whole numbers in `0 … high − 1`: `⌊(w / 2⁶⁴)·high⌋` from the upper 32 bits; `high` ≤ 2³¹."""
    return (((words >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def unit(words: np.ndarray) -> np.ndarray:
    """Maps random words to float64 in [0, 1): `(w mod 2³²) / 2³²`, the lower 32 bits, which `below` does not use."""
    return (words & np.uint64(2**32 - 1)).astype(np.float64) / 2**32
