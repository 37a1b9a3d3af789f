"""S5: its dynamics against numpy and scipy, its stability under rounding, its models and their parts' names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import qtrain
from qtrain import Precision, Rule, quantize
from qtrain.errors import UsageError
from qtrain.models.s5 import S5LM, S5Classifier
from qtrain.models.s5_dynamics import (
    bilinear,
    discretise,
    hippo,
    hippo_normal,
    initial_eigenvalues,
    parallel_recurrence,
    zero_order_hold,
)
from qtrain.models.s5_ssm import DISCRETISATIONS, PARAMETRISATIONS, SSM, Recurrence, as_naive
from qtrain.quantizers import Uniform

SMALL = {"features": 5, "state_size": 8, "blocks": 2}
# name: fields of the state-space model beyond SMALL
VARIANTS = {
    "zoh": {},
    "bilinear": {"discretisation": "bilinear"},
    "naive": {"parametrisation": "naive"},
    "bidirectional": {"bidirectional": True},
    "sequential, bidirectional": {"recurrence": "sequential", "bidirectional": True},
    "without conjugate symmetry": {"conjugate_symmetry": False},
}


def compiled(function):
    """Compiled in the least time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def rounded(params, name, bits):
    """`params` with those below a module called `name` on the grid of `bits`."""
    flat, quantizer = flatten_dict(params), Uniform("symmetric", per="tensor")
    return unflatten_dict({path: quantizer(x, bits) if name in path else x for path, x in flat.items()})


def radius(ssm):
    """The largest |λ̄| of one naive state-space model's parameters."""
    return float(jnp.max(jnp.hypot(ssm["A"]["real"], ssm["A"]["imag"])))


def ssm_and_input(length=11, **fields):
    model = SSM(**{**SMALL, **fields})
    u = jnp.asarray(np.random.default_rng(0).normal(size=(3, length, SMALL["features"])), jnp.float32)
    return model, compiled(model.init)(jax.random.key(1), u)["params"], u


