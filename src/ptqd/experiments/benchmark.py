"""How fast a pipeline is in each engine: real seconds an image, of the whole pipeline, peak memory, and the error.

Every candidate runs in a process of its own, which holds its pipeline and nothing else; only one computes at a time,
in turn, so that what slows the machine down slows all of them down.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptqd.diffusion.fingerprints import pipeline_fingerprint
from ptqd.diffusion.pipeline_parts import denoiser_names, plain_scheduler, with_components
from ptqd.diffusion.sampling import Sampling
from ptqd.engines.cpu import processor_name
from ptqd.engines.export import Others, export, for_engine
from ptqd.engines.sessions import ENGINES, required
from ptqd.errors import InputError, PtqdError
from ptqd.experiments.results import REPORT, Report, SpeedReport, SpeedRow
from ptqd.names import folder_name
from ptqd.progress import busy, track
from ptqd.quantization.bops import disk_bytes
from ptqd.run_folder import RunFolder

EAGER, COMPILED, SIMULATED = "torch", "torch.compile", "torch, simulated"
FULL = "FP32"
KNOWN = (EAGER, COMPILED, *ENGINES)
REPEATS = 5
MOST = 10_000
TINY = 1e-12  # squared error that counts as none: 120 dB


@dataclass(frozen=True)
class Candidate:
    """One way to run a pipeline.

    Attributes:
        engine: what multiplies.
        precision: ``"FP32"``, or the recipe's name.
        folder: of the pipeline.
        bytes: of the denoiser on disk.
        compiled: whether torch compiles the denoiser.
    """

    engine: str
    precision: str
    folder: Path
    bytes: int
    compiled: bool = False


@dataclass(frozen=True)
class Timing:
    """What was measured of a candidate.

    Attributes:
        candidate: which.
        seconds: an image, of each repetition.
        peak: resident memory of its process at most, bytes, with torch and diffusers.
        psnr: of its images, dB, to those of full precision of the same seeds; None of full precision itself.
    """

    candidate: Candidate
    seconds: tuple[float, ...]
    peak: int
    psnr: float | None

    @property
    def median(self) -> float:
        """Seconds an image."""
        return statistics.median(self.seconds)


def candidates(
    full: DiffusionPipeline,
    quantized: Mapping[str, DiffusionPipeline],
    sampling: Sampling,
    folder: RunFolder,
    engines: Sequence[str] | None = None,
    *,
    others: Others = "fp32",
    progress: bool = False,
) -> tuple[list[Candidate], dict[str, str]]:
    """Full precision in torch, then full precision and integers in every engine.

    Args:
        full: the pipeline in full precision.
        quantized: pipelines by ptqd, with their corrections and plans, by what their numbers are called.
        sampling: how all sample.
        folder: where pipelines are kept, under ``engines/``; one that is there already is taken as it is.
        engines: ``"torch"`` (the simulation), ``"torch.compile"``, ``"onnxruntime"``, ``"openvino"``; by default all.
        others: decoders and text encoders of quantized pipelines in engines; see
            :func:`ptqd.engines.export.export`.
        progress: show it.

    Returns:
        Those that can run, and for the others why not.

    Raises:
        InputError: an engine that is not known.
    """
    check_engines(engines or ())
    full = with_components(full, scheduler=plain_scheduler(next(iter(quantized.values())).scheduler))
    everything = {FULL: full, **quantized}
    makers = _Makers(folder, sampling, others, progress)
    size = disk_bytes(full)
    result = [Candidate(EAGER, FULL, makers.saved(FULL, full), size)]
    refused: dict[str, str] = {}
    for engine in KNOWN if engines is None else [name for name in KNOWN if name in engines]:
        if engine == EAGER:
            for name, pipe in quantized.items():
                size = disk_bytes(pipe)
                result.append(Candidate(SIMULATED, name, makers.saved(name, pipe), size))
        elif engine == COMPILED:
            result.append(Candidate(COMPILED, FULL, result[0].folder, result[0].bytes, compiled=True))
        else:
            for name, pipe in everything.items():
                try:
                    target = makers.exported(name, pipe, engine)
                except PtqdError as error:
                    refused[f"{engine} {name}"] = str(error)
                    continue
                files = [path for part in denoiser_names(pipe) for path in (target / part).iterdir()]
                size = sum(path.stat().st_size for path in files)
                result.append(Candidate(engine, name, target, size))
    return result, refused


def check_engines(engines: Sequence[str], repeats: int = REPEATS, threads: int = 0) -> None:
    """Refuse, before anything is loaded, what cannot be timed.

    Raises:
        InputError: an engine that is not known, or a number that is not positive.
    """
    unknown = set(engines) - set(KNOWN)
    if unknown:
        raise InputError(f"unknown engine {min(unknown)!r}; known are {', '.join(KNOWN)}")
    if not (1 <= repeats <= MOST and 0 <= threads <= MOST):
        raise InputError(f"repeats and threads must be positive, and below {MOST}; got {repeats} and {threads}")


class _Makers:
    """Pipelines in folders, each made once."""

    def __init__(self, folder: RunFolder, sampling: Sampling, others: Others, progress: bool) -> None:
        self.folder, self.run, self.others, self.progress = folder, sampling, others, progress
        self.first = ""  # the engine that graphs are traced for; others read the same

    def saved(self, name: str, pipe: DiffusionPipeline) -> Path:
        """A pipeline as it is."""
        inputs = {"pipeline": pipeline_fingerprint(pipe)}
        return self.folder.stage(
            f"engines/torch-{folder_name(name)}", inputs, lambda path, scratch: pipe.save_pretrained(path)
        )

    def exported(self, name: str, pipe: DiffusionPipeline, engine: str) -> Path:
        """A pipeline for an engine; the graph is traced once for all of them."""
        required(engine)
        self.first = self.first or engine
        others: Others = "fp32" if name == FULL else self.others
        setting = self.run.replace(samples=1, batch=1).to_dict()
        inputs = {"pipeline": pipeline_fingerprint(pipe), "setting": setting, "ptqd": version("ptqd")}
        inputs["others"] = others

        def trace(path: Path, scratch: Path) -> None:
            with busy(f"exporting {name}" if self.progress else None):
                export(pipe, self.run, self.first, path, others=others)

        traced = self.folder.stage(f"engines/{self.first}-{folder_name(name)}", inputs, trace)
        if engine == self.first:
            return traced
        return self.folder.stage(
            f"engines/{engine}-{folder_name(name)}", inputs, lambda path, _: for_engine(traced, engine, path)
        )


def run_benchmark(
    found: Sequence[Candidate],
    sampling: Sampling,
    *,
    repeats: int = REPEATS,
    threads: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[list[Timing], dict[str, str]]:
    """Sample one batch in each candidate, again and again, in turn.

    Args:
        found: the first is full precision, which the others' images are compared with.
        sampling: how they sample; its batch is what is timed.
        repeats: after a first one that is not counted.
        threads: of the CPU; as many as torch would take where it is 0.
        device: where pipelines run.
        progress: show it.

    Returns:
        What was measured, in the candidates' order; and for those that failed why.

    Raises:
        InputError: full precision cannot be timed, or a number that is not positive.
    """
    check_engines((), repeats, threads)
    sampling = sampling.replace(samples=sampling.batch)
    threads = threads or torch.get_num_threads()
    refused: dict[str, str] = {}
    seconds: dict[int, list[float]] = {}
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        workers: dict[int, _Worker] = {}
        for i, candidate in enumerate(track(found, "loading pipelines" if progress else None)):
            try:
                workers[i] = stack.enter_context(
                    _worker(candidate, sampling, threads, device, Path(temporary) / f"{i}.npy")
                )
                workers[i].ask("run")
            except InputError as error:
                refused[f"{candidate.engine} {candidate.precision}"] = str(error)
                workers.pop(i, None)
        for repeat in track(list(range(repeats)), "timing" if progress else None):
            order = sorted(workers, key=lambda i: (i + repeat) % len(found))
            for i in order:
                try:
                    seconds.setdefault(i, []).append(workers[i].ask("run")["seconds"] / sampling.batch)
                except InputError as error:
                    refused[f"{found[i].engine} {found[i].precision}"] = str(error)
                    del workers[i]
        ends = {i: worker.ask("end") for i, worker in workers.items()}
        images = {i: np.load(Path(temporary) / f"{i}.npy") for i in workers}
    if 0 not in workers:
        raise InputError(f"full precision in torch cannot be timed: {next(iter(refused.values()))}")
    timings = []
    for i in workers:
        psnr = None if not i else -10 * math.log10(max(float(np.square(images[i] - images[0]).mean()), TINY))
        timings.append(Timing(found[i], tuple(seconds[i]), ends[i]["peak"], psnr))
    return timings, refused


def time_engines(
    full: DiffusionPipeline,
    quantized: Mapping[str, DiffusionPipeline],
    sampling: Sampling,
    folder: Path,
    keep: Path | None = None,
    *,
    engines: Sequence[str] | None = None,
    others: Others = "fp32",
    repeats: int = REPEATS,
    threads: int = 0,
    device: str = "cpu",
) -> SpeedReport:
    """Time quantized pipelines in every engine, beside full precision, in turn.

    Args:
        full: the pipeline in full precision.
        quantized: pipelines by ptqd, by what their numbers are called.
        sampling: how all sample; its batch is what is timed.
        folder: a run folder, whose report keeps what is measured; or another.
        keep: of another folder: where exported pipelines are kept, for the next time.
        engines: as for :func:`candidates`.
        others: as for :func:`candidates`.
        repeats: as for :func:`run_benchmark`.
        threads: as for :func:`run_benchmark`.
        device: as for :func:`run_benchmark`.
    """
    is_run = (folder / REPORT).is_file()
    with TemporaryDirectory() as temporary:
        remaining = RunFolder(folder) if is_run else RunFolder(keep or Path(temporary), "engines")
        result, refused = candidates(full, quantized, sampling, remaining, engines, others=others, progress=True)
        timings, failed = run_benchmark(
            result, sampling, repeats=repeats, threads=threads, device=device, progress=True
        )
    speed = speed_report(timings, refused | failed, sampling, threads, device)
    if is_run:
        report = Report.load(folder)
        report.speed = speed
        report.save(folder)
    return speed


def speed_report(
    timings: Sequence[Timing], without: Mapping[str, str], sampling: Sampling, threads: int, device: str
) -> SpeedReport:
    """What was measured, with ratios: how many times as fast as torch and as the fastest, both in full precision."""
    first = timings[0]
    fastest = min(timing.median for timing in timings if timing.candidate.precision == FULL)
    rows = tuple(
        SpeedRow(
            engine=timing.candidate.engine,
            precision=timing.candidate.precision,
            seconds=timing.median,
            all_seconds=timing.seconds,
            of_torch=first.median / timing.median,
            of_fastest=fastest / timing.median,
            peak=timing.peak,
            bytes=timing.candidate.bytes,
            bytes_of_full=timing.candidate.bytes / first.candidate.bytes,
            psnr=timing.psnr,
        )
        for timing in timings
    )
    shown = f"{threads or torch.get_num_threads()} threads" if device == "cpu" else device
    title = f"the whole pipeline, {sampling.steps} steps, batch {sampling.batch}, {shown}, {processor_name()}"
    return SpeedReport(title, rows, dict(without))


class _Worker:
    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        self.process, self.name = process, name

    def ask(self, what: str | Mapping[str, object]) -> dict[str, Any]:
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
def _worker(candidate: Candidate, sampling: Sampling, threads: int, device: str, images: Path) -> Iterator[_Worker]:
    """A process with a candidate's pipeline."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "ptqd.experiments.benchmark_worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        worker = _Worker(process, f"{candidate.engine} {candidate.precision}")
        try:
            worker.ask(
                {
                    "folder": str(candidate.folder),
                    "compiled": candidate.compiled,
                    "threads": threads,
                    "device": device,
                    "run": sampling.to_dict(),
                    "images": str(images),
                }
            )
            yield worker
        finally:
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # it may have ended already
                    process.stdin.close()
            try:
                process.wait(timeout=10)  # it removes its temporary files
            except subprocess.TimeoutExpired:
                process.kill()
