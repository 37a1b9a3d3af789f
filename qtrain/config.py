"""The keys every config shares, their values for a reference task, and the `smoke` form of any config."""

from __future__ import annotations

import copy
from typing import Any

from ml_collections import ConfigDict, config_dict

from qtrain.errors import UsageError, did_you_mean
from qtrain.reference import SMOKE_MODELS, TASKS

placeholder = config_dict.placeholder


QUANT: dict[str, Any] = {
    "recipe": "default",
    "weights": "symmetric/channel",
    "acts": "symmetric/channel",
    "grads": "symmetric/tensor/stochastic",
    "bias": "none",
    "ends": 8,
    "threshold": {"schedule": "constant", "final_factor": 1.0},
    "residuals": "quantized",
    "execution": "fake",
    "ops": ("weighted",),
    "rules": (),
    "backend": "qtrain",
}
"""The section ``quant`` unless a config says otherwise."""


def base_config(task: str) -> ConfigDict:
    """A config with every shared key, for one of `TASKS`; unlocked, for a method to fill in.

    ===========  ====================================================================================================
    section      keys
    ===========  ====================================================================================================
    seed         initialisation, dropout and stochastic rounding
    init_from    a run whose parameters to start from (its folder, or a checkpoint in it): `qtrain.init_from`; "": none
    data         `qtrain.data.DataConfig`; ``data.seed`` is order and augmentation, ``data.dir`` where TFDS sets lie
    model        ``name``, ``dtype`` ("float32", "bfloat16": of the computation) and the model's own fields
    quant        ``recipe`` "default": quantizers ``weights``, ``acts``, ``grads``, ``bias`` (`quantizer_from_config`)
                 and ``ends`` (bits of the first and the last layer); "cpt", "trs" and "multi_precision" bring their
                 own: `qtrain.methods`.
                 For any of them ``residuals``, ``execution`` ("fake", "native", "auto", as `Rule` has them);
                 ``ops``: what is quantized, as `Rule` has it ("weighted", and for transformers "attention", too);
                 ``rules``: mappings of `Rule`'s fields, tried before the recipe's, with residuals, execution and ops
                 of their own; ``threshold``: the schedule of nested quantizers' λ; ``backend`` ("qtrain", or
                 "aqt": the AQT baseline at static bits)
    multi_precision  widths that are trained together, with the recipe of that name:
                 `qtrain.methods.multi_precision.from_config`; ``data.repeat``: steps that take the same batch
    schedule     `qtrain.schedules.precisions_from_config`; ``weights``, ``acts``, ``grads`` where they differ. The
                 values of "rounds" are the widths unless given. "fractrain", "muppet" and "budget_keeper" decide
                 bits while training
    optimizer    `qtrain.optim.optimizer`; ``groups``: parameters, by path, with a ``learning_rate`` or
                 ``weight_decay`` of their own; ``quant``: learned quantizer parameters; ``transition``: of the
                 optimizers sgdt, adamt and adamwt; ``oscillation``: ``track`` (as metrics), ``freeze``
    budget       what learned widths may cost: ``unit`` ("none", "bits", "bytes", "bitops"), ``target``, see
                 `qtrain.losses.budget.budget_from_config`
    losses       penalties added to the loss: ``<name>.rate`` and its ``schedule``, see `qtrain.losses`
    deficit      what the training images lack for a part of the run: `qtrain.deficits.deficit_from_config`
    fisher       traces of the Fisher information by layer, at every row: `qtrain.sensitivity.fisher_from_config`
    train        ``steps`` or ``epochs`` (the other 0), ``log_every_steps``, ``steps_per_dispatch``,
                 ``compilation_cache`` (a folder), ``layer_norms``: norms of each parameter's gradient and update, and
                 of the update relative to it, among the metrics
    eval         ``every_steps | every_epochs | every_percent`` (none: only at the end), ``batch_size``; ``splits``, by
                 the first of which the best of the checkpoints that fall on an evaluation is kept (``best_checkpoint``
                 in summary.json; ``init_from=RUN/checkpoints/STEP``);
                 ``reestimate_batches``: norm statistics are re-estimated from so many training batches before it
    checkpoint   ``every_steps | every_epochs | every_percent``, ``keep``
    mesh         sizes of the axes of devices ``data`` and ``fsdp``, -1: all that are left. A batch is split over both;
                 along ``fsdp`` parameters, gradients and optimizer states of ``fsdp_min_size`` elements and more are
                 split, too: `qtrain.sharding`. A run may be resumed with another mesh
    ===========  ====================================================================================================

    Raises:
      UsageError: for an unknown task.
    """
    if task not in TASKS:
        raise UsageError(f"task {task!r}: give one of {sorted(TASKS)}.{did_you_mean(task, TASKS)}")
    config = ConfigDict(_shared_keys())
    for section, values in TASKS[task].items():
        for key, value in values.items():
            config[section][key] = value
    config.checkpoint.every_percent = 10.0
    config.eval.every_percent = 25.0
    return config


