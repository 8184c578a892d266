"""What it costs to hold outputs: steps that ptqd chooses, every second and two of three steps, and fewer steps.

    python bench/held.py                                        # an hour of a core
    python bench/held.py --models fashion-dit --recipes w8a8 --etas 0
    python bench/held.py --distances 2000                       # in OpenVINO: half an hour of a core for all models

DDIM (flow: Euler), 50 steps, guidance 1.5. Mean SNR of the final latents in dB against full precision of 50 steps, on
64 seeds that no statistics saw: not corrected, with CNC and BC, and with the correction fitted along the trajectory;
what the plan expects, as CNC and BC leave it; and how many times fewer bit operations than FP32. Steps hold the last
output, or go on from the last two by fitted weights. The patterns in turn, every second and two of three, compute the
first two steps and the last. Fewer steps, where nothing is drawn, are full precision's, the quantized model's, and the
same corrected along full precision's trajectory of as few steps. With --distances: the Frechet distance of so many
samples to full precision's, in the classifier's features, and PSNR; both as differences to the same without held
steps, with the 95 % interval of the paired difference (jackknife for Frechet). Corrected along the trajectory,
decoders in full precision.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from grid import distance, drawn, features, jackknife

import ptqd
from ptqd.correction import fit_trajectory
from ptqd.diffusion import final_samples, with_components
from ptqd.diffusion.sampling import Sampling
from ptqd.engines.export import export
from ptqd.metrics import FashionClassifier
from ptqd.mixed_precision.holding import HeldErrors
from ptqd.quantization import run_cost
from ptqd.zoo import CLASSIFIER

STEPS, MEASURED, TESTED = 50, 64, 64
MODELS = {
    "fashion-ldm": "DDIMScheduler",
    "fashion-dit": "DDIMScheduler",
    "fashion-flow": "FlowMatchEulerDiscreteScheduler",
}


def ends(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.cat([final_samples(pipe, run, list(indices)) for indices in run.batches()]).double()


def snr(end: torch.Tensor, reference: torch.Tensor) -> float:
    energy, error = (x.square().flatten(1).sum(1) for x in (reference, end - reference))
    return float((10 * (energy / error).log10()).mean())


def held_rows(steps: int, holds: HeldErrors, goes_on: HeldErrors) -> dict[str, tuple[HeldErrors, tuple[bool, ...]]]:
    """Patterns of held steps by name, each with what says their error: by the last output, and by the last two."""
    second = tuple(1 < i < steps - 1 and i % 2 == 1 for i in range(steps))
    two_of_three = tuple(1 < i < steps - 1 and i % 3 != 1 for i in range(steps))
    result = {"none held": (holds, (False,) * steps)}
    for count, regular in ((sum(second), second), (sum(two_of_three), two_of_three), (4 * steps // 5, ())):
        if regular:
            result[f"{count} in turn, held"] = holds, regular
            result[f"{count} in turn, by two outputs"] = goes_on, regular
        result[f"{count} chosen, held"] = holds, holds.patterns[count]
        result[f"{count} chosen, by two outputs"] = goes_on, goes_on.patterns[count]
    return result


def held_plan(
    timesteps: tuple[float, ...], bits: int, errors: HeldErrors, held: tuple[bool, ...]
) -> ptqd.PrecisionPlan:
    plan = ptqd.PrecisionPlan.uniform(timesteps, bits).holding([i for i, holds in enumerate(held) if holds])
    return plan.replace(extrapolation=errors.extrapolation(held))


def cell(model: str, recipe: str, eta: float) -> None:
    pipe = ptqd.load(model)
    scheduler = getattr(diffusers, MODELS[model]).from_config(pipe.scheduler.config)
    plain = with_components(pipe, scheduler=scheduler)
    call = {"class_labels": list(range(10)), "guidance_scale": 1.5}
    run = Sampling(STEPS, eta, MEASURED, 32, call=call)
    test = run.replace(seed=77, samples=TESTED)
    quantized = ptqd.quantize(plain, recipe, run)
    reference = ends(plain, test)
    first = ptqd.measure(plain, quantized, run)
    rows = held_rows(STEPS, HeldErrors(first, extrapolate=False), HeldErrors(first))
    timesteps = first.measured_on.model_timesteps
    bits = ptqd.Recipe.parse(recipe).activations.bits
    print(f"\n{model}, {recipe}, eta {eta:g}")
    print("  held                        calls  fewer BOPs  expected     none   CNC+BC  trajectory", flush=True)
    for name, (errors, held) in rows.items():
        planned = ptqd.apply_plan(quantized, held_plan(timesteps, bits, errors, held))
        stats = ptqd.measure(plain, planned, run)
        found = [
            snr(ends(corrected, test), reference)
            for corrected in (
                planned,
                ptqd.correct(planned, stats, ("cnc", "bc")),
                ptqd.correct(planned, fit_trajectory(planned, stats, run).correction),
            )
        ]
        expected = 10 * torch.tensor(float(reference.var()) / errors.error(held)).log10()
        print(
            f"  {name:26s} {STEPS - sum(held):6d} {run_cost(planned, run).ratio:10.1f}x  {expected:8.1f} "
            f"{found[0]:8.1f} {found[1]:8.1f} {found[2]:11.1f}",
            flush=True,
        )
    for steps in (25, 18) if eta == 0 else ():
        fewer = test.replace(steps=steps)
        fitted = run.replace(steps=steps)
        correction = fit_trajectory(quantized, ptqd.measure(plain, quantized, fitted), fitted).correction
        full, mine, corrected = (
            snr(ends(each, fewer), reference) for each in (plain, quantized, ptqd.correct(quantized, correction))
        )
        print(
            f"  {steps} steps: full precision {full:.1f}, quantized {mine:.1f}, trajectory {corrected:.1f}", flush=True
        )


def distances(model: str, samples: int, judge: FashionClassifier) -> None:
    """What held steps change of W8A8's distances to full precision, all of them in OpenVINO."""
    pipe = ptqd.load(model)
    plain = with_components(pipe, scheduler=getattr(diffusers, MODELS[model]).from_config(pipe.scheduler.config))
    run = Sampling(STEPS, 0.0, MEASURED, 32, call={"class_labels": list(range(10)), "guidance_scale": 1.5})
    quantized = ptqd.quantize(plain, "w8a8", run)
    first = ptqd.measure(plain, quantized, run)
    timesteps = first.measured_on.model_timesteps
    test = run.replace(seed=77, samples=samples, batch=100)
    groups = torch.arange(samples) % 50
    with TemporaryDirectory() as temporary:
        pipes = {"FP32": export(plain, run, "openvino", Path(temporary) / "full").pipeline}
        fast = export(quantized, run, "openvino", Path(temporary) / "fast").pipeline
        rows = held_rows(STEPS, HeldErrors(first, extrapolate=False), HeldErrors(first))
        for name, (errors, held) in rows.items():
            planned = ptqd.apply_plan(fast, held_plan(timesteps, 8, errors, held))
            stats = ptqd.measure(plain, planned, run)
            pipes[f"{name}, {STEPS - sum(held)} calls"] = ptqd.correct(
                planned, fit_trajectory(planned, stats, run).correction
            )
        images = {name: drawn(each, test)[1] for name, each in pipes.items()}
    reference = images.pop("FP32")
    theirs = features(judge, reference)
    print(f"\n{model}, W8A8 in OpenVINO, {STEPS} steps, eta 0, guidance 1.5, {samples} samples")
    base: tuple[float, torch.Tensor, list[float]] | None = None
    for name, mine in images.items():
        seen = features(judge, mine)
        near = -10 * (mine - reference).double().square().flatten(1).mean(1).clamp(min=1e-10).log10()
        left_out = [distance(seen[groups != g], theirs[groups != g]) for g in range(50)]
        base = base or (distance(seen, theirs), near, left_out)
        frechet, gained = distance(seen, theirs) - base[0], near - base[1]
        half = jackknife([a - b for a, b in zip(left_out, base[2], strict=True)])
        print(
            f"  {name:32s} Frechet to FP {base[0] + frechet:.4f} ({frechet:+.4f} ± {half:.4f})  "
            f"PSNR {near.mean():.2f} ({gained.mean():+.2f} ± {1.96 * float(gained.std()) / samples**0.5:.2f})",
            flush=True,
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--etas", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--distances", type=int, metavar="SAMPLES", help="distances to full precision, in OpenVINO")
    args = parser.parse_args()
    if args.distances:
        judge = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
        for model in args.models:
            distances(model, args.distances, judge)
        return
    print(f"{STEPS} steps, statistics of {MEASURED}, {TESTED} other seeds, torch {torch.__version__}")
    for model in args.models:
        for eta in args.etas:
            for recipe in args.recipes:
                if eta == 0 or model == "fashion-ldm":  # the others' pipelines draw no noise
                    cell(model, recipe, eta)


if __name__ == "__main__":
    main()
