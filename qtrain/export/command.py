"""``qtrain export``: a run's model as one file of packed integers."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from qtrain.arguments import Parser
from qtrain.errors import UsageError

_EXAMPLE = "example: qtrain export --workdir runs/digits --out model.safetensors"


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain export",
        description="Store a run's model as packed integer codes and scales, in one safetensors file.",
        example=_EXAMPLE,
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the run's folder; its newest checkpoint")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, FILE.safetensors")
    parser.add_argument(
        "--bits",
        metavar="N",
        help="bits of the layers that follow the schedule (default: those of the run's last step); their activations "
        "take N too where the schedule gives them the bits of the weights",
    )
    return parser


def run(argv: list[str]) -> int:
    """Export the newest finished checkpoint of a run, and print what it takes on disk.

    Args:
      argv: the arguments after ``qtrain export``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag or a wrong value; no run, or none that has a checkpoint; a run that quantizes no
        weight, or leaves its arithmetic to another backend; a file that cannot be written.
    """
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    print(export_run(flags.workdir, flags.out, _bits(flags.bits)))
    return 0


def export_run(workdir: str | os.PathLike[str], out: str | os.PathLike[str], bits: int | None = None) -> Any:
    """`qtrain.export.save` of a run's newest finished checkpoint; returns its `Report`.

    Args:
      workdir: of the run, finished or not.
      out: the file.
      bits: see the command; None: those of the run's last step.
    """
    _check_out(out)

    import jax
    from ml_collections import ConfigDict

    from qtrain import workdir as workdirs
    from qtrain.checkpoint import restore
    from qtrain.experiment import build
    from qtrain.export import save
    from qtrain.manifest import folders

    config = ConfigDict(workdirs.read_config(workdir))
    checkpoints = Path(workdir, "checkpoints")
    if not folders(checkpoints):
        raise UsageError(f"export: the run in {os.fspath(workdir)!r} has no finished checkpoint yet; train it first")
    experiment = build(config)
    inputs = experiment.inputs()

    abstract = jax.eval_shape(experiment.initial_state)
    names = ("params", "quant", "collections")
    state = restore(checkpoints, {name: getattr(abstract, name) for name in names}, partial=True).state
    precision = experiment.precision_at(experiment.total_steps - 1)
    if bits is not None:
        acts = bits if precision.acts is not None and precision.acts == precision.weights else precision.acts
        precision = dataclasses.replace(precision, weights=bits, acts=acts)
    batch = min(inputs.shape[0], 32)
    return save(
        out,
        experiment.qmodel,
        {"params": state["params"], "quant": state["quant"], **state["collections"]},
        precision,
        jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype),
        config=config.to_dict(),
        num_classes=experiment.dataset.num_classes,
    )


def _bits(given: str | None) -> int | None:
    if given is None:
        return None
    if not re.fullmatch(r"\d+", given) or not 1 <= int(given) < 24:
        raise UsageError(f"--bits {given!r} is not a width of integers; give a whole number from 1 to 23")
    return int(given)


def _check_out(out: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written before anything is computed."""
    path = Path(out)
    if not path.name or path.is_dir():
        raise UsageError(f"--out {os.fspath(out)!r} is a folder; give a file, such as model.safetensors")
    if not path.parent.is_dir():
        raise UsageError(f"--out {os.fspath(out)!r}: there is no folder {str(path.parent)!r}; create it")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out {os.fspath(out)!r}: the folder {str(path.parent)!r} cannot be written; give another")
