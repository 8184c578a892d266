"""From statistics to a correction: every method by its name."""

from collections.abc import Sequence

from ptqd.correction import ptqd
from ptqd.correction.correction import Correction
from ptqd.correction.joint import fit_joint
from ptqd.errors import InputError
from ptqd.noise import NoiseStats

DEFAULT = ptqd.METHODS
METHODS = (*ptqd.METHODS, "joint")


def fit_correction(stats: NoiseStats, methods: Sequence[str] = DEFAULT) -> Correction:
    """The correction that follows from statistics.

    Args:
        stats: measured on the pipeline to correct.
        methods: any of ``"cnc"``, ``"bc"`` and ``"vsc"``, or ``"joint"`` alone. None gives the empty correction.

    Raises:
        InputError: an unknown method, methods that do not go together, or statistics that give no correction.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown correction {method!r}; known are {', '.join(METHODS)}")
    if "joint" not in methods:
        return ptqd.fit_ptqd(stats, methods)
    if len(methods) > 1:
        raise InputError("'joint' is a whole correction; give it alone")
    return fit_joint(stats)
