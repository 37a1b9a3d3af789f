"""Flags of the commands that are not configs: argparse with this program's errors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from qtrain.errors import UsageError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing and leaving the process; `example` ends its messages and its help."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(prog=prog, description=description, epilog=example, allow_abbrev=False)
        self._example = example

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
          UsageError: always.
        """
        raise UsageError(f"{self.prog}: {message}; {self._example}")

    def flags(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """The values of the flags in `argv`; None after ``--help``.

        Raises:
          UsageError: an unknown flag, a missing one, or a value of the wrong type.
        """
        try:
            found, unknown = self.parse_known_args(argv)
        except SystemExit:  # after --help
            return None
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option[:2] == "--"]
            near = did_you_mean(unknown[0].split("=")[0], known)
            raise UsageError(f"{self.prog}: {unknown[0]}: no such flag; there are {', '.join(known)}.{near}")
        return found
