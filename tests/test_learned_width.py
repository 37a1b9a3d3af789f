"""Widths learned by gradient: values and gradients against numpy, what bounds a width, its price."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import nested_reference as reference
import numpy as np
import optax
import pytest
from inject_models import normal

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.inject.quantizer_config import quantizer_from_config
from qtrain.precision import Precision
from qtrain.quantizers import EWGS, LSQ, LearnedWidth, distance_to_transition

quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
rng = np.random.default_rng(0)
X, G = (rng.standard_normal((40, 6)).astype(np.float32) for _ in range(2))
WIDTHS = (0.4, 1.0, 1.3, 2.2, 3.8, 5.0, 7.9, 8.0, 8.3)
BITS = (1, 2, 4, 8)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("signed", [True, False])
def test_against_reference(signed, per):
    q = LearnedWidth(signed=signed, per=per, low=1)
    columns = [slice(None)] if per == "tensor" else [slice(i, i + 1) for i in range(6)]
    shape = () if per == "tensor" else (1, 6)

    @quickly
    def run(bits, params, g):
        y, vjp = jax.vjp(lambda x, p: q(x, bits, p), jnp.asarray(X), params)
        codes, scale = q.encode(jnp.asarray(X), bits, params)
        return y, vjp(g), codes, q.decode(codes, scale), q.bounds(bits, params), q.width(None, bits, params)

    for bits in BITS:
        for index in range(len(WIDTHS)):
            widths = np.array([WIDTHS[(index + i) % len(WIDTHS)] for i in range(len(columns))], np.float32)
            reach = np.linspace(0.6, 2.4, len(columns), dtype=np.float32)
            params = {"scale": jnp.asarray(reach.reshape(shape)), "width": jnp.asarray(widths.reshape(shape))}
            parts = [(X[:, c], G[:, c], *map(float, pair)) for c, *pair in zip(columns, reach, widths, strict=True)]
            # A code that float32 cannot tell gets no gradient.
            sure = [reference.learned_width(*part, bits, 1, 8, signed)["certain"] for part in parts]
            g = G * np.concatenate(sure, 1)
            wants = [
                reference.learned_width(part[0], part[1] * keep, *part[2:], bits, 1, 8, signed)
                for part, keep in zip(parts, sure, strict=True)
            ]
            y, (dx, d_params), codes, decoded, (low, high), width = run(jnp.int32(bits), params, jnp.asarray(g))
            message = f"{bits} bits, widths {widths}"
            keep = np.concatenate(sure, 1)
            assert keep.mean() > 0.95
            gather = {name: np.concatenate([want[name] for want in wants], 1) for name in ("codes", "values", "dx")}
            np.testing.assert_array_equal(np.asarray(codes)[keep], gather["codes"][keep], message)
            np.testing.assert_allclose(np.asarray(y)[keep], gather["values"][keep], rtol=1e-6, err_msg=message)
            np.testing.assert_array_equal(decoded, y, message)
            np.testing.assert_allclose(dx, gather["dx"], rtol=1e-6, err_msg=message)
            assert np.all(codes >= low) and np.all(codes <= high), message
            assert float(width) == pytest.approx(np.mean([want["whole"] for want in wants])), message
            for name in ("scale", "width"):
                want = np.array([want[name] for want in wants])
                found = np.ravel(d_params[name])
                assert d_params[name].shape == shape
                # In steps, the error of x/s is that of a float32 as large as the code.
                each = np.array([np.abs(part[1]).sum() for part in parts]) * reach
                assert np.all(np.abs(found - want) <= 1e-6 * np.maximum(each, 1.0)), f"{message} {name}"
    assert run._cache_size() == 1


def test_an_end_of_a_width_lets_back_and_not_further_out():
    q = LearnedWidth(low=2, high=6)

    @quickly
    def gradient(width, g, bits):
        return jax.grad(lambda w: g * q.width(None, bits, {"width": w}))(jnp.float32(width))

    g = jnp.float32(0.5)
    for width, bits, down, up in (
        (4.3, 8, 0.5, -0.5),
        (6.0, 8, 0.5, -0.5),
        (6.4, 8, 0.5, 0.0),  # above high: only a descent downwards
        (1.5, 8, 0.0, -0.5),  # below low: only upwards
        (4.3, 4, 0.5, 0.0),  # above the bits of the step
        (1.5, 1, 0.5, 0.0),  # the bits are below low: it is above them
        (4.3, 24, 0.0, 0.0),
    ):
        assert gradient(width, g, bits) == down, (width, bits)
        assert gradient(width, -g, bits) == up, (width, bits)
    for width, bits, expected in (
        (4.3, 8, 4),
        (4.6, 8, 5),
        (9.0, 8, 6),
        (0.0, 8, 2),
        (5.0, 3, 3),
        (1.5, 1, 1),
        (5, 32, 32),
    ):
        assert q.width(None, bits, {"width": jnp.float32(width)}) == expected
        assert q.width(None, jnp.int32(bits), {"width": jnp.float32(width)}) == expected
    several = {"width": jnp.array([[2.2, 3.4, 4.6, 9.0]])}
    assert q.width(None, 8, several) == (2 + 3 + 5 + 6) / 4
    slope = jax.grad(lambda p: q.width(None, 8, p))(several)["width"]
    np.testing.assert_allclose(slope, [[0.25, 0.25, 0.25, 0.25]])


def test_a_whole_width_is_that_of_a_plain_quantizer_and_a_cap_is_a_width():
    x = jnp.asarray(X)
    q, plain = LearnedWidth(low=1), LSQ(across_bits="keep", gradient_scale=False)
    run = quickly(lambda b, w: q(x, b, {"scale": jnp.float32(1.5), "width": w}))
    other = quickly(lambda b, s: plain(x, b, {"scale": s}))
    for width in (1, 2, 3, 8):
        own = run(jnp.int32(8), jnp.float32(width))
        np.testing.assert_array_equal(own, other(jnp.int32(width), jnp.float32(1.5 * 2.0 ** (1 - width))))
        np.testing.assert_array_equal(own, run(jnp.int32(width), jnp.float32(8.0)))
    assert q(x, 24) is x
    np.testing.assert_array_equal(run(jnp.int32(24), jnp.float32(3.0)), x)
    d_params = quickly(jax.grad(lambda p, b: q(x, b, p).sum()))(q.init(x), jnp.int32(24))
    assert all(np.all(leaf == 0) for leaf in d_params.values())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_constant_and_extreme_tensors(signed, dtype):
    q = LearnedWidth(signed=signed, per="channel")

    @quickly
    def run(x, scale):
        x = x.astype(dtype)
        params = q.init(x, 4)
        params["scale"] = params["scale"] * scale
        y, vjp = jax.vjp(lambda x, p: q(x, 8, p), x, params)
        codes, s = q.encode(x, 8, params)
        return params, y, *vjp(jnp.ones_like(y)), q.decode(codes, s), q.scale(x, 8, params)

    for value in (0.0, -0.7, 3.0, 1e-38, 1e36):
        for scale in (1.0, 0.0, -1.0):
            params, y, dx, d_params, decoded, step = run(jnp.full((4, 3), value), jnp.float32(scale))
            for leaf in jax.tree.leaves((params, y, dx, d_params)):
                assert np.all(np.isfinite(np.asarray(leaf, np.float64))), (value, scale)
            assert y.dtype == dtype and np.all(np.asarray(step) > 0)
            np.testing.assert_array_equal(decoded, y)


def test_how_it_begins():
    q = LearnedWidth(per="channel")
    params = q.init(jnp.asarray(X), 5)
    np.testing.assert_allclose(params["scale"], np.abs(X).max(0, keepdims=True))
    np.testing.assert_array_equal(params["width"], np.full((1, 6), 5.0))
    for bits, expected in ((1, 2), (12, 8), (24, 8), (3, 3)):
        assert LearnedWidth().init(jnp.asarray(X), bits)["width"] == expected
    assert LearnedWidth(initial=3.5).init(jnp.asarray(X), 8)["width"] == 3.5
    unsigned = LearnedWidth(signed=False).init(jnp.asarray(X), 8)
    assert unsigned["scale"] == X.max() and q.frozen == frozenset() and q.chooses_width and q.learns
    assert LearnedWidth().init(jnp.zeros(3))["scale"] == 1.0


def test_the_distance_to_a_transition_knows_the_learned_ends():
    q, params = LearnedWidth(), {"scale": jnp.float32(1.0), "width": jnp.float32(2.0)}  # levels −1, −½, 0, ½
    found = distance_to_transition(q, jnp.array([-1.5, -0.75, 0.5, 2.0]), 8, params)
    np.testing.assert_allclose(found, [1.5, 0.0, 0.5, 3.5], atol=1e-6)


def test_a_price_narrows_the_widths_and_the_loss_keeps_those_it_needs():
    """Two columns of a kernel: one whose rounding the loss feels, one that it hardly does."""
    q = LearnedWidth(per="column", initial=6.0)
    x = jnp.asarray(X[:, :2])
    weight = jnp.array([[30.0, 1e-4]])
    params = q.init(x)
    optimizer = optax.sgd(optax.constant_schedule(0.05))

    @quickly
    def step(params, state, price):
        def loss(params):
            error = jnp.mean(weight * (q(x, 8, params) - x) ** 2)
            return error + price * q.width(x, 8, params)

        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    found = {}
    for price in (0.0, 1.0):
        own, state = params, optimizer.init(params)
        for _ in range(300):
            own, state = step(own, state, jnp.float32(price))
        found[price] = np.ravel(own["width"])
    assert step._cache_size() == 1
    assert np.all(found[0.0] >= 5.9)
    assert found[1.0][1] < 2.5 and found[1.0][1] < found[1.0][0] < 6.0


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        return nn.Dense(4)(x.mean((1, 2)))


def test_in_a_model_weights_and_activations_learn_their_widths():
    x = normal(2, 6, 6, 3)
    rule = Rule(
        weight_quantizer=LearnedWidth(per="channel"),
        act_quantizer=LearnedWidth(signed=False),
        bias_quantizer=LearnedWidth(),
    )
    qmodel = quantize(Net(), rule)
    bits = Precision(weights=5, acts=4)
    variables = quickly(lambda: qmodel.init(KEY, x, bits=bits))()
    own = variables["quant"]["Conv_0"]
    assert own["weights"]["width"].shape == (1, 1, 1, 6) and own["acts"]["width"] == 4 and own["bias"]["width"] == 5

    def loss(quant, bits):
        price = sum(jnp.mean(w.apply("width", variables["params"], quant, bits.weights)) for w in qmodel.weights(x))
        return jnp.sum(qmodel.apply({**variables, "quant": quant}, x, bits=bits) ** 2), price

    step = quickly(lambda quant, bits: jax.jacrev(loss)(quant, bits))
    task, price = step(variables["quant"], Precision(weights=jnp.int32(8), acts=jnp.int32(8)))
    for layer in ("Conv_0", "Dense_0"):
        for kind in ("weights", "acts"):
            assert np.any(np.asarray(task[layer][kind]["width"]) != 0), (layer, kind)
            assert np.any(np.asarray(task[layer][kind]["scale"]) != 0), (layer, kind)
        np.testing.assert_allclose(np.sum(price[layer]["weights"]["width"]), 1.0, rtol=1e-6)
        assert np.all(price[layer]["acts"]["width"] == 0) and np.all(price[layer]["weights"]["scale"] == 0)
    step(variables["quant"], Precision(weights=jnp.int32(3), acts=jnp.int32(2)))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 0}, "low=0: give a whole number of bits from 1 to 23"),
        ({"high": 24}, "high=24"),
        ({"low": 2.5}, r"low=2\.5"),
        ({"low": 5, "high": 4}, "low=5: it is above high=4"),
        ({"initial": 9.0}, r"initial=9\.0: give a width from low=2 to high=8"),
        ({"signed": "unsigned"}, "signed='unsigned': give True or False"),
        ({"per": 4}, "per=4: a width is not learned in groups"),
        ({"per": "chanel"}, "per='chanel'.*Did you mean 'channel'"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(UsageError, match=message) as error:
        LearnedWidth(**fields)
    assert "\n" not in str(error.value)


def test_mistakes_and_configs():
    with pytest.raises(UsageError, match="needs its parameter 'width'"):
        LearnedWidth().width(None, 8)
    with pytest.raises(UsageError, match="needs its parameter 'width'"):
        LearnedWidth()(jnp.ones(3), 8, {"scale": jnp.float32(1.0)})
    with pytest.raises(UsageError, match="it chooses its own width"):
        EWGS(LearnedWidth())
    assert quantizer_from_config("learned_width/unsigned", "key") == LearnedWidth(signed=False)
    assert quantizer_from_config("learned_width/signed/channel", "key") == LearnedWidth(per="channel")
    given = {"kind": "learned_width/unsigned", "low": 1, "high": 4, "initial": 3.0}
    assert quantizer_from_config(given, "key") == LearnedWidth(signed=False, low=1, high=4, initial=3.0)
    with pytest.raises(UsageError, match=r"quant\.weights='learned_width/sined': 'sined' is none of.*'signed'"):
        quantizer_from_config("learned_width/sined", "quant.weights")
