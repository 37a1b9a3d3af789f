"""The file of an exported model: safetensors with metadata and a checksum, written whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qtrain import __version__
from qtrain.errors import UsageError
from qtrain.workdir import replace_file

FORMAT = "qtrain-export"
VERSION = 2
"""Of the format. A file of another one is refused: what it means may have changed."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> int:
    """Write `tensors` and the JSON `content` to `path`, replacing what is there only once all of it is on the disk.

    The safetensors header's metadata have one entry, ``qtrain-export``, a JSON object: ``version`` of the format,
    ``qtrain`` (the version that wrote it), ``content``, and ``crc32``, a checksum of these three and of every tensor's
    name, dtype, shape and bytes. (One entry, since safetensors writes several in an order that differs from run to run,
    and equal models are to give equal files.)

    Returns:
      The size of the file in bytes.

    Raises:
      UsageError: where it cannot be written; there is then no new file.
    """
    document = {"version": VERSION, "qtrain": __version__, "content": content}
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    document["crc32"] = _checksum(tensors, document)
    encoded = safetensors.numpy.save(tensors, {FORMAT: json.dumps(document, separators=(",", ":"))})
    try:
        replace_file(path, encoded)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(f"export: {os.fspath(path)!r} cannot be written: {reason}; give another file") from error
    return len(encoded)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the content of a file that `write` wrote, found to be as written.

    Raises:
      UsageError: for a file that is missing, truncated, altered, of another format version or of another program.
    """
    shown = repr(os.fspath(path))
    if not Path(path).is_file():
        raise UsageError(f"load: there is no file {shown}; give one that qtrain export wrote")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            document = _document(shown, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"load: {shown} cannot be read: {reason}") from error
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy has not
        raise UsageError(
            f"load: {shown} is truncated, altered or no safetensors file ({' '.join(str(error).split())}); export again"
        ) from error
    if document.pop("crc32", None) != _checksum(tensors, document):
        raise UsageError(f"load: {shown} was altered after it was written: its checksum differs; export again")
    return tensors, document["content"]


def _document(shown: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise UsageError(f"load: {shown} was not written by qtrain export: its metadata have no {FORMAT!r}")
    try:
        document = json.loads(metadata[FORMAT])
        version, writer = document["version"], document["qtrain"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"load: {shown} was altered after it was written: its metadata are no JSON") from error
    if version != VERSION:
        raise UsageError(
            f"load: {shown} is of format version {version}, written by qtrain {writer}; qtrain {__version__} reads "
            f"version {VERSION}: use that qtrain, or export again"
        )
    return document


def _checksum(tensors: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> str:
    checksum = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        checksum = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(np.uint8).data, checksum)
    return f"{checksum:08x}"
