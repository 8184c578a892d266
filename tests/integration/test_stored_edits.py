"""One edit of any stored file ends in a result or in one line that names the file; nothing else is raised."""

import contextlib
import copy
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import tiny_pipeline
from ptqd import InputError, NoiseStats, PrecisionPlan, Recipe
from ptqd.correction.correction import Correction
from ptqd.correction.search import CorrectionSearch
from ptqd.engines.module import EngineFacts
from ptqd.errors import PtqdError
from ptqd.experiments import Manifest, Report
from ptqd.experiments.report.page import summary
from ptqd.experiments.report.table import markdown_table, terminal_table
from ptqd.experiments.results import Interval, PlanFigures
from ptqd.experiments.study import Study
from ptqd.files import read_json, read_tensors, write_json
from ptqd.noise.measured_on import MeasuredOn
from ptqd.outputs import Mark
from ptqd.quantization.step_ranges import StepRanges
from ptqd.run_folder import read_record
from ptqd.schema import read_as
from ptqd_cli.main import main

REPOSITORY = Path(__file__).parent.parent.parent
STORED = REPOSITORY / "tests" / "data" / "stored"
FACTS = {
    "format": 1, "engine": "onnxruntime", "provider": "cpu", "component": "diffusers.models.UNet2DModel",
    "method": "forward", "parameters": ["sample", "timestep"], "outputs": ["sample"], "returns": "tuple",
    "inputs": {"sample": {"shape": [None, 1, 8, 8], "dtype": "float32"}}, "constants": {"return_dict": False},
    "codes": ["a.input"], "as_they_come": [], "elements": 64, "integer": ["a"], "floating": {"b": "why"},
    "ranges": {"a.input": {"bits": 8, "symmetric": False, "dynamic": False, "widths": [8], "ranges": 1}},
    "quantized": ["a"], "skipped": [["b", "why"]], "simulated_by": "0", "sha256": "0", "versions": {"torch": "2"},
}  # fmt: skip


