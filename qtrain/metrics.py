"""What is measured while training and evaluating, as clu metrics that accumulate inside the compiled step."""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics

from qtrain.precision import Precision

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


@functools.cache
def train_metrics(measured: tuple[str, ...]) -> type[metrics.Collection]:
    """A collection of averages since the last row that was written.

    loss: of the training batches, at the step's precision; without the penalties.
    what is `measured`: likewise.
    penalty: the quantization loss terms, times their rates.
    grad_norm, update_norm: global L2 norms of the gradients (before clipping) and of what is added to the parameters.
    grad_norm_ratio_on_change, update_norm_ratio_on_change: the norm divided by the previous step's, averaged over the
      steps whose bits differ from the step before.
    bits_changes: share of the steps whose bits differ from the step before.
    """
    averages = ("loss", *measured, "penalty", "grad_norm", "update_norm")
    return metrics.Collection.create(
        **{name: metrics.Average.from_output(name) for name in averages},
        grad_norm_ratio_on_change=on_change("grad_norm_ratio"),
        update_norm_ratio_on_change=on_change("update_norm_ratio"),
        bits_changes=metrics.Average.from_output("bits_changed"),
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
