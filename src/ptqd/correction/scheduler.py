"""Schedulers that correct: a subclass made from the user's own scheduler class.

``isinstance``, ``config``, the signature of ``step`` and ``save_pretrained`` keep working; the correction is saved
inside ``scheduler_config.json``. A model output is corrected before ``step``; the noise that a step draws is scaled.
Nothing else of the step changes: its coefficients keep the original noise.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ptqd.components import denoiser_name, fingerprint, schedule_of, with_components
from ptqd.correction.correction import Correction
from ptqd.correction.fit import DEFAULT, fit_correction
from ptqd.errors import MismatchError
from ptqd.noise import NoiseStats, channel_axis
from ptqd.response import step_with_noise

_PREFIX = "Corrected"


class CorrectedStep:
    """What every corrected scheduler adds to the class it is made from."""

    correction: Correction
    plain_class: ClassVar[type[SchedulerMixin]]
    _position: int = 0

    def _start(self) -> None:
        self._position = 0
        wanted = [float(t) for t in self.timesteps]  # type: ignore[attr-defined]
        known = list(self.correction.timesteps)
        if wanted[-len(known) :] != known:  # image-to-image takes the last steps of a schedule
            raise MismatchError(
                f"the correction was measured on {len(self.correction.timesteps)} steps "
                f"({self.correction.timesteps[0]:g} to {self.correction.timesteps[-1]:g}), "
                f"the pipeline takes {len(wanted)} ({wanted[0]:g} to {wanted[-1]:g}); "
                "sample with the same steps, or measure again with these"
            )

    def _next_index(self, t: float) -> int:
        """Which step of the correction this is; a schedule may repeat a timestep."""
        try:
            index = self.correction.timesteps.index(t, self._position)
        except ValueError as error:
            message = f"the correction knows no step at timestep {t:g} here; measure this schedule"
            raise MismatchError(message) from error
        self._position = index + 1
        return index

    def _corrected(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The arguments of ``step`` with its output corrected, and the share of its noise to draw."""
        output, sample, t = arguments["model_output"], arguments["sample"], arguments["timestep"]
        index = self._next_index(float(t))
        axis = channel_axis(sample)
        channels = sample.shape[axis]  # a learned variance may follow them
        mean = self.correction.correct(output.narrow(axis, 0, channels), sample, index)
        if output.shape[axis] != channels:
            mean = torch.cat([mean, output.narrow(axis, channels, output.shape[axis] - channels)], dim=axis)
        arguments["model_output"] = mean
        if "eta" in arguments and arguments["eta"] != self.correction.eta:
            raise MismatchError(
                f"the correction was measured at eta {self.correction.eta:g}, "
                f"the pipeline runs at {arguments['eta']:g}; sample at the same eta, or measure again"
            )
        return arguments, self.correction.noise[index] if self.correction.noise else 1.0


@functools.cache
def corrected_class(base: type[SchedulerMixin]) -> type[SchedulerMixin]:
    """The correcting subclass of a scheduler class, ``CorrectedX`` of ``X``."""
    step_signature = inspect.signature(base.step)

    def __init__(self: Any, *args: Any, correction: dict[str, Any], **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(correction=correction)
        self.correction = Correction.from_dict(correction)

    parameters = list(inspect.signature(base.__init__).parameters.values())
    extra = inspect.Parameter("correction", inspect.Parameter.KEYWORD_ONLY)
    __init__.__signature__ = inspect.Signature([*parameters, extra])  # type: ignore[attr-defined]

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        if "correction" in vars(self):  # some schedules are set while the scheduler is made
            self._start()

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = step_signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        del arguments["self"]
        keywords = arguments.pop("kwargs", {})
        arguments, share = self._corrected(arguments)
        if share == 1:
            return base.step(self, **arguments, **keywords)

        def draw(*shape: Any, **how: Any) -> Any:
            return share * randn_tensor(*shape, **how)

        if arguments.get("variance_noise") is not None:
            arguments["variance_noise"] = share * arguments["variance_noise"]
        return step_with_noise(base.step, draw)(self, **arguments, **keywords)

    body = {
        "__init__": __init__,
        "set_timesteps": set_timesteps,
        "step": step,
        "plain_class": base,
        "__doc__": base.__doc__,
    }
    name = _PREFIX + base.__name__
    return type(name, (CorrectedStep, base), {**body, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """``CorrectedX`` for every diffusers scheduler ``X``: how ``from_pretrained`` finds the class it saved."""
    base = getattr(diffusers, name.removeprefix(_PREFIX), None)
    if name.startswith(_PREFIX) and isinstance(base, type) and issubclass(base, SchedulerMixin):
        return corrected_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def correct(
    qpipe: DiffusionPipeline,
    correction: Correction | NoiseStats,
    methods: Sequence[str] = DEFAULT,
) -> DiffusionPipeline:
    """A quantized pipeline whose scheduler corrects; everything else is shared and untouched.

    Args:
        qpipe: the pipeline the statistics were measured on; one that already corrects gets this correction instead.
        correction: what to do, or statistics to derive it from.
        methods: when statistics are given, which corrections to derive; see :func:`ptqd.fit_correction`.

    Raises:
        MismatchError: the statistics are of another model or scheduler.
        InputError: the statistics give no correction; see :func:`ptqd.fit_correction`.
    """
    if isinstance(correction, NoiseStats):
        correction = fit_correction(correction, methods)
    name = denoiser_name(qpipe)
    found = {"quantized": fingerprint(getattr(qpipe, name)), **schedule_of(qpipe)}
    for fact, value in found.items():
        if fact in correction.source and correction.source[fact] != value:
            what = f"another {name}" if fact == "quantized" else f"another scheduler ({fact} differs)"
            raise MismatchError(f"the statistics were measured on {what}; measure this pipeline, then correct it")
    base: type[SchedulerMixin] = type(qpipe.scheduler)
    if issubclass(base, CorrectedStep):
        base = base.plain_class
    corrected = corrected_class(base)  # type: ignore[arg-type]  # classes are hashable
    scheduler = corrected.from_config(qpipe.scheduler.config, correction=correction.to_dict())
    return with_components(qpipe, scheduler=scheduler)
