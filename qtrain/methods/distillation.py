"""Distillation from the widest of several widths, whose logits its own step has just made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.precision import Precision

Array = jax.Array


def distillation(student: Array, teacher: Array, temperature: float = 1.0) -> Array:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over all but the last axis; float32, natural logarithm.

    No gradient flows to the teacher. T² keeps the gradient's size when T changes (Hinton et al. 2015, arXiv 1503.02531,
    section 2).

    Args:
      student, teacher: logits, classes on the last axis.
      temperature: T, above 0.

    >>> print(f"{distillation(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, jnp.log(3.0)]])):.4f}")
    0.1308
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_teacher = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature))
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return temperature**2 * jnp.mean(divergence)


@dataclasses.dataclass(frozen=True)
class FromTheWidest:
    """rate·`distillation` at every width but the widest, which leaves its logits for the others: no further pass.

    As `Additions.output_penalty`; the logits lie in the controller under ``teacher``. Every batch has to come at the
    widest width first.

    Attributes:
      high: the widest width.
      rate, temperature: of the term.
    """

    high: int
    rate: float
    temperature: float

    def __call__(
        self, precision: Precision, logits: Array, controller: Mapping[str, Any]
    ) -> tuple[Array, dict[str, Any]]:
        """What is added to the loss, and the controller with the teacher's logits."""
        widest = jnp.asarray(precision.weights) >= self.high
        teacher = jnp.where(widest, jax.lax.stop_gradient(logits), controller["teacher"])
        added = self.rate * distillation(logits, teacher, self.temperature)
        # At the widest it is 0 anyway, but for the rounding of its gradient.
        return jnp.where(widest, 0.0, added), {**controller, "teacher": teacher}
