"""A trained model that nobody here made: height maps in one step, from PyPI's adaptive-terrain-diffusion.

    pip install --no-deps adaptive-terrain-diffusion==0.4.2   # MIT; a consistency model's ADM UNet, 10.5 M parameters
    pip install nncf                                          # for its line of the table
    python bench/terrain.py FOLDER STAGE...       # convert, ours, correct, others, engines, pictures, report

``convert`` makes a pipeline of the package's ONNX file and holds it against that; ``ours`` runs ``ptqd quantize`` as
the shell does, with the minutes and the memory below; ``others`` quantizes by other packages on the same calibration
seeds. PSNR is of 16 samples of other seeds, heights in [0, 1], against full precision of the same seeds. What a stage
found is kept in the folder; ``report`` prints all of it.
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from others import quantize_with
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import ptqd
from ptqd import Sampling
from ptqd.diffusion import run_batch
from ptqd.diffusion.guided_diffusion import pipeline_from
from ptqd.diffusion.sampling import default_call, sample
from ptqd.engines import processor_name
from ptqd.quantization.bops import run_cost

MINUTES, MEMORY = 12, 6  # that a recipe may take, GB
RECIPES = ("w8a8-best", "w4a8-best", "w8a8", "w4a8")
OTHERS = ("nncf", "onnxruntime-exact", "torchao")
FLAGS = {
    "image_size": 128,
    "num_channels": 32,
    "channel_mult": "1,1,2,3,4",
    "num_res_blocks": 4,
    "num_head_channels": 32,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "class_cond": True,
    "training_mode": "consistency_distillation",
    "sigma_max": 80.0,
    "sigma_data": 0.5,
}
ROUNDS = 31


def graph_path() -> Path:
    """The package's weights; it is not imported, which would ask for its GPU build of ONNX Runtime."""
    spec = importlib.util.find_spec("terrain_diffusion")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps adaptive-terrain-diffusion==0.4.2")
    return Path(spec.origin).parent / "weights" / "terrain_consistency_unet_difficulty100.onnx"


def state_dict() -> dict[str, torch.Tensor]:
    """The network's tensors by guided-diffusion's names.

    Group norms are InstanceNormalization with constants behind it, each in front of the layer it is named after; the
    difficulty's small network becomes a table of its 100 values.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(graph_path()).graph
    constants = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    state = {name.removeprefix("network."): x for name, x in constants.items() if name.startswith("network.")}
    made_by = {output: node for node in graph.node for output in node.output}
    names = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}
    norm = None
    for node in graph.node:
        if node.name.startswith("node_group_norm"):
            norm = constants[made_by[node.input[0]].input[1]], constants[node.input[1]]
        elif node.op_type == "Conv" and norm is not None and "skip_connection" not in node.input[1]:
            layer = node.input[1].removeprefix("network.").removesuffix(".weight")
            ending = next(end for end in names if layer.endswith(end))
            owner = layer.removesuffix(ending) + names[ending]
            state[f"{owner}.weight"], state[f"{owner}.bias"] = (x.flatten() for x in norm)
            norm = None
    parts = [state.pop(f"label_emb.{name}") for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    hidden = functional.silu(functional.linear(torch.linspace(0, 1, 100)[:, None], *parts[:2]))
    state["label_emb.weight"] = functional.linear(hidden, *parts[2:])
    return state


def convert(folder: Path) -> dict[str, Any]:
    """The pipeline, saved, and how far its samples are from the package's own."""
    pipe = pipeline_from(state_dict(), FLAGS)
    pipe.save_pretrained(folder / "model")
    run = sampling(pipe, 4)
    noise: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: noise.append(args[0].detach()))
    got = samples(pipe, run)
    hook.remove()
    session = package_session()
    x = torch.cat(noise) * 80.0  # of the scaled input: c_in is 1 / sqrt(sigma^2 + sigma_data^2)
    x = x / 80.0 * float(np.sqrt(80.0**2 + 0.5**2))
    labels = torch.tensor(run.call_for(range(4))["class_labels"]).float() / 99
    want = session.run(None, feeds(x, labels))[0]
    difference = np.abs((want.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1) - got).max()
    return {"difference": float(difference), "parameters": sum(p.numel() for p in pipe.unet.parameters())}


