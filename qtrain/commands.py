"""The commands that take a config."""

from __future__ import annotations

import os

from absl import flags

from qtrain import overrides
from qtrain.errors import UsageError


def train(arguments: list[str]) -> int:
    """``qtrain train --config FILE --workdir FOLDER [--profile] [--quiet] [--config.KEY=VALUE ...]``.

    With ``--coordinator HOST:PORT --processes N --process I``, or ``--distributed``, as one of several processes.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run; an unfinished run there is resumed.", flag_values=values)
    flags.DEFINE_bool("profile", False, "Write a profiler trace of ten steps to WORKDIR/profile.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No plan and no progress, only the summary.", flag_values=values)
    flags.DEFINE_bool(
        "distributed", False, "One of several processes, as Slurm or a TPU pod has it.", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 of several listens.", flag_values=values)
    flags.DEFINE_integer("processes", None, "How many processes train together.", flag_values=values)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", flag_values=values)
    if _helped("train", values, arguments):
        return 0
    config = overrides.parse("train", values, arguments)
    if not values.workdir:
        raise UsageError("--workdir is missing; give the folder of the run, such as --workdir runs/digits")
    if os.path.exists(values.workdir) and not os.path.isdir(values.workdir):
        raise UsageError(f"--workdir {values.workdir!r} is a file; give a folder")

    from qtrain import processes
    from qtrain.train import print_summary
    from qtrain.train import train as run

    processes.initialize(values.coordinator, values.processes, values.process, detect=values.distributed)
    summary = run(config, values.workdir, quiet=values.quiet, profile=values.profile)
    if processes.first():
        print_summary(summary)
    return 0


def plan(arguments: list[str]) -> int:
    """``qtrain plan --config FILE [--json] [--config.KEY=VALUE ...]``."""
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print the rows as JSON instead of a table.", flag_values=values)
    if _helped("plan", values, arguments):
        return 0
    config = overrides.parse("plan", values, arguments)

    from qtrain.build import build
    from qtrain.experiment import describe

    experiment = build(config)
    if values.json:
        print(experiment.plan.dumps())
        return 0
    print(describe(experiment), end="")
    costs = experiment.cost_summary()
    print(f"weights at q_max: {costs['weight_bytes']:,.0f} bytes with their scales")
    return 0


def _helped(command: str, values: flags.FlagValues, arguments: list[str]) -> bool:
    """Whether help was asked for; it is then given."""
    if not any(argument in ("-h", "--help", "-help", "--helpfull") for argument in arguments):
        return False
    flags.DEFINE_string("config", None, "Config file; FILE:smoke is its small form.", flag_values=values)
    print(f"usage: qtrain {command} --config FILE [flags] [--config.KEY=VALUE ...]\n{values.get_help()}")
    return True
