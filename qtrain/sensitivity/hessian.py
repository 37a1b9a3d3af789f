"""How sharply the loss bends along each layer's weights: Hessian traces, estimated without the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from qtrain.errors import UsageError
from qtrain.inject import QuantizedModel, Weight
from qtrain.state import Batch
from qtrain.tasks import IMAGES, Task

Array = jax.Array

DRAWS, TOLERANCE = 100, 1e-3
"""The published stop rule: so many draws, or so small a relative change."""


class Trace(NamedTuple):
    """Traces of the diagonal blocks of a Hessian, one for each leaf of the parameters.

    Attributes:
      mean: a tree as the parameters, of floats: the estimates.
      standard_error: likewise, of the draws alone (the batches are taken as given); nan after a single draw.
      draws: how many were made.
      change: by how much the last one moved the estimates, relative to them; see `hessian_trace`.
    """

    mean: Any
    standard_error: Any
    draws: int
    change: float


def hessian_draw(loss: Callable[..., Array]) -> Callable[..., Array]:
    """``(params, key, *batch) -> v_l · (H v)_l``, float32 [leaves], of one draw of signs v; see `hessian_trace`.

    Pure; `loss` is called as ``loss(params, *batch)``. The order of the leaves is that of ``jax.tree.leaves``.
    """

    def draw(params: Any, key: Array, *batch: Any) -> Array:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        tangent = jax.tree.unflatten(treedef, signs)
        _, bent = jax.jvp(jax.grad(lambda params: loss(params, *batch)), (params,), (tangent,))
        pairs = zip(signs, jax.tree.leaves(bent), strict=True)
        return jnp.stack([jnp.sum((v * hv).astype(jnp.float32)) for v, hv in pairs])

    return draw


def hessian_trace(
    loss: Callable[..., Array],
    params: Any,
    key: Array,
    draws: int = DRAWS,
    tolerance: float = TOLERANCE,
    *,
    batches: Sequence[Any] | None = None,
) -> Trace:
    """tr ∂²L/∂w_l² of every leaf w_l of `params`, by Hutchinson's estimator with signs.

    Draw k takes v with elements ±1, for all leaves at once, and t_l = v_l · (H v)_l, where H v is the derivative of the
    gradient along v (forward over reverse): two to three gradients of work, and no Hessian. Its expectation is tr H_ll,
    its variance 2·Σ_{i≠j} H_ij² within the block and Σ H_ij² beside it. The estimate is the mean m over the draws, in
    float64. Drawing ends at `draws`, or from the second on when

      Σ_l |m_l(k) − m_l(k−1)| < tolerance · Σ_l |m_l(k)|:

    the change over all leaves is compared, since one leaf's stands still by chance, and that of a leaf whose trace is
    about zero never does. The change falls as 1/k whatever the error; the error itself is in the result.

    One draw is one compiled program for each batch. The loop is not: XLA runs convolutions within one on a CPU without
    its threads, 4.5 times slower for a small network. So this cannot be called under ``jit``.

    Args:
      loss: ``loss(params)``, a scalar, or ``loss(params, batch)``; twice differentiable, almost everywhere at least.
      params: a pytree of floating-point arrays.
      key: of the signs.
      draws: at most so many, at least 1.
      tolerance: relative; 0 makes all the draws.
      batches: pytrees of one shape; L is then the mean of the loss over them. None: `loss` takes no batch.

    Raises:
      UsageError: no parameters, no batches, draws below 1, a negative tolerance, or traces that are not finite.

    The estimator of HAWQ-V2 (arXiv 1911.03852, equation 7), the stop rule of Double Rounding (arXiv 2502.01199), which
    does not say of what the change is.

    >>> import jax, jax.numpy as jnp
    >>> quadratic = lambda w: jnp.sum(jnp.arange(4.0) * w["a"] ** 2) - jnp.sum(w["b"] ** 2)
    >>> found = hessian_trace(quadratic, {"a": jnp.ones(4), "b": jnp.ones(3)}, jax.random.key(0))
    >>> found.mean, found.draws
    ({'a': 12.0, 'b': -6.0}, 2)
    """
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        raise UsageError("hessian_trace: there are no parameters; give at least one array")
    if batches is not None and not batches:
        raise UsageError("hessian_trace: there are no batches; give at least one, or a loss that takes none")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise UsageError(f"hessian_trace: draws={draws!r}; give a whole number of at least 1")
    if not tolerance >= 0:
        raise UsageError(f"hessian_trace: tolerance={tolerance!r}; give a relative change of at least 0")
    arguments: Sequence[tuple[Any, ...]] = [()] if batches is None else [(batch,) for batch in batches]

    products = jax.jit(hessian_draw(loss))

    mean, squares, change, made = np.zeros(len(leaves)), np.zeros(len(leaves)), math.inf, 0
    while made < draws:
        signs_key = jax.random.fold_in(key, made)
        # The same signs for every batch: then this is a draw for the Hessian of the mean loss. Dispatched together.
        found = [products(params, signs_key, *batch) for batch in arguments]
        sample = np.mean(np.asarray(jax.device_get(found), np.float64), axis=0)
        made += 1
        away = sample - mean
        mean = mean + away / made
        squares = squares + away * (sample - mean)
        if not np.all(np.isfinite(sample)):
            raise UsageError(
                "hessian_trace: the traces are not finite; the parameters or the data hold NaN or infinity"
            )
        change = float(np.sum(np.abs(away)) / made / max(np.sum(np.abs(mean)), np.finfo(float).tiny))
        if made >= 2 and change < tolerance:
            break
    errors = np.sqrt(squares / (made - 1) / made) if made > 1 else np.full(len(leaves), np.nan)
    estimates, deviations = (jax.tree.unflatten(treedef, values.tolist()) for values in (mean, errors))
    return Trace(estimates, deviations, made, change)


def weight_traces(
    qmodel: QuantizedModel,
    weights: Sequence[Weight],
    variables: Mapping[str, Any],
    batches: Sequence[Batch],
    key: Array,
    draws: int = DRAWS,
    tolerance: float = TOLERANCE,
    task: Task = IMAGES,
) -> Trace:
    """`hessian_trace` of the loss of the float model, for each of `weights`: ``{weight.name: trace}``.

    The model is taken as evaluation takes it: without quantizers (``bits=None``), dropout off, norm layers normalizing
    by their stored statistics (those of the widest width, where there are several): with those of the batch the loss
    would not change with the scale of a kernel before a norm, which is not what a quantized evaluation computes. A
    kernel that is stacked for a scan has one trace, the sum over its layers.

    Args:
      qmodel: the model.
      weights: of which parameters; as `QuantizedModel.weights` gives them.
      variables: ``params`` and the other collections.
      batches: of the task, of one shape.
      key, draws, tolerance: see `hessian_trace`.
      task: whose loss it is.

    Raises:
      UsageError: as `hessian_trace`.
    """
    leaves = {weight.name: weight for weight in weights}

    def loss(arguments: Mapping[str, Array], batch: tuple[Any, Batch]) -> Array:
        variables, data = batch
        params = variables["params"]
        for name, value in arguments.items():
            params = _replaced(params, leaves[name].leaf, value)
        outputs = qmodel.apply({**variables, "params": params}, task.inputs(data), train=False)
        return task.loss(outputs, data)

    values = {name: meta.unbox(weight.value(variables["params"])) for name, weight in leaves.items()}
    # The variables are arguments of the program: closed over, they would be constants in it.
    return hessian_trace(loss, values, key, draws, tolerance, batches=[(variables, batch) for batch in batches])


def _replaced(tree: Any, keys: tuple[str, ...], value: Any) -> Any:
    if not keys:
        # A parameter may be boxed with the names of its axes.
        return meta.replace_boxed(tree, value)
    return {**tree, keys[0]: _replaced(tree[keys[0]], keys[1:], value)}
