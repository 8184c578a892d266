"""Plans in a run: what is asked for, the stages that make it, and what the report shows of it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.diffusion.macs import Macs
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.trajectory import record
from ptqd.errors import ArtifactError, InputError
from ptqd.experiments.results import PlanFigures, PlanPoint
from ptqd.mixed_precision.paper_rule import forward_snr, paper_plan, quantized_snr
from ptqd.mixed_precision.problem import GROUPS, Problem, planning_problem
from ptqd.mixed_precision.seconds import measure_seconds
from ptqd.mixed_precision.solver import Solution, pareto, rated, solve, uniform
from ptqd.noise.stats import NoiseStats
from ptqd.quantization.apply_plan import plan_of
from ptqd.quantization.bops import cost_of
from ptqd.quantization.numerics.affine import check_weight_bits
from ptqd.quantization.plan import HOLD, PrecisionPlan
from ptqd.quantization.recipe import Recipe
from ptqd.schema import typed

SECONDS = "-seconds"
MOST = 1000  # times fewer bit operations, decibels, or bits
PICTURED = 20  # steps whose sample is shown


@dataclass(frozen=True)
class PlanRequest:
    """Which plan a run wants.

    Attributes:
        kind: ``"auto"``, ``"paper"``, or the path of a plan.
        budget: for auto: how many times fewer bit operations than FP32.
        floor: for auto: the final sample's signal-to-noise ratio in dB.
        weight_bits: for auto: that a plan may give each layer's weights; none leaves them.
        groups: for auto: of layers, at the most, with bits of their own.
        hold: for auto: whether steps may hold the output of the last one that was computed.
        hold_deep: for auto: whether steps may hold what the deep part of the network gave.
        in_seconds: the budget is how many times faster, not how many times fewer bit operations.
        given: the plan that the path leads to.
    """

    kind: str
    budget: float | None = None
    floor: float | None = None
    weight_bits: tuple[int, ...] = ()
    groups: int = GROUPS
    given: PrecisionPlan | None = None
    hold: bool = False
    in_seconds: bool = False
    hold_deep: bool = False

    @classmethod
    def parse(
        cls,
        kind: str,
        budget: str | None,
        floor: str | None,
        weights: str | None,
        groups: int | None = None,
        *,
        hold: bool = False,
        hold_deep: bool = False,
    ) -> "PlanRequest":
        """From a command's words: ``19.9x`` or ``2x-seconds``, ``25dB``, ``4,6,8``.

        Raises:
            InputError: a word that is no number or goes with another kind of plan; or a plan that cannot be read.
        """
        if kind != "auto" and (budget or floor or weights or groups or hold or hold_deep):
            raise InputError(
                f"--budget, --floor, --weights, --groups, --hold, --hold-deep go with --plan auto, not with {kind!r}"
            )
        if kind == "auto" and (budget is None) == (floor is None):
            raise InputError("--plan auto needs --budget, such as 19.9x, or --floor, such as 25dB; one of them")
        if groups is not None and groups < 1:
            raise InputError(f"--groups must be at least 1; got {groups}")
        bits = [_number(part, "weights", "4,6,8") for part in weights.split(",")] if weights else []
        for value in bits:
            if not value.is_integer():
                raise InputError(f"--weights are whole numbers of bits, like 4,6,8; got {value:g}")
            check_weight_bits(int(value))
        in_seconds = budget is not None and budget.endswith(SECONDS)
        return cls(
            kind,
            None if budget is None else _number(budget.removesuffix(SECONDS).removesuffix("x"), "budget", "19.9x"),
            None if floor is None else _number(floor.removesuffix("dB"), "floor", "25dB"),
            tuple(sorted({int(value) for value in bits})),
            groups or GROUPS,
            None if kind in ("auto", "paper") else PrecisionPlan.load(Path(kind)),
            hold,
            in_seconds,
            hold_deep,
        )

    @property
    def name(self) -> str:
        """For labels and folders."""
        if self.kind == "auto":
            limit = f"{self.budget:g}x" if self.budget is not None else f"{self.floor:g}dB"
            limit += SECONDS if self.in_seconds else ""
            held = {(True, False): ", steps held", (False, True): ", deep held", (True, True): ", steps or deep held"}
            return limit + held.get((self.hold, self.hold_deep), "")
        return self.kind if self.kind == "paper" else Path(self.kind).stem

    @property
    def holds(self) -> bool:
        """Whether a plan may have steps that hold the output of the last one that was computed."""
        return self.hold or (self.given is not None and any(self.given.held))

    @property
    def holds_deep(self) -> bool:
        """Whether a plan may have shallow steps."""
        return self.hold_deep or (self.given is not None and bool(self.given.shallow))

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "PlanRequest":
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: they do not fit.
        """
        given = facts.get("given")
        plain = {name: value for name, value in facts.items() if name != "given"}
        request: PlanRequest = typed(plain, cls, "the manifest's plan")
        known = [request.budget, request.floor]
        bounded = all(value is None or 0 < value <= MOST for value in known) and request.groups >= 1
        wanted = (request.budget is None) != (request.floor is None) if request.kind == "auto" else known == [None] * 2
        if not (bounded and wanted) or (given is None) != (request.kind in ("auto", "paper")):
            raise ArtifactError("the manifest's plan is none that can be asked for; copy the manifest again")
        for bits in request.weight_bits:
            check_weight_bits(bits)
        return request if given is None else dataclasses.replace(request, given=PrecisionPlan.from_dict(given))

    def to_dict(self) -> dict[str, Any]:
        """All that a plan depends on, as plain values."""
        plain = dataclasses.asdict(dataclasses.replace(self, given=None))
        return plain if self.given is None else {**plain, "given": self.given.to_dict()}

    def check(self, recipe: Recipe, steps: int | None) -> None:
        """Refuse, before anything is sampled, what cannot come to a plan.

        Args:
            recipe: that the plan is of.
            steps: of the run; None where that is not known yet.

        Raises:
            InputError: the recipe has one width, or the plan asks for others or is for other steps.
        """
        if len(recipe.widths) < 2 and not (self.holds or self.holds_deep):
            only = recipe.widths[0]
            raise InputError(
                f"{recipe.name} has ranges for {only}-bit activations only; give a recipe such as w4a4+8, or let steps "
                "hold their output (--hold)"
            )
        if self.given is None:
            return
        if steps is not None and self.given.steps != steps:
            raise InputError(f"the plan {self.kind} is for {self.given.steps} steps, the run takes {steps}")
        missing = {bits for row in self.given.bits for bits in row} - {HOLD, *recipe.widths}
        if missing:
            widths = "+".join(map(str, sorted({*recipe.widths, *missing})))
            raise InputError(
                f"the plan {self.kind} asks for {min(missing)} bits, for which {recipe.name} has no ranges; "
                f"give a recipe such as w{recipe.weights.bits}a{widths}"
            )


