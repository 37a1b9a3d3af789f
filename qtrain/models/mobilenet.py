"""MobileNetV2."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.models.residual import Residual
from qtrain.models.resnet import he_normal

STAGES: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and the first block's stride of each stage: the paper's table 2, whose t, c, n, s."""
REDUCTIONS = (32, 8)
_STEM = 32

# A depthwise kernel's fan-out is its 9 taps; the general formula would multiply that by the channels.
_depthwise_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def scaled_channels(channels: int, width: float) -> int:
    """``width · channels`` rounded to the nearest multiple of 8, but to no less than 8 nor than 9/10 of the product.

    The rounding of the authors' code; halves go up.

    >>> scaled_channels(24, 1.4), scaled_channels(24, 0.35), scaled_channels(16, 0.35)
    (32, 8, 8)
    """
    product = channels * width
    rounded = max(8, int(product + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * product else rounded + 8


class InvertedResidual(nn.Module):
    """A 1×1 convolution to `expansion` times the channels, a 3×3 depthwise one, and a linear 1×1 to `features`.

    Batch norm after each, ReLU6 after the first two (the layers ``expand``, ``depthwise``, ``project`` and their
    ``…_norm``); no ``expand`` where the expansion is 1. What comes out passes ``residual``, which adds the input if the
    stride is 1 and the channels stay.
    """

    features: int
    stride: int
    expansion: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """A batch of images NHWC; the output has `features` channels and 1/stride of the side, rounded up."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        hidden = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = nn.relu6(norm(name="expand_norm")(conv(hidden, (1, 1), name="expand")(y)))
        depthwise = conv(
            hidden,
            (3, 3),
            strides=self.stride,
            padding=1,
            feature_group_count=hidden,
            kernel_init=_depthwise_normal,
            name="depthwise",
        )
        y = nn.relu6(norm(name="depthwise_norm")(depthwise(y)))
        y = norm(name="project_norm")(conv(self.features, (1, 1), name="project")(y))
        residual = Residual(name="residual")
        return residual(x, y) if self.stride == 1 and x.shape[-1] == self.features else residual(y)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 2), for large images and small ones.

    A 3×3 convolution ``stem`` with 32 channels, seven stages of inverted residual blocks (``stage1_block1`` …
    ``stage7_block1``), a 1×1 convolution ``last``, global average pooling and a dense head. Returns float32 logits
    ``(batch, num_classes)``. At 224×224×3 and 1000 classes: 300,774,272 multiply-accumulates and 3,504,872 parameters.

    Fields:
      num_classes: outputs of the head, the layer ``logits``.
      width: multiplies all channels, by `scaled_channels`; those of ``last`` only where it is above 1, as the paper has
        it.
      blocks: of each stage; fewer than seven entries end the network after so many stages.
      last_features: channels of the convolution ``last``.
      reduction: the side of the image over that of the last stage. 32 is the paper's. 8 is for small images: stem and
        second stage keep the side, as is usual on CIFAR (32×32 is worked on at 32, 16, 8 and 4), which the paper did
        not try.
      dropout: rate before the head, from the rng ``dropout``; the authors' code has 0.2.
      dtype: of the computation; parameters and running statistics are float32.

    Batch norm has momentum 0.9 and epsilon 1e-5, as the other networks here (the authors: 0.997 and 1e-3); padding is
    symmetric. He initialization by fan-out. Running statistics are in ``batch_stats``.

    Raises:
      UsageError: for more than seven stages, or another reduction.
    """

    num_classes: int
    width: float = 1.0
    blocks: Sequence[int] = tuple(blocks for _, _, blocks, _ in STAGES)
    last_features: int = 1280
    reduction: Literal[32, 8] = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of images NHWC; with `train` the norms use the batch and update ``batch_stats``."""
        if not 1 <= len(self.blocks) <= len(STAGES):
            raise UsageError(f"blocks={list(self.blocks)}: give 1 to {len(STAGES)} numbers, one a stage")
        if self.reduction not in REDUCTIONS:
            raise UsageError(f"reduction={self.reduction!r}: give one of {', '.join(map(str, REDUCTIONS))}")
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        small = self.reduction == 8
        stem = conv(scaled_channels(_STEM, self.width), (3, 3), strides=1 if small else 2, padding=1, name="stem")
        x = nn.relu6(norm(name="stem_norm")(stem(x)))
        for stage, ((expansion, channels, _, stride), blocks) in enumerate(zip(STAGES, self.blocks, strict=False)):
            features = scaled_channels(channels, self.width)
            if small and stage == 1:
                stride = 1
            for block in range(blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                first = stride if block == 0 else 1
                x = InvertedResidual(features, first, expansion, self.dtype, name=name)(x, train=train)
        last = scaled_channels(self.last_features, max(self.width, 1.0))
        x = nn.relu6(norm(name="last_norm")(conv(last, (1, 1), name="last")(x)))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
