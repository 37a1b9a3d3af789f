"""A slow float64 reference of the uniform quantizers, written from their definitions and sharing no code with them.

Which elements share a scale is worked out from index arithmetic, and each group is handled in a Python loop.
"""

import dataclasses
import functools

import numpy as np

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}


@functools.cache
def group_ids(shape, per, contracted=None):
    """An integer for each element; elements with the same integer share a scale."""
    ndim = len(shape)
    index = np.indices(shape)
    if per == "channel" and contracted is not None:
        kept = [index[axis] for axis in range(ndim) if axis not in {a % ndim for a in contracted}]
    elif per == "tensor" or (isinstance(per, str) and ndim < 2):
        kept = []
    elif per == "row":
        kept = [index[0]]
    elif per in ("channel", "column"):
        kept = [index[-1]]
    elif isinstance(per, tuple):
        kept = [index[axis] for axis in per]
    else:
        grouped = grouped_axis(ndim, contracted)
        kept = [index[axis] // (per if axis == grouped else 1) for axis in range(ndim)]
    if not kept or not index[0].size:
        return np.zeros(shape, int)
    rows = np.stack(kept, -1).reshape(-1, len(kept))
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(shape)


@functools.cache
def groups(shape, per, contracted=None):
    """Flat indices of the elements of each group."""
    ids = group_ids(shape, per, contracted).ravel()
    return [np.flatnonzero(ids == group) for group in range(ids.max(initial=-1) + 1)]


def grouped_axis(ndim, contracted):
    return max(a % ndim for a in contracted) if contracted else max(ndim - 2, 0)


def bounds(grid, bits):
    """Lowest and highest code."""
    if grid in ("affine", "unsigned"):
        return 0, 2**bits - 1
    high = 1 if grid == "sign" else max(2 ** (bits - 1) - 1, 1)
    return -high, high


def step(values, grid, bits):
    """Scale and offset of one group of elements, whose range is that of `values`."""
    smallest = float(np.finfo(np.float32).tiny)
    values = np.asarray(values, np.float64)
    largest = np.max(np.abs(values), initial=0.0)
    if grid == "affine":
        low = values.min() if values.size else 0.0
        return max((values.max(initial=low) - low) / (2**bits - 1), smallest), low
    if grid == "unsigned":
        return max(values.max(initial=0.0) / (2**bits - 1), smallest), 0.0
    if grid == "sign" or bits == 1:
        return max(np.abs(values).mean() if values.size else 0.0, smallest), 0.0
    return max(largest / (2 ** (bits - 1) - 1 + (0.5 if grid == "aqt" else 0.0)), smallest), 0.0


def steps(x, grid, per, bits, contracted=None, calibration=None):
    """Scale and offset of each element of `x`; the range is that of the same group of `calibration` where given."""
    x = np.asarray(x, np.float64)
    source = x if calibration is None else np.asarray(calibration, np.float64)
    scale, offset = np.ones(x.size), np.zeros(x.size)
    for group in groups(x.shape, per, contracted):
        scale[group], offset[group] = step(source.ravel()[group], grid, bits)
    return scale.reshape(x.shape), offset.reshape(x.shape)


@dataclasses.dataclass
class Rounded:
    """Codes; where they are certain, which is where float32's error in x/s cannot change them; and x/s itself."""

    codes: np.ndarray
    certain: np.ndarray
    in_steps: np.ndarray


def codes(x, grid, bits, scale, offset, rounding="nearest", noise=None):
    """Codes of `x` for given scales.

    Float32 rounds x − offset, 1/s and their product, by half a unit in the last place each: 1.5·2⁻²³ |x/s| in all.
    """
    in_steps = (np.asarray(x, np.float64) - offset) / scale
    low, high = bounds(grid, bits)
    if grid == "sign" or (bits == 1 and grid in ("symmetric", "aqt")):
        return Rounded(np.where(in_steps >= 0, 1, -1), np.ones(in_steps.shape, bool), in_steps)

    def clipped(y):
        if rounding == "nearest":
            whole = np.rint(y)
        elif rounding == "floor":
            whole = np.floor(y + np.abs(y) * 2.0**-21)  # so much below a grid point counts as on it
        else:
            whole = np.floor(y) + (noise < y - np.floor(y))
        return np.clip(whole, low, high).astype(np.int64)

    error = np.abs(in_steps) * 1.5 * 2.0**-23
    return Rounded(clipped(in_steps), clipped(in_steps - error) == clipped(in_steps + error), in_steps)


def fake_quantize(x, grid, per, bits, contracted=None, calibration=None):
    """x̂ in float64, rounded to nearest; the identity at 24 bits and above."""
    x = np.asarray(x, np.float64)
    if bits >= 24:
        return x
    scale, offset = steps(x, grid, per, bits, contracted, calibration)
    return codes(x, grid, bits, scale, offset).codes * scale + offset


def blocked(shape, per, contracted=None):
    """`shape` with the grouped axis split, for a group size."""
    if not isinstance(per, int):
        return tuple(shape)
    axis = grouped_axis(len(shape), contracted)
    return (*shape[:axis], shape[axis] // per, per, *shape[axis + 1 :])


def expand(scale, shape, per, contracted=None):
    """`scale` of `encode`, one value for each element."""
    return np.broadcast_to(np.asarray(scale, np.float64), blocked(shape, per, contracted)).reshape(shape)


def _mix(x, add=0):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) + np.uint32(add)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def hashed_uniform(seed, shape, salt=None):
    """The noise of stochastic rounding: a hash of the element's index in row-major order, in [0, 1)."""
    with np.errstate(over="ignore"):
        first = _mix(_mix(np.uint32(seed[0]) + np.uint32(0x9E3779B9)) ^ np.uint32(seed[1]))
        second = _mix(first + np.uint32(seed[0]))
        count = int(np.prod(shape, dtype=np.int64))
        counter = np.arange(count, dtype=np.uint32).reshape(shape) * np.uint32(0x9E3779B9) + first
        if salt is not None:
            counter = counter ^ np.broadcast_to(np.asarray(salt, np.float32), shape).view(np.uint32) >> np.uint32(8)
        return (_mix(counter, second) >> np.uint32(8)).astype(np.float64) * 2.0**-24
