"""Learned rounding of a quantized denoiser, unit by unit: AdaRound, BRECQ with QDrop, and the whole model at once.

Each unit minimises the squared distance between what it makes of the quantized model's inputs and what its
full-precision self makes of the full-precision model's (BRECQ, arXiv 2102.05426, eq. 10 without the Fisher weights, as
in Q-Diffusion). In memory are two models, the pool, one unit's learning and a batch; units' inputs are recomputed and
mapped from disk. Every batch follows from the method's seed, the unit and the iteration alone: a run that was killed
goes on with the same result.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqd import processes
from ptqd.diffusion.offload import brought
from ptqd.errors import InputError
from ptqd.files import is_whole, read_pickle, read_tensors, replacing, write_tensors
from ptqd.progress import track
from ptqd.quantization.blocks import find_units, inner_units
from ptqd.quantization.calibration import BATCH, CalibrationInputs
from ptqd.quantization.methods import Learned
from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv, find_layer, full_weight, plain_name
from ptqd.quantization.rounding.capture import UnsplittableError, capture, reached_in_order, units_in_order
from ptqd.quantization.rounding.learned_parameters import LearnedScale, LearnedWeight, Soft, Straight, annealed
from ptqd.quantization.rounding.registry import Task, handles
from ptqd.quantization.rounding.training_memory import RowsAtOnce, computed_again, kept_bytes, rows_at_once
from ptqd.quantization.sites import activation_quantizers, quantized_layers
from ptqd.quantization.step_ranges import range_steps_of

logger = logging.getLogger(__name__)

CHECKPOINT = 50  # iterations between two checkpoints
LEVELS = 16  # of the grid that a method's scale_rate is for
PART = 16  # rows, at most, of a whole denoiser's batch whose gradients are found at once: processes share the parts
PENALTY = 0.1  # of unrounded weights, against an error that starts at 1
_SCALE = "log_scale"


def learn(
    quantized: nn.Module,
    full: nn.Module,
    pool: CalibrationInputs,
    method: Learned,
    fixed: frozenset[str],
    scratch: Path,
    *,
    seed: int = 0,
    spare: int = sys.maxsize,
    at_once: int = BATCH,
    progress: str | None = None,
) -> None:
    """Learn a quantized denoiser's rounding, in place.

    Args:
        quantized: already rounded to nearest, with its ranges.
        full: the same denoiser in full precision.
        pool: rows of its calls.
        method: says which units, and how long.
        fixed: layers that stay as they are.
        scratch: keeps finished units, and the one at work, over a kill.
        seed: of batches and drops.
        spare: bytes that may be taken; a batch is learned from in parts that fit.
        at_once: rows of a call without gradients.
        progress: title of a bar.

    Raises:
        InputError: the pool has fewer rows than a batch.
    """
    if len(pool) < method.batch:
        raise InputError(
            f"the calibration has {len(pool)} inputs, fewer than a batch of {method.batch}; give more "
            "calibration_samples or steps, or a smaller batch"
        )
    pool = pool.first(method.inputs)
    units = units_of(quantized, method, pool)
    for number, unit in enumerate(track(units, progress)):
        done = scratch / f"{method.name}-{number:04d}.safetensors"
        layers = dict(quantized_layers(quantized.get_submodule(unit)))
        if not any(_full_name(unit, name) not in fixed for name in layers):
            continue
        known = read_tensors(done)[0] if is_whole(done) else None
        if method.unit == "model" and processes.is_shared():
            known = processes.as_main(known)
            if known is None:
                quantized.load_state_dict(processes.as_main(quantized.state_dict()))
        if known is None:
            folder = scratch / "inputs"
            try:
                with brought(quantized.get_submodule(unit)):
                    one = _Unit(quantized, full, unit, pool, method, fixed, folder, at_once)
                    one.learn(done, seed + 1000 * number, spare)
            except UnsplittableError:
                if not unit:
                    kind = type(full).__name__
                    raise InputError(
                        f"{kind} cannot be learned as a whole; take {method.name} out of the recipe"
                    ) from None
                inner = inner_units(unit, quantized.get_submodule(unit))
                units += reached_in_order(quantized, inner, pool)  # its parts, after the others
                if not inner:
                    logger.info("%s keeps codes rounded to nearest: its inputs are not one for each row", unit)
                continue
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        quantized.get_submodule(unit).load_state_dict(known or read_tensors(done)[0])


def units_of(model: nn.Module, method: Learned, pool: CalibrationInputs) -> list[str]:
    """The units of a method, in the order the denoiser reaches them."""
    if method.unit == "model":
        return [""]
    if method.unit == "block":
        return units_in_order(model, find_units(model), pool)
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantLayer | SplitConv)]
    whole = [name for name in layers if name.rpartition(".")[0] not in layers]  # halves are learned together
    return units_in_order(model, whole, pool)


def _full_name(unit: str, name: str) -> str:
    return plain_name(".".join(part for part in (unit, name) if part))


class _Unit:
    """One unit: its inputs and targets, and what is learned of it."""

    def __init__(
        self,
        quantized: nn.Module,
        full: nn.Module,
        unit: str,
        pool: CalibrationInputs,
        method: Learned,
        fixed: frozenset[str],
        folder: Path,
        at_once: int,
    ) -> None:
        self.module, self.method, self.pool = quantized.get_submodule(unit), method, pool
        self._kinds = pool.kinds()
        self.step_ranges = range_steps_of(quantized)
        self.device = next(self.module.buffers()).device
        whole = method.unit == "model"
        self._units = find_units(self.module) if whole else []
        self.exact, targets = capture(full, unit, pool, folder / "full", outputs=True, batch=at_once)
        assert targets is not None
        self.targets = targets
        self.inputs = self.exact if whole else capture(quantized, unit, pool, folder / "quantized", batch=at_once)[0]
        kind: Any = Straight if whole else Soft
        self.weights: dict[str, LearnedWeight] = {}
        self.scales: dict[str, LearnedScale] = {}
        for name, layer in quantized_layers(self.module):
            path = _full_name(unit, name)
            if path not in fixed:
                self.weights[name] = kind(layer, layer.target_weight(full_weight(full, path, layer)))
        for name, quantizer in activation_quantizers(self.module):
            if _full_name(unit, name).removesuffix(".input") not in fixed:
                self.scales[name] = LearnedScale(quantizer, method.drop)

    def learn(self, done: Path, seed: int, spare: int) -> None:
        """Learn, and write the unit's tensors; ``spare`` bytes may be taken."""
        method, named = self.method, self._named()
        whole = method.unit == "model"
        shared = whole and processes.is_shared()
        optimizer = torch.optim.Adam(self._rates(named))
        rates = [group["lr"] for group in optimizer.param_groups]
        checkpoint = done.with_suffix(".ckpt")
        with ExitStack() as stack:
            stack.enter_context(self._learning())
            plan = self._plan_memory(spare)
            if whole:
                plan = dataclasses.replace(plan, rows=min(plan.rows, PART))
            if shared:
                plan = processes.as_main(plan)
            with torch.no_grad():
                base = self._base(plan.rows)
            start, plan = _resume(checkpoint, named, optimizer, plan, shared=shared)
            if plan.again:
                stack.enter_context(computed_again(self.module, self._units))
            for iteration in range(start, method.iterations):
                progress = iteration / method.iterations
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress)) if whole else rate
                random = _generator(seed, iteration)
                rows = self._drawn(random)
                optimizer.zero_grad()
                parts = [rows[first : first + plan.rows] for first in range(0, len(rows), plan.rows)]
                if shared:
                    self._share_gradients(parts, base, seed, iteration)
                for number, part in enumerate([] if shared else parts):
                    chance = _generator(seed, iteration, number + 1) if whole else random
                    loss = self._error(part, chance) * (len(part) / len(rows)) / base
                    if not whole:
                        penalties = [weight.penalty(annealed(progress)) for weight in self.weights.values()]
                        loss = loss + PENALTY * torch.stack(penalties).mean() * (len(part) / len(rows))
                    loss.backward()
                optimizer.step()
                if (iteration + 1) % CHECKPOINT == 0 and not (shared and processes.number()):
                    _keep(checkpoint, iteration + 1, named, optimizer, plan)
        for weight in self.weights.values():
            weight.harden()
        for scale in self.scales.values():
            scale.harden()
        write_tensors(done, self.module.state_dict(), {"ptqd.unit": "learned"})
        checkpoint.unlink(missing_ok=True)

    def _share_gradients(self, parts: list[list[int]], base: torch.Tensor, seed: int, iteration: int) -> None:
        """Sum the gradients of a batch's parts, each of which one process finds, in the order of the parts."""
        parameters = list(self._named().values())
        sizes, rows = [p.numel() for p in parameters], sum(map(len, parts))
        for each in processes.rounds(range(len(parts))):
            found = []
            for number in processes.mine(each):
                chance = _generator(seed, iteration, number + 1)
                loss = self._error(parts[number], chance) * (len(parts[number]) / rows) / base
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                reached = torch.tensor([float(gradient is not None) for gradient in gradients], device=self.device)
                flat = [
                    p.new_zeros(p.numel()) if gradient is None else gradient.flatten()
                    for p, gradient in zip(parameters, gradients, strict=True)
                ]
                found.append(torch.cat([*(x.to(self.device, torch.float32) for x in flat), reached]))
            like = torch.empty(sum(sizes) + len(sizes), device=self.device)
            for flat_sum in processes.tensors_in_order(found, len(each), like):
                *own, reached = flat_sum.split([*sizes, len(sizes)])
                for parameter, gradient, there in zip(parameters, own, reached.tolist(), strict=True):
                    if there:  # what a part does not reach, such as an expert, does not move
                        part = gradient.view_as(parameter).to(parameter)
                        parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)

    def _plan_memory(self, spare: int) -> RowsAtOnce:
        """How many rows are learned from at once, with what is free beside the optimiser's own."""
        rows = self._kinds[0]
        one, two = (
            kept_bytes(lambda n=n: self._error([rows[0]] * n, None), self.module, self._units)  # type: ignore[misc]
            for n in (1, 2)
        )
        own = 3 * sum(p.numel() * p.element_size() for p in self._named().values())  # gradients, and Adam's moments
        plan = rows_at_once(one, two, self.method.batch, spare - own)
        if not plan.fits:
            logger.warning("%s may take more memory than there is: one row at a time is the least", self.method.name)
        return plan

    def _base(self, at_once: int) -> torch.Tensor:
        """The error before anything is learned, of a batch."""
        rows = self._kinds[0][: self.method.batch]
        parts = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
        errors = [self._error(part, None) * (len(part) / len(rows)) for part in parts]
        return torch.stack(errors).sum().clamp(min=1e-20)

    def _drawn(self, random: torch.Generator) -> list[int]:
        """A batch of rows, of the kind of one that is drawn from all."""
        first = int(torch.randint(len(self.pool), (1,), generator=random)) if len(self._kinds) > 1 else 0
        kind = next(rows for rows in self._kinds if first in rows) if len(self._kinds) > 1 else self._kinds[0]
        chosen = torch.randint(len(kind), (self.method.batch,), generator=random)
        return [kind[i] for i in chosen.tolist()]

    def _named(self) -> dict[str, nn.Parameter]:
        """All that moves."""
        named = {f"{n}.{k}": p for n, weight in self.weights.items() for k, p in weight.parameters().items()}
        return named | {f"{n}.{_SCALE}": scale.log_scale for n, scale in self.scales.items()}

    def _rates(self, named: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        """Adam's groups. Where weights' scales move, one of a finer grid moves less: its ends, by as many steps."""
        method, groups = self.method, dict[float, list[nn.Parameter]]()
        for name, parameter in named.items():
            rate, (layer, _, kind) = method.rate, name.rpartition(".")
            if kind == _SCALE:
                scale = self.scales.get(layer)
                grid = self.weights[layer].layer.weights.grid if scale is None else scale.quantizer.grids[scale.index]
                rate = method.scale_rate * (LEVELS / (grid.qmax - grid.qmin + 1) if method.unit == "model" else 1)
            groups.setdefault(rate, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Quantizers round as they learn, and nothing else takes gradients."""
        taking = [p for p in self.module.parameters() if p.requires_grad]
        self.module.requires_grad_(False)
        for scale in self.scales.values():
            scale.quantizer.learner = scale
        try:
            with torch.enable_grad():
                yield
        finally:
            for scale in self.scales.values():
                scale.quantizer.learner = None
            for parameter in taking:
                parameter.requires_grad_(True)

    def _error(self, rows: list[int], random: torch.Generator | None) -> torch.Tensor:
        """Mean over rows of the squared distance to what full precision makes; with drops, where there is chance."""
        leaves = self.inputs.rows(rows)
        if self.method.drop > 0 and random is not None and self.inputs is not self.exact:
            by_row = self.inputs.by_row(rows[0])
            for i, (leaf, exact) in enumerate(zip(leaves, self.exact.rows(rows), strict=True)):
                if by_row[i] and leaf.is_floating_point():
                    leaves[i] = torch.where(torch.rand(leaf.shape, generator=random) < self.method.drop, exact, leaf)
        moved: list[object] = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = self.inputs.tree(moved, rows[0])
        for scale in self.scales.values():
            scale.generator = random
        for name, weight in self.weights.items():
            find_layer(self.module, name).weight = weight.weight()
        if self.step_ranges is not None:
            self.step_ranges.set(self.pool.steps[rows].tolist())
        output = self.targets.flat(self.module(*args, **kwargs), rows[0])
        error = torch.zeros((), device=self.device)
        for out, target, factor in zip(output, self.targets.rows(rows), self.targets.by_row(rows[0]), strict=True):
            if factor:
                squares = (out.float() - target.to(out.device).float()).square().sum()
                error = error + squares.to(self.device) / len(rows)
        return error


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def _keep(
    path: Path, iteration: int, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, plan: RowsAtOnce
) -> None:
    state = {"iteration": iteration, "parameters": dict(named), "optimizer": optimizer.state_dict()}
    state["plan"] = dataclasses.asdict(plan)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _resume(
    path: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, plan: RowsAtOnce, *, shared: bool
) -> tuple[int, RowsAtOnce]:
    """Go on from a checkpoint: the iteration it was written after, 0 where there is none, and its rows at once.

    Of processes that share the work it is the main one's.
    """
    state = None
    if path.is_file():
        with contextlib.suppress(InputError):  # after a loss of power
            state = read_pickle(path)
    if shared:
        state = processes.as_main(state)
    if state is None:
        return 0, plan
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["iteration"]), RowsAtOnce(**state["plan"])


@handles(Learned)
def handle_learned(task: Task, method: Learned) -> None:
    """Learn by AdaRound, BRECQ or distillation."""
    inputs = task.rows(method.inputs)
    learn(
        task.model,
        task.full,
        inputs,
        method,
        task.exempt,
        task.scratch,
        seed=task.seed,
        spare=task.spare(),
        at_once=task.rows_at_once(),
        progress=task.title,
    )