def _number(text: str, name: str, example: str) -> float:
    number = re.fullmatch(r"[0-9]+(\.[0-9]*)?(e[0-9]{1,2})?", text, re.ASCII | re.IGNORECASE)
    value = math.nan if number is None else float(text)
    if not 0 < value <= MOST:
        raise InputError(f"--{name} {text!r} is no number above 0; give it like {example}, and at most {MOST}")
    return value


def load_widths(folder: Path) -> dict[int, NoiseStats]:
    """What :func:`ptqd.experiments.sharding.measure_width_shards` wrote."""
    return {int(path.stem): NoiseStats.load(path) for path in sorted(folder.glob("*.safetensors"))}


def make_plan(
    pipe: DiffusionPipeline,
    quantized: DiffusionPipeline,
    sampling: Sampling,
    request: PlanRequest,
    stats: Mapping[int, NoiseStats],
    *,
    progress: bool,
) -> tuple[PrecisionPlan, Problem | None]:
    """The plan that is asked for, and for auto what it was chosen among.

    Args:
        pipe: full precision.
        quantized: with ranges for several widths.
        sampling: how it samples.
        request: which plan.
        stats: by width; of a plan that is given, none are needed.
        progress: show bars.

    Raises:
        InputError: no plan meets the budget or the floor.
    """
    if request.given is not None:
        return request.given, None
    if request.kind == "paper":
        return paper_plan(stats), None
    bits, groups = request.weight_bits, request.groups
    problem = planning_problem(
        pipe,
        quantized,
        sampling,
        stats,
        weight_bits=bits,
        groups=groups,
        hold=request.hold,
        hold_deep=request.hold_deep,
        timed=request.in_seconds,
        progress=progress,
    )
    chosen_from = problem
    if request.in_seconds:
        timesteps = next(iter(stats.values())).measured_on.model_timesteps
        seconds = processes.by_main(
            lambda: measure_seconds(quantized, sampling, timesteps, sorted(stats), deep=request.hold_deep)
        )
        chosen_from = problem.in_seconds(seconds)
    return solve(chosen_from, budget=request.budget, floor=request.floor).plan, problem


