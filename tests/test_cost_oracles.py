"""Counts of whole networks against hand arithmetic and published numbers."""

import jax
import jax.numpy as jnp
import pytest
from cost_shapes import passes, shape

import qtrain
from qtrain import Precision, cost, models
from qtrain.cost import Op, OpBits, Ops


def counted(model, x, train=True):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def forward(variables, x):
        return model.apply(variables, x, train=train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})

    return cost.count(forward, variables, x), variables


def kernel_weights(variables):
    return sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]) if path[-1].key == "kernel"
    )


BATCH = 2


def test_mlp():
    ops, variables = counted(models.MLP(10, features=(256, 128)), shape(BATCH, 8, 8, 1))
    first, second, head = BATCH * 64 * 256, BATCH * 256 * 128, BATCH * 128 * 10
    assert {op.path: op.forward for op in ops} == {"Dense_0": first, "Dense_1": second, "logits": head}
    assert passes(ops) == (first + second + head, second + head, first + second + head)
    assert ops.weights == kernel_weights(variables) == 64 * 256 + 256 * 128 + 128 * 10


@pytest.mark.parametrize(("side", "macs"), [(8, 347_392), (28, 4_241_152)])
def test_cnn(side, macs):
    ops, variables = counted(models.CNN(10), shape(BATCH, side, side, 1))
    half, quarter = side // 2, side // 4
    by_hand = {
        "Conv_0": side * side * 9 * 1 * 32,
        "Conv_1": half * half * 9 * 32 * 64,
        "Dense_0": quarter * quarter * 64 * 128,
        "logits": 128 * 10,
    }
    assert {op.path: op.forward for op in ops} == {path: BATCH * n for path, n in by_hand.items()}
    assert ops.forward == BATCH * macs
    assert passes(ops)[1:] == (BATCH * (macs - by_hand["Conv_0"]), BATCH * macs)
    assert ops.weights == kernel_weights(variables)


# 32·32·9·3·16 in the stem; a stage's convolutions at one size have 32·32·9·16·16 = 16·16·9·32·32 = 8·8·9·64·64 each,
# the first of the second and third stage half of it; 64·10 in the head; a projection 16·16·16·32 = 8·8·32·64.
STEM, FULL, HEAD, PROJECTION = 442_368, 2_359_296, 640, 131_072


@pytest.mark.parametrize(
    ("depth", "shortcut", "macs"),
    [(20, "pad", 40_551_040), (20, "projection", 40_813_184), (110, "pad", None), (56, "projection", None)],
)
def test_cifar_resnet(depth, shortcut, macs):
    ops, variables = counted(models.CifarResNet(10, depth=depth, shortcut=shortcut), shape(1, 32, 32, 3))
    blocks = (depth - 2) // 6
    by_hand = STEM + 6 * blocks * FULL - FULL + HEAD + (2 * PROJECTION if shortcut == "projection" else 0)
    assert ops.forward == by_hand
    assert macs in (None, by_hand)
    assert passes(ops)[1:] == (by_hand - STEM, by_hand)
    assert ops.weights == kernel_weights(variables)


def test_wider_resnet_is_quadratic_in_width():
    ops, _ = counted(models.CifarResNet(10, width=2.0), shape(1, 32, 32, 3))
    assert ops.forward == 2 * STEM + 4 * (40_551_040 - STEM - HEAD) + 2 * HEAD


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_transformer(scan_layers, remat, tied):
    vocabulary, length, width, layers = 50, 12, 32, 3
    model = models.TransformerLM(
        vocabulary, length, layers, width, 4, dropout=0.1, tied=tied, scan_layers=scan_layers, remat=remat
    )
    ops, _ = counted(model, shape(BATCH, length, dtype=jnp.int32))
    tokens = BATCH * length
    projections = tokens * 4 * width * width  # query, key, value, out
    scores = BATCH * 2 * length * length * width  # QKᵀ and PV over all heads; the causal half is computed too
    mlp = tokens * 2 * width * 4 * width
    head = tokens * width * vocabulary
    weights = layers * (projections + mlp) + head
    # The embeddings below the first layer are learned, so every product has an input gradient; QKᵀ and PV have two.
    assert passes(ops) == (weights + layers * scores, weights + 2 * layers * scores, weights)
    assert ops.weights == layers * 12 * width * width + width * vocabulary
    if scan_layers:
        attention = [op for op in ops if op.path == "blocks/attention"]
        assert len(attention) == 2
        assert {op.executions for op in ops} == {layers, 1}
    assert ops[-1].path == ("token_embedding" if tied else "logits")


