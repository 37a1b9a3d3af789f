"""AQT and Qwix on the same layers, each in the setting its authors recommend for training."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import traceback
import warnings
from typing import Any

import jax
import jax.numpy as jnp

import qtrain
from qtrain.bench.programs import Forward
from qtrain.bench.suites import Case
from qtrain.inject import Plan
from qtrain.methods import aqt
from qtrain.precision import Precision
from qtrain.quantizers import Contraction, Dot, Operands, Traced

INSTALL = {"aqt": "pip install 'aqtp>=0.9'", "qwix": "pip install 'qtrain[peers]'"}


class Unavailable(Exception):
    """Why an arm cannot run; becomes the note of its row."""


def load(name: str, module: str) -> Any:
    """A peer's module.

    Raises:
      Unavailable: where it cannot be imported, with the command that installs it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # aqtp 0.9 warns of a coming numpy
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{name} is not installed ({error}); {INSTALL[name]}") from error
    except Exception as error:  # anything may go wrong inside another's package
        raise Unavailable(f"{name} cannot be imported ({describe(error)}); {INSTALL[name]}") from error


def check_grid(case: Case) -> None:
    """Refuse a grid that neither peer trains with on both operands and the gradient.

    Raises:
      Unavailable: naming it.
    """
    if case.grid != "symmetric":
        raise Unavailable(f"has no {case.grid} grid for weights, activations and gradients alike; see case symmetric")


def describe(error: BaseException) -> str:
    """An exception in one short line; one without a message by the line that raised it."""
    lines = str(error).strip().splitlines()
    if lines:
        return f"{type(error).__name__}: {lines[0][:200]}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    return f"{type(error).__name__} in {os.path.basename(frames[-1].filename)}: {frames[-1].line}"


def aqt_forward(case: Case, bits: int, backward: int | None) -> Forward:
    """AQT on the layers that the case quantizes.

    ``config_v4``, AQT's latest: its forward pass in `bits`; both backward products in float, or both in `backward` bits
    with the gradient rounded stochastically, as it is by that config, and noise from ``jax.random``.

    Raises:
      Unavailable: where AQT is not installed, or has no such operation or grid.
    """
    check_grid(case)
    config = load("aqt", "aqt.jax.v2.config")
    load("aqt", "aqt.jax.v2.aqt_conv_general")
    if backward is not None and has_convolutions(case):
        raise Unavailable("aqtp has no backward pass for convolutions, let alone a quantized one")
    plain = tuple(dataclasses.replace(rule, execution="fake", residuals="original") for rule in case.rules("fake"))

    def quantized_backward(op: Contraction, operands: Operands, lhs: Any, rhs: Any, traced: Traced) -> jax.Array:
        if traced.lhs_bits is None or traced.rhs_bits is None:
            return op(lhs, rhs)
        assert isinstance(op, Dot) and traced.seed is not None
        key = jax.random.wrap_key_data(traced.seed, impl="threefry2x32")
        dot = config.config_v4(fwd_bits=bits, dlhs_bits=backward, drhs_bits=backward)
        dot = config.set_context(dot, key, train_step=None)
        return dot(lhs, rhs, op.dimension_numbers, precision=op.precision)

    execute = aqt.execute if backward is None else quantized_backward
    qmodel = qtrain.quantize(case.model(jnp.float32), aqt.aqt_rules(plain), execute=execute)
    frozen = Precision(bits, bits)

    def forward(variables: Any, inputs: Any, bits: Any, key: jax.Array) -> Any:
        mutable = [name for name in variables if name != "params"]
        return qmodel.apply(variables, inputs, bits=frozen, rngs={"quant": key}, mutable=mutable, **case.arguments)

    return forward


def aqt_note(case: Case, backward: int | None) -> str:
    """The setting of AQT's arm."""
    if backward is not None:
        return f"config_v4(dlhs_bits={backward}, drhs_bits={backward}): gradients rounded stochastically by jax.random"
    note = "config_v4(dlhs_bits=None, drhs_bits=None): float backward"
    if has_convolutions(case):
        note += "; its convolutions multiply codes in float and have no gradient: ours, straight-through, is used"
    return note


def qwix_forward(case: Case, bits: int, backward: int | None) -> Forward:
    """Qwix's quantized training on the layers that the case quantizes.

    Raises:
      Unavailable: where Qwix is not installed, or has no such grid.
    """
    check_grid(case)
    qwix = load("qwix", "qwix")
    layers = [row.path for row in _plan(case) if row.quantized]
    rule = qwix.QtRule(
        module_path="|".join(map(re.escape, layers)),
        weight_qtype=_qtype(bits),
        act_qtype=_qtype(bits),
        bwd_qtype=None if backward is None else _qtype(backward),
    )
    model = qwix.quantize_model(case.model(jnp.float32), qwix.QtProvider([rule]))

    def forward(variables: Any, inputs: Any, bits: Any, key: jax.Array) -> Any:
        mutable = [name for name in variables if name != "params"]
        return model.apply(variables, inputs, mutable=mutable, **case.arguments)

    return forward


def qwix_note(case: Case, backward: int | None) -> str:
    """The setting of Qwix's arm."""
    setting = "float backward" if backward is None else f"bwd_qtype=int{backward}, rounded to nearest as is its default"
    return f"QtRule on the layers that the other arms quantize; {setting}"


def _qtype(bits: int) -> Any:
    """Qwix's name of a width: a dtype where there is one."""
    return {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")


def has_convolutions(case: Case) -> bool:
    """Whether the case quantizes any."""
    return any(row.quantized and row.op == "conv" for row in _plan(case))


@functools.lru_cache(maxsize=1)
def _plan(case: Case) -> Plan:
    """Which layers the case quantizes."""
    qmodel = qtrain.quantize(case.model(jnp.float32), case.rules("fake"))
    return qmodel.plan(jax.ShapeDtypeStruct(case.inputs.shape, case.inputs.dtype), **case.arguments)
