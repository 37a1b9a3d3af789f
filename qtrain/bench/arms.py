"""The arms: each case's train step in float32, in bfloat16, by qtrain, by AQT and by Qwix."""

from __future__ import annotations

import dataclasses
import gc
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qtrain
from qtrain.bench import ARMS, BASELINE, REFERENCE, peers
from qtrain.bench.programs import Forward, Program, check_baseline, compile_step, initial_state, train_step
from qtrain.bench.suites import WIDTHS, Case, Execution
from qtrain.errors import UsageError
from qtrain.precision import Precision
from qtrain.quantizers import Contraction, Operands, Traced

TRACED, ONE, SEVEN, SWITCH = "traced", "one program", "seven programs", "lax.switch"
"""How an arm of suite ``schedule`` visits seven precisions."""


@dataclasses.dataclass
class Runner:
    """An arm of a case, ready to be measured; or, without programs, the reason why there is none.

    Attributes:
      arm, case, how: what it is; `how` names the way through a schedule.
      visits: what one visit runs in order: a program and the bits it is given.
      arguments: inputs, labels; and the key.
      state: what the next step starts from.
      programs: those that were compiled for it.
      first_loss, first_update_norm: of the first step, the norm being that of the parameters' change: what is timed
        is seen to compute what it should.
    """

    arm: str
    case: Case
    how: str = ""
    note: str = ""
    programs: list[Program] = dataclasses.field(default_factory=list)
    visits: list[tuple[Program, Precision]] = dataclasses.field(default_factory=list)
    arguments: tuple[Any, ...] = ()
    state: Any = None
    first_loss: float | None = None
    first_update_norm: float | None = None

    def run(self, repeats: int = 1) -> None:
        """`repeats` visits, waited for."""
        inputs, labels, key = self.arguments
        results = None
        for _ in range(repeats):
            for program, bits in self.visits:
                self.state, results = program.call(self.state, inputs, labels, bits, key)
        jax.block_until_ready((self.state, results))


def runners(case: Case, arms: tuple[str, ...]) -> list[Runner]:
    """The baselines and the chosen arms of `case`, compiled and run once; float32 comes first.

    Raises:
      UsageError: for a baseline that does not compute in float32.
    """
    chosen = [arm for arm in ARMS if arm in arms or arm == BASELINE]
    if case.reference:
        chosen.insert(1, REFERENCE)
    state = initial_state(case)
    found = []
    for arm in chosen:
        hows = _ways(arm) if case.suite == "schedule" else ("",)
        found += [_runner(arm, case, how, state) for how in hows]
    return found


def _ways(arm: str) -> tuple[str, ...]:
    """The ways of an arm through a schedule."""
    if arm.startswith("aqt"):
        return SEVEN, SWITCH
    return (TRACED if arm.startswith("qtrain") else SWITCH if arm.startswith("qwix") else ONE,)


def _runner(arm: str, case: Case, how: str, state: Any) -> Runner:
    """One arm; one that cannot run here has a note that says why, and no programs."""
    try:
        with warnings.catch_warnings():
            if arm.startswith(("aqt", "qwix")):
                warnings.simplefilter("ignore")
            return _compiled(arm, case, how, state)
    except (peers.Unavailable, UsageError) as reason:
        if arm in (BASELINE, REFERENCE):
            raise
        return Runner(arm, case, how, str(reason))
    except Exception as error:  # a peer's failure is a result, whatever it is; ours is a bug
        if not arm.startswith(("aqt", "qwix")):
            raise
        return Runner(arm, case, how, f"does not run here: {peers.describe(error)}")


def _compiled(arm: str, case: Case, how: str, state: Any) -> Runner:
    grads = jnp.float32(case.bits)
    widths = WIDTHS if how else (case.bits,)
    bits = [Precision(jnp.float32(width), jnp.float32(width), grads) for width in widths]
    inputs = jnp.asarray(case.inputs, jnp.bfloat16) if _casts(arm, case) else jnp.asarray(case.inputs)
    labels = None if case.labels is None else jnp.asarray(case.labels)
    arguments = (inputs, labels, jax.random.key(1))
    initial, state = state, jax.device_put(state)  # its own: a step donates it

    forwards, note = _forwards(arm, case, widths)
    steps = [train_step(case, forward) for forward in forwards]
    if how == SWITCH:
        steps = [_switched(steps)]
    # Caches of the arms before would make a later arm's compilation look short.
    jax.clear_caches()
    gc.collect()
    programs = [compile_step(step, (state, inputs, labels, bits[0], arguments[-1])) for step in steps]
    if arm in (BASELINE, REFERENCE):
        check_baseline(programs[0])
    visits = [(programs[index % len(programs)], bits[index]) for index in range(len(bits))]
    runner = Runner(arm, case, how, note, programs, visits, arguments, state)
    _first_step(runner, initial)
    runner.run()
    if arm.startswith("qtrain"):
        _serve_every_width(runner)
    return runner


def _casts(arm: str, case: Case) -> bool:
    return arm == "bfloat16" and jnp.issubdtype(case.inputs.dtype, jnp.floating)


