"""What share of a family's multiplications is quantized: all of them, attention's with ``ops`` that name it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qtrain import models
from qtrain.inject import default_rules, quantize

LARGE, TEXT = (224, 224, 3), (64,)
NODES, EDGES = 20, 60
GRAPH = {
    "nodes": jax.ShapeDtypeStruct((NODES, 30), jnp.float32),
    "senders": jax.ShapeDtypeStruct((EDGES,), jnp.int32),
    "receivers": jax.ShapeDtypeStruct((EDGES,), jnp.int32),
}
# name: (fields, input shape, multiplications of attention); MobileNet's is in test_models_families.py
FAMILIES = {
    "resnet": ({"depth": 8}, (32, 32, 3), 0),
    "vit": ({"num_layers": 2}, LARGE, 2 * 2 * 197 * 197 * 192),
    "transformer": ({"num_layers": 2, "width": 32, "num_heads": 2}, TEXT, 2 * 2 * 64 * 64 * 32),
    "transformer, rotary": (
        {"num_layers": 2, "width": 32, "num_heads": 2, "positions": "rotary", "norm": "rms", "mlp": "swiglu"},
        TEXT,
        2 * 2 * 64 * 64 * 32,
    ),
    "lstm": ({"width": 16}, TEXT, 0),
    "gcn": ({"width": 16}, (NODES, 30), 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_coverage_of_a_family(name):
    fields, shape, attention = FAMILIES[name]
    kind = name.partition(",")[0]
    model = models.build({"name": kind, **fields}, num_classes=50, input_shape=shape)
    dtype = jnp.int32 if shape == TEXT else jnp.float32
    x = GRAPH if kind == "gcn" else jax.ShapeDtypeStruct((1, *shape), dtype)
    for ops in (("weighted",), ("weighted", "attention")) if attention else (("weighted",),):
        plan = quantize(model, [dataclasses.replace(rule, ops=ops) for rule in default_rules()]).plan(x)
        left_out = 0 if "attention" in ops else attention
        assert plan.coverage == pytest.approx(1 - left_out / plan.macs, abs=1e-12)
        assert sum(row.macs for row in plan if row.op == "attention") == attention
