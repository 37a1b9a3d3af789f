"""``qtrain range-test``: the bounds of a precision schedule, from a short run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from qtrain import overrides
from qtrain.errors import UsageError

JSON, PICTURE = "range_test.json", "range_test.png"


def run(arguments: list[str]) -> int:
    """``qtrain range-test --config FILE --workdir FOLDER [--steps N] [--threshold T] [--config.KEY=VALUE ...]``.

    Prints a table and the bounds, and writes them to ``FOLDER/range_test.json`` and a picture to ``range_test.png``.

    Raises:
      UsageError: for a wrong flag or value, before anything is compiled.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the test's run; an unfinished one is resumed.", flag_values=values)
    flags.DEFINE_integer("first", 2, "Bits to begin at.", flag_values=values)
    flags.DEFINE_integer("last", None, "Bits to end at (default: the config's highest).", flag_values=values)
    flags.DEFINE_integer("steps", 100, "Steps at each width.", flag_values=values)
    flags.DEFINE_integer("average", 20, "Steps that an accuracy is averaged over.", flag_values=values)
    flags.DEFINE_float("threshold", 0.05, "What the training accuracy has to gain.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No plan and no progress, only the result.", flag_values=values)
    if any(argument in ("-h", "--help", "-help", "--helpfull") for argument in arguments):
        flags.DEFINE_string("config", None, "Config file; FILE:smoke is its small form.", flag_values=values)
        print(f"usage: qtrain range-test --config FILE --workdir FOLDER [flags]\n{values.get_help()}")
        return 0
    config = overrides.parse("range-test", values, arguments)
    if not values.workdir:
        raise UsageError("--workdir is missing; give a folder for the test's run, such as --workdir runs/range")
    if os.path.exists(values.workdir) and not os.path.isdir(values.workdir):
        raise UsageError(f"--workdir {values.workdir!r} is a file; give a folder")

    from qtrain.range_test.picture import draw
    from qtrain.range_test.run import range_test
    from qtrain.workdir import replace_file, write_json
    from qtrain.writers import read_metrics

    asked: dict[str, Any] = {
        name: values[name].value for name in ("first", "last", "steps", "average", "threshold", "quiet")
    }
    found = range_test(config, values.workdir, **asked)
    folder = Path(values.workdir)
    picture = draw(found, read_metrics(folder, "train"))
    write_json(folder / JSON, found)
    replace_file(folder / PICTURE, picture)
    print(table(found))
    print(f"\nwritten: {folder / JSON}, {folder / PICTURE}")
    return 0


def table(found: Mapping[str, Any]) -> str:
    """What `range_test` returned, for people."""
    first, *after = found["accuracy"]
    lines = [f"{'bits':>4}  {'training accuracy':>17}  {'gain':>7}", f"{'':>4}  {first:>17.3f}  {'':>7}  (at first)"]
    for width, accuracy, gain in zip(found["widths"], after, found["gain"], strict=True):
        mark = "  <- the first above the threshold" if width == found["low"] else ""
        lines.append(f"{width:>4}  {accuracy:>17.3f}  {gain:>+7.3f}{mark}")
    lines.append("")
    if found["low"] is None:
        lines.append(
            f"no width gains more than {found['threshold']:g}: give more --steps at each, or a lower --threshold"
        )
    else:
        lines.append(f"--config.schedule.low={found['low']} --config.schedule.high={found['high']}")
    return "\n".join(lines)
