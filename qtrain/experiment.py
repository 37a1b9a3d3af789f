"""What a config stands for: data, model, plan, schedule, optimizer; `qtrain.build` makes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from qtrain import cost, data, schedules
from qtrain.additions import Additions
from qtrain.data import Dataset
from qtrain.data.graphs import GraphSplit
from qtrain.deficits import Deficit
from qtrain.errors import UsageError
from qtrain.inject import Plan, QuantizedModel, Weight
from qtrain.inject.execution import Choice
from qtrain.losses import Penalty
from qtrain.losses.budget import Budget
from qtrain.models.gcn import KEYS
from qtrain.packing import Packed, unpack
from qtrain.precision import Precision
from qtrain.schedules import Controller, PrecisionSchedule
from qtrain.schedules.precisions import KINDS
from qtrain.sensitivity import FisherSettings
from qtrain.state import NOTHING, Previous, TrainState, create
from qtrain.tables import Tables, tabulate
from qtrain.tasks import IMAGES, Task
from qtrain.widths import Widths


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config stands for.

    Attributes:
      dataset, qmodel, plan, schedule, optimizer, learning_rate: the parts; the plan is that of one training batch.
      total_steps: training steps.
      eval_every, checkpoint_every: steps between them; 0 for only at the end.
      fixed: the one precision of a backend that cannot take traced bits, else None.
      weights: the quantized parameters.
      learns: whether quantizers have parameters of their own.
      widths: of the tensors, some of which quantizers may choose.
      trained_widths: the widths that are trained together, the widest first; empty where there is one precision a step.
      steps_per_update: training steps whose gradients are averaged into one update.
      additions: what the method adds to the train step.
      task: what is learned.
      controller: that decides bits, None where the schedule has them all.
      losses: the loss terms among the additions.
      budget: likewise, of learned widths.
      deficit: what the training images lack for a part of the run, likewise among the additions.
      fisher: which traces of the Fisher information are measured at every row, or None.
      optimizer_at: the optimizer at another learning rate, a function of its updates.
      reads: where precisions are read from; None: `schedule` is evaluated.
    """

    config: ConfigDict
    dataset: Dataset
    qmodel: QuantizedModel
    plan: Plan
    schedule: PrecisionSchedule
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any]
    total_steps: int
    eval_every: int
    checkpoint_every: int
    fixed: Precision | None
    weights: tuple[Weight, ...] = ()
    learns: bool = False
    widths: Widths | None = None
    trained_widths: tuple[int, ...] = ()
    steps_per_update: int = 1
    additions: Additions = NOTHING
    task: Task = IMAGES
    controller: Controller | None = None
    losses: Penalty | None = None
    budget: Budget | None = None
    deficit: Deficit | None = None
    fisher: FisherSettings | None = None
    optimizer_at: Callable[[optax.Schedule], optax.GradientTransformation] | None = None
    reads: Tables | None = None

    @property
    def q_max(self) -> Precision:
        """The highest precision of the schedule."""
        return self.schedule.q_max

    def tables(self) -> Tables:
        """What of the config is data to the train step, step by step."""
        bits = None if self.fixed is not None else self.schedule
        lengths = self.total_steps, self.steps_per_update
        return tabulate(bits, self.learning_rate, self.losses, *lengths, self.deficit, self.controller)

    def bound(self, tables: Tables) -> Experiment:
        """The same, reading its schedules from `tables`, which may be traced: a program for all that differ in them."""
        assert self.optimizer_at is not None
        rate = tables.rate
        additions = self.additions
        if self.losses is not None:
            losses = dataclasses.replace(self.losses, rates=tables.losses)
            additions = dataclasses.replace(additions, penalty=penalty_of(losses, self.budget))
        bound = dataclasses.replace(
            self, reads=tables, optimizer=self.optimizer_at(rate), learning_rate=rate, additions=additions
        )
        if self.deficit is not None:
            bound = bound.observing(dataclasses.replace(self.deficit, switch=tables.deficit))
        return bound.steered_by_numbers(tables.controller)

    def observing(self, deficit: Deficit | None) -> Experiment:
        """The same with another window of its deficit, which may be traced; None: it has none."""
        if deficit is None:
            return self
        return dataclasses.replace(
            self, deficit=deficit, additions=dataclasses.replace(self.additions, observed=deficit)
        )

    def steered_by_numbers(self, numbers: Packed | None) -> Experiment:
        """The same with other numbers of its controller, packed and perhaps traced, as `Tables` have them."""
        return self if numbers is None else self.steered_by(unpack(numbers, self.controller))

    def steered_by(self, controller: Controller | None) -> Experiment:
        """The same with another controller of the same structure, whose numbers may be traced."""
        if controller is None:
            return self
        assert self.additions.steering is not None
        steering = dataclasses.replace(self.additions.steering, controller=controller)
        additions = dataclasses.replace(self.additions, steering=steering)
        return dataclasses.replace(self, controller=controller, additions=additions)

    def precision(self, step: Any) -> Precision:
        """The precision of a step; None for what a controller decides."""
        if self.fixed is not None:
            return self.fixed
        if self.reads is not None:
            return self.reads.precision(step)
        return self.schedule(step) if self.controller is None else schedules.without_decided(self.schedule)(step)

    def precision_at(self, step: int) -> Precision:
        """The precision of a step as Python numbers; None where a kind is not quantized.

        Under a controller that of step 0 alone is known: see `precision_after`.

        Raises:
          UsageError: for a later step under a controller.
        """
        if self.fixed is not None:
            return self.fixed
        steering = self.additions.steering
        if steering is not None and step > 0:
            raise UsageError(f"step {step}: {steering.controller.name} decides its bits while training")
        return jax.tree.map(float, jax.device_get(self._compiled_precision(step)))

    @functools.cached_property
    def _compiled_precision(self) -> Callable[[int], Precision]:
        """Compiled whole, once: a schedule's operations one by one would be a dozen programs."""
        steering = self.additions.steering

        def precision(step: Any) -> Precision:
            found = self.precision(step)
            return found if steering is None else steering.precision(found, steering.begun())

        return jax.jit(precision)

    def last_precision(self, state: TrainState) -> Precision:
        """The precision of the last of the steps that led to `state`; may be traced."""
        return self.precision(state.step - 1) if self.controller is None else self.precision_of(state.previous)

    def precision_of(self, previous: Previous) -> Precision:
        """The precision that a step left in its state, for the kinds that are quantized."""
        used = [kind for kind in KINDS if getattr(self.q_max, kind) is not None]
        return Precision(**{kind: previous.bits[KINDS.index(kind)] for kind in used})

    def precision_after(self, step: int, previous: Previous | None) -> Precision:
        """The precision of the last of `step` steps, of the first if there is none; as Python numbers.

        `previous`: what it left in the state, by which it is known under a controller.
        """
        if self.controller is None or step == 0:
            return self.precision_at(max(step - 1, 0))
        assert previous is not None
        return jax.tree.map(float, self.precision_of(jax.device_get(previous)))

    def inputs(self) -> Any:
        """The shape of the model's input for one training batch: an array's, or by name those of a graph."""
        return batch_inputs(self.dataset, self.config.data.batch_size)

    def train_batches(self, index: int | None = None, count: int | None = None, **arguments: Any) -> data.TrainIterator:
        """The run's training batches, from its first on and each once; `arguments`: of `data.train_iterator`.

        Of each batch the rows of process `index` of `count`, by default those of this process.
        """
        part = jax.process_index() if index is None else index, jax.process_count() if count is None else count
        return data.train_iterator(self.dataset, self.config.data.batch_size, self.config.data.seed, *part, **arguments)

    def fisher_examples(self) -> Any:
        """The examples that Fisher traces are measured on, whole on every process; None where they are not."""
        if self.fisher is None:
            return None
        with self.train_batches(0, 1) as batches:
            if self.dataset.kind == "graph":
                return dict(next(batches))
            count = -(-self.fisher.examples // self.config.data.batch_size)
            rows = [batch for _, batch in zip(range(count), batches, strict=False)]
        return {name: np.concatenate([row[name] for row in rows])[: self.fisher.examples] for name in rows[0]}

    def initial_state(self, seed: Any = None) -> TrainState:
        """The state at step 0; to be compiled, or evaluated for its shapes. `seed`: by default the config's; traced."""
        inputs = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), self.inputs())
        seed = self.config.seed if seed is None else seed
        layer_norms = self.config.train.layer_norms
        return create(self.qmodel, self.optimizer, seed, inputs, self.additions, self.task, layer_norms)

    def with_choices(self, choices: Mapping[str, Choice | Mapping[str, Any]]) -> Experiment:
        """The same with its layers carried out as an earlier start of the run chose; see `QuantizedModel.with_choices`.

        Raises:
          UsageError: for what is no choice, or is for other layers.
        """
        qmodel = self.qmodel.with_choices(choices)
        return dataclasses.replace(self, qmodel=qmodel, plan=self.plan.with_choices(qmodel.choices))

    def describe_schedule(self) -> str:
        """The schedules, a line each."""
        parts = {"weights": self.schedule.weights, "activations": self.schedule.acts, "gradients": self.schedule.grads}
        if self.controller is not None:
            parts["controller"] = self.controller.describe()
        if self.fixed is not None:
            widths = f"weights {self.fixed.weights}, activations {self.fixed.acts} bits, gradients float"
            return f"backend aqt, static: {widths}"
        return "\n".join(f"{name:<12}{schedule}" for name, schedule in parts.items())

    def linear_cost(self, tables: Tables) -> float | None:
        """`cost.linear` over the run, as `tables` have its bits; None where training decides what a step costs."""
        if self.additions.assigns or self.trained_widths or (self.widths is not None and self.widths.chosen):
            return None
        if self.fixed is None and jax.tree.leaves(tables.bits):
            return float(cost.tabulated(self.plan.ops, tables.bits, cost.linear))
        return float(self.total_steps * cost.linear(self.plan.ops, self.fixed or Precision()))

    def cost_summary(self) -> dict[str, float]:
        """BitOps of the whole run under the schedule and at q_max, the saving, and bytes of the stored weights.

        Under a controller ``effective_bitops`` and ``saving`` are not known beforehand: they are those of the fewest
        bits that it may choose, throughout, and ``highest_bitops`` those of the most.
        """
        lowest, highest = schedules.bounds(self.schedule)
        static = cost.static(self.plan.ops, self.q_max, self.total_steps)
        effective = static if self.fixed is not None else cost.effective(self.plan.ops, lowest, self.total_steps)
        most = (
            {}
            if self.controller is None
            else {"highest_bitops": cost.effective(self.plan.ops, highest, self.total_steps)}
        )
        return {
            "effective_bitops": effective,
            **most,
            "static_bitops": static,
            "saving": cost.saving(effective, static),
            "float_bitops": cost.static(self.plan.ops, Precision(), self.total_steps),
            "weight_bytes": cost.weight_bytes(self.plan.ops, self.q_max, self.plan.weight_scales),
        }