def plan_figures(
    planned: DiffusionPipeline, problem: Problem, stats: Mapping[int, NoiseStats], macs: Macs
) -> PlanFigures:
    """What the report shows: SNR by width, bits and share of the cost by step, and quality against cost.

    Args:
        planned: the pipeline with its plan.
        problem: what a plan can choose there.
        stats: by width.
        macs: of a run.
    """
    plan, first = plan_of(planned), stats[problem.widths[0]]
    cost = cost_of(planned, macs)
    known = first.levels is not None
    expected = rated(problem, plan)
    return PlanFigures(
        made=dict(plan.made),
        timesteps=tuple(first.timesteps.tolist()),
        widths=tuple(problem.widths),
        snr={str(b): tuple(quantized_snr(s).tolist()) for b, s in stats.items()},
        forward_snr=tuple(forward_snr(first).tolist()) if known else None,
        groups=tuple(name for name, _ in plan.groups),
        bits=plan.bits,
        weights=dict(plan.weights),
        share=tuple((cost.bops.sum(1) / cost.total).tolist()),
        ratio=cost.ratio,
        pareto=tuple(_point(s) for s in pareto(problem)),
        uniform=tuple(dataclasses.replace(_point(uniform(problem, b)), bits=b) for b in problem.widths),
        paper=_point(rated(problem, paper_plan(stats))) if known else None,
        expected_db=expected.decibels,
        shallow=plan.shallow,
    )


def _point(solution: Solution) -> PlanPoint:
    return PlanPoint(solution.ratio, solution.decibels)


@torch.no_grad()
def trajectory_images(pipe: DiffusionPipeline, sampling: Sampling) -> torch.Tensor | None:
    """The first sample at some of its steps, evenly spread, as uint8 images (n, H, W, C); None where it is no picture.

    A latent sample is decoded by the pipeline's own autoencoder.
    """
    with record(pipe) as trajectory:
        run_batch(pipe, sampling, range(1), "latent")
    steps = len(trajectory.timesteps)
    required = np.linspace(0, steps - 1, min(PICTURED, steps)).round().astype(int).tolist()
    pictures = []
    vae: Any = getattr(pipe, "vae", None)
    for i in required:
        x = trajectory.samples[i][:1]
        if x.ndim != 4:
            return None
        if vae is not None and x.shape[1] == vae.config.get("latent_channels"):
            shift = vae.config.get("shift_factor") or 0.0
            x = vae.decode((x / vae.config.scaling_factor + shift).to(vae.dtype)).sample
        if x.shape[1] not in (1, 3):
            return None
        pictures.append((x[0].float().cpu().clamp(-1, 1).movedim(0, -1) * 127.5 + 127.5).round().to(torch.uint8))
    return torch.stack(pictures)
