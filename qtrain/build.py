"""A config resolved: everything is checked here, before anything is compiled or written."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import optax
from ml_collections import ConfigDict

from qtrain import cost, data, models, schedules
from qtrain.additions import Additions, Bits
from qtrain.config import check_keys
from qtrain.data import Dataset
from qtrain.deficits import deficit_from_config
from qtrain.durations import duration
from qtrain.errors import UsageError, did_you_mean
from qtrain.experiment import Experiment, batch_inputs, penalty_of
from qtrain.groups import bits_tree, latent_weights, parameter_groups
from qtrain.inject import Rule, quantize
from qtrain.losses import Penalty, penalty_from_config
from qtrain.losses.budget import Budget, budget_from_config, initial_controller
from qtrain.losses.thresholds import thresholds_from_config
from qtrain.methods import aqt, multi_precision
from qtrain.methods.multi_precision import MultiPrecision
from qtrain.optim import optimizer
from qtrain.optim.build import TRANSITION
from qtrain.precision import Precision
from qtrain.quantizers.native import WIDEST
from qtrain.recipes import check_values, rules_of
from qtrain.schedules import CONTROLLERS, Controller, Decided, PrecisionSchedule
from qtrain.schedules.precisions import KINDS
from qtrain.sensitivity import fisher_from_config, weight_traces
from qtrain.sharding import check_mesh
from qtrain.steering import Steering
from qtrain.tasks import task_for
from qtrain.widths import Widths


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
    if method is not None and config.quant.backend == "aqt":
        raise UsageError(
            f"multi_precision.widths={method.widths}: quant.backend='aqt' freezes one width at compile time; leave the "
            "widths empty, or give quant.backend='qtrain'"
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
    inputs = batch_inputs(dataset, config.data.batch_size)
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


def _additions(
    config: ConfigDict, widths: Widths, losses: Penalty | None, budget: Budget | None, total_steps: int
) -> Additions:
    def update_arguments(precision: Precision, bits: Bits, trained: Any) -> dict[str, Any]:
        return {"bits": bits_tree(widths.weights, bits)} if widths.weights else {}

    return Additions(
        penalty=penalty_of(losses, budget),
        controller=dict if budget is None else initial_controller,
        update_arguments=update_arguments,
        scheduled=thresholds_from_config(config.quant.threshold.to_dict(), widths.weights, total_steps),
        priced=widths.priced,
    )


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
