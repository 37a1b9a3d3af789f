"""Stored integers at another width: which bits are asked for, and the shift that makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from qtrain.errors import UsageError, did_you_mean
from qtrain.export.encode import Stored
from qtrain.inject import per_width
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS, DoubleRounding, shift
from qtrain.quantizers.base import static_bits
from qtrain.quantizers.double_rounding import NARROWEST

Bits = Precision | Mapping[str, Precision]
Request = int | Precision | Mapping[str, "int | Precision"]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a file holds: all that any of its widths is made from, in the memory of the host.

    Attributes:
      stored: name of a quantized parameter → its codes and scales, arrays of numpy.
      rest: the other variables, of norms that are held once per width all rows of them.
      bits: the precision it was exported at.
      layers: path of a quantized layer → bits of its weights where a rule fixes them, None where they follow.
      acts: the same of the activations; of the layers that quantize them.
      widths: that variables of norms are held at, descending; row i is that of widths[i].
      rows: name of a variable that has rows → path of the layer whose weights' bits choose one, or None: the first.
    """

    stored: Mapping[str, Stored]
    rest: Mapping[str, Any]
    bits: Bits
    layers: Mapping[str, int | None]
    acts: Mapping[str, int | None]
    widths: tuple[int, ...]
    rows: Mapping[str, str | None]

    def requested(self, bits: Request) -> Bits:
        """`bits` as evaluation takes them: a `Precision`, or one for each layer that follows the schedule.

        A number is the bits of the weights, and of the activations where these were equal in the export. A layer that a
        mapping leaves out stays as exported.

        Raises:
          UsageError: for what is no width, an unknown layer, or one whose bits are fixed.
        """
        if not isinstance(bits, Mapping):
            if isinstance(bits, Precision) or not isinstance(self.bits, Mapping):
                return _precision("bits", bits, at(self.bits, ""))
            return {path: _precision("bits", bits, own) for path, own in self.bits.items()}
        both = {path: (self.layers.get(path, 0), self.acts.get(path, 0)) for path in (*self.layers, *self.acts)}
        followers = [path for path, kinds in both.items() if None in kinds]
        for path in bits:
            if path not in both:
                hint = did_you_mean(str(path), followers)
                raise UsageError(f"bits[{path!r}]: no layer of that path is quantized.{hint}")
            if path not in followers or (both[path][0] is not None and not isinstance(bits[path], Precision)):
                raise UsageError(
                    f"bits[{path!r}]: a rule of the run fixes this layer at {both[path][0] or both[path][1]} bits, "
                    "whatever those of the others; leave it out"
                )
        own = {path: at(self.bits, path) for path in followers}
        return {
            path: _precision(f"bits[{path!r}]", bits[path], own[path]) if path in bits else own[path]
            for path in followers
        }

    def narrowed(
        self, bits: Bits, place: Callable[[Stored], Stored] = lambda one: one
    ) -> tuple[dict[str, Stored], dict[str, Any]]:
        """Codes and the other variables at `bits`, of `requested`: arrays of numpy.

        Each parameter goes through `place` as soon as it is made, so that there is one copy of the whole at most.

        Raises:
          UsageError: for a layer that cannot be had at its width.
        """
        self._check(bits)
        stored = {
            name: place(one if one.fixed else narrowed(one, int(at(bits, one.layer).weights)))
            for name, one in self.stored.items()
        }
        return stored, self.rest_at(bits)

    def rest_at(self, bits: Bits) -> dict[str, Any]:
        """The other variables, each norm with the row of its width alone."""
        return select(self.rest, self.rows, self.widths, bits)

    def _check(self, bits: Bits) -> None:
        for path, fixed in self.layers.items():
            width, own = at(bits, path).weights, at(self.bits, path).weights
            if fixed is not None or width == own:
                continue
            if width is None:
                raise UsageError(f"bits: weights=None leaves {path!r} in float, and the file holds its integers alone")
            found = {name: one for name, one in self.stored.items() if one.layer == path}
            if not found and width < FLOAT_BITS:
                raise UsageError(
                    f"bits: {path!r} was exported in float ({own} bits) and has no integers to make {width} bits from; "
                    "export it at the widest that is needed"
                )
            for name, one in found.items():
                _check_narrowing(name, one, width)