def package_session() -> Any:
    """The package's own graph in ONNX Runtime, as the package runs it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(str(graph_path()), options, providers=["CPUExecutionProvider"])


def feeds(noisy: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """What the package's graph is given."""
    sigma = np.full(len(noisy), 80.0, np.float32)
    return {"noisy": noisy.numpy(), "sigma": sigma, "difficulty": labels.numpy()}


def sampling(pipe: DiffusionPipeline, count: int) -> Sampling:
    """One step, the difficulties in turn."""
    return Sampling(steps=1, samples=count, batch=8, call=default_call(pipe))


def samples(pipe: DiffusionPipeline, run: Sampling) -> np.ndarray[Any, Any]:
    """Heights (n, 128, 128, 1) in [0, 1]."""
    return np.concatenate([np.asarray(batch) for _, batch in sample(pipe, run)])


def psnr(images: np.ndarray[Any, Any], full: np.ndarray[Any, Any]) -> float:
    """Over all samples together, in dB."""
    return float(10 * np.log10(1 / np.mean((images.astype(np.float64) - full) ** 2)))


def ours(folder: Path) -> dict[str, Any]:
    """Each recipe as the shell runs it."""
    pipe = ptqd.load(folder / "model")
    run = sampling(pipe, 16)
    full = samples(pipe, run)
    constant = np.full_like(full, full.mean())
    found: dict[str, Any] = {"a constant": {"psnr": psnr(constant, full)}}
    for recipe in RECIPES:
        out = folder / recipe
        command = [sys.executable, "-m", "ptqd", "quantize", str(folder / "model"), "--recipe", recipe, "--steps", "1"]
        command += ["--minutes", str(MINUTES), "--memory", str(MEMORY), "--batch", "8", "--out", str(out)]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        quantized = ptqd.load(out)
        cost = run_cost(quantized, run)
        found[recipe] = {
            "psnr": psnr(samples(quantized, run), full),
            "ratio": cost.ratio,
            "megabytes": cost.disk / 1e6,
            "seconds": seconds,
            "gigabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
            "said": next((line for line in done.stderr.splitlines() if "takes about" in line), ""),
        }
        print(recipe, found[recipe], flush=True)
    return found


def correct(folder: Path) -> dict[str, Any]:
    """What ``auto`` makes of 16 and of 64 measured samples."""
    pipe = ptqd.load(folder / "model")
    run = sampling(pipe, 16)
    full = samples(pipe, run)
    found: dict[str, Any] = {}
    for recipe in RECIPES[:2]:
        quantized = ptqd.load(folder / recipe)
        found[recipe] = {"none": psnr(samples(quantized, run), full)}
        for measured in (16, 64):
            stats = ptqd.measure(pipe, quantized, run.replace(samples=measured))
            corrected = ptqd.correct(quantized, stats, sampling=run)
            found[recipe][f"auto {measured}"] = psnr(samples(corrected, run), full)
        print(recipe, found[recipe], flush=True)
    return found


def others(folder: Path) -> dict[str, Any]:
    """Other packages, at their documented settings, on calibration seeds of our own."""
    pipe = ptqd.load(folder / "model")
    run = sampling(pipe, 16)
    full = samples(pipe, run)
    found: dict[str, Any] = {}
    for package in OTHERS:
        start = time.perf_counter()
        quantized = quantize_with(package, pipe, run, 64)
        images = samples(quantized, run)
        np.save(folder / f"{package}.npy", images)
        found[package] = {"psnr": psnr(images, full), "seconds": time.perf_counter() - start}
        print(package, found[package], flush=True)
    return found


