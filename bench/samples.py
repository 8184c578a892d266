"""How many calibration samples a correction needs, on fashion-ldm at W4A8 and W4A4.

    python bench/samples.py

Statistics of 8, 16, ... 128 samples, each including the ones before; cut of the final latents' squared distance to the
full-precision ones of the same seeds, against no correction, and mean SNR of the final latents in dB, on 200 seeds that
no statistics saw: for cnc+bc, joint, trajectory and auto (with what it chose). Measuring n samples costs n
full-precision and n quantized samples; trajectory adds one quantized run of those samples, of the first 64 at most.
"""

from typing import Any

import torch

import ptqd
from ptqd.correction import fit_trajectory
from ptqd.diffusion import final_samples
from ptqd.diffusion.sampling import Sampling
from ptqd.noise.stats import NoiseStats

SAMPLES = 200
COUNTS = (8, 16, 24, 32, 64, 128)
SETTINGS = {
    "20 steps, eta 0, guidance 3": Sampling(
        20, 0.0, SAMPLES, 100, call={"class_labels": list(range(10)), "guidance_scale": 3.0}
    ),
    "50 steps, eta 1, guidance 1.5": Sampling(
        50, 1.0, SAMPLES, 100, call={"class_labels": list(range(10)), "guidance_scale": 1.5}
    ),
}
CELLS = (
    ("20 steps, eta 0, guidance 3", "w4a8"),
    ("20 steps, eta 0, guidance 3", "w4a4"),
    ("50 steps, eta 1, guidance 1.5", "w4a8"),
)


def ends(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.cat([final_samples(pipe, run, list(indices)) for indices in run.batches()]).double()


def snr(end: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples, in dB."""
    energy, error = (x.square().flatten(1).sum(1) for x in (reference, end - reference))
    return float((10 * (energy / error).log10()).mean())


def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    print(f"cut of the squared distance, and SNR of the final latents; {SAMPLES} samples, torch {torch.__version__}")
    for title, recipe in CELLS:
        run = SETTINGS[title]
        quantized = ptqd.quantize(pipe, recipe, run)
        reference, plain = ends(pipe, run), ends(quantized, run)
        print(f"\n{title}, {recipe}; uncorrected {snr(plain, reference):.2f} dB")
        print("samples      cnc+bc          joint           trajectory      auto")
        stats: NoiseStats | None = None
        for count in COUNTS:
            start = 0 if stats is None else stats.samples
            more = ptqd.measure(pipe, quantized, run.replace(samples=count), start=start)
            stats = more if stats is None else NoiseStats.merge([stats, more])
            choice = ptqd.search_correction(quantized, stats, run)
            cells = []
            for correction in (
                ptqd.fit_correction(stats, ("cnc", "bc")),
                ptqd.fit_correction(stats, ("joint",)),
                fit_trajectory(quantized, stats, run).correction,
                choice.correction,
            ):
                end = ends(ptqd.correct(quantized, correction), run)
                cut = 1 - float((end - reference).square().mean() / (plain - reference).square().mean())
                cells.append(f"{100 * cut:5.1f} % {snr(end, reference):5.2f} dB")
            print(f"{count:7d}  {'  '.join(cells)}  {choice.name}, of {len(choice.trials)} candidates", flush=True)


if __name__ == "__main__":
    main()
