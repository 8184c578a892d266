"""How many calibration samples a correction needs, on fashion-ldm at W4A8 and W4A4.

    python bench/samples.py

Statistics of 8, 16, ... 1024 samples, each including the ones before; cut of the final latents' squared distance to the
full-precision ones of the same seeds, against no correction, on 200 seeds that no statistics saw: for cnc+bc, for joint
and for auto (with what it chose). Measuring n samples costs n full-precision and n quantized samples; auto adds one
quantized run of up to 64 samples (half of those measured, at most) for each candidate it tries.
"""

from typing import Any

import torch

import ptqd
from ptqd.diffusion import final_samples
from ptqd.diffusion.sampling import Sampling
from ptqd.noise.stats import NoiseStats

SAMPLES = 200
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
SETTINGS = {
    "20 steps, eta 0, guidance 3": Sampling(
        20, 0.0, SAMPLES, 100, call={"class_labels": list(range(10)), "guidance_scale": 3.0}
    ),
    "50 steps, eta 1, guidance 1.5": Sampling(
        50, 1.0, SAMPLES, 100, call={"class_labels": list(range(10)), "guidance_scale": 1.5}
    ),
}
CELLS = (
    ("20 steps, eta 0, guidance 3", "w4a8", 1024),
    ("20 steps, eta 0, guidance 3", "w4a4", 128),
    ("50 steps, eta 1, guidance 1.5", "w4a8", 128),
)


def ends(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.cat([final_samples(pipe, run, list(indices)) for indices in run.batches()]).double()


def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    print(f"cut of the squared distance, {SAMPLES} samples, torch {torch.__version__}")
    for title, recipe, most in CELLS:
        run = SETTINGS[title]
        quantized = ptqd.quantize(pipe, recipe, run)
        reference, plain = ends(pipe, run), ends(quantized, run)
        print(f"\n{title}, {recipe}\nsamples  cnc+bc   joint    auto")
        stats: NoiseStats | None = None
        for count in (n for n in COUNTS if n <= most):
            start = 0 if stats is None else stats.samples
            more = ptqd.measure(pipe, quantized, run.replace(samples=count), start=start)
            stats = more if stats is None else NoiseStats.merge([stats, more])
            choice = ptqd.search_correction(quantized, stats, run)
            cuts = []
            for correction in (
                ptqd.fit_correction(stats, ("cnc", "bc")),
                ptqd.fit_correction(stats, ("joint", *(["vsc"] if stats.response.draws else []))),
                choice.correction,
            ):
                end = ends(ptqd.correct(quantized, correction), run)
                cuts.append(100 * (1 - float((end - reference).square().mean() / (plain - reference).square().mean())))
            print(
                f"{count:7d}  {cuts[0]:5.1f} %  {cuts[1]:5.1f} %  {cuts[2]:5.1f} %  "
                f"{choice.name}; {len(choice.trials)} candidates of {choice.checked} samples",
                flush=True,
            )


if __name__ == "__main__":
    main()
