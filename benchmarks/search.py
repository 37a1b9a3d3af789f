"""What a search costs: ResNet-18's layers at three widths, and one draw of a Hessian trace.

The search is of ``imagenet_resnet`` at depth 18, 224×224×3 and 1000 classes, with random weights and made-up traces
(log-normal): what is timed does not depend on them. From the model to the front: plan, errors of all weights at all
widths, integer programs for one assignment and for a front of 24 points in each unit. A draw is one product with the
Hessian of the cross-entropy on one batch, compiled before it is timed, for that network and for the digits CNN; a
gradient of the same loss is timed beside it.

    python benchmarks/search.py --out benchmarks/search.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain import Precision, models, quantize
from qtrain.inject import default_rules
from qtrain.metrics import cross_entropy
from qtrain.search import Problem, front, layer_costs, searched_layers, solve, squared_errors
from qtrain.search.problem import curvatures, expected_rise
from qtrain.sensitivity import hessian_draw

WIDTHS = (8, 4, 2)
NETWORKS = {
    "imagenet_resnet18": ({"name": "imagenet_resnet", "depth": 18}, (224, 224, 3), 1000, 8),
    "digits_cnn": ({"name": "cnn", "features": (32, 64), "hidden": 128}, (8, 8, 1), 10, 64),
}
"""Name → fields of the model, shape of an image, classes, batch of a draw."""


def network(name: str, batch: int) -> tuple[Any, Any, Any]:
    """The quantized model, random variables, and a batch of images."""
    fields, image, classes, _ = NETWORKS[name]
    module = models.build({**fields, "dtype": "float32"}, num_classes=classes, input_shape=image)
    qmodel = quantize(module, default_rules())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *image)), jnp.float32)
    return qmodel, jax.jit(lambda key, x: qmodel.init(key, x[:1]))(jax.random.key(0), x), x


def search(points: int) -> list[dict[str, Any]]:
    """A row for each unit of the budget."""
    qmodel, variables, x = network("imagenet_resnet18", 1)
    rng, rows = np.random.default_rng(0), []
    start = time.perf_counter()
    plan, weights = qmodel.plan(x, train=False), qmodel.weights(x, train=False)
    searched = searched_layers(plan, weights)
    costs = layer_costs(plan, searched, WIDTHS, Precision(8, 8, 8))
    planned = time.perf_counter() - start
    start = time.perf_counter()
    errors = squared_errors(searched, variables["params"], variables["quant"], WIDTHS)
    measured = time.perf_counter() - start
    sizes = {weight.name: weight.size for leaves in searched.values() for weight in leaves}
    traces = {name: float(np.exp(rng.normal())) * size for name, size in sizes.items()}
    problem = Problem(tuple(searched), WIDTHS, expected_rise(searched, curvatures(searched, traces), errors), costs)
    for unit, of in costs.items():
        start = time.perf_counter()
        # Halfway between two uniform models, where no uniform one is the answer.
        solve(problem, unit, (of.of(problem.uniform(4)) + of.of(problem.uniform(2))) / 2)
        one = time.perf_counter() - start
        start = time.perf_counter()
        found = front(problem, unit, points)
        whole = time.perf_counter() - start
        rows.append(
            {
                "what": "search",
                "unit": unit,
                "layers": len(searched),
                "widths": WIDTHS,
                "plan_seconds": round(planned, 3),
                "error_seconds": round(measured, 3),
                "assignment_seconds": round(one, 4),
                "front_points": len(found),
                "front_seconds": round(whole, 3),
                "total_seconds": round(planned + measured + one + whole, 3),
            }
        )
    return rows


def draw(name: str, draws: int, batch: int | None) -> dict[str, Any]:
    """The time of a draw and of a gradient, medians."""
    batch = NETWORKS[name][3] if batch is None else batch
    qmodel, variables, x = network(name, batch)
    labels = jnp.arange(batch) % NETWORKS[name][2]

    def loss(params: Any, data: Any) -> Any:
        others, x, labels = data
        return cross_entropy(qmodel.apply({**others, "params": params}, x, train=False), labels).mean()

    params = variables["params"]
    others = {kind: value for kind, value in variables.items() if kind != "params"}
    programs = {
        "draw": jax.jit(hessian_draw(loss)),
        "gradient": jax.jit(lambda params, _, data: jax.grad(loss)(params, data)),
    }
    times: dict[str, list[float]] = {kind: [] for kind in programs}
    for turn in range(draws + 1):
        for kind, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, jax.random.key(turn), (others, x, labels)))
            times[kind].append(time.perf_counter() - start)
    draw_time, gradient_time = (float(np.median(times[kind][1:])) for kind in ("draw", "gradient"))
    return {
        "what": "draw",
        "network": name,
        "batch": batch,
        "draws": draws,
        "draw_seconds": round(draw_time, 5),
        "gradient_seconds": round(gradient_time, 5),
        "draw_over_gradient": round(draw_time / gradient_time, 2),
        "compilation_seconds": round(times["draw"][0], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24, help="of the front")
    parser.add_argument("--draws", type=int, default=10, help="timed")
    parser.add_argument("--batch", type=int, help="of a draw; 8 images for ResNet-18 and 64 for the CNN unless given")
    parser.add_argument(
        "--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), help="to time draws of"
    )
    parser.add_argument("--out")
    arguments = parser.parse_args()
    machine = {
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
    rows = []
    for row in search(arguments.points):
        rows.append({**row, **machine})
        print(json.dumps(rows[-1]), flush=True)
    for name in arguments.networks:
        rows.append({**draw(name, arguments.draws, arguments.batch), **machine})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        Path(arguments.out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
