"""Learned quantizers against a reference in numpy: values, codes, and the gradient of every parameter."""

import functools

import jax
import jax.numpy as jnp
import learned_reference as reference
import numpy as np
import pytest
import quantizer_reference

from qtrain.quantizers import EWGS, LSQ, PACT, TRS, DoReFa, Uniform, distance_to_transition

BITS = (1, 2, 3, 4, 8)
SHAPE = (6, 8, 5)
VIEWS = [
    ("tensor", None, "float32"),
    ("tensor", None, "bfloat16"),
    ("channel", (0, 1), "float32"),
    ("channel", (0, 1), "bfloat16"),
    (4, (1,), "float32"),
]


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, G = normal(0), normal(1)

CASES = {
    "lsq signed": (LSQ(), reference.lsq, {}),
    "lsq unsigned": (LSQ(signed=False), reference.lsq, {"signed": False}),
    "lsq+ unsigned": (LSQ(signed=False, offset=True), reference.lsq, {"signed": False, "offset": True}),
    "lsq+ signed": (LSQ(offset=True), reference.lsq, {"offset": True}),
    "lsq keep": (
        LSQ(across_bits="keep", gradient_scale=False),
        reference.lsq,
        {"rescale": False, "gradient_scale": False},
    ),
    "trs signed": (TRS(), reference.trs, {}),
    "trs unsigned": (TRS(signed=False), reference.trs, {"signed": False}),
    "trs normalised": (TRS(normalised=True), reference.trs, {"normalised": True}),
    "trs unsigned normalised": (
        TRS(signed=False, normalised=True),
        reference.trs,
        {"signed": False, "normalised": True},
    ),
    "pact": (PACT(), reference.pact, {}),
    "dorefa weights": (DoReFa("weights"), reference.dorefa_weights, {}),
    "dorefa acts": (DoReFa("acts"), reference.dorefa_acts, {}),
}


WITH_OFFSET = ("lsq+ unsigned", "lsq+ signed", "dorefa weights")


@functools.cache
def variants(name):
    """The quantizer at each granularity and dtype, with parameters of its shape that clip at both ends."""
    quantizer, cases = CASES[name][0], []
    for per, axes, dtype in VIEWS:
        if quantizer == DoReFa("acts") and per != "tensor":
            continue
        q = type(quantizer)(**{**vars(quantizer), "per": per})
        params = q.init(jnp.asarray(X), 3, axes=axes)
        rng = np.random.default_rng(2)
        for name, value in params.items():
            if name == "alpha":
                params[name] = jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
            elif name != "bits":
                params[name] = jnp.asarray(value * rng.uniform(0.5, 1.0, value.shape), jnp.float32)
        cases.append((q, axes, dtype, params))
    return cases


@functools.cache
def program(name):
    @jax.jit
    def run(bits, gs):
        results = []
        for (q, axes, dtype, params), g in zip(variants(name), gs, strict=True):
            x = jnp.asarray(X, dtype)
            y, vjp = jax.vjp(lambda x, p, b, q=q, axes=axes: q(x, b, p, axes=axes), x, params, bits)
            codes, scale = q.encode(x, bits, params, axes=axes)
            results.append(
                {
                    "y": y,
                    "gradients": vjp(g.astype(dtype)),
                    "codes": codes,
                    "decoded": q.decode(codes, scale, axes=axes),
                    "position": q.position(x, bits, params, axes=axes),
                    "distance": distance_to_transition(q, x, bits, params, axes=axes),
                    "bounds": q.bounds(bits),
                    "transitions": q.transitions(bits),
                    "scale": q.scale(x, bits, params, axes=axes),
                }
            )
        return results

    return run


def expected(name, q, axes, dtype, params, bits):
    _, function, options = CASES[name]
    x = np.asarray(jnp.asarray(X, dtype), np.float64)
    groups = quantizer_reference.groups(SHAPE, q.per, axes)
    params = {key: np.asarray(value) for key, value in params.items()}
    g = np.asarray(jnp.asarray(G, dtype), np.float64)
    certain = function(x, g, groups, params, bits, dtype, **options).certain
    assert np.mean(certain) > 0.9
    return function(x, g * certain, groups, params, bits, dtype, **options), jnp.asarray(g * certain, dtype)


