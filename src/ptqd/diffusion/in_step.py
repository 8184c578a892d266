"""A pipeline run for several batches whose steps are taken together.

Something that is fitted step by step, on samples that went through the steps before as they were fitted, sees all the
samples of a step at once. They need not fit into one batch: each batch's call is in a thread of its own, one of which
runs at a time, and waits in ``scheduler.step`` until all have come there. Nor need they be in one process: each has its
share of the batches, and what is fitted is told of all by those who decide (:func:`ptqd.processes.joined`).
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.diffusion.intercept import stepping
from ptqd.diffusion.pipeline_parts import with_components
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.trajectory import next_sample, one_timestep
from ptqd.errors import MismatchError
from ptqd.paused import PausedThread


class Arrival:
    """A batch that waits before its scheduler's step.

    Attributes:
        output: the denoiser's, after guidance.
        timestep: of the step.
        sample: before it, like the output but for a learned variance.
    """

    def __init__(self, step: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any):
        self.output, self.timestep, self.sample = output, one_timestep(timestep), sample
        self._step: partial[Any] = step
        self._call = inspect.signature(step).bind(output, timestep, sample, *args, **kw)

    def stepped(self, output: torch.Tensor) -> torch.Tensor:
        """The sample after the step, had the denoiser's output been this; nothing is changed, no noise used up."""
        generators = self._call.arguments.get("generator")
        known = [g for g in (generators if isinstance(generators, list) else [generators]) if g is not None]
        states = [generator.get_state() for generator in known]
        scheduler, *rest = self._step.args
        self._call.arguments["model_output"] = output
        devices = [output.device] if output.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                result = self._step.func(copy.deepcopy(scheduler), *rest, *self._call.args, **self._call.kwargs)
        finally:
            for generator, state in zip(known, states, strict=True):
                generator.set_state(state)
        return next_sample(result)


Decide = Callable[[int, Sequence[Arrival]], Sequence[torch.Tensor]]


@torch.no_grad()
def run_in_step(
    pipe: DiffusionPipeline, sampling: Sampling, batches: Sequence[Sequence[int]], decide: Decide
) -> list[torch.Tensor]:
    """Run the pipeline for some batches of samples, step by step together.

    Args:
        pipe: its scheduler is copied for each batch; everything else is shared.
        sampling: how.
        batches: sample indices of each.
        decide: is given the number of a step and this process's batches that wait before it, in their order, and
            answers with the output that each goes on with.

    Returns:
        Each batch's samples after the last step, as the scheduler leaves them.

    Raises:
        MismatchError: the batches take different numbers of steps, or none.
        Exception: what the pipeline or ``decide`` raised.
    """
    runs = [_Run(pipe, sampling, batch) for batch in processes.mine(batches)]
    step = 0
    try:
        with processes.failing_alike():
            for run in runs:
                run.advance()
        while any(waiting := [each for share in processes.everyone([run.waiting for run in runs]) for each in share]):
            if not all(waiting):
                raise MismatchError("the pipeline takes other numbers of steps in different batches; use one batch")
            outputs = decide(step, [run.brought for run in runs])
            with processes.failing_alike():
                for run, output in zip(runs, outputs, strict=True):
                    run.advance(output)
            step += 1
    finally:
        for run in runs:
            run.abandon()
    if not step:
        raise MismatchError(f"{type(pipe).__name__} took no step with its scheduler")
    return processes.joined([run.final for run in runs])


class _Run(PausedThread):
    """One batch's call of the pipeline."""

    final: torch.Tensor

    def __init__(self, pipe: DiffusionPipeline, sampling: Sampling, batch: Sequence[int]) -> None:
        super().__init__(self._call_pipeline)
        self.pipe = with_components(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        self.sampling, self.batch = sampling, batch

    def _call_pipeline(self) -> None:
        with stepping(self.pipe, self._step):
            run_batch(self.pipe, self.sampling, self.batch, "latent")

    def _step(
        self, plain: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        output = self.wait(Arrival(plain, model_output, timestep, sample, *args, **kw))
        result = plain(output, timestep, sample, *args, **kw)
        self.final = next_sample(result)
        return result
