"""Does a correction ever make things worse? Every recipe with every scheduler, on the models that ship.

    python bench/grid.py --out grid.jsonl      # fashion-ldm: an hour of one core; the same command resumes
    python bench/grid.py --out models.jsonl --models fashion-dit --recipes w4a4 w4a4-best --schedulers "DDIM, eta 0"
    python bench/grid.py --out more.jsonl --recipes "w4a4+8 plan" "w4a8 onnxruntime" --schedulers "DDIM, eta 0"
    python bench/grid.py --out grid.jsonl --table

In each cell the same seeds are sampled in full precision, quantized, with the plain PTQD formula (cnc, bc, and vsc
where noise is drawn), with joint and with auto, from the same statistics. Judged by PSNR to the full-precision images
of the same seeds, and by Frechet distance to them in the classifier's features; both as differences to no correction,
with the 95 % interval of the paired difference (over samples; jackknife for Frechet). A regression is a difference for
the worse whose interval does not hold 0; auto is held against each of the others. A cell with a row "before" has also
the auto of ptqd at 948cbcd, which the same script wrote there, before corrections were fitted along the trajectory.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import torch

import ptqd
from ptqd.diffusion import run_batch, with_components
from ptqd.diffusion.sampling import Sampling
from ptqd.diffusion.trajectory import last_samples
from ptqd.engines.export import export
from ptqd.experiments import MEASURED
from ptqd.metrics import FashionClassifier, frechet_distance
from ptqd.mixed_precision.paper_rule import paper_plan
from ptqd.zoo import CLASSIFIER

SAMPLES = 250
RECIPES = ("w8a8", "w6a6", "w4a8", "w4a4")
SCHEDULERS: dict[str, tuple[str, dict[str, Any], float]] = {  # class, configuration, eta
    "DDIM, eta 0": ("DDIMScheduler", {}, 0.0),
    "Euler": ("EulerDiscreteScheduler", {}, 0.0),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}, 0.0),
    "UniPC": ("UniPCMultistepScheduler", {}, 0.0),
    "DDIM, eta 1": ("DDIMScheduler", {}, 1.0),
    "DDPM": ("DDPMScheduler", {}, 0.0),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 0.0),
    "flow, Euler": ("FlowMatchEulerDiscreteScheduler", {}, 0.0),
}
STOCHASTIC = ("DDIM, eta 1", "DDPM", "Euler ancestral")
MODELS = ("fashion-ldm", "fashion-dit", "fashion-flow", "fashion-ddpm")


def setting(model: str, scheduler: str) -> Sampling:
    """The paper's guidance: 3 where nothing is drawn, else 1.5; 20 steps, but 50 of fashion-ldm if noise is drawn."""
    guidance = 1.5 if scheduler in STOCHASTIC else 3.0
    steps = 50 if scheduler in STOCHASTIC and model == "fashion-ldm" else 20
    call = {} if model == "fashion-ddpm" else {"class_labels": list(range(10)), "guidance_scale": guidance}
    return Sampling(steps, SCHEDULERS[scheduler][2], SAMPLES, 50, call=call)


