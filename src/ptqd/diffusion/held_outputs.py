"""Steps at which a denoiser is not called: its output is the one of the last step at which it was, or goes on from the
last two. Or only its outer blocks are, and its deep part holds what it gave (:mod:`ptqd.diffusion.deep_part`).

A step may call its denoiser more than once, as guidance does; each call then holds what the calls in its place gave. A
call that lacks what it holds is computed: the first of a run that begins midway, or one of a sample of another shape.
Threads hold outputs of their own, so that runs which take turns do not mix.

The denoiser's class is what changes, as a hook cannot leave out the call: its subclass is otherwise its own class.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ptqd.diffusion.deep_part import Features, follow_deep_part, leave_deep_part, using
from ptqd.diffusion.pipeline_parts import calling_pipeline

_Output = tuple[torch.Size | None, Any]


@dataclass(frozen=True)
class Place:
    """Where a call stands.

    Attributes:
        step: that it belongs to.
        weights: of the last outputs, the last one first, where the step holds: one or two; none where it computes.
        shallow: whether it computes the outer blocks only.
    """

    step: int
    weights: Sequence[float] = ()
    shallow: bool = False


@dataclass
class _Run:
    """What one run has computed so far; a pipeline's next one has a schedule of its own."""

    schedule: Any = None
    step: int = -1
    calls: int = 0  # of this step
    outputs: list[_Output] = field(default_factory=list)  # of the last step that was computed
    earlier: list[_Output] = field(default_factory=list)  # of the one before it
    features: list[Features] = field(default_factory=list)  # of the last step whose deep part was computed


class HeldOutputs:
    """The outputs that a denoiser holds.

    Args:
        enter: tells what follows the steps about a call, and gives where it stands.
        deep: whether some step computes the outer blocks only.
    """

    def __init__(self, enter: Callable[[nn.Module, Any, Any], Place], *, deep: bool = False) -> None:
        self._enter, self.deep = enter, deep
        self._runs: weakref.WeakKeyDictionary[threading.Thread, _Run] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies hold nothing yet."""
        return functools.partial(HeldOutputs, deep=self.deep), (self._enter,)

    @torch.compiler.disable
    def before(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Features | None]:
        """The output that a call holds, None where it is to be computed; then, what its deep part gives or keeps."""
        place = self._enter(model, args, kwargs)
        step, weights = place.step, place.weights
        schedule = getattr(getattr(calling_pipeline()[0], "scheduler", None), "timesteps", None)
        run = self._runs.setdefault(threading.current_thread(), _Run(schedule))
        if schedule is not run.schedule or step < run.step:
            self._runs[threading.current_thread()] = run = _Run(schedule)
        if step != run.step:
            run.step, run.calls = step, 0
            if not weights:
                run.earlier, run.outputs = run.outputs, []
                if not place.shallow:
                    run.features = []
        run.calls += 1
        used = [outputs[run.calls - 1 : run.calls] for outputs in (run.outputs, run.earlier)[: len(weights)]]
        here = _sample_shape(args, kwargs)
        if not weights or not all(found and found[0][0] == here for found in used):
            return None, self._features(run, here, shallow=place.shallow) if self.deep else None
        last, *before = (found[0][1] for found in used)
        return _sum(weights, last, before[0]) if before else _own(last), None

    def _features(self, run: _Run, here: torch.Size | None, *, shallow: bool) -> Features:
        """Those that a call holds, where they are of a sample of its shape; else new ones, to be kept."""
        at = run.calls - 1
        if shallow and len(run.features) > at and run.features[at].shape == here:
            return replace(run.features[at], known=True)
        features = Features(here)
        run.features[at:] = [features]
        return features

    @torch.compiler.disable
    def after(self, args: Any, kwargs: Any, output: Any) -> None:
        """Keep what a call computed."""
        run = self._runs[threading.current_thread()]
        if len(run.outputs) >= run.calls:  # of another shape
            run.outputs = run.outputs[: run.calls - 1]
        if len(run.outputs) == run.calls - 1:
            run.outputs.append((_sample_shape(args, kwargs), _own(output)))


class _Holding:
    """What a denoiser's class is given."""

    proxy_for: ClassVar[type[nn.Module]]
    held_outputs: HeldOutputs

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickle knows no classes that are made; the denoiser's own is."""
        return _made_again, (type(self).proxy_for,), vars(self)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        held, features = self.held_outputs.before(self, args, kwargs)
        if held is not None:
            return held
        with using(features):
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        self.held_outputs.after(args, kwargs, output)
        return output


def _made_again(kind: Any) -> Any:
    holding = _holding(kind)
    return holding.__new__(holding)


def hold_outputs(model: nn.Module, held: HeldOutputs) -> None:
    """Let a denoiser hold outputs from now on, or what its deep part gives.

    Raises:
        InputError: its deep part is to be held, and it is not known which that is.
    """
    stop_holding(model)
    if held.deep:
        follow_deep_part(model)
    kind: Any = type(model)
    model.__class__ = _holding(kind)
    vars(model)["held_outputs"] = held


def stop_holding(model: nn.Module) -> None:
    """Let a denoiser compute at every step."""
    leave_deep_part(model)
    if isinstance(model, _Holding):
        model.__class__ = type(model).proxy_for  # type: ignore[assignment]
        vars(model).pop("held_outputs", None)


@functools.cache
def _holding(kind: type[nn.Module]) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Holding, kind), {**names, "proxy_for": kind})


def _sample_shape(args: Any, kwargs: Any) -> torch.Size | None:
    """Of the sample, which comes first; conditions may come and go from step to step, as adapters' do."""
    tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    return next((x.shape for x in tensors if x.ndim > 1), None)


def _own(output: Any) -> Any:
    """An output in tensors of its own: some pipelines change it in place."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, output)


def _sum(weights: Sequence[float], last: Any, before: Any) -> Any:
    """Two outputs times their weights; what is no floating-point tensor is the last one's."""

    def weighted(x: Any, y: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        return (weights[0] * x.to(wide) + weights[1] * y.to(wide)).to(x.dtype)

    return tree_map(weighted, last, before)
