"""LDM-4 on ImageNet at full size, with random weights, through the best recipe with 4 inputs: time and memory by stage.

    python bench/ldm4_best.py [MINUTES]

The stages are those of ``ptqd.quantize``; memory is the process' resident set, looked at 20 times a second, and the
estimate is what ``ptqd quantize`` says before it starts. Two samples of one step give 4 rows, guidance included; of
distilling, 3 steps of 4 rows. Calibration counts what comes before the first method.
"""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

import ptqd
from ptqd import Budget, Recipe, Sampling
from ptqd.diffusion.compvis.pipeline import blank
from ptqd.engines import processor_name
from ptqd.quantization import estimate, quantize
from ptqd.quantization.methods import Distill, Gptq, Smooth, Widen
from ptqd.zoo import CONFIGS

LIMIT = 12 * 10**9
METHODS = (Widen(inputs=4), Smooth(), Gptq(inputs=4), Distill(iterations=3, batch=4, inputs=4))


class Stages:
    """Time and peak memory of what runs, by name."""

    def __init__(self) -> None:
        self.now, self.seconds, self.peaks = "calibrating", dict[str, float](), dict[str, int]()
        self.process = psutil.Process(os.getpid())
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            held = self.process.memory_info().rss
            self.peaks[self.now] = max(self.peaks.get(self.now, 0), held)
            time.sleep(0.05)

    def of(self, name: Callable[..., str], function: Any) -> Any:
        """A function that counts as a stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.now = self.now, name(*args)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[self.now] = self.seconds.get(self.now, 0.0) + time.perf_counter() - start
                peak = self.peaks.get(self.now, 0) / 1e9
                print(f"  {self.now} is over: {self.seconds[self.now]:.0f} s, peak {peak:.2f} GB", flush=True)
                self.now = before

        return timed


def pipeline() -> Any:
    """The architecture with random numbers."""
    pipe: Any = blank(CONFIGS["ldm4-imagenet"])
    torch.manual_seed(0)
    for part in (pipe.unet, pipe.vae, pipe.class_embedder):
        part.to_empty(device="cpu")
        for name, value in part.named_parameters():
            fan = max(1, value[0].numel())
            torch.nn.init.normal_(value, std=fan**-0.5) if value.ndim > 1 else torch.nn.init.constant_(
                value, float("norm" in name and name.endswith("weight"))
            )
        part.requires_grad_(False)
    return pipe


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else None
    stages = Stages()
    said: list[estimate.Estimate] = []

    def keep(*args: Any) -> Any:
        result = estimate.fitted(*args)
        said.append(result[1])
        return result

    module: Any = quantize
    module.fitted = keep
    module.widened = stages.of(lambda *args: "wide", module.widened)
    module.apply_method = stages.of(lambda task, method: method.name, module.apply_method)
    kind = module._Quantizing
    kind._calibrate = stages.of(lambda self: "calibrating", kind._calibrate)
    kind._find_ranges = stages.of(lambda self, *args: "finding ranges", kind._find_ranges)
    kind._prepare = stages.of(lambda self: "estimating", kind._prepare)
    pipe = pipeline()
    run = Sampling(steps=1, samples=2, batch=1, call={"class_labels": [1, 2], "guidance_scale": 1.5})
    recipe = dataclasses.replace(Recipe.parse("w4a8-best"), calibration_samples=2, calibration_rows=0, methods=METHODS)
    start = time.perf_counter()
    ptqd.quantize(pipe, recipe, run, budget=Budget(LIMIT, minutes), progress=True)
    total = time.perf_counter() - start
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"LDM-4 on ImageNet, {count / 1e6:.0f} M parameters, {processor_name()}, {torch.get_num_threads()} threads")
    guessed = {stage.name: stage for stage in said[0].stages}
    for name, seconds in stages.seconds.items():
        guess = guessed.get(name)
        text = "" if guess is None else f"  estimated {guess.seconds:6.0f} s, {guess.memory / 1e9:5.2f} GB"
        print(f"  {name:15s} {seconds:6.0f} s  peak {stages.peaks.get(name, 0) / 1e9:5.2f} GB{text}")
    peak = max(stages.peaks.values())
    verdict = "within" if peak <= LIMIT else "BEYOND"
    print(f"  in all          {total:6.0f} s  peak {peak / 1e9:5.2f} GB, {verdict} 12 GB")
    print(f"  estimated {said[0].seconds:.0f} s, {said[0].memory / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
