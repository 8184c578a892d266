"""The exact choice: a multiple-choice knapsack for the activations, a price of bit operations for the weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import DiffusionPipeline
from scipy import optimize, sparse

from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.mixed_precision.paper_rule import tied
from ptqd.mixed_precision.problem import GROUPS, Ints, Problem, planning_problem
from ptqd.mixed_precision.seconds import StepSeconds
from ptqd.noise.stats import NoiseStats
from ptqd.quantization.plan import HOLD, PrecisionPlan

TIGHT = 1e-6  # relative gap at which a knapsack counts as solved


def search_plan(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    sampling: Sampling,
    stats: Mapping[int, NoiseStats],
    *,
    budget: float | None = None,
    floor: float | None = None,
    weight_bits: Sequence[int] = (),
    groups: int = GROUPS,
    hold: bool = False,
    hold_deep: bool = False,
    seconds: StepSeconds | None = None,
    progress: bool = False,
) -> PrecisionPlan:
    """The plan with the least expected error of the final sample within a budget, or the cheapest that keeps a floor.

    Args:
        pipe: full precision.
        qpipe: quantized by ptqd with a recipe of several widths, such as ``"w4a4+8"``.
        sampling: how it samples.
        stats: of every width, as :func:`ptqd.measure_widths` gives them.
        budget: how many times fewer bit operations than FP32, at least: 19.9. With seconds, how many times faster than
            the same pipeline at its widest, at least.
        floor: signal-to-noise ratio of the final sample against full precision in dB, at least.
        weight_bits: that the plan may give each layer's weights; none leaves them as they are. Layers whose weights a
            rule of the recipe fixes are not touched. One more full-precision and one more quantized run are measured
            for it, of half as many samples, at least 16.
        groups: of layers, at the most, that have bits of their own at each step; with 1 all have the same.
        hold: whether steps may hold the output of the last one that was computed, which costs no operations. Also of
            a recipe of one width, with ``{8: ptqd.measure(pipe, qpipe, sampling)}`` for its statistics.
        hold_deep: whether steps may compute the outer blocks only, while the deep part of the network gives what it
            gave at the last step that computed it (:mod:`ptqd.diffusion.deep_part`). It is measured by two more runs of
            half as many samples. Beside ``hold`` the better of both is taken. An exported pipeline can do it if it was
            exported for it (:func:`ptqd.export`).
        seconds: what steps take, as :func:`ptqd.mixed_precision.measure_seconds` gives it, with ``deep=True`` for
            ``hold_deep``; costs are seconds then.
        progress: show bars.

    Returns:
        The plan; ``made`` says what it is expected to do. :func:`ptqd.apply_plan` puts it to work.

    Raises:
        InputError: no plan meets the budget or the floor; the nearest that can be met is named. Or shallow steps of a
            network whose deep part is not known, or within a budget of seconds for which they were not timed.
    """
    problem = planning_problem(
        pipe,
        qpipe,
        sampling,
        stats,
        weight_bits=weight_bits,
        groups=groups,
        hold=hold,
        hold_deep=hold_deep,
        timed=seconds is not None,
        progress=progress,
    )
    return solve(problem if seconds is None else problem.in_seconds(seconds), budget=budget, floor=floor).plan


@dataclass(frozen=True)
class Solution:
    """A plan with what it is expected to do.

    Attributes:
        plan: to be applied.
        error: expected squared error of the final sample.
        decibels: the same, against the final sample's variance.
        cost: bit operations of a run.
        ratio: how many times fewer than FP32.
        gap: by how much of the error, or of the cost where the error was given, another plan could be better, at the
            most; where steps take other layers than each other, as some guidance does, with weights to choose a guess.
    """

    plan: PrecisionPlan
    error: float
    decibels: float
    cost: float
    ratio: float
    gap: float


def solve(problem: Problem, *, budget: float | None = None, floor: float | None = None) -> Solution:
    """The plan with the least error within a budget, or the cheapest that keeps a floor.

    Args:
        problem: what can be chosen.
        budget: how many times fewer bit operations than FP32, at least.
        floor: signal-to-noise ratio of the final sample against full precision, dB, at least.

    Where steps may hold, patterns of several numbers of held steps are tried, each with the best widths for the rest.

    Raises:
        InputError: no plan meets it; the nearest that can be met is named. Or not just one of the two is given.
    """
    if (budget is None) == (floor is None):
        raise InputError("give a budget of bit operations or a floor of quality, one of them")
    if budget is not None and budget <= 0:
        raise InputError(f"a budget is how many times fewer bit operations, more than 0; got {budget:g}")
    limit = problem.full_cost / budget if budget is not None else problem.variance / 10 ** ((floor or 0.0) / 10)
    families: list[list[Problem]] = []
    if problem.held_errors is not None:
        families.append([problem.holding(held) for held in problem.held_errors.patterns])
    if problem.shallow_errors is not None:
        families.append([problem.without_deep(shallow) for shallow in problem.shallow_errors.patterns])
    ends = [family[-1] for family in families] or [problem]
    most = min(ends, key=lambda end: end.cost(*_ends(end)[0]))
    cheapest, best = _ends(most)[0], _ends(problem)[1]
    if budget is not None and most.cost(*cheapest) > limit * (1 + 1e-12):
        ratio = problem.full_cost / most.cost(*cheapest)
        fewest = "the fewest bits everywhere" if most is problem else "the fewest bits, at the first step alone"
        if most.shallow:
            fewest = "the fewest bits, and the deep part at the fewest steps"
        raise InputError(f"no plan meets a budget of {budget:g}x; the nearest is {_down(ratio)}x, with {fewest}")
    if floor is not None and problem.error(*best) > limit:
        nearest = problem.decibels(problem.error(*best))
        raise InputError(
            f"no plan keeps {floor:g} dB; the nearest is {_down(nearest)} dB, with the most bits everywhere"
        )
    made: dict[str, float] = {"budget": budget} if budget is not None else {"floor": floor or 0.0}
    if not families:
        return _solved(problem, limit, made)
    found = [solution for family in families if (solution := _searched(family, limit, made)) is not None]
    return min(found, key=lambda solution: solution.error if budget is not None else solution.cost)


def _searched(problems: Sequence[Problem], limit: float, made: Mapping[str, float]) -> Solution | None:
    """The best of problems in which one step more holds than in the one before: some at first, then those between.

    None where none of them can be met.
    """
    by_cost = "budget" in made
    found: dict[int, Solution | None] = {}

    def value(n: int) -> float:
        if n not in found:
            cheapest, best = _ends(problems[n])
            end = problems[n].cost(*cheapest) if by_cost else problems[n].error(*best)
            found[n] = _solved(problems[n], limit, made) if end <= limit * (1 + 1e-12) else None
        solution = found[n]
        return math.inf if solution is None else solution.error if by_cost else solution.cost

    step = max(1, (len(problems) - 1) // 8)
    best = min([*range(0, len(problems), step), len(problems) - 1], key=value)
    while step > 1:
        step = (step + 1) // 2 if step > 2 else 1
        best = min((n for n in (best - step, best, best + step) if 0 <= n < len(problems)), key=value)
    return found[best]


def _solved(problem: Problem, limit: float, made: Mapping[str, float]) -> Solution:
    """The best widths and weights of a problem, which can be met."""
    by_cost = "budget" in made
    weights, bound = _ends(problem)[1][1], 0.0
    if len(problem.weighted):
        weights, bound = _weights(problem, limit, by_cost=by_cost)
    choice, lower = _knapsack(problem, weights, limit, by_cost=by_cost)
    if not len(problem.weighted):
        bound = lower
    error, cost = problem.error(choice, weights), problem.cost(choice, weights)
    value = error if by_cost else cost
    gap = max(0.0, (value - bound) / value) if value > 0 else 0.0
    output = {
        "rule": "budget",
        **made,
        **({"held_steps": sum(problem.held)} if problem.held else {}),
        **({"shallow_steps": sum(problem.shallow)} if problem.shallow else {}),
        ("times_faster" if problem.unit == "seconds" else "fewer_bit_operations"): round(problem.full_cost / cost, 3),
        "expected_snr_db": round(problem.decibels(error), 2),
        "optimality_gap": round(gap, 6),
    }
    return Solution(
        _plan(problem, choice, weights, output), error, problem.decibels(error), cost, problem.full_cost / cost, gap
    )


def _down(value: float) -> str:
    """Two digits, never more than the value: what can really be asked for."""
    return f"{math.floor(value * 100) / 100:g}"


def uniform(problem: Problem, bits: int) -> Solution:
    """The same activation bits everywhere, and the weights' that err least, for comparison."""
    return rated(problem, PrecisionPlan.uniform(problem.timesteps, bits))


