"""A look at a run before it is quantized: what quantizers' inputs span at each step, and which see the step alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptqd.activations import ActivationQuantizer
from ptqd.clock import layer_quantizers
from ptqd.components import denoiser_name
from ptqd.layers import QuantLayer
from ptqd.ranges import StepRanges, group_steps
from ptqd.replay import Trajectory, record
from ptqd.sampling import Sampling, run_batch

SAMPLES = 8


@dataclass
class Survey:
    """What was seen.

    Attributes:
        timesteps: that the denoiser was told, step by step.
        widths: of each quantizer's range at each step (T, Q).
        temporal: the inputs of layers that see nothing but the step (T, I), by name.
    """

    timesteps: tuple[float, ...]
    widths: torch.Tensor
    temporal: dict[str, torch.Tensor] = field(default_factory=dict)

    def ranges(self, groups: int, *, exact: bool) -> StepRanges:
        """Groups of steps with ranges of their own, and if asked for the layers with one for every step."""
        return StepRanges(self.timesteps, group_steps(self.widths, groups), tuple(self.temporal) if exact else ())


def survey(qpipe: DiffusionPipeline, run: Sampling) -> Survey:
    """Run a few trajectories of a pipeline whose quantizers are in place, observing or not."""
    model = getattr(qpipe, denoiser_name(qpipe))
    names = {id(m): name for name, m in layer_quantizers(model)}
    layers = {id(m.input): name for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    few = run.replace(samples=min(run.samples, SAMPLES), batch=min(run.batch, SAMPLES))
    seen: dict[tuple[int, int], tuple[float, float]] = {}
    inputs: dict[str, dict[int, torch.Tensor]] = {name: {} for name in layers.values()}
    timesteps: tuple[float, ...] = ()
    for indices in few.batches():
        with record(qpipe) as trajectory, _watching(model, trajectory, layers, seen, inputs):
            run_batch(qpipe, few, indices, "latent")
        timesteps = tuple(trajectory.told)
    count = len(timesteps)
    widths = [[seen[step, q][1] - seen[step, q][0] for q in names if (0, q) in seen] for step in range(count)]
    temporal = {
        name: torch.stack([found[t] for t in range(count)]) for name, found in inputs.items() if len(found) == count
    }
    return Survey(timesteps, torch.tensor(widths, dtype=torch.float64), temporal if count else {})


@contextmanager
def _watching(
    model: torch.nn.Module,
    trajectory: Trajectory,
    layers: dict[int, str],
    seen: dict[tuple[int, int], tuple[float, float]],
    inputs: dict[str, dict[int, torch.Tensor]],
) -> Iterator[None]:
    def look(module: Any, args: tuple[torch.Tensor]) -> None:
        x, step, key = args[0].detach(), len(trajectory.timesteps), id(module)
        low, high = (float(end) for end in torch.aminmax(x))
        before = seen.get((step, key), (low, high))
        seen[step, key] = min(low, before[0]), max(high, before[1])
        name = layers.get(key)
        if name not in inputs:
            return
        first = x[:1].flatten().float().cpu()
        known = inputs[name].get(step, first)
        same = x.ndim == 2 and len(x) > 1 and bool((x == x[:1]).all()) and torch.equal(known, first)
        if same:
            inputs[name][step] = first
        else:
            del inputs[name]  # it sees more than the step

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, ActivationQuantizer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
