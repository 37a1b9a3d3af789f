"""What the tests of sweeps share: config files with a `sweep()`, and the command."""

from qtrain import main
from qtrain.sweep.expand import resolved

FILE = """
from program import small_config

def get_config(argument=""):
    return small_config({arguments})

def sweep():
    return {points}
"""
POINTS = [
    {"schedule.name": "CR", "seed": 0},
    {"schedule.name": "constant", "schedule.bits": 6, "seed": 1, "optimizer.learning_rate": 0.01},
    {"schedule.name": "RTH", "seed": 2, "optimizer.schedule": "linear", "optimizer.warmup_percent": 20.0},
]


def write(folder, points, name="config.py", **arguments):
    path = folder / name
    path.write_text(FILE.format(points=points, arguments=", ".join(f"{k}={v!r}" for k, v in arguments.items())))
    return str(path)


def run(source, folder, *arguments):
    return main.main(["sweep", "--config", source, "--workdir", str(folder), "--quiet", *arguments])


def points_of(source, *arguments):
    return resolved(["--config", source, *arguments])[2]
