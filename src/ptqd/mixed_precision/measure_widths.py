"""Measuring a quantized pipeline at each of its bit widths."""

from diffusers import DiffusionPipeline

from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.noise.measure import PairedMeasurement
from ptqd.noise.stats import NoiseStats
from ptqd.quantization.apply_plan import at_width
from ptqd.quantization.hf_quantizer import ptqd_quantizer
from ptqd.quantization.recipe import Recipe


def measure_widths(
    pipe: DiffusionPipeline, qpipe: DiffusionPipeline, sampling: Sampling, *, progress: str | bool = False
) -> dict[int, NoiseStats]:
    """Measure every activation width that a pipeline has ranges for: what a :class:`ptqd.PrecisionPlan` is made from.

    It costs one full-precision run, and one quantized run for each width.

    Args:
        pipe: full precision.
        qpipe: quantized by ptqd with a recipe of several widths, such as ``"w4a4+8"``.
        sampling: as for :func:`ptqd.measure`.
        progress: show a bar, with that title.

    Returns:
        Statistics by width, ascending; the same as :func:`ptqd.measure` gives of each.

    Raises:
        InputError: the pipeline has one width only, or was not quantized by ptqd.
    """
    widths = Recipe.from_dict(ptqd_quantizer(qpipe).quantization_config.recipe).widths
    if len(widths) < 2:
        raise InputError(
            f"the model has ranges for {widths[0]}-bit activations only; quantize with, say, w4a4+8, or measure it "
            "with ptqd.measure, for a plan that only holds steps"
        )
    return widths_measurement(pipe, qpipe, sampling).all(progress=progress)


def widths_measurement(pipe: DiffusionPipeline, qpipe: DiffusionPipeline, sampling: Sampling) -> PairedMeasurement:
    """What measures every width, batch by batch, also where there is but one; see :func:`measure_widths`."""
    widths = Recipe.from_dict(ptqd_quantizer(qpipe).quantization_config.recipe).widths
    return PairedMeasurement(pipe, {bits: at_width(qpipe, bits) for bits in widths}, sampling)
