"""How long a recipe takes on a model and how much memory, before it starts; and the recipe that fits into less.

One row of one call is run, and each part of the recipe on one unit of the denoiser, the one with the most
multiply-accumulates. What grows with the rows is scaled to all units by their multiply-accumulates, what does not by
their parameters.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_leaves

from ptqd.diffusion.call_rows import first_rows
from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.macs import call_macs
from ptqd.diffusion.offload import bring_like, brought
from ptqd.diffusion.pipeline_parts import copy_module
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.quantization.blocks import find_units, is_inside
from ptqd.quantization.branch_ranks import SHARES
from ptqd.quantization.budget import WORKING, Budget, device_of, held, live_bytes
from ptqd.quantization.calibration import BATCH, CalibrationInputs
from ptqd.quantization.methods import OBSERVED, SMOOTHED, Distill, Gptq, Learned, LowRank, Method, Smooth, Widen
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, full_weight
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.rounding.capture import reaching
from ptqd.quantization.rounding.gptq import moments_of, round_layers, rows_that_wait
from ptqd.quantization.rounding.learned_parameters import LearnedScale, Straight
from ptqd.quantization.rounding.smoothquant import search_smoothing
from ptqd.quantization.rounding.training_memory import SLACK, kept_bytes
from ptqd.quantization.sites import activation_quantizers, quantized_layers
from ptqd.quantization.swap import insert_quantizers

FEWEST_ROWS = 32  # that a recipe is cut down to
FEWEST_ITERATIONS, SMALLEST_BATCH = 50, 8  # of distilling; below these it is left out
MANY, QUICK = 8, 0.3  # rows that are measured beside one, where one takes fewer seconds; else two
MARGIN = 0.85  # of the minutes, that is planned for


@dataclass(frozen=True)
class StageCost:
    """One part of quantizing.

    Attributes:
        name: calibrating, finding ranges, or a method's.
        seconds: of wall-clock time.
        memory: bytes that the process holds at most meanwhile; of a GPU, bytes of its own memory.
    """

    name: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Estimate:
    """What quantizing takes, part by part."""

    stages: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> int:
        """Bytes that are held at most."""
        return max(stage.memory for stage in self.stages)

    def __str__(self) -> str:
        parts = ", ".join(f"{stage.name} {_duration(stage.seconds)}" for stage in self.stages)
        return f"about {_duration(self.seconds)} and {self.memory / 1e9:.1f} GB ({parts})"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class _Line:
    """Seconds of something with n rows: ``start + each * n``, of the whole denoiser."""

    start: float
    each: float

    def __call__(self, rows: float) -> float:
        return self.start + self.each * rows


@dataclass(frozen=True)
class Costs:
    """What the parts of a recipe cost on a denoiser.

    Attributes:
        device: where it is.
        rows_a_sample: of its calls; two with classifier-free guidance.
        call: in full precision.
        observing: how many times as long a call takes whose quantizers observe.
        freezing: seconds to find all ranges and round all weights.
        smoothing: by the rows that it is searched on.
        hessians: by the rows that they are of, and the run that gives them.
        rounding: seconds for GPTQ to round all weights.
        learning: one step of learning the whole denoiser.
        held: bytes that were held before.
        parameters: bytes of the parameters.
        live: bytes of outputs that a row needs at once.
        between: of these, between units.
        kept: bytes that a row keeps for gradients.
        units: how many there are.
        layers: how many are quantized.
    """

    device: torch.device
    rows_a_sample: int
    call: _Line
    observing: float
    freezing: float
    smoothing: _Line
    hessians: _Line
    rounding: float
    learning: _Line
    held: int
    parameters: int
    live: int
    between: int
    kept: int
    units: int
    layers: int

    def estimate(self, recipe: Recipe, sampling: Sampling, steps: int, budget: Budget) -> Estimate:
        """What a recipe costs.

        Args:
            recipe: as it will be carried out.
            sampling: how it samples; its batch counts.
            steps: of a run at which the denoiser is called.
            budget: whose memory bounds how many rows are learned from at once.
        """
        samples = recipe.calibration_samples
        spare = budget.spare(self.device)
        together = min(sampling.batch, samples)
        rows = steps * samples * self.rows_a_sample
        calls = steps * -(-samples // together)
        base = self.held + 2 * self.parameters  # the copy that observes; then that and the quantized one
        calibrating = calls * self.call.start + rows * self.call.each * self.observing
        stages = [StageCost("calibrating", calibrating, base + self._working(together * self.rows_a_sample, spare))]
        ranges = self.freezing
        if any(isinstance(method, Smooth) for method in recipe.methods) or recipe.calibration_steps != "uniform":
            ranges += min(OBSERVED, rows) * self.call.each * self.observing
        stages.append(StageCost("finding ranges", ranges, base + self._working(min(BATCH, rows), spare)))
        for method in recipe.methods:
            seconds, memory = self._method(method, rows, spare)
            stages.append(StageCost(method.name, seconds, int(base + memory)))
        return Estimate(tuple(stages))

    def samples_at_once(self, budget: Budget) -> int:
        """Samples of a batch that fit into memory."""
        return max(1, self._fitting(budget.spare(self.device)) // self.rows_a_sample)

    def _fitting(self, spare: int) -> int:
        """Rows of a call without gradients that fit into half of the memory that there is."""
        return max(1, int(spare / 2 / (WORKING * max(self.live, 1))))

    def _working(self, rows: int, spare: int) -> int:
        """Bytes that a call without gradients takes, of rows or of as many as fit."""
        return WORKING * min(rows, self._fitting(spare)) * self.live

    def _method(self, method: Method, rows: int, spare: int) -> tuple[float, float]:
        """Seconds, and bytes beside the two models."""
        if isinstance(method, Widen):
            count = min(method.inputs, rows)
            return count * 1.5 * self.learning(1) + 2 * self.freezing, self.kept + self.parameters
        if isinstance(method, LowRank) and method.by_layer:
            count = min(method.inputs, rows)
            return count * 1.5 * self.learning(1) + len(SHARES) * self.freezing, self.kept + self.parameters
        if isinstance(method, Smooth):
            count = min(SMOOTHED, rows, self._fitting(spare))
            return self.smoothing(count), self._working(count, spare) + self.parameters
        if isinstance(method, Gptq):
            count = min(method.inputs, rows)
            both = 2 if method.asymmetric else 1  # full precision is called beside
            between, units = (both * self.live, self.layers) if method.asymmetric else (self.between, self.units)
            waiting = rows_that_wait(between, spare, count)
            again = 0.0 if waiting else count * self.call.each * units / 2  # run anew up to every unit
            memory = waiting * between + self._working(min(BATCH, count), spare)
            return both * (self.hessians(waiting or count) + again) + self.rounding, memory
        if isinstance(method, Learned):
            whole = method.unit == "model"
            own = 5 * self.parameters  # what moves, gradients, Adam's two moments, and what is computed with
            at_once = max(1, min(method.batch, int((spare - own) / (SLACK * max(self.kept, 1)))))
            capturing = min(method.inputs, rows) * self.call.each * (1 if whole else self.units)
            seconds = capturing + method.iterations * self.learning(method.batch)
            return seconds, own + SLACK * at_once * self.kept / (1 if whole else self.units)
        return 0.0, 0.0


def measure_costs(
    full: nn.Module, pipe: DiffusionPipeline, recipe: Recipe, sampling: Sampling, name: str | None = None
) -> Costs:
    """Measure what the parts of a recipe cost on a denoiser.

    Args:
        full: the denoiser in full precision, as it is calibrated.
        pipe: that it is the denoiser of.
        recipe: by which it will be quantized; counts may change afterwards, and methods be left out.
        sampling: how it samples.
        name: of the denoiser, where there are two.

    Raises:
        InputError: rows of the denoiser's calls cannot be told apart.
    """
    rows = first_rows(pipe, sampling, name)
    inputs = CalibrationInputs(rows[:1] * MANY, torch.zeros(MANY, dtype=torch.long))
    device, before = device_of(full), held(device_of(full))
    clock = _Clock(device)

    def call(model: nn.Module, count: int) -> None:
        args, kwargs = inputs.call(range(count))
        with torch.no_grad():
            model(*args, **kwargs)

    if clock.seconds(lambda: call(full, 1)) > QUICK:
        clock.many = 2
    whole = clock.line(lambda n: call(full, n), 1, 1)
    model: Any = copy_module(full, lambda tensor: tensor.detach())
    insert_quantizers(model, recipe)
    bring_like(model, full)
    for _, quantizer in activation_quantizers(model):
        quantizer.bypass()
    macs = call_macs(full, *inputs.call([0])[0], **inputs.call([0])[1])
    units = {unit: sum(n for layer, n in macs.items() if is_inside(layer, unit)) for unit in find_units(model)}
    unit = max(units, key=lambda each: units[each])
    part = _Part(model, full, unit, inputs, clock, units[unit] / max(1, sum(macs.values())))
    smooths, rounds = (any(isinstance(each, kind) for each in recipe.methods) for kind in (Smooth, Gptq))
    learns = any(isinstance(each, Learned | Widen | LowRank) for each in recipe.methods)
    nothing = _Line(0.0, 0.0)  # what the recipe has no method for is not tried
    return Costs(
        device=device,
        rows_a_sample=len(rows),
        call=whole,
        observing=part.observing(),
        smoothing=part.smoothing() if smooths else nothing,
        freezing=part.freezing(),
        hessians=part.hessians() if rounds else nothing,
        rounding=part.rounding() if rounds else 0.0,
        learning=part.learning() if learns else nothing,
        held=before,
        parameters=sum(p.numel() * p.element_size() for p in full.parameters()),
        live=live_bytes(full, [each for each, _ in full.named_modules()], inputs.call([0])),
        between=live_bytes(model, list(units), inputs.call([0])),
        kept=part.kept() if learns else 0,
        units=len(units),
        layers=len(list(quantized_layers(model))),
    )


class _Clock:
    """Measures seconds on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.many = device, MANY

    def seconds(self, work: Callable[[], object]) -> float:
        """Of work; of the quicker of two times, where it is short."""
        best = float("inf")
        for _ in range(2):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            best = min(best, time.perf_counter() - start)
            if best > 2:
                break
        return best

    def line(self, work: Callable[[int], object], by_rows: float, by_size: float) -> _Line:
        """Of work with one row and with several, of a part of the denoiser, scaled to all of it."""
        one, more = (self.seconds(partial(work, n)) for n in (1, self.many))
        each = max((more - one) / (self.many - 1), 0.05 * one)
        return _Line(max(0.0, one - each) * by_size, each * by_rows)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


