"""A model that runs on stored integers."""

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
from qtrain.inject import QuantizedModel, Rule
from qtrain.inject import quantize as inject
from qtrain.precision import Precision
from qtrain.quantizers import AffineScale

Array = jax.Array
Bits = Precision | Mapping[str, Precision]

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
      stored: name of a quantized parameter → its codes and scales.
      rest: the other variables, as they were.
      bits: the precision it was exported at; that of the weights is in the codes.
      call: keyword arguments of the model in evaluation, such as ``{"train": False}``.
      config: of the run, or None.
    """

    qmodel: QuantizedModel
    stored: Mapping[str, Stored]
    rest: Mapping[str, Any]
    bits: Bits
    call: Mapping[str, Any]
    config: Mapping[str, Any] | None = None

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        """The variables with the weights decoded, for ``qmodel.apply``, or for the plain model in float."""
        return jax.jit(_decoded)(dict(self.stored), dict(self.rest))

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for its own arguments, weights and activations quantized; jit it, or use `logits`."""
        return self._apply(dict(self.stored), dict(self.rest), _without_weights(self.bits), *args, **kwargs)

    def logits(self, inputs: Any) -> Array:
        """The output of evaluation for a batch, compiled once for each shape of it."""
        bits = jax.tree.map(np.float32, _without_weights(self.bits))
        return self._compiled(dict(self.stored), dict(self.rest), bits, inputs)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Array]:
        return jax.jit(functools.partial(self._apply, **self.call))

    def _apply(self, stored: Any, rest: Any, bits: Bits, *args: Any, **kwargs: Any) -> Any:
        rngs = {"quant": jax.random.key(EVALUATION_KEY)}
        return self.qmodel.apply(_decoded(stored, rest), *args, bits=bits, rngs=rngs, **kwargs)


def load(path: str | os.PathLike[str], *, module: nn.Module | None = None) -> Exported:
    """The model that `qtrain.export.save` stored, ready to run; needs neither the run nor its data.

    Args:
      path: of the file.
      module: the model, for a file without a config (one of `qtrain.models` is built from its config).

    Raises:
      UsageError: for a file that is missing, truncated, altered, of another version or another program, or that does
        not say what model it is of.
    """
    tensors, content = file.read(path)
    if module is None:
        config, num_classes = content["config"], content["num_classes"]
        if config is None or num_classes is None:
            raise UsageError(f"load: {os.fspath(path)!r} was stored without a config; give module=, the model it is of")
        from qtrain import models

        module = models.build(config["model"], num_classes=num_classes, input_shape=content["inputs"]["shape"][1:])
    return assembled(tensors, content, module)


def assembled(tensors: Mapping[str, np.ndarray], content: Mapping[str, Any], module: nn.Module) -> Exported:
    """The model that the tensors and the metadata of a file describe."""
    stored = {}
    for name, entry in content["weights"].items():
        arrays = {key: tensors.get(f"{WEIGHTS}/{name}/{key}") for key in ("codes", "levels", "scale", "offset")}
        shape = tuple(entry["shape"])
        codes: Any = coding.from_bytes(
            entry["encoding"],
            entry["width"],
            int(np.prod(shape, dtype=np.int64)),
            entry["minimum"],
            arrays["codes"],
            arrays["levels"],
        )
        if not jnp.issubdtype(jnp.dtype(entry["codes"]), jnp.integer):
            codes = codes.astype(jnp.dtype(entry["codes"]))
        scales = [jnp.asarray(arrays[key], entry["scale"]) for key in ("scale", "offset") if arrays[key] is not None]
        stored[name] = Stored(
            codes=jnp.asarray(codes.reshape(shape)),
            scale=scales[0] if len(scales) == 1 else AffineScale(*scales),
            quantizer=quantizer_json.from_json(entry["quantizer"]),
            axes=None if entry["axes"] is None else tuple(entry["axes"]),
            stacked=entry["stacked"],
            dtype=entry["dtype"],
            bits=entry["bits"],
        )
    flat = {
        tuple(name.split("/")[1:]): jnp.asarray(value, content["widened"].get(name, value.dtype))
        for name, value in tensors.items()
        if name.startswith(f"{VARIABLES}/")
    }
    rules = [_act_rule(path, entry) for path, entry in content["acts"].items()]
    bits = _bits_from_json(content["bits"])
    return Exported(
        inject(module, rules), stored, unflatten_dict(flat), bits, dict(content["call"]), content.get("config")
    )


def _decoded(stored: Mapping[str, Stored], rest: Mapping[str, Any]) -> dict[str, Any]:
    flat = {("params", *name.split("/")): value.decode() for name, value in stored.items()}
    return unflatten_dict({**flatten_dict(rest), **flat})


def _without_weights(bits: Bits) -> Any:
    if isinstance(bits, Mapping):
        return {path: Precision(acts=each.acts) for path, each in bits.items()}
    return Precision(acts=bits.acts)


def _act_rule(path: str, entry: Mapping[str, Any]) -> Rule:
    quantizer = quantizer_json.from_json(entry["quantizer"])
    return Rule(path=re.escape(path), acts=entry["bits"], weight_quantizer=None, act_quantizer=quantizer)


def _bits_from_json(value: Mapping[str, Any]) -> Bits:
    if "layers" in value:
        return {path: Precision(**each) for path, each in value["layers"].items()}
    return Precision(**value)