@torch.no_grad()
def drawn(pipe: Any, run: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latents, and images in [0, 1]."""
    latents, images = [], []
    for indices in run.batches():
        with last_samples(pipe, len(indices)) as ends:
            images.append(torch.from_numpy(run_batch(pipe, run, indices)).permute(0, 3, 1, 2))
        latents.append(ends[0].double())
    return torch.cat(latents), torch.cat(images)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()))


def jackknife(values: list[float]) -> float:
    """Half the width of the 95 % interval, from leave-one-group-out values."""
    n = len(values)
    return 1.96 * math.sqrt((n - 1) * torch.tensor(values).var(unbiased=False).item())


def quantized_as(plain: Any, recipe: str, run: Sampling) -> Any:
    """A recipe's pipeline; after a blank "plan", widths by the paper's rule, or an engine to export it to."""
    shorthand, _, how = recipe.partition(" ")
    quantized = ptqd.quantize(plain, shorthand, run)
    if how == "plan":
        return ptqd.apply_plan(
            quantized, paper_plan(ptqd.measure_widths(plain, quantized, run.replace(samples=MEASURED)))
        )
    if how:
        return export(quantized, run, how, Path(mkdtemp()) / "exported").pipeline
    return quantized


def cell(model: str, judge: FashionClassifier, scheduler: str, recipe: str) -> dict[str, Any]:
    name, config, _ = SCHEDULERS[scheduler]
    pipe = ptqd.load(model)
    plain = with_components(pipe, scheduler=getattr(diffusers, name).from_config(pipe.scheduler.config, **config))
    run = setting(model, scheduler)
    quantized = quantized_as(plain, recipe, run)
    start = time.perf_counter()
    stats = ptqd.measure(plain, quantized, run.replace(samples=MEASURED))
    measured = time.perf_counter()
    choice = ptqd.search_correction(quantized, stats, run)
    seconds = (measured - start, time.perf_counter() - measured)
    methods = ("cnc", "bc", "vsc") if stats.response.draws else ("cnc", "bc")
    pipes = {
        "none": quantized,
        "ptqd": ptqd.correct(quantized, stats, methods),
        "joint": ptqd.correct(quantized, stats, ["joint"]),
        "auto": ptqd.correct(quantized, choice.correction),
    }
    latents, images = drawn(plain, run)
    reference = features(judge, images)
    found: dict[str, Any] = {"model": model, "scheduler": scheduler, "recipe": recipe, "taken": choice.name}
    found |= {"seconds": seconds, "rows": {}}
    groups = torch.arange(SAMPLES) % 50
    for row, corrected in pipes.items():
        mine, pictures = drawn(corrected, run)
        mse = (pictures - images).double().square().flatten(1).mean(1)
        psnr, seen = -10 * mse.clamp(min=1e-10).log10(), features(judge, pictures)
        left_out = [distance(seen[groups != g], reference[groups != g]) for g in range(50)]
        found["rows"][row] = {
            "mse": (mine - latents).square().mean().item(),
            "psnr": psnr.tolist(),
            "frechet": distance(seen, reference),
            "left_out": left_out,
        }
    return found


@torch.no_grad()
def features(judge: FashionClassifier, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([judge.features(part * 2 - 1).pooled for part in images.float().split(50)]).double()


def difference(found: dict[str, Any], row: str, against: str = "none") -> dict[str, float]:
    """Against another row: PSNR, Frechet distance, each with half the width of its interval."""
    mine, none = found["rows"][row], found["rows"][against]
    psnr = torch.tensor(mine["psnr"]) - torch.tensor(none["psnr"])
    frechet = [a - b for a, b in zip(mine["left_out"], none["left_out"], strict=True)]
    return {
        "psnr": psnr.mean().item(),
        "psnr_half": 1.96 * psnr.std().item() / math.sqrt(len(psnr)),
        "frechet": mine["frechet"] - none["frechet"],
        "frechet_half": jackknife(frechet),
        "cut": 100 * (1 - mine["mse"] / none["mse"]),
    }


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        f"{SAMPLES} samples, statistics of {MEASURED}, torch {torch.__version__}; differences to no correction, "
        "95 % intervals",
        "PSNR to FP in dB (higher is better), Frechet to FP (lower is better), cut of the final latents' squared "
        "distance; ! marks a regression",
    ]
    worse: dict[str, list[str]] = {"ptqd": [], "joint": [], "auto": []}
    ahead: dict[str, list[float]] = {}
    means: dict[str, list[tuple[float, ...]]] = {row: [] for row in worse}
    groups = dict.fromkeys((c["model"], c["scheduler"]) for c in cells)
    for model, scheduler in sorted(
        groups, key=lambda group: (MODELS.index(group[0]), list(SCHEDULERS).index(group[1]))
    ):
        run = setting(model, scheduler)
        guidance = f", guidance {run.call['guidance_scale']}" if run.call else ""
        lines.append(f"\n{model}, {scheduler}, {run.steps} steps{guidance}")
        for found in (c for c in cells if (c["model"], c["scheduler"]) == (model, scheduler)):
            recipe = found["recipe"]
            none = found["rows"]["none"]
            psnr = torch.tensor(none["psnr"]).mean().item()
            lines.append(f"  {recipe}  none  PSNR {psnr:6.2f}          Frechet {none['frechet']:.4f}")
            for row, record in worse.items():
                d = difference(found, row)
                bad = [
                    name for name, lost in (("psnr", -d["psnr"]), ("frechet", d["frechet"])) if lost > d[f"{name}_half"]
                ]
                record += [f"{model}, {recipe}, {scheduler}: {name}" for name in bad]
                share = 100 * (1 - found["rows"][row]["frechet"] / none["frechet"])
                means[row].append((d["psnr"], share, d["cut"]))
                lines.append(
                    f"        {row:6s} PSNR {d['psnr']:+6.2f} ± {d['psnr_half']:.2f}{'!' if 'psnr' in bad else ' '}  "
                    f"Frechet {d['frechet']:+.4f} ± {d['frechet_half']:.4f}{'!' if 'frechet' in bad else ' '}"
                    f" ({-share:+4.0f} %)  distance cut {d['cut']:+5.1f} %"
                    + (f"  kept: {found['taken']}" if row == "auto" else "")
                )
            lines += against(found)
            if "before" in found["rows"]:
                ahead.setdefault(model, []).append(difference(found, "auto", "before")["psnr"])
    lines.append("")
    for row, record in worse.items():
        gain = torch.tensor(means[row]).mean(0).tolist()
        lines.append(
            f"{row}: {len(record)} regressions in {len(means[row])} cells, two measures each"
            f"{': ' + '; '.join(record) if record else ''}. "
            f"Mean over cells: PSNR {gain[0]:+.2f} dB, Frechet to FP {-gain[1]:+.0f} %, distance cut {gain[2]:.0f} %."
        )
    behind = [
        f"{c['model']}, {c['recipe']}, {c['scheduler']}: {row}"
        for c in cells
        for row in ("ptqd", "joint", "before")
        if row in c["rows"] and is_behind(difference(c, "auto", row))
    ]
    lines.append(f"auto behind another: {'; '.join(behind) or 'nowhere'}.")
    for model, gains in ahead.items():
        lines.append(f"auto - before, {model}: {sum(gains) / len(gains):+.2f} dB in the mean of {len(gains)} cells.")
    return "\n".join(lines)


def is_behind(d: dict[str, float]) -> bool:
    """Whether a difference is one for the worse, beyond its interval."""
    return d["psnr"] < -d["psnr_half"] or d["frechet"] > d["frechet_half"]


def against(found: dict[str, Any]) -> list[str]:
    """auto against the plain formula, joint, and the auto before."""
    lines = []
    for row in [row for row in ("ptqd", "joint", "before") if row in found["rows"]]:
        d = difference(found, "auto", row)
        bad = "!" if is_behind(d) else " "
        lines.append(
            f"        auto - {row:6s} PSNR {d['psnr']:+6.2f} ± {d['psnr_half']:.2f}  Frechet {d['frechet']:+.4f} ± "
            f"{d['frechet_half']:.4f} {bad}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["fashion-ldm"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument(
        "--schedulers", nargs="+", choices=SCHEDULERS, default=[n for n in SCHEDULERS if "flow" not in n]
    )
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(done))
        return
    judge = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    for model, scheduler, recipe in itertools.product(args.models, args.schedulers, args.recipes):
        if not any((c["model"], c["scheduler"], c["recipe"]) == (model, scheduler, recipe) for c in done):
            found = cell(model, judge, scheduler, recipe)
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            gained = {row: difference(found, row) for row in ("ptqd", "joint", "auto")}
            print(model, scheduler, recipe, found["taken"], gained, flush=True)


if __name__ == "__main__":
    main()
