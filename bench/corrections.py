"""Corrections side by side on fashion-ldm, from the same seeds and the same statistics.

    python bench/corrections.py

For each setting and recipe: mean squared distance of the final latents to the full-precision ones, what each
correction cuts of it (95 % interval of the ratio, by the jackknife over samples), Frechet distance of the images to
the full-precision ones in the classifier's features, and the latents' standard deviation against full precision. The
weights L of the joint estimate are those of ``ptqd.joint.estimate_output``: 1 is least squares, without bound unbiased;
"joint" alone chooses by step.
"""

import torch
from diffusers import DiffusionPipeline

import ptqd
from ptqd.evaluate.metrics import frechet_distance
from ptqd.evaluate.moments import Moments
from ptqd.noise import NoiseStats
from ptqd.sampling import Sampling, run_batch
from ptqd.zoo import CLASSIFIER
from ptqd.zoo.classifier import FashionClassifier

SAMPLES, MEASURED = 200, 128
SETTINGS = {
    "20 steps, eta 0, guidance 3": Sampling(
        20, 0.0, SAMPLES, 100, call={"class_labels": list(range(10)), "guidance_scale": 3.0}
    ),
    "50 steps, eta 1, guidance 1.5": Sampling(
        50, 1.0, SAMPLES, 100, call={"class_labels": list(range(10)), "guidance_scale": 1.5}
    ),
}


def corrections(stats: NoiseStats) -> dict[str, ptqd.Correction]:
    found = {"none": (), "cnc+bc": ("cnc", "bc"), "cnc+bc+vsc": ("cnc", "bc", "vsc")}
    fitted = {name: ptqd.fit_correction(stats, methods) for name, methods in found.items()}
    if not stats.response.draws:
        del fitted["cnc+bc+vsc"]
    return fitted | {"joint": fit_joint(stats)} | {f"joint, L {w:g}": fit_joint(stats, (w,)) for w in (1.0, 8.0, 1e9)}


def latents(pipe: DiffusionPipeline, run: Sampling) -> torch.Tensor:
    return torch.cat([run_batch(pipe, run, indices, "latent") for indices in run.batches()])


@torch.no_grad()
def features(pipe: DiffusionPipeline, final: torch.Tensor, judge: FashionClassifier) -> torch.Tensor:
    images = torch.cat([pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample for z in final.split(50)])
    return judge.features(images.clamp(-1, 1)).pooled


def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    judge = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    print(f"{SAMPLES} samples, statistics of {MEASURED}, torch {torch.__version__}")
    for title, run in SETTINGS.items():
        reference = latents(pipe, run)
        seen = Moments.of(features(pipe, reference, judge))
        for recipe in ("w8a8", "w4a8", "w4a4"):
            quantized = ptqd.quantize(pipe, recipe, run)
            stats = ptqd.measure(pipe, quantized, run.replace(samples=MEASURED))
            print(f"\n{title}, {recipe}")
            plain = torch.zeros(())
            for name, correction in corrections(stats).items():
                final = latents(ptqd.correct(quantized, correction), run)
                error = ((final - reference) ** 2).flatten(1).mean(1).double()
                plain = error if name == "none" else plain
                ratio = error.mean() / plain.mean()
                left_out = (error.sum() - error) / (plain.sum() - plain)
                half = 1.96 * ((SAMPLES - 1) * left_out.var(unbiased=False)).sqrt()
                mine = Moments.of(features(pipe, final, judge))
                distance = frechet_distance(mine.mean, mine.covariance, seen.mean, seen.covariance)
                print(
                    f"  {name:14s} mse {error.mean():.4f}  cut {100 * (1 - ratio):5.1f} ± {100 * half:4.1f} %"
                    f"  Frechet to FP {distance:.4f}  std / FP {final.std() / reference.std():.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
