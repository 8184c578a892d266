"""What a result was made of, and whether it comes out again."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import ptqd
from ptqd import processes
from ptqd.diffusion.fingerprints import pipeline_fingerprint
from ptqd.diffusion.pipeline_parts import scheduler_of
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.experiments.experiment import PACKAGES, Experiment, run_experiment
from ptqd.experiments.plan_request import PlanRequest
from ptqd.experiments.results import Report, SamplerSettings
from ptqd.files import read_json, write_json
from ptqd.metrics.evaluator import Evaluator
from ptqd.quantization.recipe import Recipe

FORMAT = 1


def run_with_manifest(
    pipe: DiffusionPipeline, experiment: Experiment, folder: Path, judge: Evaluator | None, *, progress: bool = True
) -> tuple[Report, dict[str, Any]]:
    """Run an experiment, and write ``manifest.json`` beside its report: all that its figures follow from.

    Returns:
        The report, and the manifest: hashes of the weights, the code and the measured statistics; recipes, settings
        with their seeds, the scheduler's configuration, packages, hardware; and the figures.
    """
    if processes.is_main():
        (folder / "manifest.json").unlink(missing_ok=True)  # until there are figures again
    report = run_experiment(pipe, experiment, folder, judge, progress=progress)
    scheduler: Any = scheduler_of(pipe)
    manifest = {
        "format": FORMAT,
        "model": experiment.model,
        "weights": pipeline_fingerprint(pipe),
        "scheduler": {"class": type(scheduler).__name__, "config": dict(scheduler.config)},
        "settings": [_setting_facts(setting) for setting in experiment.settings],
        "recipes": {label: recipe.to_dict() for label, recipe in experiment.recipes.items()},
        "measured": experiment.measured,
        "corrections": [list(methods) for methods in experiment.corrections],
        "plan": None if experiment.plan is None else experiment.plan.to_dict(),
        "images": experiment.images,
        "judge": None if judge is None else {"name": judge.name, "key": judge.key, "options": dict(judge.options)},
        "statistics": {
            name: sha256((folder / name).read_bytes()).hexdigest()
            for name in sorted(report.stages)
            if name.endswith("noise.safetensors")
        },
        "code": code_hash(),
        "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": hardware(pipe.device),
        "figures": [
            {
                "setting": asdict(row.settings),
                "recipe": row.key.quantized,
                "correction": row.key.correction,
                "samples": row.samples,
                "metrics": {name: asdict(metric) for name, metric in row.metrics.items()},
            }
            for row in report.rows
        ],
    }
    if processes.is_main():
        write_json(folder / "manifest.json", manifest)
    return report, manifest


def code_hash() -> str:
    """A hash of the package's source files."""
    root = Path(ptqd.__file__).parent
    result = sha256()
    for path in sorted(root.rglob("*.py")):
        result.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return result.hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """What it runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {
        "device": device.type,
        "name": name,
        "threads": threads,
        "processes": processes.count(),
        "system": platform.system(),
    }


@dataclass(frozen=True)
class Figure:
    """One figure, as it was and as it came out again."""

    row: str
    metric: str
    value: float
    low: float | None
    high: float | None
    again: float

    @property
    def agrees(self) -> bool:
        """Whether it came out again within its interval; without one, exactly."""
        if self.low is None or self.high is None:
            return self.again == self.value
        return self.low <= self.again <= self.high

    @property
    def verdict(self) -> str:
        """In words."""
        return "the same" if self.again == self.value else "agrees" if self.agrees else "DIFFERS"


@dataclass(frozen=True)
class Reproduction:
    """A manifest's figures, run again.

    Attributes:
        figures: each metric of each row.
        changed: what is not as it was, in words: packages, code, hardware.
    """

    figures: tuple[Figure, ...]
    changed: tuple[str, ...]


def load_manifest(path: Path) -> dict[str, Any]:
    """A manifest, from its file or its run folder.

    Raises:
        InputError: it is missing, something else, or of another format.
    """
    path = path / "manifest.json" if path.is_dir() else path
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "figures" not in manifest:
        raise InputError(f"{path} is no manifest; 'ptqd run' writes one into its run folder")
    if manifest["format"] != FORMAT:
        raise InputError(f"{path} is a manifest of format {manifest['format']}; this ptqd reads {FORMAT}")
    return manifest


def reproduce(
    manifest: Mapping[str, Any],
    pipe: DiffusionPipeline,
    folder: Path,
    judge: Evaluator | None,
    *,
    progress: bool = True,
) -> Reproduction:
    """Run a manifest's experiment again and hold its figures against those that are written there.

    Args:
        manifest: by :func:`load_manifest`.
        pipe: the pipeline it names.
        folder: a run folder of its own.
        judge: what it was judged by.
        progress: show bars.

    Raises:
        InputError: other weights, another scheduler or another judge than the manifest's.
    """
    scheduler: Any = scheduler_of(pipe)
    made_with = manifest["scheduler"]["class"]
    _same("scheduler", type(scheduler).__name__, made_with, f"run it with --scheduler {made_with}")
    _same("weights", pipeline_fingerprint(pipe), manifest["weights"], "load the pipeline that it was made with")
    required = manifest["judge"] and manifest["judge"]["key"]
    _same("judge", judge and judge.key, required, "judge by what it was judged by")
    plan = manifest["plan"]
    experiment = Experiment(
        model=manifest["model"],
        settings=tuple(map(_setting, manifest["settings"])),
        recipes={label: Recipe.from_dict(values) for label, values in manifest["recipes"].items()},
        measured=manifest["measured"],
        corrections=tuple(tuple(methods) for methods in manifest["corrections"]),
        plan=None if plan is None else PlanRequest.from_dict(plan),
        images=manifest.get("images", True),
    )
    _, again = run_with_manifest(pipe, experiment, folder, judge, progress=progress)
    figures = []
    for before, after in zip(manifest["figures"], again["figures"], strict=True):
        settings = SamplerSettings(**before["setting"])
        how = f"{settings.scheduler}, {settings.steps} steps, eta {settings.eta:g}"
        row = f"{how}: {before['recipe']} {before['correction']}"
        for name, metric in before["metrics"].items():
            values = (metric["value"], metric["low"], metric["high"], after["metrics"][name]["value"])
            figures.append(Figure(row, name, *values))
    return Reproduction(tuple(figures), tuple(_changes(manifest, again)))


def _setting_facts(sampling: Sampling) -> dict[str, Any]:
    """A setting in JSON: which arguments are one value for all samples, and which it cannot hold, stand beside."""
    opaque = [name for name, value in sampling.call.items() if not _is_plain(value)]
    return {
        "run": sampling.to_dict(),
        "shared": [n for n, v in sampling.call.items() if isinstance(v, tuple)],
        "opaque": opaque,
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)


def _setting(facts: Mapping[str, Any]) -> Sampling:
    if facts["opaque"]:
        raise InputError(
            f"the manifest cannot hold {', '.join(facts['opaque'])}, which is no number or text; run "
            "ptqd.experiments.experiment.run_experiment with the same arguments instead"
        )
    call = {name: tuple(v) if name in facts["shared"] else v for name, v in facts["run"]["call"].items()}
    return Sampling(**{**facts["run"], "call": call})


def _same(what: str, found: object, wanted: object, remedy: str) -> None:
    if found != wanted:
        raise InputError(f"{what}: {found} instead of the manifest's {wanted}; {remedy}")


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    result = [
        f"{name} {after['packages'].get(name)} instead of {value}"
        for name, value in before["packages"].items()
        if after["packages"].get(name) != value
    ]
    result += [
        f"{name} {after['hardware'][name]} instead of {value}"
        for name, value in before["hardware"].items()
        if after["hardware"][name] != value
    ]
    if before["code"] != after["code"]:
        result.append("other source code of ptqd")
    return result
