"""What a checkpoint says about itself: its leaves by name, and a checksum of every file."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qtrain.workdir import sync_folder, write_json

MANIFEST = "manifest.json"
_CHUNK = 1 << 20

Leaves = dict[str, tuple[tuple[int, ...], str]]


class Damaged(Exception):
    """A checkpoint folder is not what was written; the message is the reason, in a few words."""


class Manifest(NamedTuple):
    """The content of ``manifest.json``.

    `step`, `metadata` and `metrics` are what the checkpoint was saved with; `leaves` maps a leaf's name to its shape
    and dtype; `files` maps a file's path in the folder to its size in bytes and its CRC-32.
    """

    step: int
    metadata: dict[str, Any]
    metrics: dict[str, float]
    leaves: Leaves
    files: dict[str, tuple[int, int]]


def seal(
    folder: Path, *, step: int, metadata: Mapping[str, Any], metrics: Mapping[str, float], leaves: Leaves
) -> Manifest:
    """Put every file of `folder` on the disk and write the manifest that lists them.

    Orbax stores arrays without a checksum: a flipped byte in its data file loads as another number, without a word.
    CRC-32 finds any such accident (it is no defence against intent) and costs less than reading the file.
    """
    files = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            with open(path, "rb") as file:
                files[path.relative_to(folder).as_posix()] = _size_and_checksum(file)
                os.fsync(file.fileno())
        sync_folder(parent)
    manifest = Manifest(step, dict(metadata), dict(metrics), leaves, files)
    content = manifest._asdict()
    write_json(folder / MANIFEST, {"crc32": _checksum(content), "content": content})
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; `Damaged` if it is missing or not as written. Looks at no other file."""
    try:
        stored = json.loads((folder / MANIFEST).read_bytes())
        content = stored["content"]
        if stored["crc32"] != _checksum(content):
            raise Damaged(f"{MANIFEST}: its checksum differs")
        leaves = {name: (tuple(shape), dtype) for name, (shape, dtype) in content["leaves"].items()}
        files = {name: (size, crc) for name, (size, crc) in content["files"].items()}
        return Manifest(**{**content, "leaves": leaves, "files": files})
    except OSError as error:
        missing = "missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        raise Damaged(f"{MANIFEST}: {missing}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{MANIFEST}: not readable as JSON") from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest; `Damaged` names the first that is missing or differs."""
    for name, (size, crc) in manifest.files.items():
        try:
            with open(folder / name, "rb") as file:
                found = _size_and_checksum(file)
        except OSError as error:
            missing = "missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
            raise Damaged(f"{name}: {missing}") from error
        if found[0] != size:
            raise Damaged(f"{name}: {found[0]} bytes instead of {size}")
        if found[1] != crc:
            raise Damaged(f"{name}: its checksum differs")


def _size_and_checksum(file: Any) -> tuple[int, int]:
    size = crc = 0
    while chunk := file.read(_CHUNK):
        size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _checksum(content: Any) -> int:
    # Of the parsed content, so that the file may be indented for people.
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def steps_of(directory: Path, pattern: str) -> list[int]:
    """The steps, ascending, in those names in `directory` that `pattern` matches; its group is the step."""
    if not directory.is_dir():
        return []
    matches = (re.fullmatch(pattern, path.name) for path in directory.iterdir())
    return sorted({int(match[1]) for match in matches if match})


def folders(directory: Path) -> dict[int, Path]:
    """The checkpoint folders by step, whole or damaged; a replaced one where a kill came before its replacement."""
    found = {step: directory / f".{step}.replaced" for step in steps_of(directory, r"\.(\d+)\.replaced")}
    return found | {step: directory / str(step) for step in steps_of(directory, r"(\d+)")}


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by ``/``-joined path, in the tree's order; keys, fields and positions are names alike.

    ``%``, ``.`` and ``/`` inside a key are written ``%25``, ``%2E`` and ``%2F``, an empty key ``%``: Orbax joins the
    keys with dots, so that ``{"a.b": {"c": x}}`` and ``{"a": {"b.c": y}}`` would otherwise overwrite each other.

    Raises:
      TypeError: two leaves have the same name, such as those of the keys 1 and "1".
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = (jax.tree_util.keystr((part,), simple=True) for part in path)
        name = "/".join(part.replace("%", "%25").replace(".", "%2E").replace("/", "%2F") or "%" for part in parts)
        if name in named:
            raise TypeError(f"checkpoint: two leaves are called {name!r}; give the keys different texts")
        named[name] = leaf
    return named


def nested(names: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `named_leaves` are `names`, with the keys left as written there."""
    tree: dict[str, Any] = {}
    for name, value in names.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def describe(named: Mapping[str, Any]) -> Leaves:
    """Shape and dtype of each leaf, concrete or abstract; `TypeError` for what is not an array."""
    leaves = {}
    for name, leaf in named.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"checkpoint: leaf {name} is a {type(leaf).__name__}; leaves must be arrays")
        leaves[name] = tuple(leaf.shape), str(leaf.dtype)
    return leaves


def differences(stored: Leaves, wanted: Leaves, *, partial: bool) -> list[str]:
    """What keeps a checkpoint's leaves from filling the wanted ones; with `partial` it may have more than those."""
    found = []
    for name, leaf in wanted.items():
        if name not in stored:
            found.append(f"{name} is not in it")
        elif stored[name] != leaf:
            found.append(f"{name} is {_array_type(stored[name])} in it, {_array_type(leaf)} here")
    if not partial:
        found += [f"{name} is in it, but not here" for name in stored if name not in wanted]
    return found


def _array_type(leaf: tuple[tuple[int, ...], str]) -> str:
    return f"{leaf[1]}[{','.join(map(str, leaf[0]))}]"
