"""Options that several verbs share. Nothing here imports torch before a verb runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

    from ptqd.diffusion.sampling import Sampling
    from ptqd.experiments.plan_request import PlanRequest
    from ptqd.metrics.evaluator import Evaluator

MODEL_HELP = "fashion-ldm, -ddpm, -dit or -flow, a diffusers pipeline's folder, or a hub id"
METHODS_HELP = (
    "auto, or trajectory; or by name, for the mean cnc,bc, cnc-channel,bc, tac, d2 or joint, and for the variance vsc, "
    "dns, qdrift or stepbaq; or one that you registered"
)
DEVICE_HELP = "cuda, mps or cpu (default: the first there is)"
BUILT_IN = ("fashion", "inception", "none", "hub")  # whose weights ptqd knows
SAMPLING = Group("Sampling", sort_key=2)
JUDGING = Group("Judging", sort_key=3)
PLANNING = Group("Bits by step", sort_key=1)

Device = Annotated[str | None, Parameter(help=DEVICE_HELP)]
Offload = Annotated[
    bool,
    Parameter(help="for a small device: a model is there only while it computes, and is quantized layer by layer"),
]
Precision = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[
    Precision | None,
    Parameter(
        help="of the floating-point weights (default: the one that a quantized pipeline is stored in, float32 of any "
        "other); the one of a large model's files maps them"
    ),
]
Others = Annotated[
    Literal["fp32", "int8", "none"],
    Parameter(help="decoders and text encoders: in full precision, as int8, or left to torch"),
]


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How one sample is made."""

    steps: Annotated[int | None, Parameter(help="denoising steps (default: the pipeline's own)")] = None
    eta: Annotated[float, Parameter(help="noise of DDIM's step")] = 0.0
    guidance: Annotated[float | None, Parameter(help="guidance scale (default: the pipeline's)")] = None
    scheduler: Annotated[str | None, Parameter(help="a diffusers scheduler class to use instead of the pipeline's")] = (
        None
    )
    call: Annotated[
        tuple[str, ...],
        Parameter(
            help="NAME=JSON, a further argument of the pipeline's call, a list one value a sample; may be given again"
        ),
    ] = ()
    shared: Annotated[
        tuple[str, ...], Parameter(help="NAME=JSON, the same, a list whole for every batch; may be given again")
    ] = ()

    def check(self) -> None:
        """Refuse, before anything is loaded, what cannot be.

        Raises:
            InputError: a number, a name or an argument of the call that is none.
        """
        from ptqd.errors import InputError
        from ptqd.loading import scheduler_class

        if self.guidance is not None and not -1e6 < self.guidance < 1e6:
            raise InputError(f"--guidance must be a finite number; got {self.guidance}")
        call = call_arguments(self.call) | call_arguments(self.shared, "--shared")
        if self.guidance is not None and "guidance_scale" in call:
            raise InputError("--guidance and --call guidance_scale are one thing; give one of them")
        self.sampling(None)
        scheduler_class(self.scheduler)

    def sampling(
        self, pipe: "DiffusionPipeline | None", *, samples: int = 1, batch: int = 1, seed: int = 0
    ) -> "Sampling":
        """How a pipeline is run; or, of None, a denoiser on its own."""
        from ptqd.diffusion.sampling import SCHEDULES, Sampling, default_call, default_steps
        from ptqd.errors import InputError

        shared = call_arguments(self.shared, "--shared")
        defaults = {} if pipe is None else default_call(pipe)
        call: dict[str, Any] = {name: value for name, value in defaults.items() if name not in shared}
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        call |= call_arguments(self.call)
        both = call | shared
        schedules = {name: both[name] for name in SCHEDULES if isinstance(both.get(name), list)}
        for name, schedule in schedules.items():
            if self.steps not in (None, len(schedule)):
                raise InputError(f"--steps {self.steps} and the {len(schedule)} {name} are one thing; give one of them")
        steps = self.steps if self.steps is not None else next(map(len, schedules.values()), None)
        if steps is None:
            steps = Sampling.steps if pipe is None else default_steps(pipe)
        return Sampling(steps, self.eta, samples, batch, seed, call, shared)


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ScheduleOptions):
    """How many samples are made, where and from what seeds."""

    batch: Annotated[int, Parameter(help="at once; never changes results")] = 64
    seed: Annotated[int, Parameter(help="sample i's seed comes from this and i")] = 0
    device: Device = None
    offload: Offload = False
    dtype: Dtype = None

    def check_all(self, samples: int = 1) -> None:
        """Refuse, before anything is loaded, what cannot be; see :meth:`check`.

        Raises:
            InputError: so it is.
        """
        from ptqd.loading import check_device

        self.check()
        self.sampling(None, samples=samples, batch=self.batch, seed=self.seed)
        check_device(self.device, offload=self.offload)

    def of(self, pipe: "DiffusionPipeline", samples: int) -> "Sampling":
        """How a pipeline is run for so many samples."""
        return self.sampling(pipe, samples=samples, batch=self.batch, seed=self.seed)

    def load(self, model: str | Path) -> "DiffusionPipeline":
        """A pipeline, with the wanted scheduler, on the wanted device."""
        return load_pipeline(model, self.scheduler, self.device, self.dtype, offload=self.offload)

    def load_both(self, model: str | Path, quantized: str | Path) -> "tuple[DiffusionPipeline, DiffusionPipeline]":
        """A pipeline and what it was quantized to, in one type: the one that the quantized one has."""
        from ptqd.diffusion.pipeline_parts import denoiser_of

        second = self.load(quantized)
        dtype: Any = str(denoiser_of(second).dtype).removeprefix("torch.")
        return replace(self, dtype=dtype).load(model), second


