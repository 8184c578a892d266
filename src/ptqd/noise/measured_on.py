"""What statistics were measured on; corrections apply to the same alone."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ptqd.errors import ArtifactError
from ptqd.schema import typed

_STORED = {"model_timesteps": "told"}  # names in files that are other than the fields'


@dataclass(frozen=True)
class MeasuredOn:
    """What statistics were measured on; equal where statistics may be merged.

    Attributes:
        scheduler: the class's name.
        config: the scheduler's configuration, as plain values.
        model: fingerprint of the full-precision denoiser.
        quantized: fingerprint of the quantized denoiser.
        activation_bits: hash of its recipe and plan; None for a denoiser that ptqd did not quantize.
        steps: of the run.
        eta: noise of DDIM's step.
        guidance: guidance scale; None where the pipeline has none.
        call: arguments of the pipeline's call that all samples share.
        seed: from which the samples' seeds are derived.
        inputs: digest of the arguments that samples do not share.
        closed_loop: measured along the quantized pipeline's trajectories.
        corrected: methods of the correction it ran with meanwhile.
        channel_axis: of samples and outputs; None where it was not measured.
        model_timesteps: that the denoiser got (T,); empty where it takes none.
        keywords: of the scheduler's ``step`` that are the same at every step.
        learned_variance: the output has a variance beside the mean.
        repeatable: every sample's noise comes from its own generator, whatever the batch.
        interpolated_from: steps of the measured run, of statistics that were carried over to another; else None.
        scales: of all guidance that the pipeline's call was at, by the names of its arguments.
    """

    scheduler: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    quantized: str | None = None
    activation_bits: str | None = None
    steps: int = 0
    eta: float = 0.0
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    inputs: str | None = None
    closed_loop: bool = False
    corrected: tuple[str, ...] = ()
    channel_axis: int | None = None
    model_timesteps: tuple[float, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    learned_variance: bool = False
    repeatable: bool = True
    interpolated_from: int | None = None
    scales: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by the names that files have."""
        plain = {_STORED.get(name, name): value for name, value in asdict(self).items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MeasuredOn":
        """The inverse of :meth:`to_dict`; what a file does not say has its default.

        Raises:
            ArtifactError: it says what this version does not know.
        """
        if not isinstance(values, Mapping):
            raise ArtifactError(f"what statistics were measured on must be a table; got {values!r}: measure again")
        names = {_STORED.get(f.name, f.name): f.name for f in fields(cls)}
        unknown = set(values) - set(names)
        if unknown:
            raise ArtifactError(
                f"statistics say {min(unknown)!r}, which this version of ptqd does not know; measure again"
            )
        plain = {names[key]: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        measured_on: MeasuredOn = typed(plain, cls, "what statistics were measured on", "measure again")
        numbers = (measured_on.eta, measured_on.guidance or 0.0, *measured_on.model_timesteps)
        axis = measured_on.channel_axis
        if (
            (axis is not None and not 1 <= axis <= 8)
            or not all(map(math.isfinite, numbers))
            or measured_on.eta < 0
            or measured_on.steps < 0
        ):
            raise ArtifactError("what statistics were measured on has numbers that no run has; measure again")
        return measured_on

    def differences(self, other: "MeasuredOn") -> list[str]:
        """The names of what differs, in the order of the attributes."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
