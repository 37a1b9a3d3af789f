"""The search's problem and its integer programs: against enumeration, and against what `qtrain.cost` says."""

import dataclasses
import itertools

import numpy as np
import pytest
from inject_models import MLP, ConvNet, Scanned, normal, random_variables
from quantizer_reference import fake_quantize

from qtrain import Precision, Rule, cost, quantize
from qtrain.errors import UsageError
from qtrain.quantizers import DoubleRounding, Nested, Uniform
from qtrain.search import Costs, Problem, front, layer_costs, precisions, searched_layers, solve, squared_errors
from qtrain.search.problem import check_widths, curvatures, expected_rise

WIDTHS = (8, 4, 2)
CHANNEL = Uniform("symmetric", per="channel")


def made_up(seed, layers=6):
    """Errors and sizes over many orders of magnitude; seed 0 has layers that are alike, 1 has ties and a bad 8 bits."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 10 ** rng.integers(2, 8), layers)
    omega = np.exp(4 * rng.normal(size=(layers, 1))) * sizes[:, None] * 4.0 ** -np.array(WIDTHS)
    omega *= np.exp(0.3 * rng.normal(size=omega.shape))
    if seed == 0:
        sizes[3:], omega[3:] = sizes[:3], omega[:3]
    if seed == 1:
        omega[0] = omega[0, 0], omega[0, 0], omega[0, 0]
        omega[1, 0] = 2 * omega[1, 1]
    table = sizes[:, None] * np.array(WIDTHS)
    bitops = rng.integers(1, 10**9, (layers, 1)) * np.array(WIDTHS) ** 2
    costs = {"bits": Costs(table, 0, int(sizes.sum())), "bitops": Costs(bitops, 12345, 1)}
    return Problem(tuple("abcdef"[:layers]), WIDTHS, omega, costs)


def enumerated(problem, unit):
    """(cost, Ω) of all assignments, in the cost's whole numbers."""
    costs, rows = problem.costs[unit], np.arange(len(problem.layers))
    choices = np.array(list(itertools.product(range(len(problem.widths)), repeat=len(rows))))
    return costs.table[rows, choices].sum(1) + costs.fixed, problem.omega[rows, choices].sum(1)


