"""A look at a run before it is quantized: what quantizers' inputs span at each step, and which see the step alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_map_only

from ptqd.diffusion.pipeline_parts import denoiser_name
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.timesteps import timestep_argument
from ptqd.diffusion.trajectory import Trajectory, record
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.step_clock import layer_quantizers
from ptqd.quantization.step_ranges import StepRanges, group_steps

SAMPLES = 8


@dataclass
class Survey:
    """What was seen.

    Attributes:
        timesteps: that the denoiser was told, step by step.
        widths: of each quantizer's range at each step (T, Q).
        temporal: what the quantizers of layers that see nothing but the step are given (T, I), by name.
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
    calls: list[Any] = []
    for indices in few.batches():
        with record(qpipe) as trajectory, _watching(model, trajectory, layers, seen, inputs, calls):
            run_batch(qpipe, few, indices, "latent")
        timesteps = tuple(trajectory.told)
    _drop_what_sees_more(model, layers, inputs, *calls[0])
    count = len(timesteps)
    always = [q for q in names if all((step, q) in seen for step in range(count))]
    widths = [[seen[step, q][1] - seen[step, q][0] for q in always] for step in range(count)]
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
    calls: list[Any],
) -> Iterator[None]:
    """Note what each quantizer is given at each step, and the first call."""

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        if not calls:
            calls.append(tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))

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
        if x.ndim == 2 and torch.allclose(x.float().cpu(), known.expand(x.shape), rtol=1e-4, atol=1e-6):
            inputs[name][step] = first
        else:
            del inputs[name]  # it sees more than the step

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, ActivationQuantizer)]
    hooks.append(model.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop_what_sees_more(
    model: torch.nn.Module,
    layers: dict[int, str],
    inputs: dict[str, dict[int, torch.Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Drop layers whose input changes when everything but the timestep does: a run may hold one condition only."""
    argument = timestep_argument(model)
    if argument is None:
        return
    name, position = argument
    random = torch.Generator().manual_seed(0)

    def other(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return x + torch.randn(x.shape, generator=random).to(x)
        return x if x.dtype == torch.bool else torch.where(x == 0, 1, 0).to(x)

    told = kwargs.get(name, args[position] if position < len(args) else None)
    args, kwargs = tree_map_only(torch.Tensor, other, (args, kwargs))
    if name in kwargs:
        kwargs[name] = told
    else:
        args = (*args[:position], told, *args[position + 1 :])

    def compare(module: Any, given: tuple[torch.Tensor]) -> None:
        layer = layers[id(module)]
        if layer in inputs:
            x, known = given[0].detach().float().cpu(), inputs[layer][0]
            if not torch.allclose(x, known.expand(x.shape), rtol=1e-4, atol=1e-6):
                del inputs[layer]

    hooks = [m.register_forward_pre_hook(compare) for m in model.modules() if id(m) in layers]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
