"""A model and a Recipe give a quantized model; what matched and what did not is reported."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.pipeline_parts import denoiser_name, scheduler_of, with_components
from ptqd.diffusion.sampling import Sampling, run_batch, sample
from ptqd.diffusion.trajectory import record
from ptqd.errors import InputError
from ptqd.progress import track
from ptqd.quantization.activation_profile import Survey, survey
from ptqd.quantization.calibration import ERROR_SAMPLES, Pool, draw_pool, measured_errors, step_weights
from ptqd.quantization.hf_quantizer import PtqdConfig, PtqdQuantizer
from ptqd.quantization.methods import Gptq, Learned, LowRank, Smooth
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.rounding import adaround_brecq as learned
from ptqd.quantization.rounding import smoothquant as smooth
from ptqd.quantization.rounding import svdquant
from ptqd.quantization.rounding import time_embedding as columns
from ptqd.quantization.step_ranges import StepRanges, set_ranges
from ptqd.quantization.swap import Coverage, check_weights, insert_quantizers, names_of, quant_modules

OBSERVED = 1024  # rows that ranges are found on, where steps are drawn
BATCH = 64  # rows at once


def quantize(
    pipe: DiffusionPipeline, recipe: str | Recipe, run: Sampling, *, scratch: Path | None = None, progress: bool = False
) -> DiffusionPipeline:
    """Quantize a pipeline's denoiser.

    Ranges and all that is learned come from ``recipe.calibration_samples`` whole trajectories of the full-precision
    pipeline: each layer sees exactly the inputs it really gets, guidance included, drawn over the sampling steps as the
    recipe says.

    Args:
        pipe: any diffusers pipeline with a UNet or transformer; it is left untouched.
        recipe: a shorthand such as ``"w4a8"``, a TOML file, or a Recipe.
        run: how it samples.
        scratch: a folder that keeps what was learned over a kill: the same call goes on from there, with the same
            result. It belongs to this pipeline, recipe and run, and is left to the caller to delete.
        progress: show a bar.

    Returns:
        A pipeline of the same class that shares every other component with ``pipe``. ``save_pretrained`` writes
        packed integer codes; :func:`ptqd.load` loads it again.

    Raises:
        InputError: NaN weights or activations, a rule that matches nothing, groups that do not fit a layer, or fewer
            calibration inputs than a batch.
    """
    recipe = Recipe.parse(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        return _Quantizing(pipe, recipe, run, scratch or Path(temporary), progress).go()


class _Quantizing:
    """One call of :func:`quantize`: its parts, in the order they come."""

    def __init__(self, pipe: DiffusionPipeline, recipe: Recipe, run: Sampling, scratch: Path, progress: bool) -> None:
        self.pipe, self.recipe, self.scratch, self.progress = pipe, recipe, scratch, progress
        self.name = denoiser_name(pipe)
        self.full: nn.Module = getattr(pipe, self.name)
        check_weights(self.full, self.name)
        self.run = run.apart("calibration").replace(samples=recipe.calibration_samples)

    def go(self) -> DiffusionPipeline:
        recipe = self.recipe
        found = self._survey() if recipe.time_embedding or recipe.step_ranges > 1 else None
        ranges = None if found is None else found.ranges(recipe.step_ranges, exact=recipe.time_embedding)
        quantized, coverage = self._inserted(ranges)
        model = getattr(quantized, self.name)
        drawn = recipe.calibration_steps != "uniform"
        wanted = [method.inputs for method in recipe.methods if not isinstance(method, LowRank | Smooth)]
        wanted += [BATCH] * any(isinstance(method, Smooth) for method in recipe.methods) + [OBSERVED] * drawn
        pool = self._pool(max(wanted)) if wanted else None
        self._prepare(model, pool)
        self._find_ranges(quantized, pool if drawn else None, found, ranges)
        temporal = frozenset(ranges.temporal) if ranges is not None else frozenset[str]()
        if temporal:
            columns.fit_temporal(quantized, self.full, self.run, temporal, found.temporal if found else {})
        for method in recipe.methods:
            fixed = temporal | self._passed_over(model, method.name)
            if isinstance(method, Gptq):
                assert pool is not None
                columns.fit_columns(
                    model, self.full, pool.first(method.inputs), method, fixed, self._title(method.name)
                )
            elif isinstance(method, Learned):
                assert pool is not None
                kept = self.scratch / method.name
                learned.learn(
                    model, self.full, pool, method, fixed, kept, seed=self.run.seed, progress=self._title(method.name)
                )
        config = PtqdConfig(recipe.to_dict(), ranges=None if ranges is None else ranges.to_dict())
        PtqdQuantizer(config).adopt(model, coverage)
        return quantized

    def _title(self, text: str) -> str | None:
        return text if self.progress else None

    def _inserted(self, ranges: StepRanges | None) -> tuple[DiffusionPipeline, Coverage]:
        """The pipeline with quantizers that are still to find their ranges."""
        model = copy.deepcopy(self.full)
        coverage = insert_quantizers(model, self.recipe, ranges)
        if ranges is not None:
            set_ranges(model, ranges)
        parts: dict[str, Any] = {self.name: model, "scheduler": copy.deepcopy(scheduler_of(self.pipe))}
        return with_components(self.pipe, **parts), coverage

    def _survey(self) -> Survey:
        quantized, _ = self._inserted(None)
        for module in quant_modules(getattr(quantized, self.name)):
            module.observe()
        found = survey(quantized, self.run)
        if not found.timesteps:
            raise InputError(
                f"{type(self.full).__name__} is told no timestep, so its ranges cannot follow the steps; "
                "leave step_ranges at 1 and time_embedding out"
            )
        return found

    def _pool(self, rows: int) -> Pool:
        """The denoiser's inputs that are learned from."""
        errors = None
        if self.recipe.calibration_steps == "error":
            few = min(ERROR_SAMPLES, self.run.samples)
            plain = replace(
                self.recipe,
                methods=(),
                step_bits=(),
                step_ranges=1,
                time_embedding=False,
                calibration_steps="uniform",
                calibration_samples=few,
                rules=tuple(replace(rule, without=()) for rule in self.recipe.rules),
            )
            rounded = quantize(self.pipe, plain, self.run)
            errors = measured_errors(self.pipe, rounded, self.run.replace(samples=few))
        steps = self._steps() if errors is None else len(errors)
        weights = step_weights(self.recipe.calibration_steps, steps, errors)
        return draw_pool(self.pipe, self.run, rows, weights, progress=self._title("drawing calibration inputs"))

    def _steps(self) -> int:
        """How often the scheduler steps in a run."""
        with record(self.pipe) as trajectory:
            run_batch(self.pipe, self.run, range(1), "latent")
        return len(trajectory.timesteps)

    def _passed_over(self, model: nn.Module, method: str) -> frozenset[str]:
        """Layers that a rule keeps from a method."""
        passed = set()
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLayer):
                rule = self.recipe.rule_for(names_of(name), layer.kind)
                if rule is not None and method in rule.without:
                    passed.add(name)
        return frozenset(passed)

    def _prepare(self, model: nn.Module, pool: Pool | None) -> None:
        """What changes weights before they are rounded: smoothing and low-rank branches."""
        for module in quant_modules(model):
            module.observe()  # in full precision
        for method in self.recipe.methods:
            if isinstance(method, Smooth):
                assert pool is not None
                smooth.fit_smoothing(model, self.full, pool.first(BATCH), method, self._title("smoothing"))
            elif isinstance(method, LowRank):
                svdquant.fit_low_rank(model, self.full, self.run.seed)

    def _find_ranges(
        self, quantized: DiffusionPipeline, pool: Pool | None, found: Survey | None, ranges: StepRanges | None
    ) -> None:
        """Observe, then freeze: ranges fixed, weights rounded to nearest."""
        model = getattr(quantized, self.name)
        modules = quant_modules(model)
        for module in modules:
            module.observe()
        if found is not None and ranges is not None:
            for name in ranges.temporal:
                layer: Any = model.get_submodule(name)
                if layer.input.ranges > 1:
                    layer.input.fix(layer.smoothed(found.temporal[name].to(layer.weight)).float().cpu())
        title = self._title("calibrating")
        if pool is None:
            for _ in sample(quantized, self.run, output="latent", progress=title):
                pass
        else:
            with torch.no_grad():
                for rows in track(list(pool.batches(BATCH)), title):
                    args, kwargs = pool.call(rows)
                    model(*args, **kwargs)
        for module in track(modules, self._title("finding ranges")):
            module.freeze()
