"""``ptqd plan``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, PLANNING, PlanOptions, SamplingOptions, tell, work_key


@Parameter(name="*")
@dataclass(frozen=True)
class Plan:
    """Choose a quantized pipeline's bits step by step, and save it with its plan; measured widths survive a kill."""

    model: Annotated[str, Parameter(help=MODEL_HELP)]
    quantized: Annotated[
        str, Parameter(help="the quantized pipeline's folder, of a recipe with several widths (w4a4+8)")
    ]
    _: KW_ONLY
    out: Annotated[Path, Parameter(help="folder to write: the pipeline with its plan")]
    plan: Annotated[
        str,
        Parameter(group=PLANNING, help="auto: the least error for a budget; paper: PTQD's rule; or a plan's file"),
    ] = "auto"
    options: PlanOptions = PlanOptions()
    samples: Annotated[int, Parameter(help="how many")] = 64
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Measure every width, plan, and save."""
        from ptqd import processes
        from ptqd.experiments.plan_request import load_widths, make_plan
        from ptqd.experiments.sharding import measure_width_shards
        from ptqd.mixed_precision.problem import check_can_hold, check_countable
        from ptqd.outputs import output_folder, remove_scratch
        from ptqd.quantization.apply_plan import apply_plan
        from ptqd.quantization.hf_quantizer import ptqd_quantizer
        from ptqd.quantization.recipe import Recipe

        self.sampling.check_all(self.samples)
        request = self.options.request(self.plan)
        given = None if request.given is None else self.plan
        with output_folder(self.out, [self.model, self.quantized, given]) as out:
            pipe, quantized = self.sampling.load_both(self.model, self.quantized)
            run = self.sampling.of(pipe, self.samples)
            request.check(Recipe.from_dict(ptqd_quantizer(quantized).quantization_config.recipe), None)
            if request.hold or request.hold_deep:
                check_can_hold(quantized, deep=request.hold_deep)
            if request.kind == "auto":
                check_countable(quantized, timed=request.in_seconds)
            scratch = out.scratch(work_key(pipe, quantized, run))
            if request.given is None:
                measure_width_shards(pipe, quantized, run, scratch / "widths", scratch, title="measuring widths")
            processes.wait()
            stats = load_widths(scratch / "widths") if request.given is None else {}
            with processes.together():
                plan, _ = make_plan(pipe, quantized, run, request, stats, progress=True)
            processes.wait()
            if not processes.is_main():
                return
            planned = apply_plan(quantized, plan, pipe)
            with out.replacing() as temporary:
                planned.save_pretrained(temporary)
                plan.save(temporary / "plan.toml")
            remove_scratch(scratch)
        tell(f"{self.out}: {plan.steps} steps, groups of layers: {len(plan.groups)}")
        tell("".join(f"  {name.replace('_', ' ')}: {value}\n" for name, value in plan.made.items()), end="")
        for i, t in enumerate(plan.timesteps):
            tell(f"  step {i:3d}  t {t:7g}  {plan.describe(i)}")
