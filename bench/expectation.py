"""How good a plan's expected error is: measured over expected, of twenty random plans in two settings, on fashion-ldm.

    python bench/expectation.py        # ten minutes of a core

W8 with 4 or 8 bits by step, 20 steps; in every second plan some steps hold, by their expected error or at random. What
CNC and BC leave of the final latents' squared distance to the full-precision ones, on 128 seeds that nothing was fitted
on, over what is expected: the mean of all samples, and of all but the tenth that goes farthest, as few samples that go
astray are most of the mean. The last lines say how far the ratios are from 1, and from their own level, which is all
that a choice among plans depends on.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

import ptqd
from ptqd.diffusion import final_samples
from ptqd.diffusion.sampling import Sampling
from ptqd.experiments import MEASURED
from ptqd.mixed_precision import planning_problem, rated
from ptqd.mixed_precision.holding import HeldErrors

STEPS, SAMPLES, PLANS = 20, 128, 20
SETTINGS = {"eta 1, guidance 1.5": (1.0, 1.5), "eta 0, guidance 3": (0.0, 3.0)}

Pattern = tuple[tuple[int, ...], tuple[bool, ...]]


def plans(errors: HeldErrors) -> list[Pattern]:
    """Bits by step, and which steps hold."""
    draw, result = random.Random(7), []
    for n in range(PLANS):
        share = draw.choice((0.1, 0.3, 0.5, 0.7, 0.9))
        bits = tuple(8 if draw.random() < share else 4 for _ in range(STEPS))
        count, held = draw.choice((2, 4, 6, 8, 10)), (False,) * STEPS
        if n % 4 == 1:
            held = errors.patterns[count]
        elif n % 4 == 3:
            held = tuple(j > 0 and draw.random() < count / STEPS for j in range(STEPS))
        result.append((bits, held))
    return result


def spread(ratios: Sequence[float]) -> str:
    logs = np.log(ratios)
    level = float(np.exp(logs.mean()))
    within = [float(np.exp(np.abs(x).max())) for x in (logs, logs - logs.mean())]
    return f"level {level:.2f}, within x{within[0]:.2f} of 1 and x{within[1]:.2f} of their level"


@torch.no_grad()
def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    print(f"measured over expected, {SAMPLES} samples, statistics of {MEASURED}, torch {torch.__version__}")
    for title, (eta, guidance) in SETTINGS.items():
        run = Sampling(STEPS, eta, MEASURED, MEASURED, 0, {"class_labels": list(range(10)), "guidance_scale": guidance})
        wide = ptqd.quantize(pipe, "w8a4+8", run)
        widths = ptqd.measure_widths(pipe, wide, run)
        problem = planning_problem(pipe, wide, run, widths, groups=1, hold=True)
        errors = HeldErrors(widths[8])
        rule = ptqd.paper_plan(widths)
        test = run.replace(seed=5, samples=SAMPLES, batch=SAMPLES)
        reference = final_samples(pipe, test, range(SAMPLES)).double()
        print(f"\n{title}\n  8 bits  held  chosen  mean  but a tenth")
        kinds: dict[str, list[float]] = {}
        for bits, held in plans(errors):
            rows = tuple((0,) if holds else (b,) for b, holds in zip(bits, held, strict=True))
            solution = rated(problem, rule.replace(bits=rows, made={}))
            planned = ptqd.apply_plan(wide, solution.plan)
            corrected = ptqd.correct(planned, ptqd.measure(pipe, planned, run), ("cnc", "bc"))
            ends = final_samples(corrected, test, range(SAMPLES)).double()
            found = (ends - reference).square().flatten(1).mean(1).sort().values
            mean, most = (float(x.mean()) / solution.error for x in (found, found[: -SAMPLES // 10]))
            chosen = "yes" if held in errors.patterns and any(held) else ""
            kinds.setdefault("mean", []).append(mean)
            kinds.setdefault("but a tenth", []).append(most)
            if not any(held) or chosen:
                kinds.setdefault("but a tenth, without those held at random", []).append(most)
            count = sum(b == 8 for b, holds in zip(bits, held, strict=True) if not holds)
            print(f"  {count:6d}  {sum(held):4d}  {chosen:>6s}  {mean:4.2f}  {most:11.2f}", flush=True)
        for name, ratios in kinds.items():
            print(f"  {name}: {spread(ratios)}", flush=True)


if __name__ == "__main__":
    main()
