"""Byte text: TFDS sets, any file, or the reference of Python itself. A token is a byte, the vocabulary 256."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qtrain.data.dataset import TokenSource
from qtrain.data.prepared import PreparedSet
from qtrain.errors import UsageError

VOCAB = 256
FRACTIONS = {"train": 0.90, "validation": 0.05, "test": 0.05}  # of a file, in this order from its beginning


def load_prepared(name: str, configured_dir: str, length: int) -> dict[str, TokenSource]:
    """The splits of a TFDS set whose examples have a `text`, each split's examples joined by newlines, in memory.

    The One Billion Word set (lm1b) is 4 GB of bytes and has no validation split.
    """
    prepared = PreparedSet(name, configured_dir)
    sources = {}
    for split in FRACTIONS:
        if split == "validation" and split not in prepared.splits:
            continue
        records = prepared.records(split)
        text = b"\n".join(records[index]["text"] for index in range(len(records)))
        sources[split] = _source(np.frombuffer(text, np.uint8), length, f"the {split} text of {name!r}")
    return sources


def load_python_reference(length: int) -> dict[str, TokenSource]:
    """The topics of Python's own language reference, as `help("topics")` shows them, in the order of their names.

    About 700 kB of English and code that every Python brings along; what exactly depends on its version. Split like a
    file.

    Raises:
      UsageError: this Python was packed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "data.name is 'python_reference', which this Python was packed without (no module pydoc_data); "
            "read a file by data.name='text' and data.path"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics))
    return _in_parts(np.frombuffer(text.encode(), np.uint8), length, "the Python reference")


def load_file(path: str, length: int) -> dict[str, TokenSource]:
    """The bytes of a file: its first 90 % to train on, the next 5 % to validate, the last 5 % to test.

    Raises:
      UsageError: no path, no such file, not readable, empty, or a part of it too short for one window.
    """
    if not path:
        raise UsageError("data.path is not set; data.name='text' reads the file that it names")
    file = Path(path).expanduser()
    if not file.exists():
        raise UsageError(f"data.path is {path!r}; there is no such file")
    if not file.is_file():
        raise UsageError(f"data.path is {path!r}; it must be a file")
    try:
        tokens = np.fromfile(file, np.uint8)
    except OSError as error:
        raise UsageError(f"data.path is {path!r}, which cannot be read ({error.strerror})") from error
    if not len(tokens):
        raise UsageError(f"data.path is {path!r}, which is empty")
    return _in_parts(tokens, length, repr(path))


def _in_parts(tokens: np.ndarray, length: int, whole: str) -> dict[str, TokenSource]:
    borders = [round(len(tokens) * fraction) for fraction in np.cumsum([0.0, *FRACTIONS.values()])]
    return {
        split: _source(tokens[first:last], length, f"the {split} part ({FRACTIONS[split]:.0%}) of {whole}")
        for split, first, last in zip(FRACTIONS, borders[:-1], borders[1:], strict=True)
    }


def _source(tokens: np.ndarray, length: int, what: str) -> TokenSource:
    if len(tokens) < length + 1:
        raise UsageError(
            f"data.length is {length}, too long for {what}, which has {len(tokens)} bytes; "
            f"choose at most {max(len(tokens) - 1, 0)}, or a longer text"
        )
    return TokenSource(tokens, length)
