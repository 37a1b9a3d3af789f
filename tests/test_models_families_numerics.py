"""MobileNetV2, vision transformers, language models and recurrent nets: numbers against their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import models
from qtrain.models.mobilenet import InvertedResidual
from qtrain.models.transformer import TransformerBlock, rotate

# Tolerances here are wider than what optimisation changes, and compiling is what takes the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_variables(model, x):
    """Normal numbers in the shapes of ``model.init``, kernels scaled to keep variances; none of them is 0 or 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(path, leaf):
        numbers = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key in ("scale", "var"):
            return 1 + 0.3 * np.abs(numbers)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 10
        return numbers / np.sqrt(fan_in).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def depthwise(x, kernel, stride):
    """A 3×3 depthwise convolution with a padding of one, as a sum of shifted images."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    taps = [
        padded[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, 0] for i in range(3) for j in range(3)
    ]
    return sum(taps)


@pytest.mark.parametrize(("stride", "features", "expansion"), [(1, 4, 3), (2, 4, 3), (1, 6, 1)])
def test_inverted_residual_block(stride, features, expansion):
    block = InvertedResidual(features, stride, expansion, jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 4)).astype(np.float32) * 3
    variables = random_variables(block, x)
    params, statistics = variables["params"], variables["batch_stats"]
    out = quick_jit(block.apply)(variables, x)
    assert set(params) == {
        f"{layer}{norm}"
        for layer in ("expand", "depthwise", "project")
        for norm in ("", "_norm")
        if layer != "expand" or expansion > 1
    }

    def norm(name, y):
        running, learned = statistics[f"{name}_norm"], params[f"{name}_norm"]
        return (y - running["mean"]) / np.sqrt(running["var"] + 1e-5) * learned["scale"] + learned["bias"]

    y = x
    if expansion > 1:
        y = np.clip(norm("expand", y @ params["expand"]["kernel"][0, 0]), 0, 6)
    y = np.clip(norm("depthwise", depthwise(y, params["depthwise"]["kernel"], stride)), 0, 6)
    y = norm("project", y @ params["project"]["kernel"][0, 0])
    expected = x + y if stride == 1 and features == 4 else y
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_rotary_positions_are_rotations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 40, 3, 8)).astype(np.float32)
    points = x[..., :4] + 1j * x[..., 4:]
    turned = points * np.exp(1j * np.arange(40)[:, None] * 10_000.0 ** (-np.arange(4) / 4))[:, None]
    out = jax.jit(rotate)(x)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-4)
    # The same query and the same key at all positions: their product depends on the distance.
    query, key = (jnp.broadcast_to(x[:1, :1], x[:1].shape) for x in (out, x))
    scores = jnp.einsum("bqhd,bkhd->hqk", *map(jax.jit(rotate), (query, key)))
    np.testing.assert_allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=1e-3, atol=1e-3)
    assert np.abs(scores[:, 0, 1:] - scores[:, 0, :-1]).max() > 0.1
    assert rotate(jnp.ones((1, 2, 1, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def block_reference(params, x, modern):
    """A block with two heads in float64, head by head: GPT-2's without a mask, or LLaMA's."""

    def norm(name, y):
        learned = params[name]
        if modern:
            return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * learned["scale"]
        y = y - y.mean(-1, keepdims=True)
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * learned["scale"] + learned["bias"]

    def dense(learned, y):
        return np.tensordot(y, learned["kernel"], 1) + learned.get("bias", 0)

    y = norm("attention_norm", x)
    query, key, value = (dense(params["attention"][name], y) for name in ("query", "key", "value"))
    length, mixed = x.shape[1], []
    for head in range(2):
        q, k, v = (array[:, :, head] for array in (query, key, value))
        if modern:
            half = q.shape[-1] // 2
            angle = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(half) / half)
            q, k = ((array[..., :half] + 1j * array[..., half:]) * np.exp(1j * angle) for array in (q, k))
        scores = np.real(q @ k.conj().transpose(0, 2, 1)) / np.sqrt(v.shape[-1])
        if modern:
            scores = np.where(np.tri(length) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    out = params["attention"]["out"]
    x = x + np.concatenate(mixed, -1) @ out["kernel"].reshape(-1, x.shape[-1]) + out.get("bias", 0)
    y = norm("mlp_norm", x)
    inner = dense(params["mlp_in"], y)
    if modern:
        gate = dense(params["mlp_gate"], y)
        inner = gate / (1 + np.exp(-gate)) * inner
    else:
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    return x + dense(params["mlp_out"], inner)


@pytest.mark.parametrize("modern", [False, True])
def test_block_against_its_equations(modern):
    fields = {"rotary": True, "norm": "rms", "mlp": "swiglu", "use_bias": False} if modern else {"causal": False}
    block = TransformerBlock(2, 10, 0.0, jnp.float32, False, **fields)
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    variables = random_variables(block, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    np.testing.assert_allclose(
        quick_jit(block.apply)(variables, x), block_reference(params, x, modern), rtol=1e-4, atol=1e-4
    )


def test_rotary_language_model_is_causal_and_sees_order():
    fields = {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "use_bias": False}
    fields |= {"name": "transformer", "num_layers": 1, "width": 16, "num_heads": 2}
    model = models.build(fields, num_classes=50, input_shape=(10,))
    x = jnp.asarray(np.random.default_rng(0).permutation(50)[:10])[None]

    apply = quick_jit(model.apply)
    variables = random_variables(model, x)
    exchanged = x[:, jnp.array([0, 2, 1, *range(3, 10)])]
    out, later, swapped = (apply(variables, tokens)[0] for tokens in (x, x.at[0, 6].add(1) % 50, exchanged))
    np.testing.assert_array_equal(out[:6], later[:6])
    assert np.all(np.any(out[6:] != later[6:], axis=-1))
    # A single layer without positions would see what is before as a set.
    assert np.abs(out[3:] - swapped[3:]).max() > 1e-4


def test_vit_without_positions_sees_patches_as_a_set():
    fields = {"name": "vit", "patch": 2, "num_layers": 2, "width": 16, "num_heads": 2}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8, 1)), jnp.float32)
    swapped = jnp.concatenate([x[:, :, 6:], x[:, :, 2:6], x[:, :, :2]], axis=2)
    pools = [models.build({**fields, "pool": pool}, num_classes=5, input_shape=(4, 8, 1)) for pool in ("token", "mean")]

    for model in pools:
        apply = quick_jit(model.apply)
        params = random_variables(model, x)["params"]
        without = {**params, "position_embedding": 0 * params["position_embedding"]}
        one, two = (apply({"params": without}, images) for images in (x, swapped))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
        one, two = (apply({"params": params}, images) for images in (x, swapped))
        assert np.abs(one - two).max() > 1e-2


def test_dropped_paths_skip_whole_examples():
    """Half of the branches are left out, the others count double; evaluation takes all of them once."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3, 8)), jnp.float32)
    train, evaluate = (
        TransformerBlock(2, 8, 0.0, jnp.float32, on, causal=False, drop_path=0.5) for on in (True, False)
    )

    variables = random_variables(evaluate, x)

    @quick_jit
    def run(variables, key):
        outs = []
        for block in (train, evaluate):
            options = {"rngs": {"dropout": key}, "capture_intermediates": True, "mutable": ["intermediates"]}
            outs.append(block.apply(variables, x, **options)[1]["intermediates"]["attention_residual"]["__call__"][0])
        return outs

    in_training, in_evaluation = run(variables, jax.random.key(0))
    kept = np.any(in_training != x, axis=(1, 2))
    assert 2 < kept.sum() < 14
    np.testing.assert_allclose((in_training - x)[kept], 2 * (in_evaluation - x)[kept], rtol=1e-3, atol=1e-5)


