"""What is measured while training and evaluating, as clu metrics that accumulate inside the compiled step."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from qtrain.precision import Precision
from qtrain.trees import leaf_name

Array = jax.Array


@flax.struct.dataclass
class OnChange(metrics.Average):
    """Average of the finite values at the steps whose bits changed; NaN (null in the file) when there were none."""

    @classmethod
    def from_model_output(cls, values: Array, changed: Array, **_: Any) -> OnChange:
        """One step's value, counted only if `changed` and finite."""
        counted = changed & jnp.isfinite(values)
        return cls(total=jnp.where(counted, values, 0.0), count=counted.astype(jnp.int32))


def on_change(name: str) -> type[OnChange]:
    """`OnChange` of the model output called `name`."""

    @flax.struct.dataclass
    class FromOutput(OnChange):
        @classmethod
        def from_model_output(cls, **outputs: Any) -> OnChange:  # type: ignore[override]
            return super().from_model_output(outputs[name], outputs["changed"])

    return FromOutput


def norms(gradients: Any, updates: Any, params: Any) -> Array:
    """L2 norms of each parameter's gradient, update and value, float32 [3, 1 + leaves]: first those of all together."""

    def of(tree: Any) -> Array:
        squares = jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)])
        return jnp.sqrt(jnp.concatenate([jnp.sum(squares, keepdims=True), squares]))

    return jnp.stack([of(gradients), of(updates), of(params)])


def norm_rows(means: Any, params: Any) -> dict[str, float]:
    """Averaged `norms` by the names of a row: ``norms/<parameter>/…``, of all parameters together ``norms/…``.

    ``gradient`` (before clipping) and ``update`` are average norms; ``update_ratio`` is ‖update‖/‖value‖, each averaged
    first, which a bias that begins at zero does not make infinite.

    Args:
      means: [3, 1 + leaves].
      params: a tree of that many leaves.
    """
    names = ["", *("/".join(leaf_name(path)) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0])]
    found = {}
    for name, (gradient, update, value) in zip(names, np.asarray(means, np.float64).T, strict=True):
        ratio = update / value if value else math.nan
        for metric, number in (("gradient", gradient), ("update", update), ("update_ratio", ratio)):
            found["/".join(filter(None, ("norms", name, metric)))] = float(number)
    return found


@functools.cache
def _layer_norms(leaves: int) -> type[metrics.Metric]:
    """The average of `norms`."""

    @flax.struct.dataclass
    class LayerNorms(metrics.Metric):
        total: Array
        count: Array

        @classmethod
        def empty(cls) -> LayerNorms:
            return cls(total=jnp.zeros((3, 1 + leaves)), count=jnp.zeros((), jnp.int32))

        @classmethod
        def from_model_output(cls, layer_norms: Array, **_: Any) -> LayerNorms:
            return cls(total=layer_norms, count=jnp.ones((), jnp.int32))

        def merge(self, other: LayerNorms) -> LayerNorms:
            return type(self)(total=self.total + other.total, count=self.count + other.count)

        def compute(self) -> Array:
            return self.total / self.count

    return LayerNorms


@functools.cache
def train_metrics(measured: tuple[str, ...], leaves: int = 0) -> type[metrics.Collection]:
    """A collection of averages since the last row that was written.

    loss: of the training batches, at the step's precision; without the penalties.
    what is `measured`: likewise.
    penalty: the quantization loss terms, times their rates.
    grad_norm, update_norm: global L2 norms of the gradients (before clipping) and of what is added to the parameters.
    grad_norm_ratio_on_change, update_norm_ratio_on_change: the norm divided by the previous step's, averaged over the
      steps whose bits differ from the step before.
    bits_changes: share of the steps whose bits differ from the step before.
    layer_norms: `norms` of so many `leaves` of the parameters; 0: none.
    """
    averages = ("loss", *measured, "penalty", "grad_norm", "update_norm")
    of_layers = {"layer_norms": _layer_norms(leaves)} if leaves else {}
    return metrics.Collection.create(
        **{name: metrics.Average.from_output(name) for name in averages},
        grad_norm_ratio_on_change=on_change("grad_norm_ratio"),
        update_norm_ratio_on_change=on_change("update_norm_ratio"),
        bits_changes=metrics.Average.from_output("bits_changed"),
        **of_layers,
    )


def bits_vector(precision: Precision) -> Array:
    """Bits of weights, acts and grads as float32 [3]; 32 where a kind is not quantized."""
    values = (precision.weights, precision.acts, precision.grads)
    return jnp.stack([jnp.asarray(32 if value is None else value, jnp.float32) for value in values])


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−log softmax(logits)[label], float32, of the labels' shape; natural logarithm."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
