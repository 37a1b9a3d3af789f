"""A detector of boxes in one stage: RetinaNet."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError, did_you_mean
from qtrain.models.imagenet_resnet import imagenet_features
from qtrain.models.residual import Residual
from qtrain.models.resnet import cifar_features, he_normal
from qtrain.models.values import Value, whole

Array = jax.Array

BACKBONES: dict[str, tuple[int, ...]] = {
    "cifar": (1, 2, 3),
    "resnet18": (2, 3, 4, 5),
    "resnet34": (2, 3, 4, 5),
    "resnet50": (2, 3, 4, 5),
}
"""Backbone → the level of each of its stages; a step of level l is 2^l pixels."""

PRIOR = 0.01
"""The score that every anchor and class begins with."""

_CIFAR_CHANNELS = (16, 32, 64)


def _consecutive(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return None
    if any(whole(number, 1) is None for number in value):
        return None
    return tuple(value) if list(value) == list(range(value[0], value[0] + len(value))) else None


def _ratios(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return None
    numbers = [isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in value]
    return tuple(map(float, value)) if all(numbers) else None


LEVELS = Value("a list of consecutive whole numbers of at least 1, such as (3, 4, 5)", _consecutive)
RATIOS = Value("a list of numbers above 0", _ratios)


class Backbone(nn.Module):
    """What the stages of a residual network put out, by level; layers are called as in that network."""

    kind: str
    blocks: int
    width: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> dict[int, Array]:
        """Level → features ``[B, ⌈H/2^l⌉, ⌈W/2^l⌉, F]``."""
        if self.kind == "cifar":
            channels = [max(round(self.width * base), 1) for base in _CIFAR_CHANNELS]
            stages = cifar_features(x, channels, self.blocks, "projection", self.dtype, train, stem_stride=2)
        else:
            depth = int(self.kind.removeprefix("resnet"))
            stages = imagenet_features(x, depth, self.width, "7x7", False, self.dtype, train)
        return dict(zip(BACKBONES[self.kind], stages, strict=True))


class FeaturePyramid(nn.Module):
    """Features of one width at every level, from the top down (Lin et al. 2017, arXiv 1612.03144).

    M_l = lateral_l(C_l) + M_{l+1} with every pixel doubled, and P_l = output_l(M_l): ``lateral3``, ``merge3``,
    ``output3``. Levels above the backbone's are convolutions of stride 2, ``extra6`` of the last stage and ``extra7``
    of the ReLU of the one before.
    """

    levels: tuple[int, ...]
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, stages: dict[int, Array]) -> list[Array]:
        """Features of each level."""
        conv = functools.partial(nn.Conv, self.features, kernel_init=he_normal, dtype=self.dtype)
        of_backbone = [level for level in self.levels if level in stages]
        found: dict[int, Array] = {}
        above: Array | None = None
        for level in reversed(of_backbone):
            x = conv((1, 1), name=f"lateral{level}")(stages[level])
            if above is None:
                merged = Residual(name=f"merge{level}")(x)
            else:
                doubled = above.repeat(2, axis=1).repeat(2, axis=2)[:, : x.shape[1], : x.shape[2]]
                merged = Residual(name=f"merge{level}")(x, doubled)
            above = merged
            found[level] = conv((3, 3), padding=1, name=f"output{level}")(merged)
        last = stages[of_backbone[-1]]
        for level in self.levels[len(of_backbone) :]:
            last = conv((3, 3), strides=2, padding=1, name=f"extra{level}")(last)
            found[level] = last
            last = nn.relu(last)
        return [found[level] for level in self.levels]


class Subnet(nn.Module):
    """`depth` convolutions 3×3 with ReLU, ``conv0``, …, and one to the outputs, called as `output` says.

    One subnet serves every level: it is called on each.
    """

    outputs: int
    output: str
    bias: float
    depth: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Features ``[B, H, W, F]`` to outputs ``[B, H, W, outputs]``."""
        for index in range(self.depth):
            conv = nn.Conv(
                self.features, (3, 3), padding=1, kernel_init=he_normal, dtype=self.dtype, name=f"conv{index}"
            )
            x = nn.relu(conv(x))
        return nn.Conv(
            self.outputs,
            (3, 3),
            padding=1,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.constant(self.bias),
            dtype=self.dtype,
            name=self.output,
        )(x)


