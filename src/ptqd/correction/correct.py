"""A quantized pipeline and what was measured of it give a pipeline that corrects."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from ptqd.correction.correction import Correction
from ptqd.correction.fit import along_runs, split_methods
from ptqd.correction.scheduler import apply_correction
from ptqd.correction.search import CorrectionSearch, fit_along_runs, search_correction
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.noise.stats import NoiseStats

AUTO = "auto"


def correct(
    qpipe: DiffusionPipeline,
    correction: NoiseStats | Correction | CorrectionSearch,
    methods: str | Sequence[str] = AUTO,
    *,
    sampling: Sampling | None = None,
    steps: int | None = None,
    progress: bool = False,
) -> DiffusionPipeline:
    """A quantized pipeline whose scheduler corrects; everything else is shared and untouched.

    Args:
        qpipe: the pipeline the statistics were measured on; one that already corrects gets this correction instead.
        correction: statistics to derive it from, or a correction that was fitted or searched.
        methods: when statistics are given, which corrections to derive: ``"auto"`` searches for the best on whole
            trajectories, see :func:`ptqd.search_correction`; ``"trajectory"``, and ``"energy"`` beside methods of the
            mean, are fitted along them; other names are taken as published, see :func:`ptqd.fit_correction`.
        sampling: for what runs whole trajectories: the run that was measured.
        steps: when methods are named, how many steps will be taken, if not as many as were measured: the statistics are
            then interpolated over log-SNR, and the log says so.
        progress: for ``"auto"``: show a bar.

    Raises:
        MismatchError: the statistics are of another model or scheduler.
        InputError: methods that run whole trajectories without the run, or for another number of steps; or statistics
            that give no correction.
    """
    if isinstance(correction, CorrectionSearch):
        return apply_correction(qpipe, correction.correction)
    if isinstance(correction, Correction):
        return apply_correction(qpipe, correction)
    named = (methods,) if isinstance(methods, str) else tuple(methods)
    if named != (AUTO,):
        split_methods(named)  # known ones, that go together
    if named == (AUTO,) or along_runs(named):
        if steps not in (None, correction.measured_on.steps):
            taken = correction.measured_on.steps
            raise InputError(f"{','.join(named)} runs the {taken} steps that were measured; name other methods")
        if sampling is None:
            raise InputError(
                f"methods={methods!r} runs whole trajectories; give sampling=, the run that was measured, or name "
                "methods, such as ['cnc', 'bc']"
            )
        if named == (AUTO,):
            choice = search_correction(qpipe, correction, sampling, progress=progress)
        else:
            choice = fit_along_runs(qpipe, correction, sampling, named)
        return apply_correction(qpipe, choice.correction)
    return apply_correction(qpipe, correction, named, steps=steps)