# Multiply-accumulates at 224×224×3 and 1000 classes, in millions and exactly. The stem 112·112·49·3·64; a stage's 3×3
# convolutions at one size 56·56·9·64·64 each, the first of a halving stage half of that; a projection 28·28·64·128.
IMAGENET_STEM, IMAGENET_FULL, IMAGENET_PROJECTION = 118_013_952, 115_605_504, 6_422_528


@pytest.mark.parametrize(
    ("depth", "blocks", "macs", "weights"),
    [(18, (2, 2, 2, 2), 1_814_073_344, 11_678_912), (34, (3, 4, 6, 3), 3_663_761_408, 21_779_648)],
)
def test_imagenet_resnet(depth, blocks, macs, weights):
    ops, variables = counted(models.ImageNetResNet(1000, depth=depth), shape(1, 224, 224, 3))
    halved = 3  # stages whose first convolution has half the channels in
    by_hand = IMAGENET_STEM + 2 * sum(blocks) * IMAGENET_FULL - halved * IMAGENET_FULL // 2
    by_hand += halved * IMAGENET_PROJECTION + 512 * 1000
    assert passes(ops) == (by_hand, by_hand - IMAGENET_STEM, by_hand)
    assert by_hand == macs
    assert ops.weights == kernel_weights(variables) == weights


def test_wider_imagenet_resnet_for_small_images():
    """The small stem keeps the images' size: the stages of a 56-pixel image cost what those of 224 pixels do."""
    large, small = (
        counted(models.ImageNetResNet(10, depth=18, width=width, stem=stem), shape(1, side, side, 3))[0].forward
        for width, stem, side in ((1.0, "7x7", 224), (0.5, "3x3", 56))
    )
    stem = 56 * 56 * 9 * 3 * 32
    assert 4 * (small - stem - 256 * 10) == large - IMAGENET_STEM - 512 * 10


def test_resnet50_at_imagenet_size():
    ops, variables = counted(models.ImageNetResNet(1000, depth=50), shape(1, 224, 224, 3), train=False)
    assert ops.forward == 4_089_184_256
    assert ops.weights == kernel_weights(variables) == 25_502_912
    marked = Ops(
        Op(**{**vars(op), "marker": OpBits(op.path, weights="schedule", acts="schedule", grads="schedule")})
        for op in ops
    )
    sixteen = cost.bitops(marked, Precision(16, 16, 16), "forward")
    assert sixteen == 1_046_831_169_536
    for weights, acts, ratio in ((8, 8, 0.25), (4, 4, 0.0625), (2, 4, 0.03125)):
        assert cost.bitops(marked, Precision(weights, acts, 8), "forward") / sixteen == ratio
    # Linear: W4A2 costs what W4A4 does, the narrowest unit being 4 bits wide.
    linear = [cost.linear(marked, Precision(w, a, 8), "forward") for w, a in ((16, 16), (8, 8), (4, 4), (4, 2))]
    assert linear == [ops.forward * units for units in (16, 8, 4, 4)]
    assert cost.memory_bits(marked, Precision(4, 8, 8)) == 25_502_912 * 4
    assert cost.relative(marked, Precision(16, 16, 16), "forward") == 0.25


def test_injected_resnet20_follows_its_rules():
    """First and last layer at 8 bits, the rest on the schedule, through the injection itself."""
    x = shape(1, 32, 32, 3)
    ops = qtrain.quantize(models.CifarResNet(10)).plan(x).ops
    assert passes(ops) == (40_551_040, 40_551_040 - STEM, 40_551_040)
    middle, float_gradient = 40_551_040 - STEM - HEAD, 32
    for bits in (3, 8):
        expected = (
            middle * (bits * bits + 2 * bits * float_gradient)
            + STEM * (8 * 8 + 8 * float_gradient)
            + HEAD * (8 * 8 + 2 * 8 * float_gradient)
        )
        assert cost.bitops(ops, Precision(bits, bits, None)) == expected
