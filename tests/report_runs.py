"""Runs as the trainer leaves them, made up: what the tests of the report share."""

import json
import math
from pathlib import Path

CONFIG = {
    "seed": 0,
    "smoke": False,
    "init_from": "",
    "data": {"name": "digits", "seed": 0, "dir": "", "workers": 1},
    "model": {"name": "mlp", "features": [32, 32]},
    "quant": {"recipe": "default", "weights": "symmetric/channel", "ends": 8, "rules": []},
    "optimizer": {"name": "adam", "learning_rate": 0.002},
    "schedule": {
        **dict.fromkeys(("name", "bits", "low", "high", "cycles", "profile", "pattern", "reflection")),
        "weights": {"name": None, "bits": None},
        "acts": {"name": None, "bits": None},
        "grads": {"name": "constant", "bits": 8},
    },
    "train": {"steps": 100, "log_every_steps": 10, "compilation_cache": ""},
    "eval": {"every_percent": 25.0, "batch_size": 360, "reestimate_batches": 0},
    "checkpoint": {"keep": 2},
}
STATIC = {"schedule.name": "constant"}
CYCLIC = {"schedule.low": 3, "schedule.high": 8, "schedule.cycles": 2}


def configured(overrides):
    """`CONFIG` with dotted overrides."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


def write_run(
    folder, overrides=(), *, accuracy=0.9, bitops=1e9, stored=1000, finished=True, rows=10, layers=(), **summary
):
    """A run with `rows` lines of training and one of evaluation; `summary` replaces and adds to its numbers."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    overrides = dict(overrides)
    found = {"program": "qtrain", "config": configured(overrides), "choices": {}}
    (folder / "config.json").write_text(json.dumps(found))
    bits = overrides.get("schedule.bits", 6)
    lines = [
        {
            "step": 10 * row,
            "kind": "train",
            "loss": 2 * math.exp(-row / 5),
            "grad_norm": None,
            "bits_weights": bits,
            "bits_acts": bits,
            "bits_grads": 8.0,
            "effective_bitops": bitops * row / 10,
            **dict(layers),
        }
        for row in range(1, rows + 1)
    ]
    numbers = {"test_accuracy": accuracy, "test_loss": 0.5, "test_accuracy_scheduled": accuracy}
    numbers |= {name: value for name, value in summary.items() if name.startswith("test_")}
    lines.append({"step": 10 * rows, "kind": "eval", **numbers, "effective_bitops": bitops * rows / 10})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        final = {"steps": 100, "train_loss": 0.3, **numbers, "effective_bitops": bitops, "saving": 0.2}
        final |= {"stored_bytes": stored, "wall_seconds": 1.5, "parameters": 9} | summary
        final = {name: value for name, value in final.items() if value is not None}
        (folder / "summary.json").write_text(json.dumps(final))
        (folder / "DONE").touch()
    return folder


def write_sweep(folder, seeds=(0, 1, 2)):
    """Static widths 3, 4, 6 and 8, and the schedules CR and RR, at several seeds; returns accuracy by (name, seed)."""
    found = {}
    for seed in seeds:
        seeded = {"seed": seed, "data.seed": seed}
        for bits, accuracy in ((3, 0.80), (4, 0.86), (6, 0.90), (8, 0.91)):
            found[f"{bits} bits", seed] = value = accuracy + 0.004 * ((seed * 7 + bits) % 3)
            overrides = {**STATIC, "schedule.bits": bits, **seeded}
            write_run(
                folder / f"static{bits}" / f"{seed}", overrides, accuracy=value, bitops=1e9 * bits, stored=1000 * bits
            )
        for name, accuracy, cost in (("CR", 0.905, 6.4e9), ("RR", 0.885, 4.6e9)):
            found[f"{name} 3–8", seed] = value = accuracy + 0.003 * ((seed * 5 + len(found)) % 3)
            overrides = {"schedule.name": name, **CYCLIC, **seeded}
            write_run(folder / name / f"{seed}", overrides, accuracy=value, bitops=cost, stored=8000)
    return found
