"""The command line: a subcommand, then its flags. Everything heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from qtrain.errors import Diverged, Preempted, UsageError, did_you_mean

USAGE_ERROR, DIVERGED, PREEMPTED, INTERRUPTED = 2, 1, 75, 130
"""Exit codes: a mistake in what was asked; a loss that is not finite; stopped by SIGTERM, to be resumed; by Ctrl-C."""

HELP = """qtrain: what precision should each tensor have at each step of training?

usage: qtrain COMMAND [flags]

  train      train a config: qtrain train --config configs/digits_cnn_cpt.py --workdir runs/digits
  sweep      every point of a config's sweep(): qtrain sweep --config configs/digits_cnn_suite.py --workdir runs/suite
  plan       what a config quantizes, how, and at what cost; trains nothing
  range-test the lowest width that trains: qtrain range-test --config configs/digits_cnn_cpt.py --workdir runs/range
  search     a width for each layer of a run, under a budget: qtrain search --workdir runs/digits --budget bits=3
  export     a run's weights as packed integers in one file: qtrain export --workdir runs/digits --out model.safetensors
  plan-budget  when to switch quantization on, at what width: qtrain plan-budget --params 1e8 --tokens 2e9 --memory 50MB
  fit        the laws of plan-budget from your own runs: qtrain fit runs/qat --out law.json
  report     a page on runs and sweeps, from their metrics files: qtrain report runs/suite --out report
  schedules  the ten cyclic precision schedules as a table and a picture
  bench      what quantized train steps cost: float32, bfloat16, qtrain, AQT and Qwix, measured in turn

qtrain COMMAND --help lists a command's flags. A config's values are overridden as --config.train.steps=500; its `smoke`
form (a few steps on generated data) is --config configs/digits_cnn_cpt.py:smoke.
Exit codes: 0 done, 2 a mistake in the command or config, 1 the loss diverged, 75 stopped by SIGTERM (start the same
command again to resume), 130 by Ctrl-C (likewise, from the last checkpoint).
"""


def _train(arguments: list[str]) -> int:
    from qtrain.commands import train

    return train(arguments)


def _sweep(arguments: list[str]) -> int:
    from qtrain.sweep.command import run

    return run(arguments)


def _plan(arguments: list[str]) -> int:
    from qtrain.commands import plan

    return plan(arguments)


def _range_test(arguments: list[str]) -> int:
    from qtrain.range_test.command import run

    return run(arguments)


def _schedules(arguments: list[str]) -> int:
    from qtrain.schedules.command import run

    return run(arguments)


def _export(arguments: list[str]) -> int:
    from qtrain.export.command import run

    return run(arguments)


def _search(arguments: list[str]) -> int:
    from qtrain.search.command import run

    return run(arguments)


def _report(arguments: list[str]) -> int:
    from qtrain.report.command import run

    return run(arguments)


def _plan_budget(arguments: list[str]) -> int:
    from qtrain.planner.command import run

    return run(arguments)


def _fit(arguments: list[str]) -> int:
    from qtrain.planner.fit_command import run

    return run(arguments)


def _bench(arguments: list[str]) -> int:
    from qtrain.bench.command import run

    return run(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "sweep": _sweep,
    "plan": _plan,
    "range-test": _range_test,
    "search": _search,
    "export": _export,
    "plan-budget": _plan_budget,
    "fit": _fit,
    "report": _report,
    "schedules": _schedules,
    "bench": _bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "--helpfull", "help"):
        print(HELP, end="")
        return 0 if arguments else USAGE_ERROR
    if arguments[0] in ("--version", "version"):
        from qtrain import __version__

        print(f"qtrain {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            near = did_you_mean(name, COMMANDS)
            raise UsageError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}.{near}")
        return COMMANDS[name](rest)
    except UsageError as error:
        print(f"qtrain: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except (Diverged, Preempted) as end:
        print(f"qtrain: {end}", file=sys.stderr)
        return DIVERGED if isinstance(end, Diverged) else PREEMPTED
    except KeyboardInterrupt:
        print(f"qtrain: {name} interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
