"""Attention, whatever function computes it: its products of two activations, quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from qtrain.inject.injected import Injected
from qtrain.inject.staged import replay
from qtrain.quantizers import Contraction

Array = jax.Array


def attention(function: Callable[..., Any], site: Callable[[str], Injected]) -> Callable[..., Any]:
    """`function`, its first product carried out by ``site("qk")``, the second by ``site("pv")``.

    It is traced by itself, so that what it does need not be known: masks, dropout, a softmax of the author's, heads in
    another order. Products inside a loop of its own (an attention in blocks) stay in float, and the plan shows them.
    Further ones are ``product_2`` and so on.
    """

    @functools.wraps(function)  # flax passes what the signature names
    def quantized(query: Array, key: Array, value: Array, **options: Any) -> Any:
        count = 0

        def product(op: Contraction, lhs: Array, rhs: Array, leaf: str | None) -> Array:
            nonlocal count
            name = ("qk", "pv")[count] if count < 2 else f"product_{count}"
            count += 1
            return site(name).product(op, lhs, rhs)

        module = options.get("module")
        sowing = _Sowing(module)

        def pure(_: Any, inputs: tuple[Array, Array, Array]) -> Any:
            stand_in = {} if module is None else {"module": sowing}
            return function(*inputs, **{**options, **stand_in}), sowing.values

        out, values = replay(pure, {}, (query, key, value), product)
        for (args, kwargs), sown in zip(sowing.calls, values, strict=True):
            sowing.module.sow(*args, sown, **kwargs)
        return out

    return quantized


class _Sowing:
    """Stands in for a module in a function that is traced: what it sows leaves the trace as an output."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls: list[tuple[tuple[Any, str], dict[str, Any]]] = []
        self.values: list[Any] = []

    def sow(self, collection: Any, name: str, value: Any, **kwargs: Any) -> bool:
        """As the module's."""
        self.calls.append(((collection, name), kwargs))
        self.values.append(value)
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)
