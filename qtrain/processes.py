"""Several processes that train one run together: how they find each other, and what they have to agree on.

Every process runs the same program on the same config; the first alone writes the run's files. A mistake that one of
them finds, such as data that its host lacks, has to end all of them: the others would wait for it forever.
"""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qtrain import sharding
from qtrain.errors import UsageError, one_line

T = TypeVar("T")


def initialize(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, *, detect: bool = False
) -> None:
    """Join the other processes through ``jax.distributed``; nothing to do where none of the arguments is given.

    To be called before anything asks JAX for its devices.

    Args:
      coordinator: ``HOST:PORT`` where process 0 listens, the same for all.
      count: the number of processes.
      index: of this one, from 0.
      detect: leave what is not given to JAX, which knows Slurm, TPU pods, Open MPI and Kubernetes.

    Raises:
      UsageError: a part of the three without `detect`, an index that is not below the count, an address without a port,
        a port that is in use here, or an environment that JAX does not know.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not detect:
        return
    if missing and not detect:
        raise UsageError(f"{missing[0]} is missing; give {', '.join(given)} together, or --distributed to detect them")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise UsageError(f"--coordinator {coordinator!r}: give HOST:PORT of process 0, such as 10.0.0.1:1234")
    if count is not None and count < 1:
        raise UsageError(f"--processes {count}: give a number of processes, at least 1")
    if index is not None and (index < 0 or (count is not None and index >= count)):
        raise UsageError(f"--process {index}: give this process's index, from 0 to --processes - 1")
    if coordinator is not None and index == 0:
        _check_free(coordinator)
    # SIGTERM is the trainer's to handle: it saves where all processes are at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, TypeError) as error:
        reason = one_line(error).rstrip(".")
        raise UsageError(
            f"--distributed: JAX detects no cluster here ({reason}); give --coordinator, --processes and --process"
        ) from error


def _check_free(coordinator: str) -> None:
    """Refuse a port that another program has: jaxlib's server, which is to listen there, would end in a crash."""
    port = coordinator.rpartition(":")[2]
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", int(port)))
        except (OSError, OverflowError) as error:
            why = one_line(error)
            raise UsageError(f"--coordinator {coordinator}: port {port} cannot be had ({why}); give another") from None


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def together(work: Callable[[], T]) -> T:
    """``work()`` on every process; where it is a `UsageError` on one of them it is one on all.

    Raises:
      UsageError: of `work`, here or elsewhere.
    """
    if jax.process_count() == 1:
        return work()
    message, mistake, result = "", None, None
    try:
        result = work()
    except UsageError as error:
        message, mistake = str(error) or "a mistake", error
    messages = _texts(message)
    if mistake is not None:
        raise mistake
    for index, text in enumerate(messages):
        if text:
            raise UsageError(f"process {index}: {text}")
    return result  # type: ignore[return-value]


def on_first(work: Callable[[], T]) -> T:
    """What ``work()``, which only the first process does, returns: JSON (tuples become lists).

    Raises:
      UsageError: of `work`, on every process.
    """
    if jax.process_count() == 1:
        return work()
    result = together(lambda: json.dumps(work()) if first() else "")
    return json.loads(_texts(result)[0])


def check_same(config: Any) -> None:
    """Refuse processes that were given different configs, which would wait for each other's collectives.

    Raises:
      UsageError: on every process, naming one that differs from the first.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(config, sort_keys=True, default=str)
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    for index in np.flatnonzero(sums != sums[0]):
        raise UsageError(f"process {index} was given another config than process 0; start all with the same arguments")


def flag(value: bool, mesh: Mesh) -> jax.Array:
    """This process's `value` as a part of a global array: ``jnp.any`` of it, in a step that all run, asks them all."""
    rows = np.full(mesh.local_mesh.size, value)
    return jax.make_array_from_process_local_data(sharding.split(mesh), rows)


def _texts(text: str) -> list[str]:
    """Every process's `text`, in their order."""
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
