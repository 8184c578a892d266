"""The correction methods by name: a method is a function in a file of its own, registered by a decorator."""

from collections.abc import Callable

from ptqd.correction.variance import ResidualNoise, StepRescaling
from ptqd.noise.second_moments import Estimator

MeanMethod = Callable[[], Estimator]
VarianceMethod = Callable[[ResidualNoise], StepRescaling]

MEAN_METHODS: dict[str, MeanMethod] = {}
VARIANCE_METHODS: dict[str, VarianceMethod] = {}


def mean_method(name: str) -> Callable[[Estimator], Estimator]:
    """Register an estimator of the full-precision output under a name.

    An estimator takes mean tables of second moments (..., G, K, K) and their layout, and gives the linear map of what a
    step knows; see :class:`ptqd.noise.second_moments.OutputEstimate`.
    """

    def register(estimator: Estimator) -> Estimator:
        MEAN_METHODS[name] = lambda: estimator
        return estimator

    return register


def variance_method(name: str) -> Callable[[VarianceMethod], VarianceMethod]:
    """Register a method for the residual's variance under a name.

    It takes what an estimate of the mean leaves, and says how each step is scaled and how much noise it draws. It
    raises InputError for a scheduler that it has nothing for.
    """

    def register(method: VarianceMethod) -> VarianceMethod:
        VARIANCE_METHODS[name] = method
        return method

    return register
