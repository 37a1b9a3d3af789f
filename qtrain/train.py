"""The trainer: one loop for every method."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qtrain import cost, data, processes, sharding, workdir
from qtrain.checkpoint import Checkpoints
from qtrain.config import check_keys
from qtrain.drive import Interleaved, drive
from qtrain.errors import Diverged
from qtrain.experiment import Experiment, describe
from qtrain.metrics import norm_rows
from qtrain.packing import Packed, unpack
from qtrain.programs import Programs
from qtrain.progress import Progress
from qtrain.schedules import BudgetKeeper
from qtrain.size import size_summary
from qtrain.start import as_started, prepared
from qtrain.state import TrainState, averages
from qtrain.writers import MetricsWriter

PROFILED_STEPS = (10, 20)
"""The steps of a process that ``--profile`` records: after compilation, before anything grows large."""


def train(
    config: ConfigDict,
    folder: str,
    *,
    quiet: bool = False,
    profile: bool = False,
    stopped: threading.Event | None = None,
) -> dict[str, Any]:
    """Train as `config` says, in the run's `folder`; resume if it holds this run already.

    Where ``jax.distributed`` was started, every process calls this with the same config and the same folder, on a file
    system that all of them see; see `qtrain.processes`.

    Args:
      config: from a config's ``get_config()``.
      folder: gets config.json, metrics.jsonl, TensorBoard files, checkpoints, summary.json and DONE.
      quiet: no plan and no progress.
      profile: write a trace of ten steps to ``folder/profile``.
      stopped: set by the caller where SIGTERM would stop the run; None: SIGTERM does.

    Returns:
      The summary, as in summary.json.

    Raises:
      UsageError: for a mistake in the config or the folder, before anything is compiled.
      Diverged: when the loss or its gradient is not finite; no checkpoint is written of such a state.
      Preempted: after SIGTERM, once a checkpoint is written.
    """
    check_keys(config)
    processes.check_same(config.to_dict())
    experiment, mesh, loaded = processes.together(lambda: prepared(config, folder))
    with (
        _sigterm() if stopped is None else nullcontext(stopped) as stopped
    ):  # from here on there is something to save or to resume
        status = processes.on_first(lambda: workdir.prepare(folder, config.to_dict(), workdir.package_versions()))
        if status == "done":
            return processes.on_first(lambda: workdir.read_summary(folder))
        experiment = as_started(experiment, folder)
        quiet = quiet or not processes.first()
        if not quiet:
            print(describe(experiment), flush=True)
        return Run(experiment, Path(folder), mesh, status == "resume", quiet, profile, loaded)(stopped)


class Run:
    """One run in its folder: its state, rows, evaluations, checkpoints and summary; the steps are taken by `drive`."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        mesh: Mesh,
        resume: bool,
        quiet: bool,
        profile: bool,
        loaded: dict[str, Any] | None,
        programs: Programs | None = None,
    ):
        self.experiment, self.folder, self.mesh = experiment, folder, mesh
        self.config = config = experiment.config
        self.per_dispatch = config.train.steps_per_dispatch
        self.profile = profile and processes.first()
        self.programs = Programs(experiment, mesh) if programs is None else programs
        self.evaluator = self.programs.evaluator.of(experiment)
        self._quality = f"{config.eval.splits[0]}_{experiment.task.metric}"
        self.shardings = self.programs.shardings
        self.schedules = experiment.tables()
        self.tables = self.programs.placed(self.schedules)
        self.key = self.programs.key(config.seed)
        self.fingerprint = data.fingerprint(
            experiment.dataset, config.data.batch_size, config.data.seed, config.data.repeat
        )
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, self._quality)
        self.metadata: dict[str, Any] = {"elapsed": 0.0, "compilations": 0}
        self.state = self._initial_state(resume, loaded)
        self._averages = jax.eval_shape(averages(experiment.task, self.state.params, config.train.layer_norms).empty)
        self.start = int(self.state.step)
        self.writer = MetricsWriter(folder, self.start if self.start else None, enabled=processes.first())
        self.progress = Progress(
            experiment.total_steps, self.start, elapsed_before=self.metadata["elapsed"], enabled=not quiet
        )
        self._parts = ExitStack()
        for part in (self.checkpoints, self.writer, self.progress):
            self._parts.enter_context(part)
        self.evaluated: dict[str, float] = {}
        self.evaluated_at = -1
        self.pending: tuple[int, Mapping[str, Any], dict[str, Any]] | None = None
        self.rows: Any = None  # of the batch that is on the devices
        self.batch: Any = None
        self.asked = False  # whether some process was asked to stop, known to all at the same step

    def __call__(self, stopped: threading.Event) -> dict[str, Any]:
        """Train to the end, by itself; the summary."""
        return drive([self], Interleaved(self.programs), stopped)[0]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End what is being written; again: nothing."""
        self._parts.close()

    def due(self, step: int) -> bool:
        """Whether the state is evaluated or saved before `step` is taken."""
        return step > self.start and (
            _due(step, self.experiment.eval_every) or _due(step, self.experiment.checkpoint_every)
        )

    def measured(self, step: int) -> bool:
        """Whether metrics are made of the state that `step` steps have led to."""
        return self.programs.measures and step % self.config.train.log_every_steps == 0

    def before(self, step: int, stop: bool) -> None:
        """What is to be done of the state after `step` steps, before the next one changes it."""
        if self.due(step) or stop:
            self._settle()
        if step > self.start and _due(step, self.experiment.eval_every):
            self._evaluate(step)
        if step > self.start and _due(step, self.experiment.checkpoint_every):
            self._save(step)
        if stop and (step > self.start or not self.start):
            self._save(step, wait=True)
        if not stop:
            self._profile(step)

    def after(self, step: int, out: Mapping[str, Any]) -> None:
        """`out` is what the dispatch that ends at `step` leaves; that of the one before is looked at, meanwhile."""
        layers = {}
        if self.measured(step):
            layers = self.programs.layer_metrics(self.state, self.key, self.tables, self.experiment.q_max)
        self._settle()
        self.pending = step, out, layers

    def end(self) -> dict[str, Any]:
        """Evaluate and save the final state; the summary."""
        total = self.experiment.total_steps
        self._settle()
        self._profile(total)
        self._evaluate(total, write=self.start < total)
        if self.start < total:
            self._save(total, wait=True)
        return self._summary()

    def _settle(self) -> None:
        pending, self.pending = self.pending, None
        self._handle(pending)

    def _initial_state(self, resume: bool, loaded: dict[str, Any] | None) -> TrainState:
        if resume:
            abstract = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                jax.eval_shape(self.experiment.initial_state),
                self.shardings,
            )
            restored = self.checkpoints.restore_latest(abstract)
            if restored is not None:
                data.check_fingerprint(restored.metadata["fingerprint"], self.fingerprint)
                self.metadata = restored.metadata
                return restored.state
        return self._begun(self.programs.initial_state(self.config.seed, self.tables), loaded)

    def _begun(self, state: TrainState, loaded: dict[str, Any] | None) -> TrainState:
        """`state` with the parameters to start from, and quantizers that begin with these and the first batch."""
        experiment, shardings = self.experiment, self.shardings
        begin = experiment.additions.begin
        if loaded is None and not experiment.learns and begin is None:
            return state
        if loaded is not None:
            params = loaded.pop("params")
            state = dataclasses.replace(state, params=params, collections={**state.collections, **loaded})
        if experiment.learns:
            # On one device whatever the mesh: the last bit of a learned scale decides rounding ties from the start.
            with self._first_batches(alone=True) as batches:
                inputs = experiment.task.inputs(experiment.additions.observed(jnp.zeros((), jnp.int32), next(batches)))
            dropout, quant = jax.random.split(jax.random.key(self.config.seed))
            variables = experiment.qmodel.calibrate(
                sharding.to_host(state.variables),
                inputs,
                bits=jax.tree.map(np.float32, experiment.precision_at(0)),
                rngs={"dropout": dropout, "quant": quant},
                train=True,
            )
            state = dataclasses.replace(state, quant=jax.device_put(variables["quant"], shardings.quant))
        if begin is not None:
            alone = jax.process_count() > 1
            with self._first_batches(alone) as batches:
                controller = begin(sharding.to_host(state.variables) if alone else state.variables, batches)
            state = dataclasses.replace(state, controller=jax.device_put(controller, shardings.controller))
        trained = {"params": state.params, "quant": state.quant}
        init = jax.jit(experiment.optimizer.init, out_shardings=shardings.opt_state)
        return jax.device_put(dataclasses.replace(state, opt_state=init(trained)), shardings)

    @contextmanager
    def _first_batches(self, alone: bool) -> Iterator[Iterator[Any]]:
        """The first batches for what is made once, outside the step: all rows for each process, or over the mesh."""
        with self.experiment.train_batches(*((0, 1) if alone else ())) as batches:
            yield batches if alone else (sharding.shard_batch(rows, self.mesh) for rows in batches)

    def _next(self, batches: Iterator[dict[str, np.ndarray]]) -> Any:
        if self.per_dispatch == 1:
            rows = next(batches)
            if rows is not self.rows:  # one that is repeated is there already
                self.rows, self.batch = rows, self.on_devices([rows])
            return self.batch
        return self.on_devices([next(batches) for _ in range(self.per_dispatch)])

    def on_devices(self, batches: list[dict[str, np.ndarray]]) -> Any:
        """The batches of a dispatch as it takes them."""
        if self.per_dispatch == 1:
            return sharding.shard_batch(batches[0], self.mesh)
        stack = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return sharding.shard_batch(stack, self.mesh, axis=1)

    def _handle(self, pending: tuple[int, Mapping[str, Any], dict[str, Any]] | None) -> None:
        """Check, show and write what a finished dispatch left."""
        if pending is None:
            return
        step, out, layers = pending
        self.asked = bool(out.get("stop", False))
        left = self.programs.left(out)
        losses, norms = np.atleast_1d(left["loss"]), np.atleast_1d(left["grad_norm"])
        bits = left["bits"].reshape(-1, 3)
        finite = np.isfinite(losses) & np.isfinite(norms)
        if not np.all(finite):
            bad = int(np.argmin(finite))
            at = step - len(losses) + bad
            batch = at // self.config.data.repeat
            shown = "/".join(f"{b:g}" for b in bits[bad])
            self.checkpoints.wait()
            saved = self.checkpoints.all_steps()
            raise Diverged(
                f"loss is {losses[bad]:g}, its gradient's norm {norms[bad]:g} at step {at + 1} (batch {batch}, "
                f"bits {shown} of weights/acts/grads); last checkpoint: {saved[-1] if saved else 'none'}"
            )
        quality = {self._quality: self.evaluated.get(self._quality)}  # of the last evaluation
        self.progress.update(step, loss=losses[-1], bits=bits[-1].tolist(), **quality)
        if step % self.config.train.log_every_steps == 0:
            last = -1 if self.per_dispatch > 1 else ...
            # By way of the host, so that what is computed of them is each process's own affair.
            packed, bitops = jax.tree.map(lambda x: np.asarray(x)[last], (left["metrics"], left["bitops"]))
            computed = self._averaged(packed)
            of_layers = computed.pop("layer_norms", None)
            values = {name: float(value) for name, value in computed.items()}
            if of_layers is not None:
                values |= norm_rows(of_layers, self.state.params)
            if not self.experiment.additions.penalises:
                del values["penalty"]
            values |= {name: float(value) for name, value in layers.items()}
            updates = (step - 1) // self.experiment.steps_per_update
            row = {
                **values,
                "effective_bitops": cost.value(bitops),
                "learning_rate": float(self.schedules.learning_rate[updates]),
                **dict(zip(("bits_weights", "bits_acts", "bits_grads"), bits[-1].tolist(), strict=True)),
                "steps_per_second": self.progress.steps_per_second,
            }
            self.writer.write(step, "train", row)

    def _averaged(self, packed: Packed) -> dict[str, Any]:
        """The averages in what a step packs, on the host."""
        return jax.tree.map(jnp.asarray, unpack(packed, self._averages)).compute()

    def _evaluate(self, step: int, write: bool = True) -> None:
        self.evaluated, self.evaluated_at = self.evaluator(self.state), step
        if write:
            self.writer.write(step, "eval", {**self.evaluated, "effective_bitops": cost.value(self.state.bitops)})

    def _save(self, step: int, wait: bool = False) -> None:
        self.writer.flush()
        metadata = {
            "fingerprint": self.fingerprint,
            "elapsed": self.progress.elapsed,
            "compilations": self._compilations(),
        }
        fresh = self.evaluated_at == step
        metrics = {self._quality: self.evaluated[self._quality]} if fresh else None
        self.checkpoints.save(step, self.state, metadata, metrics, wait=wait)

    def _compilations(self) -> int:
        return max(self.metadata["compilations"], self.programs.compilations())

    def _profile(self, step: int) -> None:
        dispatches = (self.experiment.total_steps - self.start) // self.per_dispatch
        skipped = min(PROFILED_STEPS[0], max(dispatches - 1, 0))  # at least the last dispatch of a short run
        first, last = (self.start + n * self.per_dispatch for n in (skipped, PROFILED_STEPS[1]))
        if self.profile and step == first:
            jax.profiler.start_trace(str(self.folder / "profile"))
        elif self.profile and first < step and (step >= last or step == self.experiment.total_steps):
            if self.pending is not None:
                jax.block_until_ready(dict(self.pending[1]))
            jax.profiler.stop_trace()
            self.profile = False

    def _summary(self) -> dict[str, Any]:
        total = self.experiment.total_steps
        effective = cost.value(self.state.bitops)
        static = cost.static(self.experiment.plan.ops, self.experiment.q_max, total)
        last = self.experiment.precision_after(total, self.state.previous)
        bits = {name: 32 if value is None else int(value) for name, value in vars(last).items()}
        # Of several widths the widest is what is stored: the others follow from its integers.
        stored = self.experiment.q_max if self.experiment.trained_widths else last
        linear = self.experiment.linear_cost(self.schedules)
        return {
            "steps": int(self.state.step),
            "train_loss": float(self._averaged(jax.device_get(self.state.metrics))["loss"]),
            **self.evaluated,
            "effective_bitops": effective,
            "static_bitops": static,
            "saving": cost.saving(effective, static),
            **({} if linear is None else {"linear_cost": linear}),
            **self._kept(effective),
            "compilations": self._compilations(),
            "wall_seconds": round(self.progress.elapsed, 3),
            "best_checkpoint": self.checkpoints.best_step(),
            "bits_final": bits,
            **size_summary(self.experiment.weights, self.state.params, self.state.quant, stored),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
        }

    def _kept(self, effective: float) -> dict[str, float]:
        """The budget that a controller was given, and the share of it that was spent."""
        controller = self.experiment.controller
        if not isinstance(controller, BudgetKeeper):
            return {}
        budget = controller.bitops
        return {"budget_bitops": budget, "budget_spent": effective / budget}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while inside; the loop looks at it between two steps."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def print_summary(summary: dict[str, Any]) -> None:
    """The summary as aligned lines."""
    width = max(map(len, summary))
    for name, value in summary.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")
    sys.stdout.flush()
