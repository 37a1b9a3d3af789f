"""A slow float64 reference of Double Rounding, written from the paper's formulas, element by element."""

import dataclasses
import math

import ml_dtypes
import numpy as np

TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass
class Result:
    """Values, codes of both widths, gradients of x and of each group's scale; and which elements are certain: those
    whose codes and branch float32's rounding of the quotient cannot change."""

    values: np.ndarray
    codes: np.ndarray
    high_codes: np.ndarray
    dx: np.ndarray
    scale: np.ndarray
    certain: np.ndarray


def half_even(value):
    """rint of one number, by cases."""
    below = math.floor(value)
    rest = value - below
    if rest == 0.5:
        return below + below % 2
    return below + (rest > 0.5)


def clip(value, low, high):
    return min(max(value, low), high)


def ends(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def codes_of(u, bits, high):
    """W_h and W_l of u = W/s_h."""
    stored = clip(half_even(clip(u, -(2.0**30), 2.0**30)), *ends(high))
    return stored, clip(half_even(stored / 2 ** (high - bits)), *ends(bits))


def region(u, bits, high):
    """−1, 0 or 1: below, between, above the ends of the grid of `bits`."""
    low, top = (end * 2 ** (high - bits) for end in ends(bits))
    return -1 if u <= low else 1 if u >= top else 0


def double_rounding(x, g, groups, scales, bits, high, dtype="float32", gradient_scale=True):
    """Ŵ_l = W_l·s_h·2^Δ; `scales` one for each group of flat indices."""
    shape, delta = np.shape(x), 2 ** (high - bits)
    out = Result(
        np.zeros(shape),
        np.zeros(shape, int),
        np.zeros(shape, int),
        np.zeros(shape),
        np.zeros(len(groups)),
        np.ones(shape, bool),
    )
    for index, group in enumerate(groups):
        exact = max(float(np.ravel(scales)[index]), TINY)
        s = float(ml_dtypes.bfloat16(exact)) if dtype == "bfloat16" else float(np.float32(exact))
        balance = 1 / math.sqrt(len(group) * ends(bits)[1]) if gradient_scale else 1.0
        for i in group:
            v, upstream = float(np.ravel(x)[i]), float(np.ravel(g)[i])
            u = v / s
            stored, code = codes_of(u, bits, high)
            where = region(u, bits, high)
            out.high_codes.ravel()[i], out.codes.ravel()[i] = stored, code
            out.values.ravel()[i] = code * s * delta
            out.dx.ravel()[i] = upstream if where == 0 else 0.0
            ds = delta * code - u if where == 0 else delta * ends(bits)[0 if where < 0 else 1]
            out.scale[index] += upstream * ds * balance
            near = [u * (1 - 5e-7), u * (1 + 5e-7)]
            out.certain.ravel()[i] = len({(codes_of(w, bits, high), region(w, bits, high)) for w in near}) == 1
    return out
