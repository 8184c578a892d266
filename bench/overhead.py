"""What simulating, correcting and switching bits cost, on fashion-ldm at batch 32 with guidance: ratios of one run.

    python bench/overhead.py
    python bench/overhead.py engines    # what corrections cost in torch, ONNX Runtime and OpenVINO, on two threads

Each round times every variant once, in turn; a ratio is the median over rounds of variant / full precision, and for
engines of corrected / uncorrected.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ptqd
from ptqd.correction import fit_trajectory
from ptqd.diffusion import StepState, run_batch
from ptqd.engines import processor_name
from ptqd.engines.export import export

ROUNDS = 9
ENGINE_ROUNDS = 21
RUN = ptqd.Sampling(10, 1.0, 32, 32, 0, {"class_labels": list(range(10)), "guidance_scale": 1.5})


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    qpipe = ptqd.quantize(pipe, "w4a8", RUN)
    stats = ptqd.measure(pipe, qpipe, RUN)
    corrected, joint = ptqd.correct(qpipe, stats, ("cnc", "bc", "vsc")), ptqd.correct(qpipe, stats, ["joint"])
    wide = ptqd.quantize(pipe, "w4a4+8", RUN)
    rule = ptqd.paper_plan(ptqd.measure_widths(pipe, wide, RUN))
    planned = ptqd.apply_plan(wide, rule.replace(bits=((4,), (8,)) * (rule.steps // 2)))  # a switch at every step
    variants: dict[str, Callable[[], object]] = {
        "sampling, full precision": lambda: run_batch(pipe, RUN, range(32), "latent"),
        "sampling, w4a8 simulated": lambda: run_batch(qpipe, RUN, range(32), "latent"),
        "sampling, w4a8 corrected": lambda: run_batch(corrected, RUN, range(32), "latent"),
        "sampling, w4 a4/a8 by a plan": lambda: run_batch(planned, RUN, range(32), "latent"),
        "measuring": lambda: ptqd.measure(pipe, qpipe, RUN),
        "measuring 2 widths": lambda: ptqd.measure_widths(pipe, wide, RUN),
    }
    for function in variants.values():
        function()
    rounds = [{name: seconds(function) for name, function in variants.items()} for _ in range(ROUNDS)]
    base = "sampling, full precision"
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} rounds, batch 32, 10 steps, guidance"
    )
    for name in variants:
        ratio = statistics.median(r[name] / r[base] for r in rounds)
        spread = sorted(r[name] / r[base] for r in rounds)
        print(f"{name:28s} {ratio:5.2f} x full precision   ({spread[0]:.2f} to {spread[-1]:.2f})")

    x = torch.randn(32, 4, 8, 8)

    def whole_run(scheduler: Any) -> None:
        scheduler.set_timesteps(RUN.steps)
        noise = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            scheduler.step(x, t, x, eta=1.0, generator=noise)

    cost = {
        name: statistics.median(seconds(partial(whole_run, p.scheduler)) for _ in range(100))
        for name, p in (("plain", qpipe), ("cnc+bc+vsc", corrected), ("joint", joint))
    }
    call = statistics.median(r["sampling, w4a8 simulated"] for r in rounds)
    clock = StepState.of(planned.unet)
    assert clock is not None

    def tick() -> None:
        for t in rule.timesteps:
            clock(planned.unet, (), {"timestep": torch.tensor(t)})

    ticking = statistics.median(seconds(tick) for _ in range(100))
    print(f"setting the bits of a step costs {ticking / call * 100:.3f} % of it")
    for name in ("cnc+bc+vsc", "joint"):
        print(f"correcting by {name} costs {(cost[name] - cost['plain']) / call * 100:.2f} % of a sampling step")


def engines() -> None:
    """Every way to correct, in every engine: W4A8 at batch 32 with guidance, 20 steps that draw nothing."""
    torch.set_num_threads(2)
    run = RUN.replace(steps=20, eta=0.0, samples=64)
    pipe = ptqd.load("fashion-ldm")
    qpipe = ptqd.quantize(pipe, "w4a8", run)
    stats = ptqd.measure(pipe, qpipe, run)
    corrections = {name: ptqd.fit_correction(stats, name.split("+")) for name in ("cnc+bc", "joint", "joint+dns")}
    corrections["trajectory"] = fit_trajectory(qpipe, stats, run).correction
    pipes = {"torch": {"none": qpipe}}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("onnxruntime", "openvino"):
            export(qpipe, run, engine, Path(folder) / engine)
            pipes[engine] = {"none": ptqd.load(str(Path(folder) / engine))}
        for own in pipes.values():
            own |= {name: ptqd.correct(own["none"], correction) for name, correction in corrections.items()}
        print(f"torch {torch.__version__}, {processor_name()}, 2 threads, {ENGINE_ROUNDS} rounds, batch 32, W4A8")
        for engine, own in pipes.items():
            functions = {name: partial(run_batch, p, run, range(32), "latent") for name, p in own.items()}
            for function in functions.values():
                function()
            rounds = [{name: seconds(function) for name, function in functions.items()} for _ in range(ENGINE_ROUNDS)]
            for name in functions:
                ratios = sorted(r[name] / r["none"] for r in rounds)
                ms = 1e3 * statistics.median(r[name] for r in rounds) / 32
                print(
                    f"{engine:12s} {name:12s} {ms:6.2f} ms an image  {statistics.median(ratios):.3f} x uncorrected  "
                    f"({ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}, half of the rounds)",
                    flush=True,
                )


if __name__ == "__main__":
    engines() if sys.argv[1:] == ["engines"] else main()
