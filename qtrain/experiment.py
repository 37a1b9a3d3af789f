"""A config made into the things it names: data, model, plan, schedule, optimizer. Everything is checked here."""

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

from qtrain import cost, data, models, schedules
from qtrain.additions import Additions, Bits
from qtrain.config import check_keys
from qtrain.data import Dataset
from qtrain.data.graphs import GraphSplit
from qtrain.deficits import Deficit, deficit_from_config
from qtrain.durations import duration
from qtrain.errors import UsageError, did_you_mean
from qtrain.groups import bits_tree, latent_weights, parameter_groups
from qtrain.inject import (
    Plan,
    QuantizedModel,
    Rule,
    Weight,
    quantize,
)
from qtrain.inject.execution import Choice
from qtrain.losses import Penalty, penalty_from_config
from qtrain.losses.budget import Budget, budget_from_config, initial_controller
from qtrain.losses.thresholds import thresholds_from_config
from qtrain.methods import aqt, multi_precision
from qtrain.methods.multi_precision import MultiPrecision
from qtrain.models.gcn import KEYS
from qtrain.optim import optimizer
from qtrain.optim.build import TRANSITION
from qtrain.precision import Precision
from qtrain.quantizers.native import WIDEST
from qtrain.recipes import check_values, rules_of
from qtrain.schedules import CONTROLLERS, Controller, Decided, PrecisionSchedule
from qtrain.schedules.precisions import KINDS
from qtrain.sensitivity import FisherSettings, fisher_from_config, weight_traces
from qtrain.sharding import check_mesh
from qtrain.state import NOTHING, Previous, TrainState, create
from qtrain.steering import Steering
from qtrain.tables import Tables, tabulate
from qtrain.tasks import IMAGES, Task, task_for
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
            additions = dataclasses.replace(additions, penalty=_penalty(losses, self.budget))
        if self.deficit is not None:
            observed = dataclasses.replace(self.deficit, switch=tables.deficit)
            additions = dataclasses.replace(additions, observed=observed)
        bound = dataclasses.replace(
            self, reads=tables, optimizer=self.optimizer_at(rate), learning_rate=rate, additions=additions
        )
        return bound.steered_by(tables.controller)

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

        def precision(step: Any) -> Precision:
            found = self.precision(step)
            return found if steering is None else steering.precision(found, steering.begun())

        # Compiled whole: a schedule's operations one by one would be a dozen programs.
        return jax.tree.map(float, jax.device_get(jax.jit(precision)(step)))

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
        return _inputs(self.dataset, self.config.data.batch_size)

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


