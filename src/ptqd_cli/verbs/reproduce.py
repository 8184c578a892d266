"""``ptqd reproduce``."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, Device, JudgeOptions, load_pipeline, show


@Parameter(name="*")
@dataclass(frozen=True)
class Reproduce:
    """Run what a manifest says again, and say of every figure whether it agrees within its interval."""

    manifest: Annotated[Path, Parameter(help="manifest.json that 'ptqd run' wrote, or its run folder")]
    _: KW_ONLY
    model: Annotated[str | None, Parameter(help=f"where the pipeline is now: {MODEL_HELP} (default: where it was)")] = (
        None
    )
    out: Annotated[Path, Parameter(help="run folder")]
    scheduler: Annotated[str | None, Parameter(help="of diffusers, as the run had it")] = None
    judging: JudgeOptions = JudgeOptions()
    device: Device = None

    def run(self) -> int:
        """Run again; 1 where a figure differs."""
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.manifest import load_manifest, reproduce
        from ptqd.experiments.report.reproduction import reproduction_table

        manifest = load_manifest(self.manifest)
        if self.out.resolve() in (self.manifest.resolve(), self.manifest.resolve().parent):
            raise InputError(f"{self.out} holds the manifest's own results; choose another folder for --out")
        options = (manifest["judge"] or {}).get("options", {})
        reference = options.get("reference")
        judging = dataclasses.replace(
            self.judging,
            reference=self.judging.reference or (None if reference is None else Path(reference)),
            lpips=self.judging.lpips if self.judging.lpips is not None else options.get("lpips"),
            clip=self.judging.clip or options.get("clip"),
        )
        pipe = load_pipeline(self.model or manifest["model"], self.scheduler, self.device)
        default = options.get("judge") or ("fashion" if manifest["judge"] else "none")
        result = reproduce(manifest, pipe, self.out, judging.load(default, self.device))
        if not processes.is_main():
            return 0
        show(reproduction_table(result), width=160)
        print("".join(f"  changed: {change}\n" for change in result.changed), end="")
        differing = sum(not figure.agrees for figure in result.figures)
        print(f"{len(result.figures) - differing} of {len(result.figures)} figures agree within their intervals")
        return 1 if differing else 0
