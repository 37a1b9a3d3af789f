"""Scenes of digits: float, static precision and the cyclic schedule CR 3–8, and a picture of what is found.

    python experiments/detection/run.py --arms float "CR 3-8" --seeds 0 --workdir runs/detection
    python experiments/detection/run.py --draw runs/detection/float_0_1500    # scenes.png, of a run that is there
    python experiments/detection/run.py --table

Writes a JSON line a run to results.jsonl; runs that have one are not repeated. What counts is the last step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from qtrain import data
from qtrain.state import make_eval_step
from qtrain.train import train
from qtrain.trained import experiment_of, restored
from qtrain.writers import read_metrics

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "digit_scenes_detect_cpt.py"
DATE = "2026-11-21"
HARDWARE = "2 shared CPU cores"
ARMS = ("float", "static 8", "static 4", "CR 3-8")
KEPT = ("steps", "train_loss", "test_loss", "test_map50", "test_map", "saving", "wall_seconds", "parameters")
DRAWN = 8
LEAST_SCORE = 0.4
"""Of the boxes that are drawn; the average precision counts all from 0.05 on."""


def config_of(arm: str, seed: int, steps: int) -> Any:
    """The config of an arm: that of the repository at other bits."""
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    with config.unlocked():
        config.seed = config.data.seed = seed
        config.train.steps = steps
        if arm == "float":
            config.quant.update(weights="none", acts="none", grads="none", rules=())
            config.schedule.update(name="float")
            config.schedule.grads.update(name="float", bits=None)
        elif arm != "CR 3-8":
            config.schedule.update(
                name="constant", bits=int(arm.split()[1]), profile=None, low=None, high=None, cycles=None, pattern=None
            )
    return config


def draw(folder: Path) -> None:
    """``scenes.png``: test scenes, what a run finds on them at its highest precision, and what is there."""
    experiment = experiment_of(folder, "draw")
    variables = restored(folder, experiment).variables
    batch = next(data.eval_batches(experiment.dataset, "test", DRAWN))
    evaluate = jax.jit(make_eval_step(experiment.qmodel, experiment.task))
    found = jax.device_get(evaluate(variables, batch, jax.tree.map(np.float32, experiment.q_max)))
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, axes in enumerate(figure.subplots(2, DRAWN // 2).flat):
        axes.imshow(batch["image"][index, ..., 0], cmap="gray", extent=(0, 64, 64, 0), interpolation="nearest")
        for box, label in zip(batch["boxes"][index], batch["label"][index], strict=True):
            if label >= 0:
                _box(axes, box, "#7fb3e6", "--")
        chosen = found["scores"][index] >= LEAST_SCORE
        rows = zip(*(found[name][index][chosen] for name in ("boxes", "scores", "classes")), strict=True)
        for box, score, label in rows:
            _box(axes, box, "#f39c12", "-")
            text = axes.text(box[1], box[0] - 0.6, f"{label}  {score:.2f}", color="#f39c12", fontsize=8, va="bottom")
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
        axes.set_axis_off()
    figure.suptitle("Test scenes: boxes found (orange; class, score) and boxes there (blue)", fontsize=12)
    figure.savefig(HERE / "scenes.png", dpi=110)


def _box(axes: Any, box: np.ndarray, colour: str, line: str) -> None:
    y, x, far_y, far_x = box
    axes.add_patch(Rectangle((x, y), far_x - x, far_y - y, fill=False, edgecolor=colour, linestyle=line, linewidth=1.2))


def table(results: list[dict[str, Any]]) -> None:
    """The lines as a Markdown table."""
    print("| arm | steps | seed | mAP@.5 | mAP@[.5:.95] | test loss | BitOps saved against constant bits | CPU s | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(results, key=lambda row: (row["steps"], ARMS.index(row["arm"]), row["seed"])):
        shown = [f"{row[name]:.3f}" for name in ("test_map50", "test_map", "test_loss")]
        shown.append("" if row["arm"] == "float" else f"{100 * row['saving']:.1f} %")
        shown += [f"{row[name]:.0f}" if name in row else "" for name in ("cpu_seconds", "wall_seconds")]
        print(f"| {row['arm']} | {row['steps']} | {row['seed']} | {' | '.join(shown)} |")


def main() -> None:
    """Run what is not there yet, draw, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workdir", type=Path, default=Path("runs/detection"))
    parser.add_argument("--draw", type=Path, metavar="RUN")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.draw:
        draw(arguments.draw)
        return
    if arguments.table:
        table(results)
        return
    done = {(row["arm"], row["seed"], row["steps"]) for row in results}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if (arm, seed, arguments.steps) in done:
                continue
            folder = arguments.workdir / f"{arm.replace(' ', '_')}_{seed}_{arguments.steps}"
            started = time.process_time()
            summary = train(config_of(arm, seed, arguments.steps), str(folder))
            seconds = round(time.process_time() - started, 1)
            rate = read_metrics(folder, "train")[-1]["steps_per_second"]
            row = {"arm": arm, "seed": seed, **{name: summary[name] for name in KEPT}}
            row |= {"cpu_seconds": seconds, "steps_per_second": rate, "hardware": HARDWARE, "date": DATE}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
