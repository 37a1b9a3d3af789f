"""The keys every config shares, the tasks they start from, and the `smoke` form of any config."""

from __future__ import annotations

import copy
from typing import Any

from ml_collections import ConfigDict, config_dict

from qtrain.errors import UsageError, did_you_mean

placeholder = config_dict.placeholder


def _imagenet(model: dict[str, Any]) -> dict[str, Any]:
    """The reference setting of residual networks: 90 epochs at 224x224."""
    return {
        "data": {
            "name": "tfds:imagenet2012",
            "batch_size": 256,
            "num_classes": 1000,
            "image_shape": (224, 224, 3),
            "augment": ("resized_crop", "flip"),
            "central_crop": 0.875,
            "in_memory": False,
            "workers": 16,
            "prefetch": 16,
        },
        "model": model,
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine"},
        "train": {"steps": 500_400},
    }


def _state_space(learning_rate: float) -> tuple[dict[str, Any], ...]:
    """The parameters of the S5 recurrence, which the authors train at a slower rate, without decay."""
    names = "A/.*|B_real/kernel|B_imag/kernel|discretisation/.*"
    return ({"path": f".*/ssm/({names})", "learning_rate": learning_rate, "weight_decay": 0.0},)


TASKS: dict[str, dict[str, Any]] = {
    "digits_mlp": {
        "data": {"name": "digits", "batch_size": 64},
        "model": {"name": "mlp", "features": (128, 128)},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 2000},
    },
    "digits_cnn": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "cnn", "features": (32, 64), "hidden": 128},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 3000},
    },
    "digits_resnet": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "resnet", "depth": 8, "width": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 1500},
    },
    "digits_mobilenet": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "mobilenet", "width": 0.25, "blocks": (1, 2, 2), "last_features": 128, "reduction": 8},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 2000},
    },
    "digits_vit": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "vit", "patch": 2, "num_layers": 4, "width": 64, "num_heads": 4},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "train": {"steps": 2500},
    },
    "mnist_mlp": {
        "data": {"name": "mnist", "batch_size": 128},
        "model": {"name": "mlp", "features": (256, 128)},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"steps": 4680},
    },
    "mnist_cnn": {
        "data": {"name": "mnist", "batch_size": 128},
        "model": {"name": "cnn", "features": (16, 32), "hidden": 128},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"steps": 2340},
    },
    "cifar10_resnet20": {
        "data": {"name": "cifar10", "batch_size": 128, "augment": ("crop", "flip")},
        "model": {"name": "resnet", "depth": 20},
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "step",
            "boundaries_percent": (50, 75),
        },
        "train": {"steps": 64_000},
    },
    "cifar10_cnn": {
        "data": {"name": "cifar10", "batch_size": 128, "augment": ("crop", "flip")},
        "model": {"name": "cnn", "features": (32, 64, 128), "hidden": 128},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"steps": 15_600},
    },
    "cifar100_mobilenet": {
        "data": {"name": "cifar100", "batch_size": 128, "augment": ("crop", "flip")},
        "model": {"name": "mobilenet", "reduction": 8},
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.03,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "step",
            "boundaries_percent": (50, 75),
        },
        "train": {"steps": 64_000},
    },
    "sequential_digits_s5": {
        "data": {"name": "sequential_digits", "batch_size": 64},
        "model": {
            "name": "s5",
            "num_layers": 2,
            "width": 32,
            "state_size": 32,
            "bidirectional": True,
            "dropout": 0.1,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 4e-3,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "groups": _state_space(1e-3),
        },
        "train": {"steps": 1500},
    },
    "sequential_mnist_s5": {
        "data": {"name": "sequential_mnist", "batch_size": 50},
        "model": {"name": "s5", "num_layers": 4, "width": 96, "state_size": 128, "dropout": 0.1},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 8e-3,
            "weight_decay": 0.01,
            "groups": _state_space(2e-3),
            "warmup_epochs": 1.0,
        },
        "train": {"epochs": 150.0},
    },
    "sequential_cifar10_s5": {
        "data": {"name": "sequential_cifar10", "batch_size": 50},
        "model": {
            "name": "s5",
            "num_layers": 6,
            "width": 512,
            "state_size": 384,
            "blocks": 3,
            "bidirectional": True,
            "dropout": 0.1,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 4.5e-3,
            "weight_decay": 0.07,
            "groups": _state_space(1e-3),
            "warmup_epochs": 1.0,
        },
        "train": {"epochs": 250.0},
    },
    "cylinder_bell_funnel_lstm": {
        "data": {"name": "cylinder_bell_funnel", "batch_size": 64},
        "model": {"name": "lstm", "num_layers": 1, "width": 32},
        "optimizer": {"name": "adam", "learning_rate": 5e-3, "clip_norm": 1.0, "schedule": "cosine"},
        "train": {"steps": 500},
    },
    "cora_gcn": {
        "data": {"name": "cora", "batch_size": 1},
        "model": {"name": "gcn", "width": 16, "dropout": 0.5, "input_dropout": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 0.01, "weight_decay": 5e-4, "schedule": "constant"},
        "train": {"steps": 200},
    },
    "digits_gcn": {
        "data": {"name": "digits_graph", "batch_size": 1},
        "model": {"name": "gcn", "width": 16, "dropout": 0.5, "input_dropout": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 0.01, "weight_decay": 5e-4, "schedule": "constant"},
        "train": {"steps": 200},
    },
    "ogbn_arxiv_gcn": {
        "data": {"name": "ogbn_arxiv", "batch_size": 1},
        "model": {"name": "gcn", "num_layers": 3, "width": 512, "norm": "layer", "dropout": 0.2},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "final_factor": 0.1},
        "train": {"steps": 500},
    },
    "imagenette_resnet": {
        "data": {
            "name": "imagenette",
            "batch_size": 64,
            "image_shape": (128, 128, 3),
            "augment": ("resized_crop", "flip"),
            "crop_area": 0.35,
            "central_crop": 0.875,
            "in_memory": False,
            "workers": 8,
            "prefetch": 16,
        },
        "model": {"name": "imagenet_resnet", "depth": 18, "width": 0.5, "stem": "3x3"},
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.05,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "train": {"steps": 5880},
    },
    **{f"imagenet_resnet{depth}": _imagenet({"name": "imagenet_resnet", "depth": depth}) for depth in (18, 50)},
    "imagenet_vit": {
        "data": {**_imagenet({})["data"], "batch_size": 1024},
        "model": {
            "name": "vit",
            "patch": 16,
            "num_layers": 12,
            "width": 192,
            "num_heads": 3,
            "drop_path": 0.1,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_epochs": 5.0,
        },
        "train": {"epochs": 300.0},
    },
    "python_reference_lstm": {
        "data": {"name": "python_reference", "batch_size": 16, "length": 128},
        "model": {"name": "lstm", "num_layers": 1, "width": 256},
        "optimizer": {
            "name": "adam",
            "learning_rate": 4e-3,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "train": {"steps": 1500},
    },
    "text_lstm": {
        "data": {"name": "text", "batch_size": 20, "length": 35},
        "model": {"name": "lstm", "num_layers": 1, "width": 800, "dropout": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "clip_norm": 1.0, "schedule": "cosine"},
        "train": {"epochs": 40.0},
    },
    "lm1b_transformer": {
        "data": {"name": "lm1b", "batch_size": 256, "length": 512, "workers": 8, "prefetch": 16},
        "model": {
            "name": "transformer",
            "num_layers": 12,
            "width": 768,
            "num_heads": 12,
            "positions": "rotary",
            "norm": "rms",
            "mlp": "swiglu",
            "use_bias": False,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 6e-4,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_steps": 2000,
            "final_factor": 0.1,
        },
        "train": {"steps": 100_000},
    },
    "tiny_shakespeare_transformer": {
        "data": {"name": "tiny_shakespeare", "batch_size": 16, "length": 128},
        "model": {"name": "transformer", "num_layers": 4, "width": 128, "num_heads": 4, "dropout": 0.1},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "train": {"steps": 4000},
    },
}
"""Data, model and optimizer of each reference task; the method comes on top."""

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
    "rules": (),
    "backend": "qtrain",
}
"""The section ``quant`` unless a config says otherwise."""

