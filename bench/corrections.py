"""Every correction side by side on fashion-ldm, from the same seeds and the same statistics.

    python bench/corrections.py

For each setting and recipe: mean squared distance of the final latents to the full-precision ones, what each correction
cuts of it (95 % interval of the ratio, by the jackknife over samples), Frechet distance of the images to the
full-precision ones in the classifier's features, what is cut of that, PSNR to the full-precision images, and the
latents' standard deviation against full precision.

Rows: no correction; the paper's; the other published ones; eps_q and x_t across channels, by least squares at every
step; ours (neighbours, gated step by step) with largest weights L of withheld signal; and ours from statistics along
the corrected trajectory (all noise drawn). What auto makes of them is in grid.txt.
"""

from collections.abc import Iterator
from typing import Any

import torch
from grid import distance, drawn, features

import ptqd
from ptqd.correction import compose, gated, joint
from ptqd.correction.correction import Correction
from ptqd.diffusion.sampling import Sampling
from ptqd.experiments import MEASURED
from ptqd.metrics import FashionClassifier
from ptqd.noise import Layout, OutputEstimate, mean_table
from ptqd.noise.stats import NoiseStats
from ptqd.zoo import CLASSIFIER

SAMPLES = 250
RECIPES = ("w8a8", "w6a6", "w4a8", "w4a4")
SETTINGS = {
    "20 steps, eta 0, guidance 3": Sampling(
        20, 0.0, SAMPLES, 50, call={"class_labels": list(range(10)), "guidance_scale": 3.0}
    ),
    "50 steps, eta 1, guidance 1.5": Sampling(
        50, 1.0, SAMPLES, 50, call={"class_labels": list(range(10)), "guidance_scale": 1.5}
    ),
}


def alone(stats: NoiseStats) -> OutputEstimate:
    """Least squares from eps_q and x_t of the pixel itself."""
    layout = stats.layout
    q, x, e = layout.blocks
    own = torch.arange(layout.channels)
    kept = torch.cat([torch.zeros(1).long(), q.start + own, x.start + own, e.start + own])
    table = mean_table(stats.joint, stats.fold_samples)[..., kept, :][..., kept]
    small = joint(1.0)(table, Layout(1, layout.channels, 1))
    whole = OutputEstimate.nothing(mean_table(stats.joint, stats.fold_samples), layout)
    whole.output[..., : layout.channels], whole.sample[..., : layout.channels] = small.output, small.sample
    return OutputEstimate(whole.output, whole.sample, small.bias)


def corrections(pipe: Any, quantized: Any, stats: NoiseStats, run: Sampling) -> Iterator[tuple[str, Correction]]:
    draws = stats.response.draws
    noise = ("vsc",) if draws else ()
    yield "cnc+bc", ptqd.fit_correction(stats, ("cnc", "bc"))
    if draws:
        yield "cnc+bc+vsc", ptqd.fit_correction(stats, ("cnc", "bc", "vsc"))
    else:
        for method in ("dns", "qdrift", "stepbaq"):
            yield f"cnc+bc+{method}", ptqd.fit_correction(stats, ("cnc", "bc", method))
    yield "tac", ptqd.fit_correction(stats, ("tac",))
    yield "d2", ptqd.fit_correction(stats, ("d2",))
    yield "eps_q, x_t", compose(stats, ("joint",), alone(stats), noise[0] if noise else None)
    for most in (1.0, 4.0, 16.0):
        estimate, _ = gated(stats, [c for c in (1.0, 2.0, 4.0, 8.0, 16.0) if c <= most])
        ours = compose(stats, ("joint", *noise), estimate, noise[0] if noise else None)
        yield f"joint, L<={most:g}", ours
        if most == 4:
            loop = run.replace(samples=MEASURED)
            closed = ptqd.measure(pipe, ptqd.correct(quantized, ours), loop, closed_loop=True)
    yield "joint, closed loop", ptqd.fit_correction(closed, ("joint",))


def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    judge = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    print(f"{SAMPLES} samples, statistics of {MEASURED}, torch {torch.__version__}")
    for title, run in SETTINGS.items():
        latents, images = drawn(pipe, run)
        seen = features(judge, images)
        for recipe in RECIPES:
            quantized = ptqd.quantize(pipe, recipe, run)
            stats = ptqd.measure(pipe, quantized, run.replace(samples=MEASURED))
            print(f"\n{title}, {recipe}")
            before: tuple[torch.Tensor, float] | None = None
            for name, correction in (("none", None), *corrections(pipe, quantized, stats, run)):
                final, pictures = drawn(quantized if correction is None else ptqd.correct(quantized, correction), run)
                error = (final - latents).square().flatten(1).mean(1)
                mse = (pictures - images).double().square().flatten(1).mean(1)
                away = distance(features(judge, pictures), seen)
                before = before or (error, away)
                plain, plain_away = before
                left_out = (error.sum() - error) / (plain.sum() - plain)
                half = 1.96 * ((SAMPLES - 1) * left_out.var(unbiased=False)).sqrt()
                psnr = (-10 * mse.clamp(min=1e-10).log10()).mean()
                print(
                    f"  {name:30s} mse {error.mean():.4f}  cut {100 * (1 - error.mean() / plain.mean()):5.1f} ± "
                    f"{100 * half:4.1f} %  Frechet to FP {away:.4f}  cut {100 * (1 - away / plain_away):5.1f} %  "
                    f"PSNR {psnr:.2f}  std / FP {final.std() / latents.std():.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
