"""Optimizers by name, from a config: optax's, each alone or with a schedule of transition rates."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax

from qtrain.errors import UsageError, did_you_mean
from qtrain.optim.codes import Codes
from qtrain.optim.freezing import freeze_oscillations, freezing_threshold
from qtrain.optim.learning_rate import learning_rate_schedule
from qtrain.optim.oscillation import track_oscillations
from qtrain.optim.path_groups import by_path_groups
from qtrain.optim.transition import scale_by_transition_rate
from qtrain.trees import leaf_name

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


TRANSITION = {"sgdt": "sgd", "adamt": "adam", "adamwt": "adamw"}
"""Optimizers whose latent quantized weights move at a transition-adaptive rate, and what they scale."""

ScaleTransform = Callable[[optax.Schedule, optax.GradientTransformation], optax.GradientTransformation]

NAMES = tuple(sorted((*OPTIMIZERS, *TRANSITION)))
"""What ``optimizer.name`` may be."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which leaves of ``{"params": …, "quant": …}`` are optimized how.

    Attributes:
      labels: tree → a tree like it of "params" (ordinary parameters), "latent" (quantized weights under a
        transition rate), "quant" (learned quantizer parameters), "width" (of these, learned widths) and "frozen"; None:
        all are ordinary.
      codes: of the quantized weights, for `scale_by_transition_rate` and `track_oscillations`.
      decode: the values of such codes, for `freeze_oscillations`.
      held: names, ("params", …, "scale"), of leaves whose first axis is a row for each width: no axis of a kernel.
    """

    labels: Callable[[Any], Any] | None = None
    codes: Codes | None = None
    decode: Callable[..., Any] | None = None
    held: frozenset[tuple[str, ...]] = frozenset()


def optimizer(
    config: Mapping[str, Any],
    total_steps: int,
    steps_per_epoch: int,
    groups: Groups | None = None,
    scales: ScaleTransform | None = None,
    learning_rate: optax.Schedule | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimizer a config names: clipping, weight decay, the transform, accumulation.

    Args:
      config: ``name`` (one of `NAMES`), ``learning_rate`` and the keys of `learning_rate_schedule`;
        ``momentum`` and ``nesterov`` for sgd; ``weight_decay``: coupled (added to the gradient, as an L2 penalty)
        except where the optimizer decouples it itself (adamw, lion, …); ``decay`` "kernels" (tensors of two and more
        axes) or "all"; ``clip_norm``: global gradient norm, 0 for none; ``accumulate_steps``: micro-batches averaged
        into one update; ``options``: further arguments of the optax function; ``quant``: ``learning_rate`` (None: the
        same), following the same schedule, and ``weight_decay`` of learned quantizer parameters, and
        ``width_learning_rate`` of learned widths: these are moved by Adam whatever `name` says, at this many bits a
        step, following the same schedule; ``groups``: parameters with a rate or a decay of their own, see
        `by_path_groups`; ``transition``: see `transition_from_config`; ``oscillation``: ``track`` counts the
        oscillations of quantized weights, ``freeze`` also freezes weights by `freezing_threshold` (``freeze_start``,
        ``freeze_end``, ``freeze_from_percent``), both with ``momentum``.
      total_steps: training steps (micro-batches).
      steps_per_epoch: of the training data.
      groups: which parameter belongs to which group; None: all are ordinary.
      scales: ``(learning rate, direction) -> transform`` of learned scales, in place of the named optimizer's;
        `direction` is a transform that makes the gradient with its weight decay. None: scales are optimized as named.
        The other learned quantizer parameters (offsets) are, in either case.
      learning_rate: in place of the config's schedule, of which it gives the values.

    Returns:
      The transform, and the learning rate as a function of its updates. A transform with a transition rate needs
      ``update(…, bits=, quant=)``.

    Raises:
      UsageError: for an unknown name or option, or a value out of range.
    """
    name = config["name"]
    if name not in NAMES:
        raise UsageError(f"optimizer.name={name!r}: give one of {NAMES}.{did_you_mean(name, NAMES)}")
    every = config["accumulate_steps"]
    if not isinstance(every, int) or not 1 <= every <= total_steps:
        allowed = f"a whole number from 1 to the {total_steps} steps of the run"
        raise UsageError(f"optimizer.accumulate_steps={every!r}: give {allowed}")
    for key in ("weight_decay", "clip_norm"):
        _at_least_zero(f"optimizer.{key}", config[key])
    if not 0 <= config["momentum"] < 1:
        raise UsageError(f"optimizer.momentum={config['momentum']!r}: give a number from 0 to below 1")
    schedule = learning_rate or learning_rate_schedule(config, total_steps, steps_per_epoch, every)
    held = frozenset() if groups is None else groups.held
    ordinary = by_path_groups(
        config["groups"],
        config["learning_rate"],
        config["weight_decay"],
        lambda factor, decay: _base(config, lambda step: factor * schedule(step), decay, held),
    )
    clip = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    if groups is None or groups.labels is None:
        if name in TRANSITION:
            raise UsageError(f"optimizer.name={name!r}: no weight is quantized, so none has transitions to schedule")
        transform = optax.chain(*clip, ordinary)
    else:
        quant = config["quant"]
        _at_least_zero("optimizer.quant.weight_decay", quant["weight_decay"])
        own = config["learning_rate"] if quant["learning_rate"] is None else quant["learning_rate"]
        _at_least_zero("optimizer.quant.learning_rate", own)
        _at_least_zero("optimizer.quant.width_learning_rate", quant["width_learning_rate"])
        factor = own / config["learning_rate"]
        parts = {
            "params": ordinary,
            "quant": _quantizers(config, lambda step: factor * schedule(step), scales),
            "width": optax.adam(lambda step: quant["width_learning_rate"] / config["learning_rate"] * schedule(step)),
            "frozen": optax.set_to_zero(),
        }
        if name in TRANSITION:
            assert groups.codes is not None
            rate = transition_from_config(config, groups.codes, total_steps, steps_per_epoch, every)
            # The decay is part of what the rate scales, coupled or not.
            parts["latent"] = optax.chain(_base(config, 1.0, config["weight_decay"]), rate)
        transform = optax.chain(*clip, optax.partition(parts, groups.labels))
    transform = optax.chain(transform, *_oscillation(config["oscillation"], groups, -(-total_steps // every)))
    if every > 1:
        steps = optax.MultiSteps(transform, every_k_schedule=every)
        transform = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    return optax.with_extra_args_support(transform), schedule


def _quantizers(
    config: Mapping[str, Any], rate: optax.Schedule, scales: ScaleTransform | None
) -> optax.GradientTransformation:
    """The transform of learned quantizer parameters but widths."""
    whole = {**config, "decay": "all"}
    decay = config["quant"]["weight_decay"]
    ordinary = _base(whole, rate, decay)
    if scales is None:
        return ordinary

    def label(path: tuple[Any, ...], _: Any) -> str:
        return "scale" if getattr(path[-1], "key", None) == "scale" else "other"

    parts = {"scale": scales(rate, optax.add_decayed_weights(decay) if decay else optax.identity()), "other": ordinary}
    return optax.partition(parts, lambda tree: jax.tree_util.tree_map_with_path(label, tree))


def transition_from_config(
    config: Mapping[str, Any], codes: Codes, total_steps: int, steps_per_epoch: int, steps_per_update: int = 1
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_transition_rate` from the keys of ``optimizer.transition``.

    The target is λ·d(u)·√b for a run's progress u: ``factor`` λ, ``schedule`` d with the keys of the learning rate's
    (``final_factor``, ``boundaries_percent``, ``decay_factor``; held and restarted where it is), ``target_scale``
    "sqrt_bits" or "none";
    ``initial_rate`` (None: ``optimizer.learning_rate``), ``momentum``, ``rule``, ``gain`` and ``max_rate`` are passed
    on.

    Raises:
      UsageError: for a value out of range.
    """
    own = dict(config["transition"])
    decay = {**config, **{key: own[key] for key in ("schedule", "final_factor")}, "learning_rate": own["factor"]}
    no_warmup = {f"warmup_{unit}": 0 for unit in ("steps", "epochs", "percent")}
    if not isinstance(own["factor"], int | float) or not 0 < own["factor"] < 1:
        raise UsageError(f"optimizer.transition.factor={own['factor']!r}: give a share of the weights, between 0 and 1")
    if own["target_scale"] not in ("sqrt_bits", "none"):
        near = did_you_mean(str(own["target_scale"]), ("sqrt_bits", "none"))
        raise UsageError(
            f"optimizer.transition.target_scale={own['target_scale']!r}: give 'sqrt_bits' or 'none'.{near}"
        )
    target = learning_rate_schedule(
        {**decay, **no_warmup}, total_steps, steps_per_epoch, steps_per_update, key="optimizer.transition"
    )
    try:
        return scale_by_transition_rate(
            codes,
            target,
            config["learning_rate"] if own["initial_rate"] is None else own["initial_rate"],
            momentum=own["momentum"],
            rule=own["rule"],
            gain=own["gain"],
            max_rate=own["max_rate"],
            target_scale=None if own["target_scale"] == "none" else own["target_scale"],
        )
    except UsageError as error:
        raise UsageError(f"optimizer.transition: {error}") from None


def _oscillation(
    config: Mapping[str, Any], groups: Groups | None, total_updates: int
) -> list[optax.GradientTransformation]:
    """What ``optimizer.oscillation`` asks for: nothing, tracking, or tracking and freezing."""
    if not config["track"] and not config["freeze"]:
        return []
    if groups is None or groups.codes is None or groups.decode is None:
        raise UsageError("optimizer.oscillation: no weight is quantized; set track and freeze to False")
    try:
        if not config["freeze"]:
            return [track_oscillations(groups.codes, config["momentum"])]
        ends = config["freeze_start"], config["freeze_end"]
        threshold = freezing_threshold(total_updates, *ends, first=config["freeze_from_percent"] / 100)
        return [freeze_oscillations(groups.codes, groups.decode, threshold, config["momentum"])]
    except UsageError as error:
        raise UsageError(f"optimizer.oscillation: {error}") from None


def _base(
    config: Mapping[str, Any], rate: float | optax.Schedule, decay: float, held: Collection[tuple[str, ...]] = ()
) -> optax.GradientTransformation:
    """The named transform of optax at a learning rate, with its weight decay."""
    name = TRANSITION.get(config["name"], config["name"])
    function: Callable[..., optax.GradientTransformation] = getattr(optax, name)
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {}
    if name == "sgd":
        arguments |= {"momentum": config["momentum"] or None, "nesterov": config["nesterov"]}
    mask = _decay_mask(config["decay"], held)
    chain = []
    if "weight_decay" in parameters:
        arguments["weight_decay"] = decay
        masks = [key for key in ("mask", "weight_decay_mask") if key in parameters]
        arguments |= dict.fromkeys(masks, mask)
    elif decay:
        chain.append(optax.add_decayed_weights(decay, mask))
    for key, value in config["options"].items():
        if key not in parameters:
            allowed = f"{sorted(parameters)}.{did_you_mean(key, parameters)}"
            raise UsageError(f"optimizer.options.{key}: optax.{name} takes {allowed}")
        arguments[key] = value
    try:
        transform = optax.chain(*chain, function(rate, **arguments))
        _dry_run(transform)
    except Exception as error:  # whatever optax makes of a value that it does not take
        options = dict(config["options"])
        raise UsageError(f"optimizer.options={options}: optax.{name} refuses: {' '.join(str(error).split())}") from None
    return transform


def _at_least_zero(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(f"{key}={value!r}: give a number of at least 0")


def _dry_run(transform: optax.GradientTransformation) -> None:
    """An update of abstract parameters: nothing is computed, every argument is looked at."""
    leaf = jax.ShapeDtypeStruct((2, 2), "float32")
    jax.eval_shape(lambda tree: transform.update(tree, transform.init(tree), tree), {"kernel": leaf})


def _decay_mask(decay: str, held: Collection[tuple[str, ...]]) -> Any:
    if decay not in ("kernels", "all"):
        raise UsageError(f"optimizer.decay={decay!r}: give 'kernels' (tensors of two and more axes) or 'all'")
    if decay == "all":
        return None

    def of_a_kernel(path: Any, leaf: Any) -> bool:
        return bool(leaf.ndim - (leaf_name(path) in held) > 1)

    return lambda params: jax.tree_util.tree_map_with_path(of_a_kernel, params)
