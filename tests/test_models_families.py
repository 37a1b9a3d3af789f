"""MobileNetV2, vision transformers, language models and recurrent nets: sizes by hand, numerics, names for rules."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qtrain
from qtrain import Rule, cost, models
from qtrain.models.mobilenet import InvertedResidual, scaled_channels
from qtrain.models.transformer import TransformerBlock, rotary_attention, rotate

LARGE = (224, 224, 3)


def abstract(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


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


@functools.cache
def traced(name, num_classes, shape, fields=(), dtype=jnp.float32):
    """Ops of one example, and the number of parameters."""
    model = models.build({"name": name, **dict(fields)}, num_classes=num_classes, input_shape=shape)
    x = abstract(1, *shape, dtype=dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    ops = cost.count(lambda variables, x: model.apply(variables, x), variables, x)
    return ops, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


# width: the channels of stem, seven stages and last convolution, rounded to multiples of 8 by hand; the paper's
# millions of multiply-accumulates, or those of the authors' table of pretrained networks.
MOBILENETS = {
    0.35: ((16, 8, 8, 16, 24, 32, 56, 112, 1280), 59),
    1.0: ((32, 16, 24, 32, 64, 96, 160, 320, 1280), 300),
    1.4: ((48, 24, 32, 48, 88, 136, 224, 448, 1792), 582),
}


@pytest.mark.parametrize("width", MOBILENETS)
def test_size_of_mobilenet(width):
    (stem, *stages, last), published = MOBILENETS[width]
    side = 112
    macs, parameters = side**2 * 27 * stem, 27 * stem + 2 * stem
    before = stem
    rows = zip(stages, (1, 6, 6, 6, 6, 6, 6), (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1), strict=True)
    for channels, expansion, repeats, first_stride in rows:
        for repeat in range(repeats):
            hidden = before * expansion
            if expansion > 1:
                macs += side**2 * before * hidden
                parameters += before * hidden + 2 * hidden
            side //= first_stride if repeat == 0 else 1
            macs += side**2 * (9 * hidden + hidden * channels)
            parameters += 9 * hidden + 2 * hidden + hidden * channels + 2 * channels
            before = channels
    macs += side**2 * before * last + last * 1000
    parameters += before * last + 2 * last + last * 1000 + 1000
    ops, found = traced("mobilenet", 1000, LARGE, (("width", width),))
    assert (ops.forward, found) == (macs, parameters)
    assert round(macs, -6) in (published * 10**6, (published + 1) * 10**6)
    if width == 1.0:
        assert (macs, parameters) == (300_774_272, 3_504_872)


def test_channels_of_mobilenet():
    bases = (32, 16, 24, 32, 64, 96, 160, 320)
    for width, ((*channels, last), _) in MOBILENETS.items():
        assert [scaled_channels(base, width) for base in bases] == channels
        assert scaled_channels(1280, max(width, 1.0)) == last
    for base in range(1, 400):
        for width in (0.05, 0.3, 0.77, 1.0, 1.9):
            found = scaled_channels(base, width)
            assert found % 8 == 0 and found >= max(8, 0.9 * base * width)
            assert found == 8 or found <= base * width + 8


# Rows of (blocks, channels of the 3×3 convolutions, side), the same for all depths at 224×224.
@pytest.mark.parametrize(
    ("depth", "blocks", "macs", "parameters"),
    [(18, (2, 2, 2, 2), 1_814_073_344, 11_689_512), (50, (3, 4, 6, 3), 4_089_184_256, 25_557_032)],
)
def test_size_of_imagenet_resnets(depth, blocks, macs, parameters):
    """Depth 50 with the stride in the 3×3 convolution ("v1.5"): 4.09e9."""
    expected = [112 * 112 * 49 * 3 * 64, 49 * 3 * 64 + 2 * 64]
    before = 64

    def layer(side, taps, inputs, outputs):
        expected[0] += side * side * taps * inputs * outputs
        expected[1] += taps * inputs * outputs + 2 * outputs

    for stage, (repeats, channels, side) in enumerate(zip(blocks, (64, 128, 256, 512), (56, 28, 14, 7), strict=True)):
        for repeat in range(repeats):
            strided = stage > 0 and repeat == 0
            outputs = 4 * channels if depth == 50 else channels
            if depth == 50:
                layer(2 * side if strided else side, 1, before, channels)
                layer(side, 9, channels, channels)
                layer(side, 1, channels, outputs)
            else:
                layer(side, 9, before, channels)
                layer(side, 9, channels, channels)
            if before != outputs:
                layer(side, 1, before, outputs)
            before = outputs
    expected = [expected[0] + before * 1000, expected[1] + before * 1000 + 1000]
    ops, found = traced("imagenet_resnet", 1000, LARGE, (("depth", depth),))
    assert [ops.forward, found] == expected == [macs, parameters]


@pytest.mark.parametrize(
    ("width", "num_heads", "macs", "attention", "parameters"),
    [(192, 3, 1_074_851_328, 178_831_872, 5_717_416), (384, 6, 4_241_218_560, 357_663_744, 22_050_664)],
    ids=["DeiT-T", "DeiT-S"],
)
def test_size_of_deit(width, num_heads, macs, attention, parameters):
    """The first number excludes QKᵀ and PV, which the published 1.3e9 and 4.6e9 include."""
    patches, tokens = 14 * 14, 14 * 14 + 1
    block = sum(inputs * outputs for inputs, outputs in [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)])
    by_hand = patches * 3 * 16 * 16 * width + 12 * tokens * block + width * 1000
    products = 12 * num_heads * 2 * tokens * tokens * (width // num_heads)
    biases = 4 * width + 4 * width + width
    size = 12 * (block + biases + 2 * 2 * width) + (16 * 16 * 3 + 1) * width + (tokens + 1) * width + 2 * width
    size += width * 1000 + 1000
    ops, found = traced("vit", 1000, LARGE, (("num_heads", num_heads), ("width", width)))
    inside = [op for op in ops if op.lhs.kind == op.rhs.kind == "act"]
    assert len(inside) == 24 and {op.path.rpartition("/")[2] for op in inside} == {"attention"}
    assert sum(op.forward for op in inside) == products == attention
    assert ops.forward - products == by_hand == macs
    assert found == size == parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_size_of_lstm_language_model(fused, tied):
    length, vocabulary, width, layers = 12, 50, 24, 2
    fields = (("num_layers", layers), ("width", width), ("fused", fused), ("tied", tied))
    ops, found = traced("lstm", vocabulary, (length,), fields, dtype=jnp.int32)
    assert ops.forward == length * (layers * 4 * 2 * width * width + width * vocabulary)
    head = 0 if tied else width * vocabulary + vocabulary
    assert found == vocabulary * width + layers * (4 * 2 * width * width + 4 * width) + head
    # Two leaves or more meet in a fused product, whose path is then that of the scope: the same as the module's.
    cells = {"lstm_0/cell", "lstm_1/cell"}
    gates = [f"{source}{gate}" for source in "ih" for gate in "ifgo"]
    assert {op.path for op in ops[:-1]} == (cells if fused else {f"{cell}/{gate}" for cell in cells for gate in gates})
    assert {op.executions for op in ops[:-1]} == {length}


def test_size_of_language_model_with_rotary_positions():
    length, vocabulary, width, layers = 12, 50, 32, 3
    fields = {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "use_bias": False}
    fields = (*fields.items(), ("num_layers", layers), ("width", width))
    ops, found = traced("transformer", vocabulary, (length,), fields, dtype=jnp.int32)
    hidden = 88  # 2/3 · 4 · 32 = 85.3
    block = 4 * width * width + 3 * width * hidden
    assert ops.forward == length * (layers * (block + 2 * length * width) + width * vocabulary)
    assert found == layers * (block + 2 * width) + width + 2 * vocabulary * width


def outputs_of(model, x, train=False):
    """(path, shape) of what every `Residual` puts out."""
    found = []

    def note(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, models.Residual) and context.method_name == "__call__":
            found.append(("/".join(context.module.path), out.shape))
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), x)
    return found


@pytest.mark.parametrize(
    ("reduction", "side", "sides"),
    [(32, 64, (32, 16, 8, 4, 4, 2, 2)), (8, 32, (32, 32, 16, 8, 8, 4, 4))],
)
def test_stream_of_mobilenet(reduction, side, sides):
    """Every block's output passes a module of its own, with and without a shortcut."""
    found = outputs_of(models.MobileNetV2(10, reduction=reduction), abstract(1, side, side, 3))
    channels, blocks = (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1)
    assert found == [
        (f"stage{stage + 1}_block{block + 1}/residual", (1, sides[stage], sides[stage], channels[stage]))
        for stage in range(7)
        for block in range(blocks[stage])
    ]


