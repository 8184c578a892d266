"""How fast a pipeline is in each engine: real seconds an image, of the whole pipeline, peak memory, and the error.

Every contestant runs in a process of its own, which holds its pipeline and nothing else; only one computes at a time,
in turn, so that what slows the machine down slows all of them down.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptqd.components import denoiser_name, plain_scheduler, with_components
from ptqd.cost import disk_bytes
from ptqd.engines.exporting import export
from ptqd.engines.sessions import ENGINES, required
from ptqd.errors import InputError, PtqdError
from ptqd.progress import busy, track
from ptqd.sampling import Sampling

EAGER, COMPILED, SIMULATED = "torch", "torch.compile", "torch, simulated"
FULL = "FP32"
REPEATS = 5
TINY = 1e-12  # squared error that counts as none: 120 dB


@dataclass(frozen=True)
class Contestant:
    """One way to run a pipeline.

    Attributes:
        engine: what multiplies.
        numbers: ``"FP32"``, or the recipe's name.
        folder: of the pipeline.
        bytes: of the denoiser on disk.
        compiled: whether torch compiles the denoiser.
    """

    engine: str
    numbers: str
    folder: Path
    bytes: int
    compiled: bool = False


@dataclass(frozen=True)
class Timing:
    """What was measured of a contestant.

    Attributes:
        contestant: which.
        seconds: an image, of each repetition.
        peak: resident memory of its process at most, bytes, with torch and diffusers.
        psnr: of its images, dB, to those of full precision of the same seeds; None of full precision itself.
    """

    contestant: Contestant
    seconds: tuple[float, ...]
    peak: int
    psnr: float | None

    @property
    def median(self) -> float:
        """Seconds an image."""
        return statistics.median(self.seconds)


def contestants(
    full: DiffusionPipeline,
    quantized: DiffusionPipeline,
    name: str,
    run: Sampling,
    folder: Path,
    engines: Sequence[str] | None = None,
    *,
    progress: bool = False,
) -> tuple[list[Contestant], dict[str, str]]:
    """Full precision and integers in every engine, full precision in torch first.

    Args:
        full: the pipeline in full precision.
        quantized: by ptqd, with its correction and plan.
        name: of its recipe.
        run: how both sample.
        folder: to write pipelines to; what was written there before is taken as it is.
        engines: ``"torch"``, ``"torch.compile"``, ``"onnxruntime"``, ``"openvino"``; those that are there by default.
        progress: show it.

    Returns:
        Those that can run, and for the others why not.

    Raises:
        InputError: an engine that was asked for by name cannot run the full-precision pipeline.
    """
    full = with_components(full, scheduler=plain_scheduler(quantized.scheduler))
    part = denoiser_name(full)
    found = [Contestant(EAGER, FULL, folder / "full", disk_bytes(getattr(full, part)))]
    _saved(full, folder / "full")
    wanted = [EAGER, *(n for n in (COMPILED, *ENGINES) if engines is None or n in engines)]
    unknown = set(engines or ()) - {EAGER, COMPILED, *ENGINES}
    if unknown:
        raise InputError(f"unknown engine {min(unknown)!r}; known are {', '.join((EAGER, COMPILED, *ENGINES))}")
    refused: dict[str, str] = {}
    for engine in wanted:
        if engine == EAGER:
            _saved(quantized, folder / "quantized")
            size = disk_bytes(getattr(quantized, part))
            found.append(Contestant(SIMULATED, name, folder / "quantized", size))
        elif engine == COMPILED:
            found.append(Contestant(COMPILED, FULL, folder / "full", found[0].bytes, compiled=True))
        else:
            for pipe, numbers, what in ((full, FULL, "full"), (quantized, name, "quantized")):
                target = folder / f"{engine}-{what}"
                try:
                    required(engine)
                    if not target.exists():
                        with busy(f"exporting {numbers} for {engine}" if progress else None):
                            export(pipe, run, engine, target)
                except PtqdError as error:
                    refused[f"{engine} {numbers}"] = str(error)
                    continue
                size = sum(path.stat().st_size for path in (target / part).iterdir())
                found.append(Contestant(engine, numbers, target, size))
    return found, refused


def _saved(pipe: DiffusionPipeline, folder: Path) -> None:
    if not folder.exists():
        pipe.save_pretrained(folder)


def race(
    found: Sequence[Contestant],
    run: Sampling,
    *,
    repeats: int = REPEATS,
    threads: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[list[Timing], dict[str, str]]:
    """Sample one batch in each contestant, again and again, in turn.

    Args:
        found: the first is full precision, which the others' images are compared with.
        run: how they sample; its batch is what is timed.
        repeats: after a first one that is not counted.
        threads: of the CPU; as many as torch would take where it is 0.
        device: where pipelines run.
        progress: show it.

    Returns:
        What was measured, in the contestants' order; and for those that failed why.
    """
    run = run.replace(samples=run.batch)
    threads = threads or torch.get_num_threads()
    refused: dict[str, str] = {}
    seconds: dict[int, list[float]] = {}
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        workers: dict[int, _Worker] = {}
        for i, contestant in enumerate(track(found, "loading pipelines" if progress else None)):
            try:
                workers[i] = stack.enter_context(
                    _worker(contestant, run, threads, device, Path(temporary) / f"{i}.npy")
                )
                workers[i].ask("run")
            except InputError as error:
                refused[f"{contestant.engine} {contestant.numbers}"] = str(error)
                workers.pop(i, None)
        for repeat in track(list(range(repeats)), "timing" if progress else None):
            order = sorted(workers, key=lambda i: (i + repeat) % len(found))
            for i in order:
                seconds.setdefault(i, []).append(workers[i].ask("run")["seconds"] / run.batch)
        ends = {i: worker.ask("end") for i, worker in workers.items()}
        images = {i: np.load(Path(temporary) / f"{i}.npy") for i in workers}
    timings = []
    for i in workers:
        psnr = None if not i else -10 * math.log10(max(float(np.square(images[i] - images[0]).mean()), TINY))
        timings.append(Timing(found[i], tuple(seconds[i]), ends[i]["peak"], psnr))
    return timings, refused


class _Worker:
    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        self.process, self.name = process, name

    def ask(self, what: str | Mapping[str, Any]) -> dict[str, Any]:
        """Its answer.

        Raises:
            InputError: it failed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            raise InputError(f"{self.name} ended ({self.process.returncode}); is there memory enough for its process?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer


@contextmanager
def _worker(contestant: Contestant, run: Sampling, threads: int, device: str, images: Path) -> Iterator[_Worker]:
    """A process with a contestant's pipeline."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "ptqd.timed"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        worker = _Worker(process, f"{contestant.engine} {contestant.numbers}")
        try:
            worker.ask(
                {
                    "folder": str(contestant.folder),
                    "compiled": contestant.compiled,
                    "threads": threads,
                    "device": device,
                    "run": run.to_dict(),
                    "images": str(images),
                }
            )
            yield worker
        finally:
            process.kill()