def deep(depth: int = 2000) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, 0.5, "", "x", "../../victim", "a/b", "\x1b[31m", [], {}, [[]], [None],
    ["x", 1], {"x": {"y": [1, 2]}}, "1" * 5000, deep(20),
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain values, of long lists the first and the last alone."""
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    else:
        items = [(0, value[0]), (-1, value[-1])] if isinstance(value, list) and value else []
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def edited(value: Any, place: tuple[Any, ...], what: Any) -> Any:
    """A copy with one place deleted (of ``"delete"``), doubled (of ``"double"``) or something else."""
    result = copy.deepcopy(value)
    holder = result
    for key in place[:-1]:
        holder = holder[key]
    if what == "delete":
        del holder[place[-1]]
    elif what == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[place[-1]]))
    elif what == "double":
        holder[f"{place[-1]}2"] = copy.deepcopy(holder[place[-1]])
    else:
        holder[place[-1]] = what
    return result


def rendered(report: Report) -> None:
    terminal_table(report.rows)
    markdown_table(report.rows)
    summary(report.rows)


def read_report(folder: Path) -> None:
    rendered(Report.load(folder))


def correction_of(folder: Path) -> None:
    Correction.from_dict(read_json(folder / "x.json")).corrector()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("edits")
    tiny_pipeline().save_pretrained(folder / "model")
    quick = 'calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n[activations]\nrange = "minmax"\n'
    (folder / "small.toml").write_text(f"{quick}symmetric = false\n")
    command = ["run", str(folder / "model"), "--recipe", str(folder / "small.toml"), "--steps", "2", "--samples", "8"]
    assert main([*command, "--batch", "4", "--measured", "16", "--guidance", "2", "--out", str(folder / "run")]) == 0
    return folder / "run"


def stored(kind: str, run: Path) -> tuple[Any, str, Callable[[Path], object]]:
    """Plain values of a kind of file, its name, and what reads it in a folder."""
    (root,) = run.glob("ddim*")
    recipe = Recipe.parse("w4a4+8-best").to_dict()
    correction = read_json(root / "small" / "auto.json")
    kinds: dict[str, tuple[Any, str, Callable[[Path], object]]] = {
        "manifest": (read_json(run / "manifest.json"), "manifest.json", Manifest.load),
        "report": (read_json(run / "report.json"), "report.json", read_report),
        "report 1": (read_json(STORED / "report.json"), "report.json", read_report),
        "record": (
            read_json(next(run.glob(".stages/*/small/quantized.json"))),
            ".stages/x.json",
            lambda folder: read_record(folder, "x"),
        ),
        "search": (correction, "x.json", lambda folder: CorrectionSearch.load(folder / "x.json")),
        "correction": (correction["correction"], "x.json", correction_of),
        "measured": (
            correction["correction"]["source"],
            "x.json",
            lambda folder: MeasuredOn.from_dict(read_json(folder / "x.json")),
        ),
        "metrics": (
            read_json(next(run.glob("ddim*/small/none/metrics.json"))),
            "x.json",
            lambda folder: read_as(folder / "x.json", dict[str, Interval]),
        ),
        "recipe": (recipe, "x.json", lambda folder: Recipe.from_dict(read_json(folder / "x.json"))),
        "plan": (
            PrecisionPlan((3.0, 1.0), ((4,), (8,))).to_dict(),
            "x.json",
            lambda folder: PrecisionPlan.from_dict(read_json(folder / "x.json")),
        ),
        "plan figures": (
            {k: v for k, v in FIGURES.items() if k not in ("settings", "recipe", "pictures")},
            "x.json",
            lambda folder: PlanFigures.load(folder / "x.json"),
        ),
        "ranges": (
            StepRanges((3.0, 1.0), (0, 1), ("a",)).to_dict(),
            "x.json",
            lambda folder: StepRanges.from_dict(read_json(folder / "x.json")),
        ),
        "engine": (FACTS, "engine.json", EngineFacts.load),
        "mark": (msgspec.to_builtins(Mark("run", ("a",))), ".ptqd.json", Mark.load),
        "study": (
            tomllib.loads(next((REPOSITORY / "reproduce").glob("*.toml")).read_text()),
            "x.json",
            lambda folder: Study.from_dict(read_json(folder / "x.json"), "x"),
        ),
    }
    return kinds[kind]


FIGURES: dict[str, Any] = {
    "made": {"rule": "auto"}, "timesteps": [3.0, 1.0], "widths": [4, 8], "snr": {"4": [1.0, None], "8": [2.0, 3.0]},
    "forward_snr": [1.0, 2.0], "groups": ["all"], "bits": [[4], [8]], "weights": {}, "share": [0.5, 0.5], "ratio": 20.0,
    "pareto": [{"ratio": 20.0, "db": None, "bits": None}], "uniform": [], "paper": None,
}  # fmt: skip
KINDS = ["manifest", "report", "report 1", "record", "search", "correction", "measured", "metrics", "recipe", "plan"]
KINDS += ["plan figures", "ranges", "engine", "mark", "study"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_edit_is_read_or_refused(kind: str, run_folder: Path, tmp_path: Path) -> None:
    values, name, read = stored(kind, run_folder)
    everywhere = list(places(values))
    path = tmp_path / name
    write_json(path, values)
    read(tmp_path)  # as it is

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(everywhere), st.sampled_from(["delete", "double", *HOSTILE]))
    def check(place: tuple[Any, ...], what: Any) -> None:
        path.write_text(json.dumps(edited(values, place, what)))
        with contextlib.suppress(PtqdError):
            read(tmp_path)

    check()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "NaN", "[1e999]", '"x"', "[" * 100_000, "1" * 10_000, "\xff", '{"a": NaN}']
)
def test_what_is_no_json_is_refused(text: str, run_folder: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        _, name, read = stored(kind, run_folder)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
        if kind in ("record", "metrics"):
            continue  # a record that cannot be read is one that is not there
        with pytest.raises(PtqdError):
            read(tmp_path)


def test_every_edit_of_statistics_is_refused(run_folder: Path, tmp_path: Path) -> None:
    source = next(run_folder.glob("ddim*/small/noise.safetensors"))
    tensors, metadata = read_tensors(source)
    path = tmp_path / "noise.safetensors"
    for name, tensor in load_file(source).items():
        for other in (None, tensor[:0], tensor[..., None], torch.cat([tensor, tensor]), tensor.to(torch.uint8)):
            changed = {k: v for k, v in tensors.items() if k != name}
            if other is not None:
                changed[name] = other.contiguous()
            save_file(changed, path, metadata)
            if name == "finals" and other is not None and other.is_floating_point() and len(other) == len(tensor):
                continue  # samples may have any shape
            if name == "paths" and (other is None or (other.is_floating_point() and len(other) <= len(tensor))):
                continue  # and there may be no trajectories
            with pytest.raises(InputError):
                NoiseStats.load(path)
        if tensor.is_floating_point() and tensor.numel():
            save_file({**tensors, name: torch.full_like(tensor, float("nan"))}, path, metadata)
            if name not in ("finals", "paths"):
                with pytest.raises(InputError):
                    NoiseStats.load(path)
    facts = json.loads(metadata["ptqd.noise"])
    for place in places(facts):
        if "config" in place or "call" in place or "keywords" in place:
            continue
        for what in ("delete", *HOSTILE):
            save_file(tensors, path, {"ptqd.noise": json.dumps(edited(facts, place, what))})
            with contextlib.suppress(PtqdError):
                NoiseStats.load(path).fit()
    for text in ("", "[]", "{", "null"):
        save_file(tensors, path, {"ptqd.noise": text})
        with pytest.raises(InputError):
            NoiseStats.load(path)


@pytest.mark.parametrize("labels", [10**30, ["x"], [[], [1]], None])
def test_class_labels_that_are_no_numbers_are_refused(pipe: Any, labels: Any) -> None:
    with pytest.raises(InputError, match="class_labels must be at least one number"):
        pipe(class_labels=labels, num_inference_steps=1)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_the_verbs_say_it_in_one_line(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Through the command line: status 0, 1 or 2, and with 2 one line."""
    folder = tmp_path_factory.mktemp("verbs")
    values = read_json(run_folder / "manifest.json")
    place = data.draw(st.sampled_from([p for p in places(values) if p[0] not in ("packages", "hardware")]))
    (folder / "m.json").write_text(json.dumps(edited(values, place, data.draw(st.sampled_from(HOSTILE)))))
    said = folder / "said"
    command = ["reproduce", str(folder / "m.json"), "--model", str(run_folder.parent / "model")]
    with said.open("w") as stream, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", stream)
        status = main([*command, "--out", str(folder / "out")])
    lines = [line for line in said.read_text().splitlines() if line.startswith("ptqd: ")]
    assert status in (0, 1, 2)
    assert status != 2 or (len(lines) == 1 and "a bug in ptqd" not in lines[0]), said.read_text()
    assert sorted(p.name for p in folder.iterdir()) in (["m.json", "said"], ["m.json", "out", "said"])
