"""Learned quantizers from configs and in rules, and the examples of their docstrings."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantizer_from_config, rules_from_config
from qtrain.quantizers import EWGS, LSQ, PACT, TRS, DoReFa, Float, Uniform

WORDS = {
    "lsq": LSQ(),
    "lsq/unsigned/tensor": LSQ(signed=False),
    "lsq/signed/channel/table": LSQ(per="channel", across_bits="table"),
    "lsq/signed/32/keep": LSQ(per=32, across_bits="keep"),
    "lsq+/unsigned": LSQ(signed=False, offset=True),
    "lsq+/signed": LSQ(initial="lsq+"),
    "trs/signed": TRS(),
    "trs/unsigned/tensor": TRS(signed=False),
    "trs/signed/channel/normalised": TRS(per="channel", normalised=True),
    "pact": PACT(),
    "pact/channel": PACT(per="channel"),
    "dorefa/acts": DoReFa("acts"),
    "dorefa/weights/row": DoReFa("weights", per="row"),
    "uniform/affine/tensor": Uniform("affine", per="tensor"),
    "uniform": Uniform(),
    "float/e4m3/tensor/stochastic": Float("e4m3", rounding="stochastic"),
    "ewgs/lsq/unsigned": EWGS(LSQ(signed=False)),
    "ewgs/affine/tensor": EWGS(Uniform("affine", per="tensor")),
}
MAPPINGS = [
    (
        {"kind": "lsq", "signed": False, "across_bits": "table", "widths": [2, 4]},
        LSQ(False, across_bits="table", widths=(2, 4)),
    ),
    ({"kind": "lsq+", "signed": False}, LSQ(signed=False, offset=True)),
    ({"kind": "lsq+", "offset": True}, LSQ(offset=True)),
    ({"kind": "lsq+/unsigned", "gradient_scale": False}, LSQ(signed=False, offset=True, gradient_scale=False)),
    ({"kind": "trs", "per": [0, 1], "learned": True}, TRS(per=(0, 1), learned=True)),
    ({"kind": "pact", "initial": 8.0}, PACT(initial=8.0)),
    ({"kind": "dorefa/weights", "per": "row"}, DoReFa("weights", per="row")),
    ({"kind": "uniform", "grid": "aqt"}, Uniform("aqt")),
    ({"kind": "float", "format": "e5m2"}, Float("e5m2")),
    ({"kind": "ewgs", "quantizer": "trs/unsigned", "delta": 0.01}, EWGS(TRS(signed=False), 0.01)),
    ({"kind": "ewgs", "quantizer": {"kind": "pact", "initial": 6.0}}, EWGS(PACT(initial=6.0))),
    ({"kind": "ewgs/lsq", "delta": 0.5}, EWGS(LSQ(), 0.5)),
]


@pytest.mark.parametrize("words", WORDS)
def test_words(words):
    assert quantizer_from_config(words, "q") == WORDS[words]
    assert rules_from_config([{"act_quantizer": words}])[0].act_quantizer == WORDS[words]


@pytest.mark.parametrize(
    "words", ["lsq/unsigned/tensor", "lsq/signed/channel/table", "lsq+/signed/tensor", "trs/signed/8"]
)
def test_a_quantizer_says_what_the_config_said(words):
    assert "/".join(quantizer_from_config(words, "q").describe().split()) == words


@pytest.mark.parametrize(("mapping", "quantizer"), MAPPINGS)
def test_mappings(mapping, quantizer):
    assert quantizer_from_config(mapping, "q") == quantizer
    assert quantizer_from_config(ml_collections.ConfigDict(mapping), "q") == quantizer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lsqq/signed", r"q\.grid='lsqq': give a grid of .* or one of \('uniform', 'float', 'lsq'.*Did you mean 'lsq'"),
        ("lsq/unsined", r"q='lsq/unsined': 'unsined' is none of \('signed', 'unsigned'\)\. Did you mean 'unsigned'"),
        ("lsq/signed/tenser", r"q\.per='tenser'.*Did you mean 'tensor'"),
        ("lsq/signed/tensor/tabel", r"q\.across_bits='tabel'.*Did you mean 'table'"),
        ("lsq/signed/tensor/keep/4", r"q='lsq/.*': give 'lsq/signed/per/across_bits', each but the first optional"),
        ("trs/signed/tensor/normalized", "Did you mean 'normalised'"),
        ("dorefa/act", r"q\.kind='act'.*Did you mean 'acts'"),
        ("pact/tensor/10", "give 'pact/per'"),
        ("ewgs", r"q\.quantizer: EWGS needs one to wrap"),
        ("ewgs/lsqq", r"q\.quantizer\.grid='lsqq'"),
        ("ewgs/e4m3", r"q\.quantizer=Float"),
        ({"kind": "lqs"}, r"q\.kind='lqs': give one of .*Did you mean 'lsq'"),
        ({"kind": 4}, r"q\.kind=4: give one of"),
        ({"kind": "lsq", "sined": True}, r"q\.sined: LSQ has no such field.*Did you mean 'signed'"),
        ({"kind": "lsq", "signed": "no"}, r"q\.signed='no': give True or False"),
        ({"kind": "pact", "alpha": 8.0}, r"q\.alpha: PACT has no such field; it takes \['initial', 'per'\]"),
        ({"kind": "lsq", "widths": [2, 4]}, r"q\.widths=\(2, 4\): only across_bits='table'"),
        ({"kind": "lsq", "across_bits": "table", "widths": 4}, r"^q\."),
    ],
)
def test_mistakes(spec, message):
    with pytest.raises(UsageError, match=message) as error:
        quantizer_from_config(spec, "q")
    assert "\n" not in str(error.value)


def test_a_backward_pass_keeps_no_parameters():
    for quantizer in (LSQ(), TRS(), PACT(), EWGS(Uniform())):
        with pytest.raises(UsageError, match=r"grad_quantizer='.*' has parameters"):
            Rule(grad_quantizer=quantizer)
    assert Rule(grad_quantizer=DoReFa("acts")).grad_quantizer is not None


def test_a_program_is_compiled_once_for_all_widths():
    x = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
    for words in ("lsq/signed/channel/table", "trs/signed/channel/normalised", "pact/channel", "ewgs/affine/tensor"):
        quantizer = quantizer_from_config(words, "q")
        params = quantizer.init(x, 4)
        run = jax.jit(lambda bits, q=quantizer, params=params: q(x, bits, params))
        for bits in (1, 2, 4, 8, 24):
            run(jnp.float32(bits))
        assert run._cache_size() == 1


@pytest.mark.parametrize("module", ["lsq", "trs", "pact", "dorefa", "ewgs", "learned"])
def test_examples(module):
    assert doctest.testmod(importlib.import_module(f"qtrain.quantizers.{module}")).failed == 0


def test_examples_of_configs():
    result = doctest.testmod(importlib.import_module("qtrain.inject.quantizer_config"))
    assert result.failed == 0 and result.attempted
