"""Where the ranges of learned quantizers begin, what they mean at another width, and where codes change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import UsageError
from qtrain.quantizers import LSQ, PACT, TRS, DoReFa, Uniform, distance_to_transition, ewgs_delta

X = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)


class TestAcrossBits:
    def test_rescale_keeps_the_range(self):
        q = LSQ()
        params = q.init(X, 4)
        assert params["bits"] == 4 and q.frozen == {"bits"}
        scale = jax.jit(lambda bits: q.scale(X, bits, params))
        for bits in (1, 2, 3, 4, 8, 16):
            low, _ = q.bounds(bits)
            assert float(scale(jnp.int32(bits))[0, 0]) == float(params["scale"]) * 2.0 ** (4 - bits)
            assert float(low * scale(jnp.int32(bits))[0, 0]) == -8 * float(params["scale"])
        # The gradient follows: ∂s_b/∂s = 2^(b₀ − b).
        steep = LSQ(gradient_scale=False)
        at = {b: jax.grad(lambda p, b=b: steep(jnp.array([100.0]), b, p).sum())(params)["scale"] for b in (2, 4, 8)}
        assert at == {2: 1 * 4.0, 4: 7.0, 8: 127 / 16}

    def test_keep(self):
        q = LSQ(across_bits="keep")
        params = q.init(X, 4)
        assert set(params) == {"scale"} and not q.frozen
        for bits in (1, 2, 8):
            assert q.scale(X, bits, params)[0, 0] == params["scale"]

    def test_table(self):
        q = LSQ(across_bits="table", widths=(2, 4, 8), per="channel", signed=False, offset=True)
        params = q.init(X)
        assert params["scale"].shape == params["offset"].shape == (3, 1, 8) and not q.frozen
        assert q.init(X[:, :1])["scale"].shape == (3,)
        for row, bits in enumerate((2, 4, 8)):
            alone = LSQ(signed=False, offset=True, per="channel").init(X, bits)
            np.testing.assert_allclose(params["scale"][row], alone["scale"], rtol=1e-6)
        run = jax.jit(lambda bits: (q.scale(X, bits, params), jax.grad(lambda p: q(X, bits, p).sum())(params)))
        for bits, row in {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 7: 1, 8: 2, 16: 2}.items():
            scale, gradient = run(jnp.int32(bits))
            np.testing.assert_array_equal(scale, params["scale"][row])
            for name in params:  # the others get nothing
                used = np.any(np.asarray(gradient[name]) != 0, axis=(1, 2))
                np.testing.assert_array_equal(used, np.arange(3) == row)
        np.testing.assert_array_equal(
            q.scale(X, jnp.array([2, 2, 4, 4, 8, 8, 8, 8]), params)[0, :3],
            params["scale"][jnp.array([0, 0, 1]), 0, jnp.arange(3)],
        )
        for bits in (3, 16, 2.0 + 3, np.int64(3), np.array([2, 5])):
            with pytest.raises(UsageError, match=r"bits: \d+.* is not among the widths \(2, 4, 8\)"):
                q(X, bits, params)
        np.testing.assert_array_equal(q(X, 32, params), X)

    def test_ranges_do_not_follow_the_width(self):
        """TRS and PACT keep a range: nothing is to be done when the width changes."""
        for q, name in [(TRS(), "scale"), (TRS(signed=False), "scale"), (PACT(), "alpha")]:
            assert q.init(X, 2)[name] == q.init(X, 8)[name]
        assert all(TRS().scale(X, b, {"scale": 3.0})[0, 0] == 3.0 * 2.0 ** (1 - b) for b in (2, 3, 8))
        assert all(TRS(signed=False).scale(X, b, {"scale": 3.0})[0, 0] == 3.0 * 2.0**-b for b in (1, 2, 8))


class TestInit:
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_values(self, bits):
        mean, sigma = X.mean(), X.std()
        typical, q_p = np.abs(X).mean(), max(2 ** (bits - 1) - 1, 1)
        levels = 2**bits - 1
        ends = max(abs(mean - 3 * sigma), abs(mean + 3 * sigma))
        wants = [
            (LSQ(), {"scale": typical if bits == 1 else 2 * typical / math.sqrt(q_p)}),
            (LSQ(signed=False), {"scale": 2 * typical / math.sqrt(levels)}),
            (LSQ(initial="lsq+"), {"scale": ends / 2 ** (bits - 1)}),
            (LSQ(signed=False, initial="lsq+"), {"scale": X.max() / levels}),
            (LSQ(signed=False, offset=True), {"scale": np.ptp(X) / levels, "offset": X.min()}),
            (TRS(), {"scale": 3 * sigma}),
            (TRS(signed=False), {"scale": 3 * sigma / math.sqrt(1 - 2 / math.pi)}),
            (TRS(initial=2.0), {"scale": 2 * sigma}),
            (PACT(initial=8.0), {"alpha": 8.0}),
            (DoReFa("acts"), {}),
        ]
        for q, want in wants:
            params = q.init(jnp.asarray(X), bits)
            assert params.pop("bits", bits) == bits and params.keys() == want.keys()
            for name, value in want.items():
                assert params[name].shape == () and params[name].dtype == jnp.float32
                np.testing.assert_allclose(params[name], value, rtol=1e-6)

    def test_signed_offset_spans_the_tensor(self):
        q = LSQ(offset=True)
        for bits in (1, 2, 4):
            y = q(X, bits, q.init(X, bits))
            np.testing.assert_allclose([y.min(), y.max()], [X.min(), X.max()], rtol=1e-5)

    def test_shapes(self):
        shapes = {"tensor": (), "channel": (1, 8), "row": (6, 1), 2: (3, 1, 8), (0, 1): (6, 8)}
        for per, shape in shapes.items():
            for q in (LSQ(per=per, offset=True), TRS(per=per), PACT(per=per)):
                params = q.init(X, 4)
                assert all(value.shape == shape for name, value in params.items() if name != "bits"), (q, per)
                assert q(X, 4, params).shape == X.shape
        assert LSQ(per="channel").init(X, 4, axes=(1,))["scale"].shape == (6, 1)

    def test_traced_bits_and_those_that_round_nothing(self):
        traced = jax.jit(lambda bits: LSQ().init(X, bits))(jnp.float32(3))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), traced, LSQ().init(X, 3))
        assert LSQ().init(X, 32) == LSQ().init(X, 8)


@settings(max_examples=60, deadline=None)
@given(
    x=st.floats(-100, 100, width=32),
    scale=st.floats(2**-10, 64, width=32),
    bits=st.integers(1, 8),
    name=st.sampled_from(["lsq", "unsigned", "trs", "pact"]),
)
def test_a_value_goes_to_the_nearest_level(x, scale, bits, name):
    q = {
        "lsq": LSQ(across_bits="keep"),
        "unsigned": LSQ(signed=False, across_bits="keep"),
        "trs": TRS(),
        "pact": PACT(),
    }[name]
    params = {"alpha" if name == "pact" else "scale": jnp.float32(scale)}
    y, step = float(_call(q, jnp.float32(x), bits, params)), float(q.scale(jnp.float32(x), bits, params))
    low, high = (int(bound) for bound in q.bounds(bits))
    levels = step * np.array([-1, 1] if low == -1 and high == 1 and bits == 1 else range(low, high + 1))
    assert abs(y - x) <= np.abs(levels - x).min() + 1e-5 * (abs(x) + step)
    far = float(distance_to_transition(q, jnp.float32(x), bits, params))
    assert far >= 0 and (far <= 0.5 + 1e-5 or not levels[0] <= x <= levels[-1])


@functools.partial(jax.jit, static_argnums=0)
def _call(q, x, bits, params):
    return q(x, bits, params)


def test_second_derivatives_in_both_modes():
    """∂²/∂x² of Q(x)³ is 6 Q(x) inside, by the straight-through rule; ∂²/∂x∂s of the normalised one is −1/s²."""
    x = jnp.array([0.3, -0.9, 1.0, -7.0])
    for q, params, inside in [
        (LSQ(across_bits="keep"), {"scale": jnp.float32(0.25)}, jnp.array([1.0, 1.0, 1.0, 0.0])),
        (TRS(), {"scale": jnp.float32(2.0)}, jnp.array([1.0, 1.0, 1.0, 0.0])),
        (PACT(), {"alpha": jnp.float32(0.8)}, jnp.array([1.0, 0.0, 0.0, 0.0])),
    ]:
        y = q(x, 4, params)
        first = jax.grad(lambda x, q=q, params=params: (q(x, 4, params) ** 3).sum())
        np.testing.assert_allclose(first(x), 3 * y**2 * inside, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(lambda x, f=first: f(x).sum())(x), 6 * y * inside, rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(first, (x,), (jnp.ones(4),))[1], 6 * y * inside, rtol=1e-6)
    mixed = jax.hessian(lambda z: TRS(normalised=True)(z[0], 4, {"scale": z[1]}))(jnp.array([0.3, 2.0]))
    np.testing.assert_allclose(mixed, [[0.0, -0.25], [-0.25, 2 * 0.3 / 8]], rtol=1e-5)


def test_transition_distance_of_uniform():
    x = jnp.array([0.0, 0.6, 1.4, 2.5, 9.0])
    ranges = {"max": jnp.float32(3.0)}
    for rounding, want in [("nearest", [0.5, 0.1, 0.1, 0.0, 6.5]), ("floor", [1.0, 0.4, 0.4, 0.5, 6.0])]:
        q = Uniform("unsigned", per="tensor", rounding=rounding)
        np.testing.assert_allclose(distance_to_transition(q, x, 2, ranges), want, atol=1e-6)
    sign = Uniform("symmetric", per="tensor")
    ranges = {"absmax": jnp.float32(3.0), "absmean": jnp.float32(2.0)}
    np.testing.assert_allclose(distance_to_transition(sign, x, 1, ranges), x / 4, atol=1e-6)
    assert sign.bounds(1) == (-1, 1) and sign.bounds(3) == (-3, 3) and sign.transitions(1) == (-0.5, -0.5)
    affine = Uniform("affine", per="row")
    np.testing.assert_allclose(affine.position(X, 4).min(1), 0, atol=1e-6)
    np.testing.assert_allclose(affine.position(X, 4).max(1), 15, rtol=1e-6)
    with pytest.raises(UsageError, match="no grid"):
        sign.position(x, 24)


def test_norm_makes_normalised_and_scaled_alike():
    """Behind a norm the latent weights' gradients do not depend on whether the product is multiplied by s."""
    w, x = jnp.asarray(X), jax.random.normal(jax.random.key(0), (32, 6))
    params = {"scale": jnp.float32(1.7)}

    def loss(w, q):
        y = x @ q(w, 3, params)
        y = (y - y.mean(0)) / y.std(0)
        return jnp.sum(jnp.sin(y + jnp.arange(8.0)))

    a, b = (jax.grad(loss)(w, q) for q in (TRS(), TRS(normalised=True)))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_ewgs_delta():
    np.testing.assert_allclose(ewgs_delta(12.0, 100, 0.5), 0.08, rtol=1e-6)
    assert ewgs_delta(-3.0, 10, 1.0) == 0 and ewgs_delta(3.0, 10, 0.0) == 0
    with pytest.raises(UsageError, match="size=0"):
        ewgs_delta(1.0, 0, 1.0)
