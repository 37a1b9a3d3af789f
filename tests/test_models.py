"""The reference models: shapes, dtypes, parameter trees, gradients, and the config's errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from qtrain import cost, models
from qtrain.errors import UsageError

IMAGE, TOKENS = (8, 8, 1), (16,)
SMALL_LM = {"name": "transformer", "num_layers": 2, "width": 32, "num_heads": 4}
LLAMA = {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "use_bias": False}
SMALL_VIT = {"name": "vit", "patch": 2, "num_layers": 2, "width": 16, "num_heads": 2}

# name: (config.model, input shape of one example, outputs)
CONFIGS = {
    "mlp": ({"name": "mlp", "features": (32, 16), "dropout": 0.2}, IMAGE, 10),
    "mlp without hidden layers": ({"name": "mlp", "features": ()}, IMAGE, 10),
    "cnn": ({"name": "cnn", "features": (8, 16), "hidden": 16, "dropout": 0.2}, IMAGE, 10),
    "cnn, max pooling, no norm": (
        {"name": "cnn", "features": (8,), "hidden": 0, "pool": "max", "batch_norm": False},
        IMAGE,
        10,
    ),
    "resnet": ({"name": "resnet", "depth": 8, "width": 0.5}, IMAGE, 7),
    "resnet with projections": ({"name": "resnet", "depth": 8, "width": 0.5, "shortcut": "projection"}, IMAGE, 7),
    "imagenet_resnet": ({"name": "imagenet_resnet", "depth": 18, "width": 0.0625}, (64, 48, 3), 7),
    "imagenet_resnet, bottlenecks, small images": (
        {"name": "imagenet_resnet", "depth": 50, "width": 0.05, "stem": "3x3", "zero_init_residual": True},
        IMAGE,
        7,
    ),
    "transformer": (SMALL_LM, TOKENS, 50),
    "transformer, tied": ({**SMALL_LM, "tied": True, "dropout": 0.1}, TOKENS, 50),
    "transformer, scanned": ({**SMALL_LM, "scan_layers": True, "dropout": 0.1}, TOKENS, 50),
    "transformer, scanned and rematerialised": ({**SMALL_LM, "scan_layers": True, "remat": True}, TOKENS, 50),
    "transformer, rotary, rms, swiglu": ({**SMALL_LM, **LLAMA, "num_layers": 1, "tied": True}, TOKENS, 50),
    "transformer, rotary, rms, swiglu, scanned": ({**SMALL_LM, **LLAMA, "scan_layers": True}, TOKENS, 50),
    "mobilenet": (
        {"name": "mobilenet", "width": 0.25, "blocks": (1, 2), "last_features": 16, "reduction": 8, "dropout": 0.2},
        IMAGE,
        7,
    ),
    "mobilenet, large images": ({"name": "mobilenet", "width": 0.1, "last_features": 16}, (64, 48, 3), 7),
    "vit": ({**SMALL_VIT, "drop_path": 0.5}, IMAGE, 7),
    "vit, mean": ({**SMALL_VIT, "pool": "mean", "patch": 4, "dropout": 0.1}, (8, 16, 3), 7),
    "lstm": ({"name": "lstm", "num_layers": 2, "width": 16, "dropout": 0.1, "tied": True}, TOKENS, 50),
    "lstm, gates apart": ({"name": "lstm", "width": 16, "fused": False}, TOKENS, 50),
    "lstm on rows": ({"name": "lstm", "width": 16, "num_layers": 2}, IMAGE, 7),
    "lstm on a time series": ({"name": "lstm", "width": 16, "fused": False, "dropout": 0.1}, (12, 3), 7),
}

EXECUTED = [
    "mlp",
    "cnn",
    "cnn, max pooling, no norm",
    "resnet with projections",
    "transformer, tied",
    "transformer, scanned",
    "transformer, rotary, rms, swiglu",
    "mobilenet",
    "vit",
    "lstm",
]

# Compiling is what takes the time here, and nothing compares what two programs compute to the last bit.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch(shape, outputs, size=3):
    rng = np.random.default_rng(0)
    if len(shape) == 1:
        return jnp.asarray(rng.integers(0, outputs, (size, *shape)), jnp.int32)
    return jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)


def apply_in_training(model, variables, x, key):
    """Logits and updated statistics."""
    logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    return logits, updates.get("batch_stats", {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_dtypes(name, dtype):
    config, shape, outputs = CONFIGS[name]
    model = models.build({**config, "dtype": dtype}, num_classes=outputs, input_shape=shape)
    x = batch(shape, outputs)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    for train in (False, True):  # evaluation needs no rng and no mutable collection
        options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}} if train else {}

        def forward(variables, x, train=train, options=options):
            out = model.apply(variables, x, train=train, **options)
            return out[0] if train else out

        logits = jax.eval_shape(forward, variables, x)
        assert logits.shape == ((3, *shape, outputs) if len(shape) == 1 else (3, outputs))
        assert logits.dtype == jnp.float32
        for op in cost.count(forward, variables, x):
            assert {op.lhs.dtype, op.rhs.dtype} == {dtype}, op.path


@pytest.mark.parametrize("name", EXECUTED)
def test_training(name):
    config, shape, outputs = CONFIGS[name]
    model = models.build(config, num_classes=outputs, input_shape=shape)
    x = batch(shape, outputs)

    @quick_jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params, statistics, key):
        logits, statistics = apply_in_training(model, {"params": params, **statistics}, x, key)
        return -jax.nn.log_softmax(logits)[..., 0].mean(), statistics

    variables = quick_jit(model.init)(jax.random.key(0), x)
    statistics = {name: value for name, value in variables.items() if name != "params"}
    first, again, other = (step(variables["params"], statistics, jax.random.key(seed)) for seed in (1, 1, 2))
    (loss, statistics), gradient = first
    assert np.isfinite(loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        # The keys' bias shifts all scores of a query alike, which softmax does not see.
        if "key" not in jax.tree_util.keystr(path):
            assert np.any(leaf != 0), path
    assert loss == again[0][0]
    assert (loss != other[0][0]) == bool(config.get("dropout") or config.get("drop_path"))
    for old, new in zip(jax.tree.leaves(variables.get("batch_stats", {})), jax.tree.leaves(statistics), strict=True):
        assert np.any(old != new)


def test_attention_is_causal():
    model = models.build(SMALL_LM, num_classes=50, input_shape=TOKENS)
    x = batch(TOKENS, 50)
    variables = quick_jit(model.init)(jax.random.key(0), x)
    apply = quick_jit(model.apply)
    changed = apply(variables, x.at[:, 9].add(1) % 50) != apply(variables, x)
    assert not np.any(changed[:, :9])
    assert np.all(np.any(changed[:, 9:], axis=-1))


def test_scanned_and_rematerialised_layers_compute_the_same():
    x = batch(TOKENS, 50)
    plain = models.build(SMALL_LM, num_classes=50, input_shape=TOKENS)
    variables = quick_jit(plain.init)(jax.random.key(0), x)
    params = dict(variables["params"])
    blocks = [params.pop(f"block_{layer}") for layer in range(2)]
    stacked = {"params": {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}
    reference = quick_jit(plain.apply)(variables, x)
    for options in ({"scan_layers": True}, {"scan_layers": True, "remat": True}):
        scanned = models.build({**SMALL_LM, **options}, num_classes=50, input_shape=TOKENS)
        np.testing.assert_allclose(quick_jit(scanned.apply)(stacked, x), reference, rtol=1e-5, atol=1e-5)
    remat = models.build({**SMALL_LM, "remat": True}, num_classes=50, input_shape=TOKENS)
    np.testing.assert_allclose(quick_jit(remat.apply)(variables, x), reference, rtol=1e-5, atol=1e-5)


def test_padded_shortcut_is_the_subsampled_input_between_zeros():
    block = models.resnet.ResidualBlock(6, 2, "pad", jnp.float32)
    x = jnp.abs(batch((4, 4, 3), 0))
    variables = quick_jit(block.init)(jax.random.key(0), x)
    zeroed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key in ("scale", "bias") else leaf, variables
    )
    out = quick_jit(block.apply)(zeroed, x)
    np.testing.assert_array_equal(out[..., 1:4], x[:, ::2, ::2])
    np.testing.assert_array_equal(out[..., [0, 4, 5]], 0)
    assert set(variables["params"]) == {"Conv_0", "Conv_1", "BatchNorm_0", "BatchNorm_1"}


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (20, 269_722),
        (32, 464_154),
        (38, 561_370),
        (56, 853_018),
        (74, 1_144_666),
        (110, 1_727_962),
        (152, 2_408_474),
    ],
)
def test_published_sizes_of_the_cifar_resnets(depth, parameters):
    """He et al.'s table 6 for depths 20, 32, 56 and 110: 0.27, 0.46, 0.85 and 1.7 million."""
    # 97,216 a block in each stage: two 3×3 convolutions with their norms, of 16, 32 and 64 channels.
    assert parameters == 269_722 + (depth - 20) // 6 * sum(2 * (9 * c * c + 2 * c) for c in (16, 32, 64))
    model = models.build({"name": "resnet", "depth": depth}, num_classes=10, input_shape=(32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_published_sizes_of_the_imagenet_resnets(depth, parameters):
    model = models.build({"name": "imagenet_resnet", "depth": depth}, num_classes=1000, input_shape=(224, 224, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


# The side of the images that each stage of the residual blocks puts out, for images of 64 pixels.
@pytest.mark.parametrize(("stem", "sides"), [("7x7", (16, 8, 4, 2)), ("3x3", (64, 32, 16, 8))])
@pytest.mark.parametrize(("depth", "last_blocks", "expansion"), [(18, (2, 2, 2, 2), 1), (50, (3, 4, 6, 3), 4)])
def test_stages_of_the_imagenet_resnets(depth, last_blocks, expansion, stem, sides):
    model = models.ImageNetResNet(10, depth=depth, width=0.5, stem=stem)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def forward(variables, x):
        return model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]["intermediates"]

    found = jax.eval_shape(forward, variables, x)
    for stage, (side, blocks) in enumerate(zip(sides, last_blocks, strict=True)):
        name = f"stage{stage + 1}_block{blocks}"
        assert found[name]["__call__"][0].shape == (1, side, side, 32 * 2**stage * expansion)
        assert f"stage{stage + 1}_block{blocks + 1}" not in found


@pytest.mark.parametrize(
    "block",
    [
        models.resnet.ResidualBlock(6, 1, "projection", jnp.float32, zero_init_residual=True),
        models.imagenet_resnet.BottleneckBlock(2, 1, jnp.float32, zero_init_residual=True),
    ],
    ids=["two convolutions", "bottleneck"],
)
def test_block_that_begins_as_its_shortcut(block):
    x = batch((4, 4, 6 if block.features == 6 else 8), 0)

    @quick_jit
    def run(block_is_zero, key):
        variables = block.init(key, x)
        norms = sorted(name for name in variables["params"] if name.startswith("BatchNorm"))
        ones = {**variables["params"][norms[-1]], "scale": jnp.ones_like(variables["params"][norms[-1]]["scale"])}
        other = {**variables["params"], norms[-1]: ones}
        params = jax.tree.map(lambda a, b: jnp.where(block_is_zero, a, b), variables["params"], other)
        return block.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(run(True, jax.random.key(0)), jnp.maximum(x, 0))
    out = run(False, jax.random.key(0))
    assert np.mean(out != jnp.maximum(x, 0)) > 0.5 and np.all(out >= 0)


def test_bottleneck_is_trained_throughout():
    block = models.imagenet_resnet.BottleneckBlock(4, 2, jnp.float32)
    x = batch((6, 6, 8), 0)
    target = batch((3, 3, 16), 0, size=3)

    @quick_jit
    def run(key):
        variables = block.init(key, x)

        def loss(params):
            out, updates = block.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.mean((out - target) ** 2), updates["batch_stats"]

        return variables, jax.grad(loss, has_aux=True)(variables["params"])

    variables, (gradient, statistics) = run(jax.random.key(0))
    assert {name for name in gradient if "short" in name} == {"shortcut", "shortcut_norm"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(np.abs(leaf) > 1e-6), path
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), variables["batch_stats"], statistics)
    assert all(jax.tree.leaves(changed))


def test_config_dict_and_defaults():
    config = ml_collections.ConfigDict({"name": "mlp", "features": [64]})
    model = models.build(config, num_classes=10, input_shape=IMAGE)
    assert isinstance(model, nn.Module)
    assert model.features == (64,)
    assert models.build(SMALL_LM, num_classes=50, input_shape=TOKENS).max_length == 16


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        ({"name": "rennet"}, IMAGE, ["model.name='rennet'", "Did you mean 'resnet'?"]),
        ({}, IMAGE, ["model.name=None", "mlp, cnn, resnet, transformer"]),
        ({"name": "cnn", "feature": (8,)}, IMAGE, ["model.feature ", "Did you mean 'features'?"]),
        ({"name": "cnn", "depth": 20}, IMAGE, ["model.depth", "'cnn'"]),
        ({"name": "cnn", "features": 8}, IMAGE, ["model.features=8", "list"]),
        ({"name": "cnn", "features": "88"}, IMAGE, ["model.features='88'", "list"]),
        ({"name": "cnn", "features": (8, 0)}, IMAGE, ["model.features=(8, 0)", "at least 1"]),
        ({"name": "cnn", "features": (8, 8, 8, 8)}, IMAGE, ["model.features=[8, 8, 8, 8]", "at most 3"]),
        ({"name": "cnn", "hidden": -1}, IMAGE, ["model.hidden=-1"]),
        ({"name": "cnn", "pool": "avg"}, IMAGE, ["model.pool='avg'", "average, max"]),
        ({"name": "cnn", "batch_norm": 1}, IMAGE, ["model.batch_norm=1", "True or False"]),
        ({"name": "cnn", "dropout": 1.0}, IMAGE, ["model.dropout=1.0", "below 1"]),
        ({"name": "mlp", "dropout": None}, IMAGE, ["model.dropout=None"]),
        ({"name": "mlp", "dtype": "float"}, IMAGE, ["model.dtype='float'", "Did you mean 'float32'?"]),
        ({"name": "resnet", "depth": 21}, IMAGE, ["model.depth=21", "6n + 2"]),
        ({"name": "resnet", "depth": 2}, IMAGE, ["model.depth=2"]),
        ({"name": "resnet", "depth": "20"}, IMAGE, ["model.depth='20'"]),
        ({"name": "resnet", "width": 0}, IMAGE, ["model.width=0"]),
        ({"name": "resnet", "shortcut": "none"}, IMAGE, ["model.shortcut='none'", "pad, projection"]),
        ({"name": "resnet"}, TOKENS, ["images", "(16,)"]),
        ({"name": "imagenet_resnet", "depth": 20}, IMAGE, ["model.depth=20", "18, 34, 50"]),
        ({"name": "imagenet_resnet", "depth": 18.0}, IMAGE, ["model.depth=18.0", "18, 34, 50"]),
        ({"name": "imagenet_resnet", "stem": "5x5"}, IMAGE, ["model.stem='5x5'", "7x7, 3x3"]),
        ({"name": "imagenet_resnet", "width": -1}, IMAGE, ["model.width=-1", "above 0"]),
        ({"name": "imagenet_resnet", "zero_init_residual": "yes"}, IMAGE, ["model.zero_init_residual='yes'"]),
        ({"name": "imagenet_resnet", "shortcut": "pad"}, IMAGE, ["model.shortcut", "'imagenet_resnet'"]),
        ({"name": "imagenet_resnet"}, TOKENS, ["images", "(16,)"]),
        ({"name": "imagenet-resnet"}, IMAGE, ["Did you mean 'imagenet_resnet'?"]),
        ({"name": "transformer"}, IMAGE, ["tokens", "(8, 8, 1)"]),
        ({"name": "transformer", "width": 30, "num_heads": 4}, TOKENS, ["model.width=30", "model.num_heads=4"]),
        ({"name": "transformer", "max_length": 8}, TOKENS, ["model.max_length=8", "16 tokens"]),
        ({"name": "transformer", "num_layers": True}, TOKENS, ["model.num_layers=True"]),
        ({"name": "transformer", "positions": "rope"}, TOKENS, ["model.positions='rope'", "learned, rotary"]),
        ({"name": "transformer", "norm": "rmsnorm"}, TOKENS, ["model.norm='rmsnorm'", "layer, rms"]),
        ({"name": "transformer", "mlp": "relu"}, TOKENS, ["model.mlp='relu'", "gelu, swiglu"]),
        ({"name": "transformer", "width": 20, "positions": "rotary"}, TOKENS, ["even", "model.width=20", "is 5"]),
        ({"name": "mobilenet", "width": 0}, IMAGE, ["model.width=0", "above 0"]),
        ({"name": "mobilenet", "blocks": (1,) * 8}, IMAGE, ["model.blocks=(1, 1,", "1 to 7"]),
        ({"name": "mobilenet", "blocks": ()}, IMAGE, ["model.blocks=()", "1 to 7"]),
        ({"name": "mobilenet", "reduction": 16}, IMAGE, ["model.reduction=16", "32, 8"]),
        ({"name": "mobilenet"}, IMAGE, ["model.reduction=32", "8x8 pixels", "allowed: 8"]),
        ({"name": "mobilenet", "reduction": 8}, (4, 8, 1), ["model.reduction=8", "4x8 pixels", "none"]),
        ({"name": "mobilenet"}, TOKENS, ["images", "(16,)"]),
        ({"name": "mobilenetv2"}, IMAGE, ["Did you mean 'mobilenet'?"]),
        ({"name": "vit"}, IMAGE, ["model.patch=16", "8x8 pixels", "1, 2, 4, 8"]),
        ({"name": "vit", "patch": 4}, (8, 6, 3), ["model.patch=4", "8x6 pixels", "allowed: 1, 2"]),
        ({"name": "vit", "patch": 2, "num_heads": 5}, IMAGE, ["model.width=192", "model.num_heads=5"]),
        ({"name": "vit", "patch": 2, "pool": "cls"}, IMAGE, ["model.pool='cls'", "token, mean"]),
        ({"name": "vit", "patch": 2, "drop_path": 1}, IMAGE, ["model.drop_path=1", "below 1"]),
        ({"name": "vit"}, TOKENS, ["images", "(16,)"]),
        ({"name": "lstm", "tied": True}, IMAGE, ["model.tied=True", "(8, 8, 1)"]),
        ({"name": "lstm", "fused": 1}, TOKENS, ["model.fused=1", "True or False"]),
        ({"name": "lstm", "num_heads": 2}, TOKENS, ["model.num_heads", "'lstm'"]),
        ({"name": "lstm"}, (2, 2, 2, 2), ["(length, features)", "(2, 2, 2, 2)"]),
    ],
)
def test_errors_are_one_line(config, shape, words):
    with pytest.raises(UsageError) as error:
        models.build(config, num_classes=10, input_shape=shape)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_errors_of_the_modules_themselves():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(UsageError, match=r"depth=22 is not 6n \+ 2; nearest: 20"):
        jax.eval_shape(models.CifarResNet(10, depth=22).init, jax.random.key(0), x)
    for fields, words in (
        ({"depth": 101}, "depth=101: give one of 18, 34, 50"),
        ({"stem": "conv"}, "stem='conv'.*3x3"),
    ):
        with pytest.raises(UsageError, match=words):
            jax.eval_shape(models.ImageNetResNet(10, **fields).init, jax.random.key(0), x)
    for fields, words in (
        ({"blocks": ()}, "blocks=.*: give 1 to 7"),
        ({"reduction": 16}, "reduction=16: give one of 32, 8"),
    ):
        with pytest.raises(UsageError, match=words):
            jax.eval_shape(models.MobileNetV2(10, **fields).init, jax.random.key(0), x)
    for fields, words in (
        ({"patch": 5}, "patch=5 does not divide images of 32x32"),
        ({"num_heads": 5}, "width=192 is not a multiple of num_heads=5"),
        ({"pool": "max"}, "pool='max': give one of token, mean"),
    ):
        with pytest.raises(UsageError, match=words):
            jax.eval_shape(models.ViT(10, **fields).init, jax.random.key(0), x)
    tokens = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    for fields, words in (
        ({"max_length": 8}, "9 tokens; allowed: at most max_length=8"),
        ({"positions": "rope"}, "positions='rope': give one of learned, rotary"),
        ({"norm": "none"}, "norm='none': give one of layer, rms"),
        ({"mlp": "relu"}, "mlp='relu': give one of gelu, swiglu"),
        ({"positions": "rotary", "width": 20}, "width=20 over num_heads=4 is odd"),
    ):
        with pytest.raises(UsageError, match=words):
            jax.eval_shape(models.TransformerLM(50, **{"max_length": 9, **fields}).init, jax.random.key(0), tokens)
