"""The CIFAR residual networks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.models.residual import Residual

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialization by fan-out (arXiv 1502.01852)."""


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, ReLU between them and after the sum with the shortcut, ``residual``.

    With `zero_init_residual` the last norm's scale begins at 0, so that the block begins as its shortcut.
    """

    features: int
    stride: int
    shortcut: Literal["pad", "projection"]
    dtype: Any
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """A batch of images NHWC; the output has `features` channels and 1/stride of the side."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        y = conv(self.features, (3, 3), strides=self.stride, padding=1)(x)
        y = nn.relu(norm()(y))
        y = conv(self.features, (3, 3), padding=1)(y)
        last = nn.initializers.zeros_init() if self.zero_init_residual else nn.initializers.ones_init()
        y = norm(scale_init=last)(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == "projection":
                x = conv(self.features, (1, 1), strides=self.stride, name="shortcut")(x)
                x = norm(name="shortcut_norm")(x)
            else:
                missing = self.features - x.shape[-1]
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        return nn.relu(Residual(name="residual")(x, y))


def cifar_features(
    x: jax.Array,
    channels: Sequence[int],
    blocks: int,
    shortcut: Literal["pad", "projection"],
    dtype: Any,
    train: bool,
    stem_stride: int = 1,
) -> list[jax.Array]:
    """What the ``stem`` and each stage (``stage1_block1``, …) of `CifarResNet` put out; later stages halve the image.

    To be called from a compact method, whose module owns the layers.
    """
    stem = nn.Conv(
        channels[0],
        (3, 3),
        strides=stem_stride,
        padding=1,
        use_bias=False,
        kernel_init=he_normal,
        dtype=dtype,
        name="stem",
    )
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name="stem_norm")
    x = nn.relu(norm(stem(x)))
    features = []
    for stage, width in enumerate(channels):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            x = ResidualBlock(width, stride, shortcut, dtype, name=f"stage{stage + 1}_block{block + 1}")(x, train=train)
        features.append(x)
    return features


class CifarResNet(nn.Module):
    """The residual network of depth 6n + 2 for small images (He et al. 2016, arXiv 1512.03385, section 4.2).

    A 3×3 convolution, three stages of n blocks with 16, 32 and 64 channels, the second and third halving the image,
    global average pooling and a dense head. Returns float32 logits ``(batch, num_classes)``. Depth 20 at 32×32×3 and 10
    classes has 40,551,040 multiply-accumulates.

    Fields:
      num_classes: outputs of the head, the layer ``logits``.
      depth: 6n + 2: 20, 32, 38, 44, 56, 74, 110, 152, ...
      width: multiplies the channels of every stage; the product is rounded to a whole number.
      shortcut: where a stage begins, ``"pad"`` (the paper's A, no parameters: every second pixel, new channels zero,
        half of them on either side) or ``"projection"`` (B: 1×1 convolution and batch norm).
      dtype: of the computation; parameters and running statistics are float32.

    Convolutions are padded by one pixel on every side, also at stride 2 where Flax's ``SAME`` would pad on one side
    only; He initialization by fan-out; batch norm momentum 0.9. Running statistics are in ``batch_stats``.
    """

    num_classes: int
    depth: int = 20
    width: float = 1.0
    shortcut: Literal["pad", "projection"] = "pad"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of images NHWC; with `train` the norms use the batch and update ``batch_stats``."""
        blocks, remainder = divmod(self.depth - 2, 6)
        if remainder or blocks < 1:
            raise UsageError(
                f"depth={self.depth} is not 6n + 2; nearest: {6 * max(round((self.depth - 2) / 6), 1) + 2}"
            )
        channels = [max(round(self.width * base), 1) for base in (16, 32, 64)]
        *_, x = cifar_features(x, channels, blocks, self.shortcut, self.dtype, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
