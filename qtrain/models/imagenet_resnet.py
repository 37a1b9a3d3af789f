"""The ImageNet residual networks."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.models.residual import Residual
from qtrain.models.resnet import ResidualBlock, he_normal

BLOCKS: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Depth → blocks of each stage; depth 50 has bottlenecks."""
_BASE = (64, 128, 256, 512)
_EXPANSION = 4  # a bottleneck's output channels over those of its 3×3 convolution


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with batch norm, ReLU between them and after the sum with the shortcut.

    The sum is ``residual``. The output has ``4·features`` channels. The 3×3 convolution has the stride.
    """

    features: int
    stride: int
    dtype: Any
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """A batch of images NHWC; the output has ``4·features`` channels and 1/stride of the side."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        last = nn.initializers.zeros_init() if self.zero_init_residual else nn.initializers.ones_init()
        width = _EXPANSION * self.features
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), strides=self.stride, padding=1)(y)))
        y = norm(scale_init=last)(conv(width, (1, 1))(y))
        if self.stride != 1 or x.shape[-1] != width:
            x = norm(name="shortcut_norm")(conv(width, (1, 1), strides=self.stride, name="shortcut")(x))
        return nn.relu(Residual(name="residual")(x, y))


def imagenet_features(
    x: jax.Array,
    depth: int,
    width: float,
    stem: Literal["7x7", "3x3"],
    zero_init_residual: bool,
    dtype: Any,
    train: bool,
) -> list[jax.Array]:
    """What the four stages of `ImageNetResNet` put out, by its layers and their names.

    To be called from a compact method, whose module owns the layers.
    """
    channels = [max(round(width * base), 1) for base in _BASE]
    side, stride = (7, 2) if stem == "7x7" else (3, 1)
    conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=dtype, name="stem")
    x = conv(channels[0], (side, side), strides=stride, padding=side // 2)(x)
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name="stem_norm")
    x = nn.relu(norm(x))
    if stem == "7x7":
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    outputs = []
    for stage, (features, blocks) in enumerate(zip(channels, BLOCKS[depth], strict=True)):
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            name = f"stage{stage + 1}_block{index + 1}"
            block: nn.Module
            if depth == 50:
                block = BottleneckBlock(features, stride, dtype, zero_init_residual, name=name)
            else:
                block = ResidualBlock(features, stride, "projection", dtype, zero_init_residual, name=name)
            x = block(x, train=train)
        outputs.append(x)
    return outputs


class ImageNetResNet(nn.Module):
    """The residual network of depth 18, 34 or 50 for large images (He et al. 2016, arXiv 1512.03385, table 1).

    A stem, four stages of residual blocks with 64, 128, 256 and 512 channels (of the 3×3 convolutions), the later three
    halving the image, global average pooling and a dense head. Returns float32 logits ``(batch, num_classes)``. At
    224×224×3 and 1000 classes the depths have 1,814,073,344, 3,663,761,408 and 4,089,184,256 multiply-accumulates.

    Fields:
      num_classes: outputs of the head, the layer ``logits``.
      depth: 18 or 34 (two 3×3 convolutions a block), or 50 (bottlenecks).
      width: multiplies the channels of the stem and of every stage; the product is rounded to a whole number.
      stem: ``"7x7"``, a convolution of stride 2 and 3×3 max pooling of stride 2, so that stages work on 1/4, 1/8, 1/16
        and 1/32 of the side; ``"3x3"``, a convolution block at the images' own size, for small ones: 1, 1/2, 1/4, 1/8.
      zero_init_residual: the last norm of each block begins with scale 0, so that the block begins as its shortcut
        (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
      dtype: of the computation; parameters and running statistics are float32.

    Shortcuts are projections where the shape changes (the paper's B). In a bottleneck the 3×3 convolution has the
    stride, as is usual since (the paper has it in the first 1×1, for 3.86e9 multiply-accumulates at depth 50). He
    initialization by fan-out; batch norm momentum 0.9; padding is symmetric. Running statistics are in ``batch_stats``.

    Raises:
      UsageError: for another depth or stem.
    """

    num_classes: int
    depth: int = 50
    width: float = 1.0
    stem: Literal["7x7", "3x3"] = "7x7"
    zero_init_residual: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of images NHWC; with `train` the norms use the batch and update ``batch_stats``."""
        if self.depth not in BLOCKS:
            raise UsageError(f"depth={self.depth!r}: give one of {', '.join(map(str, BLOCKS))}")
        if self.stem not in ("7x7", "3x3"):
            raise UsageError(f"stem={self.stem!r}: give one of 7x7, 3x3")
        *_, x = imagenet_features(x, self.depth, self.width, self.stem, self.zero_init_residual, self.dtype, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
