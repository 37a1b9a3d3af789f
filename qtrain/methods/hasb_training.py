"""HASB in the train step: sensitivities before it begins, and an assignment of widths in each step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.additions import Additions
from qtrain.errors import UsageError
from qtrain.inject import QuantizedModel
from qtrain.methods.hasb import Hasb, roulette
from qtrain.widths import Widths


@dataclasses.dataclass(frozen=True)
class Switching:
    """The section ``multi_precision.hasb`` of a config.

    Attributes:
      sigma: how likely a layer switches in the last epoch, 0 … 1; 0: none does.
      batches: training batches from which sensitivities are measured.
      draws, tolerance: of `qtrain.sensitivity.hessian_trace`.
    """

    sigma: float
    batches: int
    draws: int
    tolerance: float

    def add_to(
        self,
        additions: Additions,
        qmodel: QuantizedModel,
        widths: Widths,
        trained: tuple[int, ...],
        seed: int,
        steps_per_epoch: int,
        total_steps: int,
        measure: Callable[..., Any],
    ) -> Additions:
        """`additions` and HASB: each step, some layers take another width, drawn by how sensitive they are.

        Sensitivities are those of the float model that the run begins with. A norm layer goes with the layer before it,
        so that none needs statistics of a transition between widths. What the step as a whole is called (the rate of
        its scales, its bits in the metrics) is the schedule's width.

        Args:
          additions: of the rest of the method; without a `begin` of their own.
          qmodel, widths: of the model.
          trained: the widths to switch between.
          seed: of the draws that measure sensitivities.
          steps_per_epoch, total_steps: of the run.
          measure: `qtrain.sensitivity.weight_traces`; handed in, since it belongs to the program and not to a method.

        Raises:
          UsageError: where no layer can switch, or quantizers choose their own widths.
        """
        if not self.sigma:
            return additions
        if widths.chosen:
            raise UsageError(
                f"multi_precision.hasb.sigma={self.sigma}: some quantizers learn their width, and it would assign one; "
                "set it to 0, or take them out of quant.rules"
            )
        weights = [w for w in widths.weights if w.kind == "weights" and w.rule.weights is None]
        hasb = Hasb(
            layers=tuple(weight.path for weight in weights),
            widths=trained,
            sigma=self.sigma,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            followers=tuple(widths.plan.followers),
        )

        def begin(variables: Mapping[str, Any], batches: Iterator[Any]) -> dict[str, Any]:
            some = list(itertools.islice(batches, self.batches))
            key = jax.random.key(seed)
            found = measure(qmodel, weights, variables, some, key, self.draws, self.tolerance)
            traces = hasb.ordered({weight.path: found.mean[weight.name] for weight in weights})
            return {**additions.controller(), "roulette": roulette(trained, traces)}

        shape = len(weights), len(trained)
        return dataclasses.replace(
            additions,
            controller=lambda: {**additions.controller(), "roulette": jnp.full(shape, 1 / shape[1], jnp.float32)},
            begin=begin,
            assigned=lambda key, step, precision, controller: hasb.assign(key, step, precision, controller["roulette"]),
        )
