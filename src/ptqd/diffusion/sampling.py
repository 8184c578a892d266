"""Sampling: one seed for each sample, so that results depend on neither batch size nor number of processes."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptqd.diffusion.intercept import stepping_as
from ptqd.diffusion.pipeline_parts import denoiser_of
from ptqd.errors import InputError, PtqdError, raised_by
from ptqd.progress import track

MOST_STEPS, MOST_SAMPLES, MOST_SEEDS = 100_000, 10_000_000, 2**63  # beyond which a file or a hand is wrong
MOST_CLASSES = 1_000_000
FEW_CLASSES = 32  # that a run has all of
OWN = {  # arguments of a pipeline's call that ptqd sets, and what to do instead
    "num_inference_steps": "say it with --steps (in Python: Sampling's steps)",
    "eta": "say it with --eta (in Python: Sampling's eta)",
    "generator": "say --seed (in Python: Sampling's seed); every sample has a generator of its own",
    "batch_size": "say it with --batch (in Python: Sampling's batch)",
    "output_type": "leave it out",
    "return_dict": "leave it out",
}
_PROMPTS = {"prompt", "prompt_embeds"}
PROMPT = re.compile(r"(negative_)?prompt(_[0-9])?")  # of which one text stands for all samples
SCHEDULES = ("sigmas", "timesteps")  # lists that are a run's steps, not one value a sample
# whose errors are of what they are given
REFUSING = ("diffusers", "transformers", "ptqd.pipelines")


@dataclass(frozen=True)
class Sampling:
    """How a pipeline is run.

    Attributes:
        steps: denoising steps.
        eta: DDIM's noise (arXiv 2010.02502), passed where the pipeline takes it.
        samples: how many.
        batch: samples at once; changes speed and memory, not results, of every pipeline that takes a generator.
        seed: of sample i is derived from (seed, i).
        call: further arguments of the pipeline's call. A list or tensor is one value a sample, taken in turn
            (so ``{"class_labels": [0, 1, 2]}`` cycles through three classes); pictures for several ControlNets are a
            tuple for each sample. Anything else goes to every batch, also other numbers than class labels, such as
            ``sigmas``, ``timesteps`` or ``skip_guidance_layers``.
        shared: arguments of the call that go to every batch as they are, lists too (``{"image": [canny, depth]}``).

    Raises:
        InputError: a count below 1, or eta below 0.
    """

    steps: int = 50
    eta: float = 0.0
    samples: int = 64
    batch: int = 32
    seed: int = 0
    call: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, most in (("steps", MOST_STEPS), ("samples", MOST_SAMPLES), ("batch", MOST_SAMPLES)):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
            if value > most:
                raise InputError(f"{name} must be at most {most:,}; got {value}")
        if not 0 <= self.eta < math.inf:
            raise InputError(f"eta must be at least 0, and finite; got {self.eta}")
        if not 0 <= self.seed < MOST_SEEDS:
            raise InputError(f"seed must be at least 0, and below 2^63; got {self.seed}")
        both = sorted(self.call.keys() & self.shared.keys())
        if both:
            raise InputError(f"the call's argument {both[0]!r} is given for every sample and for all; give it once")
        for name, value in (*self.call.items(), *self.shared.items()):
            if name in OWN:
                raise InputError(f"the call's argument {name!r} is ptqd's own to set; {OWN[name]}")
            if re.fullmatch("num_[a-z]+_per_prompt", name) and value != 1:
                raise InputError(f"every sample has a seed of its own: leave {name!r} out, and ask for more samples")
            if not _is_finite(value):
                raise InputError(f"call argument {name!r} is NaN or infinite; got {value}")
            if name in self.call and isinstance(value, list | torch.Tensor) and len(value) == 0:
                raise InputError(f"call argument {name!r} is an empty list; give one value a sample")

    def replace(self, **changes: Any) -> "Sampling":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_seed_for(self, purpose: str) -> "Sampling":
        """A copy with a seed of its own, so that what is fitted never sees the samples it is judged on."""
        derived = np.random.SeedSequence([self.seed, *purpose.encode()]).generate_state(1, np.uint32)[0]
        return self.replace(seed=int(derived))

    def batches(self, start: int = 0) -> Iterator[range]:
        """The sample indices of each batch, from sample ``start`` on."""
        for first in range(start, self.samples, self.batch):
            yield range(first, min(first + self.batch, self.samples))

    def call_for(self, indices: Sequence[int]) -> dict[str, Any]:
        """The pipeline's arguments for some samples."""
        chosen: dict[str, Any] = {}
        for name, value in self.call.items():
            if _is_whole(name, value):
                as_list = isinstance(value, tuple) and (name in SCHEDULES or _of_networks(value))
                chosen[name] = list(value) if as_list or isinstance(value, list) else value
            elif isinstance(value, torch.Tensor):
                chosen[name] = value[torch.tensor([i % len(value) for i in indices])]
            elif isinstance(value, list):
                chosen[name] = _by_network([value[i % len(value)] for i in indices])
            else:
                chosen[name] = value
        chosen |= self.shared
        one = [name for name, value in chosen.items() if isinstance(value, str) and PROMPT.fullmatch(name)]
        if len(indices) == 1:
            return chosen
        return chosen | {name: [chosen[name]] * len(indices) for name in one}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["call"] = _plain(self.call)
        plain["shared"] = _plain(self.shared)
        return plain if self.shared else {name: value for name, value in plain.items() if name != "shared"}

    @property
    def inputs_digest(self) -> str:
        """A hash of the call's arguments."""
        given = _plain([self.call, self.shared] if self.shared else self.call)
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shared_call(self) -> dict[str, Any]:
        """The call's arguments that go to every batch; plain values, ready for JSON."""
        shared = {k: v for k, v in self.call.items() if _is_whole(k, v)}
        shared |= self.shared
        return {name: _plain(value) for name, value in shared.items()}