def rated(problem: Problem, plan: PrecisionPlan) -> Solution:
    """What a plan with one group is expected to do, with the weights' bits that err least, for comparison."""
    problem = problem.holding(plan.held).without_deep([i in plan.shallow for i in range(plan.steps)])
    rows = np.array([problem.widths.index(row[0]) for row in plan.holding(()).bits])
    choice = np.repeat(rows[:, None], len(problem.groups), axis=1)
    weights = _ends(problem)[1][1]
    error, cost = problem.error(choice, weights), problem.cost(choice, weights)
    plan = _plan(problem, choice, weights, plan.made)
    return Solution(plan, error, problem.decibels(error), cost, problem.full_cost / cost, 0.0)


def pareto(problem: Problem, points: int = 12) -> list[Solution]:
    """Budgeted plans over the whole range of budgets, cheapest first; where steps may hold, up to three in four do."""
    best, most = _ends(problem)[1], problem
    if problem.held_errors is not None:
        patterns = problem.held_errors.patterns
        most = problem.holding(patterns[3 * len(patterns) // 4])
    elif problem.shallow_errors is not None:
        most = problem.without_deep(problem.shallow_errors.patterns[-1])
    low, high = problem.full_cost / problem.cost(*best), problem.full_cost / most.cost(*_ends(most)[0])
    return [solve(problem, budget=float(b)) for b in np.geomspace(high, low, points) * (1 - 1e-9)]


def _ends(problem: Problem) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
    """The fewest bits everywhere, and the choice with the least error."""
    shape, layers = problem.errors.shape[:2], len(problem.weighted)
    few = problem.weight_bits[0] if layers else 0
    cheapest = np.zeros(shape, dtype=np.int64), np.full(layers, few, dtype=np.int64)
    bits = np.array(problem.weight_bits, dtype=np.int64)
    best = problem.errors.argmin(2), bits[problem.weight_errors.argmin(1)] if layers else cheapest[1]
    return cheapest, best


def _plan(problem: Problem, choice: Ints, weights: Ints, made: Mapping[str, object]) -> PrecisionPlan:
    rows = [tuple(problem.widths[i] for i in row) for row in choice.tolist()]
    rows = [(HOLD,) * len(row) if any(problem.held[i : i + 1]) else row for i, row in enumerate(rows)]
    groups = tuple((f"group {g + 1}", names) for g, names in enumerate(problem.groups))
    chosen = dict(zip(problem.weighted, weights.tolist(), strict=True))
    extrapolation = problem.held_errors.extrapolation(problem.held) if problem.held_errors and problem.held else {}
    shallow = tuple(i for i, is_shallow in enumerate(problem.shallow) if is_shallow)
    bits = tied(problem.timesteps, rows)
    return PrecisionPlan(problem.timesteps, bits, groups, chosen, made, extrapolation, shallow)


def _knapsack(problem: Problem, weights: Ints, limit: float, *, by_cost: bool) -> tuple[Ints, float]:
    """The best widths (T, G) for given weights: a multiple-choice knapsack, and a lower bound of what is minimised.

    Steps at the same timestep are one choice; those that hold are none.
    """
    computed = ~np.array(problem.held or (False,) * len(problem.timesteps))
    costs, errors = problem.activation_costs(weights)[computed], problem.errors[computed]
    first = [problem.timesteps.index(t) for t, kept in zip(problem.timesteps, computed, strict=True) if kept]
    distinct = sorted(set(first))
    place = np.array([distinct.index(i) for i in first])
    shape = (len(distinct), *errors.shape[1:])
    joined = [np.zeros(shape), np.zeros(shape)]
    for table, total in zip((costs, errors), joined, strict=True):
        np.add.at(total, place, table)
    choice = np.zeros(problem.errors.shape[:2], dtype=np.int64)
    no_choice = problem.cost(choice, weights) - float(costs[:, :, 0].sum())
    no_error = problem.error(choice, weights) - float(errors[:, :, 0].sum())
    limited, minimised = joined if by_cost else joined[::-1]
    room = limit - (no_choice if by_cost else no_error)
    scale = max(abs(room), 1e-300)
    items, count = shape[0] * shape[1], shape[2]
    one_each = sparse.kron(sparse.eye(items), np.ones((1, count)), format="csr")
    size = float(minimised.max()) or 1.0
    result = optimize.milp(
        minimised.ravel() / size,
        integrality=np.ones(items * count),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(limited.reshape(1, -1) / scale, -np.inf, room / scale * (1 + 1e-12)),
        ],
        options={"mip_rel_gap": TIGHT, "time_limit": 60},
    )
    if result.x is None:
        raise InputError("no plan meets what is asked for; ask for less")
    choice[computed] = result.x.reshape(shape).argmax(2)[place]
    other = no_error if by_cost else no_choice
    return choice, float(result.mip_dual_bound) * size + other


def _weights(problem: Problem, limit: float, *, by_cost: bool) -> tuple[Ints, float]:
    """Weights' bits (L,) at the price of a bit operation that meets the limit, and the dual bound of the optimum.

    What is minimised is ``error + price cost``. The cheapest price that still meets the limit is found by bisection.
    """
    low, high = 1e-30, 1e30  # prices in error for one full cost
    met: Ints | None = None
    bound = -math.inf
    for _ in range(60):
        price = math.sqrt(low * high)
        choice, weights = priced(problem, price / problem.full_cost)
        error, cost = problem.error(choice, weights), problem.cost(choice, weights)
        total = error + price / problem.full_cost * cost
        if by_cost:
            bound = max(bound, total - price / problem.full_cost * limit)
            meets = cost <= limit
        else:
            bound = max(bound, (total - limit) * problem.full_cost / price)
            meets = error <= limit
        if meets:
            met = weights
        if meets == by_cost:
            high = price
        else:
            low = price
        if high / low < 1 + 1e-4:
            break
    if met is None:
        met = _ends(problem)[0 if by_cost else 1][1]
    return met, bound


def priced(problem: Problem, price: float) -> tuple[Ints, Ints]:
    """The minimum of ``error + price cost`` over widths (T, G) and weights' bits (L,), exact as the next lines say.

    Groups are apart. In one, the widths depend on the weights only through ``m``, the weights' share of a bit of
    activation, and change at finitely many values of it; for each set of widths the best weights follow layer by layer.
    The best pair is among these. MACs are taken to be the same multiple of each other at every step, as they are
    unless guidance or blocks are switched off midway.
    """
    widths, bits = np.array(problem.widths), np.array(problem.weight_bits)
    choice = np.zeros(problem.errors.shape[:2], dtype=np.int64)
    weights = np.zeros(len(problem.weighted), dtype=np.int64)
    alone = problem.group_of == -1
    table = problem.weight_errors[alone][:, :] + price * problem.weight_costs.sum(0)[alone][:, None] * bits
    weights[alone] = bits[table.argmin(1)]
    for g in range(len(problem.groups)):
        mine = problem.group_of == g
        by_layer, errors = problem.layer_costs[:, mine], problem.weight_errors[mine]
        base = problem.errors[:, g] + price * problem.costs[:, g]  # T,W
        step = by_layer.sum(1)  # T
        if not step.any():
            choice[:, g] = base.argmin(1)
            weights[mine] = bits[errors.argmin(1)]
            continue
        pairs = [(i, j) for i in range(len(widths)) for j in range(i + 1, len(widths))]
        some = step > 0
        turns = [(base[some, i] - base[some, j]) / (price * step[some] * (widths[j] - widths[i])) for i, j in pairs]
        breaks = np.unique(np.clip(np.concatenate(turns), bits[0], bits[-1]))  # mean weight bits
        middles = np.unique(np.concatenate([[bits[0], bits[-1]], (breaks[1:] + breaks[:-1]) / 2]))
        tables = base[None] + price * middles[:, None, None] * step[:, None] * widths  # M,T,W
        options = np.unique(tables.argmin(2), axis=0)  # M,T
        activation = widths[options]  # M,T
        cost = activation @ by_layer  # M,L: bit operations of one bit of each layer's weights
        with_weights = errors[None] + price * cost[:, :, None] * bits  # M,L,B
        rows = np.take_along_axis(base[None].repeat(len(options), 0), options[..., None], 2)[..., 0].sum(1)
        best = int((rows + with_weights.min(2).sum(1)).argmin())
        choice[:, g] = options[best]
        weights[mine] = bits[with_weights[best].argmin(1)]
    return choice, weights
