"""Rules with codes for all three products, what layers are told under them, and whether they compute what fake does."""

import jax
import jax.numpy as jnp
import numpy as np
from inject_models import KEY, X, random_variables

from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform, contract
from qtrain.quantizers.native import Paths

TENSOR = Uniform("symmetric", per="tensor")
TENSORS = {"weight_quantizer": TENSOR, "act_quantizer": TENSOR, "grad_quantizer": TENSOR}
INT8 = Paths("int8", "int8", "int8")
BITS = Precision(weights=8, acts=8, grads=8)


def native_rule(path=".*", **fields):
    """A rule under which all three products have codes."""
    return Rule(path, **{**TENSORS, "execution": "native", **fields})


def fake(rule):
    return Rule(**{**vars(rule), "execution": "fake"})


def spy(seen):
    """`contract`, and a note of each layer's paths."""

    def execute(op, operands, lhs, rhs, traced):
        seen.append(operands.paths)
        return contract(op, operands, lhs, rhs, traced)

    return execute


def traced(model, rules, x=X, bits=BITS, concrete=False, **kwargs):
    """What each layer's contraction is told in a call whose bits are traced, or concrete."""
    seen = []
    qmodel = quantize(model, rules, execute=spy(seen), **kwargs)
    variables = jax.eval_shape(qmodel.init, KEY, x)

    def apply(variables, bits):
        return qmodel.apply(variables, x, bits=bits, rngs={"quant": KEY})

    if concrete:
        jax.eval_shape(lambda v: apply(v, bits), variables)
    else:
        jax.eval_shape(apply, variables, jax.tree.map(jnp.float32, bits))
    return seen


def assert_like_fake(model, rule, x, widths, **kwargs):
    """Output and gradients of native and fake execution, jitted once each, at traced widths."""
    variables = random_variables(model, x)

    def of(qmodel):
        def loss(params, bits, key):
            y = qmodel.apply({**variables, "params": params}, x, bits=bits, rngs={"quant": key})
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        return jax.jit(jax.grad(loss, has_aux=True))

    ours, reference = of(quantize(model, rule, **kwargs)), of(quantize(model, fake(rule)))
    for weights, acts, grads in widths:
        bits = jax.tree.map(np.float32, Precision(weights=weights, acts=acts, grads=grads))
        found, expected = (fn(variables["params"], bits, jax.random.key(3)) for fn in (ours, reference))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(b)), (weights, acts, grads)
    assert ours._cache_size() == 1