def _shared_keys() -> dict[str, Any]:
    # These import grain and JAX, which `qtrain --help` must not wait for.
    from qtrain.data import DEFAULTS
    from qtrain.losses import LOSSES
    from qtrain.sharding import DEFAULTS as MESH

    every: dict[str, Any] = {"every_steps": 0, "every_epochs": 0.0, "every_percent": 0.0}
    return {
        "seed": 0,
        "smoke": False,
        "init_from": "",
        "data": dict(DEFAULTS),
        "model": {"name": "", "dtype": "float32"},
        "quant": copy.deepcopy(QUANT),
        "multi_precision": {
            "widths": (),
            "updates": "sequential",
            "alrs": "none",
            "distill": {"rate": 0.0, "temperature": 1.0},
            "hasb": {"sigma": 0.0, "batches": 4, "draws": 100, "tolerance": 1e-3},
        },
        "schedule": {**_schedule_keys(), **{kind: _schedule_keys() for kind in ("weights", "acts", "grads")}},
        "optimizer": {
            "name": "adam",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 0,
            "warmup_epochs": 0.0,
            "warmup_percent": 0.0,
            **_durations("hold_start", "hold", "restart"),
            "final_factor": 0.0,
            "boundaries_percent": (50, 75),
            "decay_factor": 0.1,
            "decay_percent": 20.0,
            "cooldown_percent": 20.0,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 0.0,
            "decay": "kernels",
            "clip_norm": 0.0,
            "accumulate_steps": 1,
            "options": {},
            "groups": (),
            "quant": {"learning_rate": placeholder(float), "weight_decay": 0.0, "width_learning_rate": 0.02},
            "transition": {
                "factor": 5e-3,
                "schedule": "cosine",
                "final_factor": 0.0,
                "target_scale": "sqrt_bits",
                "rule": "additive",
                "momentum": 0.99,
                "initial_rate": placeholder(float),
                "gain": placeholder(float),
                "max_rate": placeholder(float),
            },
            "oscillation": {
                "track": False,
                "momentum": 0.001,
                "freeze": False,
                "freeze_start": 0.1,
                "freeze_end": 0.01,
                "freeze_from_percent": 25.0,
            },
        },
        "budget": {
            "unit": "none",
            "target": 3.0,
            "start": placeholder(float),
            "schedule": "linear_down",
            "rate": 0.003,
        },
        "losses": {name: {"rate": 0.0, "schedule": "constant"} for name in LOSSES},
        "deficit": {"name": "none", "factor": 4, **_durations("start", "length")},
        "fisher": {"examples": 0, "samples": 1, "at": ("step",)},
        "train": {
            "steps": 0,
            "epochs": 0.0,
            "log_every_steps": 50,
            "layer_norms": False,
            "steps_per_dispatch": 1,
            "compilation_cache": "",
        },
        "eval": {**every, "splits": ("test",), "batch_size": 360, "reestimate_batches": 0},
        "checkpoint": {**every, "keep": 2},
        "mesh": dict(MESH),
    }


def _durations(*names: str) -> dict[str, Any]:
    """The keys of durations that are unset at 0."""
    return {
        key: zero
        for name in names
        for key, zero in ((f"{name}_steps", 0), (f"{name}_epochs", 0.0), (f"{name}_percent", 0.0))
    }


def check_keys(config: ConfigDict) -> None:
    """Refuse a config that lacks a shared key, or has one that nothing reads; the model checks its own.

    Raises:
      UsageError: naming the key.
    """
    _compare(config, _shared_keys(), "")


