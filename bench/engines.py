"""Integers for real: seconds, memory, bytes and fidelity of engines on four pipelines, and quality on one of them.

    python bench/engines.py speed      # whole pipelines, every engine, interleaved
    python bench/engines.py memory     # a denoiser alone, in processes without torch
    python bench/engines.py fidelity   # codes that differ from the simulation's
    python bench/engines.py plans      # a plan that switches at every step, beside one that never does
    python bench/engines.py held       # steps that hold their output, beside the same without and beside FP32
    python bench/engines.py quality    # samples of the engine and of the simulation, same seeds

Pipelines: fashion-ldm at batch 32 with guidance; a DDPM UNet of CIFAR-10 (35.7 M parameters, random weights) at batch 1
and 16; a DiT (39.8 M, 256 tokens, random weights) at batch 4. W8A8 and W4A8 are rounded to nearest and corrected (CNC
and BC); their decoders have 8 bits too. What is written is kept in the folder that PTQD_ENGINES names, for the next
time; PTQD_CASE times one case alone, PTQD_OTHERS=fp32 with decoders in full precision. Speed comes first:
memory, fidelity and quality read what it exported.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from rich.console import Console

import ptqd
from ptqd.diffusion import denoiser_name, run_batch, with_components
from ptqd.engines import captured, for_engine, processor_name
from ptqd.engines.export import export
from ptqd.engines.fidelity import fidelity
from ptqd.experiments import candidates, judged, labels_of, observe_images, run_benchmark, sample_images, speed_report
from ptqd.experiments.report.speed import speed_table
from ptqd.metrics import FashionClassifier, load_reference, open_images
from ptqd.metrics.evaluator import Evaluator
from ptqd.run_folder import RunFolder
from ptqd.zoo import CLASSIFIER, REFERENCE

RECIPES = ("w8a8", "w4a8")
CALL = {"class_labels": list(range(10)), "guidance_scale": 3.0}
COMPILED_TOO = ("fashion-ldm, batch 32", "35.7 M UNet, batch 1")  # torch.compile takes minutes, and is not the fastest
ROUNDS = 9
SAMPLES = 500
FULL = "FP32"


def ddpm() -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False))


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, out_channels=8, num_layers=12)
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.02)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(32, 64, 64), latent_channels=4, **kinds)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))


CASES: dict[str, tuple[Callable[[], Any], ptqd.Sampling]] = {
    "fashion-ldm, batch 32": (lambda: ptqd.load("fashion-ldm"), ptqd.Sampling(20, 0.0, 32, 32, call=CALL)),
    "35.7 M UNet, batch 1": (ddpm, ptqd.Sampling(10, 0.0, 1, 1)),
    "35.7 M UNet, batch 16": (ddpm, ptqd.Sampling(2, 0.0, 16, 16)),
    "39.8 M DiT, batch 4": (
        dit,
        ptqd.Sampling(5, 0.0, 4, 4, call={"class_labels": [0, 1, 2, 3], "guidance_scale": 1.0}),
    ),
}


def quantized(full: Any, text: str, run: ptqd.Sampling) -> Any:
    """Rounded to nearest, and corrected by statistics of a few samples: what is timed does not depend on how many."""
    few = 32 if isinstance(full, ptqd.LatentClassPipeline) else 4
    recipe = ptqd.Recipe.from_dict({**ptqd.Recipe.parse(text).to_dict(), "calibration_samples": few})
    run = run.replace(samples=few, batch=few)
    qpipe = ptqd.quantize(full, recipe, run)
    return ptqd.correct(qpipe, ptqd.measure(full, qpipe, run), ["cnc", "bc"])


def place_of(folder: Path, case: str) -> Path:
    """Where a case's pipelines are."""
    return folder / case.replace(",", "")


def kept(folder: Path, case: str, text: str) -> Any:
    """A quantized and corrected pipeline, made once."""
    make, run = CASES[case]
    path = place_of(folder, case) / text
    if not path.exists():
        full = make()
        full.save_pretrained(path.parent / "full")
        quantized(full, text, run).save_pretrained(path)
    return ptqd.load(path)


