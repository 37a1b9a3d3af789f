"""Parameters that quantizers learn: where they are kept, how they begin, and how a layer gets at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.inject.rules import Rule
from qtrain.quantizers import Quantizer, layout

Array = jax.Array

LEARNED = "quant"
"""The collection of learned quantizer parameters: module path → "weights", "acts" or "bias" → name → array."""


@dataclasses.dataclass
class Learned:
    """The learned parameters of one pass.

    A layer reads them from its own scope; where that does not reach the collection (the body of an ``nn.scan`` whose
    ``variable_axes`` do not list it), from the whole tree, closed over, so that one set serves every iteration.

    Attributes:
      tree: the collection.
      create: make them anew, from the tensors of this pass.
      observe: with `create`, see what cannot be written; only where the pass is run, not merely traced.
      shared: (path, name) → parameters of a layer whose scope does not reach the collection. In a pass that creates,
        what they are for a standard normal tensor: values cannot leave a transformation but by a callback.
      seen: the same from the tensors themselves, an entry for each iteration; filled while the pass runs.
      outside: (path, name) → parameters of what is quantized outside any module's call, made by a pass that creates.
      shapes: (path, name) → what a pass that creates has made, as the layer sees it.
    """

    tree: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    create: bool = False
    observe: bool = False
    shared: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)
    seen: dict[tuple[str, str], list[Any]] = dataclasses.field(default_factory=dict)
    outside: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)
    shapes: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)

    def parameters(
        self,
        scope: flax.core.Scope,
        path: str,
        name: str,
        quantizer: Quantizer | None,
        x: Array,
        bits: Any,
        axes: tuple[int, ...] | None = None,
    ) -> Any:
        """The parameters of a layer's quantizer, or None for one that learns nothing.

        Raises:
          UsageError: when there are none.
        """
        if quantizer is None or not quantizer.learns:
            return None
        if scope.has_variable(LEARNED, name):
            return scope.get_variable(LEARNED, name)
        if self.create:
            return self._created(scope, path, name, quantizer, x, 8 if bits is None else bits, axes)
        found = self.at(path).get(name)
        if found is None:
            raise UsageError(
                f"layer {path!r}: its {name} have no learned parameters in collection {LEARNED!r}; make them with "
                "qmodel.init, or from variables that have none with qmodel.calibrate"
            )
        return found

    def at(self, path: str) -> Mapping[str, Any]:
        """What is kept for a module, and for the modules below it."""
        found: Any = self.tree
        for key in path.split("/") if path else ():
            found = found.get(key, {})
        return found

    def _created(
        self, scope: flax.core.Scope, path: str, name: str, quantizer: Quantizer, x: Array, bits: Any, axes: Any
    ) -> Any:
        try:
            created = quantizer.init(jax.lax.stop_gradient(x), bits, axes=axes)
        except UsageError as error:
            raise UsageError(f"layer {path!r}: its {name} by {quantizer.describe()!r}: {error}") from None
        self.shapes[path, name] = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), created)
        if scope.is_mutable_collection(LEARNED):
            scope.put_variable(LEARNED, name, created)
            return created
        with jax.ensure_compile_time_eval():
            normal = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
            default = 8 if isinstance(bits, jax.core.Tracer) else bits
            self.shared[path, name] = quantizer.init(normal, default, axes=axes)
        if self.observe:
            seen = self.seen.setdefault((path, name), [])
            jax.debug.callback(lambda values: seen.append(jax.tree.map(np.asarray, values)), created)
        return created

    def merged(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """`own`, as the pass wrote it, with the parameters of the layers it could not write."""
        merged: dict[str, Any] = jax.tree.map(lambda x: x, dict(own))
        averages = {
            key: jax.tree.map(lambda *each: jnp.mean(jnp.stack(each), 0), *seen)
            if (seen := self.seen.get(key))
            else own
            for key, own in self.shared.items()
        }
        for (path, name), values in {**averages, **self.outside}.items():
            place = merged
            for key in path.split("/") if path else ():
                place = place.setdefault(key, {})
            place[name] = values
        return merged


def check_learned(rule: Rule, path: str, shape: tuple[int, ...], contracted: tuple[int, ...]) -> None:
    """Refuse learned parameters of activations whose shape would depend on the batch.

    Raises:
      UsageError: naming the layer.
    """
    quantizer = rule.act_quantizer
    if quantizer is None or not quantizer.learns:
        return
    per = getattr(quantizer, "per", "tensor")
    # A scale a channel is shared along the batch: the only axis that another batch has another length of.
    kept = layout(shape, per, contracted).scale_shape
    if len(shape) > 1 and kept[0] != 1:
        raise UsageError(
            f"layer {path!r}: act_quantizer {quantizer.describe()!r} learns a scale per example, which has no meaning "
            "for another batch; use per='tensor'"
        )
