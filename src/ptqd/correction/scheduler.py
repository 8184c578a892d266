"""Schedulers that correct: a subclass made from the user's own scheduler class.

``isinstance``, ``config``, the signature of ``step`` and ``save_pretrained`` keep working; the correction is saved
inside ``scheduler_config.json``. A model output is corrected before ``step``; where the step draws noise, VSC scales
it.

With the step written as ``x_next = A x_t + B out + sigma z``, the corrected output's residual variance ``V'`` adds
``B^2 V'`` to the ``sigma^2`` that is drawn; so ``sigma_c^2 = max(0, sigma^2 - B^2 V')`` is drawn instead. Only the
drawn noise shrinks: the coefficients A and B keep the original sigma.
"""

import functools
import inspect
import math
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ptqd.components import denoiser_name, fingerprint, schedule_of, with_components
from ptqd.correction.ptqd import METHODS, Correction, Method
from ptqd.errors import InputError, MismatchError
from ptqd.noise import NoiseStats, channel_axis

_PREFIX = "Corrected"


def ddim_output_coefficient(a_t: float, a_s: float, sigma: float, prediction: str) -> float:
    """``B = d x_next / d output`` of DDIM's step (Song et al., arXiv 2010.02502, eq. 12).

        epsilon      sqrt(1 - a_s - sigma^2) - sqrt(a_s (1 - a_t) / a_t)
        v_prediction sqrt(a_t) sqrt(1 - a_s - sigma^2) - sqrt(1 - a_t) sqrt(a_s)
        sample       sqrt(a_s) - sqrt(1 - a_s - sigma^2) sqrt(a_t / (1 - a_t))

    Args:
        a_t: cumulative alpha product at this timestep.
        a_s: at the next one.
        sigma: standard deviation of the drawn noise.
        prediction: what the network predicts.
    """
    direction = math.sqrt(max(0.0, 1 - a_s - sigma**2))
    if prediction == "epsilon":
        return direction - math.sqrt(a_s * (1 - a_t) / a_t)
    if prediction == "v_prediction":
        return math.sqrt(a_t) * direction - math.sqrt(1 - a_t) * math.sqrt(a_s)
    return math.sqrt(a_s) - direction * math.sqrt(a_t / (1 - a_t))


def ddpm_output_coefficient(a_t: float, a_s: float, prediction: str) -> float:
    """``B = d x_next / d output`` of DDPM's step (Ho et al., arXiv 2006.11239, eq. 7 and 15).

    The mean is ``c_0 x_0 + c_t x_t`` with ``c_0 = sqrt(a_s) (1 - a_t / a_s) / (1 - a_t)``, and ``x_0`` is linear in the
    output; for epsilon this is ``-beta_t / (sqrt(alpha_t) sqrt(1 - a_t))``.

    Args:
        a_t: cumulative alpha product at this timestep.
        a_s: at the next one.
        prediction: what the network predicts.
    """
    c_0 = math.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
    if prediction == "epsilon":
        return -c_0 * math.sqrt((1 - a_t) / a_t)
    return c_0 if prediction == "sample" else -c_0 * math.sqrt(1 - a_t)


