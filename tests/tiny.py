"""Every kind of pipeline, tiny, with random weights; text goes through real tokenizers of a few letters."""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import numpy as np
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from conftest import SCHEDULE, tiny_pipeline
from ptqd import LatentPipeline

PROMPTS = ["a red cat", "a blue dog", "two birds"]
WIDTH = 16  # of all text encoders
LENGTH = 16  # tokens of a prompt


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocabulary, [], model_max_length=LENGTH)


def clip_encoder(kind: Any = CLIPTextModel) -> Any:
    size: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "projection_dim": WIDTH,
        "max_position_embeddings": LENGTH,
    }
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
    tokens: dict[str, Any] = {"vocab_size": 54, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return kind(CLIPTextConfig(**size, **layers, **tokens)).eval()


def t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5Tokenizer([(token, -float(i)) for i, token in enumerate(tokens)], extra_ids=0, model_max_length=LENGTH)


def t5_encoder(kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    size = {"d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return kind(config(**size)).eval()


def autoencoder(**changes: Any) -> d.AutoencoderKL:
    """Halves height and width."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return d.AutoencoderKL(**{**blocks, **shape, "scaling_factor": 0.5, **changes}).eval()


def unet(**changes: Any) -> d.UNet2DConditionModel:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    shape = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    attention = {"attention_head_dim": 2, "cross_attention_dim": WIDTH}
    return d.UNet2DConditionModel(**{**blocks, **shape, **attention, **changes}).eval()


def pixel_unet(out_channels: int) -> d.UNet2DModel:
    return d.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def ddpm(out_channels: int = 2, variance_type: str = "fixed_small") -> d.DiffusionPipeline:
    scheduler = d.DDPMScheduler(variance_type=variance_type, clip_sample=False)
    return d.DDPMPipeline(pixel_unet(out_channels), scheduler)


def ddpm_learned_variance() -> d.DiffusionPipeline:
    return ddpm(4, "learned_range")


def ddim() -> d.DiffusionPipeline:
    return d.DDIMPipeline(pixel_unet(2), d.DDIMScheduler(clip_sample=False))


def codebook() -> d.VQModel:
    """Halves height and width."""
    return d.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        num_vq_embeddings=16,
        norm_num_groups=4,
    )


def ldm() -> d.DiffusionPipeline:
    """As CompVis/ldm-celebahq-256."""
    return d.LDMPipeline(codebook(), pixel_unet(2), d.DDIMScheduler(clip_sample=False))


def latent() -> d.DiffusionPipeline:
    return LatentPipeline(codebook(), pixel_unet(2), d.DDIMScheduler(clip_sample=False))


def dit() -> d.DiffusionPipeline:
    transformer = d.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    return d.DiTPipeline(transformer.eval(), autoencoder(), d.DDIMScheduler(clip_sample=False))


def stable_diffusion(kind: Any = d.StableDiffusionPipeline, **scheduler: Any) -> d.DiffusionPipeline:
    return kind(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=d.DDIMScheduler(**{**SCHEDULE, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2() -> d.DiffusionPipeline:
    return stable_diffusion(prediction_type="v_prediction")


def stable_diffusion_image() -> d.DiffusionPipeline:
    return stable_diffusion(d.StableDiffusionImg2ImgPipeline)


def stable_diffusion_inpaint(in_channels: int = 9) -> d.DiffusionPipeline:
    pipe = stable_diffusion(d.StableDiffusionInpaintPipeline)
    pipe.register_modules(unet=unet(in_channels=in_channels))
    return pipe


def stable_diffusion_inpaint_blended() -> d.DiffusionPipeline:
    """Four channels: the pipeline puts the known part back after every step."""
    return stable_diffusion_inpaint(4)


def latent_consistency() -> d.DiffusionPipeline:
    """The last step's estimate of the clean sample is its result."""
    pipe = stable_diffusion()
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    return d.LatentConsistencyModelPipeline(
        **parts,
        unet=unet(time_cond_proj_dim=8),
        scheduler=d.LCMScheduler(original_inference_steps=50),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def deepfloyd() -> d.DiffusionPipeline:
    """In pixels, with a learned variance that guidance leaves alone."""
    return d.IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=unet(in_channels=3, out_channels=6),
        scheduler=d.DDPMScheduler(variance_type="learned_range", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> d.DiffusionPipeline:
    conditioned = unet(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return d.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=conditioned,
        scheduler=d.EulerDiscreteScheduler(**{k: v for k, v in SCHEDULE.items() if k.startswith("beta")}),
        add_watermarker=False,
    )


def stable_diffusion_3() -> d.DiffusionPipeline:
    transformer = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    encoder = t5_encoder(config=lambda **size: T5Config(**{**size, "d_model": 32}))
    return d.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> d.DiffusionPipeline:
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )


def pixart_sigma() -> d.DiffusionPipeline:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return d.PixArtSigmaPipeline(
        t5_tokenizer(), t5_encoder(), autoencoder(), transformer.eval(), d.DPMSolverMultistepScheduler()
    )


def sana() -> d.DiffusionPipeline:
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=8,
    )
    vae = d.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    encoder: Any = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    return d.SanaPipeline(
        GemmaTokenizer({token: i for i, token in enumerate(tokens)}, []),
        encoder.eval(),
        vae.eval(),
        transformer.eval(),
        d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def cogvideox() -> d.DiffusionPipeline:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=LENGTH,
    )
    vae = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = d.CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return d.CogVideoXPipeline(t5_tokenizer(), t5_encoder(), vae.eval(), transformer.eval(), scheduler)


def wan() -> d.DiffusionPipeline:
    transformer = d.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = d.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return d.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(UMT5EncoderModel, UMT5Config),
        vae=vae.eval(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer.eval(),
    )


def ltx() -> d.DiffusionPipeline:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return d.LTXPipeline(scheduler, vae.eval(), t5_encoder(), t5_tokenizer(), transformer.eval())


def stable_video() -> d.DiffusionPipeline:
    """From an image; frames come before channels, and guidance grows from frame to frame."""
    frames = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=WIDTH,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vision: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 112}
    encoder: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    return d.StableVideoDiffusionPipeline(
        d.AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4).eval(),
        encoder.eval(),
        frames.eval(),
        d.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True),
        CLIPImageProcessorPil(),
    )


