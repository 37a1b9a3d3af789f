"""The exception a user's mistake raises, and the help its message carries; how else a run may end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake in what the user asked for: a config value, a rule, a path.

    The message is one line: the key, the value, what is allowed, the nearest name, what to do. The command line prints
    it without a traceback and exits with 2; as a library it is an ordinary ``ValueError``.
    """


class Diverged(Exception):
    """The loss or its gradient is not finite."""


class Preempted(Exception):
    """SIGTERM, to any of the processes: the state was saved, the run can be resumed."""


def one_line(error: Exception) -> str:
    """The message of an error, which may have many lines, in one."""
    return " ".join(str(error).split())


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of `choices`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
