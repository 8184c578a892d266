"""Schedulers that correct: a subclass made from the user's own scheduler class.

``isinstance``, ``config``, the signature of ``step`` and ``save_pretrained`` keep working; the correction is saved
inside ``scheduler_config.json``. A model output is corrected before ``step``; the noise that a step draws is scaled.
Nothing else of the step changes: its coefficients keep the original noise.
"""

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ptqd.correction.correction import Correction, StepCorrector
from ptqd.correction.fit import DEFAULT, fit_correction
from ptqd.diffusion.fingerprints import (
    activation_bits_of,
    denoisers_fingerprint,
    own_config,
    schedule_of,
    simulated_by,
    structure_of,
)
from ptqd.diffusion.intercept import step_with_noise
from ptqd.diffusion.pipeline_parts import (
    calling_pipeline,
    copy_module,
    denoiser_name,
    denoisers_of,
    plain_scheduler,
    scheduler_of,
    with_components,
)
from ptqd.diffusion.step_state import StepState
from ptqd.diffusion.trajectory import one_timestep
from ptqd.errors import InputError, MismatchError
from ptqd.noise.measured_on import MeasuredOn
from ptqd.noise.stats import NoiseStats

logger = logging.getLogger(__name__)

_PREFIX = "Corrected"


_noise_share: ContextVar[float] = ContextVar("noise_share", default=1.0)  # of the step that is being taken


def _draw_share(*shape: object, **how: object) -> Any:
    """As much of the noise as the step being taken is to draw."""
    return _noise_share.get() * randn_tensor(*shape, **how)


class CorrectedStep:
    """What every corrected scheduler adds to the class it is made from."""

    correction: Correction
    plain_class: ClassVar[type[SchedulerMixin]]
    timesteps: torch.Tensor  # the plain class's
    _corrector: StepCorrector
    _position: int = 0
    _structure: str | None = None  # of the denoiser that is corrected, where that is known
    _adapters: tuple[str, ...] = ()
    _own: torch.Tensor | None = None  # the schedule's timesteps, where the denoiser gets others

    def _start(self) -> None:
        self._position, self._own = 0, None
        pipe, guidance = calling_pipeline()
        self._check_guidance(guidance)
        if pipe is not None:
            self._check_denoiser(pipe)
        required = [float(t) for t in self.timesteps]
        known = list(self.correction.timesteps)
        if not _holds(required, known):  # some pipelines take a part of a schedule: its end, or its beginning
            raise MismatchError(
                f"the correction was measured on {len(known)} steps ({known[0]:g} to {known[-1]:g}), the pipeline "
                f"takes {len(required)} ({required[0]:g} to {required[-1]:g}); {self._way_out(len(required))}"
            )
        if self.correction.model_timesteps:
            if len(required) != len(known):
                raise MismatchError(
                    "stepbaq gives the denoiser other timesteps, of a whole schedule; use another method"
                )
            self._own = self.timesteps
            self.timesteps = torch.tensor(self.correction.model_timesteps, dtype=torch.float32, device=self._own.device)

    def _way_out(self, steps: int) -> str:
        """What to do about another schedule."""
        config: Any = self.config  # type: ignore[attr-defined]
        if config.get("use_dynamic_shifting") and steps == len(self.correction.timesteps):
            return (
                "its schedule depends on the image's size (use_dynamic_shifting): sample at the size that was "
                "measured, or measure again at this one"
            )
        return (
            "sample with the same steps, measure again with these, or carry the statistics over: ptqd.correct(..., "
            f"steps={steps})"
        )

    def _check_guidance(self, given: Mapping[str, float]) -> None:
        """Refuse guidance that was not measured.

        Raises:
            MismatchError: some argument of the pipeline's call has another value.
        """
        on = self.correction.measured_on
        measured = {**({} if on.guidance is None else {"guidance_scale": on.guidance}), **on.scales}
        for name, value in given.items():
            if name in measured and value != measured[name]:
                raise MismatchError(
                    f"the correction was measured at {name.replace('_', ' ')} {measured[name]:g}, the pipeline runs at "
                    f"{value:g}; sample at the same scale, or measure again"
                )

    def watch_denoiser(self, pipe: DiffusionPipeline) -> None:
        """Know what the pipeline's denoiser consists of, to notice when it is another."""
        self._structure, self._adapters = structure_of(pipe), _adapters_of(pipe)

    def _check_denoiser(self, pipe: DiffusionPipeline) -> None:
        """Refuse a denoiser that was exchanged or changed since the pipeline was corrected; a LoRA is only told.

        Raises:
            MismatchError: so it is.
        """
        if self._structure is not None and structure_of(pipe) != self._structure:
            raise MismatchError(
                "the denoiser is no longer the one that was measured: layers were added, taken away or exchanged (an "
                "IP-Adapter, another model, other bits, a LoRA that was fused); undo that, or measure the pipeline as "
                "it is now and correct it"
            )
        adapters = _adapters_of(pipe)
        if self._structure is not None and adapters != self._adapters:
            self._adapters = adapters
            logger.warning(
                "the correction was measured with other LoRAs than are loaded now (%s); measure with them to be exact",
                ", ".join(adapters) or "none",
            )

    @contextmanager
    def _own_timesteps(self, t: Any) -> Iterator[Any]:
        """The schedule's own timesteps inside the block, and the one that stands for ``t`` there."""
        if self._own is None:
            yield t
            return
        shifted = self.timesteps
        places = (shifted[self._position :] == float(t)).nonzero()
        if len(places) == 0:
            raise MismatchError(f"the denoiser never got a step at timestep {float(t):g}; use another method")
        self.timesteps = self._own
        try:
            yield self._own[self._position + int(places[0])]
        finally:
            self.timesteps = shifted

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
        output, sample, t = arguments["model_output"], arguments["sample"], one_timestep(arguments["timestep"])
        index = self._next_index(float(t))
        axis = self.correction.axis(sample)
        channels = sample.shape[axis]  # a learned variance may follow them
        mean = self._corrector(output.narrow(axis, 0, channels), sample, index)
        if output.shape[axis] != channels:
            mean = torch.cat([mean, output.narrow(axis, channels, output.shape[axis] - channels)], dim=axis)
        arguments["model_output"] = mean
        if "eta" in arguments and arguments["eta"] != self.correction.eta:
            raise MismatchError(
                f"the correction was measured at eta {self.correction.eta:g}, "
                f"the pipeline runs at {arguments['eta']:g}; sample at the same eta, or measure again"
            )
        return arguments, self.correction.noise[index] if self.correction.noise else 1.0


