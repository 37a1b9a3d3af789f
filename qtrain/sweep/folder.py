"""The folder of a sweep: which points it has, what was chosen for them, and the errors of those that failed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qtrain import workdir
from qtrain.errors import UsageError, one_line
from qtrain.sweep.expand import Point
from qtrain.workdir import ERRORS, SWEEP, write_json

LOGS = "logs"
_PROGRAM = "qtrain sweep"


class Folder:
    """A folder with a run for each point, ``sweep.json`` and ``errors.json``.

    Args:
      path: created if need be.
      source: the config file, as given.
      base: the config before the points change it.
      points: all points of the sweep.

    Raises:
      UsageError: the folder holds another sweep, or something else, or cannot be written.
    """

    def __init__(self, path: str, source: str, base: ConfigDict, points: Sequence[Point]):
        self.path = Path(path)
        self._finished: set[int] = set()
        mine = {
            "program": _PROGRAM,
            "source": source,
            "base": json.loads(json.dumps(base.to_dict())),
            "points": [{"index": p.index, "name": p.name, "overrides": _plain(p.overrides)} for p in points],
        }
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--workdir {path!r} is a file; give a folder")
        stored = self._read(SWEEP)
        if stored is not None and not self._begun(stored):
            stored = None  # of a sweep that was refused, or stopped before its first run
        if stored is None:
            names = {LOGS, SWEEP, ERRORS, *(point.name for point in points)}
            entries = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
            strange = [name for name in entries if name not in names and not name.startswith(".")]
            if strange:
                raise UsageError(
                    f"--workdir {path!r} holds {strange[0]!r} and no {SWEEP}; give a new or an empty folder"
                )
            recorded = self._read(ERRORS) or {}
            kept = {name: entry for name, entry in recorded.items() if name in names}
            if kept != recorded:  # of a sweep that never began
                self._write(ERRORS, kept)
        else:
            self._check(stored, mine)
        current = {**mine, "choices": (stored or {}).get("choices", {})}
        if current != stored:
            self._write(SWEEP, current)

    def run(self, point: Point) -> Path:
        """The folder of a point's run."""
        return self.path / point.name

    def finished(self, point: Point) -> bool:
        """Whether its run has ended; `UsageError` if its folder has another one that has."""
        if point.index not in self._finished and workdir.ended(self.run(point), point.config.to_dict()):
            self._finished.add(point.index)
        return point.index in self._finished

    def choice(self, key: str) -> Any:
        """What `choose` recorded, or None."""
        return (self._read(SWEEP) or {}).get("choices", {}).get(key)

    def choose(self, key: str, value: Any) -> None:
        """Record what was chosen, for the next start of the sweep."""
        with self._alone():
            stored = self._read(SWEEP) or {}
            self._write(SWEEP, {**stored, "choices": {**stored.get("choices", {}), key: value}})

    def failed(self, point: Point, error: Exception) -> str:
        """Record that a point failed, and why: the message, in a line."""
        kind = getattr(error, "kind", type(error).__name__)
        message = one_line(error) or kind
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"index": point.index, "overrides": _plain(point.overrides), "kind": kind, "error": message, "at": at}
        with self._alone():
            self._write(ERRORS, {**(self._read(ERRORS) or {}), point.name: entry})
        return message

    def succeeded(self, point: Point) -> None:
        """Forget what an earlier start recorded against it."""
        with self._alone():
            errors = self._read(ERRORS) or {}
            if errors.pop(point.name, None) is not None:
                self._write(ERRORS, errors)

    def _begun(self, stored: dict[str, Any]) -> bool:
        """Whether a point of a manifest has a run; True of what is none."""
        if stored.get("program") != _PROGRAM:
            return True
        return any((self.path / point["name"]).exists() for point in stored["points"])

    def _check(self, stored: dict[str, Any], mine: dict[str, Any]) -> None:
        """Refuse another sweep; more points behind those that were there are the same sweep, continued."""
        other = f"--workdir {str(self.path)!r} holds another sweep"
        if stored.get("program") != mine["program"]:
            raise UsageError(f"{other}: its {SWEEP} was written by something else; give a new folder")
        for left, right in zip(stored["points"], [*mine["points"], *[None] * len(stored["points"])], strict=False):
            if right is None or left != right:
                now = "there is none now" if right is None else f"{right['name']} {right['overrides']}"
                raise UsageError(f"{other}: its point {left['name']} {left['overrides']}, now {now}; give a new folder")
        for key in sorted({*stored["base"], *mine["base"]} - {"mesh"}):
            then, now = stored["base"].get(key), mine["base"].get(key)
            if then != now:
                raise UsageError(f"{other}: its config has {key}={then!r:.80}, now {now!r:.80}; give a new folder")

    def _read(self, name: str) -> dict[str, Any] | None:
        return _read(self.path / name)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / name, value)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UsageError(f"--workdir {str(self.path)!r} cannot be written: {reason}; give another folder") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The points of a sweep may be processes of their own, on several machines: one at a time writes."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with open(self.path / ".lock", "a") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def as_begun(points: Sequence[Point], path: str) -> list[Point]:
    """The points with the names that they have in the folder: one that is added may make longer names necessary.

    Raises:
      UsageError: the folder's manifest cannot be read.
    """
    stored = _read(Path(path) / SWEEP) or {}
    entries = stored["points"] if stored.get("program") == _PROGRAM else []
    names = {p.index: e["name"] for e, p in zip(entries, points, strict=False) if e["overrides"] == _plain(p.overrides)}
    return [dataclasses.replace(point, name=names.get(point.index, point.name)) for point in points]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({error}); put it back, or remove it") from None
    if not isinstance(value, dict):
        raise UsageError(f"{str(path)!r} is damaged (no JSON object); put it back, or remove it")
    return value


def _plain(overrides: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(overrides, default=str))
