"""A train step compiled: its time to compile, its memory, and what its matrix products run on."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qtrain.bench.suites import Case
from qtrain.errors import UsageError
from qtrain.precision import Precision

Forward = Callable[[Any, Any, Precision, jax.Array], tuple[jax.Array, Any]]
"""``(variables, inputs, bits, key) -> (outputs, updated collections)``: an arm's way through a case's model."""

_PRODUCTS = ("dot_general", "conv_general_dilated")
_LIBRARIES = ("cublas", "cudnn", "onednn", "hipblas")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
      call: ``(state, inputs, labels, bits, key) -> (state, (loss, input gradient))``; `state` is donated.
      seconds: tracing, lowering and compiling, wall time.
      peak_bytes: temporaries of the program, ``memory_analysis().temp_size_in_bytes``: without arguments and results.
      requested: operand dtype → number of dots and convolutions that the traced step asks for.
      compiled: the same in the optimized program, where a backend may have widened them (an int8 product that it
        carries out in ``s32`` gains nothing). Empty where the program's text shows none.
    """

    call: Callable[..., Any]
    seconds: float
    peak_bytes: int | None
    requested: dict[str, int]
    compiled: dict[str, int]


def train_step(case: Case, forward: Forward) -> Callable[..., Any]:
    """The whole step, not jitted: loss, gradients of the parameters and (where the case says so) the input, update."""
    argnums = (0, 1) if case.input_gradient else (0,)

    def step(state: Any, inputs: Any, labels: Any, bits: Precision, key: jax.Array) -> Any:
        params, others, opt_state, count = state
        key = jax.random.fold_in(key, count)

        def loss_fn(params: Any, inputs: Any) -> Any:
            outputs, updated = forward({"params": params, **others}, inputs, bits, key)
            return case.loss(outputs, labels), dict(updated)

        (loss, others), grads = jax.value_and_grad(loss_fn, argnums, has_aux=True)(params, inputs)
        updates, opt_state = case.optimizer.update(grads[0], opt_state, params)
        return (optax.apply_updates(params, updates), others, opt_state, count + 1), (loss, grads[1:])

    return step


def initial_state(case: Case) -> Any:
    """Parameters, other collections, optimizer state and step count, as numpy arrays: every arm starts from them."""
    model = case.model(jnp.float32)

    @jax.jit
    def create(key: jax.Array, inputs: jax.Array) -> Any:
        variables = model.init(key, inputs, **case.arguments)
        others = {name: value for name, value in variables.items() if name != "params"}
        return variables["params"], others, case.optimizer.init(variables["params"]), jnp.zeros((), jnp.int32)

    return jax.device_get(create(jax.random.key(0), case.inputs[:2]))


def compile_step(step: Callable[..., Any], arguments: tuple[Any, ...]) -> Program:
    """`step` traced, lowered and compiled for `arguments`, with its first argument donated."""
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    requested = collections.Counter(_products(traced.jaxpr))
    peak = None if memory is None else int(memory.temp_size_in_bytes)
    return Program(compiled, seconds, peak, dict(requested), products_in_hlo(compiled.as_text() or ""))


def check_settings() -> None:
    """Refuse process-wide settings under which "float32" would be something else.

    Raises:
      UsageError: naming the setting.
    """
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UsageError("qtrain bench: JAX_ENABLE_X64 is set, so float32 is no default here; unset it")
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if precision not in (None, "default", "highest", "float32"):
        raise UsageError(
            f"qtrain bench: JAX_DEFAULT_MATMUL_PRECISION={precision} computes float32 products in fewer bits; unset it "
            "or give 'highest'"
        )


def check_baseline(program: Program) -> None:
    """Refuse a float32 baseline any of whose products is in another type.

    Raises:
      UsageError: naming the types.
    """
    if set(program.requested) != {"float32"}:
        found = ", ".join(f"{count} in {dtype}" for dtype, count in program.requested.items())
        raise UsageError(f"qtrain bench: the float32 baseline's products are {found}; a default dtype has been changed")


def _products(jaxpr: Any) -> Iterator[str]:
    """Operand dtypes of the dots and convolutions in a jaxpr and all it contains."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name in _PRODUCTS:
            lhs, rhs = (str(atom.aval.dtype) for atom in equation.invars[:2])
            yield lhs if lhs == rhs else f"{lhs} x {rhs}"
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _products(inner)


_DEFINITION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = \(?(\w+)\[[^=]*? ([\w-]+)\((%[\w.-]+)?(?:, (%[\w.-]+))?")


def products_in_hlo(text: str) -> dict[str, int]:
    """Operand types (as HLO names them: f32, bf16, s8, s32) of the products in an optimized program's text."""
    counts: collections.Counter[str] = collections.Counter()
    types: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            types = {}  # names are unique within a computation alone
        found = _DEFINITION.match(line)
        if found is None:
            continue
        name, dtype, operation, lhs, rhs = found.groups()
        types[name] = dtype
        library = operation == "custom-call" and any(word in line for word in _LIBRARIES)
        if operation in ("dot", "convolution") or library:
            pair = types.get(lhs or "", "?"), types.get(rhs or "", "?")
            counts[pair[0] if pair[0] == pair[1] else " x ".join(pair)] += 1
    return dict(counts)
