"""``ptqd quantize``."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, SamplingOptions, show, tell, work_key

if TYPE_CHECKING:
    from ptqd.quantization.recipe import Recipe


@Parameter(name="*")
@dataclass(frozen=True)
class Quantize:
    """Quantize a pipeline's denoiser and save it as a diffusers folder of packed codes; resumes after a kill."""

    model: Annotated[str, Parameter(help=MODEL_HELP)]
    _: KW_ONLY
    recipe: Annotated[str, Parameter(help="shorthand such as w4a8-brecq, or a TOML file")] = "w4a8-best"
    out: Annotated[Path | None, Parameter(help="folder to write")] = None
    explain: Annotated[bool, Parameter(help="print each layer's bits, methods, cost, range and error")] = False
    minutes: Annotated[
        float | None, Parameter(help="that it may take: fewer rows and less distilling where the recipe takes longer")
    ] = None
    memory: Annotated[float | None, Parameter(help="GB that it may take (default: what is free)")] = None
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Quantize, save and explain."""
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.report.layers import layer_table
        from ptqd.outputs import OutputFolder, output_folder, remove_scratch
        from ptqd.quantization.budget import Budget
        from ptqd.quantization.explain import explain
        from ptqd.quantization.hf_quantizer import coverage_of
        from ptqd.quantization.quantize import quantize
        from ptqd.quantization.recipe import Recipe

        if self.out is None and not self.explain:
            raise InputError("give --out, a folder to write the pipeline to, or --explain")
        self.sampling.check_all()
        recipe = Recipe.parse(self.recipe)
        budget = Budget(None if self.memory is None else int(self.memory * 1e9), self.minutes)
        if self.sampling.steps is not None:
            recipe.check_steps(self.sampling.steps, f"the recipe {self.recipe}")
        none: AbstractContextManager[OutputFolder | None] = nullcontext()
        with none if self.out is None else output_folder(self.out, [self.model, self.recipe]) as out:
            pipe = self.sampling.load(self.model)
            run = self.sampling.of(pipe, samples=1)
            scratch = None if out is None else out.scratch(work_key(pipe, self._kept(recipe), run))
            with processes.together():
                quantized = quantize(pipe, recipe, run, scratch=scratch, budget=budget, progress=True)
            processes.wait()
            if not processes.is_main():
                return
            coverage = coverage_of(quantized)
            if out is not None and scratch is not None:
                with out.replacing() as temporary:
                    quantized.save_pretrained(temporary)
                remove_scratch(scratch)
                tell(f"{self.out}: {len(coverage.quantized)} layers and attention products quantized")
        if self.explain:
            show(layer_table(explain(pipe, quantized, run)), width=160)
        tell("".join(f"  in full precision: {name} ({reason})\n" for name, reason in coverage.skipped), end="")

    def _kept(self, recipe: "Recipe") -> dict[str, Any]:
        """What unfinished work depends on, beside the pipeline and the run."""
        plain = recipe.to_dict()
        return plain if self.minutes is None else {**plain, "minutes": self.minutes}