@Parameter(name="*", group=JUDGING)
@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """What images are judged by."""

    judge: Annotated[
        str | None,
        Parameter(
            help="features: fashion, none, inception (or its weights' file), or an image encoder of transformers"
        ),
    ] = None
    reference: Annotated[
        Path | None,
        Parameter(
            help="what images are compared with: a folder of images, a dataset's folder or hub id (with :SPLIT), .npz, "
            "or .safetensors (default: fashion's test images)"
        ),
    ] = None
    lpips: Annotated[
        str | None,
        Parameter(help="LPIPS to images of the same seeds too: its weights' folder, or 'hub' for torch hub's"),
    ] = None
    clip: Annotated[
        str | None, Parameter(help="CLIP score of prompts too: a CLIP of transformers, folder or hub id")
    ] = None

    def load(self, default: str, device: str | None = None, *, needs_reference: bool = True) -> "Evaluator | None":
        """What judges; None where nothing was asked for."""
        from ptqd import processes
        from ptqd.loading import best_device
        from ptqd.metrics.load_evaluator import load_evaluator

        return load_evaluator(
            self.judge or default,
            reference=self.reference,
            lpips=self.lpips,
            clip=self.clip,
            device=processes.device() or device or best_device(),
            needs_reference=needs_reference,
        )


@Parameter(name="*", group=PLANNING)
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which plan is wanted; the kind is the verb's."""

    budget: Annotated[
        str | None, Parameter(help="auto: 19.9x, so many times fewer bit operations than FP32; 2x-seconds, faster")
    ] = None
    floor: Annotated[
        str | None, Parameter(help="auto: instead, 25dB, the final sample's SNR against full precision")
    ] = None
    weights: Annotated[str | None, Parameter(help="auto: 4,6,8, bits that each layer's weights may get too")] = None
    groups: Annotated[int | None, Parameter(help="auto: of layers with bits of their own; 1: all alike")] = None
    hold: Annotated[
        bool, Parameter(negative="", help="auto: steps may hold the last output, for no operations and no time")
    ] = False
    hold_deep: Annotated[
        bool, Parameter(negative="", help="auto: steps may compute the network's outer blocks only, the rest held")
    ] = False

    @property
    def any(self) -> bool:
        """Whether one of them was given."""
        others = (self.budget, self.floor, self.weights, self.groups)
        return self.hold or self.hold_deep or any(value is not None for value in others)

    def request(self, kind: str, weights: str | None = None) -> "PlanRequest":
        """The plan that is asked for."""
        from ptqd.experiments.plan_request import PlanRequest

        texts = (self.budget, self.floor, self.weights or weights, self.groups)
        return PlanRequest.parse(kind, *texts, hold=self.hold, hold_deep=self.hold_deep)


