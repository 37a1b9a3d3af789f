"""Norm statistics measured anew before an evaluation: those of the weights as they are, not as they were."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.inject import QuantizedModel
from qtrain.inject.checks import Bits
from qtrain.inject.trace import never_replay
from qtrain.state import Batch
from qtrain.tasks import IMAGES, Task

Array = jax.Array
Step = Callable[[Any, Any, Mapping[str, Any], Batch, Bits | None], dict[str, Any]]
Path = tuple[str, ...]

STATISTICS = "batch_stats"
"""The collection in which linen norms keep their running mean and variance."""

KEY = "eval.reestimate_batches"
_NOT_TRAINING_STATE = ("params", "quant", "quant_stats")
_streams = itertools.count()


def make_reestimate_step(qmodel: QuantizedModel, task: Task = IMAGES) -> Step:
    """One batch added to the average of norm statistics: ``(average, index, variables, batch, bits) -> average``.

    With μ_k and σ²_k the mean and the variance over batch k (from 0) that each ``nn.BatchNorm`` normalizes it by::

      average_k = average_{k−1} + ((μ_k, σ²_k) − average_{k−1}) / (k + 1)

    The model runs in train mode, as a training step runs it, without a gradient; a batch's own statistics are what its
    norms write at momentum 0. The parameters, and running ranges (``quant_stats``), are read as an evaluation reads
    them. Dropout and stochastic rounding draw from one fixed key folded with `index`: the result depends on the
    variables, the batches and the bits alone. Pure, to be compiled once: index and bits are data.

    A norm that is called several times in a pass gets the mean over its calls; where they are apart (each under
    ``nn.remat``, or the iterations of a scan which carries the statistics), it is those of the last call. A norm that
    uses its running average even in training keeps it, and so does one that no call reaches; ``nn.SpectralNorm`` keeps
    its state. Of statistics that are held for each width (``qmodel.per_width``), the rows in use are measured.

    Args:
      qmodel: what is to be evaluated.
      task: what a batch's inputs are.

    Returns:
      The step. `average` is a tree as ``variables["batch_stats"]``, whose values do not matter at index 0, and comes
      back in float32; `index` counts the batches before this one, int32; `bits` is as `QuantizedModel.apply` takes it,
      None for the float model. The batch may be split over devices: statistics are those of the global batch.

    Raises:
      UsageError: when the step is traced: the model has no batch statistics, or some that are not ``nn.BatchNorm``'s.
    """

    def step(average: Any, index: Any, variables: Mapping[str, Any], batch: Batch, bits: Bits | None) -> dict[str, Any]:
        _check_collection(variables)
        inputs = task.inputs(batch)
        dropout, quant = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
        # A stream of a name never used before makes nn.jit inside the model trace anew, with the interceptor.
        rngs = {"dropout": dropout, "quant": quant, f"reestimate_{next(_streams)}": dropout}
        mutable = [name for name in variables if name not in _NOT_TRAINING_STATE]
        norms = _Norms()
        with nn.intercept_methods(norms.intercept):
            _, updated = qmodel.apply(variables, inputs, train=True, bits=bits, rngs=rngs, mutable=mutable)
        measured = norms.kept_or_measured(variables[STATISTICS], updated[STATISTICS])

        def add(value: Array, average: Array) -> Array:
            before = jnp.where(index == 0, 0.0, average.astype(jnp.float32))
            return before + (value.astype(jnp.float32) - before) / (index + 1)

        return jax.tree.map(add, measured, flax.core.unfreeze(average))

    return step


def reestimate(
    step: Step, variables: Mapping[str, Any], batches: Iterable[Batch], count: int, bits: Bits | None = None
) -> dict[str, Any]:
    """``batch_stats`` averaged over the first `count` of `batches`, for an evaluation at `bits`.

    The statistics of quantized layers oscillate with their weights, and lag behind a precision that has just changed.
    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", 2022 (arXiv:2203.11086), section 5.2. The
    mean of the batches' variances is within-batch variance: as the running average, it leaves out how means differ
    between batches.

    Args:
      step: `make_reestimate_step`'s, compiled.
      variables: of the model; they stay as they are, the running statistics of the training among them.
      batches: training batches of one shape.
      count: how many; the paper's authors take 50.
      bits: of the evaluation, every one of which has statistics of its own; numbers as arrays compile once for all.

    Returns:
      The collection to evaluate with: ``{**variables, "batch_stats": …}``; shapes and dtypes as in `variables`.

    Raises:
      UsageError: there are fewer batches, or statistics that cannot be estimated; see `make_reestimate_step`.
    """
    _check_count(count)
    _check_collection(variables)
    # Placed as the averages that come back are, so that the first call needs no program of its own.
    average = jax.tree.map(lambda x: x.astype(jnp.float32), flax.core.unfreeze(variables[STATISTICS]))
    seen = 0
    for batch in itertools.islice(batches, count):
        average = step(average, np.int32(seen), variables, batch, bits)
        seen += 1
    if seen < count:
        raise UsageError(f"{KEY}={count}: there are only {seen} batches; give at most as many")
    return jax.tree.map(
        lambda value, stored: value.astype(stored.dtype), average, flax.core.unfreeze(variables[STATISTICS])
    )


def check_reestimation(qmodel: QuantizedModel, variables: Any, inputs: jax.ShapeDtypeStruct, count: int) -> None:
    """Refuse `count` batches of re-estimation for a model that it is not for; 0 asks for none. Compiles nothing.

    Args:
      qmodel: what is to be evaluated.
      variables: as ``jax.eval_shape`` gives them.
      inputs: shape and dtype of a training batch's inputs.
      count: ``eval.reestimate_batches``.

    Raises:
      UsageError: for a count that is no whole number of at least 0, or as `make_reestimate_step`.
    """
    if isinstance(count, int) and not isinstance(count, bool) and count == 0:
        return
    _check_count(count)
    _check_collection(variables)
    kind = ("image", "label") if jnp.issubdtype(inputs.dtype, jnp.floating) else ("tokens", "targets")
    batch = dict.fromkeys(kind, inputs)
    jax.eval_shape(
        lambda variables, batch: make_reestimate_step(qmodel)(variables[STATISTICS], 0, variables, batch, None),
        dict(variables),
        batch,
    )


def _check_count(count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise UsageError(f"{KEY}={count!r}: give a whole number of batches, 50 as the authors do, or 0 for none")


def _check_collection(variables: Mapping[str, Any]) -> None:
    if not jax.tree.leaves(variables.get(STATISTICS, {})):
        raise UsageError(f"{KEY}: the model keeps no batch statistics (it has no nn.BatchNorm); set it to 0")


@dataclasses.dataclass
class _Norms:
    """What a pass sees of the norms, whose momentum it sets so that they write a batch's own statistics."""

    modules: dict[Path, type] = dataclasses.field(default_factory=dict)
    momenta: dict[Path, float] = dataclasses.field(default_factory=dict)  # of the calls that are in progress
    # Calls by scope and path; the scope is kept so that its id stays its own. Not by path alone: a scan's body is
    # traced more than once, each time in new scopes.
    calls: dict[tuple[int, Path], tuple[Any, int]] = dataclasses.field(default_factory=dict)

    def intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.scope is None:
            return call(*args, **kwargs)
        path = module.path
        never_replay(module)
        self.modules.setdefault(path, type(module))
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        if path in self.momenta:  # super().__call__, or the inside of a transformation
            with _momentum(module, self.momenta[path]):
                return call(*args, **kwargs)
        # Linen rewinds a module's scope at each call, so that it is the one above that stays.
        key = (id(module.scope.parent or module.scope), path)
        _, before = self.calls.get(key, (None, 0))
        self.calls[key] = module.scope, before + 1
        self.momenta[path] = before / (before + 1)  # 0, and then the equal mean of all calls
        try:
            with _momentum(module, self.momenta[path]):
                return call(*args, **kwargs)
        finally:
            del self.momenta[path]

    def kept_or_measured(self, running: Any, written: Any) -> dict[str, Any]:
        """The written statistics of batch norms, and what others had.

        Raises:
          UsageError: for statistics whose meaning only their module knows.
        """
        before = flax.traverse_util.flatten_dict(flax.core.unfreeze(running))
        after = flax.traverse_util.flatten_dict(flax.core.unfreeze(written))
        owners = {name: self.modules.get(name[:-1], nn.SpectralNorm) for name in before}
        for name, owner in owners.items():
            if not issubclass(owner, nn.BatchNorm | nn.SpectralNorm):
                raise UsageError(
                    f"{KEY}: {'/'.join(name)!r} in {STATISTICS!r} belongs to a {owner.__name__}, of which it is not "
                    "known how to get one batch's statistics; use nn.BatchNorm or a subclass, or set it to 0"
                )
        measured = {name for name, owner in owners.items() if issubclass(owner, nn.BatchNorm)}
        if not measured:
            raise UsageError(f"{KEY}: no nn.BatchNorm is called in training; set it to 0")
        return flax.traverse_util.unflatten_dict(
            {name: after[name] if name in measured else value for name, value in before.items()}
        )


@contextlib.contextmanager
def _momentum(norm: nn.BatchNorm, value: float) -> Iterator[None]:
    """`norm`, which linen bound for this pass, with another momentum; it is not the user's own object."""
    before = norm.momentum
    object.__setattr__(norm, "momentum", value)
    try:
        yield
    finally:
        object.__setattr__(norm, "momentum", before)
