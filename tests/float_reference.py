"""A slow float64 reference of the small floats: a search over every value that ml_dtypes says a format has."""

import functools

import ml_dtypes
import numpy as np
import quantizer_reference as reference

TYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4": ml_dtypes.float8_e3m4,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
}


def widths(name):
    """Bits of the format, and all below it that leave the exponent whole."""
    info = ml_dtypes.finfo(TYPES[name])
    return range(1 + info.nexp, info.bits + 1)


def mantissa_bits(name, bits):
    info = ml_dtypes.finfo(TYPES[name])
    return info.nmant - max(info.bits - bits, 0)


@functools.cache
def magnitudes(name, bits=8):
    """The values of at least 0 at a width, ascending: those of the format whose significand is short enough."""
    info = ml_dtypes.finfo(TYPES[name])
    values = np.arange(2**info.bits, dtype=np.uint8).view(TYPES[name]).astype(np.float64)
    values = np.unique(np.abs(values[np.isfinite(values)]))
    unit = np.maximum(np.floor(np.log2(np.where(values == 0, 1, values))), np.log2(float(info.smallest_normal)))
    return values[values * 2.0 ** (mantissa_bits(name, bits) - unit) % 1 == 0]


def cast(y, name, bits=8):
    """The nearest value, in a search over all of them; ties to even, beyond the largest the largest; NaN stays.

    The values of at least 0 are numbered from 0, so that an even number is an even significand. With no mantissa bit
    both neighbours are odd, unless one is 0, and IEEE 754 gives the tie to the larger.
    """
    y = np.asarray(y, np.float64)
    grid = magnitudes(name, bits)
    flat = np.minimum(np.abs(y), grid[-1]).ravel()
    above = np.clip(np.searchsorted(grid, flat), 1, len(grid) - 1)
    below = above - 1
    to_below, to_above = flat - grid[below], grid[above] - flat
    even = below % 2 == 0 if mantissa_bits(name, bits) else below == 0
    nearest = np.where((to_below < to_above) | ((to_below == to_above) & even), below, above)
    return np.where(np.isnan(flat), np.nan, np.copysign(grid[nearest], y.ravel())).reshape(y.shape)


def cast_with_noise(y, name, bits, u):
    """Of the two neighbours the upper one where u < (y − lower)/(upper − lower); and that fraction."""
    grid = magnitudes(name, bits)
    grid = np.concatenate([-grid[:0:-1], grid])
    flat = np.clip(np.asarray(y, np.float64), grid[0], grid[-1]).ravel()
    below = np.clip(np.searchsorted(grid, flat, side="right") - 1, 0, len(grid) - 2)
    fraction = ((flat - grid[below]) / (grid[below + 1] - grid[below])).reshape(np.shape(y))
    return grid[below + (u.ravel() < fraction.ravel())].reshape(np.shape(y)), fraction


def scales(x, name, bits, per, contracted=None, calibration=None):
    """M / largest for each element."""
    source = np.asarray(x if calibration is None else calibration, np.float64)
    scale = np.ones(np.size(x))
    for group in reference.groups(np.shape(x), per, contracted):
        largest = np.max(np.abs(source.ravel()[group]), initial=0.0)
        scale[group] = max(largest / magnitudes(name, bits)[-1], float(np.finfo(np.float32).tiny))
    return scale.reshape(np.shape(x))


def fake_quantize(x, name, bits, per, contracted=None):
    """x̂ in float64, rounded to nearest; the identity at 24 bits and above."""
    x = np.asarray(x, np.float64)
    if bits >= 24:
        return x
    scale = scales(x, name, bits, per, contracted)
    return cast(x / scale, name, bits) * scale