def reference(params, u, fields):
    """The state-space model in float64, step by step, from its definition."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if fields.get("parametrisation") == "naive":
        transition, gain = p["A"]["real"] + 1j * p["A"]["imag"], np.exp(p["discretisation"]["log_gain"])
    else:
        signs = np.sign(initial_eigenvalues(8, 2, fields.get("conjugate_symmetry", True)).imag)
        a = -np.exp(p["A"]["log_decay"]) + 1j * signs * np.exp(p["A"]["log_frequency"])
        step = np.exp(p["discretisation"]["log_step"])
        if fields.get("discretisation") == "bilinear":
            transition, gain = (1 + a * step / 2) / (1 - a * step / 2), step / (1 - a * step / 2)
        else:
            transition, gain = np.exp(a * step), (np.exp(a * step) - 1) / a
    b = p["B_real"]["kernel"] + 1j * p["B_imag"]["kernel"]
    c = p["C_real"]["kernel"] + 1j * p["C_imag"]["kernel"]
    u = np.asarray(u, np.float64)

    def states(sequence):
        x, found = 0, []
        for step_input in sequence:
            x = transition * x + gain * (step_input @ b)
            found.append(x)
        return np.array(found)

    def one(sequence):
        x = states(sequence)
        if fields.get("bidirectional"):
            x = np.concatenate([x, states(sequence[::-1])[::-1]], axis=-1)
        return (2 if fields.get("conjugate_symmetry", True) else 1) * (x @ c).real + p["D"] * sequence

    return np.array([one(sequence) for sequence in u])


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_that_of_the_recurrence(name):
    model, params, u = ssm_and_input(**VARIANTS[name])
    y = compiled(model.apply)({"params": params}, u)
    np.testing.assert_allclose(y, reference(params, u, VARIANTS[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_and_its_gradients_against_a_loop(reverse):
    rng = np.random.default_rng(2)
    length = 13  # no power of two
    transition = (0.9 * np.exp(1j * rng.uniform(-3, 3, 4))).astype(np.complex64)
    v, weight = ((rng.normal(size=(2, 2, length, 4)) @ np.diag(np.ones(4))) for _ in range(2))
    v, weight = (part[0] + 1j * part[1] for part in (v, weight))

    def loss(a_real, a_imag, v_real, v_imag):
        x = parallel_recurrence(jax.lax.complex(a_real, a_imag), jax.lax.complex(v_real, v_imag), reverse=reverse)
        return jnp.real(jnp.sum(jnp.asarray(weight, jnp.complex64) * x)), x

    parts = [jnp.asarray(p, jnp.float32) for p in (transition.real, transition.imag, v.real, v.imag)]
    (_, x), found = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*parts)
    # x_k, and with g_k = ∂L/∂x_k (holomorphic): g_k = w_k + λ̄·g_{k+1}, ∂L/∂v_k = g_k, ∂L/∂λ̄ = Σ g_k·x_{k−1}.
    order = range(length)[::-1] if reverse else range(length)
    state, states, before = np.zeros((2, 4), complex), {}, {}
    for k in order:
        before[k] = state
        states[k] = state = transition * state + v[:, k]
    np.testing.assert_allclose(x, np.stack([states[k] for k in range(length)], 1), rtol=0, atol=1e-5)
    g, by_input, by_transition = np.zeros((2, 4), complex), {}, 0
    for k in list(order)[::-1]:
        by_input[k] = g = weight[:, k] + transition * g
        by_transition = by_transition + (g * before[k]).sum(0)
    by_input = np.stack([by_input[k] for k in range(length)], 1)
    # Of Re(f) for holomorphic f: ∂/∂Re = Re f′, ∂/∂Im = −Im f′.
    expected = (by_transition.real, -by_transition.imag, by_input.real, -by_input.imag)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_hippo_normal_is_hippo_with_a_rank_one_term():
    size = 8
    eigenvalues, vectors = hippo_normal(size)
    p = np.sqrt(np.arange(size) + 0.5)
    rebuilt = vectors @ np.diag(eigenvalues) @ vectors.conj().T - np.outer(p, p)
    np.testing.assert_allclose(rebuilt, hippo(size), atol=1e-12)
    np.testing.assert_allclose(hippo(3), [[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]], atol=1e-12)
    dense = hippo(size) + np.outer(p, p)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(dense).imag), eigenvalues.imag, atol=1e-10)
    np.testing.assert_array_equal(eigenvalues.real, -0.5)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(size), atol=1e-12)
    # What lets real and imaginary parts of B and C be drawn independently, with half the variance each.
    np.testing.assert_allclose(vectors.real.T @ vectors.imag * np.eye(size), 0, atol=1e-12)
    np.testing.assert_allclose((vectors.real**2).sum(0), 0.5, atol=1e-12)


def test_initial_eigenvalues_in_blocks_and_pairs():
    every, kept = initial_eigenvalues(8, 2, False), initial_eigenvalues(8, 2, True)
    np.testing.assert_allclose(np.sort_complex(np.concatenate([kept, kept.conj()])), np.sort_complex(every))
    np.testing.assert_array_equal(kept[:2], kept[2:])
    assert (kept.imag > 0).all()
    with pytest.raises(UsageError, match=r"state_size=6 in blocks=2 with conjugate pairs: give a multiple of 4"):
        initial_eigenvalues(6, 2, True)


def test_conjugate_symmetry_is_the_real_system_of_all_states():
    model, params, u = ssm_and_input()
    every = {**params}
    for name, sign in (("real", 1), ("imag", -1)):
        for matrix, axis in (("B", 1), ("C", 0)):
            kernel = params[f"{matrix}_{name}"]["kernel"]
            every[f"{matrix}_{name}"] = {"kernel": jnp.concatenate([sign * kernel, kernel], axis)}

    def both(params, every):
        a, step = params["A"], jnp.exp(params["discretisation"]["log_step"])
        kept = -jnp.exp(a["log_decay"]) + 1j * jnp.exp(a["log_frequency"])
        transition, gain = zero_order_hold(jnp.concatenate([kept.conj(), kept]), jnp.concatenate([step, step]))
        b = every["B_real"]["kernel"] + 1j * every["B_imag"]["kernel"]
        c = every["C_real"]["kernel"] + 1j * every["C_imag"]["kernel"]
        return parallel_recurrence(transition, gain * (u @ b)) @ c, model.apply({"params": params}, u) - params["D"] * u

    all_states, kept_states = compiled(both)(params, every)
    np.testing.assert_allclose(all_states.imag, 0, atol=1e-5)
    np.testing.assert_allclose(kept_states, all_states.real, atol=1e-5)


@pytest.mark.parametrize("method", [zero_order_hold, bilinear])
def test_discretisation_against_the_matrix_exponential(method):
    size, step = 4, 0.3
    p = np.sqrt(np.arange(size) + 0.5)
    a, b = hippo(size) + np.outer(p, p), np.arange(1.0, 9.0).reshape(size, 2)
    if method is zero_order_hold:  # x' = Ax + Bu, u' = 0 for one step
        both = scipy.linalg.expm(step * np.block([[a, b], [np.zeros((2, size + 2))]]))
        transition, inputs = both[:size, :size], both[:size, size:]
    else:
        half = np.linalg.inv(np.eye(size) - step / 2 * a)
        transition, inputs = half @ (np.eye(size) + step / 2 * a), half @ b * step
    eigenvalues, vectors = hippo_normal(size)
    bar, gain = method(jnp.asarray(eigenvalues, jnp.complex64), jnp.float32(step))
    np.testing.assert_allclose(vectors @ np.diag(bar) @ vectors.conj().T, transition, atol=1e-5)
    np.testing.assert_allclose(vectors @ np.diag(gain) @ vectors.conj().T @ b, inputs, atol=1e-5)


def test_zero_order_hold_of_tiny_steps_keeps_its_digits():
    values = np.array([-1e-5 + 2e-5j, -0.5 + 300j, 0j])
    _, gain = zero_order_hold(jnp.asarray(values, jnp.complex64), jnp.float32(1e-2))
    z = values[:2] * 1e-2
    exact = np.array([1e-2 * (1 + z[0] / 2), (np.exp(z[1]) - 1) / values[1], 1e-2])
    np.testing.assert_allclose(gain, exact, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 8),
    spread=st.sampled_from([0.5, 3.0, 8.0]),
    grid=st.sampled_from(["symmetric", "affine"]),
)
def test_state_decays_whatever_its_parameters_are_rounded_to(seed, bits, spread, grid):
    rng = np.random.default_rng(seed)
    values = [jnp.asarray(rng.normal(0, spread, 16), jnp.float32) for _ in range(3)]
    for method in DISCRETISATIONS:
        bar, gain = _discrete(method, grid, bits, *values)
        assert float(jnp.max(jnp.hypot(bar.real, bar.imag))) < 1
        assert np.isfinite(gain).all()


@jax.jit
def _rounded_symmetric(bits, values):
    return [Uniform("symmetric", per="tensor")(value, bits) for value in values]


@jax.jit
def _rounded_affine(bits, values):
    return [Uniform("affine", per="tensor")(value, bits) for value in values]


_discretise = jax.jit(discretise, static_argnums=0)


def _discrete(method, grid, bits, log_decay, log_frequency, log_step):
    round_ = _rounded_symmetric if grid == "symmetric" else _rounded_affine
    decay, frequency, step = (jnp.exp(x) for x in round_(jnp.float32(bits), [log_decay, log_frequency, log_step - 3]))
    return _discretise(method, decay, frequency, step)


@pytest.mark.parametrize("method", DISCRETISATIONS)
def test_the_naive_parametrisation_is_the_same_function_and_breaks_at_4_bits(method):
    # 2000 steps, of which the slowest state remembers all: |λ̄| is 1 − 5e-4 at most.
    model, params, u = ssm_and_input(2000, discretisation=method, state_size=16, blocks=1)
    twin, own = model.clone(parametrisation="naive"), as_naive(params, method)
    apply, apply_twin = compiled(model.apply), compiled(twin.apply)
    y = apply({"params": params}, u)
    np.testing.assert_allclose(apply_twin({"params": own}, u), y, rtol=0, atol=2e-4 * float(jnp.abs(y).max()))
    ours, theirs = rounded(params, "A", 4), rounded(own, "A", 4)
    assert radius(as_naive(ours, method)) < 1 <= radius(theirs)
    size = float(jnp.abs(y).max())
    assert float(jnp.abs(apply({"params": ours}, u)).max()) < 10 * size
    broken = float(jnp.abs(apply_twin({"params": theirs}, u)).max())
    assert not broken < 1e6 * size  # or no number at all


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_gradients_are_finite_and_reach_every_parameter(parametrisation):
    model = S5Classifier(
        num_classes=10, num_layers=1, width=6, state_size=4, parametrisation=parametrisation, bidirectional=True
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 1)), jnp.float32)
    params = compiled(model.init)(jax.random.key(0), x)["params"]
    gradient = compiled(jax.grad(lambda p: (model.apply({"params": p}, x)[:, 0] ** 2).mean()))(params)
    for path, value in flatten_dict(gradient, sep="/").items():
        assert np.isfinite(value).all() and float(jnp.abs(value).max()) > 0, path


def test_images_are_read_row_by_row_and_bfloat16_gives_float32_logits():
    model = S5Classifier(num_classes=10, num_layers=1, width=6, state_size=4, dropout=0.3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 2)), jnp.float32)
    variables = compiled(model.init)(jax.random.key(0), x)
    ssm, params, u = ssm_and_input(dtype=jnp.bfloat16)

    @compiled
    def outputs(variables, params, x):
        return (
            model.apply(variables, x),
            model.apply(variables, x.reshape(2, 12, 2)),
            model.clone(dtype=jnp.bfloat16).apply(variables, x.astype(jnp.bfloat16)),
            model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)}),
            ssm.apply({"params": params}, u.astype(jnp.bfloat16)),
        )

    logits, flat, half, dropped, y = outputs(variables, params, x)
    np.testing.assert_array_equal(logits, flat)
    assert half.dtype == logits.dtype == jnp.float32 and logits.shape == (2, 10)
    np.testing.assert_allclose(half, logits, atol=0.05)
    assert float(jnp.abs(half - logits).max()) > 0 and float(jnp.abs(dropped - logits).max()) > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")} and y.dtype == jnp.bfloat16


def test_language_model_is_causal_at_any_length():
    model = S5LM(vocab_size=17, num_layers=1, width=6, state_size=4, remat=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)))
    variables = compiled(model.init)(jax.random.key(0), tokens)
    changed_tokens = tokens.at[:, 5].set((tokens[:, 5] + 1) % 17)
    apply = compiled(model.apply)
    logits, changed = jnp.split(apply(variables, jnp.concatenate([tokens, changed_tokens])), 2)
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-6)
    assert float(jnp.abs(changed[:, 5:] - logits[:, 5:]).max()) > 1e-3
    np.testing.assert_allclose(apply(variables, tokens[:, :4]), logits[:, :4], atol=1e-5)


def test_every_part_has_a_name_and_every_mac_is_quantized():
    model = S5Classifier(num_classes=10, num_layers=1, width=6, state_size=4, bidirectional=True)
    x = jax.ShapeDtypeStruct((2, 12, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    names = {path.removeprefix("layer_0/ssm/") for path in flatten_dict(variables["params"], sep="/")}
    assert {"A/log_decay", "A/log_frequency", "B_real/kernel", "C_imag/kernel", "D", "discretisation/log_step"} <= names
    called = set()

    def note(call, args, kwargs, context):
        called.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.apply, variables, x)
    assert {"layer_0/ssm/state/value", "layer_0/ssm/state_backward", "layer_0/ssm/discretisation"} <= called
    rules = [qtrain.Rule(path=".*/C_(real|imag)", acts=16), qtrain.Rule()]
    plan = qtrain.quantize(model, rules).plan(x)
    assert "100.0 %" in str(plan)
    # encoder, B (two parts), C (two parts that read both directions), gate, logits
    tokens, width, state = 2 * 12, 6, 2
    expected = tokens * (width + 2 * width * state + 2 * 2 * state * width + width * width) + 2 * width * 10
    assert sum(op.forward for op in plan.ops) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parametrisation": "magnitude"}, "Did you mean 'magnitude_phase'"),
        ({"discretisation": "euler"}, "'zoh', 'bilinear'"),
        ({"recurrence": "paralel"}, "Did you mean 'parallel'"),
        ({"state_size": 7}, "give a multiple of 4"),
        ({"least_step": 0.0}, "give 0 < least_step <= most_step"),
    ],
)
def test_mistakes_are_named(fields, message):
    model = SSM(**{**SMALL, **fields})
    with pytest.raises(UsageError, match=message) as error:
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, 5)))
    assert "\n" not in str(error.value)


def test_mistakes_of_the_models_are_named():
    with pytest.raises(UsageError, match=r"'gelu', 'half_glu'\. Did you mean"):
        jax.eval_shape(S5Classifier(num_classes=3, activation="glu").init, jax.random.key(0), jnp.ones((1, 3, 1)))
    with pytest.raises(UsageError, match=r"\(batch, length, channels\)"):
        jax.eval_shape(S5Classifier(num_classes=3).init, jax.random.key(0), jnp.ones((1, 3)))


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_a_rule_on_the_state_quantizes_in_the_recurrence_or_behind_it(kind):
    """Sequential: what is rounded is what the next step begins with. Parallel: only what leaves the scan is rounded."""
    rng = np.random.default_rng(0)
    angle, radius = rng.uniform(0, 3, 3), rng.uniform(0.5, 0.95, 3)
    transition = (radius * np.exp(1j * angle)).astype(np.complex64)
    inputs = (rng.normal(size=(2, 6, 3)) + 1j * rng.normal(size=(2, 6, 3))).astype(np.complex64)
    quantizer = Uniform("symmetric", per="tensor")
    rule = Rule(path="value", ops=("output",), acts=4, act_quantizer=quantizer)
    model = quantize(Recurrence(kind), (rule,))
    found = jax.jit(model.apply, static_argnames="bits")({}, transition, inputs, bits=Precision())

    def rounded(x):
        def part(values):
            scale = np.abs(values).max() / 7
            return np.clip(np.rint(values / scale), -7, 7) * scale

        return part(x.real) + 1j * part(x.imag)

    states, x = [], np.zeros((2, 3), np.complex64)
    for step in range(6):
        x = transition * x + inputs[:, step]
        x = rounded(x) if kind == "sequential" else x
        states.append(x)
    expected = np.stack(states, 1)
    np.testing.assert_allclose(found, expected if kind == "sequential" else rounded(expected), atol=1e-5)
