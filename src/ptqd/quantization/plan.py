"""A PrecisionPlan: the activations' bits step by step, and the weights' bits layer by layer.

PTQD keeps the weights at one width and chooses that of the activations for every step (He et al., arXiv 2305.10657,
section 4.3). Here every group of layers may have its own at every step, and every layer its own weights.

A plan is text that a person can read and edit, as TOML on its own and as JSON in a saved denoiser's ``config.json``:

    steps = 6
    bits = [
      "0: t 981, bits 4 4",
      "1: t 961, bits 4 8",
      "2: t 941, hold",
      "3: t 921, bits 4 4",
      "4: t 901, hold 1.6 -0.6",
      "5: t 881, bits 4 8 shallow",
    ]

    groups = [
      "down: down_blocks.* time_embedding.*",
      "rest: *",
    ]

    [weights]
    conv_in = 8

A layer belongs to the first group with a pattern that its dotted name matches; an attention's products go by the
attention's name. A step's bits stand in the order of the groups. A step that holds has a width of zero bits everywhere:
the denoiser is not called, and its output is that of the last step at which it was; or, with two numbers, the sum of
the last two such outputs times these, the last one first: above, in a line through both. A shallow step computes the
outer blocks of the network only, and its deep part gives what it gave at the last step that computed it
(:mod:`ptqd.diffusion.deep_part`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ptqd.errors import InputError
from ptqd.files import read_toml, write_text
from ptqd.quantization.numerics.affine import Grid, check_weight_bits

_ROW = re.compile(
    r"\s*([0-9]{1,9})\s*:\s*t\s+(\S{1,64})\s*,"
    r"\s*(?:hold((?:\s+[-+0-9.e]{1,32}){2})?|bits\s+([0-9]{1,9}(?:\s+[0-9]{1,9})*)(\s+shallow)?)\s*"
)
_POLICY_BITS = 16
_LARGEST = 100
HOLD = 0
"""The bits of a step that is not computed."""
_KEYS = ("steps", "bits", "groups", "weights", "made")


@dataclass(frozen=True)
class PrecisionPlan:
    """Which bits a quantized denoiser computes with at each step.

    Attributes:
        timesteps: what the denoiser is told at each step (T,). A schedule that repeats one has the same bits there.
        bits: of the activations (T, G), one for each group; :data:`HOLD` for all of them where a step holds.
        groups: name and patterns of each group (G,).
        weights: bits of the weights of layers by dotted name; of all others the recipe's.
        made: plain facts of how it was made, for people.
        extrapolation: of steps that hold, the weights of the last two outputs that were computed, the last one first;
            a step that has none holds the last one as it is.
        shallow: steps that compute the network's outer blocks only.

    Raises:
        InputError: no step, rows of another length than there are groups, bits outside 2 to 16 of activations or 2 to 8
            of weights, other bits for two steps at one timestep, or a step that holds where none was computed; an
            extrapolation of a step that does not hold, or before which fewer than two were computed; a shallow step
            that is the first, or holds.
    """

    timesteps: tuple[float, ...]
    bits: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...] = (("all", ("*",)),)
    weights: Mapping[str, int] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    extrapolation: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    shallow: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.bits) != len(self.timesteps):
            raise InputError(f"a plan needs one row of bits for each step; got {len(self.bits)} for {self.steps} steps")
        for i, row in enumerate(self.bits):
            if len(row) != len(self.groups):
                raise InputError(
                    f"step {i} of the plan has {len(row)} bits for {len(self.groups)} groups; give one each"
                )
        for bits in self.weights.values():
            check_weight_bits(bits)
        for i, row in enumerate(self.bits):
            if HOLD in row and set(row) != {HOLD}:
                raise InputError(f"step {i} of the plan holds some groups only; a step holds its whole output, or none")
        self._check_held()
        self._check_extrapolation()
        for bits in {b for row in self.bits for b in row} - {HOLD}:
            _ = Grid(bits, symmetric=True)
        first: dict[float, int] = {}
        for i, t in enumerate(self.timesteps):
            if self.bits[first.setdefault(t, i)] != self.bits[i]:
                raise InputError(
                    f"the plan has other bits for step {first[t]} and step {i}, both at t {t:g}; align them"
                )

    def _check_held(self) -> None:
        if self.held[0]:
            raise InputError("the first step of the plan holds, and there is no output before it; give it bits")
        for step in self.shallow:
            if not 0 < step < self.steps or self.held[step]:
                raise InputError(
                    f"step {step} of the plan cannot be shallow: it has to be computed, and another before it in full"
                )
        if (any(self.held) or self.shallow) and len(set(self.timesteps)) < self.steps:
            raise InputError(
                "steps of the plan hold or are shallow, and its schedule takes some timestep twice, so that its calls "
                "cannot be told apart; give every step bits, or sample with a scheduler of one call a step"
            )

    def _check_extrapolation(self) -> None:
        for step, weights in self.extrapolation.items():
            if not 0 <= step < self.steps or not self.held[step]:
                raise InputError(f"the plan weights outputs for step {step}, which does not hold; let it hold")
            if self.held[:step].count(False) < 2:
                raise InputError(
                    f"step {step} of the plan goes on from two outputs, and one was computed before it; let it hold"
                )
            if len(weights) != 2 or not all(math.isfinite(w) and abs(w) <= _LARGEST for w in weights):
                raise InputError(
                    f"step {step} of the plan needs two weights of outputs, of {_LARGEST} at the most; got {weights}"
                )

    @property
    def steps(self) -> int:
        """How many steps it is for."""
        return len(self.timesteps)

    @property
    def held(self) -> tuple[bool, ...]:
        """Which steps are not computed (T,)."""
        return tuple(row[0] == HOLD for row in self.bits)

    def holding(self, steps: Collection[int]) -> "PrecisionPlan":
        """The same with these steps held, and no others; a step that was held gets the bits of the one before it, and
        none that is held now is shallow.

        They hold the last output as it is; :meth:`replace` gives them an extrapolation.

        Raises:
            InputError: a step that the plan has not, the first one, or any of a schedule that takes a timestep twice.
        """
        rows: list[tuple[int, ...]] = []
        for row in self.bits:
            rows.append(rows[-1] if row[0] == HOLD else row)
        for step in steps:
            if not 0 <= step < self.steps:
                raise InputError(f"the plan has no step {step} to hold; it has steps 0 to {self.steps - 1}")
            rows[step] = (HOLD,) * len(self.groups)
        shallow = tuple(step for step in self.shallow if step not in steps)
        return self.replace(bits=tuple(rows), made={}, extrapolation={}, shallow=shallow)

    def replace(self, **changes: Any) -> "PrecisionPlan":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def uniform(cls, timesteps: Sequence[float], bits: int) -> "PrecisionPlan":
        """The same bits at every step."""
        return cls(tuple(timesteps), ((bits,),) * len(timesteps), made={"rule": "uniform"})

    @classmethod
    def first_last(
        cls, timesteps: Sequence[float], bits: int, *, edge: int = 16, first: int = 3, last: int = 3
    ) -> "PrecisionPlan":
        """Other bits at the first and the last steps, as serving engines fix them; 3 and 3 is their default.

        Args:
            timesteps: what the denoiser is told at each step (T,).
            bits: of all other steps.
            edge: bits of the first and the last steps.
            first: how many steps come first.
            last: how many come last.
        """
        steps = len(timesteps)
        outer = {t for i, t in enumerate(timesteps) if i < first or i >= steps - last}  # a timestep has one width
        rows = tuple((edge if t in outer else bits,) for t in timesteps)
        return cls(tuple(timesteps), rows, made={"rule": "first and last", "first": first, "last": last})

    def step_policy(self, scope: Sequence[str] = ("transformer",)) -> dict[str, Any]:
        """The plan as a ``diffusion_step_policy``, version 1: 16-bit activations at the first and the last steps, the
        checkpoint's own in between. diffusers, vLLM-Omni, SGLang and TensorRT-LLM read it from
        ``quantization_config.runtime`` in a denoiser's ``config.json``.

        Args:
            scope: the pipeline's components that it is for.

        Raises:
            InputError: the plan is another: it holds steps, has shallow ones, or 16 bits elsewhere, or more than one
                width besides.
        """
        wide = [row == (_POLICY_BITS,) * len(row) for row in self.bits]
        first = next((i for i, is_wide in enumerate(wide) if not is_wide), self.steps)
        last = next((i for i, is_wide in enumerate(reversed(wide)) if not is_wide), self.steps)
        others = {bits for row, is_wide in zip(self.bits, wide, strict=True) if not is_wide for bits in row}
        if len(others) > 1 or HOLD in others or self.shallow or (others and sum(wide) != first + last):
            raise InputError(
                f"a step policy has {_POLICY_BITS} bits at the first and the last steps and one width in between; this "
                "plan is another, which only ptqd reads"
            )
        edges = {"first_steps": first, "last_steps": last if others else 0}
        return {
            "schema_version": 1,
            "type": "first_last_n",
            "index_space": "denoising_loop_iteration",
            "scope": list(scope),
            "default_mode": "native",
            **{name: {"count": count, "mode": "a16"} for name, count in edges.items()},
            "overlap": "a16",
            "reasoner": "a16",
        }

    def group_of(self, layer: str) -> int:
        """The group of a layer.

        Raises:
            InputError: no pattern matches it.
        """
        for i, (_, patterns) in enumerate(self.groups):
            if any(fnmatchcase(layer, pattern) for pattern in patterns):
                return i
        raise InputError(
            f"no group of the plan matches the layer {layer!r}; add a group with the pattern '*' at the end"
        )

    def describe(self, step: int) -> str:
        """What a step does, as a line of the plan has it."""
        if self.held[step]:
            return " ".join(["hold", *map(_number, self.extrapolation.get(step, ()))])
        return " ".join(["bits", *map(str, self.bits[step]), *["shallow"] * (step in self.shallow)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and TOML; a step is one line of text."""
        rows = [f"{i}: t {_number(t)}, {self.describe(i)}" for i, t in enumerate(self.timesteps)]
        groups = [f"{name}: {' '.join(patterns)}" for name, patterns in self.groups]
        plain = {"steps": self.steps, "bits": rows, "groups": groups, "weights": dict(self.weights)}
        return {**plain, "made": dict(self.made)}

    @classmethod
    def from_dict(cls, values: object, where: str = "the plan") -> "PrecisionPlan":
        """The inverse of :meth:`to_dict`, strict.

        Raises:
            InputError: an unknown key, a missing step, or a line that is not a step.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where} must be a table; got {values!r}")
        for key in values:
            if key not in _KEYS:
                raise InputError(f"{where} has the unknown key {key!r}; known are {', '.join(_KEYS)}")
        steps, lines = values.get("steps"), values.get("bits")
        if type(steps) is not int or not isinstance(lines, list):
            raise InputError(f"{where} needs 'steps', a number, and 'bits', a list of one line for each step")
        timesteps, rows, extrapolation, shallow = _steps(lines, steps, where)
        if len(rows) != steps:
            raise InputError(
                f"{where} says {steps} steps and has {len(rows)}; put the missing line back, or mend 'steps'"
            )
        weights, output = values.get("weights", {}), values.get("made", {})
        if not isinstance(weights, Mapping) or not all(type(bits) is int for bits in weights.values()):
            raise InputError(f"{where}: 'weights' must give a number of bits for each layer")
        if not isinstance(output, Mapping) or not all(_is_plain(value) for value in output.values()):
            raise InputError(f"{where}: 'made' must give a word or a number, or a list of them, for each fact")
        try:
            groups = _groups(values.get("groups", ["all: *"]))
            bits = tuple(row or (HOLD,) * len(groups) for row in rows)
            return cls(timesteps, bits, groups, dict(weights), dict(output), extrapolation, shallow)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it as TOML, atomically."""
        plain = self.to_dict()
        lines = ["# Activation bits by step, one number for each group of layers in the order of 'groups'; or hold."]
        lines.append(f"steps = {plain['steps']}")
        for name in ("bits", "groups"):
            lines += [f"{name} = [", *(f"  {json.dumps(line)}," for line in plain[name]), "]"]
        for table in ("weights", "made"):
            lines += ["", f"[{table}]"]
            lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in plain[table].items()]
        write_text(Path(path), "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PrecisionPlan":
        """Read what :meth:`save` wrote, edited or not.

        Raises:
            InputError: the file is missing, no TOML, or no plan.
        """
        return cls.from_dict(read_toml(Path(path), "the plan "), f"the plan {path}")


def _number(t: float) -> str:
    return str(int(t)) if float(t).is_integer() else repr(float(t))


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_plain(value: object) -> bool:
    """Whether JSON and TOML both hold it."""
    if isinstance(value, list | tuple):
        return all(_is_plain(v) and not isinstance(v, list | tuple) for v in value)
    return isinstance(value, str | int | float)


def _steps(
    lines: Sequence[object], steps: int, where: str
) -> tuple[tuple[float, ...], list[tuple[int, ...]], dict[int, tuple[float, float]], tuple[int, ...]]:
    """Timesteps, bits (none where a step holds), extrapolation and shallow steps, from a plan's lines."""
    timesteps: list[float] = []
    rows: list[tuple[int, ...]] = []
    extrapolation: dict[int, tuple[float, float]] = {}
    shallow: list[int] = []
    for line in lines:
        result = _ROW.fullmatch(str(line))
        t = _float(result[2]) if result else None
        if result is None or t is None:
            raise InputError(
                f"{where}: {line!r} is no step; a step is written like '0: t 981, bits 4 8', or '1: t 961, hold'"
            )
        if int(result[1]) != len(rows):
            at = f"after t {timesteps[-1]:g}" if timesteps else "the first"
            raise InputError(f"{where} lacks step {len(rows)} ({at}); number the steps 0 to {steps - 1}, one line each")
        timesteps.append(t)
        rows.append(tuple(int(bits) for bits in (result[4] or "").split()))
        if result[5]:
            shallow.append(int(result[1]))
        if result[3]:
            last, before = ((math.nan if w is None else w) for w in map(_float, result[3].split()))
            extrapolation[int(result[1])] = last, before
    return tuple(timesteps), rows, extrapolation, tuple(shallow)


def _groups(lines: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    result: list[tuple[str, tuple[str, ...]]] = []
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InputError("'groups' must be a list of lines like 'down: down_blocks.* time_embedding.*'")
    for line in lines:
        name, colon, patterns = line.partition(":")
        if not colon or not patterns.split():
            raise InputError(f"{line!r} is no group; a group is written like 'down: down_blocks.* time_embedding.*'")
        if name in dict(result):
            raise InputError(f"two groups are called {name!r}; give them names of their own")
        result.append((name, tuple(patterns.split())))
    return tuple(result)
