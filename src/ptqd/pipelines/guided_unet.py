"""UNets of guided-diffusion that ``UNet2DModel`` has no words for; a saved pipeline names this module.

Dhariwal and Nichol, arXiv 2105.05233; ``guided_diffusion/unet.py`` of the original.
"""

from diffusers import (
    ModelMixin,  # noqa: F401  looked for here when a folder with a GuidedUNet2DModel is loaded
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps


class GuidedUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` whose sinusoid has a width, and whose attention has a number of heads, of its own.

    ``UNet2DModel`` makes the sinusoid as wide as the first level, which is half as wide as it in the 512 pixel model,
    and fixes the width of a head, where the 128 pixel model and an upsampler have four heads at every width.

    Args:
        time_proj_dim: width of the sinusoid; the time embedding has four times that.
        num_heads: of every attention layer; None: as many as are ``attention_head_dim`` wide.
        time_scale: what a timestep is multiplied with: 1000 where the scheduler tells ln(sigma) / 4 and the network
            learned 250 ln(sigma).
    """

    ignore_for_config = [  # noqa: RUF012  as diffusers has it
        "add_attention",
        "downsample_padding",
        "dropout",
        "flip_sin_to_cos",
        "freq_shift",
        "mid_block_scale_factor",
        "mid_block_type",
        "num_train_timesteps",
        "time_embedding_dim",
    ]

    @register_to_config
    def __init__(
        self,
        time_proj_dim: int = 128,
        num_heads: int | None = None,
        time_scale: float = 1.0,
        attention_head_dim: int | None = 64,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 6,
        num_class_embeds: int | None = None,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (128, 256),
        layers_per_block: int = 2,
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        resnet_time_scale_shift: str = "scale_shift",
        attn_norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        class_embed_type: str | None = None,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_class_embeds=num_class_embeds,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            class_embed_type=class_embed_type,
            attention_head_dim=attention_head_dim if num_heads is None else None,  # None: one head, until below
            time_embedding_dim=4 * time_proj_dim,
        )
        self.register_to_config(attention_head_dim=attention_head_dim)
        self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos=True, downscale_freq_shift=0, scale=time_scale)
        self.time_embedding = TimestepEmbedding(time_proj_dim, 4 * time_proj_dim)
        if num_heads is None:
            return
        for name, module in self.named_modules():
            if hasattr(module, "heads") and hasattr(module, "to_q"):
                if module.inner_dim % num_heads:
                    raise ValueError(f"{name} is {module.inner_dim} wide, which {num_heads} heads do not divide")
                module.heads = module.sliceable_head_dim = num_heads
                module.scale = (module.inner_dim // num_heads) ** -0.5