def _is_whole(name: str, value: object) -> bool:
    """Whether an argument goes to every batch: no list or tensor of one value a sample."""
    if name in SCHEDULES or not isinstance(value, list | torch.Tensor):
        return True
    return name != "class_labels" and isinstance(value, list) and all(type(x) in (int, float) for x in value)


def _of_networks(values: Sequence[object]) -> bool:
    """Whether a tuple is of things for several networks, such as pictures, which pipelines want as a list."""
    return not any(isinstance(x, int | float | str) for x in values)


def _by_network(values: list[Any]) -> list[Any]:
    """Values of samples; pictures that come as a tuple for each sample by the network that takes them."""
    if all(isinstance(value, tuple) and _of_networks(value) for value in values):
        return [list(pictures) for pictures in zip(*values, strict=True)]
    return values


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True


def _plain(value: object) -> Any:
    """A value for JSON: pictures and arrays by a digest, other objects by their type's name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    array = np.asarray(value)
    name = type(value).__name__
    return name if array.dtype == object else f"{name} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def guidance_of(pipe: DiffusionPipeline, sampling: Sampling) -> float | None:
    """The guidance scale a run is at, the pipeline's own where it says none; None where there is no guidance.

    Raises:
        InputError: it is no number.
    """
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    given = {**sampling.call, **sampling.shared}
    if parameter is None:
        return None
    guidance: Any = given.get("guidance_scale", parameter.default)
    if isinstance(guidance, torch.Tensor) and guidance.numel() == 1:
        guidance = guidance.item()
    if isinstance(guidance, Real) or guidance is None:
        return guidance  # type: ignore[return-value]  # an integer counts as one
    if "guidance_scale" in given:
        raise InputError(f"guidance_scale must be a number; got {guidance!r}")
    return None


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of one sample: the same on every device and for every batch size."""
    derived = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(derived) & (2**63 - 1))


@functools.cache
def gives_latents(kind: Any) -> bool:
    """Whether a class of pipelines knows ``output_type="latent"``, as far as its code says."""
    try:
        sources = [inspect.getsource(base) for base in inspect.getmro(kind) if issubclass(base, DiffusionPipeline)]
    except (OSError, TypeError):  # typed into an interpreter
        return True
    return any(re.search(r"""output_type[^\n]*["']latent["']""", source) for source in sources)


def run_batch(
    pipe: DiffusionPipeline, sampling: Sampling, indices: Sequence[int], output: Literal["np", "latent"] = "np"
) -> Any:
    """Run the pipeline for some samples.

    Returns:
        The first field of the pipeline's output, of its ``output_type``: images (n, H, W, C) in [0, 1] for ``"np"``;
        frames, audio. A pipeline that gives no latents gives images for ``"latent"`` too.
    """
    kind: Any = type(pipe)
    accepted = inspect.signature(kind.__call__).parameters
    generators = [sample_generator(sampling.seed, i) for i in indices]
    arguments: dict[str, Any] = {
        "num_inference_steps": sampling.steps,
        "eta": sampling.eta,
        "generator": generators if len(indices) > 1 else generators[0],  # some take no list
        "output_type": output if output == "np" or gives_latents(kind) else "np",
        "batch_size": len(indices),
        "return_dict": True,
    }
    call = sampling.call_for(indices)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name in call:
        if name == "self" or (name not in accepted and not open_ended):
            raise InputError(
                f"{type(pipe).__name__} takes no argument {name!r}; it takes {', '.join(list(accepted)[1:])}"
            )
    if sampling.eta > 0 and "eta" not in accepted:
        raise InputError(f"{type(pipe).__name__} takes no eta; leave it at 0")
    given = {k: v for k, v in arguments.items() if k in accepted} | call
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [k for k, p in accepted.items() if k != "self" and p.kind in named and p.default is p.empty]
    missing = [name for name in needed if name not in given]
    if missing:
        raise InputError(f"{type(pipe).__name__} needs the argument {missing[0]!r}; give it in the run's call")
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    seed = sample_generator(sampling.seed, indices[0]).initial_seed()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), _generators_handed(pipe, generators if "generator" in accepted else []):
            torch.manual_seed(seed)  # some schedulers take no generator
            results = pipe(**given)[0]  # images, frames or audios
    except PtqdError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if not raised_by(error, *REFUSING):
            raise  # a bug, of a hook's for one
        reason = str(error).rstrip(".")
        remedy = " (with --batch 1 it may take them)" if "generator" in str(error) and len(indices) > 1 else ""
        if "prompt" in str(error) and not {*sampling.call, *sampling.shared} & _PROMPTS:
            remedy = (
                """; give it prompts: --call 'prompt=["a cat"]' in the shell, call={"prompt": ["a cat"]} in Python"""
            )
        raise InputError(f"{type(pipe).__name__} refuses its arguments: {reason}{remedy}") from error
    finally:
        pipe.set_progress_bar_config(**bar)
    if output == "np":
        _check_finite(pipe, results, indices)
    if len(results) != len(indices):
        raise InputError(
            f"{type(pipe).__name__} gave {len(results)} results for {len(indices)} samples; "
            "give its arguments as lists of one value a sample"
        )
    return results


