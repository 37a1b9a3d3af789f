"""An exported model as StableHLO, for programs that serve it without qtrain or Flax."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export as jax_export
from jax import lax

from qtrain.errors import UsageError, did_you_mean, one_line
from qtrain.export.model import Exported
from qtrain.workdir import replace_file

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TEXT = ".mlir"
"""The ending of a file that is to hold the program as text."""

_UNKNOWN = "batch"


def stablehlo(
    exported: Exported, *, batch_size: int | None = None, platforms: Sequence[str] | None = None
) -> jax_export.Exported:
    """The forward pass at ``exported.bits`` as one StableHLO program: a batch in, logits out.

    The weights are constants of the program, integers as they are stored (int8 where h ≤ 8), and are decoded inside, so
    that it needs nothing beside it. A barrier keeps a compiler from folding them, and the scales and norms, into other
    constants: the logits on a batch are those of ``exported.logits``, bit for bit on the same platform.

    Args:
      exported: the model, at the bits that are wanted: ``load(path, bits=4)``.
      batch_size: of every batch that it will take; None: any (a symbolic dimension).
      platforms: of "cpu", "cuda", "rocm", "tpu", one or several that it is made for; None: the one this process uses.

    Returns:
      ``serialize()`` gives its bytes, ``jax.export.deserialize(bytes).call(batch)`` runs them, and ``mlir_module()`` is
      the text. The batch has the dtype and, but for the first axis, the shape of ``exported.inputs``.

    Raises:
      UsageError: for another platform, a batch size that is none, or a model that needs to know it.

    >>> program = stablehlo(load("model.safetensors", bits=4))  # doctest: +SKIP
    >>> Path("model.jax").write_bytes(program.serialize())  # doctest: +SKIP
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"stablehlo: batch_size={batch_size!r}; give a whole number of at least 1, or None for any")
    chosen = None if platforms is None else check_platforms(platforms)
    first = jax_export.symbolic_shape(_UNKNOWN)[0] if batch_size is None else batch_size
    batch = jax.ShapeDtypeStruct((first, *exported.inputs.shape[1:]), exported.inputs.dtype)
    constants = jax.device_get(exported.state)

    def logits(inputs: Any) -> Any:
        return exported.program(*lax.optimization_barrier(constants), inputs)

    try:
        with _without_locations():
            return jax_export.export(jax.jit(logits), platforms=chosen)(batch)
    except (jax.errors.InconclusiveDimensionOperation, NotImplementedError, TypeError, ValueError) as error:
        reason = one_line(error)[:200]
        if batch_size is None:
            raise UsageError(
                f"stablehlo: the model cannot be written for a batch of any size ({reason}); give batch_size, as in "
                "--batch-size 32"
            ) from error
        raise UsageError(f"stablehlo: the model cannot be written ({reason})") from error


def write_stablehlo(
    path: str | os.PathLike[str],
    exported: Exported,
    *,
    batch_size: int | None = None,
    platforms: Sequence[str] | None = None,
) -> int:
    """`stablehlo` as a file: its serialized bytes, or as text where `path` ends in ``.mlir``; returns its size.

    Raises:
      UsageError: as `stablehlo`, and for a file that cannot be written: there is then no new one.
    """
    program = stablehlo(exported, batch_size=batch_size, platforms=platforms)
    content = program.mlir_module().encode() if Path(path).suffix == TEXT else bytes(program.serialize())
    try:
        replace_file(path, content)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(f"stablehlo: {os.fspath(path)!r} cannot be written: {reason}; give another file") from error
    return len(content)


def check_platforms(given: Sequence[str]) -> list[str]:
    """The names of platforms, all known.

    Raises:
      UsageError: for another one, or none.
    """
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in PLATFORMS:
            hint = did_you_mean(str(name), PLATFORMS)
            raise UsageError(f"stablehlo: platform {name!r}: give one or several of {', '.join(PLATFORMS)}.{hint}")
    if not names:
        raise UsageError(f"stablehlo: no platform; give one or several of {', '.join(PLATFORMS)}, or None")
    return names


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Without where in the source each operation came from: paths of this machine, for which equal models differ."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
