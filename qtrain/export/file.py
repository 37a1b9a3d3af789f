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
VERSION = 1
"""Of the format. A file of another one is refused: what it means may have changed."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> int:
    """Write `tensors` and the JSON `content` to `path`, replacing what is there only once all of it is on the disk.

    The safetensors header's metadata are ``format``, ``version``, ``qtrain`` (the version that wrote it), ``content``
    and ``crc32``, a checksum of all of these and of every tensor's name, dtype, shape and bytes.

    Returns:
      The size of the file in bytes.

    Raises:
      UsageError: where it cannot be written; there is then no new file.
    """
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "qtrain": __version__,
        "content": json.dumps(content, separators=(",", ":")),
    }
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    metadata["crc32"] = _checksum(tensors, metadata)
    encoded = safetensors.numpy.save(tensors, metadata)
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
            metadata = file.metadata() or {}
            _check_origin(shown, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"load: {shown} cannot be read: {reason}") from error
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy has not
        raise UsageError(
            f"load: {shown} is truncated, altered or no safetensors file ({' '.join(str(error).split())}); export again"
        ) from error
    if metadata.get("crc32") != _checksum(tensors, {key: metadata[key] for key in metadata if key != "crc32"}):
        raise UsageError(f"load: {shown} was altered after it was written: its checksum differs; export again")
    return tensors, json.loads(metadata["content"])


def _check_origin(shown: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UsageError(f"load: {shown} was not written by qtrain export: it does not say format {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        raise UsageError(
            f"load: {shown} is of format version {metadata.get('version')}, written by qtrain "
            f"{metadata.get('qtrain')}; qtrain {__version__} reads version {VERSION}: use that qtrain, or export again"
        )


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    checksum = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        checksum = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(np.uint8).data, checksum)
    return f"{checksum:08x}"
