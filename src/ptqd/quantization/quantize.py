"""A model and a Recipe give a quantized model; what matched and what did not is reported."""

import copy
import hashlib
import json
import logging
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd import processes
from ptqd.diffusion.call_rows import first_rows
from ptqd.diffusion.macs import Macs, call_macs, steps_called
from ptqd.diffusion.offload import bring_like
from ptqd.diffusion.pipeline_parts import (
    copy_module,
    denoiser_names,
    denoiser_of,
    denoisers_of,
    scheduler_of,
    with_components,
    with_denoisers,
)
from ptqd.diffusion.plain_copy import check_weights_are_here
from ptqd.diffusion.sampling import Sampling
from ptqd.diffusion.several_devices import align_devices
from ptqd.diffusion.step_state import StepIndex
from ptqd.errors import InputError
from ptqd.files import make_folder, read_json, release_pages, write_text
from ptqd.names import shown
from ptqd.progress import announce, track
from ptqd.quantization.activation_profile import ActivationProfile
from ptqd.quantization.bops import by_halves
from ptqd.quantization.branch_ranks import branch_ranks
from ptqd.quantization.budget import Budget, device_of, release_memory, rows_that_fit
from ptqd.quantization.calibration import (
    BATCH,
    ERROR_SAMPLES,
    Calibration,
    CalibrationInputs,
    as_calibrated,
    calibrate,
    draw_inputs,
    measured_errors,
    step_weights,
)
from ptqd.quantization.checkpoints import PassCheckpoint
from ptqd.quantization.estimate import Estimate, fitted, measure_costs
from ptqd.quantization.hf_quantizer import PtqdConfig, PtqdQuantizer
from ptqd.quantization.methods import OBSERVED, LowRank, Method, Widen
from ptqd.quantization.modules.attention import PRODUCTS
from ptqd.quantization.numerics.observer import Observer
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.rounding import time_embedding
from ptqd.quantization.rounding.registry import Task, apply_method
from ptqd.quantization.sites import layer_quantizers, quantized_layers, quantized_sites
from ptqd.quantization.step_ranges import StepRanges, group_steps, set_ranges
from ptqd.quantization.swap import Coverage, check_full_precision, check_weights, insert_quantizers, names_of
from ptqd.quantization.weights_in_memory import choose_weights
from ptqd.quantization.widen import widened
from ptqd.schema import read_as

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # rounding is learned by gradients
def quantize(
    pipe: DiffusionPipeline,
    recipe: str | Recipe,
    sampling: Sampling,
    *,
    scratch: str | Path | None = None,
    budget: Budget | None = None,
    progress: bool = False,
) -> DiffusionPipeline:
    """Quantize a pipeline's denoiser, or both where it has two.

    Ranges and all that is learned come from ``recipe.calibration_samples`` whole trajectories of the full-precision
    pipeline: each layer sees exactly the inputs it really gets, guidance included, drawn over the sampling steps as the
    recipe says.

    Args:
        pipe: any diffusers pipeline with a UNet or transformer, as it is in use: offloaded, compiled, with LoRAs or
            cast layers; it is left untouched.
        recipe: a shorthand such as ``"w4a8"``, a TOML file, or a Recipe.
        sampling: how it samples.
        scratch: a folder that keeps what is done over a kill, written every minute: the same call goes on from there,
            with the same result. It belongs to this pipeline, recipe and run, and is left to the caller to delete.
        budget: memory and minutes that it may take; without it the recipe as it is, in the memory that is free.
        progress: show a bar.

    Returns:
        A pipeline of the same class that shares every other component with ``pipe``. ``save_pretrained`` writes
        packed integer codes; :func:`ptqd.load` loads it again. Inside :func:`ptqd.processes.together` every process
        has it: they share trajectories and the rows that are learned from, and do the rest each for itself.

    Raises:
        InputError: a model that is already quantized, NaN weights or activations, a rule that matches nothing, groups
            that do not fit a layer, or fewer calibration inputs than a batch.
    """
    recipe = Recipe.parse(recipe)
    recipe.check_steps(sampling.steps)
    processes.check_alike({"recipe": json.dumps(recipe.to_dict()), "run": _facts(sampling)})
    names = denoiser_names(pipe)
    for name, model in denoisers_of(pipe).items():
        check_weights_are_here(model)
        check_full_precision(model, name)
        check_weights(model, name)
    scheduler_of(pipe)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            folder = Path(scratch or temporary) / ("" if len(names) == 1 else name)
            if processes.is_shared() and processes.number():
                folder = folder / f"process-{processes.number()}"
            parts[name] = _Quantizing(
                pipe, name, recipe, sampling, folder, budget or Budget(), keeps=scratch is not None, progress=progress
            ).go()
    return with_denoisers(pipe, **parts, scheduler=copy.deepcopy(scheduler_of(pipe)))


