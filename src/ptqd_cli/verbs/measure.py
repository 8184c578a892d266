"""``ptqd measure``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, SamplingOptions, tell, work_key


@Parameter(name="*")
@dataclass(frozen=True)
class Measure:
    """Measure, step by step, what quantization did to a pipeline's denoiser; resumes after a kill."""

    model: Annotated[str, Parameter(help=MODEL_HELP)]
    quantized: Annotated[str, Parameter(help="the quantized pipeline's folder")]
    _: KW_ONLY
    out: Annotated[Path, Parameter(help="statistics to write (.safetensors)")]
    samples: Annotated[int, Parameter(help="how many")] = 64
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Measure, and print what was found at each step."""
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.sharding import measure_shards
        from ptqd.files import is_stream
        from ptqd.outputs import alone_with, check_file, check_output, is_tensors_of, remove_scratch, scratch_folder

        self.sampling.check_all(self.samples)
        if self.samples < 2:
            raise InputError("statistics of 1 sample have no interval; give --samples 2 or more")
        if is_stream(self.out):
            raise InputError(f"{self.out} is no file; give one for the statistics")
        check_output(self.out, [self.model, self.quantized])
        check_file(self.out, is_tensors_of("ptqd.noise"), "statistics")
        with alone_with(self.out):
            pipe, quantized = self.sampling.load_both(self.model, self.quantized)
            run = self.sampling.of(pipe, self.samples)
            scratch = scratch_folder(self.out, work_key(pipe, quantized, run))
            stats = measure_shards(pipe, quantized, run, self.out, scratch, title="measuring")
            if stats is None or not processes.is_main():
                return
            remove_scratch(scratch)
        fit, repeated = stats.fit(), stats.residual_correlation()
        tell(f"{self.out}: {stats.samples} samples, {len(stats.timesteps)} steps")
        for i, t in enumerate(stats.timesteps.tolist()):
            tell(
                f"  t {t:5.0f}  k {fit.k.value[i]:+.4f} [{fit.k.low[i]:+.4f}, {fit.k.high[i]:+.4f}]"
                f"  R2 {fit.r2.value[i]:.3f}  "
                f"residual variance {fit.variance.value[i]:.2e}  SNR {fit.snr.value[i]:.1f}  "
                f"kurtosis {fit.kurtosis.value[i]:+.1f}" + (f"  repeats {repeated[i, i - 1]:.2f}" if i else "")
            )