def build(config: ConfigDict, dataset: Dataset | None = None) -> Experiment:
    """Resolve a config; with `dataset`, what its section ``data`` names and was read before.

    Raises:
      UsageError: for whatever is wrong with it, before anything is compiled or written.
    """
    check_keys(config)
    check_values(config)
    check_mesh(config.mesh)
    method = multi_precision.from_config(config.multi_precision, config.quant.recipe)
    dataset = data.load(config.data, smoke=config.smoke) if dataset is None else dataset
    steps_per_epoch = dataset.steps_per_epoch(config.data.batch_size) * config.data.repeat
    total_steps = _total_steps(config, steps_per_epoch)
    schedule = schedule_of(config, method, total_steps)
    _check_decided(config, schedule)
    fields = config.model.to_dict()
    _check_suits(fields.get("name"), dataset, config.data.name)
    _check_splits(config.eval.splits, dataset)
    module = models.build(fields, num_classes=dataset.num_classes, input_shape=dataset.input_shape)
    task = task_for(dataset, module)
    if method is not None and method.distill_rate and not task.classifies:
        raise UsageError(
            f"multi_precision.distill.rate={method.distill_rate}: distillation compares logits, and model.name="
            f"{fields['name']!r} finds boxes; set it to 0"
        )
    rules = rules_of(config, method)
    per_width = method.widths if method is not None else ()
    fixed = None
    if config.quant.backend == "aqt":
        # AQT freezes widths at compile time, so the run is the schedule's static counterpart.
        fixed = Precision(weights=schedule.q_max.weights, acts=schedule.q_max.acts)
        schedule = dataclasses.replace(schedule, weights=fixed.weights, acts=fixed.acts, grads=None)
        qmodel = quantize(module, aqt.aqt_rules(rules), execute=aqt.execute)
    else:
        narrowest = narrowest_of(schedule, total_steps, rules)
        qmodel = quantize(module, rules, widest=schedule.q_max, narrowest=narrowest, per_width=per_width)
    inputs = _inputs(dataset, config.data.batch_size)
    plan = qmodel.plan(inputs, train=True)
    # As chosen for the training batch, so that evaluation at another size does the same arithmetic.
    qmodel = qmodel.with_choices(plan.choices)
    weights = qmodel.weights(inputs, train=True)
    quantizers = qmodel.quantizers(inputs, train=True)
    transition = config.optimizer.name in TRANSITION
    groups = parameter_groups(weights, quantizers, schedule.q_max, transition=transition)
    groups = dataclasses.replace(groups, held=frozenset(qmodel.held({}).leaves))
    widths = Widths(plan, weights, quantizers)
    fields, scales = config.optimizer.to_dict(), None
    if method is not None:
        fields, scales = method.optimizer_fields(fields), method.scales()

    def optimizer_at(rate: optax.Schedule | None) -> tuple[optax.GradientTransformation, optax.Schedule]:
        transform, rate = optimizer(fields, total_steps, steps_per_epoch, groups, scales, rate)
        return transform if method is None else method.optimizer(transform), rate

    transform, learning_rate = optimizer_at(None)
    losses = losses_of(config, widths, schedule.q_max, total_steps)
    budget = budget_from_config(config.budget.to_dict(), widths, schedule.q_max, total_steps)
    additions = _additions(config, widths, losses, budget, total_steps)
    deficit = deficit_from_config(config.deficit, dataset, total_steps, steps_per_epoch)
    if deficit is not None:
        additions = dataclasses.replace(additions, observed=deficit)
    controller = controller_of(config, schedule, widths, total_steps, steps_per_epoch)
    if controller is not None:
        followers = tuple(weight for weight in weights if weight.kind == "weights" and weight.rule.weights is None)
        if not followers and isinstance(controller, schedules.Muppet):
            raise UsageError("schedule.name='muppet': no layer's weights follow the schedule, whose gradients it reads")
        additions = dataclasses.replace(additions, steering=Steering(controller, followers))
    if method is not None:
        additions = method.add_to(additions, qmodel, inputs)
        lengths = steps_per_epoch, total_steps
        additions = method.switching.add_to(
            additions, qmodel, widths, method.widths, config.seed, *lengths, functools.partial(weight_traces, task=task)
        )

    def every(section: str) -> int:
        units = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        found = duration(config[section], "every", section, **units, default=0, at_least=1)
        return _multiple(found, config.train.steps_per_dispatch)

    return Experiment(
        config=config,
        dataset=dataset,
        qmodel=qmodel,
        plan=plan,
        schedule=schedule,
        optimizer=transform,
        learning_rate=learning_rate,
        total_steps=total_steps,
        eval_every=every("eval"),
        checkpoint_every=every("checkpoint"),
        fixed=fixed,
        weights=weights,
        learns=any(quantizer.learns for quantizer in quantizers.values()),
        widths=widths,
        trained_widths=per_width,
        steps_per_update=fields["accumulate_steps"],
        additions=additions,
        task=task,
        controller=controller,
        losses=losses,
        budget=budget,
        deficit=deficit,
        fisher=fisher_from_config(config.fisher, dataset, task),
        optimizer_at=lambda rate: optimizer_at(rate)[0],
    )


def _check_splits(splits: Any, dataset: Dataset) -> None:
    allowed = tuple(dataset.eval)
    if not isinstance(splits, tuple | list) or not splits or len(set(splits)) < len(splits):
        raise UsageError(f"eval.splits={splits!r}: give a tuple of different splits of {dataset.name!r}, {allowed}")
    for split in splits:
        if split not in allowed:
            raise UsageError(
                f"eval.splits has {split!r}; {dataset.name!r} has {', '.join(map(repr, allowed))}."
                f"{did_you_mean(split, allowed)}"
            )


def _check_suits(name: Any, dataset: Dataset, data_name: str) -> None:
    """Refuse a model of graphs or boxes for other data, and the reverse."""
    for kind, special, is_one, is_none in (
        ("graph", models.GRAPH_MODELS, "is a graph", "is no graph"),
        ("boxes", models.BOX_MODELS, "has boxes to find", "has no boxes to find"),
    ):
        wanted = dataset.kind == kind
        if wanted != (name in special):
            others = [one for one in models.MODELS if one not in (*models.GRAPH_MODELS, *models.BOX_MODELS)]
            raise UsageError(
                f"model.name={name!r} does not suit data.name={data_name!r}, which {is_one if wanted else is_none}; "
                f"give one of {', '.join(special if wanted else others)}"
            )


def schedule_of(config: ConfigDict, method: MultiPrecision | None, total_steps: int) -> PrecisionSchedule:
    """The schedules of a config, as its method of several widths takes them.

    Raises:
      UsageError: for a wrong value.
    """
    fields = config.schedule.to_dict()
    if method is None:
        return schedules.precisions_from_config(fields, total_steps)
    if fields["name"] in CONTROLLERS or any(fields[kind]["name"] in CONTROLLERS for kind in KINDS):
        raise UsageError(
            f"schedule.name={fields['name']!r}: multi_precision trains widths that are known before the run; give "
            "'rounds' or another schedule, or leave multi_precision.widths empty"
        )
    if fields["name"] == "rounds" and fields["values"] is None:
        fields["values"] = method.widths
    schedule = schedules.precisions_from_config(fields, total_steps)
    method.check_schedule(schedule, total_steps, config.data.repeat)
    return schedule


