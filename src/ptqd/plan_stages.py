"""Plans in a run: what is asked for, the stages that make it, and what the report shows of it."""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptqd.components import denoiser_name
from ptqd.cost import Macs, cost_of
from ptqd.errors import InputError
from ptqd.files import make_folder, replacing
from ptqd.measuring import measure_widths
from ptqd.noise import NoiseStats
from ptqd.plan import StepPlan
from ptqd.planning.paper import forward_snr, paper_rule, quantized_snr
from ptqd.planning.problem import Problem, planning_problem
from ptqd.planning.solver import pareto, rated, solve, uniform
from ptqd.quantization import apply_plan, plan_of
from ptqd.replay import record
from ptqd.sampling import Sampling, run_batch

PICTURED = 20  # steps whose sample is shown


@dataclass(frozen=True)
class PlanRequest:
    """Which plan a run wants.

    Attributes:
        kind: ``"auto"``, ``"paper"``, or the path of a plan.
        budget: for auto: how many times fewer bit operations than FP32.
        floor: for auto: the final sample's signal-to-noise ratio in dB.
        weight_bits: for auto: that a plan may give each layer's weights; none leaves them.
    """

    kind: str
    budget: float | None = None
    floor: float | None = None
    weight_bits: tuple[int, ...] = ()

    @classmethod
    def parse(cls, kind: str, budget: str | None, floor: str | None, weights: str | None) -> "PlanRequest":
        """From a command's words: ``19.9x``, ``25dB``, ``4,6,8``.

        Raises:
            InputError: a word that is no number, or one that goes with another kind of plan.
        """
        bits = _number(weights, "weights", "4,6,8", ",") if weights else []
        asked = cls(
            kind,
            _number(budget, "budget", "19.9x", "x")[0] if budget else None,
            _number(floor, "floor", "25dB", "dB")[0] if floor else None,
            tuple(int(b) for b in bits),
        )
        if kind == "auto" and (asked.budget is None) == (asked.floor is None):
            raise InputError("--plan auto needs --budget, such as 19.9x, or --floor, such as 25dB; one of them")
        if kind != "auto" and (budget or floor or weights):
            raise InputError(f"--budget, --floor and --weights go with --plan auto, not with {kind!r}")
        return asked

    @property
    def name(self) -> str:
        """For labels and folders."""
        if self.kind == "auto":
            return f"{self.budget:g}x" if self.budget is not None else f"{self.floor:g}dB"
        return self.kind if self.kind == "paper" else Path(self.kind).stem

    def facts(self) -> dict[str, Any]:
        """All that a plan depends on, as plain values; of a file what is in it."""
        plain = dataclasses.asdict(self)
        return plain if self.kind in ("auto", "paper") else {**plain, "plan": StepPlan.load(Path(self.kind)).to_dict()}


def _number(text: str, name: str, example: str, mark: str) -> list[float]:
    try:
        return [float(part) for part in (text.split(mark) if mark == "," else [text.removesuffix(mark)])]
    except ValueError:
        raise InputError(f"--{name} {text!r} is no number; give it like {example}") from None


def measured_widths(
    pipe: DiffusionPipeline, quantized: DiffusionPipeline, run: Sampling, scratch: Path, *, title: str | None
) -> dict[int, NoiseStats]:
    """Statistics of every width, batch by batch through ``scratch``, so that a kill costs one batch."""
    kept = sorted(scratch.glob("widths-*"))
    resume = load_widths(kept[-1]) if kept else None

    def keep(stats: Mapping[int, NoiseStats]) -> None:
        make_folder(scratch)
        newest = scratch / f"widths-{next(iter(stats.values())).samples:08d}"
        save_widths(stats, newest)
        for older in scratch.glob("widths-*"):
            if older != newest:
                shutil.rmtree(older)

    return measure_widths(pipe, quantized, run, resume=resume, keep=keep, progress=title or False)


def save_widths(stats: Mapping[int, NoiseStats], folder: Path) -> None:
    """Write statistics by width as one folder, atomically."""
    with replacing(folder) as temporary:
        for bits, found in stats.items():
            found.save(temporary / f"{bits}.safetensors")


def load_widths(folder: Path) -> dict[int, NoiseStats]:
    """What :func:`save_widths` wrote."""
    return {int(path.stem): NoiseStats.load(path) for path in sorted(folder.glob("*.safetensors"))}


@dataclass(frozen=True)
class Planned:
    """A pipeline with its plan, and what the plan was chosen among."""

    pipe: DiffusionPipeline
    problem: Problem
    stats: Mapping[int, NoiseStats]


def make_planned(
    pipe: DiffusionPipeline,
    quantized: DiffusionPipeline,
    run: Sampling,
    request: PlanRequest,
    stats: Mapping[int, NoiseStats],
    *,
    progress: bool,
) -> Planned:
    """Make the plan that is asked for, and apply it."""
    problem = planning_problem(pipe, quantized, run, stats, weight_bits=request.weight_bits, progress=progress)
    if request.kind == "auto":
        plan = solve(problem, budget=request.budget, floor=request.floor).plan
    elif request.kind == "paper":
        plan = paper_rule(stats)
    else:
        plan = StepPlan.load(Path(request.kind))
    return Planned(apply_plan(quantized, plan, pipe), problem, stats)


def plan_facts(planned: Planned, macs: Macs) -> dict[str, Any]:
    """What the report shows: SNR by width, bits and share of the cost by step, and quality against cost."""
    problem, stats, plan = planned.problem, planned.stats, plan_of(planned.pipe)
    cost = cost_of(getattr(planned.pipe, denoiser_name(planned.pipe)), macs)
    first = stats[problem.widths[0]]
    rule = None
    if first.levels is not None:
        rule = rated(problem, paper_rule(stats))
    return {
        "made": dict(plan.made),
        "timesteps": first.timesteps.tolist(),
        "widths": list(problem.widths),
        "snr": {str(b): quantized_snr(s).tolist() for b, s in stats.items()},
        "forward_snr": None if first.levels is None else forward_snr(first).tolist(),
        "groups": [name for name, _ in plan.groups],
        "bits": [list(row) for row in plan.bits],
        "weights": dict(plan.weights),
        "share": (cost.bops.sum(1) / cost.total).tolist(),
        "ratio": cost.ratio,
        "pareto": [_point(s) for s in pareto(problem)],
        "uniform": [{"bits": b, **_point(uniform(problem, b))} for b in problem.widths],
        "paper": None if rule is None else _point(rule),
    }


def _point(solution: Any) -> dict[str, float]:
    return {"ratio": solution.ratio, "db": solution.decibels}


@torch.no_grad()
def trajectory_images(pipe: DiffusionPipeline, run: Sampling) -> torch.Tensor | None:
    """The first sample at some of its steps, evenly spread, as uint8 images (n, H, W, C); None where it is no picture.

    A latent sample is decoded by the pipeline's own autoencoder.
    """
    with record(pipe) as trajectory:
        run_batch(pipe, run, range(1), "latent")
    steps = len(trajectory.timesteps)
    wanted = np.linspace(0, steps - 1, min(PICTURED, steps)).round().astype(int).tolist()
    pictures = []
    vae: Any = getattr(pipe, "vae", None)
    for i in wanted:
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
