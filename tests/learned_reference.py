"""A slow float64 reference of the learned quantizers, written from the papers' formulas, element by element."""

import dataclasses
import math

import ml_dtypes
import numpy as np

TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass
class Result:
    """Values, the gradient of x and of each parameter (one number for each group), and which elements are certain:
    those whose code and branch float32's rounding of the quotient cannot change."""

    values: np.ndarray
    dx: np.ndarray
    parameters: dict
    certain: np.ndarray
    codes: np.ndarray


def cast(value, dtype):
    return float(ml_dtypes.bfloat16(value)) if dtype == "bfloat16" else float(np.float32(value))


def bounds(bits, signed):
    """Lowest and highest code; of the sign grid −1 and 1."""
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def code_of(u, low, high, sign):
    if sign:
        return 1 if u >= 0 else -1
    return int(np.rint(min(max(u, low), high)))


def region(u, low, high):
    return -1 if u <= low else 1 if u >= high else 0


def _certain(u, low, high, sign):
    near = [u * (1 - 5e-7), u * (1 + 5e-7)]
    return len({(code_of(v, low, high, sign), region(v, low, high)) for v in near}) == 1


def _empty(x):
    shape = np.shape(x)
    return Result(np.zeros(shape), np.zeros(shape), {}, np.ones(shape, bool), np.zeros(shape, int))


def lsq(x, g, groups, params, bits, dtype, signed=True, offset=False, rescale=True, gradient_scale=True):
    """Esser et al. eqs. 1–3 and 5; the stored scale is that of width ``params["bits"]``."""
    out = _empty(x)
    low, high = bounds(bits, signed)
    sign = signed and bits == 1
    out.parameters = {name: np.zeros(len(groups)) for name in ["scale"] + ["offset"] * offset}
    for index, group in enumerate(groups):
        factor = 2.0 ** (float(params["bits"]) - bits) if rescale else 1.0
        step = cast(max(float(np.ravel(params["scale"])[index]) * factor, TINY), dtype)
        beta = cast(np.ravel(params["offset"])[index], dtype) if offset else 0.0
        for i in group:
            v, upstream = x.ravel()[i], g.ravel()[i]
            u = (v - beta) / step
            code, where = code_of(u, low, high, sign), region(u, low, high)
            out.values.ravel()[i] = code * step + beta
            out.codes.ravel()[i] = code
            out.certain.ravel()[i] = _certain(u, low, high, sign)
            out.dx.ravel()[i] = upstream if where == 0 else 0.0
            ds = code - u if where == 0 else (low if where < 0 else high)
            balance = 1 / math.sqrt(len(group) * high) if gradient_scale else 1.0
            out.parameters["scale"][index] += upstream * ds * factor * balance
            if offset and where:
                out.parameters["offset"][index] += upstream
    return out


def trs(x, g, groups, params, bits, dtype, signed=True, normalised=False):
    """Lee et al.: (1/γ)·rint(clip(γx/s, α, β)), times s or not."""
    out = _empty(x)
    low, high = bounds(bits, signed)
    sign = signed and bits == 1
    gamma = 2.0 ** (bits - 1 if signed else bits)
    out.parameters = {"scale": np.zeros(len(groups))}
    for index, group in enumerate(groups):
        s = cast(max(float(np.ravel(params["scale"])[index]) / gamma, TINY), dtype) * gamma
        exact = max(float(np.ravel(params["scale"])[index]), TINY)
        for i in group:
            v, upstream = x.ravel()[i], g.ravel()[i]
            u = gamma * v / s
            code, where = code_of(u, low, high, sign), region(u, low, high)
            out.values.ravel()[i] = code / gamma * (1.0 if normalised else s)
            out.codes.ravel()[i] = code
            out.certain.ravel()[i] = _certain(u, low, high, sign)
            inside = where == 0
            if normalised:
                out.dx.ravel()[i] = upstream / exact if inside else 0.0
                out.parameters["scale"][index] += -upstream * v / exact**2 if inside else 0.0
            else:
                out.dx.ravel()[i] = upstream if inside else 0.0
                out.parameters["scale"][index] += upstream * ((code - u) if inside else code) / gamma
    return out


def pact(x, g, groups, params, bits, dtype):
    """Choi et al. eqs. 1–3."""
    out = _empty(x)
    out.parameters = {"alpha": np.zeros(len(groups))}
    high = 2**bits - 1
    for index, group in enumerate(groups):
        alpha = max(float(np.ravel(params["alpha"])[index]), TINY)
        step = cast(alpha / high, dtype)
        for i in group:
            v, upstream = x.ravel()[i], g.ravel()[i]
            u = v / step
            out.codes.ravel()[i] = code_of(u, 0, high, False)
            out.values.ravel()[i] = out.codes.ravel()[i] * step
            out.certain.ravel()[i] = _certain(u, 0, high, False) and abs(v / alpha - 1) > 5e-7
            out.dx.ravel()[i] = upstream if 0 < v < alpha else 0.0
            out.parameters["alpha"][index] += upstream if v >= alpha else 0.0
    return out


def dorefa_acts(x, g, groups, params, bits, dtype):
    """Zhou et al. eq. 11."""
    out = _empty(x)
    n = 2**bits - 1
    step = cast(1.0 / n, dtype)
    for i in range(x.size):
        v = x.ravel()[i]
        out.codes.ravel()[i] = code_of(v / step, 0, n, False)
        out.values.ravel()[i] = out.codes.ravel()[i] * step
        out.certain.ravel()[i] = _certain(v / step, 0, n, False)
        out.dx.ravel()[i] = g.ravel()[i] if 0 < v < 1 else 0.0
    return out


def dorefa_weights(x, g, groups, params, bits, dtype):
    """Zhou et al. eqs. 8–10. With t = tanh w, M = |t_m| the largest: dw = (1 − t²)·(g/M − [w = w_m] sign t·Σgt/M²)."""
    out = _empty(x)
    n = 2**bits - 1
    for group in groups:
        w, upstream = x.ravel()[group], g.ravel()[group]
        if bits == 1:
            size = cast(max(np.mean(np.abs(w)), TINY), dtype)
            codes, values, dw, certain = np.where(w >= 0, 1, -1), np.where(w >= 0, size, -size), upstream, True
        else:
            t = np.tanh(w)
            largest = np.max(np.abs(t)) or 1.0
            step = cast(2.0 / n, dtype)
            u = (t / largest + 1) / step
            codes = np.array([code_of(each, 0, n, False) for each in u])
            values = codes * step - 1
            shares = (np.abs(t) == largest) / max(np.sum(np.abs(t) == largest), 1)
            dw = (1 - t**2) * (upstream / largest - shares * np.sign(t) * np.sum(upstream * t) / largest**2)
            # tanh and the quotient are rounded before the sum with 1, which is of size 1.
            certain = np.rint(u - 6e-7 / step) == np.rint(u + 6e-7 / step)
        out.codes.ravel()[group], out.values.ravel()[group] = codes, values
        out.dx.ravel()[group], out.certain.ravel()[group] = dw, certain
    return out


def ewgs(result, position, low, high, g, delta):
    """g_q·(1 + δ·sign(g_q)·(x_n − x_q)) for `result`, an elementwise quantizer with levels at positions low … high."""
    clipped = np.clip(position, low, high)
    apart = (clipped - np.rint(clipped)) / (high - low)
    return result.dx * (1 + delta * np.sign(result.dx) * apart)
