"""The cases of each suite: a model, a batch, a loss, and which of its layers are quantized how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain.inject import Rule
from qtrain.metrics import cross_entropy
from qtrain.models.resnet import CifarResNet
from qtrain.models.transformer import TransformerBlock, TransformerLM
from qtrain.quantizers import Uniform

WIDTHS = tuple(range(2, 9))
"""The precisions that suite ``schedule`` visits: bits of weights and activations; gradients stay at 8."""

Execution = Literal["fake", "native"]

_FLOAT: dict[str, Any] = {"weight_quantizer": None, "act_quantizer": None}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One train step that every arm runs its own way.

    Attributes:
      suite: its suite.
      name: what tells it from the suite's other cases, or its sizes.
      bits: of weights, activations and gradients; in suite ``schedule`` of the gradients alone.
      model: makes the linen module for a computation dtype.
      inputs, labels: one batch.
      loss: ``(outputs, labels) -> scalar``.
      rules: makes the quantization rules for an execution.
      optimizer: of the parameters.
      arguments: further keywords of the model's call.
      grid: of the quantizers that `rules` names.
      input_gradient: the step also computes the gradient of the inputs, as a layer inside a network must.
      reference: a second float32 baseline, `float32_materialised`, is measured too.
    """

    suite: str
    name: str
    bits: int
    model: Callable[[Any], nn.Module]
    inputs: np.ndarray
    labels: np.ndarray | None
    loss: Callable[[jax.Array, Any], jax.Array]
    rules: Callable[[Execution], tuple[Rule, ...]]
    optimizer: optax.GradientTransformation
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: str = "symmetric"
    input_gradient: bool = False
    reference: bool = False


def cases(suite: str, widths: Sequence[int] = (8, 4), quick: bool = False) -> list[Case]:
    """The cases of `suite`; `widths` are those of ``matmul``, `quick` makes everything tiny."""
    if suite == "matmul":
        return [_matmul(bits, quick) for bits in widths]
    if suite == "resnet":
        return [_resnet(grid, quick) for grid in ("symmetric", "affine")]
    if suite == "lm":
        return [_lm(quick)]
    if suite == "schedule" and quick:  # seven programs of a block take a while, however small it is
        return [dataclasses.replace(_matmul(8, quick), suite=suite)]
    return [_block(suite, quick)]


def rules(execution: Execution, grid: str = "symmetric", floats: str = "") -> tuple[Rule, ...]:
    """Weights per channel, activations and stochastically rounded gradients per tensor, scales folded into the latter.

    Args:
      execution: "fake" or "native".
      grid: of all three, see `Uniform`.
      floats: regular expression on the paths of layers that stay in float.
    """
    quantized = Rule(
        weight_quantizer=Uniform(grid, per="channel"),
        act_quantizer=Uniform(grid, per="tensor"),
        grad_quantizer=Uniform(grid, per="tensor", rounding="stochastic"),
        residuals="folded",
        execution=execution,
    )
    return (Rule(path=floats, **_FLOAT), quantized) if floats else (quantized,)


def mean_square(outputs: jax.Array, labels: Any) -> jax.Array:
    """Mean of y², in float32: the cheapest loss whose gradient reaches every output."""
    return jnp.mean(jnp.square(outputs.astype(jnp.float32)))


def mean_cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of the logits."""
    return cross_entropy(outputs, labels).mean()


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _integers(high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, high, shape, np.int32)


def _matmul(bits: int, quick: bool) -> Case:
    rows, width = (16, 64) if quick else (256, 1024)
    return Case(
        "matmul",
        f"{rows}x{width} to {width}",
        bits,
        lambda dtype: nn.Dense(width, use_bias=False, dtype=dtype),
        _normal(rows, width),
        None,
        mean_square,
        rules,
        optax.sgd(1e-3),
        input_gradient=True,
    )


def _block(suite: str, quick: bool) -> Case:
    batch, length, width, heads = (2, 8, 32, 2) if quick else (8, 64, 256, 4)
    return Case(
        suite,
        f"{batch}x{length}x{width}, {heads} heads",
        8,
        lambda dtype: TransformerBlock(heads, 4 * width, 0.0, dtype, True),
        _normal(batch, length, width),
        None,
        mean_square,
        rules,
        optax.sgd(1e-3, momentum=0.9),
        input_gradient=True,
    )


def _resnet(grid: str, quick: bool) -> Case:
    depth, batch, side = (8, 4, 8) if quick else (38, 64, 32)
    return Case(
        "resnet",
        grid,
        8,
        lambda dtype: CifarResNet(10, depth, dtype=dtype),
        _normal(batch, side, side, 3),
        _integers(10, batch),
        mean_cross_entropy,
        lambda execution: rules(execution, grid, floats="stem|logits"),
        optax.sgd(1e-3, momentum=0.9),
        {"train": True},
        grid=grid,
        reference=True,
    )


def _lm(quick: bool) -> Case:
    layers, batch, length, width, heads = (1, 2, 8, 32, 2) if quick else (4, 8, 128, 256, 4)
    vocabulary = 256
    return Case(
        "lm",
        f"{layers} layers, {batch}x{length}x{width}, {heads} heads",
        8,
        lambda dtype: TransformerLM(vocabulary, length, layers, width, heads, dtype=dtype),
        _integers(vocabulary, batch, length),
        _integers(vocabulary, batch, length),
        mean_cross_entropy,
        rules,
        optax.sgd(1e-3, momentum=0.9),
        {"train": True},
    )