class _Part:
    """One unit of a denoiser on which the parts of a recipe are tried, in the order of the methods below.

    Args:
        model: with quantizers that are bypassed.
        full: in full precision.
        unit: the unit's name.
        inputs: rows.
        clock: that measures.
        share: of the denoiser's multiply-accumulates.
    """

    def __init__(
        self, model: nn.Module, full: nn.Module, unit: str, inputs: CalibrationInputs, clock: _Clock, share: float
    ) -> None:
        self.module, self.clock = model.get_submodule(unit), clock
        everything = dict(quantized_layers(model))
        self.layers = {name: layer for name, layer in everything.items() if is_inside(name, unit)}
        self.full = {name: full_weight(full, name, layer) for name, layer in self.layers.items()}
        self.quantizers = [q for name, q in activation_quantizers(model) if is_inside(name, unit)]
        size = sum(layer.weight.numel() for layer in self.layers.values())
        self.by_size = sum(layer.weight.numel() for layer in everything.values()) / size
        self.by_rows = 1 / share
        self.by_quantizer = len(list(activation_quantizers(model))) / len(self.quantizers)
        self.calls = {n: reaching(model, unit, inputs.call(range(n))) for n in (1, clock.many)}

    def call(self, rows: int) -> Any:
        args, kwargs = self.calls[rows]
        return self.module(*args, **kwargs)

    def call_plainly(self, rows: int) -> None:
        with torch.no_grad():
            self.call(rows)

    def observing(self) -> float:
        plain = self.clock.seconds(lambda: self.call_plainly(self.clock.many))
        for quantizer in self.quantizers:
            quantizer.observe()
        return max(1.0, self.clock.seconds(lambda: self.call_plainly(self.clock.many)) / plain)

    def smoothing(self) -> _Line:
        given: dict[int, dict[str, torch.Tensor]] = {1: {}, self.clock.many: {}}
        for rows, inputs in given.items():

            def note(layer: Any, args: Any, name: str, inputs: dict[str, torch.Tensor] = inputs) -> None:
                inputs[name] = args[0].detach()

            hooks = (x.register_forward_pre_hook(partial(note, name=name)) for name, x in self.layers.items())
            with hooked(*hooks):
                self.call_plainly(rows)

        def search(rows: int) -> None:
            with torch.no_grad():
                for name, x in given[rows].items():
                    if self.layers[name].smooth_scale is not None:
                        with brought(self.layers[name]):
                            search_smoothing(self.layers[name], self.full[name].to(x.device), x, None)

        return self.clock.line(search, self.by_rows, self.by_size)

    def freezing(self) -> float:
        start = time.perf_counter()
        for module in self.module.modules():
            if isinstance(module, QuantLayer | AttentionProducts):
                module.freeze()
        return (time.perf_counter() - start) * self.by_quantizer

    def hessians(self) -> _Line:
        return self.clock.line(
            lambda n: moments_of(self.layers, lambda: self.call_plainly(n)), self.by_rows, self.by_size
        )

    def rounding(self) -> float:
        moments = moments_of(self.layers, lambda: self.call_plainly(1))
        return self.clock.seconds(lambda: round_layers(self.layers, self.full, moments, Gptq())) * self.by_size

    def learning(self) -> _Line:
        integers = {name: layer for name, layer in self.layers.items() if layer.weights.format == "int"}
        with brought(self.module):
            weights = {name: Straight(x, x.target_weight(self.full[name])) for name, x in integers.items()}
            scales = [LearnedScale(quantizer, 0.0) for quantizer in self.quantizers]

        def step(rows: int) -> None:
            with brought(self.module), torch.enable_grad(), self._learned(weights, scales):
                loss = sum(x.float().square().sum() for x in self._outputs(rows))
                loss.backward()  # type: ignore[union-attr]

        return self.clock.line(step, self.by_rows, self.by_size)

    def kept(self) -> int:
        """Bytes that each row keeps for gradients in the whole denoiser."""
        with brought(self.module):
            scales = [LearnedScale(quantizer, 0.0) for quantizer in self.quantizers]
        with brought(self.module), torch.enable_grad(), self._learned({}, scales):
            one, more = (kept_bytes(partial(self._outputs, n), self.module, []).all for n in (1, self.clock.many))
        return int((more - one) / (self.clock.many - 1) * self.by_rows)

    def _outputs(self, rows: int) -> list[torch.Tensor]:
        leaves = [x for x in tree_leaves(self.call(rows)) if isinstance(x, torch.Tensor)]
        return [x for x in leaves if x.requires_grad]

    @contextmanager
    def _learned(self, weights: Mapping[str, Straight], scales: list[LearnedScale]) -> Iterator[None]:
        """Weights and scales as they are while the denoiser is learned."""
        for scale in scales:
            scale.quantizer.learner = scale
        for name, weight in weights.items():
            self.layers[name].weight = weight.weight()
        try:
            yield
        finally:
            for scale in scales:
                scale.quantizer.learner = None
            for name in weights:
                self.layers[name].weight = self.layers[name].weight.detach()


