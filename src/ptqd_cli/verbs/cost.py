"""``ptqd cost``."""

import json as json_format
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, Dtype, ScheduleOptions, show, tell

PUBLISHED = (
    "the name of a published architecture: ddpm-cifar10-32, ldm-celebahq-256, ldm4-imagenet, ldm4-bedrooms, "
    "ldm8-churches, dit-xl-2-256, sd-1.5, lcm-dreamshaper, sdxl, sd3-medium, flux.1-dev, pixart-sigma-1024, "
    "sana-1600m-1024, cogvideox-2b or stable-video"
)


@Parameter(name="*")
@dataclass(frozen=True)
class Cost:
    """Count multiply-accumulates, bit operations and memory, without the weights where that suffices."""

    model: Annotated[str, Parameter(help=f"{MODEL_HELP}; or a denoiser's folder or config.json, or {PUBLISHED}")]
    _: KW_ONLY
    recipe: Annotated[
        str | None, Parameter(help="shorthand such as w4a8, or a TOML file (default: full precision)")
    ] = None
    plan: Annotated[Path | None, Parameter(help="a plan (.toml) among the recipe's widths")] = None
    layers: Annotated[bool, Parameter(help="a line for each layer, not for each block")] = False
    json: Annotated[bool, Parameter(help="print everything, by layer and step, as JSON")] = False
    dtype: Dtype = None
    schedule: ScheduleOptions = ScheduleOptions()

    def run(self) -> None:
        """Count, and print."""
        import torch

        from ptqd.experiments.count_cost import count_cost
        from ptqd.experiments.report.cost import cost_json, cost_table

        self.schedule.check()
        cost = count_cost(
            self.model,
            self.recipe,
            self.plan,
            self.schedule.sampling,
            scheduler=self.schedule.scheduler,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
        )
        if self.json:
            tell(json_format.dumps(cost_json(cost), indent=2))
            return
        show(*cost_table(self.model, cost, layers=self.layers), width=160)
