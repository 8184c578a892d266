"""Bits by step at run time.

Every layer of a group shares one :class:`BitWidth`; before each call of the denoiser the plan's row is looked up and
they are set, so that a layer's own cost is to read an index. Ranges were calibrated for each width.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ptqd.diffusion.held_outputs import HeldOutputs, Place, hold_outputs, stop_holding
from ptqd.diffusion.step_state import StepState, StepTable
from ptqd.diffusion.timesteps import timestep_argument
from ptqd.errors import InputError, MismatchError
from ptqd.quantization.modules.activation import ActivationQuantizer, BitWidth
from ptqd.quantization.plan import HOLD, PrecisionPlan
from ptqd.quantization.sites import layer_quantizers

EXACT = 1e-5  # relative: devices divide a timestep by 1000 in different ways
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class PlanSteps(StepTable):
    """A plan's bit widths by step: one look-up a call.

    Attributes:
        step: the one that holds now; None before the first call.

    Args:
        plan: of the steps.
        groups: the width of each group, shared by its layers.
        rows: for each step the indices of the groups' widths (T, G).
    """

    def __init__(self, plan: PrecisionPlan, groups: Sequence[BitWidth], rows: Sequence[Sequence[int]]) -> None:
        self.plan, self.groups, self.rows = plan, tuple(groups), tuple(map(tuple, rows))
        self.timesteps = plan.timesteps
        self._index = {t: i for i, t in reversed([*enumerate(plan.timesteps)])}
        self._next = dict(itertools.pairwise(sorted(self._index.values())))
        self.step: int | None = None

    def enter(self, timesteps: Sequence[float], model: nn.Module) -> None:
        """Let the plan's row for a timestep hold."""
        t = max(timesteps, default=math.nan)
        known = t in self._index  # else its precision matters, which takes a model longer to say
        step = self.step_at(t, torch.float32 if known else getattr(model, "dtype", torch.float32))
        for group, index in zip(self.groups, self.rows[step], strict=True):
            group.index = index

    def step_at(self, t: float, dtype: torch.dtype = torch.float32) -> int:
        """The plan's step at a timestep, in the denoiser's own precision.

        Raises:
            MismatchError: the plan has no such step, or not after the last one.
        """
        before, self.step = self.step, None
        step = self._nearest(t, TOLERANCE.get(dtype, EXACT), before)
        if before is not None and step > before and self._next.get(before) != step:  # less is a run that starts anew
            raise self._mismatch(f"after timestep {self.plan.timesteps[before]:g} came {t:g}")
        self.step = step
        return step

    def _nearest(self, t: float, tolerance: float, before: int | None) -> int:
        """The step at a timestep, as exactly as its precision allows; of several the one that is due."""
        if t in self._index:
            return self._index[t]
        close = [(abs(known - t), step) for known, step in self._index.items() if abs(known - t) <= tolerance * abs(t)]
        due = None if before is None else self._next.get(before)
        if not close:
            raise self._mismatch(f"the plan has no step at timestep {t:g}")
        return due if due in [step for _, step in close] and due is not None else min(close)[1]

    def _mismatch(self, what: str) -> MismatchError:
        first, last = self.plan.timesteps[0], self.plan.timesteps[-1]
        return MismatchError(
            f"{what}: it was made for {self.plan.steps} steps ({first:g} to {last:g}); "
            "sample with the same scheduler and steps, or make a plan for these"
        )


def plan_steps_of(model: nn.Module) -> PlanSteps | None:
    """A denoiser's bits by step; None where they are the same at every step."""
    state = StepState.of(model)
    plan = None if state is None else state.plan
    return plan if isinstance(plan, PlanSteps) else None


def remove_plan(model: nn.Module) -> None:
    """Leave the active widths as they are from now on."""
    state = StepState.of(model)
    if state is not None:
        state.plan, state.aliases = None, {}
    stop_holding(model)


def set_plan(model: nn.Module, plan: PrecisionPlan) -> None:
    """Let a quantized denoiser compute with a plan's bits from now on.

    Raises:
        InputError: the model has no ranges for a width that the plan asks for, or no deep part that is known for steps
            that hold it; a group without a layer, or a layer
            without a group; or a denoiser that takes no timestep.
    """
    if timestep_argument(model) is None:
        raise InputError(f"{type(model).__name__} is told no timestep, so its bits cannot follow the steps")
    quantizers: dict[str, list[ActivationQuantizer]] = {name: [] for name, _ in layer_quantizers(model)}
    for name, quantizer in layer_quantizers(model):
        if len(quantizer.widths) > 1:
            quantizers[name].append(quantizer)
    planned = {name: result for name, result in quantizers.items() if result}
    wanted = {bits for row in plan.bits for bits in row} - {HOLD}
    fixed = {q.bits for _, q in layer_quantizers(model)} or wanted  # a graph has its ranges inside
    if planned:
        widths = next(iter(planned.values()))[0].widths
    elif any(plan.held) or plan.shallow or wanted <= fixed:
        widths = tuple(sorted(fixed))
    else:
        raise InputError("the model has activation ranges for one width; quantize with a recipe such as w4a4+8")
    _check_widths(plan, widths)
    groups = [BitWidth(0) for _ in plan.groups]
    used = set()
    for name, result in planned.items():
        group = plan.group_of(name)
        used.add(group)
        for quantizer in result:
            quantizer.active = groups[group]
    for i, (name, patterns) in enumerate(plan.groups):
        if planned and i not in used:
            raise InputError(
                f"the plan's group {name!r} ({', '.join(patterns)}) has no layer whose bits can change; take it out"
            )
    computed = plan.holding(())  # a call that holds nothing is computed
    rows = [[widths.index(bits) for bits in row] for row in computed.bits]
    StepState.on(model).plan = PlanSteps(plan, groups if planned else (), rows if planned else [()] * plan.steps)
    if any(plan.held) or plan.shallow:
        hold_outputs(model, HeldOutputs(_enter, deep=bool(plan.shallow)))


def _check_widths(plan: PrecisionPlan, widths: Sequence[int]) -> None:
    for step, row in enumerate(plan.bits):
        for bits in row:
            if bits not in (HOLD, *widths):
                known = " and ".join(map(str, widths))
                raise InputError(
                    f"step {step} of the plan asks for {bits} bits, the model has ranges for {known}; "
                    f"quantize with a recipe such as w4a{'+'.join(map(str, sorted({*widths, bits})))}"
                )


def _enter(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Place:
    """Let a call's step hold for what follows the steps; where it stands."""
    state, table = StepState.of(model), plan_steps_of(model)
    assert state is not None
    assert table is not None
    state(model, args, kwargs)
    assert table.step is not None
    plan, step = table.plan, table.step
    weights = plan.extrapolation.get(step, (1.0,)) if plan.held[step] else ()
    return Place(step, weights, shallow=step in plan.shallow)
