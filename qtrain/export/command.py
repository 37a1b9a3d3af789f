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
        description="Store a run's model as packed integer codes and scales, in one safetensors file, or as a "
        "StableHLO program that holds them.",
        example=_EXAMPLE,
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the run's folder; its newest checkpoint")
    parser.add_argument("--out", metavar="FILE", help="the file to write, FILE.safetensors")
    parser.add_argument(
        "--bits",
        metavar="N",
        help="bits of the layers that follow the schedule (default: those of the run's last step; of weights by double "
        "rounding all that it keeps, from which load(FILE, bits=N) gives every narrower width); their activations take "
        "N too where the schedule gives them the bits of the weights",
    )
    parser.add_argument(
        "--stablehlo",
        metavar="FILE",
        help="write the model at these bits as a serialized jax.export program, too; as text if FILE ends in .mlir",
    )
    parser.add_argument("--batch-size", metavar="N", help="of --stablehlo: the batch that it takes (default: any)")
    parser.add_argument(
        "--platforms", metavar="A,B", help="of --stablehlo: of cpu, cuda, rocm, tpu (default: the one in use)"
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
    if flags.out is None and flags.stablehlo is None:
        raise UsageError(f"qtrain export: give --out FILE, --stablehlo FILE or both; {_EXAMPLE}")
    for name in ("batch_size", "platforms"):
        if flags.stablehlo is None and getattr(flags, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is of a StableHLO program; give --stablehlo FILE with it")
    bits, batch_size = _whole("--bits", flags.bits, 23), _whole("--batch-size", flags.batch_size)
    platforms = None if flags.platforms is None else [name.strip() for name in flags.platforms.split(",")]
    prepared = _prepared(flags.workdir, flags.out, flags.stablehlo, bits, platforms)
    if flags.out is not None:
        from qtrain.export.save import write

        print(write(flags.out, prepared))
    if flags.stablehlo is not None:
        from qtrain.export.serving import write_stablehlo

        model = prepared.exported
        size = write_stablehlo(flags.stablehlo, model, batch_size=batch_size, platforms=platforms)
        shape = ", ".join(["batch" if batch_size is None else str(batch_size), *map(str, model.inputs.shape[1:])])
        print(f"{flags.stablehlo}: {size:,} bytes of StableHLO, takes {model.inputs.dtype} [{shape}]")
    return 0


def export_run(workdir: str | os.PathLike[str], out: str | os.PathLike[str], bits: int | None = None) -> Any:
    """`qtrain.export.save` of a run's newest finished checkpoint; returns its `Report`.

    Args:
      workdir: of the run, finished or not.
      out: the file.
      bits: see the command; None: those of the run's last step, or all that double rounding keeps.
    """
    from qtrain.export.save import write

    return write(out, _prepared(workdir, out, None, bits, None))


def _prepared(workdir: Any, out: Any, program: Any, bits: int | None, platforms: Any) -> Any:
    """`qtrain.export.save.prepare` of a run, once the flags are found to be right."""
    for flag, path in (("--out", out), ("--stablehlo", program)):
        if path is not None:
            _check_out(flag, path)
    import jax

    from qtrain.export.save import prepare
    from qtrain.export.serving import check_platforms
    from qtrain.trained import check_promise, experiment_of, restored

    if platforms is not None:
        check_platforms(platforms)
    experiment = experiment_of(workdir, "export")
    if experiment.dataset.kind == "graph":
        raise UsageError(f"export: data.name={experiment.config.data.name!r} is a graph; export takes models of arrays")
    if not experiment.task.classifies:
        raise UsageError(
            f"export: model.name={experiment.config.model.name!r} finds boxes; export takes models that put out logits"
        )
    inputs = experiment.inputs()
    _, variables, _, precision = restored(workdir, experiment)
    if bits is not None:
        check_promise(experiment, "--bits", bits)
    if bits is None:
        bits = _kept(experiment.qmodel.weights(inputs, train=False))
    if bits is not None:
        acts = bits if precision.acts is not None and precision.acts == precision.weights else precision.acts
        precision = dataclasses.replace(precision, weights=bits, acts=acts)
    batch = min(inputs.shape[0], 32)
    return prepare(
        experiment.qmodel,
        variables,
        precision,
        jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype),
        config=experiment.config.to_dict(),
        num_classes=experiment.dataset.num_classes,
    )


def _kept(weights: Any) -> int | None:
    """The bits that double rounding keeps of all the weights that follow the schedule; None where others do, too."""
    from qtrain.quantizers import DoubleRounding

    following = [weight.quantizer for weight in weights if weight.rule.weights is None]
    highs = {one.high if isinstance(one, DoubleRounding) else None for one in following}
    return highs.pop() if len(highs) == 1 else None


def _whole(flag: str, given: str | None, highest: int | None = None) -> int | None:
    if given is None:
        return None
    if not re.fullmatch(r"\d+", given) or int(given) < 1 or (highest is not None and int(given) > highest):
        what = "a width of integers" if highest else "a size"
        most = "of at least 1" if highest is None else f"from 1 to {highest}"
        raise UsageError(f"{flag} {given!r} is not {what}; give a whole number {most}")
    return int(given)


def _check_out(flag: str, out: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written before anything is computed."""
    path = Path(out)
    if not path.name or path.is_dir():
        raise UsageError(f"{flag} {os.fspath(out)!r} is a folder; give a file, such as model.safetensors")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {os.fspath(out)!r}: there is no folder {str(path.parent)!r}; create it")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {os.fspath(out)!r}: the folder {str(path.parent)!r} cannot be written; give another")
