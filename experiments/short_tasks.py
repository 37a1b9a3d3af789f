"""The reference tasks of the studies, shortened so that hundreds of runs fit two CPU cores; configs run this file.

Each is far from saturated at the end, and its test set or its loss large enough, that bits can be told apart. Evaluated
at the end alone.
"""

from __future__ import annotations

from typing import Any

from qtrain.config import base_config

SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mnist_mlp", {"train.steps": 600}),
    "cnn": ("mnist_cnn", {"model.features": (4, 8), "model.hidden": 32, "train.steps": 400}),
    "resnet": ("digits_resnet", {"train.steps": 300}),
    "mobilenet": ("digits_mobilenet", {"train.steps": 200}),
    "transformer": (
        "tiny_shakespeare_transformer",
        {"model.num_layers": 2, "model.width": 64, "model.num_heads": 2, "data.length": 64, "train.steps": 500},
    ),
    "s5": ("sequential_digits_s5", {"train.steps": 200}),
    "gcn": ("cora_gcn", {"train.steps": 100}),
}


def short(family: str) -> Any:
    """The config of a family, unlocked, without a schedule."""
    task, values = SHORT[family]
    config = base_config(task)
    for key, value in values.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    config.quant.recipe = "cpt"  # the paper's quantizers: every layer but the last follows the schedule
    config.train.log_every_steps = 50
    config.eval.update(every_percent=0.0)
    config.checkpoint.update(every_percent=50.0, keep=1)
    return config