def _forwards(arm: str, case: Case, widths: tuple[int, ...]) -> tuple[list[Forward], str]:
    """A forward pass for each width, or one for all; and what there is to say about it."""
    if arm in (BASELINE, "bfloat16"):
        dtype = jnp.float32 if arm == BASELINE else jnp.bfloat16
        note = "activations and products in bfloat16, parameters and update in float32"
        if arm == BASELINE:
            tf32 = jax.default_backend() == "gpu" and "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ
            note = "products may run in TF32: JAX_DEFAULT_MATMUL_PRECISION=highest forbids it" if tf32 else ""
        return [_plain(case, dtype)], note
    if arm == REFERENCE:
        note = "float32 with every convolution's input and cotangent written out before it is used"
        return [_injected(case, "fake", materialised)], note
    if arm.startswith("qtrain"):
        execution: Execution = "native" if arm == "qtrain_native" else "fake"
        return [_injected(case, execution)], f"bits are traced: one program runs at {_range(WIDTHS)}"
    # In a schedule the gradients keep the bits of its end, as in the papers.
    backward = case.bits if arm.endswith("int8") else None
    if arm.startswith("aqt"):
        return [peers.aqt_forward(case, width, backward) for width in widths], peers.aqt_note(case, backward)
    return [peers.qwix_forward(case, width, backward) for width in widths], peers.qwix_note(case, backward)


def _plain(case: Case, dtype: Any) -> Forward:
    model = case.model(dtype)

    def forward(variables: Any, inputs: Any, bits: Any, key: jax.Array) -> Any:
        mutable = [name for name in variables if name != "params"]
        return model.apply(variables, inputs, mutable=mutable, **case.arguments)

    return forward


def _injected(case: Case, execution: Execution, execute: Any = None) -> Forward:
    options = {} if execute is None else {"execute": execute}
    # No width above 8 will come: without that promise the native arm would hold a float program as well.
    qmodel = qtrain.quantize(case.model(jnp.float32), case.rules(execution), widest=WIDTHS[-1], **options)

    def forward(variables: Any, inputs: Any, bits: Precision, key: jax.Array) -> Any:
        mutable = [name for name in variables if name != "params"]
        return qmodel.apply(variables, inputs, bits=bits, rngs={"quant": key}, mutable=mutable, **case.arguments)

    return forward


def _switched(steps: list[Callable[..., Any]]) -> Callable[..., Any]:
    """One step that holds all of them and runs the one that the bits choose."""

    def step(state: Any, inputs: Any, labels: Any, bits: Precision, key: jax.Array) -> Any:
        index = bits.weights.astype(jnp.int32) - WIDTHS[0]
        return jax.lax.switch(index, [partial(one, bits=bits, key=key) for one in steps], state, inputs, labels)

    return step


def _first_step(runner: Runner, initial: Any) -> None:
    program, bits = runner.visits[-1]
    inputs, labels, key = runner.arguments
    runner.state, (loss, _) = program.call(runner.state, inputs, labels, bits, key)
    runner.first_loss = float(loss)
    changes = jax.tree.map(lambda new, old: np.asarray(new) - old, runner.state[0], initial[0])
    runner.first_update_norm = float(np.sqrt(sum(np.square(change).sum() for change in jax.tree.leaves(changes))))


def _serve_every_width(runner: Runner) -> None:
    """Run the one program at every width: an executable cannot compile again, so that it is one is certain."""
    (program,) = runner.programs
    inputs, labels, key = runner.arguments
    for width in WIDTHS:
        bits = Precision(jnp.float32(width), jnp.float32(width), jnp.float32(8))
        runner.state, (loss, _) = program.call(runner.state, inputs, labels, bits, key)
        if not jnp.isfinite(loss):
            raise FloatingPointError(f"{runner.arm} at {width} bits: the loss is {loss}")


def materialised(op: Contraction, operands: Operands, lhs: jax.Array, rhs: jax.Array, traced: Traced) -> jax.Array:
    """The float contraction, its input and its result's cotangent written to memory: `execute` of `qtrain.quantize`.

    XLA for CPUs fuses the chain of element-wise operations before a convolution into each of its consumers, and
    computes it again in all of them: in a residual network O(depth²) work. A gather with the identity as its index,
    which the compiler does not see through, stops it. Native execution gains from the same, so that only the ratio to
    both baselines says what the integers gain.
    """
    return _materialised(op, lhs, rhs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _materialised(op: Contraction, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return op(_written(lhs), rhs)


def _materialised_forward(op: Contraction, lhs: jax.Array, rhs: jax.Array) -> Any:
    lhs = _written(lhs)
    return op(lhs, rhs), (lhs, rhs)


def _materialised_backward(op: Contraction, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> Any:
    lhs, rhs = saved
    g = _written(g)
    # Transposed, not differentiated: that would ask for the forward product once more.
    (d_lhs,) = jax.linear_transpose(lambda lhs: op(lhs, rhs), lhs)(g)
    (d_rhs,) = jax.linear_transpose(lambda rhs: op(lhs, rhs), rhs)(g)
    return d_lhs, d_rhs


_materialised.defvjp(_materialised_forward, _materialised_backward)


def _written(x: jax.Array) -> jax.Array:
    return jnp.take(x, jnp.arange(x.shape[0]), axis=0, mode="clip")


def _range(widths: tuple[int, ...]) -> str:
    return f"{widths[0]} to {widths[-1]} bits"
