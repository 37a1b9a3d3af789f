"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qtrain

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["schedule"](0) == 3 and names["schedule"](1250) == 8


def test_the_quantizer_in_twenty_lines():
    block = next(block for block in BLOCKS if "PowersOfTwo" in block)
    code = block[block.index("@dataclasses") : block.index("rule =")]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    quantizer = names["PowersOfTwo"]()
    x = jnp.array([-3.0, -1.0, 0.3, 0.02, 4.0])
    # At 3 bits: exponents 2, 1, 0, −1; 0.02 is flushed.
    np.testing.assert_array_equal(jax.jit(quantizer)(x, 3), [-4.0, -1.0, 0.5 if 0.3 > 2**-1.5 else 0.0, 0.0, 4.0])
    np.testing.assert_array_equal(jax.grad(lambda x: (quantizer(x, 3) * jnp.arange(5.0)).sum())(x), jnp.arange(5.0))

    model = nn.Dense(3)
    qmodel = qtrain.quantize(model, names["rule"])
    variables = qmodel.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    expected = qtrain.quantizers.Uniform()(x, 8, axes=(0,)) @ quantizer(kernel, 3)
    out = qmodel.apply(variables, x, bits=qtrain.Precision(weights=3, acts=8))
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["docs/suite.png", "docs/injection.md", "DEVELOPERS.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"]
)
def test_what_it_points_to_exists(name):
    assert (Path(__file__).parents[1] / name).is_file()
