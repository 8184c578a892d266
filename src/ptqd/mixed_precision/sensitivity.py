"""How much noise in the denoiser's output each layer's bits cause: the first-order answer, for all layers at once.

Rounding an activation by ``d = Q(x) - x``, or a weight so that its layer's output moves by ``d``, moves the
denoiser's output by ``J d``, J the derivative of the output by that tensor. With random signs v,

    E_v (v^T J d)^2 = |J d|^2        (Hutchinson, Commun. Stat. 19, 1990),

and ``v^T J`` of every tensor comes from one backward pass through the full-precision denoiser. So one forward and one
backward pass of each call measure every layer, every activation width and every weight width; nothing is run once a
layer. The full-precision calls are those of a few steps of real trajectories.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map_only

from ptqd import processes
from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.offload import bring_like, brought, weights_left_behind
from ptqd.diffusion.pipeline_parts import copy_module, denoiser_names, denoiser_of, denoisers_of
from ptqd.diffusion.plain_copy import as_it_computes
from ptqd.diffusion.sampling import Sampling, run_batch, sample_generator
from ptqd.diffusion.several_devices import align_devices
from ptqd.diffusion.trajectory import Trajectory, record
from ptqd.errors import InputError
from ptqd.progress import track
from ptqd.quantization.calibration import as_calibrated
from ptqd.quantization.hf_quantizer import ptqd_quantizer
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.numerics.weight_grid import rounded_weight
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.sites import activation_quantizers, layer_quantizers, quantized_layers
from ptqd.quantization.swap import insert_quantizers, put_layer

PROBED_STEPS = 10
PROBED_SAMPLES = 16
PROBED_BATCH = 8  # at once: a backward pass holds more than sampling does


@dataclass(frozen=True)
class Sensitivity:
    """Energy of the noise in the denoiser's output that each layer causes, to first order; mean over elements.

    Attributes:
        layers: dotted names of the layers and attentions whose activations have several widths (Q,).
        widths: activation bits (W,).
        activations: energy by step (T, Q, W), float64.
        weighted: dotted names of the layers with quantized weights (L,).
        weight_bits: of the weights (B,).
        weights: energy by step (T, L, B), float64.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    activations: torch.Tensor
    weighted: tuple[str, ...]
    weight_bits: tuple[int, ...]
    weights: torch.Tensor


def measure_sensitivity(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    sampling: Sampling,
    *,
    weight_bits: Sequence[int] = (),
    steps: int = PROBED_STEPS,
    samples: int = PROBED_SAMPLES,
    progress: bool = False,
) -> Sensitivity:
    """Measure every layer's share of the noise.

    Args:
        pipe: full precision.
        qpipe: quantized by ptqd, with a recipe of several widths.
        sampling: how it samples.
        weight_bits: widths to measure weights at; none leaves ``weights`` empty.
        steps: of the run that are looked at, evenly spread; those between are interpolated.
        samples: that are looked at.
        progress: show a bar.

    Raises:
        InputError: ptqd did not quantize the pipeline, or its denoiser cannot be differentiated.
    """
    recipe = Recipe.from_dict(ptqd_quantizer(qpipe).quantization_config.recipe)
    probes = {
        name: _Probe(as_calibrated(full), as_it_computes(denoiser_of(qpipe, name)), recipe, sorted(weight_bits))
        for name, full in denoisers_of(pipe).items()
    }
    apart = sampling.with_seed_for("sensitivity").replace(
        samples=samples, batch=PROBED_BATCH
    )  # whatever the run's: the same result

    def probe(indices: range) -> tuple[int, dict[str, Energies]]:
        """How many steps a batch took, and what each denoiser's layers cause there."""
        with record(pipe) as trajectory, _calls(pipe, steps, trajectory) as calls:
            run_batch(pipe, apart, indices, "latent")
        axis = trajectory.channel_axis
        for n, (name, step, args, kwargs) in enumerate(calls):
            seed = sample_generator(n, indices[0]).initial_seed()
            probes[name].add(step, args, kwargs, trajectory.samples[0].shape[axis], axis, seed)
        return len(trajectory.timesteps), {name: probe.taken() for name, probe in probes.items()}

    total, energies = 0, dict[str, Energies]()
    for batches in track(processes.rounds(list(apart.batches())), "finding each layer's share" if progress else None):
        for taken, parts in processes.spread(probe, processes.mine(batches)):
            total = taken
            energies = {name: _summed(energies.get(name, {}), part) for name, part in parts.items()}
    first, *others = probes
    for other in others:  # at steps of its own
        energies[first] |= energies[other]
    return probes[first].result(energies[first], total)


Energies = dict[int, tuple[torch.Tensor, torch.Tensor, int]]
"""By step: sums of the energies of activations (Q, W) and weights (L,), and of how many elements they are."""


def _summed(first: Energies, second: Energies) -> Energies:
    sums = first | second
    for step in first.keys() & second.keys():
        (a, b, n), (c, d, m) = first[step], second[step]
        sums[step] = (a + c, b + d, n + m)
    return sums


Call = tuple[str, int, tuple[Any, ...], dict[str, Any]]


