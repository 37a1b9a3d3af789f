"""The config a command line names: the file it is read from, the overrides behind it, each mistake in one line."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from qtrain.errors import UsageError, did_you_mean, one_line

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(?:=(.*))?$", re.DOTALL)
_ALLOWED: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a tuple in quotes, such as '(1, 2)'",
    ConfigDict: "a section; set its keys, as --config.{key}.NAME=VALUE",
}


def parse(command: str, values: flags.FlagValues, arguments: Sequence[str]) -> ConfigDict:
    """Parse a command's `arguments` into `values`; returns the config they name, overridden and locked.

    Overrides are ml_collections': ``--config.train.steps=500``, parsed by the type of the value they replace.

    Raises:
      UsageError: no config, or one that cannot be read; an unknown flag or key; a value of another type.
    """
    source, rest = _take_config(arguments)
    if not source:
        raise UsageError(
            f"--config is missing; give a config file: qtrain {command} --config configs/digits_cnn_cpt.py"
        )
    config = load(source)
    for argument in rest:
        if override := _OVERRIDE.match(argument):
            check_key(config, override[1], f"--config.{override[1]}")
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[command, *rest])
        left = values([command, *rest])
    except flags.UnrecognizedFlagError as error:
        names = [f"--{name}" for name in values if not name.startswith("config.")]
        near = did_you_mean(f"--{error.flagname}", names)
        raise UsageError(
            f"--{error.flagname}: no such flag of {command}, which has {', '.join(names)}.{near}"
        ) from None
    except (flags.Error, TypeError, ValueError, KeyError) as error:
        raise UsageError(_explain(error, command, config, rest)) from None
    if len(left) > 1:
        raise UsageError(f"{command}: {left[1]!r} is not a flag; overrides are --config.KEY=VALUE")
    return config


def load(source: str) -> ConfigDict:
    """What ``get_config`` of a config file returns; `source` is ``FILE`` or ``FILE:ARGUMENT``.

    Raises:
      UsageError: no such file; one that does not run, or has no ``get_config``, or one that returns no ConfigDict.
    """
    path, colon, argument = source.partition(":")
    named = f"--config {path!r}"
    if os.path.isdir(path):
        raise UsageError(f"{named} is a folder; give a config file in it")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = os.listdir(folder) if os.path.isdir(folder) else []
        raise UsageError(f"{named}: no such file.{did_you_mean(os.path.basename(path), near)}")
    with _running(path, named):
        get_config = getattr(_module(path), "get_config", None)
        if not callable(get_config):
            raise UsageError(f"{named} defines no function get_config(); write one that returns a ConfigDict")
        if colon and not inspect.signature(get_config).parameters:
            raise UsageError(f"{named}: its get_config() takes no argument; leave out ':{argument}'")
        config = get_config(argument) if colon else get_config()
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{named}: get_config() returned {config!r:.60}; return the ConfigDict of base_config(...)")
    return config.lock()


def sweep(source: str) -> list[Any]:
    """What ``sweep()`` of a config file yields; it is given the argument of ``FILE:ARGUMENT`` if it takes one.

    Raises:
      UsageError: as `load`; a file without ``sweep``, or one that yields nothing that can be iterated over.
    """
    path, _, argument = source.partition(":")
    named = f"--config {path!r}"
    with _running(path, named):
        points = getattr(_module(path), "sweep", None)
        if not callable(points):
            raise UsageError(
                f"{named} defines no function sweep(); write one that yields mappings of dotted keys to values, or "
                "train it as one run: qtrain train"
            )
        return list(points(argument) if inspect.signature(points).parameters else points())


def source_of(arguments: Sequence[str]) -> str | None:
    """The value of ``--config`` in `arguments`."""
    return _take_config(arguments)[0]


def overridden(arguments: Sequence[str]) -> list[str]:
    """The keys that `arguments` override, as ``--config.KEY=VALUE``."""
    return [override[1] for argument in arguments if (override := _OVERRIDE.match(argument))]


@contextlib.contextmanager
def _running(path: str, named: str) -> Iterator[None]:
    """Say in one line what goes wrong in a config file."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        raise (error if message.startswith(named) else UsageError(f"{named}: {message}")) from None
    except SyntaxError as error:
        raise UsageError(f"{named}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # a config file is the user's program: whatever it raises is theirs to mend
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        message = one_line(error)
        raise UsageError(f"{named}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {message}") from None


def _module(path: str) -> ModuleType:
    loader = _Source("qtrain_config_file", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Reads a file of any name, and leaves no ``__pycache__`` beside it."""

    def get_code(self, fullname: str) -> Any:
        """The file compiled; never what a cache has, which two edits within a second can leave stale."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _take_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of ``--config``, the last one given, and the arguments without it."""
    source, rest = None, []
    following = iter(arguments)
    for argument in following:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            source = value if equals else next(following, "")
        else:
            rest.append(argument)
    return source, rest


def check_key(config: ConfigDict, key: str, named: str) -> None:
    """Refuse a dotted key that the config lacks, calling it `named`.

    Raises:
      UsageError: with the nearest key that there is.
    """
    parts = key.split(".")
    section: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(section, ConfigDict):
            raise UsageError(f"{named}: {'.'.join(parts[:depth])} is {section!r} and has no keys")
        if part not in section:
            where = ".".join(parts[:depth]) or "the config"
            near = did_you_mean(key, _keys(config))
            raise UsageError(f"{named}: no such key; {where} has {', '.join(sorted(section))}.{near}")
        section = section[part]


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in config.items():
        keys += [f"{prefix}{name}"]
        if isinstance(value, ConfigDict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _explain(error: Exception, command: str, config: ConfigDict, arguments: Sequence[str]) -> str:
    """A line for what absl or ml_collections raised."""
    text = one_line(error)
    found = re.match(r"flag --config\.([\w.]+)=", text)
    if found is None:
        return f"{command}: {text[:400]}"
    key = found[1]
    parents, _, name = key.rpartition(".")
    section = config
    for parent in parents.split(".") if parents else ():
        section = section[parent]
    kind = section.get_type(name)
    following = [*arguments[1:], ""]
    given = [
        (override[2] if override[2] is not None else after)
        for argument, after in zip(arguments, following, strict=True)
        if (override := _OVERRIDE.match(argument)) and override[1] == key
    ]
    return f"--config.{key}={' '.join(given[-1].split())}: must be {allowed(kind, key)}"


def allowed(kind: type, key: str) -> str:
    """What values a key of this type takes, for people."""
    return _ALLOWED.get(kind, f"a value of type {kind.__name__}").format(key=key)
