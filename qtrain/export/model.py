"""A model that runs on stored integers, at any width that follows from them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qtrain.errors import UsageError
from qtrain.export import coding, file, quantizer_json
from qtrain.export.encode import EVALUATION_KEY, Stored
from qtrain.export.switching import Bits, Request, Source, at, code_dtype
from qtrain.inject import QuantizedModel, Rule
from qtrain.inject import quantize as inject
from qtrain.inject.rules import WEIGHTED
from qtrain.precision import Precision
from qtrain.quantizers import AffineScale, DoubleRounding

Array = jax.Array

WEIGHTS, VARIABLES = "weights", "variables"
"""What the names of tensors in the file begin with."""


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A quantized model that runs on stored integers: `qtrain.export.load` makes it.

    Weights are decoded inside the compiled forward pass and used as they are: no quantizer sees them again, since the
    range of values that are on a grid already may lie one rounding beside that grid's. Activations are quantized as in
    evaluation. Logits equal those of the evaluation step bit for bit where it computes in float (``execution="fake"``);
    those of a run that computes on integer codes agree to rounding.

    Attributes:
      qmodel: the model with quantizers for its activations alone.
      stored: name of a quantized parameter → its codes and scales at `bits`.
      rest: the other variables; of norms that the file holds once per width those that `bits` use.
      bits: the precision that it runs at; that of the weights is in the codes.
      call: keyword arguments of the model in evaluation, such as ``{"train": False}``.
      inputs: shape and dtype of the batch that it was exported with.
      config: of the run, or None.
      source: what the file holds, shared by all the widths that `at` makes of it.
      program: the compiled forward pass, shared likewise: a width is data to it.
    """

    qmodel: QuantizedModel
    stored: Mapping[str, Stored]
    rest: Mapping[str, Any]
    bits: Bits
    call: Mapping[str, Any]
    inputs: jax.ShapeDtypeStruct
    config: Mapping[str, Any] | None
    source: Source = dataclasses.field(repr=False)
    program: Callable[..., Array] = dataclasses.field(repr=False)

    def at(self, bits: Request) -> Exported:
        """The model at other bits, made from the integers of the file, whatever the bits are now.

        Weights of h bits that `DoubleRounding` made become those of l bits by W_l = clip(rint(W_h/2^(h−l))), ties to
        even, a shift from int8 to int8, and their scale s_h·2^(h−l); nothing is ever in float. Norms and scales that
        were trained once per width are those of the width (the nearest one below, else the lowest). What is compiled
        stays so. Logits are those of evaluation in training at these bits, bit for bit.

        Args:
          bits: a number for all layers whose bits no rule fixes: of the weights, and of the activations where these
            were equal in the export. Or a `Precision` for all of them, or a mapping from layer path to either of the
            two; layers that it leaves out stay as exported.

        Raises:
          UsageError: for what is no width, a layer that is unknown or fixed, a width above h, and weights that cannot
            be narrowed: of another quantizer, or exported at fewer bits than h.
        """
        precision = self.source.requested(bits)
        stored, rest = self.source.narrowed(precision, _on_device)
        return dataclasses.replace(self, stored=stored, rest=jax.device_put(rest), bits=precision)

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        """The variables with the weights decoded, for ``qmodel.apply``, or for the plain model in float."""
        return jax.jit(_decoded)(dict(self.stored), dict(self.rest))

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for its own arguments, weights and activations quantized; jit it, or use `logits`."""
        arrays, rest, acts = self.state
        # As arrays, like traced bits: a number would have to be among the widths that a learned scale has values for.
        return _forward(self.qmodel, self.source.stored, arrays, rest, jax.tree.map(jnp.asarray, acts), *args, **kwargs)

    def logits(self, inputs: Any) -> Array:
        """The output of evaluation for a batch, compiled once for each shape of it, whatever the bits."""
        return self.program(*self.state, inputs)

    @property
    def state(self) -> tuple[Any, Any, Any]:
        """What `program` computes with, all of its arguments but the batch: codes and scales, other variables, bits."""
        arrays = {name: (one.codes, one.scale) for name, one in self.stored.items()}
        acts = {path: _acts(self.bits, path) for path, fixed in self.source.acts.items() if fixed is None}
        return arrays, dict(self.rest), acts


def load(path: str | os.PathLike[str], bits: Request | None = None, *, module: nn.Module | None = None) -> Exported:
    """The model that `qtrain.export.save` stored, ready to run; needs neither the run nor its data.

    Args:
      path: of the file.
      bits: see `Exported.at`; None: those it was exported at.
      module: the model, for a file without a config (one of `qtrain.models` is built from its config).

    Raises:
      UsageError: for a file that is missing, truncated, altered, of another version or another program, or that does
        not say what model it is of; for bits that it cannot be had at.
    """
    tensors, content = file.read(path)
    if module is None:
        config, num_classes = content["config"], content["num_classes"]
        if config is None or num_classes is None:
            raise UsageError(f"load: {os.fspath(path)!r} was stored without a config; give module=, the model it is of")
        from qtrain import models

        module = models.build(config["model"], num_classes=num_classes, input_shape=content["inputs"]["shape"][1:])
    return assembled(tensors, content, module, bits)


def assembled(
    tensors: Mapping[str, np.ndarray], content: Mapping[str, Any], module: nn.Module, bits: Request | None = None
) -> Exported:
    """The model that the tensors and the metadata of a file describe, at `bits`; None: those of the file."""
    source = _source(tensors, content)
    qmodel = inject(module, [_act_rule(path, entry) for path, entry in content["acts"].items()])
    precision = source.bits if bits is None else source.requested(bits)
    stored, rest = source.narrowed(precision, _on_device)
    shape = jax.ShapeDtypeStruct(tuple(content["inputs"]["shape"]), content["inputs"]["dtype"])
    call = dict(content["call"])
    program = jax.jit(functools.partial(_forward, qmodel, source.stored, **call))
    return Exported(qmodel, stored, jax.device_put(rest), precision, call, shape, content["config"], source, program)


def _source(tensors: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> Source:
    stored = {}
    for name, entry in content["weights"].items():
        arrays = {key: tensors.get(f"{WEIGHTS}/{name}/{key}") for key in ("codes", "levels", "scale", "offset")}
        shape, quantizer = tuple(entry["shape"]), quantizer_json.from_json(entry["quantizer"])
        count = int(np.prod(shape, dtype=np.int64))
        packed = (arrays["codes"], arrays["levels"])
        codes: Any = coding.from_bytes(entry["encoding"], entry["width"], count, entry["minimum"], *packed)
        if not jnp.issubdtype(jnp.dtype(entry["codes"]), jnp.integer):
            codes = codes.astype(jnp.dtype(entry["codes"]))
        elif isinstance(quantizer, DoubleRounding):
            codes = codes.astype(code_dtype(quantizer.high), copy=False)  # which a shift keeps, and so the program
        scales: list[Any] = [
            np.asarray(array).astype(jnp.dtype(entry["scale"]))
            for array in (arrays["scale"], arrays["offset"])
            if array is not None
        ]
        stored[name] = Stored(
            codes=codes.reshape(shape),
            scale=scales[0] if len(scales) == 1 else AffineScale(*scales),
            quantizer=quantizer,
            axes=None if entry["axes"] is None else tuple(entry["axes"]),
            stacked=entry["stacked"],
            dtype=entry["dtype"],
            bits=entry["bits"],
            layer=entry["layer"],
            fixed=content["layers"][entry["layer"]] is not None,
        )
    flat = {
        tuple(name.split("/")[1:]): value.astype(jnp.dtype(content["widened"].get(name, value.dtype)), copy=False)
        for name, value in tensors.items()
        if name.startswith(f"{VARIABLES}/")
    }
    return Source(
        stored=stored,
        rest=unflatten_dict(flat),
        bits=_bits_from_json(content["bits"]),
        layers=content["layers"],
        acts={path: entry["bits"] for path, entry in content["acts"].items()},
        widths=tuple(content["per_width"]["widths"]),
        rows=content["per_width"]["rows"],
    )


def _forward(
    qmodel: QuantizedModel, forms: Mapping[str, Stored], arrays: Any, rest: Any, bits: Any, *args: Any, **kwargs: Any
) -> Any:
    """The output on the codes and scales of `arrays`, which are as those of `forms`."""
    stored = {
        name: dataclasses.replace(forms[name], codes=codes, scale=scale) for name, (codes, scale) in arrays.items()
    }
    rngs = {"quant": jax.random.key(EVALUATION_KEY)}
    return qmodel.apply(_decoded(stored, rest), *args, bits=bits, rngs=rngs, **kwargs)


def _decoded(stored: Mapping[str, Stored], rest: Mapping[str, Any]) -> dict[str, Any]:
    flat = {("params", *name.split("/")): value.decode() for name, value in stored.items()}
    return unflatten_dict({**flatten_dict(rest), **flat})


def _on_device(stored: Stored) -> Stored:
    return dataclasses.replace(stored, codes=jax.device_put(stored.codes), scale=jax.device_put(stored.scale))


def _acts(bits: Bits, path: str) -> Precision:
    acts = at(bits, path).acts
    return Precision(acts=None if acts is None else np.float32(acts))


def _act_rule(path: str, entry: Mapping[str, Any]) -> Rule:
    quantizer = quantizer_json.from_json(entry["quantizer"])
    ops = (entry["op"],) if "op" in entry else WEIGHTED
    return Rule(path=re.escape(path), acts=entry["bits"], weight_quantizer=None, act_quantizer=quantizer, ops=ops)


def _bits_from_json(value: Mapping[str, Any]) -> Bits:
    if "layers" in value:
        return {path: Precision(**each) for path, each in value["layers"].items()}
    return Precision(**value)
