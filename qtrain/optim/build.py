"""Optimizers and learning-rate schedules by name, from a config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from qtrain.durations import duration
from qtrain.errors import UsageError, did_you_mean

SCHEDULES = ("constant", "cosine", "linear", "step")

# Transforms of optax that take a schedule as learning_rate and need nothing but gradients and parameters.
OPTIMIZERS = (
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "fromage",
    "lamb",
    "lars",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "radam",
    "rmsprop",
    "sgd",
    "yogi",
)


def learning_rate_schedule(
    config: Mapping[str, Any], total_steps: int, steps_per_epoch: int, steps_per_update: int = 1
) -> optax.Schedule:
    """Learning rate over the optimizer's updates, one per `steps_per_update` steps.

    ============  =============================================================================================
    schedule      learning rate after the warm-up, u = progress from its end to the end of the run
    ============  =============================================================================================
    constant      `learning_rate`
    cosine        from `learning_rate` to `final_factor` × it, half a cosine
    linear        from `learning_rate` to `final_factor` × it, a line
    step          × `decay_factor` at each of `boundaries_percent` (percent of the run)
    ============  =============================================================================================

    ``warmup_steps | warmup_epochs | warmup_percent`` prepend a line from 0.

    Raises:
      UsageError: for an unknown name, a number out of range, a warm-up as long as the run.
    """
    name, peak = config["schedule"], config["learning_rate"]
    if name not in SCHEDULES:
        raise UsageError(f"optimizer.schedule={name!r}: give one of {SCHEDULES}.{did_you_mean(name, SCHEDULES)}")
    for key, value, allowed, fits in (
        ("learning_rate", peak, "a number above 0", 0 < peak < math.inf),
        ("final_factor", config["final_factor"], "a number from 0 to 1", 0 <= config["final_factor"] <= 1),
        ("decay_factor", config["decay_factor"], "a number above 0", 0 < config["decay_factor"] < math.inf),
    ):
        if not fits:
            raise UsageError(f"optimizer.{key}={value!r}: give {allowed}")
    boundaries = list(config["boundaries_percent"])
    if not all(isinstance(percent, int | float) and 0 < percent < 100 for percent in boundaries):
        raise UsageError(f"optimizer.boundaries_percent={boundaries}: give percents between 0 and 100")
    warmup_steps = duration(
        config, "warmup", "optimizer", steps_per_epoch=steps_per_epoch, total_steps=total_steps, default=0
    )
    if warmup_steps >= total_steps:
        raise UsageError(f"optimizer.warmup is {warmup_steps} steps of {total_steps}: make it shorter than the run")
    total, warmup = -(-total_steps // steps_per_update), warmup_steps // steps_per_update
    rest = total - warmup
    final = config["final_factor"]
    if name == "cosine":
        main: optax.Schedule = optax.cosine_decay_schedule(peak, rest, alpha=final)
    elif name == "linear":
        main = optax.linear_schedule(peak, peak * final, rest)
    elif name == "step":
        if not boundaries:
            raise UsageError("optimizer.boundaries_percent is empty: give percents between 0 and 100")
        factors: dict[int, float] = {}
        for percent in boundaries:  # in a short run two of them may fall on one update
            at = round(percent / 100 * total) - warmup
            factors[at] = factors.get(at, 1.0) * config["decay_factor"]
        main = optax.piecewise_constant_schedule(peak, factors)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def optimizer(
    config: Mapping[str, Any], total_steps: int, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer a config names: clipping, weight decay, the transform, accumulation.

    Args:
      config: ``name`` (one of optax's, see `OPTIMIZERS`), ``learning_rate`` and the keys of `learning_rate_schedule`;
        ``momentum`` and ``nesterov`` for sgd; ``weight_decay``: coupled (added to the gradient, as an L2 penalty)
        except where the optimizer decouples it itself (adamw, lion, …); ``decay`` "kernels" (tensors of two and more
        axes) or "all"; ``clip_norm``: global gradient norm, 0 for none; ``accumulate_steps``: micro-batches averaged
        into one update; ``options``: further arguments of the optax function.
      total_steps: training steps (micro-batches).
      steps_per_epoch: of the training data.

    Returns:
      The transform, and the learning rate as a function of its updates.

    Raises:
      UsageError: for an unknown name or option, or a value out of range.
    """
    name = config["name"]
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer.name={name!r}: give one of {OPTIMIZERS}.{did_you_mean(name, OPTIMIZERS)}")
    every = config["accumulate_steps"]
    if not isinstance(every, int) or not 1 <= every <= total_steps:
        allowed = f"a whole number from 1 to the {total_steps} steps of the run"
        raise UsageError(f"optimizer.accumulate_steps={every!r}: give {allowed}")
    for key in ("weight_decay", "clip_norm"):
        if not 0 <= config[key] < math.inf:
            raise UsageError(f"optimizer.{key}={config[key]!r}: give a number of at least 0")
    if not 0 <= config["momentum"] < 1:
        raise UsageError(f"optimizer.momentum={config['momentum']!r}: give a number from 0 to below 1")
    schedule = learning_rate_schedule(config, total_steps, steps_per_epoch, every)
    function: Callable[..., optax.GradientTransformation] = getattr(optax, name)
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {}
    if name == "sgd":
        arguments |= {"momentum": config["momentum"] or None, "nesterov": config["nesterov"]}
    mask = _decay_mask(config["decay"])
    chain = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    if "weight_decay" in parameters:
        arguments["weight_decay"] = config["weight_decay"]
        masks = [key for key in ("mask", "weight_decay_mask") if key in parameters]
        arguments |= dict.fromkeys(masks, mask)
    elif config["weight_decay"]:
        chain.append(optax.add_decayed_weights(config["weight_decay"], mask))
    for key, value in config["options"].items():
        if key not in parameters:
            allowed = f"{sorted(parameters)}.{did_you_mean(key, parameters)}"
            raise UsageError(f"optimizer.options.{key}: optax.{name} takes {allowed}")
        arguments[key] = value
    try:
        transform = optax.chain(*chain, function(schedule, **arguments))
        _dry_run(transform)
    except Exception as error:  # whatever optax makes of a value that it does not take
        options = dict(config["options"])
        raise UsageError(f"optimizer.options={options}: optax.{name} refuses: {' '.join(str(error).split())}") from None
    if every > 1:
        steps = optax.MultiSteps(transform, every_k_schedule=every)
        transform = optax.GradientTransformation(steps.init, steps.update)
    return transform, schedule


def _dry_run(transform: optax.GradientTransformation) -> None:
    """An update of abstract parameters: nothing is computed, every argument is looked at."""
    leaf = jax.ShapeDtypeStruct((2, 2), "float32")
    jax.eval_shape(lambda tree: transform.update(tree, transform.init(tree), tree), {"kernel": leaf})


def _decay_mask(decay: str) -> Any:
    if decay not in ("kernels", "all"):
        raise UsageError(f"optimizer.decay={decay!r}: give 'kernels' (tensors of two and more axes) or 'all'")
    if decay == "all":
        return None
    return lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