def select(
    variables: Mapping[str, Any], rows: Mapping[str, str | None], widths: tuple[int, ...], bits: Bits
) -> dict[str, Any]:
    """`variables` with the row that `bits` use alone, of those that have `rows` (as `Source` names them)."""

    def one(name: str, value: Any) -> Any:
        if name not in rows:
            return value
        layer = rows[name]
        return value[0 if layer is None else per_width.row(widths, at(bits, layer).weights)]

    flat = flatten_dict(variables, keep_empty_nodes=True)
    return unflatten_dict({keys: one("/".join(keys), value) for keys, value in flat.items()})


def narrowed(stored: Stored, bits: int) -> Stored:
    """`stored` at `bits`, by a shift of its integers: int8 to int8, without a copy that is wider."""
    if bits == stored.bits:
        return stored
    quantizer: Any = stored.quantizer
    codes = shift(stored.codes, quantizer.high - bits, quantizer.high)
    _, scale = quantizer.narrowed(stored.codes[:0], stored.scale, bits)
    return dataclasses.replace(stored, codes=codes, scale=scale, bits=bits)


def can_narrow(stored: Stored) -> bool:
    """Whether other widths follow from its integers: of `DoubleRounding`, all h bits of them, and not fixed."""
    return not stored.fixed and isinstance(stored.quantizer, DoubleRounding) and stored.bits == stored.quantizer.high


def code_dtype(stored_bits: int) -> str:
    """The narrowest that a shift of integers of that width works in."""
    return next(f"int{size}" for size in (8, 16, 32) if stored_bits <= size)


def _check_narrowing(name: str, stored: Stored, width: int) -> None:
    quantizer = stored.quantizer
    if not isinstance(quantizer, DoubleRounding):
        raise UsageError(
            f"bits: {name!r} was quantized by {quantizer.describe()!r} to {stored.bits} bits, and only the integers of "
            f"double_rounding give other widths; export the run at {width} bits"
        )
    if not can_narrow(stored):
        raise UsageError(
            f"bits: {name!r} was exported at {stored.bits} of {quantizer.high} bits, and {width} bits follow exactly "
            f"only from all {quantizer.high}; export at {quantizer.high} bits"
        )
    if not NARROWEST <= width <= quantizer.high:
        raise UsageError(
            f"bits: {name!r} is stored in {quantizer.high} bits, and {width} cannot be made from them; give "
            f"{NARROWEST} to {quantizer.high}"
        )


def at(bits: Bits, path: str) -> Precision:
    """The bits of a layer."""
    return bits.get(path, Precision()) if isinstance(bits, Mapping) else bits


def _precision(key: str, given: Any, own: Precision) -> Precision:
    """`given` as a `Precision` of Python numbers; activations that had the bits of the weights get them again."""
    if isinstance(given, Precision):
        return Precision(weights=_width(key, given.weights), acts=_width(key, given.acts))
    width = _width(key, given)
    if width is None:
        raise UsageError(f"{key}=None is no width; give a whole number of bits, or a qtrain.Precision")
    return Precision(weights=width, acts=width if own.acts == own.weights else own.acts)


def _width(key: str, value: Any) -> int | None:
    if value is None:
        return None
    number = None if isinstance(value, bool | jax.core.Tracer) else _static(value)
    if number is None:
        raise UsageError(f"{key}={value!r} is no width; give a whole number of bits of at least 1, or a Precision")
    return number


def _static(value: Any) -> int | None:
    try:
        return static_bits(value)
    except UsageError:
        return None
