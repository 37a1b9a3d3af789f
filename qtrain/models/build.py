"""From the ``model`` part of a config to a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean
from qtrain.models.cnn import CNN
from qtrain.models.imagenet_resnet import BLOCKS, ImageNetResNet
from qtrain.models.mlp import MLP
from qtrain.models.resnet import CifarResNet
from qtrain.models.transformer import TransformerLM

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a config value may be, in words, and the value as the module takes it, ``None`` when it is illegal."""

    allowed: str
    convert: Callable[[Any], Any]


def _whole(value: Any, least: int) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None


def _rate(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 else None


def _factor(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _widths(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    return None if any(_whole(width, 1) is None for width in value) else tuple(value)


def _choice(*allowed: Any) -> _Value:
    # Of the same type: 50.0 is no depth, and True no number.
    def convert(value: Any) -> Any:
        return next((one for one in allowed if type(one) is type(value) and one == value), None)

    return _Value("one of " + ", ".join(map(str, allowed)), convert)


_POSITIVE = _Value("a whole number of at least 1", lambda value: _whole(value, 1))
_RATE = _Value("a rate from 0 to below 1", _rate)
_SWITCH = _Value("True or False", lambda value: value if isinstance(value, bool) else None)
_WIDTHS = _Value("a list of whole numbers of at least 1", _widths)
_FACTOR = _Value("a number above 0", _factor)
_DEPTH = _Value("6n + 2, such as 20, 32, 44, 56 or 110", lambda v: v if _whole(v, 8) and v % 6 == 2 else None)

MODELS: dict[str, tuple[type[nn.Module], dict[str, _Value]]] = {
    "mlp": (MLP, {"features": _WIDTHS, "dropout": _RATE}),
    "cnn": (
        CNN,
        {
            "features": _WIDTHS,
            "hidden": _Value("a whole number of at least 0", lambda value: _whole(value, 0)),
            "pool": _choice("average", "max"),
            "batch_norm": _SWITCH,
            "dropout": _RATE,
        },
    ),
    "resnet": (
        CifarResNet,
        {
            "depth": _DEPTH,
            "width": _FACTOR,
            "shortcut": _choice("pad", "projection"),
        },
    ),
    "transformer": (
        TransformerLM,
        {
            "max_length": _POSITIVE,
            "num_layers": _POSITIVE,
            "width": _POSITIVE,
            "num_heads": _POSITIVE,
            "mlp_ratio": _POSITIVE,
            "dropout": _RATE,
            "tied": _SWITCH,
            "scan_layers": _SWITCH,
            "remat": _SWITCH,
        },
    ),
    "imagenet_resnet": (
        ImageNetResNet,
        {
            "depth": _choice(*BLOCKS),
            "width": _FACTOR,
            "stem": _choice("7x7", "3x3"),
            "zero_init_residual": _SWITCH,
        },
    ),
}
"""Name → (module, the fields that a config may set)."""


def build(config_model: Mapping[str, Any], *, num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """The module that ``config.model`` describes.

    Args:
      config_model: ``name`` (of `MODELS`), ``dtype`` (float32, bfloat16, float16: of the computation) and any of the
        module's own fields; what is not named keeps the module's default. A mapping or ``ConfigDict``.
      num_classes: of the labels; for a language model its vocabulary size.
      input_shape: of one example, without the batch: ``(height, width, channels)``, or ``(length,)`` for tokens, which
        is also the default of ``max_length``.

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
    if name == "transformer":
        return _transformer(fields, num_classes, shape)
    if name != "mlp" and len(shape) != 3:
        raise UsageError(f"model.name={name!r} takes images (height, width, channels); the data has shape {shape}")
    if name == "cnn" and min(shape[:2]) < 2 ** len(fields.get("features", CNN.features)):
        raise UsageError(
            f"model.features={list(fields.get('features', CNN.features))} is too long for {shape[0]}x{shape[1]} pixels,"
            f" which each entry halves; allowed: at most {min(shape[:2]).bit_length() - 1} entries"
        )
    return module(num_classes=num_classes, **fields)


def _transformer(fields: dict[str, Any], vocab_size: int, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) != 1:
        raise UsageError(f"model.name='transformer' takes tokens (length,); the data has shape {shape}")
    fields = {"max_length": shape[0], **fields}
    model = TransformerLM(vocab_size=vocab_size, **fields)
    if model.width % model.num_heads:
        raise UsageError(f"model.width={model.width} is not a multiple of model.num_heads={model.num_heads}")
    if model.max_length < shape[0]:
        raise UsageError(
            f"model.max_length={model.max_length} is less than the {shape[0]} tokens of an example; raise it"
        )
    return model
