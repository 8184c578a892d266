"""How good a plan's expected error is: measured over expected, of nine plans in two settings, on fashion-ldm.

    python bench/expectation.py

W8 with 4 or 8 bits by step, 20 steps; mean squared distance of the final latents to the full-precision ones of 100
seeds, what CNC and BC leave of it, over what statistics of 64 samples expect: with one answer of the network for all
directions, and with one for each band of directions. A plan is chosen by the ratios' sameness, not by their level.
"""

import dataclasses
import random

import torch

import ptqd
from ptqd.diffusion import final_samples
from ptqd.diffusion.sampling import Sampling
from ptqd.experiments import MEASURED
from ptqd.mixed_precision.contributions import contributions

STEPS, SAMPLES = 20, 100
SETTINGS = {"eta 1, guidance 1.5": (1.0, 1.5), "eta 0, guidance 3": (0.0, 3.0)}


def plans() -> dict[str, list[int]]:
    draw = random.Random(1)
    return {
        "4 bits": [4] * STEPS,
        "8 bits": [8] * STEPS,
        "4, then 8": [4] * 10 + [8] * 10,
        "8, then 4": [8] * 10 + [4] * 10,
        "4 and 8 in turn": [4, 8] * 10,
        "8 in the last 5": [4] * 15 + [8] * 5,
        "8 in the first 5": [8] * 5 + [4] * 15,
        "at random": [draw.choice((4, 8)) for _ in range(STEPS)],
        "at random again": [draw.choice((4, 8)) for _ in range(STEPS)],
    }


@torch.no_grad()
def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    print(f"measured over expected, {SAMPLES} samples, statistics of {MEASURED}, torch {torch.__version__}")
    for title, (eta, guidance) in SETTINGS.items():
        call = {"class_labels": list(range(10)), "guidance_scale": guidance}
        run = Sampling(STEPS, eta, MEASURED, MEASURED, 0, call)
        wide = ptqd.quantize(pipe, "w8a4+8", run)
        widths = ptqd.measure_widths(pipe, wide, run)
        expected = [
            {bits: contributions(stats) for bits, stats in own.items()}
            for own in ({b: dataclasses.replace(s, bands=None) for b, s in widths.items()}, widths)
        ]
        rule = ptqd.paper_plan(widths)
        test = run.replace(seed=5, samples=SAMPLES, batch=SAMPLES)
        reference = final_samples(pipe, test, range(SAMPLES)).double()
        print(f"\n{title}\n  {'plan':18s} one answer  by bands")
        for name, bits in plans().items():
            planned = ptqd.apply_plan(wide, rule.replace(bits=tuple((b,) for b in bits)))
            corrected = ptqd.correct(planned, ptqd.measure(pipe, planned, run), ("cnc", "bc"))
            error = float((final_samples(corrected, test, range(SAMPLES)).double() - reference).square().mean())
            ratios = [error / sum(float(parts[b][j]) for j, b in enumerate(bits)) for parts in expected]
            print(f"  {name:18s} {ratios[0]:9.2f} {ratios[1]:9.2f}", flush=True)


if __name__ == "__main__":
    main()
