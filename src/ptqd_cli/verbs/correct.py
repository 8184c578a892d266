"""``ptqd correct``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ptqd_cli.options import (
    METHODS_HELP,
    Device,
    Dtype,
    Offload,
    call_arguments,
    correction_methods,
    load_pipeline,
    tell,
)

if TYPE_CHECKING:
    from ptqd.noise.stats import NoiseStats
    from ptqd.outputs import OutputFolder


CALL_HELP = "for auto and trajectory: NAME=JSON, as measured; may be given again"


@Parameter(name="*")
@dataclass(frozen=True)
class Correct:
    """Give a quantized pipeline a scheduler that corrects, and save it."""

    quantized: Annotated[str, Parameter(help="the quantized pipeline's folder")]
    noise: Annotated[Path, Parameter(help="statistics that 'ptqd measure' wrote")]
    _: KW_ONLY
    methods: Annotated[str, Parameter(help=METHODS_HELP)] = "auto"
    out: Annotated[Path, Parameter(help="folder to write")]
    steps: Annotated[int | None, Parameter(help="of other than were measured: the statistics are interpolated")] = None
    scheduler: Annotated[str | None, Parameter(help="the scheduler class the statistics were measured with")] = None
    batch: Annotated[int, Parameter(help="for auto and trajectory: at once")] = 64
    seed: Annotated[int, Parameter(help="for auto and trajectory: as measured")] = 0
    call: Annotated[tuple[str, ...], Parameter(help=CALL_HELP)] = ()
    shared: Annotated[tuple[str, ...], Parameter(help=CALL_HELP)] = ()
    device: Device = None
    offload: Offload = False
    dtype: Dtype = None

    def run(self) -> None:
        """Correct, and save."""
        from ptqd.diffusion.sampling import Sampling
        from ptqd.errors import InputError
        from ptqd.loading import check_device, scheduler_class
        from ptqd.noise.stats import NoiseStats
        from ptqd.outputs import output_folder

        methods, given = correction_methods(self.methods), call_arguments(self.call)
        shared = call_arguments(self.shared, "--shared")
        Sampling(self.steps or 1, batch=self.batch, seed=self.seed, call=given, shared=shared)
        scheduler_class(self.scheduler)
        check_device(self.device, offload=self.offload)
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps must be at least 1; got {self.steps}")
        with output_folder(self.out, [self.quantized, self.noise]) as out:
            self._correct(out, methods, NoiseStats.load(self.noise), given)

    def _correct(
        self, out: "OutputFolder", methods: tuple[str, ...], stats: "NoiseStats", given: dict[str, Any]
    ) -> None:
        from ptqd import processes
        from ptqd.correction.scheduler import apply_correction
        from ptqd.correction.search import describe, fit_along_runs, search_correction
        from ptqd.diffusion.sampling import Sampling, default_call
        from ptqd.errors import InputError
        from ptqd.experiments.experiment import AUTO, by_runs

        measured = stats.measured_on
        runs = by_runs(methods)
        if runs and self.steps not in (None, measured.steps):
            raise InputError(
                f"{','.join(methods)} runs the {measured.steps} steps that were measured; name other methods"
            )
        quantized = load_pipeline(self.quantized, self.scheduler, self.device, self.dtype, offload=self.offload)
        if runs:
            guidance = measured.call.get("guidance_scale")
            call = default_call(quantized) | ({} if guidance is None else {"guidance_scale": guidance})
            call |= given
            shared = call_arguments(self.shared, "--shared")
            run = Sampling(measured.steps, measured.eta, stats.samples, self.batch, self.seed, call, shared)
            with processes.together():
                if methods == AUTO:
                    choice = search_correction(quantized, stats, run, progress=True)
                else:
                    choice = fit_along_runs(quantized, stats, run, methods)
            if methods == AUTO and processes.is_main():
                tell("\n".join(describe(choice.trials)))
            if measured.steps == 1 and processes.is_main():
                tell("with one step, a correction is a filter of the finished sample, and mends what all samples share")
            corrected = apply_correction(quantized, choice.correction)
        else:
            corrected = apply_correction(quantized, stats, methods, steps=self.steps)
        if not processes.is_main():
            return
        with out.replacing() as temporary:
            corrected.save_pretrained(temporary)
        tell(f"{self.out}: corrects {','.join(corrected.scheduler.correction.methods) or 'nothing'}")
