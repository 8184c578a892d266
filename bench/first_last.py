"""Plans at equal cost: beside the fixed one of serving engines, one width, fewer steps and the paper's rule.

    python bench/first_last.py                                      # two hours of a core
    python bench/first_last.py --models fashion-ldm --edges 8

DDIM (flow: Euler), 20 steps, eta 0, guidance 1.5. Mean SNR of the final latents in dB against full precision of 20
steps, on 64 seeds that no statistics saw: not corrected, with CNC and BC, and with the correction fitted along the
trajectory. ``3 and 3`` has more bits in the first three and the last three steps, and no plan of its group costs more;
plans choose among both widths and one between. ``uniform`` has the most bits that every step and layer can have,
``fewer steps`` the larger width for as many steps as that pays, ``steps`` one width for all layers of a step,
``groups`` widths by groups of layers, ``held`` steps that hold their output besides. With the paper's widths, 4 and 8,
its rule follows, and the same plans at its cost.
"""

import argparse
import math
from typing import Any

import diffusers
import torch
from held import ends, snr

import ptqd
from ptqd.correction import fit_trajectory
from ptqd.diffusion import with_components
from ptqd.diffusion.sampling import Sampling
from ptqd.quantization import run_cost
from ptqd.quantization.apply_plan import at_width

STEPS, MEASURED, TESTED = 20, 64, 64
MODELS = {
    "fashion-ldm": "DDIMScheduler",
    "fashion-dit": "DDIMScheduler",
    "fashion-flow": "FlowMatchEulerDiscreteScheduler",
    "fashion-ddpm": "DDIMScheduler",
}
BETWEEN = {8: 1, 16: 2}  # bits of a width between, for one that all have
PLANS: dict[str, dict[str, Any]] = {"steps": {"groups": 1}, "groups": {}, "held": {"hold": True}}


class Case:
    """One model with two widths of activations: what it is measured against, and how a plan is."""

    def __init__(self, model: str, bits: int, edge: int) -> None:
        pipe = ptqd.load(model)
        scheduler = getattr(diffusers, MODELS[model]).from_config(pipe.scheduler.config)
        self.pipe = with_components(pipe, scheduler=scheduler)
        call = {} if model == "fashion-ddpm" else {"class_labels": list(range(10)), "guidance_scale": 1.5}
        self.run = Sampling(STEPS, 0.0, MEASURED, 32, call=call)
        self.widths = (bits, edge)
        self.all_widths = (bits, bits + BETWEEN[edge], edge)
        self.quantized = ptqd.quantize(self.pipe, "w8a" + "+".join(map(str, self.all_widths)), self.run)
        self.stats = ptqd.measure_widths(self.pipe, self.quantized, self.run)
        self.timesteps = self.stats[bits].measured_on.model_timesteps
        self.reference = ends(self.pipe, self.test)

    @property
    def test(self) -> Sampling:
        return self.run.replace(seed=77, samples=TESTED)

    def row(self, name: str, planned: Any, steps: int = STEPS) -> None:
        """Print the figures of a pipeline."""
        run = self.run.replace(steps=steps)
        stats = ptqd.measure(self.pipe, planned, run)
        corrected = (
            planned,
            ptqd.correct(planned, stats, ("cnc", "bc")),
            ptqd.correct(planned, fit_trajectory(planned, stats, run).correction),
        )
        found = [snr(ends(each, self.test.replace(steps=steps)), self.reference) for each in corrected]
        cost = run_cost(planned, run).ratio * STEPS / steps
        print(f"  {name:12s} {cost:6.1f}x {found[0]:7.1f} {found[1]:8.1f} {found[2]:11.1f}", flush=True)

    def uniform(self, width: int) -> Any:
        return at_width(self.quantized, width)

    def group(self, name: str, plan: ptqd.PrecisionPlan) -> None:
        """A plan, and all others that cost no more."""
        planned = ptqd.apply_plan(self.quantized, plan)
        budget = run_cost(planned, self.run).ratio
        self.row(name, planned)
        for width in reversed(self.all_widths):
            if run_cost(self.uniform(width), self.run).ratio >= budget:
                self.row(f"uniform, {width}", self.uniform(width))
                break
        most = self.uniform(self.widths[-1])
        steps = math.floor(STEPS * run_cost(most, self.run).ratio / budget)
        self.row(f"{steps} steps", most, steps)
        for title, options in PLANS.items():
            found = ptqd.search_plan(self.pipe, self.quantized, self.run, self.stats, budget=budget, **options)
            self.row(title, ptqd.apply_plan(self.quantized, found))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--edges", nargs="+", type=int, choices=(8, 16), default=[8, 16])
    args = parser.parse_args()
    print(f"{STEPS} steps, statistics of {MEASURED}, {TESTED} other seeds, torch {torch.__version__}")
    for model in args.models:
        for edge in args.edges:
            case = Case(model, edge // 2, edge)
            title = f"{model}, w8, activations of {edge // 2} and {edge} bits"
            print(f"\n{title}\n  plan           cost    none   CNC+BC  trajectory", flush=True)
            case.group("3 and 3", ptqd.PrecisionPlan.first_last(case.timesteps, edge // 2, edge=edge))
            if edge == 8:
                case.group("the paper's", ptqd.paper_plan({width: case.stats[width] for width in case.widths}))


if __name__ == "__main__":
    main()