def _check_decided(config: ConfigDict, schedule: PrecisionSchedule) -> None:
    """Refuse controllers where bits are no data."""
    names = [one.name for one in (schedule.weights, schedule.acts, schedule.grads) if isinstance(one, Decided)]
    if names and config.quant.backend == "aqt":
        raise UsageError(
            f"schedule.name={names[0]!r}: quant.backend='aqt' freezes widths at compile time; give 'constant', or "
            "quant.backend='qtrain'"
        )


def controller_of(
    config: ConfigDict, schedule: PrecisionSchedule, widths: Widths, total_steps: int, steps_per_epoch: int
) -> Controller | None:
    """The controller of a config's schedules; None where they have none.

    Raises:
      UsageError: for a wrong value, or widths that are not the controller's alone.
    """
    budgeted = any(getattr(getattr(schedule, kind), "name", "") == "budget_keeper" for kind in KINDS)
    if budgeted and widths.chosen:
        raise UsageError(
            "schedule.name='budget_keeper': some quantizers learn their width, and a step's cost would not follow from "
            "the schedule; give those a width, or hold them to a budget of their own (budget.unit='bitops')"
        )

    def price(precision: Precision) -> float:
        return float(cost.bitops(widths.plan.ops, precision))

    return schedules.controller_from_schedule(schedule, total_steps, steps_per_epoch, price, config.seed)


def losses_of(config: ConfigDict, widths: Widths, q_max: Precision, total_steps: int) -> Penalty | None:
    """The loss terms of a config.

    Raises:
      UsageError: for a wrong value, or a term that the quantizers or the optimizer do not go with.
    """
    if config.optimizer.name in TRANSITION and config.losses.inverse_scale.rate:
        raise UsageError(
            f"losses.inverse_scale.rate={config.losses.inverse_scale.rate}: optimizer.name={config.optimizer.name!r} "
            "freezes the scales of the weights, which this term is about; set it to 0, or use another optimizer"
        )
    return penalty_from_config(config.losses.to_dict(), latent_weights(widths.weights, q_max), total_steps)


def _penalty(losses: Penalty | None, budget: Budget | None) -> Callable[..., tuple[Any, Any]] | None:
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


def _additions(
    config: ConfigDict, widths: Widths, losses: Penalty | None, budget: Budget | None, total_steps: int
) -> Additions:
    def update_arguments(precision: Precision, bits: Bits, trained: Any) -> dict[str, Any]:
        return {"bits": bits_tree(widths.weights, bits)} if widths.weights else {}

    return Additions(
        penalty=_penalty(losses, budget),
        controller=dict if budget is None else initial_controller,
        update_arguments=update_arguments,
        scheduled=thresholds_from_config(config.quant.threshold.to_dict(), widths.weights, total_steps),
        priced=widths.priced,
    )


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


def narrowest_of(schedule: PrecisionSchedule, total_steps: int, rules: tuple[Rule, ...]) -> Precision:
    """The fewest bits of each kind over the run, where that says whether codes of 8 bits can ever hold them."""
    if all(rule.execution == "fake" for rule in rules):
        return Precision()

    def fewest(kind: str) -> int | None:
        most = getattr(schedule.q_max, kind)
        if most is None or most <= WIDEST:
            return None
        of_kind = getattr(schedules.bounds(schedule)[0], kind)
        return int(schedules.evaluate(of_kind, total_steps).min())

    return Precision(**{kind: fewest(kind) for kind in ("weights", "acts", "grads")})


def _inputs(dataset: Dataset, batch_size: int) -> Any:
    if isinstance(dataset.train, GraphSplit):
        arrays = dataset.train.batch
        return {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in KEYS}
    dtype = "int32" if dataset.kind == "tokens" else "float32"
    return jax.ShapeDtypeStruct((batch_size, *dataset.input_shape), dtype)


def _total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    total = duration(config.train, "", "train", steps_per_epoch=steps_per_epoch)
    if total < 1:
        raise UsageError(f"train: {total} steps; give at least 1")
    per_dispatch = config.train.steps_per_dispatch
    if per_dispatch < 1 or total % per_dispatch or config.train.log_every_steps % per_dispatch:
        raise UsageError(
            f"train.steps_per_dispatch={per_dispatch}: give a divisor of the {total} steps and of "
            f"train.log_every_steps={config.train.log_every_steps}"
        )
    if config.train.log_every_steps < 1:
        raise UsageError(f"train.log_every_steps={config.train.log_every_steps}: give at least 1")
    return total


def _multiple(steps: int, per_dispatch: int) -> int:
    return -(-steps // per_dispatch) * per_dispatch
