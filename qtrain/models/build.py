"""From the ``model`` part of a config to a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean
from qtrain.models import detector, mobilenet, s5, s5_ssm, transformer, vit
from qtrain.models.cnn import CNN
from qtrain.models.detector import BACKBONES, Detector
from qtrain.models.gcn import GCN, NORMS
from qtrain.models.graph_sage import GraphSAGE
from qtrain.models.imagenet_resnet import BLOCKS, ImageNetResNet
from qtrain.models.lstm import LSTMLM, LSTMClassifier
from qtrain.models.mlp import MLP
from qtrain.models.mobilenet import MobileNetV2
from qtrain.models.resnet import CifarResNet
from qtrain.models.s5 import S5LM, S5Classifier
from qtrain.models.s5_dynamics import initial_eigenvalues
from qtrain.models.transformer import TransformerLM
from qtrain.models.values import FACTOR, NATURAL, POSITIVE, RATE, SWITCH, WIDTHS, Value, choice, whole, wholes
from qtrain.models.vit import ViT

DTYPES = ("float32", "bfloat16", "float16")

_DEPTH = Value(
    "6n + 2, such as 20, 32, 38, 44, 56, 74, 110 or 152", lambda v: v if whole(v, 8) and v % 6 == 2 else None
)

_GRAPH: dict[str, Value] = {
    "num_layers": POSITIVE,
    "width": POSITIVE,
    "norm": choice(*NORMS),
    "dropout": RATE,
    "input_dropout": RATE,
}

MODELS: dict[str, tuple[type[nn.Module], dict[str, Value]]] = {
    "mlp": (MLP, {"features": WIDTHS, "dropout": RATE}),
    "cnn": (
        CNN,
        {
            "features": WIDTHS,
            "hidden": NATURAL,
            "pool": choice("average", "max"),
            "batch_norm": SWITCH,
            "dropout": RATE,
        },
    ),
    "resnet": (
        CifarResNet,
        {
            "depth": _DEPTH,
            "width": FACTOR,
            "shortcut": choice("pad", "projection"),
        },
    ),
    "transformer": (
        TransformerLM,
        {
            "max_length": POSITIVE,
            "num_layers": POSITIVE,
            "width": POSITIVE,
            "num_heads": POSITIVE,
            "mlp_ratio": POSITIVE,
            "dropout": RATE,
            "tied": SWITCH,
            "scan_layers": SWITCH,
            "remat": SWITCH,
            "positions": choice(*transformer.POSITIONS),
            "norm": choice(*transformer.NORMS),
            "mlp": choice(*transformer.MLPS),
            "use_bias": SWITCH,
        },
    ),
    "imagenet_resnet": (
        ImageNetResNet,
        {
            "depth": choice(*BLOCKS),
            "width": FACTOR,
            "stem": choice("7x7", "3x3"),
            "zero_init_residual": SWITCH,
        },
    ),
    "mobilenet": (
        MobileNetV2,
        {
            "width": FACTOR,
            "blocks": wholes(len(mobilenet.STAGES)),
            "last_features": POSITIVE,
            "reduction": choice(*mobilenet.REDUCTIONS),
            "dropout": RATE,
        },
    ),
    "vit": (
        ViT,
        {
            "patch": POSITIVE,
            "num_layers": POSITIVE,
            "width": POSITIVE,
            "num_heads": POSITIVE,
            "mlp_ratio": POSITIVE,
            "pool": choice(*vit.POOLS),
            "dropout": RATE,
            "drop_path": RATE,
        },
    ),
    # On tokens; on images and other sequences `build` makes an `LSTMClassifier`.
    "lstm": (
        LSTMLM,
        {"num_layers": POSITIVE, "width": POSITIVE, "dropout": RATE, "tied": SWITCH, "fused": SWITCH},
    ),
    "s5": (
        S5Classifier,
        {
            "num_layers": POSITIVE,
            "width": POSITIVE,
            "state_size": POSITIVE,
            "blocks": POSITIVE,
            "discretisation": choice(*s5_ssm.DISCRETISATIONS),
            "parametrisation": choice(*s5_ssm.PARAMETRISATIONS),
            "conjugate_symmetry": SWITCH,
            "bidirectional": SWITCH,
            "recurrence": choice(*s5_ssm.RECURRENCES),
            "least_step": FACTOR,
            "most_step": FACTOR,
            "activation": choice(*s5.ACTIVATIONS),
            "dropout": RATE,
            "remat": SWITCH,
        },
    ),
    "detector": (
        Detector,
        {
            "backbone": choice(*BACKBONES),
            "blocks": POSITIVE,
            "width": FACTOR,
            "levels": detector.LEVELS,
            "features": POSITIVE,
            "head_depth": NATURAL,
            "anchor_scale": FACTOR,
            "octaves": POSITIVE,
            "ratios": detector.RATIOS,
        },
    ),
    "gcn": (GCN, _GRAPH),
    "graph_sage": (GraphSAGE, _GRAPH),
}
"""Name → (module, the fields that a config may set)."""

GRAPH_MODELS = ("gcn", "graph_sage")
"""Those of `MODELS` that take a graph."""
BOX_MODELS = ("detector",)
"""Those of `MODELS` that find boxes."""


def build(config_model: Mapping[str, Any], *, num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """The module that ``config.model`` describes.

    Args:
      config_model: ``name`` (of `MODELS`), ``dtype`` (float32, bfloat16, float16: of the computation) and any of the
        module's own fields; what is not named keeps the module's default. A mapping or ``ConfigDict``.
      num_classes: of the labels; for a language model its vocabulary size.
      input_shape: of one example, without the batch: ``(height, width, channels)``, or ``(length,)`` for tokens, which
        is also the default of ``max_length``. An lstm also takes ``(length, features)``; a graph has ``(nodes,
        features)``.

    Raises:
      UsageError: an unknown name or key, an illegal value, an input shape that does not suit the model.

    >>> build({"name": "resnet", "depth": 32}, num_classes=10, input_shape=(32, 32, 3)).depth
    32
    """
    settings = dict(config_model.items())
    name = settings.pop("name", None)
    if name not in MODELS:
        raise UsageError(f"model.name={name!r} is not one of {', '.join(MODELS)}.{did_you_mean(name, MODELS)}")
    module, values = MODELS[name]
    fields: dict[str, Any] = {}
    dtype = settings.pop("dtype", "float32")
    if dtype not in DTYPES:
        raise UsageError(f"model.dtype={dtype!r} is not one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    fields["dtype"] = jnp.dtype(dtype)
    for key, value in settings.items():
        if key not in values:
            raise UsageError(
                f"model.{key} is not a key of the model {name!r}: name, dtype, {', '.join(values)}."
                f"{did_you_mean(key, ('name', 'dtype', *values))}"
            )
        fields[key] = values[key].convert(value)
        if fields[key] is None:
            raise UsageError(f"model.{key}={value!r} is not allowed: {values[key].allowed}")
    shape = tuple(input_shape)
    if name in _SEQUENCES:
        return _SEQUENCES[name](fields, num_classes, shape)
    if name in GRAPH_MODELS:
        if len(shape) != 2:
            raise UsageError(f"model.name={name!r} takes a graph (nodes, features); the data has shape {shape}")
        return module(num_classes=num_classes, **fields)
    if name != "mlp" and len(shape) != 3:
        raise UsageError(f"model.name={name!r} takes images (height, width, channels); the data has shape {shape}")
    model = module(num_classes=num_classes, **fields)
    if name in _CHECKS:
        _CHECKS[name](model, shape)
    return model


def _transformer(fields: dict[str, Any], vocab_size: int, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) != 1:
        raise UsageError(f"model.name='transformer' takes tokens (length,); the data has shape {shape}")
    fields = {"max_length": shape[0], **fields}
    model = TransformerLM(vocab_size=vocab_size, **fields)
    _check_heads(model)
    if model.positions == "rotary" and model.width // model.num_heads % 2:
        raise UsageError(
            f"model.positions='rotary' takes heads of even width; model.width={model.width} over "
            f"model.num_heads={model.num_heads} is {model.width // model.num_heads}"
        )
    if model.max_length < shape[0]:
        raise UsageError(
            f"model.max_length={model.max_length} is less than the {shape[0]} tokens of an example; raise it"
        )
    return model


def _lstm(fields: dict[str, Any], num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        return LSTMLM(vocab_size=num_classes, **fields)
    if len(shape) not in (2, 3):
        raise UsageError(
            "model.name='lstm' takes tokens (length,), sequences (length, features) or images (height, width, "
            f"channels); the data has shape {shape}"
        )
    if "tied" in fields:
        raise UsageError(
            f"model.tied={fields['tied']} is for tokens, whose embedding the head would share; the data has shape "
            f"{shape}: leave it out"
        )
    return LSTMClassifier(num_classes=num_classes, **fields)


def _check_heads(model: Any) -> None:
    if model.width % model.num_heads:
        raise UsageError(f"model.width={model.width} is not a multiple of model.num_heads={model.num_heads}")


def _check_cnn(model: Any, shape: tuple[int, ...]) -> None:
    if min(shape[:2]) < 2 ** len(model.features):
        raise UsageError(
            f"model.features={list(model.features)} is too long for {shape[0]}x{shape[1]} pixels,"
            f" which each entry halves; allowed: at most {min(shape[:2]).bit_length() - 1} entries"
        )


def _check_mobilenet(model: Any, shape: tuple[int, ...]) -> None:
    if min(shape[:2]) < model.reduction:
        allowed = ", ".join(str(one) for one in mobilenet.REDUCTIONS if one <= min(shape[:2])) or "none: enlarge them"
        raise UsageError(
            f"model.reduction={model.reduction} is more than the {shape[0]}x{shape[1]} pixels of the data have; "
            f"allowed: {allowed}"
        )


def _check_vit(model: Any, shape: tuple[int, ...]) -> None:
    _check_heads(model)
    side = math.gcd(*shape[:2])
    if side % model.patch:
        allowed = ", ".join(str(patch) for patch in range(1, side + 1) if side % patch == 0)
        raise UsageError(
            f"model.patch={model.patch} does not divide images of {shape[0]}x{shape[1]} pixels; allowed: {allowed}"
        )


def _check_detector(model: Any, shape: tuple[int, ...]) -> None:
    lowest, highest = model.levels[0], model.levels[-1]
    stages = BACKBONES[model.backbone]
    if lowest not in stages:
        raise UsageError(
            f"model.levels={list(model.levels)}: the stages of model.backbone={model.backbone!r} are of the levels "
            f"{', '.join(map(str, stages))}; begin with one of them"
        )
    if min(shape[:2]) < 2**highest:
        raise UsageError(
            f"model.levels={list(model.levels)}: a step of level {highest} is {2**highest} pixels, and the images have "
            f"{shape[0]}x{shape[1]}; end at {min(shape[:2]).bit_length() - 1} or before"
        )
    if model.blocks != 1 and model.backbone != "cifar":
        raise UsageError(
            f"model.blocks={model.blocks} is for model.backbone='cifar', not {model.backbone!r}; leave it at 1"
        )


def _s5(fields: dict[str, Any], num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    model: Any
    if len(shape) == 1:
        if fields.pop("bidirectional", False):
            raise UsageError("model.bidirectional=True lets a language model see what it is to predict; leave it out")
        model = S5LM(vocab_size=num_classes, **fields)
    elif len(shape) in (2, 3):
        model = S5Classifier(num_classes=num_classes, **fields)
    else:
        raise UsageError(
            "model.name='s5' takes tokens (length,), sequences (length, channels) or images; the data has shape "
            f"{shape}"
        )
    initial_eigenvalues(model.state_size, model.blocks, model.conjugate_symmetry)  # refuses sizes that do not divide
    return model


_SEQUENCES: dict[str, Callable[[dict[str, Any], int, tuple[int, ...]], nn.Module]] = {
    "transformer": _transformer,
    "lstm": _lstm,
    "s5": _s5,
}
_CHECKS: dict[str, Callable[[Any, tuple[int, ...]], None]] = {
    "cnn": _check_cnn,
    "mobilenet": _check_mobilenet,
    "vit": _check_vit,
    "detector": _check_detector,
}