class Detector(nn.Module):
    """RetinaNet (Lin et al. 2017, arXiv 1708.02002): a residual network, a feature pyramid, two subnets that it shares.

    Images ``[B, H, W, channels]`` to ``{"logits": float32 [B, A, C], "deltas": float32 [B, A, 4]}``: for every anchor
    the logit of each class, and the offsets of the box from it, as `qtrain.tasks.boxes.encoded` has them. Anchors are
    in the order of `anchors`. What they are trained by is `qtrain.tasks.Detection`.

    What rules can name: ``backbone/stem``, ``backbone/stage1_block1/…``; ``pyramid/lateral3``, ``merge3``,
    ``output3``, ``extra6``; ``class_subnet/conv0`` …, ``class_subnet/logits``; ``box_subnet/conv0`` …,
    ``box_subnet/deltas``. The last layers are two: a rule for the model's last one matches ``deltas`` alone.

    Fields:
      num_classes: C.
      backbone: "resnet18", "resnet34", "resnet50": with stages at the levels 2 … 5, of steps of 4 … 32 pixels; "cifar":
        the blocks of the small residual networks with a stem of stride 2, stages at the levels 1, 2 and 3.
      blocks: of each stage of "cifar".
      width: multiplies the channels of the backbone.
      levels: of the pyramid, consecutive; those above the backbone's are made by convolutions of stride 2.
      features: channels of the pyramid and the subnets.
      head_depth: convolutions of a subnet before its last.
      anchor_scale: side of the smallest anchor over the step of its level.
      octaves: sizes of anchors a level: 2^(k/octaves), k = 0 … octaves − 1.
      ratios: height over width of anchors.
      dtype: of the computation; parameters, running statistics and outputs are float32.

    Departures from the paper: convolutions of pyramid and subnets begin by He's rule and not at σ = 0.01, which for
    narrow layers leaves nothing of the signal; norms of the backbone are trained, not frozen.

    Raises:
      UsageError: for an unknown backbone.
    """

    num_classes: int
    backbone: str = "resnet50"
    blocks: int = 1
    width: float = 1.0
    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    features: int = 256
    head_depth: int = 4
    anchor_scale: float = 4.0
    octaves: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> dict[str, Array]:
        """Logits and offsets for a batch of images; with `train` the norms use the batch and update ``batch_stats``."""
        if self.backbone not in BACKBONES:
            names = ", ".join(BACKBONES)
            raise UsageError(
                f"backbone={self.backbone!r}: give one of {names}.{did_you_mean(self.backbone, BACKBONES)}"
            )
        stages = Backbone(self.backbone, self.blocks, self.width, self.dtype, name="backbone")(x, train=train)
        features = FeaturePyramid(self.levels, self.features, self.dtype, name="pyramid")(stages)
        shapes = self.octaves * len(self.ratios)
        subnets = {
            "logits": (self.num_classes, -math.log((1 - PRIOR) / PRIOR), "class_subnet"),
            "deltas": (4, 0.0, "box_subnet"),
        }
        found: dict[str, Array] = {}
        for output, (each, bias, name) in subnets.items():
            subnet = Subnet(shapes * each, output, bias, self.head_depth, self.features, self.dtype, name=name)
            levels = [subnet(level).reshape(x.shape[0], -1, each) for level in features]
            found[output] = jnp.concatenate(levels, axis=1).astype(jnp.float32)
        return found

    def anchors(self, height: int, width: int) -> np.ndarray:
        """The anchors of an image, float32 ``[A, 4]`` of (y0, x0, y1, x1) in pixels: by level, row, column and shape.

        Centred on each step of a level, of area (anchor_scale·2^l·2^(k/octaves))² and each of the ratios; those at the
        edges reach beyond the image.
        """
        found = []
        for level in self.levels:
            step = 2**level
            sides = [self.anchor_scale * step * 2 ** (k / self.octaves) for k in range(self.octaves)]
            shapes = np.array([(side * ratio**0.5, side / ratio**0.5) for side in sides for ratio in self.ratios])
            rows, columns = ((np.arange(-(-size // step)) + 0.5) * step for size in (height, width))
            centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)[:, :, None]
            found.append(np.concatenate([centres - shapes / 2, centres + shapes / 2], axis=-1).reshape(-1, 4))
        return np.concatenate(found).astype(np.float32)
