"""What ``ptqd demo`` runs: the paper's two settings (He et al., arXiv 2305.10657, section 5) on fashion-ldm."""

from ptqd.experiment import Experiment
from ptqd.sampling import Sampling

_LABELS = list(range(10))


def _experiment(samples: int, stochastic_steps: int, measured: int, recipes: tuple[str, ...]) -> Experiment:
    shared = {"samples": samples, "batch": 100, "seed": 0}
    return Experiment(
        model="fashion-ldm",
        settings=(
            Sampling(20, 0.0, call={"class_labels": _LABELS, "guidance_scale": 3.0}, **shared),
            Sampling(stochastic_steps, 1.0, call={"class_labels": _LABELS, "guidance_scale": 1.5}, **shared),
        ),
        recipes=recipes,
        measured=measured,
    )


QUICK = _experiment(40, 50, 32, ("w8a8", "w4a8", "w4a4"))
STANDARD = _experiment(160, 50, 64, ("w8a8", "w4a8", "w4a4"))
FULL = _experiment(5000, 250, 256, ("w8a8", "w4a8", "w4a4"))
