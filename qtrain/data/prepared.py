"""Finding and opening data sets that TFDS has prepared, without TensorFlow and without ever touching the network.

The set is rebuilt from the `features.json` and `dataset_info.json` beside its records, not from TFDS's code for it:
that code would go to the network for minutes where a set is missing. Nothing is written into the folder.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from qtrain.errors import UsageError, did_you_mean

_NAME = re.compile(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?$")
_VERSION = re.compile(r"\d+\.\d+\.\d+$")


class PreparedSet:
    """One prepared data set: its splits, its features, and random access to its raw records.

    Args:
      name: `<name>[/<config>][:<version>]` as TFDS writes it; the newest version is taken where none is given.
      configured_dir: `data.dir`; "" means `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      UsageError: no such folder, set or version; a file format without random access; records that are missing.
    """

    def __init__(self, name: str, configured_dir: str):
        self.name = name
        self._path = _find(name, configured_dir)
        self._check_format()
        # Imported once the folder is known to be there: a missing set is then reported at once.
        import tensorflow_datasets as tfds

        self._skip_decoding = tfds.decode.SkipDecoding()
        self._builder = tfds.builder_from_directory(self._path)
        self.features = self._builder.info.features
        self.splits: dict[str, int] = {key: split.num_examples for key, split in self._builder.info.splits.items()}

    def records(self, split: str) -> Any:
        """The split's records, features undecoded: `len`, `[i]`, and `__getitems__(list of i)`; thread-safe.

        Raises:
          UsageError: the set has no such split, or its files are missing or unreadable.
        """
        if split not in self.splits:
            raise UsageError(f"data.name: {self.name!r} has no split {split!r}, only {', '.join(self.splits)}")
        for path in self._builder.info.splits[split].filepaths:
            if not path.exists():
                raise UsageError(f"data.dir: {path} is missing; {_prepare_again(self.name, self._path)}")
        # Every feature stays as stored: images are decoded by us, alike with and without OpenCV; the rest not at all.
        # But for sequences, which cannot be left alone, and are arrays of numbers as they are.
        decoders = None
        if hasattr(self.features, "items"):
            decoders = {
                key: self._skip_decoding for key, feature in self.features.items() if not hasattr(feature, "feature")
            }
        try:
            records = self._builder.as_data_source(split, decoders=decoders)
            records[0], records[len(records) - 1]
        except Exception as error:
            raise self.unreadable(error) from error
        if len(records) != self.splits[split]:
            raise UsageError(
                f"data.dir: {self._path} holds {len(records)} of {self.splits[split]} {split} examples; "
                f"{_prepare_again(self.name, self._path)}"
            )
        return records

    def unreadable(self, error: Exception) -> UsageError:
        """What to raise where a record could not be read or decoded."""
        return UsageError(
            f"data.dir: the records of {self.name!r} in {self._path} cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); "
            f"{_prepare_again(self.name, self._path)}"
        )

    def _check_format(self) -> None:
        try:
            info = json.loads((self._path / "dataset_info.json").read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"data.dir: {self._path / 'dataset_info.json'} cannot be read ({error})") from error
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())]
        if "array_record" not in formats:
            raise UsageError(
                f"data.dir: {self._path} was prepared as {formats[0]}, which has no random access; "
                f"{_prepare_again(self.name, self._path)}"
            )


def _find(name: str, configured_dir: str) -> Any:
    """The folder of the set's chosen version, an `epath.Path` (which may lie in a bucket)."""
    from etils import epath

    if not _NAME.match(name):
        raise UsageError(f"data.name: {name!r} is no TFDS name: write <name>[/<config>][:<version>], as 'mnist:3.0.1'")
    path, _, version = name.partition(":")
    base, _, set_config = path.partition("/")
    root = epath.Path(configured_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = root / base / set_config if set_config else root / base
    prepare = _how_to_prepare(name, str(root))
    if not root.is_dir():
        raise UsageError(f"data.dir: {name!r} is not prepared, the folder {root} does not exist. {prepare}")
    if not folder.is_dir():
        near = did_you_mean(base, (child.name for child in root.iterdir() if child.is_dir()))
        raise UsageError(f"data.dir: {name!r} is not prepared in {root}.{near} {prepare}")
    children = [child.name for child in folder.iterdir() if child.is_dir()]
    versions = [child for child in children if _VERSION.match(child) and (folder / child / "features.json").exists()]
    if version and version not in versions:
        raise UsageError(
            f"data.dir: {folder} has no version {version}, only {', '.join(versions) or 'none'}. {prepare}"
        )
    if versions:
        return folder / (version or max(versions, key=lambda v: tuple(map(int, v.split(".")))))
    configs = [c for c in children if any(_VERSION.match(g.name) for g in (folder / c).iterdir())]
    if configs and not set_config:
        raise UsageError(
            f"data.name: {name!r} comes in configs; give one, for example 'tfds:{base}/{sorted(configs)[0]}'"
        )
    raise UsageError(f"data.dir: {folder} holds no finished version of {name!r}. {prepare}")


def _how_to_prepare(name: str, root: str) -> str:
    return (
        "Prepare it with `pip install 'qtrain[tf]'` and "
        f'`python -c "import tensorflow_datasets as tfds; tfds.data_source({name!r}, data_dir={root!r})"`, '
        "or point data.dir (or $TFDS_DATA_DIR) to a folder that has it"
    )


def _prepare_again(name: str, path: Any) -> str:
    depth = 3 if "/" in name else 2
    root = str(path)
    for _ in range(depth):
        root = os.path.dirname(root)
    return f"move {path} away and prepare it again. {_how_to_prepare(name, root)}"