class CorrectedStep:
    """What every corrected scheduler adds to the class it is made from."""

    correction: Correction
    plain_class: ClassVar[type[SchedulerMixin]]
    _position: int = 0
    _removed: float = 0.0

    def _start(self) -> None:
        self._position = 0
        wanted = [float(t) for t in self.timesteps]  # type: ignore[attr-defined]
        if wanted != list(self.correction.timesteps):
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

    def _corrected_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``step``, with its output corrected and its noise calibrated."""
        output, sample, t = arguments["model_output"], arguments["sample"], arguments["timestep"]
        index = self._next_index(float(t))
        axis = channel_axis(sample)
        channels = sample.shape[axis]  # a learned variance may follow them
        mean = self.correction.correct(output.narrow(axis, 0, channels), index)
        if output.shape[axis] != channels:
            mean = torch.cat([mean, output.narrow(axis, channels, output.shape[axis] - channels)], dim=axis)
        arguments["model_output"] = mean
        if "eta" in arguments and arguments["eta"] != self.correction.eta:
            raise MismatchError(
                f"the correction was measured at eta {self.correction.eta:g}, "
                f"the pipeline runs at {arguments['eta']:g}; sample at the same eta, or measure again"
            )
        variance = self.correction.variance[index]
        if variance > 0:
            self._calibrate_noise(arguments, variance)
        return arguments

    def _calibrate_noise(self, arguments: dict[str, Any], variance: float) -> None:
        raise InputError(f"vsc knows DDIM and DDPM, not {type(self).__name__}; use cnc and bc alone")


class _CorrectedDDIM(CorrectedStep):
    def _calibrate_noise(self, arguments: dict[str, Any], variance: float) -> None:
        scheduler: Any = self
        t, eta = int(arguments["timestep"]), arguments["eta"]
        if eta == 0:
            return  # nothing is drawn
        s = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        a_t = float(scheduler.alphas_cumprod[t])
        a_s = float(scheduler.alphas_cumprod[s] if s >= 0 else scheduler.final_alpha_cumprod)
        sigma = eta * float(scheduler._get_variance(t, s)) ** 0.5
        b = ddim_output_coefficient(a_t, a_s, sigma, scheduler.config.prediction_type)
        noise = arguments["variance_noise"]
        if noise is None:
            output = arguments["model_output"]
            noise = randn_tensor(
                output.shape, generator=arguments["generator"], device=output.device, dtype=output.dtype
            )
        arguments["generator"] = None
        arguments["variance_noise"] = noise * reduced_noise(sigma, b, variance)


class _CorrectedDDPM(CorrectedStep):
    def _calibrate_noise(self, arguments: dict[str, Any], variance: float) -> None:
        scheduler: Any = self
        t = int(arguments["timestep"])
        s = int(scheduler.previous_timestep(t))
        a_t = float(scheduler.alphas_cumprod[t])
        a_s = float(scheduler.alphas_cumprod[s] if s >= 0 else scheduler.one)
        self._removed = ddpm_output_coefficient(a_t, a_s, scheduler.config.prediction_type) ** 2 * variance

    def _get_variance(self, t: int, predicted_variance: Any = None, variance_type: str | None = None) -> torch.Tensor:
        scheduler: Any = self
        value: torch.Tensor = super()._get_variance(t, predicted_variance, variance_type)  # type: ignore[misc]
        if self._removed == 0:
            return value
        kind = variance_type or scheduler.config.variance_type
        least = torch.finfo(value.dtype).tiny
        if kind == "fixed_small_log":  # a standard deviation
            return (value**2 - self._removed).clamp(min=least).sqrt()
        if kind == "learned_range":  # a log variance
            return (value.exp() - self._removed).clamp(min=least).log()
        return (value - self._removed).clamp(min=least)


def reduced_noise(sigma: float, b: float, variance: float) -> float:
    """``sigma_c / sigma``: what is left to draw once the residual's variance is counted (PTQD, section 4.2)."""
    return math.sqrt(max(0.0, sigma**2 - b**2 * variance)) / sigma if sigma else 1.0


@functools.cache
def corrected_class(base: type[SchedulerMixin]) -> type[SchedulerMixin]:
    """The correcting subclass of a scheduler class, ``CorrectedX`` of ``X``."""
    mixin = {DDIMScheduler: _CorrectedDDIM, DDPMScheduler: _CorrectedDDPM}.get(base, CorrectedStep)
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
        try:
            return base.step(self, **self._corrected_arguments(arguments), **keywords)
        finally:
            self._removed = 0.0

    body = {
        "__init__": __init__,
        "set_timesteps": set_timesteps,
        "step": step,
        "plain_class": base,
        "__doc__": base.__doc__,
    }
    name = _PREFIX + base.__name__
    return type(name, (mixin, base), {**body, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """``CorrectedX`` for every diffusers scheduler ``X``: how ``from_pretrained`` finds the class it saved."""
    base = getattr(diffusers, name.removeprefix(_PREFIX), None)
    if name.startswith(_PREFIX) and isinstance(base, type) and issubclass(base, SchedulerMixin):
        return corrected_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def vsc_applies(scheduler: SchedulerMixin) -> bool:
    """Whether VSC knows the noise that a scheduler draws."""
    return getattr(scheduler, "plain_class", type(scheduler)) in (DDIMScheduler, DDPMScheduler)


def correct(
    qpipe: DiffusionPipeline,
    correction: Correction | NoiseStats,
    methods: tuple[Method, ...] = METHODS,
) -> DiffusionPipeline:
    """A quantized pipeline whose scheduler corrects; everything else is shared and untouched.

    Args:
        qpipe: the pipeline the statistics were measured on; one that already corrects gets this correction instead.
        correction: what to do, or statistics to derive it from.
        methods: of ``"cnc"``, ``"bc"``, ``"vsc"``, when statistics are given.

    Raises:
        MismatchError: the statistics are of another model or scheduler.
        InputError: vsc with a scheduler other than DDIM or DDPM.
    """
    if isinstance(correction, NoiseStats):
        correction = Correction.fit(correction, methods)
    name = denoiser_name(qpipe)
    found = {"quantized": fingerprint(getattr(qpipe, name)), **schedule_of(qpipe)}
    for fact, value in found.items():
        if fact in correction.source and correction.source[fact] != value:
            what = f"another {name}" if fact == "quantized" else f"another scheduler ({fact} differs)"
            raise MismatchError(f"the statistics were measured on {what}; measure this pipeline, then correct it")
    base: type[SchedulerMixin] = type(qpipe.scheduler)
    if issubclass(base, CorrectedStep):
        base = base.plain_class
    if "vsc" in correction.methods and not vsc_applies(qpipe.scheduler):
        raise InputError(f"vsc knows DDIM and DDPM, not {base.__name__}; use methods cnc and bc")
    corrected = corrected_class(base)  # type: ignore[arg-type]  # classes are hashable
    scheduler = corrected.from_config(qpipe.scheduler.config, correction=correction.to_dict())
    return with_components(qpipe, scheduler=scheduler)
