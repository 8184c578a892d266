"""What published denoisers cost, counted from their configurations on the meta device, beside the published figures.

    python bench/cost.py

Published: LDM-4 on ImageNet 256 as PTQD states it (arXiv 2305.10657): 400.9 M parameters, 102.20 T bit operations in
FP32 for one call; parameters of LSUN-Bedrooms LDM-4 and LSUN-Churches LDM-8 from the checkpoints. FLUX.1-dev's
transformer is diffusers' default configuration, at 1024 x 1024 pixels with 512 tokens of text; it is counted to show
that size costs no memory.
"""

import resource
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from ptqd.diffusion import PRODUCTS, Macs, call_macs, on_meta
from ptqd.experiments import bare_denoiser, denoiser_config, one_call
from ptqd.quantization import cost_of, insert_quantizers
from ptqd.quantization.recipe import Recipe

PUBLISHED = {"ldm4-imagenet": (400.9, 102.20), "ldm4-bedrooms": (274.1, None), "ldm8-churches": (295.0, None)}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def flux() -> tuple[FluxTransformer2DModel, dict[str, int]]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).eval()
        macs = call_macs(
            model,
            hidden_states=torch.zeros(1, 4096, 64),
            encoder_hidden_states=torch.zeros(1, 512, 4096),
            pooled_projections=torch.zeros(1, 768),
            timestep=torch.zeros(1),
            img_ids=torch.zeros(4096, 3),
            txt_ids=torch.zeros(512, 3),
            guidance=torch.zeros(1),
        )
    return model, macs


def show(name: str, model: Any, macs: dict[str, int], published: tuple[float, float | None] | None) -> None:
    whole = sum(macs.values())
    layers = sum(n for layer, n in macs.items() if not layer.endswith(PRODUCTS))
    print(f"\n{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    for title, count in (("layers with weights", layers), ("attention products", whole - layers), ("all", whole)):
        print(f"  {title:20s} {count / 1e9:10.4f} GMACs  {count * 1024 / 1e12:10.4f} TBOPs in FP32")
    if published is not None:
        parameters, tera = published
        print(f"  published: {parameters} M parameters" + ("" if tera is None else f", {tera:.2f} TBOPs in FP32"))
        if tera is not None:
            off, rounded = 100 * (layers * 1024 / 1e12 / tera - 1), round(layers / 1e9, 1)
            print(
                f"  that is the layers with weights alone, {off:+.3f} %: {rounded} GMACs x 1024 = {rounded * 1.024:.2f}"
            )
    for recipe in ("w8a8", "w4a8", "w4a4"):
        quantized = on_meta(model)
        insert_quantizers(quantized, Recipe.parse(recipe))
        cost = cost_of(quantized, Macs.of([macs]))
        print(f"  {recipe}: {cost.total / 1e12:8.3f} TBOPs, {cost.ratio:5.2f}x fewer, {cost.disk / 1e6:8.1f} MB")


def main() -> None:
    print(f"torch {torch.__version__}; one denoiser call, one sample")
    for name, published in PUBLISHED.items():
        config = denoiser_config(name)
        assert config is not None
        model = bare_denoiser(config)
        show(name, model, one_call(config, model), published)
    before = peak()
    model, macs = flux()
    show("FLUX.1-dev, 4,096 + 512 tokens", model, macs, None)
    size = 4 * sum(p.numel() for p in model.parameters()) / 1e9
    print(f"  {size:.1f} GB of float32 weights; memory grew by {peak() - before:.0f} MiB while it was counted")


if __name__ == "__main__":
    main()
