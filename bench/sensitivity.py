"""Which layers the noise comes from, on fashion-ldm: shares of the activations' and of the weights' noise at 4 bits.

    python bench/sensitivity.py

To first order, mean over the steps (ptqd.mixed_precision.sensitivity), beside the
layer's share of the multiply-accumulates.
"""

import torch

import ptqd
from ptqd.diffusion import run_macs
from ptqd.diffusion.sampling import Sampling
from ptqd.mixed_precision import measure_sensitivity

RUN = Sampling(50, 1.0, 64, 64, 0, {"class_labels": list(range(10)), "guidance_scale": 1.5})
SHOWN = 8


def main() -> None:
    pipe = ptqd.load("fashion-ldm")
    quantized = ptqd.quantize(pipe, "w8a4+8", RUN)
    found, macs = measure_sensitivity(pipe, quantized, RUN, weight_bits=(4, 8)), run_macs(pipe, RUN)
    cost = dict(zip(macs.layers, (macs.counts.sum(0) / macs.total).tolist(), strict=True))
    print(f"50 steps, eta 1, guidance 1.5, torch {torch.__version__}; shares of noise and of multiply-accumulates")
    kept = [
        i for i, name in enumerate(found.weighted) if name not in ("conv_in", "conv_out")
    ]  # at 8 bits by the recipe
    tables = {
        "activations at 4 bits": (found.layers, found.activations[:, :, 0].mean(0)),
        "weights at 4 bits": (tuple(found.weighted[i] for i in kept), found.weights[:, kept, 0].mean(0)),
    }
    for title, (names, energy) in tables.items():
        print(f"\n{title}")
        for i in energy.argsort(descending=True)[:SHOWN].tolist():
            share, of_macs = float(energy[i] / energy.sum()), cost.get(names[i], 0.0)
            print(f"  {names[i]:45s} {share:6.1%} of the noise  {of_macs:6.2%} of the MACs")


if __name__ == "__main__":
    main()