# What `:smoke` makes of each model: seconds, not minutes.
_SMOKE_MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"features": (16, 16)},
    "cnn": {"features": (4, 8), "hidden": 16},
    "resnet": {"depth": 8, "width": 0.25},
    "imagenet_resnet": {"depth": 18, "width": 0.0625},
    "transformer": {"num_layers": 1, "width": 16, "num_heads": 2},
    "mobilenet": {"width": 0.1, "blocks": (1, 1), "last_features": 16},
    "vit": {"num_layers": 1, "width": 16, "num_heads": 2},
    "lstm": {"num_layers": 1, "width": 16},
    "s5": {"num_layers": 1, "width": 16, "state_size": 8, "blocks": 1},
    "gcn": {"width": 8},
    "graph_sage": {"width": 8},
}


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
                 ``rules``: mappings of `Rule`'s fields, tried before the recipe's, with residuals and execution of
                 their own; ``threshold``: the schedule of nested quantizers' λ; ``backend`` ("qtrain", or
                 "aqt": the AQT baseline at static bits)
    multi_precision  widths that are trained together, with the recipe of that name:
                 `qtrain.methods.multi_precision.from_config`; ``data.repeat``: steps that take the same batch
    schedule     `qtrain.schedules.precisions_from_config`; ``weights``, ``acts``, ``grads`` where they differ. The
                 values of "rounds" are the widths unless given
    optimizer    `qtrain.optim.optimizer`; ``groups``: parameters, by path, with a ``learning_rate`` or
                 ``weight_decay`` of their own; ``quant``: learned quantizer parameters; ``transition``: of the
                 optimizers sgdt, adamt and adamwt; ``oscillation``: ``track`` (as metrics), ``freeze``
    budget       what learned widths may cost: ``unit`` ("none", "bits", "bytes", "bitops"), ``target``, see
                 `qtrain.losses.budget.budget_from_config`
    losses       penalties added to the loss: ``<name>.rate`` and its ``schedule``, see `qtrain.losses`
    train        ``steps`` or ``epochs`` (the other 0), ``log_every_steps``, ``steps_per_dispatch``,
                 ``compilation_cache`` (a folder)
    eval         ``every_steps | every_epochs | every_percent`` (none: only at the end), ``batch_size``;
                 ``reestimate_batches``: norm statistics are re-estimated from so many training batches before it
    checkpoint   ``every_steps | every_epochs | every_percent``, ``keep``
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
            "final_factor": 0.0,
            "boundaries_percent": (50, 75),
            "decay_factor": 0.1,
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
        "train": {
            "steps": 0,
            "epochs": 0.0,
            "log_every_steps": 50,
            "steps_per_dispatch": 1,
            "compilation_cache": "",
        },
        "eval": {**every, "batch_size": 360, "reestimate_batches": 0},
        "checkpoint": {**every, "keep": 2},
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
        str: ("name", "profile", "pattern", "reflection", "cycle_length"),
        int: ("bits", "low", "high", "cycles", "start_bits", "end_bits", "inside", "outside"),
        float: ("rate", "beta", *durations),
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
    config.model.update(_SMOKE_MODELS[config.model.name])
    config.data.update(batch_size=min(8, config.data.batch_size), length=16)  # a graph is a batch of one
    config.train.update(steps=6, epochs=0.0, log_every_steps=2)
    config.eval.update(every_steps=3, every_epochs=0.0, every_percent=0.0, batch_size=32)
    config.checkpoint.update(every_steps=3, every_epochs=0.0, every_percent=0.0)
    # Lengths in steps or epochs were meant for the whole run.
    if config.optimizer.warmup_steps or config.optimizer.warmup_epochs:
        config.optimizer.update(warmup_steps=0, warmup_epochs=0.0, warmup_percent=20.0)
    config.eval.reestimate_batches = min(config.eval.reestimate_batches, 2)
    config.multi_precision.hasb.update(batches=1, draws=2)
    config.optimizer.accumulate_steps = min(config.optimizer.accumulate_steps, 2)
    config.train.steps_per_dispatch = min(config.train.steps_per_dispatch, 2)
    for part in (config.schedule, config.schedule.weights, config.schedule.acts, config.schedule.grads):
        if part.cycles is not None:
            part.cycles = min(part.cycles, 2)
