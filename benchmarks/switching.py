"""Switching a loaded model of ResNet-50's size to another width, against quantizing its float weights anew.

ResNet-50 for ImageNet (25.6 million parameters) with Double Rounding at 8 bits, norms and activations' scales of four
widths, is stored once and loaded. ``at(bits)`` makes the integers of another width from those of 8 bits. The baseline
keeps float32 weights and computes the codes of the new width from them, in one program that is compiled once for all
widths. Of both: the time of the first change of width and the median of later ones, and what memory it takes: the peak
of what NumPy allocates, and of the process (resident, above what it had before), for one change that is not timed.

    python benchmarks/switching.py --out benchmarks/switching.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain import Precision, models, quantize
from qtrain.export import file, load
from qtrain.export.save import contents
from qtrain.methods.multi_precision import multi_precision_rules

WIDTHS = (8, 6, 4, 2)
TURNS = (4, 2, 6)


def resnet50() -> tuple[Any, dict[str, Any], jax.ShapeDtypeStruct]:
    """The model with quantizers, variables as if trained, and the shape of a batch; it computes nothing."""
    module = models.build({"name": "imagenet_resnet", "depth": 50}, num_classes=1000, input_shape=(224, 224, 3))
    qmodel = quantize(module, multi_precision_rules(WIDTHS), per_width=WIDTHS)
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    shapes = jax.eval_shape(lambda x: qmodel.init(jax.random.key(0), x, bits=Precision(8, 8)), inputs)
    random = np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("weights/scale"):
            return jnp.full(leaf.shape, 3 * 0.02 / 2**7, leaf.dtype)  # as Double Rounding begins
        spread = random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(0.02 * spread if name.endswith("kernel") else np.abs(spread) + 0.1, leaf.dtype)

    return qmodel, jax.tree_util.tree_map_with_path(drawn, shapes), inputs


def peak(change: Callable[[], Any]) -> dict[str, int]:
    """Bytes above what there was before, at their highest while `change` runs."""
    tracemalloc.start()
    kept = change()
    by_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    resident = None
    if Path("/proc/self/clear_refs").exists():
        with contextlib.suppress(OSError, AttributeError):  # freed memory that is kept would be used before any new
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        kept = change()
        resident = _status("VmHWM") - before
        del kept
    return {"numpy_peak_bytes": by_numpy, "resident_peak_bytes": resident}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def timed(change: Callable[[int], Any], rounds: int) -> dict[str, float]:
    """Milliseconds of the first change, and of the later ones; ``cpu_ms`` is processor time of all threads."""
    times, used = [], []
    for turn in range(rounds + 1):
        start, cpu = time.perf_counter(), time.process_time()
        kept = jax.block_until_ready(change(TURNS[turn % len(TURNS)]))
        times.append(1e3 * (time.perf_counter() - start))
        used.append(1e3 * (time.process_time() - cpu))
        del kept
    later = times[1:]
    return {
        "first_ms": round(times[0], 2),
        "median_ms": round(statistics.median(later), 2),
        "fastest_ms": round(min(later), 2),
        "cpu_ms": round(statistics.median(used[1:]), 2),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for switching, one for quantizing anew."""
    qmodel, variables, inputs = resnet50()
    tensors, content, stored_as, _ = contents(qmodel, variables, Precision(8, 8), inputs, {"train": False})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        size = file.write(path, tensors, {**content, "config": None, "num_classes": None})
        del tensors
        start = time.perf_counter()
        loaded = load(path, module=qmodel.module)
        load_ms = 1e3 * (time.perf_counter() - start)
    weights = sum(row.elements for row in stored_as)

    def switch(bits: int) -> Any:
        return loaded.at(bits).state

    rows = [{"arm": "at(bits)", **timed(switch, rounds), **peak(lambda: jax.block_until_ready(switch(4)))}]
    codes = jax.tree.leaves(switch(4)[0])
    rows[0] |= {
        "held_bytes": sum(one.codes.nbytes for one in loaded.source.stored.values()),
        "code_bytes": sum(array.nbytes for array in codes if array.dtype == jnp.int8),
        "largest_float_array_bytes": max(array.nbytes for array in codes if array.dtype != jnp.int8),
        "file_bytes": size,
        "load_ms": round(load_ms, 1),
    }
    del codes

    found = [weight for weight in qmodel.weights(inputs, train=False)]
    floats = {weight.name: jnp.asarray(weight.value(variables["params"])) for weight in found}
    scales = {weight.name: weight.learned(variables["quant"]) for weight in found}
    encoders = {weight.name: (weight.quantizer.encode, weight.axes, weight.rule.weights) for weight in found}

    @jax.jit
    def anew(floats: Any, bits: Any) -> Any:
        made = {
            name: encode(floats[name], bits if fixed is None else fixed, scales[name], axes=axes)
            for name, (encode, axes, fixed) in encoders.items()
        }
        return {name: (codes.astype(jnp.int8), scale) for name, (codes, scale) in made.items()}

    def again(bits: int) -> Any:
        return anew(floats, jnp.float32(bits))

    rows.append({"arm": "quantize the float weights", **timed(again, rounds)})
    rows[1] |= peak(lambda: jax.block_until_ready(again(4)))
    rows[1]["held_bytes"] = sum(value.nbytes for value in floats.values())
    same = [jax.tree.map(np.array_equal, switch(bits)[0], again(bits)) for bits in TURNS]
    common = {
        "equal_codes_and_scales": all(jax.tree.leaves(same)),
        "weights": weights,
        "rounds": rounds,
        "command": f"python {' '.join(sys.argv)}",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    return [{**row, **common} for row in rows]


def main() -> None:
    """Measure, print, and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.out:
        with open(arguments.out, "a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