class _Stored(dict[str, Any]):
    """A correction in a configuration; what diffusers says when a plain scheduler is made of that names the remedy."""

    def __repr__(self) -> str:
        return "<what ptqd corrects; to keep it, load the pipeline with ptqd.load>"


def _adapters_of(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The names of the LoRAs on a pipeline's denoisers."""
    return tuple(name for model in denoisers_of(pipe).values() for name in getattr(model, "peft_config", None) or ())


def _holds(steps: Sequence[float], part: Sequence[float]) -> bool:
    """Whether neighbouring steps of a schedule are these."""
    return any(list(steps[i : i + len(part)]) == list(part) for i in range(len(steps) - len(part) + 1))


@functools.cache
def corrected_class(base: type[SchedulerMixin]) -> type[SchedulerMixin]:
    """The correcting subclass of a scheduler class, ``CorrectedX`` of ``X``."""
    step_signature = inspect.signature(base.step)
    step_with_share = step_with_noise(base.step, _draw_share)

    def __init__(self: Any, *args: Any, correction: dict[str, Any], **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(correction=_Stored(correction))
        self.correction = Correction.from_dict(correction)
        self._corrector = self.correction.corrector()

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
        with self._own_timesteps(arguments["timestep"]) as arguments["timestep"]:
            arguments, share = self._corrected(arguments)
            if share == 1:
                return base.step(self, **arguments, **keywords)
            if arguments.get("variance_noise") is not None:
                arguments["variance_noise"] = share * arguments["variance_noise"]
            before = _noise_share.set(share)
            try:
                return step_with_share(self, **arguments, **keywords)
            finally:
                _noise_share.reset(before)

    def scale_model_input(self: Any, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        with self._own_timesteps(timestep) as own:
            return base.scale_model_input(self, sample, own)  # type: ignore[no-any-return]

    body: dict[str, Any] = {
        "__init__": __init__,
        "set_timesteps": set_timesteps,
        "step": step,
        "plain_class": base,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "scale_model_input"):
        body["scale_model_input"] = functools.wraps(base.scale_model_input)(scale_model_input)
    name = _PREFIX + base.__name__
    return type(name, (CorrectedStep, base), {**body, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """``CorrectedX`` for every diffusers scheduler ``X``: how ``from_pretrained`` finds the class it saved."""
    base = getattr(diffusers, name.removeprefix(_PREFIX), None)
    if name.startswith(_PREFIX) and isinstance(base, type) and issubclass(base, SchedulerMixin):
        return corrected_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def apply_correction(
    qpipe: DiffusionPipeline,
    correction: Correction | NoiseStats,
    methods: Sequence[str] = DEFAULT,
    *,
    steps: int | None = None,
) -> DiffusionPipeline:
    """A quantized pipeline whose scheduler corrects; everything else is shared and untouched.

    Args:
        qpipe: the pipeline the statistics were measured on; one that already corrects gets this correction instead.
        correction: what to do, or statistics to derive it from.
        methods: when statistics are given, which corrections to derive; see :func:`ptqd.fit_correction`.
        steps: when statistics are given, how many steps will be taken, if not as many as were measured: the statistics
            are then interpolated over log-SNR, and the log says so.

    Raises:
        MismatchError: the statistics are of another model or scheduler.
        InputError: the statistics give no correction; see :func:`ptqd.fit_correction`.
    """
    if isinstance(correction, NoiseStats):
        check_measured_on(qpipe, correction.measured_on)
        if steps is not None:
            correction = at_steps(correction, qpipe.scheduler, steps)
        correction = fit_correction(correction, methods)
    check_measured_on(qpipe, correction.measured_on)
    corrected = corrected_class(plain_class_of(qpipe.scheduler))  # type: ignore[arg-type]  # classes are hashable
    scheduler = corrected.from_config(qpipe.scheduler.config, correction=correction.to_dict())
    return connect(with_components(qpipe, scheduler=scheduler))


def connect(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that corrects, its scheduler and its plan knowing what they need of each other.

    The scheduler notices when the denoiser is another. Where a correction gives the denoiser other timesteps and bits
    follow a plan, the pipeline gets a denoiser of its own that shares all tensors, with the plan's steps by the
    timesteps that it will get.

    Args:
        pipe: its scheduler corrects.

    Raises:
        MismatchError: the plan is for another number of steps.
    """
    correction = pipe.scheduler.correction
    shifted = correction.model_timesteps
    for name, denoiser in denoisers_of(pipe).items():
        state = StepState.of(denoiser)
        if state is None or state.plan is None or not shifted:
            continue
        planned = state.plan.timesteps
        if len(shifted) != len(planned):
            raise MismatchError(f"the plan is for {len(planned)} steps, the correction for {len(shifted)}")
        model = copy_module(denoiser, lambda tensor: tensor)  # other pipelines may share the denoiser
        triples = zip(shifted, correction.timesteps, planned, strict=True)
        own: Any = StepState.of(model)
        own.aliases = {got * mine / t if t else got: mine for got, t, mine in triples}
        pipe = with_components(pipe, **{name: model})
    pipe.scheduler.watch_denoiser(pipe)
    return pipe


def plain_class_of(scheduler: SchedulerMixin) -> type[SchedulerMixin]:
    """The class of a scheduler, without the correction it may have."""
    kind = type(scheduler)
    return kind.plain_class if issubclass(kind, CorrectedStep) else kind


def at_steps(stats: NoiseStats, scheduler: SchedulerMixin, steps: int) -> NoiseStats:
    """Statistics carried over to another number of steps of the same scheduler; see :meth:`ptqd.NoiseStats.at`."""
    plain = plain_scheduler(scheduler)
    if steps == stats.measured_on.steps:
        return stats
    try:
        plain.set_timesteps(stats.measured_on.steps)
        same = [float(t) for t in plain.timesteps] == stats.timesteps.tolist()
        plain.set_timesteps(steps)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise InputError(f"the pipeline takes a schedule of its own, that of {steps} steps is not known; measure them")
    there = stats.at(plain)
    if there is not stats:
        logger.warning(
            "statistics of %d steps are applied at %d, interpolated over log-SNR; measure at %d to be exact",
            stats.measured_on.steps,
            steps,
            steps,
        )
    return there


def check_measured_on(qpipe: DiffusionPipeline, measured: MeasuredOn) -> None:
    """Whether statistics of what was measured there are of this pipeline.

    Raises:
        MismatchError: they are of another model, or of another scheduler or configuration.
    """
    result: dict[str, Any] = schedule_of(qpipe) if measured.scheduler else {}
    known: dict[str, Any] = {fact: getattr(measured, fact) for fact in ("quantized", "activation_bits", "scheduler")}
    known["config"] = own_config(type(scheduler_of(qpipe)), measured.config)
    if measured.quantized is not None:
        result["activation_bits"] = activation_bits_of(qpipe)
        if measured.quantized != simulated_by(qpipe):  # else an engine computes what was measured
            result["quantized"] = denoisers_fingerprint(qpipe)
    whats = {"quantized": f"on another {denoiser_name(qpipe)}", "activation_bits": "at other activation bits"}
    for fact in ("quantized", "activation_bits", "scheduler", "config"):
        if fact in result and known[fact] != result[fact]:
            what = whats.get(fact, f"on another scheduler ({fact} differs)")
            raise MismatchError(f"the statistics were measured {what}; measure this pipeline, then correct it")
