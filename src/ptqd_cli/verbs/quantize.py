"""``ptqd quantize``."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, SamplingOptions, show, tell, work_key


@Parameter(name="*")
@dataclass(frozen=True)
class Quantize:
    """Quantize a pipeline's denoiser and save it as a diffusers folder of packed codes; resumes after a kill."""

    model: Annotated[str, Parameter(help=MODEL_HELP)]
    _: KW_ONLY
    recipe: Annotated[str, Parameter(help="shorthand such as w4a8-brecq, or a TOML file")] = "w4a8-best"
    out: Annotated[Path | None, Parameter(help="folder to write")] = None
    explain: Annotated[bool, Parameter(help="print each layer's bits, methods, cost, range and error")] = False
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Quantize, save and explain."""
        from ptqd.errors import InputError
        from ptqd.experiments.report.layers import layer_table
        from ptqd.outputs import OutputFolder, output_folder, remove_scratch
        from ptqd.quantization.explain import explain
        from ptqd.quantization.hf_quantizer import coverage_of
        from ptqd.quantization.quantize import quantize
        from ptqd.quantization.recipe import Recipe

        if self.out is None and not self.explain:
            raise InputError("give --out, a folder to write the pipeline to, or --explain")
        self.sampling.check_all()
        recipe = Recipe.parse(self.recipe)
        if self.sampling.steps is not None:
            recipe.check_steps(self.sampling.steps, f"the recipe {self.recipe}")
        none: AbstractContextManager[OutputFolder | None] = nullcontext()
        with none if self.out is None else output_folder(self.out, [self.model, self.recipe]) as out:
            pipe = self.sampling.load(self.model)
            run = self.sampling.of(pipe, samples=1)
            scratch = None if out is None else out.scratch(work_key(pipe, recipe.to_dict(), run))
            quantized = quantize(pipe, recipe, run, scratch=scratch, progress=True)
            coverage = coverage_of(quantized)
            if out is not None and scratch is not None:
                with out.replacing() as temporary:
                    quantized.save_pretrained(temporary)
                remove_scratch(scratch)
                tell(f"{self.out}: {len(coverage.quantized)} layers and attention products quantized")
        if self.explain:
            show(layer_table(explain(pipe, quantized, run)), width=160)
        tell("".join(f"  in full precision: {name} ({reason})\n" for name, reason in coverage.skipped), end="")