def speed(folder: Path) -> None:
    chosen = os.environ.get("PTQD_CASE")
    others: Any = os.environ.get("PTQD_OTHERS", "int8")
    for case, (_, run) in CASES.items():
        if chosen not in (None, case):
            continue
        pipes = {text: kept(folder, case, text) for text in RECIPES}
        place = place_of(folder, case)
        engines = None if case in COMPILED_TOO else ("torch", "onnxruntime", "openvino")
        full, kept_in = ptqd.load(place / "full"), RunFolder(place / "run")
        found, refused = candidates(full, pipes, run, kept_in, engines, others=others)
        timings, failed = run_benchmark(found, run, repeats=5)
        speed = speed_report(timings, refused | failed, run, 0, "cpu")
        print(f"\n{case}")
        Console(width=160).print(speed_table(speed))
        print("".join(f"  without {what}: {reason}\n" for what, reason in speed.without.items()), end="", flush=True)


ALONE = """
import sys
import numpy as np
what, path, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
sample, t = np.zeros((batch, 3, 32, 32), np.float32), np.full(batch, 500, np.float32)
if what == "torch":
    import torch
    from diffusers import UNet2DModel
    torch.set_num_threads(2)
    model = UNet2DModel.from_pretrained(path)
    with torch.no_grad():
        for _ in range(3):
            model(torch.from_numpy(sample), torch.from_numpy(t))
else:
    from pathlib import Path
    from ptqd.engines.sessions import (open_session)
    session = open_session(Path(path) / "model.onnx", what, threads=2, rows=5)  # as the pipeline has it
    for _ in range(3):
        session.run({"sample": sample, "timestep": t})
    assert "torch" not in sys.modules
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def memory(folder: Path) -> None:
    place = place_of(folder, "35.7 M UNet, batch 1")
    unet = {FULL: "engines/onnxruntime-FP32/unet", **{text: f"engines/onnxruntime-{text}/unet" for text in RECIPES}}
    print(f"peak resident memory of the 35.7 M UNet alone, MB ({processor_name()})")
    for batch in (1, 16):
        first = None
        for what, numbers in [("torch", FULL), *((e, n) for e in ("onnxruntime", "openvino") for n in unet)]:
            path = place / "full" / "unet" if what == "torch" else place / "run" / unet[numbers]
            command = [sys.executable, "-W", "ignore", "-c", ALONE, what, str(path), str(batch)]
            peak = (
                int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) * 1024 / 1e6
            )
            first = first or peak
            print(f"  batch {batch:2d}  {what:12s} {numbers:5s} {peak:6.0f}  {peak / first:6.1%} of torch", flush=True)


def fidelities(folder: Path) -> None:
    print("codes of activations that differ from the simulation's, over one call of a sampling run; the output's RMS")
    print("difference, over the output's; and the same between full precision and the simulation")
    for case, (make, run) in CASES.items():
        if case.endswith("batch 16"):
            continue
        full = make()
        for text in RECIPES:
            qpipe = kept(folder, case, text)
            name = denoiser_name(qpipe)
            model = getattr(qpipe, name)
            call = captured(qpipe, run.replace(seed=1), model)
            arguments = call.arguments(list(call.tensors.values()))
            with torch.no_grad():
                simulated, exact = (m(**arguments, return_dict=False)[0] for m in (model, getattr(full, name)))
            noise = ((simulated - exact).square().mean() / exact.square().mean()).sqrt().item()
            with torch.no_grad():
                cores = torch.get_num_threads()
                torch.set_num_threads(1)
                alone = model(**arguments, return_dict=False)[0]
                torch.set_num_threads(cores)
            itself = ((simulated - alone).square().mean() / simulated.square().mean()).sqrt().item()
            what = f"the simulation on one thread and on {cores}"
            print(f"  {case.partition(',')[0]:12s} {text} {what}: output {itself:.2e}")
            for engine in ("onnxruntime", "openvino"):
                exported = ptqd.load(place_of(folder, case) / "run" / "engines" / f"{engine}-{text}")
                found = fidelity(model, getattr(exported, name), **arguments)
                print(
                    f"  {case.partition(',')[0]:12s} {text} {engine:12s} {found.codes:9,d} codes: "
                    f"{found.differing:.4%} differ (first layer {found.first:.4%}), at most by {found.most}; "
                    f"output {found.output:.2e}; quantization {noise:.2e}",
                    flush=True,
                )


def plans(folder: Path) -> None:
    """One graph for all widths: what it costs beside a graph of one width, and what switching costs."""
    pipe, run = ptqd.load("fashion-ldm"), CASES["fashion-ldm, batch 32"][1]
    qpipe = ptqd.quantize(pipe, "w4a4+8", run)
    rule = ptqd.paper_plan(ptqd.measure_widths(pipe, qpipe, run))
    half = rule.steps // 2
    base = "A8, one width"
    found = {"A8 at every step": ((8,),) * rule.steps, "A4 and A8 in turn": ((4,), (8,)) * half}
    quantizations: dict[str, Any] = {base: quantized(pipe, "w4a8", run)}
    quantizations |= {name: ptqd.apply_plan(qpipe, rule.replace(bits=bits)) for name, bits in found.items()}
    quantizations["A8, eight ranges by step"] = quantized(pipe, "w4a8-steps8", run)
    print(f"fashion-ldm, batch 32, {run.steps} steps, {ROUNDS} rounds ({processor_name()}); once: what comes once")
    with tempfile.TemporaryDirectory() as temporary:
        exports = Path(temporary)
        for i, each in enumerate(quantizations.values()):
            export(each, run, "onnxruntime", exports / f"onnxruntime{i}")
            for_engine(exports / f"onnxruntime{i}", "openvino", exports / f"openvino{i}")
        for engine in ("onnxruntime", "openvino"):
            pipes = {name: ptqd.load(exports / f"{engine}{i}") for i, name in enumerate(quantizations)}
            calls = {name: partial(run_batch, each, run, range(32), "latent") for name, each in pipes.items()}
            first = {name: seconds(call) for name, call in calls.items()}
            rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]
            print(engine)
            for name, each in pipes.items():
                ratios = sorted(r[name] / r[base] for r in rounds)
                middle = statistics.median(ratios)
                once = first[name] - statistics.median(r[name] for r in rounds)
                size = sum(file.stat().st_size for file in each.unet.folder.iterdir())
                print(
                    f"  {name:26s} {middle:.3f} x ({ratios[0]:.3f} to {ratios[-1]:.3f}); once {once:4.1f} s; "
                    f"{size / 1e6:.2f} MB on disk",
                    flush=True,
                )


HELD = {"fashion-ldm, batch 32": 32, "35.7 M UNet, batch 1": 1}
HELD_STEPS = 50


def held(folder: Path) -> None:
    """Whole pipelines of 50 steps in OpenVINO: W8A8, corrected, with steps held in regular patterns, and FP32.

    The whole output is held, or the deep part alone.
    """
    for case, batch in HELD.items():
        make, run = CASES[case]
        full, run = make(), run.replace(steps=HELD_STEPS, samples=batch, batch=batch)
        plain = ptqd.quantize(full, "w8a8", run.replace(samples=min(batch, 4), batch=min(batch, 4)))
        timesteps = ptqd.measure(full, plain, run.replace(samples=2, batch=2)).measured_on.model_timesteps
        uniform = ptqd.PrecisionPlan.uniform(timesteps, 8)
        patterns = {
            "W8A8": [],
            "W8A8, every 2nd held": [i for i in range(2, HELD_STEPS - 1) if i % 2],
            "W8A8, two of three held": [i for i in range(2, HELD_STEPS - 1) if i % 3 != 1],
            "W8A8, 12 calls": [i for i in range(2, HELD_STEPS - 1) if i % 5 != 1],
        }
        plans = {name: uniform.holding(steps) for name, steps in patterns.items()}
        plans |= {
            name.replace("held", "shallow").replace("calls", "whole"): uniform.replace(shallow=tuple(steps))
            for name, steps in patterns.items()
            if steps
        }
        pipes: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            pipes[FULL] = export(full, run, "openvino", place / FULL, others="fp32").pipeline
            fast = export(plain, run, "openvino", place / "fast", others="int8", hold_deep=True).pipeline
            for name, plan in plans.items():
                few = run.replace(samples=max(2, min(batch, 8)), batch=max(2, min(batch, 8)))
                planned = ptqd.apply_plan(fast, plan)
                pipes[name] = ptqd.correct(planned, ptqd.measure(full, planned, few), ["cnc", "bc"])
            calls = {name: partial(run_batch, pipe, run, range(batch)) for name, pipe in pipes.items()}
            for call in calls.values():
                call()
            rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(5)]
        print(
            f"{case}, {HELD_STEPS} steps, OpenVINO, 5 rounds ({processor_name()}, threads: {torch.get_num_threads()})"
        )
        for name in pipes:
            spent = statistics.median(r[name] for r in rounds)
            faster = [statistics.median(r[base] / r[name] for r in rounds) for base in ("W8A8", FULL)]
            print(f"  {name:24s} {spent:6.2f} s; {faster[0]:.2f} x as fast as W8A8, {faster[1]:.2f} x FP32", flush=True)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def quality(folder: Path) -> None:
    """Samples of the same seeds in full precision, by the simulation, and by engines of what it simulates."""
    run = CASES["fashion-ldm, batch 32"][1].replace(samples=SAMPLES, batch=64)
    extractor = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    judge = Evaluator(extractor, load_reference(REFERENCE, extractor))
    labels = labels_of(run, range(run.samples))
    place = place_of(folder, "fashion-ldm, batch 32")
    print(f"fashion-ldm, {run.samples} samples, {run.steps} steps, guidance 3: engine less simulation, paired, 95 %")
    with tempfile.TemporaryDirectory() as temporary:

        def looked_at(name: str, pipe: Any, full: tuple[Path, Path] | None) -> tuple[Path, Path]:
            samples, observed = Path(temporary) / f"{name}.safetensors", Path(temporary) / f"{name}-seen.safetensors"
            sample_images(pipe, run, samples, Path(temporary) / f"{name}-parts", title=None)
            same_seed = None if full is None else open_images(full[1], grey=False)
            images, parts = open_images(samples, grey=False), Path(temporary) / f"{name}-seen"
            observe_images(images, judge, run, observed, parts, title=None, same_seed=same_seed)
            return observed, samples

        full = looked_at("full", ptqd.load("fashion-ldm"), None)
        for text in RECIPES:
            of_simulation = looked_at(text, ptqd.load(place / text), full)
            simulated = judged(*of_simulation, judge, labels, full)
            simulation = ptqd.load(place / text)
            engines = {e: ptqd.load(place / "run" / "engines" / f"{e}-{text}") for e in ("onnxruntime", "openvino")}
            compared = {e: with_components(pipe, vae=simulation.vae) for e, pipe in engines.items()}
            compared["both in 8 bits"] = engines["openvino"]  # the decoder too
            for engine, pipe in compared.items():
                found = judged(*looked_at(f"{text}-{engine}", pipe, full), judge, labels, full)
                for name in ("frechet_distance", "spatial_frechet_distance", "psnr", "latent_distance"):
                    value = found[name].minus(simulated[name]).interval(labels)
                    inside = value.low <= 0 <= value.high
                    print(
                        f"  {text} {engine:14s} {name:26s} {simulated[name].value:9.4f}, difference {value.value:+.4f} "
                        f"({value.low:+.4f} to {value.high:+.4f}): {'equal' if inside else 'NOT equal'}",
                        flush=True,
                    )


PARTS: Mapping[str, Callable[[Path], None]] = {
    "speed": speed,
    "memory": memory,
    "fidelity": fidelities,
    "plans": plans,
    "held": held,
    "quality": quality,
}

if __name__ == "__main__":
    place = Path(os.environ.get("PTQD_ENGINES") or tempfile.mkdtemp())
    for part in sys.argv[1:] or PARTS:
        PARTS[part](place)