def call_arguments(texts: tuple[str, ...], option: str = "--call") -> dict[str, Any]:
    """Arguments of a pipeline's call, from ``NAME=JSON``."""
    from ptqd.errors import ArtifactError, InputError
    from ptqd.files import parse_json

    call: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {text!r} must be NAME=VALUE, the value in JSON")
        if name in call:
            raise InputError(f"{option} {name} is given twice; give it once")
        try:
            call[name] = parse_json(value, f"{option} {name}: {value!r}")
        except ArtifactError as error:
            raise InputError(
                f"{option} {name}: {value!r} is not JSON ({error.__cause__}); quote strings, as in '\"a cat\"'"
            ) from error
    return call


def load_pipeline(
    model: str | Path,
    scheduler: str | None,
    device: str | None,
    dtype: "Precision | None" = None,
    *,
    offload: bool = False,
) -> "DiffusionPipeline":
    """A pipeline, with the wanted scheduler and type, on the wanted device or the process' own."""
    import torch

    from ptqd import processes
    from ptqd.loading import best_device, check_device, load, place, scheduler_class, with_scheduler

    check_device(device)
    scheduler_class(scheduler)
    loaded = load(model, dtype=None if dtype is None else getattr(torch, dtype))
    where = processes.device() or device or best_device()
    return place(with_scheduler(loaded, scheduler), where, offload=offload)


def correction_methods(text: str) -> tuple[str, ...]:
    """Methods from ``cnc,bc``; ``("auto",)`` of auto."""
    from ptqd.correction.fit import METHODS
    from ptqd.experiments.experiment import check_methods

    given = [part.strip() for part in text.split(",") if part.strip()]
    if given == ["auto"]:
        return ("auto",)
    check_methods(given)
    return tuple(method for method in METHODS if method in given)


def consent(source: str, names: "Sequence[str | None]", options: str, *, fetch: bool) -> None:
    """Ask before anything is fetched that a file names, and not the command; one process asks for all.

    Args:
        source: the file, for messages.
        names: models, judges and datasets; what is here, or ships with ptqd, needs no consent.
        options: that name others.
        fetch: it was given.

    Raises:
        InputError: it is not given, or nobody is there to be asked.
    """
    import sys

    from ptqd import processes
    from ptqd.errors import InputError
    from ptqd.names import shown
    from ptqd.zoo import MODELS

    fetched = [n for n in names if n and n not in (*BUILT_IN, *MODELS) and not Path(n.partition(":")[0]).exists()]
    if not fetched or fetch:
        return
    what = ", ".join(map(shown, fetched))
    if processes.count() > 1 or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(
            f"{source} names {what}, which is not here and would be fetched from the hub; say --fetch if you trust it, "
            f"or give {options}"
        )
    print(
        f"{shown(source)} names {what}, to be fetched from the hub. Fetch? [y/N] ", end="", file=sys.stderr, flush=True
    )
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(f"nothing was fetched; give {options} yourself")


def work_key(pipe: "DiffusionPipeline", other: object, sampling: "Sampling") -> list[object]:
    """What unfinished work on a pipeline, and another or plain values, depends on."""
    from ptqd.diffusion.fingerprints import pipeline_fingerprint

    other_facts = other if isinstance(other, dict) else pipeline_fingerprint(other)
    return [pipeline_fingerprint(pipe), other_facts, sampling.to_dict()]


def tell(text: str, *, end: str = "\n") -> None:
    """Print lines for people; names in them cannot move the cursor or hide anything."""
    from ptqd.names import shown_lines

    print(shown_lines(text), end=end)


def show(*tables: object, width: int = 100) -> None:
    """Print rich tables; as wide as the terminal, or as ``width`` where there is none; never so narrow that a figure
    would be cut.
    """
    import sys

    from rich.measure import Measurement

    from ptqd_cli.console import Output

    for table in tables:
        console = Output(width=None if sys.stdout.isatty() else width, emoji=False)
        wide = console.options.update(max_width=10_000)
        least = Measurement.get(console, wide, table).minimum  # type: ignore[arg-type]
        if least > console.width:
            console = Output(width=least, emoji=False)
        console.print(table)
