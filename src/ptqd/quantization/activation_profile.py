"""Which layers of a denoiser see nothing but the sampling step, and what they see there.

The layers of a time embedding do: their inputs are the same for every sample and condition, so that their ranges and
their rounding can be exact (TFMQ-DM, arXiv 2311.16503).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ptqd.diffusion.call_rows import CallLayout, join_rows
from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.timesteps import Call, timestep_in, with_timestep
from ptqd.quantization.modules.activation import Mode
from ptqd.quantization.sites import activation_quantizers, quantized_layers


@dataclass(frozen=True)
class ActivationProfile:
    """What was seen.

    Attributes:
        timesteps: that the denoiser got, step by step (T,).
        temporal: the inputs of the quantizers of layers that see nothing but the step (T, I), by the layers' names.
        call: arguments of one call of the denoiser, for one row.
    """

    timesteps: tuple[float, ...]
    temporal: dict[str, torch.Tensor]
    call: Call


class ActivationProfiler:
    """Watches a denoiser whose quantizers are in place, through whole trajectories.

    Args:
        model: the denoiser; its quantizers do not round yet.
        layout: of its calls.
    """

    def __init__(self, model: nn.Module, layout: CallLayout) -> None:
        self.model, self.layout = model, layout
        self._layers = dict(quantized_layers(model))
        self._inputs: dict[str, dict[int, torch.Tensor]] = {name: {} for name in self._layers}
        self._call: Call | None = None

    def state(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"inputs": self._inputs, "call": self._call}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what another has seen."""
        self._inputs, self._call = state["inputs"], state["call"]

    def merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over what several have seen, of other samples each; the first's where all saw the same."""
        known = [state for state in states if state["call"] is not None]
        self._call, self._inputs = known[0]["call"], {}
        for name, inputs in known[0]["inputs"].items():
            others = [state["inputs"].get(name) for state in known[1:]]
            if all(other is not None and _all_seen(other, inputs) for other in others):
                self._inputs[name] = inputs

    @contextmanager
    def watching(self, step: Callable[[], int]) -> Iterator[None]:
        """Note what each layer gets at each step, whose number ``step`` says, and a row of the first call."""

        def keep(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if self._call is None:
                self._call = join_rows([self.layout.rows(args, kwargs)[0].kept()])

        def look(name: str, x: torch.Tensor) -> None:
            if name not in self._inputs:
                return
            here, first = step(), x[:1].detach().flatten().float().cpu()
            known = self._inputs[name].get(here, first)
            if x.ndim == 2 and _all_alike(x, known):
                self._inputs[name].setdefault(here, first)
            else:
                del self._inputs[name]  # it sees more than the step

        with hooked(self.model.register_forward_pre_hook(keep, with_kwargs=True), *_on_inputs(self._layers, look)):
            yield

    def result(self, timesteps: Sequence[float]) -> ActivationProfile:
        """What was seen, of the layers that see the step alone at every step."""
        assert self._call is not None
        self._drop_what_sees_more(self._call)
        temporal = {
            name: torch.stack([inputs[step] for step in range(len(timesteps))])
            for name, inputs in self._inputs.items()
            if timesteps and len(inputs) == len(timesteps)
        }
        return ActivationProfile(tuple(timesteps), temporal, self._call)

    def _drop_what_sees_more(self, call: Call) -> None:
        """Drop layers whose input changes when everything but the timestep does: a run may hold one condition only."""
        random = torch.Generator().manual_seed(0)

        def other(x: torch.Tensor) -> torch.Tensor:
            if x.is_floating_point():
                return x + torch.randn(x.shape, generator=random).to(x)
            return x if x.dtype == torch.bool else torch.where(x == 0, 1, 0).to(x)

        def within(table: nn.Embedding, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0].clamp(max=table.num_embeddings - 1), *args[1:])

        def compare(name: str, x: torch.Tensor) -> None:
            if name in self._inputs and not _all_alike(x, self._inputs[name][0]):
                del self._inputs[name]

        timestep = timestep_in(self.model, call)
        if timestep is None:
            return
        args, kwargs = with_timestep(self.model, tree_map_only(torch.Tensor, other, call), timestep)
        tables = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        bounds = [table.register_forward_pre_hook(within) for table in tables]
        modes = [(quantizer, quantizer.mode) for _, quantizer in activation_quantizers(self.model)]
        try:
            for quantizer, _ in modes:
                quantizer.mode = Mode.BYPASS  # observers are shown no other call than the run's
            with hooked(*_on_inputs(self._layers, compare), *bounds), torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for quantizer, mode in modes:
                quantizer.mode = mode


def temporal_inputs(model: nn.Module, profile: ActivationProfile, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the quantizers of layers that see the step alone get now, at each step (T, I), by the layers' names."""
    layers = {name: layer for name, layer in quantized_layers(model) if name in names}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def look(name: str, x: torch.Tensor) -> None:
        if len(seen[name]) == step:  # some are called more than once
            seen[name].append(x[:1].detach().flatten().float().cpu())

    like = timestep_in(model, profile.call)
    with hooked(*_on_inputs(layers, look)), torch.no_grad():
        for step, t in enumerate(profile.timesteps):  # noqa: B007
            timestep = torch.full_like(like, t) if isinstance(like, torch.Tensor) else t
            args, kwargs = with_timestep(model, profile.call, timestep)
            model(*args, **kwargs)
    return {name: torch.stack(rows) for name, rows in seen.items()}


def _on_inputs(layers: dict[str, Any], look: Any) -> list[Any]:
    """Hooks that call ``look(name, x)`` with what each layer's quantizer gets."""
    return [
        layer.input.register_forward_pre_hook(lambda module, args, name=name: look(name, args[0]))
        for name, layer in layers.items()
    ]


def _all_seen(inputs: Mapping[int, torch.Tensor], known: Mapping[int, torch.Tensor]) -> bool:
    """Whether a layer's inputs at each step are those that are known."""
    return inputs.keys() == known.keys() and all(_all_alike(inputs[step], known[step]) for step in inputs)


def _all_alike(x: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether all rows of an input are a known one, but for rounding."""
    return torch.allclose(x.detach().float().cpu(), known.expand(x.shape), rtol=1e-4, atol=1e-6)
