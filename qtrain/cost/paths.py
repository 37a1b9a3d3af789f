"""Module paths, from the name stacks of traced equations."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtrain.cost.marker import OpBits, decode

_TRANSFORMED = re.compile(r"\w+\((.*)\)")


def scope_names(name_stack: str) -> tuple[str, ...]:
    """The scopes of one equation's name stack, outermost first, without the transformations around them.

    >>> scope_names("vmap(Net)/Dense_0")
    ('Net', 'Dense_0')
    """
    names = []
    for name in name_stack.split("/"):
        while match := _TRANSFORMED.fullmatch(name):
            name = match[1]
        if name:
            names.append(name)
    return tuple(names)


def read_marker(scopes: Sequence[str]) -> OpBits | None:
    """The marker of the innermost marked scope."""
    return next((marker for scope in reversed(scopes) if (marker := decode(scope)) is not None), None)


def module_path(scopes: Sequence[str], drop_root: bool) -> str:
    """The modules that a product was called in, ``/``-joined.

    Flax names a scope after the module, with the method unless it is ``__call__`` (``Dense_0``, ``GRUCell_0.step``);
    a method that calls its own module makes two scopes of one. ``jnp.einsum`` adds its subscripts. The outermost scope
    is the root module (`drop_root`), whose path is ``""``.
    """
    names: list[str] = []
    inside_method = False
    for scope in scopes:
        if "->" in scope or "," in scope:
            continue
        name, dot, _ = scope.partition(".")
        if not (inside_method and names[-1] == name):
            names.append(name)
        inside_method = bool(dot)
    return "/".join(names[1:] if drop_root else names)


def parent(name: Sequence[str], collections: bool) -> str:
    """The path of the module that owns a leaf: its name without the collection in front and its own name."""
    return "/".join(name[1:-1] if collections else name[:-1])
