"""The trace of the Fisher information of each parameter: how far a small change of it moves the model's predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.additions import Bits
from qtrain.data import Dataset
from qtrain.data.graphs import GraphSplit
from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import QuantizedModel
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS
from qtrain.tasks import IMAGES, Classification, Task

Array = jax.Array
AT = ("step", "q_max", "float")


class Fisher(NamedTuple):
    """Traces of the diagonal blocks of a Fisher information, one for each leaf of the parameters.

    Attributes:
      mean: a tree as the parameters, of float32 scalars: the estimates.
      standard_error: likewise, of the examples and the labels drawn for them; nan of a single example.
      total: their sum, the trace of the whole, float32.
      total_error: its standard error.
    """

    mean: Any
    standard_error: Any
    total: Array
    total_error: Array


def fisher_trace(
    logits: Callable[[Any, Any], Array], params: Any, examples: Any, key: Array | None = None, samples: int = 1
) -> Fisher:
    """tr F_l = E_x E_{y ~ p(y|x)} ‖∂ log p(y|x)/∂w_l‖² of every leaf w_l of `params`, p = softmax(logits). Pure.

    The labels are the model's own, not those of the data (whose squared gradients, the "empirical Fisher", vanish with
    the loss). Of an example with several predictions, such as the tokens of a text, the mean over them. Each example is
    taken alone: its gradient is that of its own log-likelihood, not its share of a batch's.

    * Sampled: `samples` labels are drawn for each example, and the squared norms averaged. One gradient for each; for
      several predictions of an example the score of all of them at once, whose expected square is the sum of theirs,
      because scores have mean 0 and labels are drawn apart.
    * Exact in y (`key` None): Σ_y p(y|x) ‖∂ log p(y|x)/∂w_l‖². A gradient for each class of each prediction: for small
      networks, and to check the other.

    All examples are taken at once (``vmap``): memory of examples × samples (or classes) × parameters.

    Args:
      logits: ``logits(params, example)``, [..., C] of one example.
      params: a pytree of floating-point arrays.
      examples: a pytree, examples on the first axis of each leaf.
      key: of the labels; None: exact.
      samples: labels of each prediction, at least 1.

    Raises:
      UsageError: samples below 1.

    Achille, Rovere and Soatto 2018 (arXiv 1711.08856, section 3), who draw labels likewise.

    >>> import jax.numpy as jnp
    >>> found = fisher_trace(lambda w, x: x @ w, jnp.zeros((2, 2)), jnp.array([[3.0, 4.0]]))  # ‖x‖² Σ p(1 − p)
    >>> float(found.total)
    12.5
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise UsageError(f"fisher_trace: samples={samples!r}; give a whole number of at least 1")

    def of_one(example: Any, key: Array | None) -> Array:
        """float32 [leaves]."""
        outputs, pull_back = jax.vjp(lambda params: logits(params, example).astype(jnp.float32), params)
        classes = outputs.shape[-1]
        predictions = outputs.size // classes
        chances = jax.nn.softmax(outputs.reshape(predictions, classes))
        if key is None:
            scores = jnp.eye(classes) - chances[:, None]  # [predictions, the label, classes]
            own = jnp.eye(predictions)[:, None, :, None] * scores[:, :, None]  # of each prediction by itself
            cotangents, weights = own.reshape(-1, *outputs.shape), chances.ravel()
        else:
            labels = jax.random.categorical(key, jnp.log(chances), shape=(samples, predictions))
            cotangents = (jax.nn.one_hot(labels, classes) - chances).reshape(samples, *outputs.shape)
            weights = jnp.full(samples, 1 / samples)

        def squares(cotangent: Array) -> Array:
            (score,) = pull_back(cotangent)
            return jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(score)])

        return jnp.tensordot(weights, jax.vmap(squares)(cotangents), 1) / predictions

    count = jax.tree.leaves(examples)[0].shape[0]
    if key is None:
        values = jax.vmap(lambda example: of_one(example, None))(examples)
    else:
        values = jax.vmap(of_one)(examples, jax.random.split(key, count))
    everything = jnp.concatenate([values, jnp.sum(values, axis=1, keepdims=True)], axis=1)
    mean = jnp.mean(everything, axis=0)
    errors = jnp.std(everything, axis=0, ddof=1) / np.sqrt(count) if count > 1 else jnp.full_like(mean, jnp.nan)
    treedef = jax.tree.structure(params)
    traces, deviations = (jax.tree.unflatten(treedef, list(part[:-1])) for part in (mean, errors))
    return Fisher(traces, deviations, mean[-1], errors[-1])


