"""``ptqd export``."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ptqd_cli.options import Others, SamplingOptions, tell
from ptqd_cli.quantized_rows import QuantizedRows, quantized_rows

SAMPLES = 64


@Parameter(name="*")
@dataclass(frozen=True)
class Export:
    """Write a quantized pipeline for an engine that multiplies integers, or a file for other programs."""

    folder: Annotated[Path, Parameter(name="run", help="run folder, or a quantized pipeline's folder")]
    _: KW_ONLY
    row: Annotated[
        str | None, Parameter(help="of a run folder: recipe and correction, 'w4a8 auto' (default: the last row)")
    ] = None
    to: Annotated[
        Literal["comfy", "gguf"] | None,
        Parameter(help="write a file: ComfyUI's quantized .safetensors, or a .gguf; instead of an engine's folder"),
    ] = None
    engine: Annotated[
        str, Parameter(help="onnxruntime, openvino or torchao; 'ptqd sample' and ptqd.load run what is written")
    ] = "onnxruntime"
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"], Parameter(help="of onnxruntime")] = "cpu"
    layout: Annotated[Literal["int8", "int4"], Parameter(help="of torchao's weights")] = "int8"
    others: Others = "fp32"
    hold_deep: Annotated[
        bool, Parameter(help="also the outer blocks alone, for plans that are applied later and hold the deep part")
    ] = False
    out: Annotated[Path, Parameter(help="folder to write; with --to a file")]
    samples: Annotated[int, Parameter(help="how many")] = SAMPLES
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Export, and say what multiplies integers."""
        from ptqd.engines.export import check_engine, export
        from ptqd.errors import InputError
        from ptqd.outputs import check_output, claim

        self.sampling.check_all(self.samples)
        if self.to is not None:
            self._write_file()
            return
        if self.layout != "int8" and self.engine != "torchao":
            raise InputError(f"--layout is of torchao's weights; leave it out for {self.engine}")
        check_engine(self.engine, self.provider, self.others)
        check_output(self.out, [self.folder])
        claim(self.out, "pipeline")
        rows = self._rows(replace(self.sampling, dtype=self.sampling.dtype or "float32"))  # which engines take
        *_, pipe = rows.pipes.values()
        exported = export(
            pipe,
            rows.sampling,
            self.engine,
            self.out,
            others=self.others,
            provider=self.provider,
            layout=self.layout,
            hold_deep=self.hold_deep,
        )
        products = exported.products
        tell(f"{self.out}: {', '.join(exported.components)} for {self.engine}")
        tell(f"  products of integers: {len(products.integer)}; in floating point: {len(products.floating)}")
        tell("".join(f"  in floating point: {name} ({reason})\n" for name, reason in products.floating), end="")

    def _rows(self, sampling: SamplingOptions) -> QuantizedRows:
        return quantized_rows(self.folder, None if self.row is None else [self.row], sampling, self.samples)

    def _write_file(self) -> None:
        """Write the denoiser as a file, and say what it does not hold."""
        from ptqd.engines.checkpoints import check_file_format, export_checkpoint
        from ptqd.errors import InputError
        from ptqd.outputs import check_output

        assert self.to is not None
        given = [self.engine != "onnxruntime", self.provider != "cpu", self.layout != "int8", self.others != "fp32"]
        if any(given) or self.hold_deep:
            raise InputError(f"--to {self.to} writes a file for no engine; leave the options of engines out")
        placed = {name: getattr(self.sampling, name) for name in ("device", "offload", "dtype")}
        if self.sampling != SamplingOptions(**placed) or self.samples != SAMPLES:
            raise InputError(f"for --to {self.to} nothing is sampled; leave --steps and the like out")
        check_output(self.out, [self.folder])
        check_file_format(self.to, self.out)
        *_, pipe = self._rows(self.sampling).pipes.values()
        written = export_checkpoint(pipe, self.to, self.out)
        forms = [form for _, form in written.quantized]
        counts = ", ".join(f"{forms.count(form)} as {form}" for form in dict.fromkeys(forms)) or "none"
        tell(f"{self.out}: {len(forms)} layers in integers ({counts}); {len(written.floating)} in floating point")
        tell("".join(f"  in floating point: {name} ({reason})\n" for name, reason in written.floating), end="")
        tell("".join(f"  not in the file: {what}\n" for what in written.lost), end="")
