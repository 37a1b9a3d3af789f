"""Learned quantizers on odd tensors, with scales that were driven below zero, and mistakes in using them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.errors import UsageError
from qtrain.quantizers import EWGS, LSQ, PACT, TRS, DoReFa, DoubleRounding, Float, Uniform

X = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
LEARNED = {
    "lsq": LSQ(),
    "lsq+": LSQ(signed=False, offset=True),
    "table": LSQ(across_bits="table", widths=(2, 4, 8)),
    "trs": TRS(),
    "trs normalised": TRS(normalised=True),
    "pact": PACT(),
    "dorefa": DoReFa("weights"),
    "dorefa acts": DoReFa("acts"),
    "ewgs": EWGS(LSQ()),
}


TENSORS = {
    "zeros": np.zeros((4, 6), np.float32),
    "constant": np.full((4, 6), -0.3, np.float32),
    "positive": np.full((4, 6), 0.3, np.float32),
    "tiny": X * 1e-30,
    "huge": X * 1e30,
    "scalar": np.float32(0.4),
    "one": np.array([[0.4]], np.float32),
    "no_rows": np.zeros((0, 6), np.float32),
    "no_columns": np.zeros((4, 0), np.float32),
}


@pytest.mark.parametrize("name", LEARNED)
def test_finite(name):
    q = LEARNED[name]

    @jax.jit
    def run(bits, xs):
        def one(x):
            params = q.init(x, bits)
            y, vjp = jax.vjp(lambda x, p: q(x, bits, p), x, params)
            return y, vjp(jnp.ones_like(y)), params, q(jnp.ones_like(x), bits, params)

        return {key: one(x) for key, x in xs.items()}

    for bits in (1, 2, 8):
        for key, (y, gradients, params, later) in run(jnp.int32(bits), TENSORS).items():
            message = f"{name} {key} {bits} bits"
            assert y.shape == TENSORS[key].shape, message
            if key in ("tiny", "huge") and "dorefa" in name:
                gradients = ()  # ∂/∂w is 1/max|tanh w|, which is what it is
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((y, gradients, later))), message
            assert all(np.all(v > 0) for n, v in params.items() if n in ("scale", "alpha")), message
            if key == "zeros" and bits > 1 and name != "dorefa":
                np.testing.assert_array_equal(y, 0.0, message)
            if key == "zeros" and bits == 8:
                assert np.all(np.abs(later) > 0.3), message  # what comes after a zero start is not lost


@pytest.mark.parametrize("name", ["lsq", "lsq+", "trs", "trs normalised", "pact", "ewgs"])
@pytest.mark.parametrize("value", [0.0, -0.5, -1e30])
def test_a_scale_that_was_driven_below_zero_comes_back(name, value):
    q = LEARNED[name]
    params = q.init(X, 3)
    parameter = "alpha" if "alpha" in params else "scale"
    params[parameter] = jnp.float32(value)

    @jax.jit
    def step(x, params, bits):
        return jax.value_and_grad(lambda p: jnp.sum((q(x, bits, p) - 0.5 * X) ** 2))(params)

    for bits in (1, 3, 8, 23):
        for x in (X, jnp.zeros_like(X), X * 1e30, X.astype(jnp.bfloat16)):
            y = q(x, bits, params)
            loss, gradient = step(x, params, jnp.int32(bits))
            assert np.all(np.isfinite(y.astype(np.float32))) and np.isfinite(loss)
            assert np.isfinite(gradient[parameter])
        # Without a range all is clipped, and a wider one is better: descent must widen it.
        if name != "trs normalised":
            assert step(X, params, jnp.int32(bits))[1][parameter] < 0, (name, bits)


@pytest.mark.parametrize(
    "q", [LSQ(), LSQ(across_bits="keep"), DoubleRounding(high=8)], ids=["rescale", "keep", "double"]
)
def test_widths_of_columns_share_one_scale(q):
    """The factor on a scale's gradient has the shape of the bits then: its gradients are summed over the columns."""
    params, bits = q.init(X, 4), jnp.array([[2.0, 3, 4, 8, 2, 3, 4, 8]])
    values, pulled = jax.vjp(lambda scale: q(X, bits, {**params, "scale": scale}), params["scale"])
    (found,) = pulled(jnp.asarray(X))
    expected = 0.0
    for column in range(8):
        own = float(bits[0, column])
        alone, pulled = jax.vjp(lambda scale, own=own: q(X, own, {**params, "scale": scale}), params["scale"])
        np.testing.assert_array_equal(values[:, column], alone[:, column])
        only = jnp.zeros_like(X).at[:, column].set(X[:, column])
        expected += float(pulled(only)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nan_is_not_hidden():
    x = jnp.asarray(X).at[0, 0].set(jnp.nan)
    for name, q in LEARNED.items():
        params = q.init(X, 4)
        for bits in (2, 4) if name == "table" else (1, 4):
            y = q(x, bits, params)
            assert jnp.isnan(y[0, 0]) and (name == "dorefa" or jnp.sum(jnp.isnan(y)) == 1), (name, bits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSQ(across_bits="tables"), "across_bits='tables'.*Did you mean 'table'"),
        (lambda: LSQ(widths=(2, 4)), r"widths=\(2, 4\): only across_bits='table'"),
        (lambda: LSQ(across_bits="table", widths=(4, 2)), "ascending"),
        (lambda: LSQ(across_bits="table", widths=()), "widths="),
        (lambda: LSQ(signed="unsigned"), "signed='unsigned': give True or False"),
        (lambda: LSQ(initial="lsq+ "), "initial='lsq. '.*Did you mean"),
        (lambda: LSQ(initial="lsq", offset=True), "no initial offset"),
        (lambda: LSQ(per="chanel"), "Did you mean 'channel'"),
        (lambda: TRS(initial=0.0), "initial=0.0"),
        (lambda: TRS(learned="no"), "learned='no'"),
        (lambda: PACT(initial=-1), "initial=-1"),
        (lambda: DoReFa("act"), "kind='act'.*Did you mean 'acts'"),
        (lambda: DoReFa("acts", per="row"), "per='row'"),
        (lambda: EWGS(Float("e4m3")), "wraps a quantizer on a grid"),
        (lambda: EWGS(EWGS(LSQ())), "wraps a quantizer on a grid"),
        (lambda: EWGS(Uniform(rounding="stochastic")), "deterministic"),
        (lambda: EWGS(LSQ(), delta=-1.0), "delta=-1.0"),
        (lambda: LSQ()(X, 4), "needs its parameter 'scale'"),
        (lambda: LSQ()(X, 4, {"scale": jnp.float32(1)}), "'bits' is missing"),
        (lambda: EWGS(LSQ())(X, 4, LSQ().init(X)), "needs its parameter 'delta'"),
        (lambda: LSQ(per="channel")(X[:, :3], 4, LSQ(per="channel").init(X)), r"'scale' has shape \(1, 8\)"),
        (lambda: LSQ()(X, 4.5, LSQ().init(X)), "not a width"),
        (lambda: LSQ().encode(X, 24, LSQ().init(X)), "no integer codes"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_static():
    assert len({hash(q) for q in LEARNED.values()}) == len(LEARNED)
    for q in LEARNED.values():
        assert q == dataclasses.replace(q) and q.code_dtype is None and len(q.describe()) < 50
        assert q.frozen <= set(q.init(X, 4)) and q.learns == bool(q.init(X, 4))