def _compare(config: ConfigDict, shared: dict[str, Any], prefix: str) -> None:
    for name in config:
        if name not in shared:
            raise UsageError(f"{prefix}{name}: no such key; there are {', '.join(shared)}.{did_you_mean(name, shared)}")
    for name, value in shared.items():
        if name not in config:
            raise UsageError(f"{prefix}{name} is missing from the config; start it from qtrain.config.base_config")
        if isinstance(value, dict) and not isinstance(config[name], ConfigDict):
            raise UsageError(f"{prefix}{name}={config[name]!r}: must be a section with the keys {', '.join(value)}")
        if isinstance(value, dict) and f"{prefix}{name}" not in ("model", "optimizer.options"):
            _compare(config[name], value, f"{prefix}{name}.")


def _schedule_keys() -> dict[str, Any]:
    """The keys of a schedule, unset. Made anew each time: one placeholder in several places is one value."""
    durations = [f"{name}_{unit}" for name in ("start", "length", "begin") for unit in ("steps", "percent")]
    types: dict[type, tuple[str, ...]] = {
        str: ("name", "profile", "pattern", "reflection", "cycle_length", "budget_of", "signal"),
        int: (
            *("bits", "low", "high", "cycles", "start_bits", "end_bits", "inside", "outside"),
            *("window", "violations", "scale_epochs"),
        ),
        float: (
            *("rate", "beta", *durations, "epsilon", "alpha", "margin", "margin_decay"),
            *("budget_share", "gain", "memory", "interval_steps", "interval_epochs", "interval_percent"),
        ),
        tuple: ("boundaries_steps", "boundaries_percent", "values"),
        bool: ("restart",),
    }
    return {key: placeholder(kind) for kind, keys in types.items() for key in keys}


def finish(config: ConfigDict, argument: str = "") -> ConfigDict:
    """`config` locked; with the argument ``smoke`` first made tiny: six steps on generated arrays of its shapes.

    Raises:
      UsageError: for another argument.
    """
    if argument == "smoke":
        _make_smoke(config)
    elif argument:
        raise UsageError(f"config argument {argument!r}: the only one is 'smoke'.{did_you_mean(argument, ['smoke'])}")
    return config.lock()


def _make_smoke(config: ConfigDict) -> None:
    config.smoke = True
    config.init_from = ""  # a smaller model, which no checkpoint fits
    config.model.update(SMOKE_MODELS[config.model.name])
    config.data.update(batch_size=min(8, config.data.batch_size), length=16)  # a graph is a batch of one
    config.train.update(steps=6, epochs=0.0, log_every_steps=2)
    config.eval.update(every_steps=3, every_epochs=0.0, every_percent=0.0, batch_size=32)
    config.checkpoint.update(every_steps=3, every_epochs=0.0, every_percent=0.0)
    # Lengths in steps or epochs were meant for the whole run.
    for name, percent in (("warmup", 20.0), ("hold_start", 20.0), ("hold", 20.0), ("restart", 50.0)):
        if config.optimizer[f"{name}_steps"] or config.optimizer[f"{name}_epochs"]:
            config.optimizer.update({f"{name}_steps": 0, f"{name}_epochs": 0.0, f"{name}_percent": percent})
    for name, percent in (("start", 20.0), ("length", 40.0)):
        if config.deficit[f"{name}_steps"] or config.deficit[f"{name}_epochs"]:
            config.deficit.update({f"{name}_steps": 0, f"{name}_epochs": 0.0, f"{name}_percent": percent})
    config.fisher.examples = min(config.fisher.examples, 4)
    config.eval.reestimate_batches = min(config.eval.reestimate_batches, 2)
    config.multi_precision.hasb.update(batches=1, draws=2)
    config.optimizer.accumulate_steps = min(config.optimizer.accumulate_steps, 2)
    config.train.steps_per_dispatch = min(config.train.steps_per_dispatch, 2)
    for part in (config.schedule, config.schedule.weights, config.schedule.acts, config.schedule.grads):
        if part.cycles is not None:
            part.cycles = min(part.cycles, 2)
        if part.interval_steps or part.interval_epochs:
            part.update(interval_steps=2.0, interval_epochs=None)
