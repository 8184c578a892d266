"""What knows of the quantization noise, step by step: the page docs/why.

    python bench/why.py docs/why

For fashion-ldm in the paper's two settings: the share of the noise's variance that a linear map of what a step knows
explains, and the noise's correlation with eps and with x_t. Statistics of 256 samples.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch

import ptqd
from ptqd.diffusion.sampling import Sampling
from ptqd.noise import Layout, covariance, inverse, mean_table
from ptqd.noise.stats import NoiseStats

mpl.use("Agg")
import matplotlib.pyplot as plt

SAMPLES = 256
RECIPES = ("w8a8", "w4a8", "w4a4")
SETTINGS = {
    "20 steps, eta 0, guidance 3": (20, 0.0, 3.0),
    "50 steps, eta 1, guidance 1.5": (50, 1.0, 1.5),
}


def explained(stats: NoiseStats) -> dict[str, torch.Tensor]:
    """R^2 by step (T,) of regressions of the noise, mean over channels."""
    layout: Layout = stats.layout
    q, x, e = layout.blocks
    c = layout.channels
    _, cov = covariance(mean_table(stats.joint, stats.fold_samples)[:, 0])
    own = torch.arange(c)
    noise = torch.zeros(c, cov.shape[-1], dtype=cov.dtype)
    noise[own, q.start + own], noise[own, e.start + own] = 1, -1
    total = (noise @ cov @ noise.T).diagonal(dim1=-2, dim2=-1)  # T,C

    def share(known: list[int] | torch.Tensor) -> torch.Tensor:
        index = torch.as_tensor(known)
        cross = (noise @ cov)[..., index]
        within = cov[..., index, :][..., index]
        told = (cross @ inverse(within) * cross).sum(-1)
        return (told.sum(-1) / total.sum(-1)).clamp(0, 1)

    def each(start: int) -> torch.Tensor:
        cross, var = (noise @ cov)[..., own, start + own], cov[..., start + own, start + own]
        return (cross**2 / var).sum(-1) / total.sum(-1)

    first = [*(q.start + own).tolist(), *(x.start + own).tolist()]
    return {
        "eps, one slope (CNC)": stats.fit().r2.value,
        "eps_q, each channel (D2-DPM)": each(q.start),
        "x_t, each channel": each(x.start),
        "x_t, across channels": share((x.start + own).tolist()),
        "eps_q and x_t, across channels": share(first),
        "and the four neighbours (joint)": share(torch.arange(1, 1 + 2 * layout.taps * c)),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    pipe = ptqd.load("fashion-ldm")
    lines = [
        "| setting | recipe | what is known | first step | middle | last | mean over steps |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    figure, axes = plt.subplots(len(SETTINGS), len(RECIPES), figsize=(14, 7.5), layout="constrained", sharey=True)
    for row, (title, (steps, eta, guidance)) in zip(axes, SETTINGS.items(), strict=True):
        call = {"class_labels": list(range(10)), "guidance_scale": guidance}
        run = Sampling(steps, eta, SAMPLES, 64, call=call)
        for axis, recipe in zip(row, RECIPES, strict=True):
            stats = ptqd.measure(pipe, ptqd.quantize(pipe, recipe, run), run)
            for name, values in explained(stats).items():
                axis.plot(100 * values, label=name)
                shown = [100 * values[i].item() for i in (0, steps // 2, -1)]
                lines.append(
                    f"| {title} | {recipe} | {name} | "
                    + " | ".join(f"{v:.0f} %" for v in shown)
                    + f" | {100 * values.mean():.0f} % |"
                )
            axis.set_title(f"{recipe}: {title}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.set_xlabel("sampling step")
            print(title, recipe, flush=True)
        row[0].set_ylabel("noise's variance explained, %")
    axes[0][0].legend(fontsize=8)
    figure.savefig(folder / "explained.png", dpi=90)
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