@contextmanager
def _calls(pipe: DiffusionPipeline, count: int, trajectory: Trajectory) -> Iterator[list[Call]]:
    """What the denoiser is called with at some steps, evenly spread over the run."""
    calls: list[Call] = []

    def keep(name: str, module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        step, total = len(trajectory.timesteps), len(pipe.scheduler.timesteps)
        if step in np.linspace(0, total - 1, min(count, total)).round():
            calls.append((name, step, *tree_map_only(torch.Tensor, torch.clone, (args, kwargs))))

    hooks = [
        getattr(pipe, name).register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name in denoiser_names(pipe)
    ]
    with hooked(*hooks):
        yield calls


class _Tap(nn.Module):
    """Stands where an activation quantizer was: lets its input through, and hands on the gradient there."""

    def __init__(self, then: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)
        seen = x.detach()
        y.register_hook(lambda gradient: self.then(gradient, seen))
        return y


class _Probe:
    """A full-precision denoiser with taps where the quantized one rounds, and the energies found so far."""

    def __init__(self, full: nn.Module, quantized: nn.Module, recipe: Recipe, weight_bits: Sequence[int]) -> None:
        self.model = copy_module(full, lambda tensor: tensor.detach())
        self.model.requires_grad_(False)
        insert_quantizers(self.model, recipe)
        named = list(activation_quantizers(quantized))
        self.layers = tuple(dict.fromkeys(name for name, q in layer_quantizers(quantized) if len(q.widths) > 1))
        self.widths, self.weight_bits = recipe.widths, tuple(weight_bits)
        for (place, quantizer), (layer, _) in zip(named, layer_quantizers(quantized), strict=True):
            tap = nn.Identity() if layer not in self.layers else _Tap(partial(self._activation, layer, quantizer))
            put_layer(self.model, place, tap)
        weighted = dict(quantized_layers(self.model)) if weight_bits else {}
        self.weighted = tuple(weighted)
        self.relative: dict[str, torch.Tensor] = {}  # squared error of the weights against that at the fewest bits (B,)
        for name, module in weighted.items():
            rounded = [rounded_weight(module.weight, replace(module.weights, bits=bits)) for bits in weight_bits]
            errors = torch.stack([(w - module.weight).cpu().double().square().sum() for w in rounded])
            self.relative[name] = errors / errors[0].clamp(min=1e-300)
            module.register_forward_hook(partial(self._weighted, name, rounded[0] - module.weight))
        align_devices(self.model)
        bring_like(self.model, full)
        self.steps: dict[int, tuple[torch.Tensor, torch.Tensor, list[int]]] = {}  # of the batch that is looked at
        self.rows = 1

    def add(
        self, step: int, args: tuple[object, ...], kwargs: Mapping[str, object], channels: int, axis: int, seed: int
    ) -> None:
        """One call's energies; its output's first ``channels`` along ``axis`` count, a learned variance does not.

        Raises:
            InputError: no gradient comes back.
        """
        activations = torch.zeros(len(self.layers), len(self.widths), dtype=torch.float64)
        weights = torch.zeros(len(self.weighted), dtype=torch.float64)
        self.now = self.steps.setdefault(step, (activations, weights, [0]))
        try:
            with torch.enable_grad(), weights_left_behind(self.model):
                output = self.model(*args, **kwargs)[0]
                remaining = output.narrow(axis, 0, min(channels, output.shape[axis]))
                self.rows = len(output)
                random = torch.Generator().manual_seed(seed)
                signs = torch.randint(0, 2, remaining.shape, generator=random).to(remaining) * 2 - 1
                torch.autograd.backward(remaining, signs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            kind, reason = type(self.model).__name__, " ".join(str(error).split())[:160]
            raise InputError(f"{kind} cannot be differentiated to share its noise among layers: {reason}") from error
        self.now[2][0] += remaining.numel()

    def taken(self) -> Energies:
        """What was added since this was last called."""
        energies = {step: (first, second, count[0]) for step, (first, second, count) in self.steps.items()}
        self.steps = {}
        return energies

    def _activation(self, layer: str, quantizer: ActivationQuantizer, gradient: torch.Tensor, x: torch.Tensor) -> None:
        row = self.now[0][self.layers.index(layer)]
        with brought(quantizer):
            for i in range(len(quantizer.widths)):
                row[i] += self._energy(gradient, quantizer.rounded(x, i) - x)

    def _weighted(self, name: str, change: torch.Tensor, layer: QuantLayer, inputs: Any, output: Any) -> torch.Tensor:
        seen = inputs[0].detach()
        result: torch.Tensor = output if output.requires_grad else output.detach().requires_grad_(True)

        def measure(gradient: torch.Tensor) -> None:
            self.now[1][self.weighted.index(name)] += self._energy(gradient, layer.matmul(seen, change.to(seen.device)))

        result.register_hook(measure)
        return result

    def _energy(self, gradient: torch.Tensor, moved: torch.Tensor) -> float:
        """Sum over the call's rows of ``(v^T J d)^2``; one sum where the tensor is not the rows'."""
        products = (gradient.float() * moved.float()).flatten()
        rows = products.view(self.rows if products.numel() % self.rows == 0 else 1, -1)
        return float(rows.sum(1).square().sum())

    def result(self, energies: Energies, total: int) -> Sensitivity:
        """Energies at every step of a run, between the measured ones on a line over their logarithm."""
        steps = sorted(energies)

        def everywhere(tables: list[torch.Tensor]) -> torch.Tensor:
            logs = torch.stack(tables).clamp(min=1e-30).log().flatten(1).numpy()  # K,...
            lines = [np.interp(np.arange(total), steps, logs[:, i]) for i in range(logs.shape[1])]
            return torch.from_numpy(np.array(lines).reshape(-1, total).T.copy()).exp().view(total, *tables[0].shape)

        activations = everywhere([energies[s][0] / energies[s][2] for s in steps])
        weights = torch.zeros(total, 0, len(self.weight_bits), dtype=torch.float64)
        if self.weighted:
            lowest = everywhere([energies[s][1] / energies[s][2] for s in steps])
            weights = lowest[:, :, None] * torch.stack([self.relative[name] for name in self.weighted])
        return Sensitivity(self.layers, self.widths, activations, self.weighted, self.weight_bits, weights)
