"""``ptqd demo``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from ptqd_cli.options import Device, JudgeOptions, load_pipeline

SIZE = Group("Size")
ENGINES = ("onnxruntime", "openvino")


@Parameter(name="*")
@dataclass(frozen=True)
class Demo:
    """The main job on the embedded fashion-ldm, in the paper's two settings."""

    _: KW_ONLY
    quick: Annotated[bool, Parameter(group=SIZE, help="one recipe, within 2 minutes on two cores")] = False
    full: Annotated[bool, Parameter(group=SIZE, help="5,000 samples a row; hours")] = False
    samples: Annotated[int | None, Parameter(help="samples a row instead of the size's")] = None
    recipe: Annotated[tuple[str, ...], Parameter(help="recipe instead of the size's; may be given again")] = ()
    stochastic_steps: Annotated[int | None, Parameter(help="steps of the setting with eta 1 instead of the size's")] = (
        None
    )
    out: Annotated[Path, Parameter(help="run folder")] = Path("ptqd-demo")
    wide: Annotated[bool, Parameter(help="print every metric and cost")] = False
    device: Device = None

    def run(self) -> None:
        """Run the demo's experiment, time it in engines, and show the report."""
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.benchmark import time_engines
        from ptqd.experiments.demo import SIZES, demo
        from ptqd.experiments.experiment import pipeline_of
        from ptqd.experiments.manifest import run_with_manifest
        from ptqd.experiments.results import select_rows
        from ptqd.loading import check_device
        from ptqd.outputs import claim
        from ptqd_cli.show_report import show_report

        check_device(self.device)
        if processes.is_main():
            claim(self.out, "run")
        if self.quick and self.full:
            raise InputError("--quick and --full are two sizes; give one of them")
        size = SIZES["quick" if self.quick else "full" if self.full else "standard"]
        changes = {
            "samples": self.samples,
            "stochastic_steps": self.stochastic_steps,
            "recipes": self.recipe or None,
        }
        size = size | {name: value for name, value in changes.items() if value is not None}
        demo(**size).check()
        pipe = load_pipeline("fashion-ldm", None, self.device)
        judge = JudgeOptions().load("fashion", self.device)
        first = size | {"recipes": size["recipes"][:1]}
        for part in (first, size) if len(size["recipes"]) > 1 else (size,):  # finished stages are kept
            report, _ = run_with_manifest(pipe, demo(**part), self.out, judge)
            if processes.is_main():
                show_report(report, self.out, wide=self.wide)
        if not self.quick and processes.is_main():
            rows = select_rows(report, self.out, None)
            pipes = {row.key.quantized: pipeline_of(self.out, row) for row in rows}
            run = rows[-1].as_sampled().replace(batch=32)
            report.speed = time_engines(pipe, pipes, run, self.out, engines=ENGINES, repeats=3, device=pipe.device.type)
            show_report(report, self.out, wide=self.wide)
