"""The compiled programs of a run, which runs that differ only in what is data to them share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtrain import sharding
from qtrain.evaluate import Evaluator
from qtrain.experiment import Experiment
from qtrain.layer_metrics import make_layer_metrics
from qtrain.packing import Packed, pack, unpack
from qtrain.state import TrainState, make_train_step, several_steps
from qtrain.tables import Tables

Array = jax.Array
_JOINED = 32  # numbers at most in an array that is joined with others: counters, scales, averages


class Programs:
    """What an experiment compiles; schedules and the seed are arguments of it, see `Tables`.

    Args:
      experiment: what is trained.
      mesh: the devices.

    Attributes:
      shardings: where a state lies.
      step: ``(packed, batch, key, tables[, stop]) -> (packed, out)``, donating the state, which is `packed`; of several
        processes with a part each of whether to stop. `left` reads what it leaves.
      in_use: the jitted function that takes the steps: `step`, or what maps `train_step` over several runs.
      measures: whether `layer_metrics` has anything.
      evaluator: of the state.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self.experiment, self.mesh = experiment, mesh
        self.per_dispatch = experiment.config.train.steps_per_dispatch
        everywhere = sharding.replicated(mesh)
        abstract = jax.eval_shape(experiment.initial_state)
        self.shardings = sharding.placed_tree(mesh, abstract, experiment.config.mesh.fsdp_min_size)
        self.evaluator = Evaluator(experiment, mesh)
        self._abstract = abstract
        self._joined = [
            leaf.size <= _JOINED and place.is_fully_replicated and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
            for leaf, place in zip(jax.tree.leaves(abstract), jax.tree.leaves(self.shardings), strict=True)
        ]
        self._left: Any = None  # the shapes of what a step leaves, known once one is traced
        packed = jax.eval_shape(lambda state: pack(state, self._joined), abstract)["numbers"]
        rest = [where for where, flag in zip(jax.tree.leaves(self.shardings), self._joined, strict=True) if not flag]
        packed_shardings = {"numbers": dict.fromkeys(packed, everywhere), "arrays": rest}
        several = jax.process_count() > 1

        def train_step(packed: Packed, batch: Any, key: Array, tables: Tables, *stop: Array) -> tuple[Packed, Any]:
            state, out = self.train_step(unpack(packed, self._abstract, self._joined), batch, key, tables)
            return pack(state, self._joined), ({**out, "stop": jnp.any(stop[0])} if several else out)

        graph = experiment.dataset.kind == "graph"
        self.batch = everywhere if graph else sharding.split(mesh, axis=int(self.per_dispatch > 1))
        self.step = jax.jit(
            train_step,
            donate_argnums=0,
            in_shardings=(packed_shardings, self.batch, everywhere, everywhere, *[sharding.split(mesh)] * several),
            out_shardings=(packed_shardings, everywhere),
        )
        self.in_use: Any = self.step
        self._initial = jax.jit(
            lambda seed, controller: experiment.steered_by_numbers(controller).initial_state(seed),
            out_shardings=self.shardings,
        )
        self._key = jax.jit(jax.random.key, out_shardings=everywhere)
        self.measures = make_layer_metrics(experiment) is not None
        self._measure = jax.jit(self._layer_metrics, out_shardings=everywhere)

    def train_step(self, state: TrainState, batch: Any, key: Array, tables: Tables) -> tuple[TrainState, Any]:
        """A dispatch: a step, or several over batches stacked on a leading axis; pure, to be compiled.

        What it leaves is packed: see `left`.
        """
        experiment = self.experiment.bound(tables)
        one_step = make_train_step(
            experiment.qmodel,
            experiment.optimizer,
            experiment.precision,
            experiment.plan.ops,
            experiment.config.train.log_every_steps,
            experiment.additions,
            experiment.task,
            sharding.gather(self.mesh, experiment.config.mesh.fsdp_min_size),
            experiment.config.train.layer_norms,
        )

        def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, Packed]:
            state, out = one_step(state, batch, key)
            self._left = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), out)
            return state, pack(out)

        return (several_steps(step) if self.per_dispatch > 1 else step)(state, batch, key)

    def packed(self, state: TrainState) -> Packed:
        """A state as `step` takes it: its small arrays joined, the others as they are."""
        leaves = zip(jax.tree.leaves(state), self._joined, strict=True)
        packed = pack([np.asarray(leaf) if flag else leaf for leaf, flag in leaves], self._joined)
        return {**packed, "numbers": self.placed(packed["numbers"])}

    def unpacked(self, packed: Packed) -> TrainState:
        """The inverse of `packed`; the next step deletes those of its arrays that are not joined."""
        on_host = {**packed, "numbers": jax.device_get(packed["numbers"])}
        state: TrainState = unpack(on_host, self._abstract, self._joined)
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else self.placed(leaf), state)

    def left(self, out: Mapping[str, Any]) -> dict[str, Any]:
        """What `step` leaves, by name, numbers on the host; of several steps in a dispatch each with an axis for them.

        ``loss``, ``grad_norm``, ``bits``, ``bitops`` and ``metrics``: see `qtrain.state.make_train_step`.
        """
        on_host = {"numbers": jax.device_get(out["numbers"]), "arrays": out["arrays"]}
        found: dict[str, Any] = unpack(on_host, self._left)
        return found

    def initial_state(self, seed: int, tables: Tables) -> TrainState:
        """The state at step 0."""
        return self._initial(_seed(seed), tables.controller)

    def key(self, seed: int) -> Array:
        """The key of a run's steps."""
        return self._key(_seed(seed))

    def placed(self, tables: Any) -> Any:
        """A tree of arrays, such as tables, on every device."""
        everywhere = sharding.replicated(self.mesh)
        return jax.tree.map(lambda table: jax.make_array_from_process_local_data(everywhere, table), tables)

    def layer_metrics(self, state: TrainState, key: Array, tables: Tables, q_max: Any) -> dict[str, Array]:
        """What is measured layer by layer: name → scalar. The key and `q_max` are the run's: runs share this."""
        return self._measure(state, key, tables, jax.tree.map(np.float32, q_max), self._examples)

    @functools.cached_property
    def _examples(self) -> Any:
        """What Fisher traces are measured on, on every device."""
        return self.placed(self.experiment.fisher_examples())

    def compilations(self) -> int:
        """How many programs the train step has: 1, or something made of data a constant."""
        # No public function tells how many programs a jitted function has.
        return self.in_use._cache_size()

    def _layer_metrics(
        self, state: TrainState, key: Array, tables: Tables, q_max: Any, examples: Any
    ) -> dict[str, Array]:
        measure = make_layer_metrics(self.experiment.bound(tables))
        assert measure is not None
        return measure(state, key, q_max, examples)


def _seed(seed: int) -> np.ndarray:
    """A seed as an argument of a program, by which ``jax.random.key`` makes the key that it makes of the number."""
    return np.asarray(np.int64(seed)).astype(jax.dtypes.canonicalize_dtype(np.int64))
