"""Plans beside the fixed one of serving engines, three first and three last steps at more bits, at the same cost.

    python bench/first_last.py          # half an hour of a core

DDIM, 20 steps, eta 0, guidance 1.5. Mean SNR of the final latents in dB against full precision, on 64 seeds that no
statistics saw: not corrected, with CNC and BC, and with the correction fitted along the trajectory. Every plan has at
most the bit operations of the fixed one; ``steps`` has one width for all layers, ``groups`` widths by groups of layers,
``held`` steps that hold their output besides.
"""

from typing import Any

import torch
from held import ends, snr

import ptqd
from ptqd.correction import fit_trajectory
from ptqd.diffusion.sampling import Sampling
from ptqd.quantization import run_cost

MEASURED, TESTED = 64, 64
CASES = (("fashion-ldm", 4, 8), ("fashion-dit", 4, 8), ("fashion-ldm", 8, 16), ("fashion-dit", 8, 16))


def row(name: str, pipe: Any, planned: Any, run: Sampling, test: Sampling, reference: torch.Tensor) -> None:
    stats = ptqd.measure(pipe, planned, run)
    corrections = (
        None,
        ptqd.fit_correction(stats, ("cnc", "bc")),
        fit_trajectory(planned, stats, run).correction,
    )
    found = [snr(ends(planned if c is None else ptqd.correct(planned, c), test), reference) for c in corrections]
    print(
        f"  {name:12s} {run_cost(planned, run).ratio:6.1f}x {found[0]:7.1f} {found[1]:8.1f} {found[2]:11.1f}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    print(f"20 steps, statistics of {MEASURED}, {TESTED} other seeds, torch {torch.__version__}")
    for model, bits, edge in CASES:
        pipe = ptqd.load(model)
        call = {"class_labels": list(range(10)), "guidance_scale": 1.5}
        run = Sampling(20, 0.0, MEASURED, 32, call=call)
        test = run.replace(seed=77, samples=TESTED)
        quantized = ptqd.quantize(pipe, f"w8a{bits}+{edge}", run)
        reference = ends(pipe, test)
        stats = ptqd.measure_widths(pipe, quantized, run)
        fixed = ptqd.PrecisionPlan.first_last(stats[bits].measured_on.model_timesteps, bits, edge=edge)
        planned = ptqd.apply_plan(quantized, fixed)
        budget = run_cost(planned, run).ratio
        print(
            f"\n{model}, w8, activations of {bits} and {edge} bits\n  plan           cost    none   CNC+BC  trajectory"
        )
        row("3 and 3", pipe, planned, run, test, reference)
        for name, options in (("steps", {"groups": 1}), ("groups", {}), ("held", {"hold": True})):
            plan = ptqd.search_plan(pipe, quantized, run, stats, budget=budget, **options)
            row(name, pipe, ptqd.apply_plan(quantized, plan), run, test, reference)


if __name__ == "__main__":
    main()