def lstm_reference(cell, x):
    """The equations gate by gate, in float64: ``(batch, length, features)`` to the hidden states."""
    c = h = np.zeros((x.shape[0], cell["hi"]["kernel"].shape[0]))
    states = []
    for step in range(x.shape[1]):
        i, f, g, o = (
            x[:, step] @ cell[f"i{gate}"]["kernel"] + h @ cell[f"h{gate}"]["kernel"] + cell[f"h{gate}"]["bias"]
            for gate in "ifgo"
        )
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        states.append(h)
    return np.stack(states, axis=1)


def test_lstm_against_its_equations():
    x = np.random.default_rng(0).normal(size=(3, 6, 2, 2)).astype(np.float32)
    fused, apart = (models.LSTMClassifier(5, num_layers=2, width=8, fused=switch) for switch in (True, False))

    variables = random_variables(fused, x)
    found = quick_jit(lambda variables: [fused.apply(variables, x), apart.apply(variables, x)])(variables)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    states = x.reshape(3, 6, 4)  # a row of two pixels with two channels is a step
    for layer in range(2):
        states = lstm_reference(params[f"lstm_{layer}"]["cell"], states)
    expected = states[:, -1] @ params["logits"]["kernel"] + params["logits"]["bias"]
    for logits in found:
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(jax.eval_shape(apart.init, jax.random.key(0), x)["params"]) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"name": "mobilenet", "width": 0.25, "blocks": (1, 1), "last_features": 8, "reduction": 8}, (8, 8, 1)),
        ({"name": "vit", "patch": 4, "num_layers": 1, "width": 16, "num_heads": 2}, (8, 8, 1)),
        ({"name": "lstm", "width": 16}, (8, 8, 1)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_half_precision_is_near_to_single(config, shape):
    """Executed, in one program and twice: bfloat16 has 8 bits of precision."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32)
    single, half = (
        models.build({**config, "dtype": dtype}, num_classes=5, input_shape=shape) for dtype in ("float32", "bfloat16")
    )

    run = quick_jit(lambda variables: [model.apply(variables, x) for model in (single, half)])
    one, two = run(random_variables(single, x))
    np.testing.assert_array_equal(one, run(random_variables(single, x))[0])
    assert two.dtype == jnp.float32
    scale = np.abs(one).max()
    assert 0 < np.abs(one - two).max() < 0.05 * scale