@pytest.mark.parametrize(("seed", "unit"), [(0, "bits"), (1, "bits"), (3, "bits"), (7, "bitops")])
def test_the_front_is_that_of_all_assignments(seed, unit):
    problem = made_up(seed)
    spent, omega = enumerated(problem, unit)
    efficient = []
    for index in np.lexsort((omega, spent)):
        # Sums of the same numbers in another order may differ in the last bit.
        if not efficient or omega[index] < efficient[-1][1] * (1 - 1e-12):
            efficient.append((int(spent[index]), float(omega[index])))
    found = front(problem, unit)
    assert [problem.costs[unit].total(choice) for choice in found] == [total for total, _ in efficient]
    np.testing.assert_allclose([problem.rise(choice) for choice in found], [rise for _, rise in efficient], rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_a_budget_is_kept_exactly_and_used_best(seed):
    problem = made_up(seed)
    for unit, costs in problem.costs.items():
        spent, omega = enumerated(problem, unit)
        budgets = np.quantile(spent, [0.0, 0.1, 0.5, 0.9]).round().astype(int)  # some of them are met exactly
        for budget in (*map(int, budgets), int(spent.max()) * 2):
            given = str(budget) if costs.divisor == 1 else repr((budget + 0.25) / costs.divisor)
            choice = solve(problem, unit, given)
            assert costs.total(choice) <= budget
            assert problem.rise(choice) <= omega[spent <= budget].min() * (1 + 1e-9)


def test_a_grid_of_budgets_gives_points_of_the_front_and_its_ends():
    problem = made_up(3)
    whole = [tuple(choice) for choice in front(problem, "bits")]
    some = [tuple(choice) for choice in front(problem, "bits", 9)]
    assert 2 < len(some) <= 9 and set(some) <= set(whole)
    assert some[0] == whole[0] == (2,) * 6 and some[-1] == whole[-1]


def test_a_budget_is_a_decimal_number_not_its_nearest_float():
    """Of 100 weights 5 at 8 bits and the others at 2 are 2.3 bits on average; in floats 2.3 · 100 is below 230."""
    assert 2.3 * 100 < 230
    table = np.array([[40, 20, 10], [760, 380, 190]])
    omega = np.array([[1, 2, 4.0], [1, 3, 9.0]])
    problem = Problem(("a", "b"), WIDTHS, omega, {"bits": Costs(table, 0, 100)})
    for budget in (2.3, "2.3", np.float64(2.3)):
        assert problem.assignment(solve(problem, "bits", budget)) == {"a": 8, "b": 2}
    assert problem.assignment(solve(problem, "bits", "2.2999999999999999999999")) == {"a": 4, "b": 2}


def test_what_is_no_better_is_not_paid_for():
    problem = Problem(("a",), WIDTHS, np.array([[1.0, 1.0, 5.0]]), {"bits": Costs(np.array([[8, 4, 2]]), 0, 1)})
    assert problem.assignment(solve(problem, "bits", 8)) == {"a": 4}
    assert [problem.assignment(choice)["a"] for choice in front(problem, "bits")] == [2, 4]


CASES = {
    "ends fixed": (
        MLP((8, 8, 6, 4)),
        (normal(1, 6),),
        (Rule(position="ends", weights=8, acts=8), Rule(bias_quantizer=CHANNEL)),
        {},
    ),
    "activations fixed": (MLP(), (normal(1, 6),), (Rule(acts=5, act_quantizer=CHANNEL),), {}),
    "weights alone": (MLP(), (normal(1, 6),), (Rule(act_quantizer=None),), {}),
    "activations scheduled apart": (MLP(), (normal(1, 6),), (Rule(),), {"acts": False}),
    "weights fixed in one": (MLP(), (normal(1, 6),), (Rule("Dense_1", weights=3), Rule()), {}),
    "convolutions": (
        ConvNet(),
        (normal(1, 12, 12, 3),),
        (Rule("head", act_quantizer=None, weight_quantizer=None), Rule()),
        {},
    ),
    "scan": (Scanned(), (normal(1, 6),), (Rule(),), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_costs_are_those_of_qtrain_cost(name):
    model, arguments, rules, options = CASES[name]
    qmodel = quantize(model, rules)
    plan, weights = qmodel.plan(*arguments), qmodel.weights(*arguments)
    searched = searched_layers(plan, weights)
    scheduled = Precision(weights=8, acts=6, grads=8)
    costs = layer_costs(plan, searched, WIDTHS, scheduled, **options)
    rng = np.random.default_rng(0)
    for _ in range(5):
        choice = rng.integers(0, 3, len(searched))
        bits = {path: WIDTHS[index] for path, index in zip(searched, choice, strict=True)}
        assigned = precisions(plan.followers, bits, scheduled, **options)
        assert all(assigned[path].weights == width for path, width in bits.items())
        assert costs["bytes"].of(choice) == cost.weight_bytes(plan.ops, assigned, plan.weight_scales)
        assert costs["bitops"].of(choice) == cost.bitops(plan.ops, assigned, ("forward",))
        sizes = {path: sum(weight.size for weight in searched[path]) for path in searched}
        assert costs["bits"].of(choice) == sum(sizes[p] * bits[p] for p in searched) / sum(sizes.values())
    if name == "scan":  # a stack is one layer, with the weights of all its iterations
        assert [weight.stacked for leaves in searched.values() for weight in leaves].count(1) > 0


def test_omega_is_the_curvature_times_the_squared_error():
    qmodel = quantize(MLP(), Rule(bias_quantizer=Uniform("symmetric", per="tensor")))
    variables = random_variables(MLP(), normal(2, 6))
    searched = searched_layers(qmodel.plan(normal(2, 6)), qmodel.weights(normal(2, 6)))
    found = squared_errors(searched, variables["params"], {}, WIDTHS)
    expected = {}
    for path, module in variables["params"].items():
        for kind, per, contracted in (("kernel", "channel", (0,)), ("bias", "tensor", None)):
            x = np.asarray(module[kind], np.float64)
            quantized = [fake_quantize(x, "symmetric", per, bits, contracted) for bits in WIDTHS]
            expected[f"{path}/{kind}"] = [np.sum((q - x) ** 2) for q in quantized]
    assert found.keys() == expected.keys()
    for name, errors in expected.items():
        np.testing.assert_allclose(found[name], errors, rtol=1e-4)
    traces = {name: 3.0 for name in found}
    curvature = curvatures(searched, traces)
    omega = expected_rise(searched, curvature, found)
    sizes = {name: np.prod(np.shape(variables["params"][name.split("/")[0]][name.split("/")[1]])) for name in found}
    first = [3.0 / sizes[n] * np.array(expected[n]) for n in ("Dense_0/kernel", "Dense_0/bias")]
    np.testing.assert_allclose(omega[0], sum(first), rtol=1e-4)


def test_a_stack_of_layers_is_quantized_layer_by_layer():
    qmodel = quantize(Scanned(), Rule())
    variables = random_variables(Scanned(), normal(2, 6))
    searched = searched_layers(qmodel.plan(normal(2, 6)), qmodel.weights(normal(2, 6)))
    (path,) = [path for path, leaves in searched.items() if leaves[0].stacked][:1]
    weight = searched[path][0]
    x = np.asarray(weight.value(variables["params"]), np.float64)
    expected = sum(np.sum((fake_quantize(layer, "symmetric", "channel", 4, (0,)) - layer) ** 2) for layer in x)
    found = squared_errors({path: (weight,)}, variables["params"], {}, (4,))
    np.testing.assert_allclose(found[weight.name], expected, rtol=1e-4)


def test_a_trace_that_is_not_above_zero_takes_the_least_curvature():
    qmodel = quantize(MLP(), Rule())
    searched = searched_layers(qmodel.plan(normal(2, 6)), qmodel.weights(normal(2, 6)))
    names = [weight.name for leaves in searched.values() for weight in leaves]
    found = curvatures(searched, dict(zip(names, (48.0, -5.0, 64.0), strict=True)))
    assert [found[name] for name in names] == [1.0, 1.0, 2.0]
    with pytest.raises(UsageError, match="above zero"):
        curvatures(searched, dict.fromkeys(names, -1.0))


def planned(rules, model=None):
    qmodel = quantize(MLP() if model is None else model, rules)
    return qmodel.plan(normal(2, 6)), qmodel.weights(normal(2, 6))


def high_at_four():
    weights = quantize(MLP(), Rule(weight_quantizer=DoubleRounding(high=4))).weights(normal(2, 6))
    return {weight.path: (weight,) for weight in weights}


def shared_weights():
    plan, weights = planned(Rule())
    searched = searched_layers(plan, weights)
    once, twice = (op.rhs for op in plan.ops[:2])
    tied = (plan.ops[0], dataclasses.replace(plan.ops[1], rhs=dataclasses.replace(twice, parameter=once.parameter)))
    return layer_costs(dataclasses.replace(plan, ops=cost.Ops(tied)), searched, WIDTHS, Precision(8, 8, 8))


MISTAKES = {
    "below the range": (lambda: solve(made_up(2), "bits", 1.5), r"with widths 8, 4, 2 .* from 2 to 8 bits; give at le"),
    "below the range of bitops": (lambda: solve(made_up(2), "bitops", 12344), "give at least"),
    "no number": (lambda: solve(made_up(2), "bits", "three"), "bits=three"),
    "not above zero": (lambda: solve(made_up(2), "bits", -3), "bits=-3"),
    "not finite": (lambda: solve(made_up(2), "bits", float("inf")), "bits=inf"),
    "no unit": (lambda: solve(made_up(2), "bit", 3), "Did you mean 'bits'"),
    "one point": (lambda: front(made_up(2), "bits", 1), "1 points"),
    "all fixed": (lambda: searched_layers(*planned(Rule(weights=4))), "no layer's weights follow"),
    "chosen": (lambda: searched_layers(*planned(Rule(weight_quantizer=Nested()))), "choose their own width"),
    "one width": (lambda: check_widths((4, 4), searched_layers(*planned(Rule()))), "nothing to choose"),
    "float": (lambda: check_widths((32, 4), searched_layers(*planned(Rule()))), "32 is none"),
    "shared": (shared_weights, "'Dense_0' and 'Dense_1' share the weights"),
    "above h": (
        lambda: check_widths((8, 4), high_at_four()),
        "8 bits for the weights of 'Dense_0'.*stored bits",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_the_range_that_an_error_names_can_be_met():
    problem = made_up(4)
    for unit in problem.costs:
        with pytest.raises(UsageError) as raised:
            solve(problem, unit, 1)
        least = str(raised.value).rsplit(" ", 1)[-1]
        assert set(problem.assignment(solve(problem, unit, least)).values()) == {2}