@pytest.mark.parametrize(
    ("config", "shape", "paths"),
    [
        ({"name": "resnet", "depth": 8}, (8, 8, 1), [f"stage{stage}_block1/residual" for stage in (1, 2, 3)]),
        (
            {"name": "imagenet_resnet", "depth": 18, "width": 0.1},
            (32, 32, 3),
            [f"stage{stage}_block{block}/residual" for stage in (1, 2, 3, 4) for block in (1, 2)],
        ),
        (
            {"name": "vit", "patch": 2, "num_layers": 2},
            (8, 8, 1),
            [f"block_{layer}/{part}_residual" for layer in (0, 1) for part in ("attention", "mlp")],
        ),
        (
            {"name": "transformer", "num_layers": 1, "width": 8},
            (8,),
            ["block_0/attention_residual", "block_0/mlp_residual"],
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_names_of_the_residual_stream(config, shape, paths):
    model = models.build(config, num_classes=10, input_shape=shape)
    x = abstract(1, *shape, dtype=jnp.float32 if len(shape) > 1 else jnp.int32)
    assert [path for path, _ in outputs_of(model, x)] == paths


def test_residual_is_the_sum():
    one, two = jnp.arange(6.0), jnp.arange(6.0) ** 2
    np.testing.assert_array_equal(models.Residual().apply({}, one), one)
    np.testing.assert_array_equal(models.Residual().apply({}, one, two), np.arange(6) + np.arange(6) ** 2)
    assert models.Residual().init(jax.random.key(0), one, two) == {}


def test_rules_reach_each_part_of_mobilenet():
    model = models.build({"name": "mobilenet", "width": 0.25, "reduction": 8}, num_classes=10, input_shape=(32, 32, 3))
    rules = [
        Rule(".*/depthwise", weights=8, acts=8),
        Rule(".*/expand", weights=4, acts=4),
        Rule(".*/project", weights=3, acts=3),
        Rule("stem|last|logits", weights=7, acts=7),
    ]
    plan = qtrain.quantize(model, rules).plan(abstract(1, 32, 32, 3))
    bits = [row.bits.weights for row in plan]
    assert {width: bits.count(width) for width in (8, 4, 3, 7)} == {8: 17, 4: 16, 3: 17, 7: 3}
    assert len(bits) == 53 and plan.coverage == 1


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


def test_attention_keeps_its_hooks():
    """The two products of attention are replaced through Flax's own fields, with rotary positions as well."""
    seen = []

    def hook(name):
        return lambda: lambda spec, *operands: seen.append((name, spec)) or jnp.einsum(spec, *operands)

    for attention_fn in (nn.dot_product_attention, rotary_attention):
        layer = nn.MultiHeadDotProductAttention(
            2,
            attention_fn=attention_fn,
            qk_attn_weights_einsum_cls=hook("scores"),
            attn_weights_value_einsum_cls=hook("mix"),
        )
        jax.eval_shape(layer.init, jax.random.key(0), abstract(1, 4, 8))
    assert seen == 2 * [("scores", "...qhd,...khd->...hqk"), ("mix", "...hqk,...khd->...qhd")]


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