def describe(experiment: Experiment) -> str:
    """Data, schedule, plan and cost of a run, for people."""
    costs = experiment.cost_summary()
    return "\n".join(
        [
            experiment.dataset.describe(),
            experiment.describe_schedule(),
            "",
            str(experiment.plan),
            _cost_line(experiment, costs),
            "",
        ]
    )


def _cost_line(experiment: Experiment, costs: Mapping[str, float]) -> str:
    steps, static = experiment.total_steps, costs["static_bitops"]
    rest = f"{static:.4g} at constant q_max (float: {costs['float_bitops']:.4g})"
    if experiment.controller is None:
        return f"{steps} steps; {costs['effective_bitops']:.4g} BitOps, {100 * costs['saving']:.1f} % fewer than {rest}"
    between = f"{costs['effective_bitops']:.4g} to {costs['highest_bitops']:.4g} BitOps"
    if isinstance(experiment.controller, schedules.BudgetKeeper):
        budget = experiment.controller.bitops
        share = f"{100 * (1 - budget / static):.1f} % fewer than {rest}"
        return f"{steps} steps; budget_keeper spends {budget:.4g} BitOps of {between} that are possible, {share}"
    return f"{steps} steps; what {experiment.controller.name} spends the training decides: {between}; {rest}"


def batch_inputs(dataset: Dataset, batch_size: int) -> Any:
    """The shape of the model's input for one training batch: an array's, or by name those of a graph."""
    if isinstance(dataset.train, GraphSplit):
        arrays = dataset.train.batch
        return {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in KEYS}
    dtype = "int32" if dataset.kind == "tokens" else "float32"
    return jax.ShapeDtypeStruct((batch_size, *dataset.input_shape), dtype)


def penalty_of(losses: Penalty | None, budget: Budget | None) -> Callable[..., tuple[Any, Any]] | None:
    """The loss terms and the budget as `Additions` has them."""
    if losses is None and budget is None:
        return None

    def penalty(step: Any, params: Any, quant: Any, bits: Any, controller: Any) -> tuple[Any, Any]:
        added = 0.0 if losses is None else losses(step, params, quant, bits)
        if budget is None:
            return added, controller
        more, steering = budget(step, params, quant, bits, controller)
        return added + more, {**controller, **steering}

    return penalty
