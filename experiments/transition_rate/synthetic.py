"""How well each rule holds the transition rate, where nothing but the rate matters: random gradients, no network.

10⁵ normal weights on a 4-bit grid of step 0.5; gradients N(0, 0.01²) through momentum 0.9; the target falls as a cosine
from 5e-3 to 0 over 3000 updates, the learning rate begins at 0.1. In the setting "jump" the second half's gradients are
100 times as large. The control is the same without TALR: a learning rate that falls as the target does. Its weights
then walk off the 4-bit grid, where no code changes any more; so the jump is also measured on a grid without ends.

    python experiments/transition_rate/synthetic.py           # three minutes on two cores; JSON lines and a figure

Writes ``synthetic.jsonl`` (a row a rule, setting and seed, with the rates averaged over 100 updates) and
``synthetic.png`` beside itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain.optim import scale_by_transition_rate

HERE = Path(__file__).parent
STEPS, WEIGHTS, STEP_SIZE, BITS, RATE, TARGET, WINDOW = 3000, 100_000, 0.5, 4, 0.1, 5e-3, 100
SETTINGS = {
    "steady": (False, (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)),
    "jump": (True, (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)),
    "jump, open grid": (True, (-np.inf, np.inf)),
}
ARMS = ("none", "additive", "multiplicative", "proportional")
COLOURS = {"none": "#8a8a8a", "additive": "#c76b12", "multiplicative": "#1f5fa8", "proportional": "#3d8b37"}


def codes(low: float, high: float) -> Any:
    """Integer codes of the weights, on a grid from `low` to `high` steps."""
    return lambda params: jnp.clip(jnp.round(params / STEP_SIZE), low, high).astype(jnp.int32)


def simulate(setting: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Rate k, target R and learning rate U of every update, for each arm; all see the same gradients."""
    jump, ends = SETTINGS[setting]
    target, decay = optax.cosine_decay_schedule(TARGET, STEPS), optax.cosine_decay_schedule(RATE, STEPS)
    # The control measures its rate by the same transform, and takes another learning rate than the transform's.
    rules = {arm: "additive" if arm == "none" else arm for arm in ARMS}
    transforms = {arm: scale_by_transition_rate(codes(*ends), target, RATE, rule=rule) for arm, rule in rules.items()}
    base = optax.sgd(1.0, momentum=0.9)

    def update(carry: Any, t: jax.Array) -> tuple[Any, Any]:
        weights, states, trace, key = carry
        scale = jnp.where(jump & (t >= STEPS // 2), 1.0, 0.01)
        gradient = scale * jax.random.normal(jax.random.fold_in(key, t), (WEIGHTS,))
        direction, trace = base.update(gradient, trace)
        out, states, weights = {}, dict(states), dict(weights)
        for arm, transform in transforms.items():
            scaled, states[arm] = transform.update(direction, states[arm], weights[arm])
            rate = decay(t) if arm == "none" else states[arm].rate[0]
            weights[arm] += rate * direction if arm == "none" else scaled
            out[arm] = {"rate": states[arm].transitions[0], "target": states[arm].target[0], "talr": rate}
        return (weights, states, trace, key), out

    @jax.jit
    def run(key: jax.Array) -> Any:
        weights = jax.random.normal(jax.random.fold_in(key, STEPS), (WEIGHTS,))
        states = {arm: transform.init(weights) for arm, transform in transforms.items()}
        carry = (dict.fromkeys(ARMS, weights), states, base.init(weights), key)
        return jax.lax.scan(update, carry, jnp.arange(STEPS))[1]

    return jax.device_get(run(jax.random.key(seed)))


def windows(values: np.ndarray) -> np.ndarray:
    """Averages over each hundred updates."""
    return values.reshape(-1, WINDOW).mean(1)


def row(arm: str, setting: str, seed: int, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """One simulation of one arm, summed up."""
    rate, target, talr = (windows(found[name]) for name in ("rate", "target", "talr"))
    deviation = np.abs(rate / target - 1)
    return {
        "rule": arm,
        "setting": setting,
        "seed": seed,
        "deviation_400_1300": round(float(deviation[4:13].mean()), 5),
        "deviation_2000_2900": round(float(deviation[20:29].mean()), 5),
        "ratio_2000_2600": round(float(rate[20:26].mean() / target[20:26].mean()), 4),
        "largest_ratio_2000_2600": round(float((rate / target)[20:26].max()), 4),
        "rate": [float(f"{value:.4g}") for value in rate],
        "target": [float(f"{value:.4g}") for value in target],
        "talr": [float(f"{value:.4g}") for value in talr],
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Transition rate, its deviation from the target, and learning rate; one column a setting, seed 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 2, sharex=True, sharey="row")
    middle = (np.arange(STEPS // WINDOW) + 0.5) * WINDOW
    for column, setting in enumerate(("steady", "jump, open grid")):
        drawn = {entry["rule"]: entry for entry in rows if entry["setting"] == setting and entry["seed"] == 0}
        target = np.array(drawn["none"]["target"])
        grid[0, column].plot(middle, target, "k--", linewidth=1.2, label="target R")
        grid[1, column].axhline(1.0, color="k", linestyle="--", linewidth=1.2)
        for rule in ARMS:
            label = "none: learning rate falls as a cosine" if rule == "none" else rule
            style = {"color": COLOURS[rule], "linewidth": 1.5, "label": label}
            rate, talr = np.array(drawn[rule]["rate"]), np.array(drawn[rule]["talr"])
            grid[0, column].plot(middle, np.maximum(rate, 1e-6), **style)
            grid[1, column].plot(middle, np.maximum(rate / target, 1e-2), **style)
            grid[2, column].plot(middle, np.maximum(talr, 1e-6), **style)
    titles = (
        "gradients of one scale throughout",
        "gradients 100 times as large from update 1500 on,\ngrid without ends",
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    for axes in grid.flat:
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("transition rate k\n(share of codes per update)")
    grid[1, 0].set_ylabel("k / R")
    grid[2, 0].set_ylabel("learning rate U\n(weight units per unit of gradient)")
    for axes in grid[2]:
        axes.set_xlabel("update")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        "Rules for the transition rate, averages over 100 updates; 10⁵ weights, 4 bits, U₀ = 0.1, R₀ = 5e-3\n"
        "What is 0 is drawn at the lower edge"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, write, draw, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    rows = []
    for setting in SETTINGS:
        for seed in range(arguments.seeds):
            rows += [row(arm, setting, seed, found) for arm, found in simulate(setting, seed).items()]
    (arguments.out / "synthetic.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    draw(rows, arguments.out / "synthetic.png")
    columns = (
        ("400-1300", "steady", "deviation_400_1300", 100, " %"),
        ("2000-2900", "steady", "deviation_2000_2900", 100, " %"),
        ("k/R after the jump", "jump", "ratio_2000_2600", 1, ""),
        ("same, open grid", "jump, open grid", "ratio_2000_2600", 1, ""),
    )
    print(f"{'|k/R-1|, averages':18}" + "".join(f"{title:>20}" for title, *_ in columns))
    for arm in ARMS:
        cells = ""
        for _, setting, key, factor, unit in columns:
            values = [factor * entry[key] for entry in rows if (entry["rule"], entry["setting"]) == (arm, setting)]
            cells += f"{np.mean(values):.2f}{unit}".rjust(20)
        print(f"{arm:18}{cells}")


if __name__ == "__main__":
    main()
