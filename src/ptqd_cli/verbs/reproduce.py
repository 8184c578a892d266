"""``ptqd reproduce``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, Device, Dtype, JudgeOptions, Offload, consent, load_pipeline, show, tell


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
    fetch: Annotated[
        bool, Parameter(help="fetch models and datasets that the manifest names from the hub without asking")
    ] = False
    judging: JudgeOptions = JudgeOptions()
    device: Device = None
    offload: Offload = False
    dtype: Dtype = None

    def run(self) -> int:
        """Run again; 1 where a figure differs."""
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.manifest import Manifest, reproduce
        from ptqd.experiments.report.reproduction import reproduction_table
        from ptqd.loading import check_device, scheduler_class
        from ptqd.outputs import check_output, claim

        scheduler_class(self.scheduler)
        check_device(self.device, offload=self.offload)
        manifest = Manifest.load(self.manifest)
        if self.out.resolve() in (self.manifest.resolve(), self.manifest.resolve().parent):
            raise InputError(f"{self.out} holds the manifest's own results; choose another folder for --out")
        check_output(self.out, [self.manifest, self.model, self.judging.reference])
        if processes.is_main():
            claim(self.out, "run")
        options = {} if manifest.judge is None else manifest.judge.options
        self._consent(manifest.model, options)
        reference = options.get("reference")
        judging = dataclasses.replace(
            self.judging,
            reference=self.judging.reference or (None if reference is None else Path(reference)),
            lpips=self.judging.lpips if self.judging.lpips is not None else options.get("lpips"),
            clip=self.judging.clip or options.get("clip"),
        )
        default = options.get("judge") or ("fashion" if manifest.judge else "none")
        judge = judging.load(default, self.device)
        pipe = load_pipeline(
            self.model or manifest.model, self.scheduler, self.device, self.dtype, offload=self.offload
        )
        result = reproduce(manifest, pipe, self.out, judge)
        if not processes.is_main():
            return 0
        show(reproduction_table(result), width=160)
        tell("".join(f"  changed: {change}\n" for change in result.changed), end="")
        differing = sum(not figure.agrees for figure in result.figures)
        tell(f"{len(result.figures) - differing} of {len(result.figures)} figures agree within their intervals")
        return 1 if differing else 0

    def _consent(self, model: str, judged_by: Mapping[str, str | None]) -> None:
        """Ask before anything is fetched that the manifest names, and not the command.

        Raises:
            InputError: it may not be, or nobody is there to be asked.
        """
        names = [None if self.model is not None else model]
        for option in ("judge", "reference", "lpips", "clip"):
            value = judged_by.get(option)
            given = getattr(self.judging, option) is not None
            names.append(None if given else value)
        consent(str(self.manifest), names, "--model, --judge, --reference, --lpips or --clip", fetch=self.fetch)