def model_fisher_trace(
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
    key: Array | None = None,
    samples: int = 1,
    bits: Bits | None = None,
    task: Task = IMAGES,
    examples: int | None = None,
) -> Fisher:
    """`fisher_trace` of a model's ``params`` (not of what quantizers learn), on the examples of a batch. Pure.

    As evaluation takes the model: dropout off, norm layers and running ranges as stored. At `bits` the forward pass is
    quantized and its gradient goes straight through; the gradient itself is not quantized, whose noise would add to the
    norm. A quantizer with one dynamic range for a batch takes that of the example alone.

    Args:
      qmodel, variables: the model.
      batch: of the task. Of a graph, the examples are the nodes that its ``mask`` keeps.
      key, samples: see `fisher_trace`.
      bits: None: the float model.
      task: one that classifies.
      examples: how many, from the first on; None: the rows of the batch.

    Raises:
      UsageError: a task without classes; as `fisher_trace`.
    """
    if not isinstance(task, Classification):
        raise UsageError("fisher_trace: the model finds boxes, and the Fisher information is of what chooses a class")
    others = {name: value for name, value in variables.items() if name != "params"}
    rngs = {"quant": jax.random.key(0)}  # as in evaluation: a function of the variables alone
    quantizes = any(rule.grad_quantizer is not None for rule in qmodel.rules)
    forward, plain = _without_gradient_bits(bits, quantizes), qmodel.with_scheduled_gradients()

    def logits(params: Any, index: Array) -> Array:
        arguments = task.example(batch, index)
        outputs = plain.apply({**others, "params": params}, arguments, train=False, bits=forward, rngs=rngs)
        return task.prediction(outputs, index)

    return fisher_trace(logits, variables["params"], task.indices(batch, examples), key, samples)


def _without_gradient_bits(bits: Bits | None, quantizes: bool) -> Bits | None:
    if bits is None:
        return None
    if not isinstance(bits, Precision):
        return {path: _without_gradient_bits(one, quantizes) for path, one in bits.items()}  # type: ignore[misc]
    return dataclasses.replace(bits, grads=FLOAT_BITS if quantizes else None)


class FisherSettings(NamedTuple):
    """What a config's section ``fisher`` asks for; see `fisher_from_config`."""

    examples: int
    samples: int
    at: tuple[str, ...]


def fisher_from_config(config: Mapping[str, Any], dataset: Dataset, task: Task) -> FisherSettings | None:
    """The section ``fisher``, checked; None where nothing is to be measured.

    Args:
      config: ``examples``: the first so many of the training stream, the same at every row (of a graph, training
        nodes); 0: none. ``samples``: labels drawn for each; 0: all classes, exactly. ``at``: out of `AT`, bits and
        images as the last step took them, all of the images at the highest bits, and in float.
      dataset, task: of the run.

    Raises:
      UsageError: a wrong value, or a task without classes.
    """
    examples, samples, at = config["examples"], config["samples"], config["at"]
    for key, value in (("examples", examples), ("samples", samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UsageError(f"fisher.{key}={value!r}: give a whole number of at least 0")
    if not isinstance(at, tuple | list) or not at or len(set(at)) < len(at):
        raise UsageError(f"fisher.at={at!r}: give a tuple of different ones of {AT}")
    for one in at:
        if one not in AT:
            raise UsageError(f"fisher.at has {one!r}: give {', '.join(map(repr, AT))}.{did_you_mean(str(one), AT)}")
    if not examples:
        return None
    if not isinstance(task, Classification):
        raise UsageError(f"fisher.examples={examples}: {dataset.name!r} has boxes to find and no classes; set it to 0")
    split = dataset.train
    most = int(split.batch["mask"].sum()) if isinstance(split, GraphSplit) else dataset.num_train
    if examples > most:
        raise UsageError(f"fisher.examples={examples}: {dataset.name!r} has {most} to train on; give at most that")
    return FisherSettings(examples, samples, tuple(at))
