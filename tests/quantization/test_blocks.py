from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch

from ptqd import Recipe
from ptqd.quantization import SKIPS, concatenations, find_units, insert_quantizers

SMALL: dict[str, Any] = {"norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}


def pixel(*kinds: str) -> Any:
    down, up = kinds
    return d.UNet2DModel(
        block_out_channels=(8, 12, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", down, down),
        up_block_types=(up, up, "UpBlock2D"),
        attention_head_dim=4,
        **{**SMALL, "layers_per_block": 2},
    )


def conditional(down: str = "CrossAttnDownBlock2D", up: str = "CrossAttnUpBlock2D") -> Any:
    return d.UNet2DConditionModel(
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", down, down),
        up_block_types=(up, up, "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        **SMALL,
    )


def video() -> Any:
    return d.UNet3DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **SMALL,
    )


UNETS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (lambda: pixel("DownBlock2D", "UpBlock2D"), {"sample": torch.randn(2, 3, 16, 16), "timestep": 1}),
    "attention": (
        lambda: pixel("AttnDownBlock2D", "AttnUpBlock2D"),
        {"sample": torch.randn(2, 3, 16, 16), "timestep": 1},
    ),
    "resampling": (
        lambda: pixel("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
        {"sample": torch.randn(2, 3, 16, 16), "timestep": 1},
    ),
    "conditional": (
        conditional,
        {"sample": torch.randn(2, 4, 16, 16), "timestep": 1, "encoder_hidden_states": torch.randn(2, 3, 8)},
    ),
    "video": (
        video,
        {"sample": torch.randn(2, 4, 3, 16, 16), "timestep": 1, "encoder_hidden_states": torch.randn(2, 3, 8)},
    ),
}


def seen_concatenations(model: Any, call: dict[str, Any]) -> dict[str, int]:
    """The same by watching: what an up block is given, less what it skips."""
    found: dict[str, int] = {}

    def watch(name: str) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            skips = list(kwargs[SKIPS] if SKIPS in kwargs else args[1])
            for i, block in enumerate(module.resnets):
                if block.conv_shortcut is not None:
                    found[f"{name}.resnets.{i}.conv_shortcut"] = block.in_channels - skips[-1 - i].shape[1]

        return before

    for name, module in model.named_modules():
        if name.startswith("up_blocks.") and hasattr(module, "resnets"):
            module.register_forward_pre_hook(watch(name), with_kwargs=True)
    with torch.no_grad():
        model(**call)
    return found


@pytest.mark.parametrize("kind", UNETS)
def test_skip_connections_are_found_as_they_are_seen(kind: str) -> None:
    make, call = UNETS[kind]
    model = make()
    found = concatenations(model)
    assert len(found) >= 4
    assert found == seen_concatenations(model, call)


def test_a_split_layer_computes_the_same_while_it_observes() -> None:
    make, call = UNETS["conditional"]
    model = make().eval()
    with torch.no_grad():
        want = model(**call).sample
        insert_quantizers(model, Recipe.parse("w4a8-split"))
        for module in model.modules():
            if hasattr(module, "observe"):
                module.observe()
        got = model(**call).sample
    assert torch.allclose(got, want, atol=1e-5)


def quantized(model: Any) -> Any:
    insert_quantizers(model, Recipe.parse("w4a8-split"))
    return model


def test_units_of_a_unet_are_its_blocks() -> None:
    units = find_units(quantized(conditional()))
    assert {"conv_in", "time_embedding", "conv_out", "mid_block.resnets.1"} <= set(units)
    assert "down_blocks.1.attentions.0.transformer_blocks.0" in units
    assert "down_blocks.1.attentions.0.proj_in" in units
    assert "down_blocks.0.downsamplers.0" in units


def transformers() -> dict[str, Any]:
    return {
        "dit": d.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        "sd3": d.SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            in_channels=4,
            out_channels=4,
        ),
        "flux": d.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        ),
        "pixart": d.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=8,
        ),
    }


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux", "pixart"])
def test_units_of_a_transformer_are_its_blocks(kind: str) -> None:
    from ptqd.quantization.modules import QuantLayer

    model = quantized(transformers()[kind])
    units = find_units(model)
    blocks = [name for name in units if name.startswith(("transformer_blocks.", "single_transformer_blocks."))]
    assert len(blocks) == (3 if kind == "flux" else 2)
    assert all(name.count(".") == 1 for name in blocks)
    covered = [n for n, m in model.named_modules() if isinstance(m, QuantLayer)]
    assert all(sum(f"{name}.".startswith(f"{unit}.") for unit in units) == 1 for name in covered)
