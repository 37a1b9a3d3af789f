"""The commands that take a config."""

from __future__ import annotations

import os
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from qtrain.errors import UsageError, did_you_mean


def train(arguments: list[str]) -> int:
    """``qtrain train --config FILE --workdir FOLDER [--profile] [--quiet] [--config.KEY=VALUE ...]``."""
    values = _flag_values()
    flags.DEFINE_string("workdir", None, "Folder of the run; an unfinished run there is resumed.", flag_values=values)
    flags.DEFINE_bool("profile", False, "Write a profiler trace of ten steps to WORKDIR/profile.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No plan and no progress, only the summary.", flag_values=values)
    if not _parse("train", values, arguments):
        return 0
    config = _config(values, "train")
    if not values.workdir:
        raise UsageError("--workdir is missing; give the folder of the run, such as --workdir runs/digits")
    if os.path.exists(values.workdir) and not os.path.isdir(values.workdir):
        raise UsageError(f"--workdir {values.workdir!r} is a file; give a folder")

    from qtrain import main
    from qtrain.train import Diverged, Preempted, print_summary
    from qtrain.train import train as run

    try:
        print_summary(run(config, values.workdir, quiet=values.quiet, profile=values.profile))
    except Diverged as error:
        print(f"qtrain: {error}", file=sys.stderr)
        return main.DIVERGED
    except Preempted as stop:
        print(f"qtrain: {stop}", file=sys.stderr)
        return main.PREEMPTED
    return 0


def plan(arguments: list[str]) -> int:
    """``qtrain plan --config FILE [--json] [--config.KEY=VALUE ...]``."""
    values = _flag_values()
    flags.DEFINE_bool("json", False, "Print the rows as JSON instead of a table.", flag_values=values)
    if not _parse("plan", values, arguments):
        return 0
    config = _config(values, "plan")

    from qtrain.experiment import build
    from qtrain.train import describe

    experiment = build(config)
    if values.json:
        print(experiment.plan.dumps())
        return 0
    print(describe(experiment), end="")
    costs = experiment.cost_summary()
    print(f"weights at q_max: {costs['weight_bytes']:,.0f} bytes with their scales")
    return 0


def _flag_values() -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with :smoke behind it for its small form.", flag_values=values
    )
    return values


def _parse(command: str, values: flags.FlagValues, arguments: list[str]) -> bool:
    """Parse; False when help was asked for and given."""
    if any(argument in ("-h", "--help", "-help", "--helpfull") for argument in arguments):
        print(f"usage: qtrain {command} --config FILE [flags] [--config.KEY=VALUE ...]\n{values.get_help()}")
        return False
    path = _config_path(arguments)
    if path is not None and not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = os.listdir(folder) if os.path.isdir(folder) else []
        raise UsageError(f"--config {path!r}: no such file{did_you_mean(os.path.basename(path), near)}")
    try:
        rest = values([command, *arguments])
    except UsageError:
        raise
    # Whatever a config file raises while it is being read, or a value that does not fit, is the user's to mend.
    except Exception as error:
        raise UsageError(f"{command}: {_first_line(error)}") from None
    if len(rest) > 1:
        raise UsageError(f"{command}: {rest[1]!r} is not a flag; overrides are --config.KEY=VALUE")
    return True


def _config_path(arguments: list[str]) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        for name in ("--config", "-config"):
            if argument == name:
                return following.split(":")[0]
            if argument.startswith(f"{name}="):
                return argument[len(name) + 1 :].split(":")[0]
    return None


def _config(values: flags.FlagValues, command: str) -> ConfigDict:
    if values.config is None:
        raise UsageError(f"--config is missing; give a config file: qtrain {command} --config configs/digits_cnn_cpt.py")
    return values.config


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:400]