def fitted(
    recipe: Recipe, budget: Budget, estimate: Callable[[Recipe], Estimate], rows: Callable[[int], int]
) -> tuple[Recipe, Estimate]:
    """A recipe that takes no more than a budget: fewer rows, and fewer steps of distilling or none.

    Args:
        recipe: as it was asked for.
        budget: what it may take.
        estimate: what a recipe takes.
        rows: of the denoiser's calls that so many calibration samples give.

    Returns:
        The recipe, itself where it fits, and what it takes.

    Raises:
        InputError: it cannot be cut down so far; the message says what it takes at least.
    """
    seconds = float("inf") if budget.minutes is None else 60 * budget.minutes * MARGIN
    memory = float("inf") if budget.memory is None else budget.memory
    whole = estimate(recipe)
    bare = replace(recipe, methods=tuple(method for method in recipe.methods if not isinstance(method, Distill)))
    if whole.memory > memory:
        recipe, whole = bare, estimate(bare)
    if whole.memory > memory:
        raise InputError(
            f"the recipe takes at least {whole.memory / 1e9:.1f} GB on this model, and {memory / 1e9:.1f} GB were "
            "given; give more, or a recipe with fewer methods"
        )
    if whole.seconds <= seconds:
        return recipe, whole
    cut = bare
    while estimate(cut).seconds > 0.75 * seconds:
        fewer = _halved(cut, rows)
        if fewer == cut:
            break
        cut = fewer
    taken = estimate(cut)
    if taken.seconds > seconds:
        raise InputError(
            f"the recipe takes at least {_duration(taken.seconds / MARGIN)} on this model and machine, and "
            f"{budget.minutes:g} minutes were given; give more, or a recipe with fewer methods"
        )
    distill = next((method for method in recipe.methods if isinstance(method, Distill)), None)
    if distill is None:
        return cut, taken
    for batch in (distill.batch, *(b for b in (32, 16, SMALLEST_BATCH) if b < distill.batch)):
        few = replace(distill, batch=batch, iterations=FEWEST_ITERATIONS, inputs=batch)
        least = estimate(replace(cut, methods=(*cut.methods, few)))
        more = estimate(replace(cut, methods=(*cut.methods, replace(few, iterations=2 * FEWEST_ITERATIONS))))
        step = (more.seconds - least.seconds) / FEWEST_ITERATIONS
        iterations = min(distill.iterations, FEWEST_ITERATIONS + int((seconds - least.seconds) / step))
        if iterations >= FEWEST_ITERATIONS:
            inputs = max(batch, min(distill.inputs, iterations * batch // 4))
            learned = replace(cut, methods=(*cut.methods, replace(few, iterations=iterations, inputs=inputs)))
            return learned, estimate(learned)
    return cut, taken


def _halved(recipe: Recipe, rows: Callable[[int], int]) -> Recipe:
    """A recipe with half the rows wherever it has more than the fewest."""
    samples = recipe.calibration_samples
    if samples > 1 and rows(samples // 2) >= FEWEST_ROWS:
        samples = samples // 2
    methods = tuple(
        replace(method, inputs=max(FEWEST_ROWS, method.inputs // 2))
        if isinstance(method, Gptq | Learned) and method.inputs > FEWEST_ROWS
        else method
        for method in recipe.methods
    )
    return replace(recipe, calibration_samples=samples, methods=methods)