def _facts(sampling: Sampling) -> str:
    """What a run depends on, but for arguments of its call that are no plain values."""
    return json.dumps(sampling.to_dict(), sort_keys=True, default=lambda value: type(value).__name__)


UNSEEN = 4  # samples, at least, whose calls show what ranges do to new samples
BUCKETS = 64  # of steps, at most, whose activations are observed apart: a histogram each


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter on the same memory, of which there may not be room for another; a copy of a buffer."""
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _observers_by_step(steps: int) -> list[Observer]:
    """An observer for each step; of long runs, neighbouring steps share one."""
    buckets = [Observer() for _ in range(min(steps, BUCKETS))]
    return [buckets[step * len(buckets) // steps] for step in range(steps)]


@dataclass(frozen=True)
class _Seen:
    """What the observers of one of a layer's quantizers saw, by step where that is needed."""

    layer: str
    observers: list[Observer]
    is_static: bool


class _Quantizing:
    """One denoiser of a call of :func:`quantize`: its parts, in the order they come."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        name: str,
        recipe: Recipe,
        sampling: Sampling,
        scratch: Path,
        budget: Budget,
        *,
        keeps: bool,
        progress: bool,
    ) -> None:
        self.name, self.recipe, self.scratch, self.progress = name, recipe, scratch, progress
        self.budget, self.keeps = budget, keeps
        self.full: nn.Module = as_calibrated(denoiser_of(pipe, name))
        self.pipe = with_components(pipe, **{name: self.full})
        run = sampling.with_seed_for("calibration")
        self.run = run.replace(samples=recipe.calibration_samples, batch=min(run.batch, processes.SHARED_BATCH))
        self.drawn = recipe.calibration_steps != "uniform"  # ranges are found on drawn rows
        self.unreached: set[str] = set()  # layers that no call reaches
        self.steps: list[int] | None = None  # of the run at which the denoiser is called, where that is known

    def go(self) -> nn.Module:
        self._prepare()
        calibration, seen = self._calibrate()
        observed = self._without_unreached(seen)
        ranges = self._step_ranges(calibration.profile, observed)
        quantized, coverage = self._inserted(ranges)
        model: Any = getattr(quantized, self.name)
        self._take_over(model, observed, ranges)
        if self._widen(model, ranges):
            quantized, coverage = self._inserted(ranges)
            model = getattr(quantized, self.name)
            self._take_over(model, observed, ranges)
        for method in self.recipe.methods:
            if method.changes_layers and not isinstance(method, Widen):
                if isinstance(method, LowRank) and method.by_layer:
                    self._choose_ranks(method, model)
                self._apply(method, model, calibration.inputs)
        self._find_ranges(model, calibration, ranges)
        temporal = frozenset(ranges.temporal) if ranges is not None else frozenset[str]()
        if temporal and calibration.profile is not None:
            time_embedding.fit_temporal(model, self.full, calibration.profile, temporal)
        for method in self.recipe.methods:
            if not method.changes_layers:
                self._apply(method, model, calibration.inputs, temporal)
        config = PtqdConfig(self.recipe.to_dict(), ranges=None if ranges is None else ranges.to_dict())
        PtqdQuantizer(config).adopt(model, coverage)
        return model  # type: ignore[no-any-return]

    def _prepare(self) -> None:
        """Find out how many samples give the rows that are needed, what it all takes, and what fits into the budget."""
        self.recipe, batch = processes.by_main(self._decided)
        self.run = self.run.replace(samples=self.recipe.calibration_samples, batch=batch)
        text = json.dumps(self.recipe.to_dict(), sort_keys=True)
        self.kept = self.scratch / hashlib.sha256(text.encode()).hexdigest()[:16]

    def _decided(self) -> tuple[Recipe, int]:
        """The recipe that fits into the budget, and how many samples are run at once."""
        decided = self.scratch / "decided.json"
        if decided.is_file():  # before a kill
            known = read_json(decided)
            return Recipe.from_dict(known["recipe"]), known["batch"]
        if self.recipe.calibration_rows or self.budget != Budget() or (self.progress and self.recipe.methods):
            self._decide()
            if self.budget.minutes is not None and self.keeps:
                write_text(decided, json.dumps({"recipe": self.recipe.to_dict(), "batch": self.run.batch}))
        return self.recipe, self.run.batch

    def _decide(self) -> None:
        steps = len(steps_called(self.pipe, self.run)[self.name])
        if not steps:
            raise InputError(f"the run never calls the {self.name}; sample with more steps, or leave it out")
        a_sample = steps * len(first_rows(self.pipe, self.run, self.name))
        samples = max(self.recipe.calibration_samples, -(-self.recipe.calibration_rows // a_sample))
        self.recipe = replace(self.recipe, calibration_samples=samples)
        if self.budget == Budget() and not self.progress:
            return
        try:
            costs = measure_costs(self.full, self.pipe, self.recipe, self.run, self.name)
        except Exception as error:
            if self.budget != Budget():
                raise
            logger.warning("what the recipe takes cannot be told beforehand: %s", error)  # which stops nothing
            return
        if self.budget.memory is not None:  # the batch changes no result
            self.run = self.run.replace(batch=min(self.run.batch, costs.samples_at_once(self.budget)))

        def estimate(recipe: Recipe) -> Estimate:
            return costs.estimate(recipe, self.run, steps, self.budget)

        self.recipe, taken = fitted(self.recipe, self.budget, estimate, lambda samples: samples * a_sample)
        if self.progress:
            announce(f"quantizing the {self.name} takes {taken}")

    def _checkpoint(self, name: str, observers: list[Observer]) -> PassCheckpoint:
        """Of a pass, before a kill."""
        return PassCheckpoint(self.kept / name if self.keeps else None, observers, device_of(self.full))

    def _share(self) -> str:
        """Which samples are this process's, for a name."""
        shared = processes.is_shared()
        return f"-{processes.number()}-of-{processes.count()}-by-{self.run.batch}" if shared else ""

    def _title(self, text: str) -> str | None:
        return text if self.progress else None

    def _inserted(self, ranges: StepRanges | None) -> tuple[DiffusionPipeline, Coverage]:
        """The pipeline with quantizers that are still to find their ranges."""
        model = copy_module(self.full, _shared)
        coverage = insert_quantizers(model, self.recipe, ranges)
        if self.unreached:
            model = copy_module(self.full, _shared)
            kept = [name for name in coverage.quantized if name.removesuffix(f".{PRODUCTS}") not in self.unreached]
            insert_quantizers(model, self.recipe, ranges, kept)
            why = [(name, "no calibration call reaches it") for name in coverage.quantized if name not in kept]
            coverage = Coverage(tuple(kept), (*coverage.skipped, *why))
        for parameter in model.parameters():  # of layers that stay as they are
            parameter.data = parameter.data.clone()
        choose_weights(model, "auto")
        align_devices(model)
        bring_like(model, self.full)
        if ranges is not None:
            set_ranges(model, ranges)
        parts: dict[str, Any] = {self.name: model, "scheduler": copy.deepcopy(scheduler_of(self.pipe))}
        return with_components(self.pipe, **parts), coverage

    def _calibrate(self) -> tuple[Calibration, list[_Seen]]:
        """The one pass over the trajectories, and what each quantizer's observers saw."""
        recipe = self.recipe
        rows = self._rows()
        by_step = recipe.step_ranges > 1
        weights, steps = None, 0
        if rows or by_step:
            errors = self._errors() if recipe.calibration_steps == "error" else None
            calls = steps_called(self.pipe, self.run)
            self.steps = calls[self.name]
            if not self.steps:
                raise InputError(f"the run never calls the {self.name}; sample with more steps, or leave it out")
            steps = len(self.steps)
            if rows:
                total = 1 + max(max(each, default=0) for each in calls.values())
                weights = step_weights(recipe.calibration_steps, total, errors)[self.steps]
                weights = weights / weights.sum()
        quantized, _ = self._inserted(None)
        quantizers = list(layer_quantizers(getattr(quantized, self.name)))
        index = StepIndex()
        for _, quantizer in quantizers:
            quantizer.observe(_observers_by_step(steps) if by_step and quantizer.is_static else None)
            if by_step:
                quantizer.step = index
        observers = [observer for _, quantizer in quantizers for observer in quantizer.observers]
        calibration = calibrate(
            quantized,
            self.run,
            rows=rows,
            weights=weights,
            profile=recipe.time_embedding or by_step,
            index=index if by_step else None,
            progress=self._title("calibrating"),
            name=self.name,
            steps=self.steps,
            checkpoint=self._checkpoint(f"calibration{self._share()}", observers),
        )
        return calibration, [_Seen(name, quantizer.observers, quantizer.is_static) for name, quantizer in quantizers]

    def _without_unreached(self, quantizers: list[_Seen]) -> list[list[Observer]]:
        """Leave layers in full precision that no call reached; experts get the ranges of their siblings instead."""
        near: dict[str, list[Observer]] = {}
        for seen in quantizers:
            reached = [observer for observer in seen.observers if observer.low <= observer.high]
            near.setdefault(_siblings(seen.layer), []).extend(reached)
        result: list[list[Observer]] = []
        for seen in quantizers:
            empty = seen.is_static and all(observer.low > observer.high for observer in seen.observers)
            siblings = near[_siblings(seen.layer)] if "expert" in seen.layer else []
            if empty and not siblings:
                self.unreached.add(seen.layer)
            result.append([Observer.merged(siblings)] * len(seen.observers) if empty and siblings else seen.observers)
        if self.unreached == {seen.layer for seen in quantizers}:
            raise InputError(f"the run never calls the {self.name}; sample with more steps, or leave it out")
        if self.unreached:
            names = sorted(self.unreached)
            logger.warning(
                "no calibration call reaches %d layers of %s, which stay in full precision: %s; calibrate with a call "
                "that reaches them to quantize them too",
                len(names),
                self.name,
                shown(", ".join(names)),
            )
        return [own for seen, own in zip(quantizers, result, strict=True) if seen.layer not in self.unreached]

    def _rows(self) -> int:
        """How many rows of the denoiser's calls the recipe needs."""
        dynamic = self.recipe.activations.dynamic
        return max([method.rows(dynamic=dynamic) for method in self.recipe.methods] + [OBSERVED * self.drawn])

    def _errors(self) -> torch.Tensor:
        """What plain rounding changes at each step (T,)."""
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
        return measured_errors(self.pipe, rounded, self.run.replace(samples=few))

    def _step_ranges(self, profile: ActivationProfile | None, observed: list[list[Observer]]) -> StepRanges | None:
        """Groups of steps with ranges of their own, and the layers with one for every step."""
        if profile is None:
            return None
        if not profile.timesteps:
            raise InputError(
                f"{type(self.full).__name__} is told no timestep, so its ranges cannot follow the steps; "
                "leave step_ranges at 1 and time_embedding out"
            )
        groups = (0,) * len(profile.timesteps)
        if self.recipe.step_ranges > 1:
            always = [seen for seen in observed if seen and all(o.low <= o.high for o in seen)]
            widths = [[seen[step].high - seen[step].low for seen in always] for step in range(len(groups))]
            groups = group_steps(torch.tensor(widths, dtype=torch.float64), self.recipe.step_ranges)
        temporal = tuple(profile.temporal) if self.recipe.time_embedding else ()
        return StepRanges(profile.timesteps, groups, temporal)

    def _take_over(self, model: nn.Module, observed: list[list[Observer]], ranges: StepRanges | None) -> None:
        """Give what was observed to the quantizers that keep it; bypassed until their ranges are found."""
        for (name, quantizer), seen in zip(layer_quantizers(model), observed, strict=True):
            if quantizer.is_static:
                grouped = seen
                if len(seen) > 1 and ranges is not None and name not in ranges.temporal:  # by step
                    groups = ranges.groups if quantizer.ranges > 1 else (0,) * len(seen)
                    members: list[dict[int, Observer]] = [{} for _ in range(quantizer.ranges)]
                    for observer, group in zip(seen, groups, strict=True):
                        members[group][id(observer)] = observer  # neighbouring steps may share one
                    grouped = [Observer.merged(list(member.values())) for member in members]
                elif quantizer.ranges > 1 or len(seen) > 1:  # a range for every step, which is not observed
                    grouped = []
                quantizer.observe(grouped)
            quantizer.bypass()

    def _unseen(self, count: int) -> CalibrationInputs:
        """Rows of calls for samples that nothing was calibrated on."""
        assert self.steps is not None
        a_sample = len(self.steps) * len(first_rows(self.pipe, self.run, self.name))
        samples = max(UNSEEN, -(-count // a_sample))
        few = self.run.with_seed_for("unseen").replace(samples=samples)
        return draw_inputs(
            self.pipe, few, count, step_weights("uniform", len(self.steps)), name=self.name, steps=self.steps
        )

    def _widen(self, model: nn.Module, ranges: StepRanges | None) -> bool:
        """Let the recipe give some layers' activations more bits, if it has a method for it; whether it did."""
        method = next((each for each in self.recipe.methods if isinstance(each, Widen)), None)
        if method is None:
            return False
        before, decided = self.recipe, self.kept / "widened.json"
        known = processes.by_main(lambda: read_json(decided) if decided.is_file() else None)
        if known is not None:  # before a kill
            self.recipe = Recipe.from_dict(known)
            return self.recipe.rules != before.rules
        inputs = self._unseen(method.inputs)
        counts = self._macs(model, inputs)
        exempt = self._exempt(model, method.name) | frozenset(() if ranges is None else ranges.temporal)
        title = self._title(method.name)
        wide = widened(before, method, model, inputs, counts, exempt, seed=self.run.seed, title=title)
        self.recipe = processes.as_main(wide)
        if self.keeps:
            make_folder(self.kept)
            write_text(decided, json.dumps(self.recipe.to_dict()))
        return self.recipe.rules != before.rules

    def _macs(self, model: nn.Module, inputs: CalibrationInputs) -> dict[str, float]:
        """Multiply-accumulates of a row's call, by layer, halves of split ones each."""
        args, kwargs = inputs.call([0])
        macs = by_halves(Macs.of([call_macs(self.full, *args, **kwargs)]), model)
        return dict(zip(macs.layers, macs.counts.sum(0).tolist(), strict=True))

    def _choose_ranks(self, method: LowRank, model: nn.Module) -> None:
        """Make room for each layer's branch, and let the recipe say its rank."""
        decided = self.kept / "ranks.json"
        remedy = "delete the folder, and quantize again"
        known = processes.by_main(lambda: read_as(decided, dict[str, int], remedy) if decided.is_file() else None)
        if known is not None:  # before a kill
            ranks = known
        else:
            inputs = self._unseen(method.inputs)
            exempt = frozenset(
                name
                for name, layer in quantized_layers(model)
                if (rule := self.recipe.rule_for(names_of(name), layer.kind)) is not None and rule.rank is not None
            )
            title = self._title("ranks")
            counts = self._macs(model, inputs)
            ranks = processes.as_main(branch_ranks(model, inputs, counts, exempt, seed=self.run.seed, title=title))
            if self.keeps:
                make_folder(self.kept)
                write_text(decided, json.dumps(ranks))
        layers = dict(quantized_layers(model))
        rules = []
        for name, rank in ranks.items():
            layer = layers[name]
            if rank != layer.rank:
                layer.make_low_rank(rank, layer.rank_bits, layer.codes.device)
                rules.append(self.recipe.rule_of(names_of(name), layer.kind, rank=rank))
        self.recipe = replace(self.recipe, rules=(*self.recipe.rules, *rules))

    def _exempt(self, model: nn.Module, method: str) -> frozenset[str]:
        """Layers that a rule keeps from a method."""
        rules = {name: self.recipe.rule_for(names_of(name), layer.kind) for name, layer in quantized_layers(model)}
        return frozenset(name for name, rule in rules.items() if rule is not None and method in rule.without)

    def _apply(
        self, method: Method, model: nn.Module, inputs: CalibrationInputs | None, exempt: frozenset[str] = frozenset()
    ) -> None:
        """Let a method do what it does."""
        folder, title = self.kept / method.name, self._title(method.name)
        exempt |= self._exempt(model, method.name)
        task = Task(model, self.full, inputs, exempt, folder, self.run.seed, title, self.budget, self.keeps)
        apply_method(task, method)

    def _find_ranges(self, model: nn.Module, calibration: Calibration, ranges: StepRanges | None) -> None:
        """Fix ranges and round weights to nearest.

        Ranges that were observed before smoothing changed the activations, or that the recipe wants of drawn steps, are
        observed on the drawn rows.
        """
        temporal = () if ranges is None else ranges.temporal
        for name, layer in quantized_layers(model):
            if name in temporal and layer.input.ranges > 1 and calibration.profile is not None:
                x = calibration.profile.temporal[name].to(layer.weight)
                layer.input.set_static_range(layer.smoothed(x).float().cpu())
        smoothed = {layer.input for _, layer in quantized_layers(model) if layer.smooth_scale is not None}
        again = [
            quantizer
            for name, quantizer in layer_quantizers(model)
            if quantizer.is_static and (self.drawn or quantizer in smoothed) and name not in temporal
        ]
        for quantizer in again:
            quantizer.observe()
        if again:
            assert calibration.inputs is not None
            row = calibration.inputs.call(calibration.inputs.kinds()[0][:1])
            at_once = rows_that_fit(model, row, self.budget.spare(device_of(model)), BATCH)
            observers = [observer for quantizer in again for observer in quantizer.observers]
            checkpoint = self._checkpoint(f"observing-{at_once}", observers)
            batches = list(calibration.inputs.batches(at_once))
            with torch.no_grad():
                for rows in track(batches[checkpoint.done :], self._title("observing")):
                    args, kwargs = calibration.inputs.call(rows)
                    model(*args, **kwargs)
                    done = checkpoint.done + 1
                    checkpoint.keep(done, (), {}, last=done == len(batches))
        for site in track(list(quantized_sites(model)), self._title("finding ranges")):
            full = None if site.weight is None else site.weight.weight
            site.module.freeze()
            if full is not None and site.weight is not None and site.weight.holds_codes:
                release_pages(full)
                release_memory()


def _siblings(name: str) -> str:
    """What the experts of a layer have in common."""
    return re.sub(r"\.[0-9]+(?=\.|$)", ".*", name)