def engines(folder: Path) -> dict[str, Any]:
    """Seconds of one call of 4 samples, interleaved, as ratios to the package's own graph."""
    pipe = ptqd.load(folder / "model")
    run = sampling(pipe, 4).replace(batch=4)
    contenders: dict[str, Callable[[], object]] = {}
    session = package_session()
    given = feeds(torch.randn(4, 1, 128, 128) * 80, torch.linspace(0, 1, 4))
    contenders["the package's own, ONNX Runtime fp32"] = lambda: session.run(None, given)
    fidelity = {}
    for engine in ("openvino", "onnxruntime"):
        quantized = ptqd.load(folder / "w8a8-best")
        target = folder / f"w8a8-best-{engine}"
        if not (target / "model_index.json").exists():
            ptqd.export(quantized, run, engine, target)
        exported = ptqd.load(target)
        fidelity[engine] = psnr(samples(exported, run), samples(quantized, run))
        contenders[f"w8a8-best, {engine}"] = lambda exported=exported: run_batch(exported, run, range(4), "latent")  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    base = next(iter(seconds))
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[base], each, strict=True))
        for name, each in seconds.items()
    }
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "times as fast": ratios,
        "PSNR to the simulation": fidelity,
    }


def pictures(folder: Path) -> dict[str, Any]:
    """Height maps side by side: full precision, ours, others."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    pipe = ptqd.load(folder / "model")
    run = sampling(pipe, 16)
    rows = {"full precision": samples(pipe, run)}
    for recipe in RECIPES[:3]:
        rows[recipe] = samples(ptqd.load(folder / recipe), run)
    for package in OTHERS:
        if (folder / f"{package}.npy").exists():
            rows[package] = np.load(folder / f"{package}.npy")
    chosen = (1, 4, 6, 9, 11, 14)
    figure, axes = plt.subplots(len(rows), len(chosen), figsize=(1.6 * len(chosen), 1.75 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, i in zip(line, chosen, strict=True):
            axis.imshow(images[i, ..., 0], cmap="terrain", vmin=0, vmax=rows["full precision"][i].max())
            axis.set_xticks([])
            axis.set_yticks([])
        error = psnr(images, rows["full precision"]) if name != "full precision" else None
        line[0].set_title(name if error is None else f"{name}, {error:.1f} dB", loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(folder / "terrain.png", dpi=110)
    return {}


def report(folder: Path) -> None:
    """All that was found."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    console = Console(width=120)
    console.print(f"Converted: samples differ from the package's by {found['convert']['difference']:.1e} at most.\n")
    table = Table(
        "", "PSNR, dB", "fewer bit operations", "MB", "time, s", "memory so far, GB", title="W8A8 and W4A8, 16 samples"
    )
    for name, row in {**found["ours"], **found.get("others", {})}.items():
        values = [f"{row['psnr']:.1f}", *(f"{row[k]:.{d}f}" if k in row else "" for k, d in _COLUMNS)]
        table.add_row(name, *values)
    console.print(table)
    for name, row in found["ours"].items():
        if row.get("said"):
            console.print(f"{name}: {row['said']}", soft_wrap=True)
    for recipe, row in found.get("correct", {}).items():
        console.print(f"{recipe}, corrected: " + ", ".join(f"{name} {value:.2f} dB" for name, value in row.items()))
    if "engines" in found:
        facts = found["engines"]
        console.print(f"\n{facts['processor']}, {facts['threads']} threads, 4 samples a call:")
        for name, ratio in facts["times as fast"].items():
            console.print(f"  {name}: {facts['seconds'][name]:.3f} s, {ratio:.2f} times as fast")
        for name, value in facts["PSNR to the simulation"].items():
            console.print(f"  {name} against the simulation: {value:.1f} dB")


_COLUMNS = (("ratio", 1), ("megabytes", 1), ("seconds", 0), ("gigabytes", 1))
STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "convert": convert,
    "ours": ours,
    "correct": correct,
    "others": others,
    "engines": engines,
    "pictures": pictures,
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for stage in sys.argv[2:] or (*STAGES, "report"):
        if stage == "report":
            report(folder)
        else:
            result = STAGES[stage](folder)
            (folder / f"{stage}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