def text_to_video() -> d.DiffusionPipeline:
    """A step's rows are frames."""
    frames = d.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )
    parts = (autoencoder(), clip_encoder(), clip_tokenizer(), frames.eval(), d.DDIMScheduler(**SCHEDULE))
    return d.TextToVideoSDPipeline(*parts)


def stable_audio() -> d.DiffusionPipeline:
    transformer = d.StableAudioDiTModel(
        sample_size=12,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return d.StableAudioPipeline(
        vae.eval(),
        t5_encoder(),
        d.StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32).eval(),
        t5_tokenizer(),
        transformer.eval(),
        d.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential", solver_order=2
        ),
    )


def dance_diffusion() -> d.DiffusionPipeline:
    wave = d.UNet1DModel(
        sample_size=64,
        sample_rate=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32, 32, 32),
        extra_in_channels=64,
        use_timestep_embedding=False,
        flip_sin_to_cos=True,
        norm_num_groups=4,
    )
    return d.DanceDiffusionPipeline(wave.eval(), d.IPNDMScheduler())


def pictures(n: int, size: int = 16) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 255, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def masks(n: int, size: int = 16) -> list[Image.Image]:
    left = np.zeros((size, size), dtype=np.uint8)
    left[:, : size // 2] = 255
    return [Image.fromarray(left)] * n


@dataclass(frozen=True)
class Case:
    """A pipeline and how it is run.

    Attributes:
        build: with random weights.
        call: arguments of the pipeline's call.
        channels: of the sample that its scheduler steps.
        guidance: call arguments that turn classifier-free guidance on; off without them. None: it has none.
        steps: asked for.
        eta: DDIM's.
    """

    build: Callable[[], d.DiffusionPipeline]
    call: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 4
    guidance: Mapping[str, Any] | None = None
    steps: int = 3
    eta: float = 0.0


TEXT: dict[str, Any] = {"prompt": PROMPTS, "guidance_scale": 1.0}
GUIDED: dict[str, Any] = {"guidance_scale": 3.0}
IMAGE: dict[str, Any] = {**TEXT, "image": pictures(3), "strength": 0.6}
MASK: dict[str, Any] = {"mask_image": masks(3), "height": 16, "width": 16}

CASES = {
    "ddpm": Case(ddpm, channels=2),
    "ddpm-learned-variance": Case(ddpm_learned_variance, channels=2),
    "ddim": Case(ddim, channels=2, eta=1.0),
    "ldm": Case(ldm, channels=2),
    "latent": Case(latent, channels=2, eta=1.0),
    "latent-class": Case(tiny_pipeline, {"class_labels": [0, 1, 2], "guidance_scale": 1.0}, guidance=GUIDED, eta=0.5),
    "dit": Case(dit, {"class_labels": [0, 1, 2], "guidance_scale": 1.0}, guidance=GUIDED),
    "sd1": Case(stable_diffusion, TEXT, guidance=GUIDED, eta=1.0),
    "sd2": Case(stable_diffusion_2, TEXT, guidance=GUIDED),
    "sd-img2img": Case(stable_diffusion_image, IMAGE, guidance=GUIDED, steps=5),
    "sd-inpaint": Case(stable_diffusion_inpaint, {**IMAGE, **MASK}, guidance=GUIDED, steps=5),
    "sd-inpaint-blended": Case(stable_diffusion_inpaint_blended, {**IMAGE, **MASK}, guidance=GUIDED, steps=5),
    "sdxl": Case(stable_diffusion_xl, {**TEXT, "original_size": (32, 24)}, guidance=GUIDED),
    "lcm": Case(latent_consistency, {"prompt": PROMPTS}),
    "deepfloyd-if": Case(deepfloyd, {**TEXT, "clean_caption": False}, channels=3, guidance=GUIDED),
    "sd3": Case(stable_diffusion_3, {**TEXT, "max_sequence_length": LENGTH}, guidance=GUIDED),
    "flux": Case(
        flux,
        {"prompt": PROMPTS, "height": 16, "width": 24, "max_sequence_length": LENGTH, "sigmas": (1.0, 0.7, 0.3)},
        channels=16,
        guidance={"negative_prompt": ["x"], "true_cfg_scale": 2.0},
    ),
    "pixart-sigma": Case(
        pixart_sigma,
        {
            **TEXT,
            "use_resolution_binning": False,
            "max_sequence_length": LENGTH,
            "clean_caption": False,
            "height": 16,
            "width": 16,
        },
        guidance=GUIDED,
    ),
    "sana": Case(
        sana,
        {
            **TEXT,
            "use_resolution_binning": False,
            "max_sequence_length": LENGTH,
            "complex_human_instruction": None,
            "clean_caption": False,
            "height": 32,
            "width": 32,
        },
        guidance=GUIDED,
    ),
    "cogvideox": Case(
        cogvideox,
        {**TEXT, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": LENGTH},
        guidance=GUIDED,
    ),
    "wan": Case(
        wan, {**TEXT, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": LENGTH}, guidance=GUIDED
    ),
    "ltx": Case(
        ltx,
        {**TEXT, "height": 32, "width": 64, "num_frames": 9, "max_sequence_length": LENGTH},
        channels=8,
        guidance=GUIDED,
    ),
    "stable-video": Case(
        stable_video,
        {"image": pictures(3), "height": 16, "width": 16, "num_frames": 3, "max_guidance_scale": 1.0},
        guidance={"max_guidance_scale": 3.0},
    ),
    "text-to-video": Case(text_to_video, {**TEXT, "num_frames": 3, "height": 16, "width": 16}, guidance=GUIDED),
    "stable-audio": Case(stable_audio, {**TEXT, "audio_end_in_s": 4.0}, guidance=GUIDED),
    "dance": Case(dance_diffusion, channels=2),
}