@pytest.mark.parametrize("name", CASES)
def test_against_reference(name):
    cases = variants(name)  # now: made inside a compiled program, the parameters are rounded differently
    for bits in BITS:
        references = [expected(name, *case, bits) for case in cases]
        results = program(name)(jnp.float32(bits), [g for _, g in references])
        for (q, _, dtype, params), (want, _), got in zip(cases, references, results, strict=True):
            message = f"{name} {q.per} {dtype} {bits} bits"
            eps = quantizer_reference.EPS[dtype]
            sure = want.certain
            assert got["y"].dtype == dtype and got["codes"].dtype == jnp.int32, message
            y = np.asarray(got["y"], np.float64)
            np.testing.assert_array_equal(np.asarray(got["codes"])[sure], want.codes[sure], message)
            # The product is rounded once, PACT's α·(1/n) twice more, a sum with an offset relative to what it cancels.
            room = {"pact": 2.0, "dorefa acts": 2.0}.get(name, 0.5) * eps * np.abs(want.values)
            room = room + 2.0 * eps * np.max(np.abs(want.values)) * (name in WITH_OFFSET)
            assert np.all(np.abs(y - want.values)[sure] <= room[sure]), message
            np.testing.assert_array_equal(np.asarray(got["decoded"], np.float64), y, message)

            dx, d_params, d_bits = got["gradients"]
            assert dx.dtype == dtype and d_bits == 0.0, message
            tolerance = {"rtol": 3 * eps, "atol": 3 * eps * np.max(np.abs(want.dx)) * ("dorefa" in name)}
            np.testing.assert_allclose(np.asarray(dx, np.float64), want.dx, err_msg=message, **tolerance)
            for key, value in d_params.items():
                assert value.shape == params[key].shape and value.dtype == jnp.float32, message
                if key == "bits":
                    assert value == 0.0, message
                    continue
                gradient = want.parameters[key]
                error = np.abs(np.ravel(value) - gradient).max()
                # float32's error of u is as large as its code.
                assert error <= 1e-4 * max(np.abs(gradient).max(), 1e-2 * 2.0**bits), f"{message} {key}"
            assert not np.all(want.dx == 0), message

            low, high = (float(bound) for bound in got["bounds"])
            assert low <= want.codes.min() and want.codes.max() <= high, message
            # Away from the ends the distance is what the position says; beyond them it is that to the last transition.
            first, last = (float(point) for point in got["transitions"])
            position = np.asarray(got["position"], np.float64)
            nearest = np.abs(np.mod(position, 1.0) - 0.5)
            within = (position >= first) & (position <= last)
            np.testing.assert_allclose(np.asarray(got["distance"])[within], nearest[within], atol=1e-4, err_msg=message)
            outside = np.maximum(first - position, position - last)
            np.testing.assert_allclose(
                np.asarray(got["distance"])[~within], outside[~within], rtol=1e-5, err_msg=message
            )
            levels = np.rint(np.clip(position, first - 0.5, last + 0.5))
            codes = (want.codes - 1) // 2 if (first == last and low == -1) else want.codes
            np.testing.assert_array_equal(levels[sure], codes[sure], message)
            assert np.all(np.asarray(got["scale"]) > 0), message
    assert program(name)._cache_size() == 1


