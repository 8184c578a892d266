"""The quantized pipelines that ``export`` and ``bench`` take: rows of a run folder, or a folder's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptqd_cli.options import SamplingOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ptqd.diffusion.sampling import Sampling


@dataclass(frozen=True)
class QuantizedRows:
    """Quantized pipelines by name, how they are sampled, and of which model they are; None where that is not known."""

    pipes: "dict[str, DiffusionPipeline]"
    sampling: "Sampling"
    model: str | None


def quantized_rows(folder: Path, names: Sequence[str] | None, options: SamplingOptions, samples: int) -> QuantizedRows:
    """Those of a folder.

    Raises:
        InputError: there is no such row, or rows were named of a pipeline's folder.
    """
    import torch

    from ptqd.errors import InputError
    from ptqd.experiments.experiment import pipeline_of
    from ptqd.experiments.results import REPORT, Report, select_rows

    if not (folder / REPORT).is_file():
        if names is not None:
            raise InputError(f"{folder} is no run folder (it has no report.json), so it has no rows; leave out --row")
        pipe = options.load(folder)
        return QuantizedRows({folder.name: pipe}, options.of(pipe, samples), None)
    rows = select_rows(Report.load(folder), folder, names)
    pipes = {row.key.quantized if names is None else row.key.name: pipeline_of(folder, row) for row in rows}
    if options.dtype is not None:
        pipes = {name: pipe.to(getattr(torch, options.dtype)) for name, pipe in pipes.items()}
    return QuantizedRows(pipes, rows[-1].as_sampled(), rows[-1].model)