@contextmanager
def _generators_handed(pipe: DiffusionPipeline, generators: list[torch.Generator]) -> Iterator[None]:
    """Hand the scheduler each sample's generator where the pipeline itself hands it none, as DiTPipeline does.

    Rows that are guidance's copies of the samples are given the same noise.
    """
    scheduler = getattr(pipe, "scheduler", None)
    plain: Any = getattr(type(scheduler), "step", None)
    if plain is None or not generators or "generator" not in inspect.signature(plain).parameters:
        yield
        return

    @functools.wraps(plain)  # pipelines look at the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(plain).bind(*args, **kwargs)
        sample = call.arguments.get("sample")
        rows = len(sample) if isinstance(sample, torch.Tensor) and sample.ndim else 0
        copies, others = divmod(rows, len(generators))
        if call.arguments.get("generator") is None and not others and copies in (1, 2):  # with guidance's copies
            again = [torch.Generator(g.device).set_state(g.get_state()) for g in generators * (copies - 1)]
            call.arguments["generator"] = [*generators, *again]
        return plain(*call.args, **call.kwargs)

    with stepping_as(scheduler, step):
        yield


def _check_finite(pipe: DiffusionPipeline, results: Any, indices: Sequence[int]) -> None:
    """Refuse samples that would become black pictures.

    Raises:
        InputError: some hold NaN or infinite values.
    """
    if not isinstance(results, np.ndarray | torch.Tensor):
        return
    values = torch.as_tensor(results)
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        bad = [i for i, one in zip(indices, values, strict=False) if not bool(torch.isfinite(one).all())]
        raise InputError(
            f"{len(bad)} of {len(indices)} samples of {type(pipe).__name__} hold NaN or infinite values (first sample "
            f"{bad[0]}); look for NaN weights, a guidance scale that is too large, or a type that is too narrow"
        )


def sample(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    *,
    output: Literal["np", "latent"] = "np",
    start: int = 0,
    progress: str | None = None,
) -> Iterator[tuple[range, Any]]:
    """Sample batch by batch.

    Args:
        pipe: any diffusers pipeline.
        sampling: how.
        output: ``"np"`` decodes to images (n, H, W, C) in [0, 1]; ``"latent"`` saves the decoding.
        start: first sample, to resume.
        progress: title of a progress bar.

    Yields:
        Sample indices, and the batch.
    """
    for indices in track(list(sampling.batches(start)), progress):
        yield indices, run_batch(pipe, sampling, indices, output)


def with_some_prompt(pipe: DiffusionPipeline, sampling: Sampling) -> Sampling:
    """A run that has a prompt where the pipeline takes one; for what no prompt changes, as what a run costs."""
    takes = "prompt" in inspect.signature(type(pipe).__call__).parameters
    if not takes or {*sampling.call, *sampling.shared} & _PROMPTS:
        return sampling
    return sampling.replace(call={**sampling.call, "prompt": ""})


def default_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The call arguments that a class-conditional pipeline needs: every class that it knows, in turn.

    Of many classes neighbours are alike, and a run may be shorter than they are many: they come in leaps.
    """
    if "class_labels" not in inspect.signature(type(pipe).__call__).parameters:
        return {}
    embedder = getattr(pipe, "class_embedder", None)
    config = getattr(denoiser_of(pipe), "config", {})
    if embedder is not None:
        known: Iterable[int] = range(embedder.config.classes)
    else:
        known = getattr(pipe, "labels", {}).values() or range(config.get("num_class_embeds") or 0)
    return {"class_labels": _in_leaps(sorted(set(known)))} if known else {}


def _in_leaps(classes: list[int]) -> list[int]:
    """All of many classes, in an order of which every part is spread over them."""
    count = len(classes)
    if count <= FEW_CLASSES:
        return classes
    leap = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(leap, count) > 1:
        leap += 1
    return [classes[i * leap % count] for i in range(count)]


def default_steps(pipe: DiffusionPipeline) -> int:
    """How many steps a pipeline's call takes where it is told none; 50 where it does not say."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    default = None if parameter is None else parameter.default
    return default if isinstance(default, int) and default > 0 else Sampling.steps