@pytest.mark.parametrize("name", CASES)
def test_one_width_is_like_another_way_to_say_it(name):
    """Traced, concrete, vmapped and vector bits; and 24 bits and above are the identity with gradient 1."""
    q = CASES[name][0]
    params = q.init(jnp.asarray(X), 4)
    if "alpha" in params:
        params["alpha"] = jnp.float32(1.5)

    def both(bits):
        y, vjp = jax.vjp(lambda x, p: q(x, bits, p), jnp.asarray(X), params)
        return y, vjp(jnp.asarray(G))

    many = jax.jit(jax.vmap(both))(jnp.array([1, 4, 24, 32]))
    traced = jax.jit(both)
    concrete = jax.jit(lambda: both(4))()
    for index, bits in enumerate((1, 4, 24, 32)):
        y, (dx, d_params) = traced(jnp.int32(bits))
        np.testing.assert_array_equal(many[0][index], y)
        np.testing.assert_allclose(many[1][0][index], dx, rtol=1e-5, atol=1e-6)
        for key, value in d_params.items():
            np.testing.assert_allclose(many[1][1][key][index], value, rtol=1e-3, atol=1e-4)
            assert bits < 24 or value == 0
        if bits == 4:
            np.testing.assert_array_equal(concrete[0], y)
            np.testing.assert_allclose(concrete[1][0], dx, rtol=1e-6, atol=1e-6)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), concrete[1][1], d_params)
            np.testing.assert_array_equal(jax.jit(lambda: q(jnp.asarray(X), jnp.full((1, 1, 1), 4), params))(), y)
        if bits >= 24:
            np.testing.assert_array_equal(y, X)
            np.testing.assert_array_equal(dx, G)
    assert q(X, 24) is X  # no parameters needed


EWGS_CASES = {
    "lsq signed": LSQ(),
    "trs unsigned": TRS(signed=False),
    "pact": PACT(initial=1.5),
    "dorefa acts": DoReFa("acts"),
}


@pytest.mark.parametrize("name", EWGS_CASES)
def test_ewgs(name):
    inner = EWGS_CASES[name]
    q = EWGS(inner, delta=0.3)
    x = jnp.asarray(X)
    params = {**q.init(x, 3), "delta": jnp.float32(0.7)}  # the parameter counts, not the field
    assert params.keys() == {*inner.init(x, 3), "delta"} and {"delta"} <= q.frozen

    @jax.jit
    def run(bits, g):
        y, vjp = jax.vjp(lambda x, p: q(x, bits, p), x, params)
        own = {key: value for key, value in params.items() if key != "delta"} or None
        plain, plain_vjp = jax.vjp(lambda x, p: inner(x, bits, p), x, own)
        return y, vjp(g), plain, plain_vjp(g), q.position(x, bits, params)

    _, function, options = CASES[name]
    groups = quantizer_reference.groups(SHAPE, "tensor")
    for bits in BITS:
        arguments = (groups, {k: np.asarray(v) for k, v in params.items()}, bits, "float32")
        certain = function(X.astype(np.float64), G, *arguments, **options).certain
        g = G * certain
        want = function(X.astype(np.float64), g, *arguments, **options)
        y, (dx, d_params), plain, (_, plain_params), position = run(jnp.int32(bits), g)
        np.testing.assert_array_equal(y, plain)
        jax.tree.map(np.testing.assert_array_equal, {k: d_params[k] for k in plain_params or {}}, plain_params or {})
        assert d_params["delta"] == 0
        sign_grid = name == "lsq signed" and bits == 1
        low, high = (-1, 0) if sign_grid else reference.bounds(bits, name == "lsq signed")
        scaled = reference.ewgs(want, np.asarray(position, np.float64), low, high, g, 0.7)
        np.testing.assert_allclose(dx, scaled, rtol=1e-5, atol=1e-6)
        assert np.abs(scaled - want.dx).max() > 1e-4
    _, (dx, _), *_ = run(jnp.int32(24), G)
    np.testing.assert_array_equal(dx, G)


def test_ewgs_around_uniform():
    """A gradient is scaled by 1 ± δ·d/(levels − 1), d steps above its level: 0.6 rounds to 1, and lies below it."""
    q = EWGS(Uniform("unsigned", per="tensor"), delta=0.3)
    x = jnp.array([0.0, 0.4, 1.4, 0.6, 3.0])
    params = q.init(x, 2)
    grad = jax.grad(lambda x, sign: (sign * q(x, 2, params)).sum())
    d = jnp.array([0.0, 0.4, 0.4, -0.4, 0.0]) / 3
    np.testing.assert_allclose(grad(x, 1.0), 1 + 0.3 * d, rtol=1e-5)
    np.testing.assert_allclose(grad(x, -1.0), -(1 - 0.3 * d), rtol=1e-5)
