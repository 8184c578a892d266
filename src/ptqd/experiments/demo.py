"""What ``ptqd demo`` runs: the paper's two settings (He et al., arXiv 2305.10657, section 5) on fashion-ldm."""

from typing import Any

from ptqd.diffusion.sampling import Sampling
from ptqd.experiments.experiment import ABLATION, Experiment, named_recipes

_LABELS = list(range(10))


def demo(samples: int, stochastic_steps: int, measured: int, recipes: tuple[str, ...]) -> Experiment:
    """The demo's experiment: 20 steps, eta 0, guidance 3; and ``stochastic_steps`` steps, eta 1, guidance 1.5."""
    shared: dict[str, Any] = {"samples": samples, "batch": 100, "seed": 0}
    return Experiment(
        model="fashion-ldm",
        settings=(
            Sampling(20, 0.0, call={"class_labels": _LABELS, "guidance_scale": 3.0}, **shared),
            Sampling(stochastic_steps, 1.0, call={"class_labels": _LABELS, "guidance_scale": 1.5}, **shared),
        ),
        recipes=named_recipes(recipes),
        measured=measured,
        corrections=ABLATION,
    )


RECIPES = ("w8a8", "w4a8", "w4a4")
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"samples": 100, "stochastic_steps": 50, "measured": 32, "recipes": ("w4a8",)},
    "standard": {"samples": 250, "stochastic_steps": 50, "measured": 64, "recipes": ("w4a8", "w4a4")},
    "full": {"samples": 5000, "stochastic_steps": 250, "measured": 256, "recipes": RECIPES},
}
