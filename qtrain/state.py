"""The state of a run and the two compiled functions that read it: the train step and the evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Collection

from qtrain import cost
from qtrain.additions import Additions
from qtrain.cost import Ops, Total
from qtrain.inject import QuantizedModel
from qtrain.metrics import bits_vector, norms, train_metrics
from qtrain.packing import Packed, pack, unpack
from qtrain.precision import Precision
from qtrain.tasks import IMAGES, Task

Array = jax.Array
Batch = Mapping[str, Array]

NOTHING = Additions()
_ASSIGNMENT = 1 << 16  # beyond the numbers that splitting a key folds into it


class Previous(NamedTuple):
    """What the step before left for the metrics across changes of precision."""

    bits: Array
    grad_norm: Array
    update_norm: Array


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on: a pytree of arrays, donated to each step and checkpointed as it is.

    Attributes:
      step: completed steps, int32.
      params: the model's parameters.
      quant: learned quantizer parameters.
      collections: the model's other variables (``batch_stats``) and ``quant_stats``.
      opt_state: of the optimizer.
      controller: what the method steers by, see `Additions`.
      bitops: BitOps spent so far.
      metrics: averages since the last written row, packed, see `averages`.
      previous: see `Previous`.
    """

    step: Array
    params: Any
    quant: Any
    collections: Any
    opt_state: Any
    controller: Any
    bitops: Total
    metrics: Packed
    previous: Previous

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `QuantizedModel.apply` takes."""
        return {"params": self.params, "quant": self.quant, **self.collections}


def create(
    qmodel: QuantizedModel,
    optimizer: optax.GradientTransformation,
    seed: int,
    inputs: Any,
    additions: Additions = NOTHING,
    task: Task = IMAGES,
    layer_norms: bool = False,
) -> TrainState:
    """The state at step 0; `inputs` gives the shape of a batch, `task` and `layer_norms` what is averaged."""
    variables = qmodel.init({"params": jax.random.key(seed), "dropout": jax.random.key(seed)}, inputs)
    collections = {name: value for name, value in variables.items() if name not in ("params", "quant")}
    params, quant = variables["params"], variables["quant"]
    nothing = jnp.zeros(())
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        quant=quant,
        collections=collections,
        opt_state=optimizer.init({"params": params, "quant": quant}),
        controller={
            **additions.controller(),
            **({} if additions.steering is None else additions.steering.begun()),
        },
        bitops=cost.zero(),
        metrics=pack(averages(task, params, layer_norms).empty()),
        previous=Previous(jnp.zeros((3,)), nothing, nothing),
    )


def averages(task: Task, params: Any, layer_norms: bool) -> type[Collection]:
    """What a run averages between its rows; ``TrainState.metrics`` is one of these, packed."""
    return train_metrics(task.measured, len(jax.tree.leaves(params)) if layer_norms else 0)


def make_train_step(
    qmodel: QuantizedModel,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Precision],
    ops: Ops,
    log_every: int,
    additions: Additions = NOTHING,
    task: Task = IMAGES,
    gather: Callable[[Any], Any] = lambda trained: trained,
    layer_norms: bool = False,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Any]]]:
    """The train step: ``(state, batch, key) -> (state, {"loss", "grad_norm", "bits", …})``; pure.

    To be compiled once: the schedule is evaluated inside, so that one program serves every step. `key` is the run's; it
    is folded with the step here.

    Args:
      qmodel, optimizer: what is trained, and how.
      schedule: step → `Precision`, None for what a controller of the additions decides.
      ops: the counted operations, priced at the step's precision and added to ``state.bitops``.
      log_every: the averages start anew after every so many steps.
      additions: what the method adds.
      task: what is learned.
      gather: makes of ``{"params": …, "quant": …}`` what the model is applied to: `qtrain.sharding.gather`.
      layer_norms: also average the norms of each parameter's gradient, update and value; the state was made for it.
    """
    transform = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Any]]:
        steering, precision = additions.steering, schedule(state.step)
        if steering is not None:
            precision = steering.precision(precision, state.controller)
        batch = additions.observed(state.step, batch)
        step_key = jax.random.fold_in(key, state.step)
        dropout, quant = jax.random.split(step_key)
        rngs = {"dropout": dropout, "quant": quant}

        chance = jax.random.fold_in(step_key, _ASSIGNMENT)
        assigned = additions.assigned(chance, state.step, precision, state.controller)
        trained = {"params": state.params, "quant": additions.scheduled(state.step, state.quant)}

        def loss_fn(trained: dict[str, Any]) -> tuple[Array, tuple[Any, ...]]:
            outputs, updated = qmodel.apply(
                {**gather(trained), **state.collections},
                task.inputs(batch),
                train=True,
                bits=assigned,
                rngs=rngs,
                mutable=list(state.collections),
            )
            loss = task.loss(outputs, batch)
            added, controller = jnp.zeros(()), state.controller
            if additions.penalty is not None:
                learned = trained["params"], trained["quant"]
                added, controller = additions.penalty(state.step, *learned, assigned, state.controller)
            if additions.output_penalty is not None:
                more, controller = additions.output_penalty(precision, outputs, controller)
                added += more
            return loss + added, (loss, added, controller, outputs, updated)

        (_, (loss, added, controller, outputs, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        extra = {"quant": trained["quant"], **additions.update_arguments(precision, assigned, trained)}
        priced = additions.priced(trained["params"], trained["quant"], assigned)
        updates, opt_state = transform.update(grads, state.opt_state, trained, **extra)
        # Not to what a schedule made of them: it starts from the values in the state, at every step.
        stepped = optax.apply_updates({"params": state.params, "quant": state.quant}, updates)
        bits = bits_vector(precision)
        whole = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        Averages = averages(task, state.params, layer_norms)
        of_layers = {}
        if layer_norms:
            of_layers = {"layer_norms": norms(grads["params"], updates["params"], state.params)}
        previous = state.previous
        changed = (state.step > 0) & jnp.any(bits != previous.bits)
        measured = Averages.single_from_model_output(
            loss=loss,
            penalty=added,
            **task.measure(outputs, batch),
            grad_norm_ratio=_ratio(whole["grad_norm"], previous.grad_norm),
            update_norm_ratio=_ratio(whole["update_norm"], previous.update_norm),
            changed=changed,
            bits_changed=changed.astype(jnp.float32),
            **whole,
            **of_layers,
        )
        fresh = state.step % log_every == 0
        so_far = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), pack(Averages.empty()), state.metrics)
        metrics = pack(unpack(so_far, jax.eval_shape(Averages.empty)).merge(measured))
        bitops = cost.add(state.bitops, cost.bitops(ops, priced))
        if steering is not None:
            seen = {"step": state.step, "loss": loss, "grad_norm": whole["grad_norm"], "bitops": bitops}
            controller = steering.updated(controller, grads["params"], **seen)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            **stepped,
            collections=dict(updated),
            opt_state=opt_state,
            controller=controller,
            bitops=bitops,
            metrics=metrics,
            previous=Previous(bits, whole["grad_norm"], whole["update_norm"]),
        )
        out = {
            "loss": loss,
            "grad_norm": whole["grad_norm"],
            "bits": bits,
            "bitops": new_state.bitops,
            "metrics": metrics,
        }
        return new_state, out

    return train_step


def _ratio(norm: Array, previous: Array) -> Array:
    """NaN where there is nothing to compare: a step that only accumulates gradients updates nothing."""
    return jnp.where((norm > 0) & (previous > 0), norm / previous, jnp.nan)


def several_steps(
    train_step: Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Any]]],
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Any]]]:
    """`train_step` over batches stacked on a leading axis, in one dispatch (``lax.scan``); outputs are stacked too.

    Saves the dispatch of small steps of matmuls. Not for convolutions on a CPU, which run 9 times slower inside a scan.
    """

    def steps(state: TrainState, batches: Batch, key: Array) -> tuple[TrainState, dict[str, Any]]:
        return jax.lax.scan(lambda carry, batch: train_step(carry, batch, key), state, batches)

    return steps


def make_eval_step(
    qmodel: QuantizedModel, task: Task = IMAGES
) -> Callable[[Mapping[str, Any], Batch, Precision | None], dict[str, Array]]:
    """The evaluation step: what a batch, with a ``mask`` of its examples, contributes to the task's summary.

    ``(variables, batch, precision) -> Task.evaluate``; precision None is the float model.
    """

    def eval_step(variables: Mapping[str, Any], batch: Batch, precision: Precision | None) -> dict[str, Array]:
        # Evaluation is a function of the state alone: rules that round stochastically do so by one fixed key.
        rngs = {"quant": jax.random.key(0)}
        outputs = qmodel.apply(variables, task.inputs(batch), train=False, bits=precision, rngs=rngs)
        return task.evaluate(outputs, batch)

    return eval_step
