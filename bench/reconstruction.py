"""What learned rounding takes: time and peak memory, against blocks and inputs, and at the size of LDM-4.

    python bench/reconstruction.py

Each line is a process of its own, whose peak resident memory is the operating system's figure. fashion-ldm with its
whole recipe; block reconstruction (60 iterations a unit) of a random UNet of its width with 1, 2 and 4 layers a block,
and with 128 to 1024 inputs; then two blocks of LDM-4 on ImageNet (400 M parameters, random weights, from its
configuration), whose time for each multiply-accumulate says what the rest would take.
"""

import argparse
import copy
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

import ptqd
from ptqd.diffusion import call_macs, from_configuration
from ptqd.diffusion.call_rows import plain_rows
from ptqd.diffusion.sampling import Sampling
from ptqd.pipelines.latent_class import LatentClassPipeline
from ptqd.quantization import Brecq, CalibrationInputs, find_units, insert_quantizers, learn
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.sites import quantized_sites
from ptqd.zoo import ARCHITECTURES

RUN = Sampling(20, 0.0, 64, 32, call={"class_labels": list(range(10)), "guidance_scale": 1.5})
LDM4 = ("up_blocks.0.resnets.0", "up_blocks.2.resnets.0")
LDM4_SIZES = {"up_blocks.0.resnets.0": 16, "up_blocks.2.resnets.0": 64}
ROWS = 4  # of LDM-4's batch: what fits a small machine
ITERATIONS = 150


def whole(recipe: str) -> dict[str, Any]:
    ptqd.quantize(ptqd.load("fashion-ldm"), recipe, RUN)
    return {}


def sized(layers: int, inputs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    small: Any = ptqd.load("fashion-ldm")
    config = {**small.unet.config, "layers_per_block": layers}
    unet = UNet2DConditionModel.from_config(config)
    pipe = LatentClassPipeline(small.vae, unet, small.class_embedder, DDIMScheduler.from_config(small.scheduler.config))
    method = {"name": "brecq", "iterations": 60, "inputs": inputs}
    recipe = Recipe.from_dict({**Recipe.parse("w4a8-split").to_dict(), "methods": [method]})
    quantized = ptqd.quantize(pipe, recipe, RUN)
    return {"units": len(find_units(quantized.unet)), "parameters": sum(p.numel() for p in unet.parameters())}


class OneBlock(nn.Module):
    """A denoiser that is one residual block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, sample: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.block(sample, temb)
        return output


def block(name: str) -> dict[str, Any]:
    config = json.loads(ARCHITECTURES["ldm4-imagenet"].read_text("utf-8"))
    model = from_configuration(UNet2DConditionModel, config)
    part: Any = model.get_submodule(name)
    size = LDM4_SIZES[name]
    channels, width = part.in_channels, model.time_embedding.linear_2.out_features
    meta = torch.device("meta")
    example = (torch.zeros(1, channels, size, size, device=meta), torch.zeros(1, width, device=meta))
    macs = sum(call_macs(OneBlock(part), *example).values())
    full = OneBlock(part.to_empty(device="cpu"))
    for parameter in full.parameters():
        nn.init.normal_(parameter, std=0.02)
    quantized = copy.deepcopy(full)
    recipe = Recipe.parse("w4a8")
    minmax = dataclasses.replace(recipe.weights, range="minmax")  # a search would take longer than what is measured
    insert_quantizers(quantized, dataclasses.replace(recipe, weights=minmax))
    leaves = [torch.randn(2 * ROWS, channels, size, size), torch.randn(2 * ROWS, width)]
    pool = CalibrationInputs(plain_rows(*leaves), torch.zeros(2 * ROWS).long())
    return {"macs": macs, "parameters": sum(p.numel() for p in full.parameters()), **learned(full, quantized, pool)}


def learned(full: nn.Module, quantized: nn.Module, pool: CalibrationInputs) -> dict[str, Any]:
    for module in [site.module for site in quantized_sites(quantized)]:
        module.observe()
    args, kwargs = pool.call(range(ROWS))
    with torch.no_grad():
        quantized(*args, **kwargs)
    for module in [site.module for site in quantized_sites(quantized)]:
        module.freeze()
    count = 4
    with TemporaryDirectory() as folder:
        started = time.monotonic()
        learn(quantized, full, pool, Brecq(iterations=count, batch=ROWS, inputs=2 * ROWS), frozenset(), Path(folder))
    return {"seconds of an iteration": (time.monotonic() - started) / count}


def own(what: list[str]) -> None:
    """What one process does: print its facts as JSON."""
    started = time.monotonic()
    kind, *arguments = what
    if kind == "whole":
        facts = whole(arguments[0])
    elif kind == "sized":
        facts = sized(int(arguments[0]), int(arguments[1]))
    else:
        facts = block(arguments[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts |= {"seconds": time.monotonic() - started, "peak MB": peak}
    print("FACTS" + json.dumps(facts))


def process(*what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--own", *what]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts: dict[str, Any] = json.loads(text[text.index("FACTS") + 5 :])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        own(args.own)
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; a process that only loads: ", end="", flush=True
    )
    print(f"{process('whole', 'w8a8')['peak MB']:.0f} MB at its peak, rounding to nearest")
    print("\nfashion-ldm, the whole recipe")
    for recipe in ("w4a8-brecq", "w4a8-best"):
        facts = process("whole", recipe)
        print(f"  {recipe:12s} {facts['seconds']:6.0f} s  {facts['peak MB']:6.0f} MB", flush=True)
    print("\nblock reconstruction, 60 iterations a unit, by layers a block (512 inputs) and by inputs (1 layer)")
    for layers, inputs in ((1, 512), (2, 512), (4, 512), (1, 128), (1, 1024)):
        facts = process("sized", str(layers), str(inputs))
        print(
            f"  {layers} layers, {facts['units']:3d} units, {facts['parameters'] / 1e6:5.1f} M parameters, "
            f"{inputs:5d} inputs {facts['seconds']:6.0f} s  {facts['peak MB']:6.0f} MB",
            flush=True,
        )
    print(f"\nLDM-4 on ImageNet, one residual block, batch {ROWS}")
    rates = []
    for name in LDM4:
        facts = process("block", name)
        rates.append(facts["seconds of an iteration"] / ROWS / facts["macs"])
        print(
            f"  {name}: {facts['parameters'] / 1e6:.1f} M parameters, {facts['macs'] / 1e9:.2f} GMACs a row, "
            f"{facts['seconds of an iteration']:.2f} s an iteration, {facts['peak MB']:.0f} MB",
            flush=True,
        )
    total, rate = 99.8e9, sum(rates) / len(rates)
    learning = total * rate * 32 * ITERATIONS
    print(
        f"  extrapolated: all units, {ITERATIONS} iterations of 32 rows: {learning / 3600:.1f} h here; the model twice "
        f"in float32 takes {2 * 400.9e6 * 4 / 1e9:.1f} GB beside a block's"
    )


if __name__ == "__main__":
    main()
