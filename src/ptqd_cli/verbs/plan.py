"""``ptqd plan``."""

import shutil
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, PLANNING, PlanOptions, SamplingOptions, check_replaceable, scratch_beside


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
        from ptqd.files import replacing
        from ptqd.quantization.apply_plan import apply_plan

        check_replaceable(self.out)
        request = self.options.request(self.plan)
        pipe, quantized = self.sampling.load(self.model), self.sampling.load(self.quantized)
        run = self.sampling.of(pipe, self.samples)
        scratch = scratch_beside(self.out, pipe, quantized, run)
        if request.given is None:
            measure_width_shards(pipe, quantized, run, scratch / "widths", scratch, title="measuring widths")
        if not processes.is_main():
            return
        stats = load_widths(scratch / "widths") if request.given is None else {}
        plan, _ = make_plan(pipe, quantized, run, request, stats, progress=True)
        planned = apply_plan(quantized, plan, pipe)
        with replacing(self.out) as temporary:
            planned.save_pretrained(temporary)
            plan.save(temporary / "plan.toml")
        shutil.rmtree(scratch, ignore_errors=True)
        print(f"{self.out}: {plan.steps} steps, groups of layers: {len(plan.groups)}")
        print("".join(f"  {name.replace('_', ' ')}: {value}\n" for name, value in plan.made.items()), end="")
        for i, (t, row) in enumerate(zip(plan.timesteps, plan.bits, strict=True)):
            print(f"  step {i:3d}  t {t:7g}  bits {' '.join(map(str, row))}")
