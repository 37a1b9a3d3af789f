"""The folder of a run: whose it is, what it was started with, how it ended."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from qtrain.errors import UsageError

CONFIG, SUMMARY, DONE = "config.json", "summary.json", "DONE"
SWEEP, ERRORS = "sweep.json", "errors.json"
"""Of the folder of a sweep, which has runs in it: its points, and the errors of those that failed."""
PACKAGES = ("qtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
LAYOUT = "mesh"
"""The section of a config that says how arrays lie on devices, with which a run may be resumed otherwise."""
_SHOWN_DIFFERENCES = 6
_SHOWN_CHARACTERS = 60


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, all or nothing (see `replace_file`).

    NaN and the infinities are written as Python's ``json`` writes them and read back equal. `TypeError` if `value` is
    not JSON; nothing is written then.
    """
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Make `content` the file `path`, so that a reader, or a kill at any time, finds the old file or the new one.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and are renamed over `path`. On an
    `OSError` the old file is untouched.
    """
    path = Path(path)
    # The name is unique per process, not per call, so that kills leave at most one leftover per name and process.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames and removals inside `folder` survive a power cut, on file systems that can."""
    with contextlib.suppress(OSError):  # some network file systems refuse to open or sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The installed versions of the packages that decide a run's numbers; those not installed are left out."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def prepare(
    workdir: str | os.PathLike[str], config: Mapping[str, Any], versions: Mapping[str, str]
) -> Literal["new", "resume", "done"]:
    """Make `workdir` this run's folder, or recognise it as such, and say which.

    A new folder gets ``config.json``: the resolved config, `versions` (see `package_versions`), Python, the number of
    CPU cores, and JAX's backend, device kind and device count. A folder that holds the same config is resumed, or done
    if the run ended; other versions, devices or another section ``mesh`` there are a warning on stderr, since they may
    cost bit-identity but not correctness.

    Args:
      workdir: the folder; it and its parents are created.
      config: nested dicts, lists, strings, numbers, booleans and None; tuples count as lists.
      versions: package name to version.

    Returns:
      ``"new"``, ``"resume"`` (the run was started and not finished) or ``"done"``.

    Raises:
      UsageError: `config` is not JSON; `workdir` is a file, cannot be created or written, holds something that is
        not a run, or holds a run with another config (the differing keys are listed). No file has been written.

    >>> prepare(tempfile.mkdtemp(), {"train": {"steps": 100}}, {})
    'new'
    """
    folder = Path(workdir)
    mine = _as_json(config)
    environment = {"versions": dict(versions), **_environment()}
    with _explained(folder):
        if not str(workdir) or (folder.exists() and not folder.is_dir()):
            raise UsageError(f"workdir: {str(workdir)!r} is not a folder; name one that is new or holds this run")
        entries = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        if CONFIG not in entries:
            unrelated = sorted(name for name in entries if not name.startswith(f".{CONFIG}."))
            if unrelated:
                raise UsageError(
                    f"workdir: {str(folder)!r} is not a qtrain run: it holds {unrelated[0]!r} and no {CONFIG}; "
                    "choose a new or an empty folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / CONFIG, {"program": "qtrain", "config": mine, **environment, "choices": {}})
            return "new"

        stored = _same_run(folder, mine)
        if (folder / DONE).exists():
            return "done"
        with tempfile.TemporaryFile(dir=folder):  # access(2) is true for root on what it cannot write
            pass
    before = {key: value for key, value in stored.items() if key in environment}
    layouts = ({LAYOUT: config.get(LAYOUT, {})} for config in (stored["config"], mine))
    if changes := [*_differences(before, environment), *_differences(*layouts)]:
        print(
            f"warning: {folder}: resumed in another environment (then != now): {'; '.join(changes)}; "
            "the result may differ in the last bits",
            file=sys.stderr,
        )
    return "resume"


def ended(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> bool:
    """Whether `workdir` holds this run, and it has finished; `UsageError` if what has finished there is another."""
    folder = Path(workdir)
    if not (folder / DONE).exists():
        return False
    _same_run(folder, _as_json(config))
    return True


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The resolved config of the run in `workdir`; `UsageError` if there is none."""
    return _read_run(Path(workdir))["config"]


def record(workdir: str | os.PathLike[str], key: str, value: Any) -> None:
    """Add a choice the program made (a backend, an execution mode) to ``config.json``, to be used again on resume.

    Choices take no part in the comparison of `prepare`. `value` is JSON; recording a key again replaces it.
    """
    folder = Path(workdir)
    stored = _read_run(folder)
    stored["choices"] = {**stored.get("choices", {}), key: value}
    with _explained(folder):
        write_json(folder / CONFIG, stored)


def recorded(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The choices that `record` wrote, by key."""
    return _read_run(Path(workdir)).get("choices", {})


def finish(workdir: str | os.PathLike[str], summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, then ``DONE``: whoever sees ``DONE`` can read the summary."""
    folder = Path(workdir)
    with _explained(folder):
        write_json(folder / SUMMARY, dict(summary))
        (folder / DONE).touch()
        sync_folder(folder)


def read_summary(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The summary of the finished run in `workdir`; `UsageError` if it has not finished."""
    folder = Path(workdir)
    _read_run(folder)
    if not (folder / DONE).exists():
        raise UsageError(
            f"workdir: the run in {str(folder)!r} has not finished (no {DONE}); start it again to resume it"
        )
    return _read_json(folder / SUMMARY)


def _environment() -> dict[str, Any]:
    import jax  # here, so that reading a run's files does not start a backend

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals into one line that names the workdir."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        where = getattr(error, "filename", None)
        nearby = f" ({where})" if where and Path(where) != folder else ""
        raise UsageError(
            f"workdir: {str(folder)!r} cannot be created or written: {reason}{nearby}; choose another folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    with _explained(path.parent):
        text = path.read_bytes()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"workdir: {str(path)!r} is damaged ({error}); put the file back or start anew") from error
    if not isinstance(value, dict):
        raise UsageError(f"workdir: {str(path)!r} is damaged (no JSON object); put the file back or start anew")
    return value


def _read_run(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise UsageError(f"workdir: {str(folder)!r} is not a qtrain run (no {CONFIG}); name the folder of a run")
    stored = _read_json(folder / CONFIG)
    if stored.get("program") != "qtrain" or not isinstance(stored.get("config"), dict):
        raise UsageError(f"workdir: {str(folder)!r} is not a qtrain run: its {CONFIG} was written by something else")
    return stored


def _same_run(folder: Path, mine: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of the run in `folder`; `UsageError` if it is of another config."""
    stored = _read_run(folder)
    if differences := list(_differences(_without_layout(stored["config"]), _without_layout(mine))):
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        raise UsageError(
            f"workdir: {str(folder)!r} holds another run (theirs != yours): {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + "; choose another workdir, or the config that started this run"
        )
    return stored


def _without_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != LAYOUT}


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError):
        for key, value in leaves(config):
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                message = (
                    f"config: {key} is a {type(value).__name__}; use a string, a number, a boolean, a list or None"
                )
                raise UsageError(message) from None
        raise


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; a list of plain values is one leaf, a list of dicts (rules) is descended."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        items = enumerate(value)
    if items is None:
        yield prefix, value
        return
    for key, item in items:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _differences(theirs: Mapping[str, Any], yours: Mapping[str, Any]) -> Iterator[str]:
    """``key: theirs != yours`` for every leaf that differs, in the order of the newer config."""
    left, right = dict(leaves(theirs)), dict(leaves(yours))
    for key in [*right, *(key for key in left if key not in right)]:
        # Compared as text: NaN equals itself, and 1 differs from True. 8 and 8.0 are the same number of bits.
        pair = [left.get(key, ...), right.get(key, ...)]
        texts = ["absent" if value is ... else json.dumps(value) for value in pair]
        same_number = all(type(value) in (int, float) for value in pair) and pair[0] == pair[1]
        if texts[0] != texts[1] and not same_number:
            shown = [
                text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..." for text in texts
            ]
            yield f"{key}: {shown[0]} != {shown[1]}"
