"""A slow float64 reference of the nested layer and of learned widths, written from their definitions in numpy."""

import itertools
import math

import ml_dtypes
import numpy as np

LN2 = math.log(2.0)


def cast(value, dtype="float32"):
    return float(ml_dtypes.bfloat16(value)) if dtype == "bfloat16" else float(np.float32(value))


def groups(shape, per):
    """Lists of the flat indices that share a step, in the order of the steps."""
    ndim = len(shape)
    kept = {
        "tensor": [],
        "row": [0],
        "column": [ndim - 1],
        "spatial": list(range(ndim - 2)),
        "channel": [ndim - 2],
        "filter": [ndim - 1],
    }[per]
    found = {}
    for flat, index in enumerate(itertools.product(*(range(size) for size in shape))):
        found.setdefault(tuple(index[axis] for axis in kept), []).append(flat)
    return [np.array(found[key]) for key in sorted(found)]


def code(value, step, dtype):
    """The largest whole number whose level, rounded to the dtype, does not exceed the value."""
    k = math.floor(value / step) + 2
    while cast(k * step, dtype) > value:
        k -= 1
    return k


def nested(x, g, steps, per, *, threshold, epsilon, reduce, scale_gradient, dtype="float32"):
    """Codes, values, and the gradient of each step, by the definitions of methods §4."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    codes, values, gradients, widths = np.zeros(x.shape, int), np.zeros(x.shape), [], []
    for group, step in zip(groups(x.shape, per), np.ravel(steps), strict=True):
        step = cast(float(step), dtype)
        for i in group:
            codes.ravel()[i] = code(x.ravel()[i], step, dtype)
            values.ravel()[i] = cast(codes.ravel()[i] * step, dtype)
        own_codes, own_values, own_g = codes.ravel()[group], values.ravel()[group], g.ravel()[group]
        if scale_gradient == "loss":
            each = own_g * (own_codes - x.ravel()[group] / step)
        else:
            r = np.abs(own_g) / np.maximum(epsilon, np.abs(own_values))
            each = np.where(r < threshold, -np.tanh(threshold - r), 0.0) * np.abs(own_codes).max()
        gradients.append(each.mean() if reduce == "mean" else each.sum())
        widths.append(math.ceil(math.log2(own_codes.max() - own_codes.min() + 1)))
    return codes, values, np.array(gradients), float(np.mean(widths))


def learned_width(x, g, reach, width, bits, low, high, signed):
    """Of one group: codes, values, gradients of x, range and width, and which elements rounding leaves certain."""
    whole = min(min(max(int(np.rint(width)), low), high), bits)
    step = reach * 2.0 ** ((1 if signed else 0) - whole)
    sign = signed and whole == 1
    first, last = (-(2 ** (whole - 1)), 2 ** (whole - 1) - 1) if signed else (0, 2**whole - 1)
    first, last = (-1, 1) if sign else (first, last)
    out = {name: np.zeros(x.shape) for name in ("codes", "values", "dx")}
    d_reach = d_width = 0.0
    certain = np.ones(x.shape, bool)
    for i, (value, upstream) in enumerate(zip(x.ravel().astype(float), g.ravel().astype(float), strict=True)):
        u = value / step
        c = (1 if u >= 0 else -1) if sign else int(np.rint(min(max(u, first), last)))
        edges = [first, last, 0.0] if sign else [first, last, math.floor(u) + 0.5]
        certain.ravel()[i] = min(abs(u - edge) for edge in edges) > 1e-6 * abs(u)
        out["codes"].ravel()[i], out["values"].ravel()[i] = c, c * step
        if first < u < last:
            out["dx"].ravel()[i] = upstream
            d_reach += upstream * (c - u) * step / reach
            d_width += upstream * LN2 * (value - c * step)
        else:
            d_reach += upstream * c * step / reach
            d_width += upstream * LN2 * step * (u >= last) * (not sign)
    top = min(high, bits)
    if (width > top and d_width < 0) or (low > width and width <= top and d_width > 0):
        d_width = 0.0
    return {**out, "scale": d_reach, "width": d_width, "certain": certain, "whole": whole}
