"""MobileNetV2, vision transformers, language models and recurrent nets: sizes by hand, names for rules and hooks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qtrain
from qtrain import Rule, cost, models
from qtrain.models.mobilenet import scaled_channels
from qtrain.models.transformer import rotary_attention

LARGE = (224, 224, 3)


def abstract(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


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
