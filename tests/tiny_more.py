"""More kinds of pipelines, tiny, with random weights; see tiny.py."""

import string
from typing import Any

import diffusers as d
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenPrior
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    ByT5Tokenizer,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    UMT5Config,
    UMT5EncoderModel,
)

from conftest import SCHEDULE
from tiny import (
    GUIDED,
    IMAGE,
    LENGTH,
    MASK,
    PROMPTS,
    TEXT,
    WIDTH,
    Case,
    autoencoder,
    clip_encoder,
    clip_tokenizer,
    flux,
    ltx,
    masks,
    pictures,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    t5_encoder,
    t5_tokenizer,
    unet,
    wan,
)

CHAT = (  # a chat template
    "{% for message in messages %}{% set said = message['content'] %}"
    "{{ said if said is string else said[0]['text'] }};{% endfor %}"
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def settings(model: Any) -> dict[str, Any]:
    """A model's configuration, to build another with changes."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler(shift=3.0)


def dynamic_flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def letters() -> dict[str, int]:
    """A byte-level vocabulary: ``Ġ`` is a space, ``Ċ`` a new line."""
    symbols = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"]
    return {token: i for i, token in enumerate([*SPECIAL, *symbols])}


def qwen_tokenizer(**changes: Any) -> Any:
    special = {"extra_special_tokens": SPECIAL[1:]}
    return Qwen2Tokenizer(letters(), [], **{"chat_template": CHAT, **special, **changes})


def decoder_size(layers: int = 2) -> dict[str, Any]:
    """Of a text encoder that is a decoder-only language model."""
    return {
        "vocab_size": 128,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def qwen2_5_vl() -> Any:
    text = decoder_size() | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    tokens: dict[str, Any] = {"image_token_id": 3, "video_token_id": 4}
    tokens |= {"vision_start_token_id": 5, "vision_end_token_id": 6}
    config: Any = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    return model.eval()


def qwen3(kind: Any = Qwen3Model, layers: int = 2) -> Any:
    return kind(Qwen3Config(**decoder_size(layers))).eval()


def llama(kind: Any = LlamaModel, layers: int = 3) -> Any:
    return kind(LlamaConfig(**decoder_size(layers))).eval()


def gemma_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    return GemmaTokenizer({token: i for i, token in enumerate(tokens)}, [])


def gemma() -> Any:
    config: Any = Gemma2Config(**{**decoder_size(), "vocab_size": 32})
    model: Any = Gemma2Model(config)
    return model.eval()


def letter_tokenizer(**changes: Any) -> Any:
    """A fast tokenizer of no model in particular: one token a character."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *string.punctuation, "▁"]
    kernel = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    kernel.pre_tokenizer = pre_tokenizers.Metaspace()
    kernel.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=kernel, **{**special, "model_max_length": 64, **changes})


def video_autoencoder(kind: Any = d.AutoencoderKLWan) -> Any:
    """Divides height and width by eight, and frames by four."""
    return kind(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def flow_autoencoder(**changes: Any) -> Any:
    return autoencoder(**{"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, **changes})


def qwen_image() -> d.DiffusionPipeline:
    """A prompt's length is that of its own; guidance keeps the length of the conditional output."""
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return d.QwenImagePipeline(
        dynamic_flow(), video_autoencoder(d.AutoencoderKLQwenImage), qwen2_5_vl(), qwen_tokenizer(), transformer.eval()
    )


def z_image() -> d.DiffusionPipeline:
    transformer = d.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    )
    return d.ZImagePipeline(flow(), flow_autoencoder(), qwen3(), qwen_tokenizer(), transformer.eval())


def wan_transformer(**changes: Any) -> Any:
    size: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    size |= {"text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32}
    return d.WanTransformer3DModel(**{**size, **changes}).eval()


def wan_2_2() -> d.DiffusionPipeline:
    """Two transformers: the first for the noisier steps, the second for the others."""
    parts = wan().components
    return d.WanPipeline(**{**parts, "transformer_2": wan_transformer(), "boundary_ratio": 0.8})


def vision_size(**changes: Any) -> dict[str, Any]:
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 112}
    return {**size, **changes}


def vision_encoder(kind: Any = CLIPVisionModelWithProjection, **changes: Any) -> Any:
    return kind(CLIPVisionConfig(**vision_size(**changes))).eval()


def wan_image() -> d.DiffusionPipeline:
    """From an image, that the transformer gets beside the sample (Wan 2.1)."""
    parts = {name: wan().components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return d.WanImageToVideoPipeline(
        **parts,
        image_processor=CLIPImageProcessorPil(),
        image_encoder=vision_encoder(CLIPVisionModel),
        transformer=wan_transformer(in_channels=12, image_dim=WIDTH, added_kv_proj_dim=24),
    )


def long_clip(kind: Any = CLIPTextModel) -> Any:
    """Of as many tokens as OpenAI's, for the pipelines that ask for them."""
    config: Any = clip_encoder(kind).config
    config.max_position_embeddings = 77
    return kind(config).eval()


def hunyuan_video() -> d.DiffusionPipeline:
    """Guidance is embedded."""
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 4, 8),
    )
    parts = (llama(), letter_tokenizer(), transformer.eval(), hunyuan_vae(), flow(), long_clip(), clip_tokenizer())
    return d.HunyuanVideoPipeline(*parts)


def consistency_model() -> d.DiffusionPipeline:
    """In pixels, with classes."""
    pixels = d.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=3,
        resnet_time_scale_shift="scale_shift",
    )
    return d.ConsistencyModelPipeline(pixels.eval(), d.CMStochasticIterativeScheduler(num_train_timesteps=40))


def sana_sprint() -> d.DiffusionPipeline:
    """Guidance is embedded; the last step's estimate of the clean sample is its result."""
    parts = sana().components
    transformer = d.SanaTransformer2DModel(
        **{**settings(parts["transformer"]), "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    )
    return d.SanaSprintPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        transformer=transformer.eval(),
        scheduler=d.SCMScheduler(),
    )


def lumina_2() -> d.DiffusionPipeline:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(128, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return d.Lumina2Pipeline(transformer.eval(), flow(), flow_autoencoder(), gemma(), gemma_tokenizer())


def flux_2_klein() -> d.DiffusionPipeline:
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = d.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    encoder = qwen3(Qwen3ForCausalLM, layers=3)
    return d.Flux2KleinPipeline(dynamic_flow(), vae.eval(), encoder, qwen_tokenizer(), transformer.eval())


def flux_image() -> d.DiffusionPipeline:
    return d.FluxImg2ImgPipeline(**flux().components)


def flux_control() -> d.DiffusionPipeline:
    """The transformer gets the control image beside the sample."""
    parts = {
        name: part for name, part in flux().components.items() if name not in {"image_encoder", "feature_extractor"}
    }
    config = settings(parts.pop("transformer"))
    transformer = d.FluxTransformer2DModel(**{**config, "in_channels": 32, "out_channels": 16})
    return d.FluxControlPipeline(**parts, transformer=transformer.eval())


def chroma() -> d.DiffusionPipeline:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return d.ChromaPipeline(dynamic_flow(), flow_autoencoder(), t5_encoder(), t5_tokenizer(), transformer.eval())


def aura_flow() -> d.DiffusionPipeline:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    encoder = t5_encoder(UMT5EncoderModel, UMT5Config)
    return d.AuraFlowPipeline(t5_tokenizer(), encoder, autoencoder(), transformer.eval(), flow())


def cogview_4() -> d.DiffusionPipeline:
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    config: Any = GlmConfig(**decoder_size())
    encoder: Any = GlmModel(config)
    return d.CogView4Pipeline(
        letter_tokenizer(padding_side="left"), encoder.eval(), flow_autoencoder(), transformer.eval(), dynamic_flow()
    )


def mochi() -> d.DiffusionPipeline:
    """Twelve latent channels, that the pipeline counts on."""
    transformer = d.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=LENGTH,
    )
    vae = d.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 12,
        latents_std=(1.0,) * 12,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return d.MochiPipeline(scheduler, vae.eval(), t5_encoder(), t5_tokenizer(), transformer.eval())


def bert_tokenizer() -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    tokens += [f"##{letter}" for letter in string.ascii_lowercase]
    return BertTokenizer({token: i for i, token in enumerate(tokens)}, model_max_length=77)


def hunyuan_dit() -> d.DiffusionPipeline:
    """With a learned variance that the pipeline drops."""
    transformer = d.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
    )
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    encoder: Any = BertModel(BertConfig(vocab_size=64, max_position_embeddings=77, **size))
    return d.HunyuanDiTPipeline(
        autoencoder(),
        encoder.eval(),
        bert_tokenizer(),
        transformer.eval(),
        d.DDPMScheduler(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart_alpha() -> d.DiffusionPipeline:
    """With a learned variance that the pipeline drops, and conditioned on the picture's size."""
    transformer = d.PixArtTransformer2DModel(
        sample_size=128,
        num_layers=1,
        patch_size=2,
        attention_head_dim=12,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=True,
    )
    parts = (t5_tokenizer(), t5_encoder(), autoencoder(), transformer.eval(), d.DPMSolverMultistepScheduler())
    return d.PixArtAlphaPipeline(*parts)


def latte() -> d.DiffusionPipeline:
    transformer = d.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=WIDTH,
        video_length=2,
    )
    scheduler = d.DDIMScheduler(clip_sample=False)
    return d.LattePipeline(t5_tokenizer(), t5_encoder(), autoencoder(), transformer.eval(), scheduler)


def hidream() -> d.DiffusionPipeline:
    """Four text encoders, experts, and a velocity that the pipeline negates."""
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return d.HiDreamImagePipeline(
        flow(),
        flow_autoencoder(),
        clip_encoder(CLIPTextModelWithProjection),
        clip_tokenizer(),
        clip_encoder(CLIPTextModelWithProjection),
        clip_tokenizer(),
        t5_encoder(),
        t5_tokenizer(),
        llama(LlamaForCausalLM, layers=2),
        letter_tokenizer(),
        transformer.eval(),
    )


def stirred(model: Any) -> Any:
    """The model with random values for the weights that training starts from zero."""
    for value in model.parameters():
        if not bool(value.any()):
            torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def controlnet(**changes: Any) -> Any:
    return stirred(
        d.ControlNetModel(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "attention_head_dim": 2,
                "cross_attention_dim": WIDTH,
                "conditioning_embedding_out_channels": (8, 8),
                **changes,
            }
        )
    )


def without(pipe: Any, *names: str) -> dict[str, Any]:
    """A pipeline's components but some."""
    return {name: part for name, part in pipe.components.items() if name not in names}


def stable_diffusion_controlnet(nets: int = 1) -> d.DiffusionPipeline:
    net = controlnet() if nets == 1 else [controlnet() for _ in range(nets)]
    parts = stable_diffusion().components
    return d.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)


def stable_diffusion_controlnets() -> d.DiffusionPipeline:
    """Two of them: a sample has a list of control images."""
    return stable_diffusion_controlnet(2)


def stable_diffusion_xl_refiner() -> d.DiffusionPipeline:
    """One text encoder, and an aesthetic score."""
    parts = without(stable_diffusion_xl(), "text_encoder", "tokenizer", "unet")
    conditioned = unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + WIDTH,
    )
    return d.StableDiffusionXLImg2ImgPipeline(
        **parts,
        text_encoder=None,
        tokenizer=None,
        unet=conditioned,
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def stable_diffusion_xl_controlnet() -> d.DiffusionPipeline:
    parts = stable_diffusion_xl().components
    names = (
        "cross_attention_dim",
        "use_linear_projection",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    net = controlnet(**{name: parts["unet"].config[name] for name in names})
    return d.StableDiffusionXLControlNetPipeline(**parts, controlnet=net, add_watermarker=False)


def stable_diffusion_xl_inpaint() -> d.DiffusionPipeline:
    parts = stable_diffusion_xl().components
    nine = d.UNet2DConditionModel(**{**settings(parts["unet"]), "in_channels": 9})
    return d.StableDiffusionXLInpaintPipeline(**{**parts, "unet": nine.eval()}, add_watermarker=False)


def stable_diffusion_pag() -> d.DiffusionPipeline:
    """Perturbed attention: other processors for some of the attention while it runs."""
    parts = stable_diffusion().components
    return d.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid")


def stable_diffusion_3_image() -> d.DiffusionPipeline:
    return d.StableDiffusion3Img2ImgPipeline(**stable_diffusion_3().components)


def motion_adapter() -> Any:
    return stirred(
        d.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            motion_max_seq_length=8,
            use_motion_mid_block=False,
        )
    )


def animate_diff() -> d.DiffusionPipeline:
    parts = {name: stable_diffusion().components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return d.AnimateDiffPipeline(**parts, unet=unet(), motion_adapter=motion_adapter())


def movq() -> Any:
    return d.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=32,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()


def kandinsky_2_2() -> d.DiffusionPipeline:
    """The decoder, from image embeddings; with a learned variance that guidance leaves alone."""
    conditioned = unet(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = d.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    return d.KandinskyV22Pipeline(conditioned, scheduler, movq())


def kandinsky_3() -> d.DiffusionPipeline:
    conditioned = d.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    scheduler = d.DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return d.Kandinsky3Pipeline(t5_tokenizer(), t5_encoder(), conditioned.eval(), scheduler, movq())


def stable_diffusion_upscale() -> d.DiffusionPipeline:
    """The unet gets a noisy small image beside the sample, and its noise as a class."""
    parts = {name: stable_diffusion().components[name] for name in ("text_encoder", "tokenizer")}
    return d.StableDiffusionUpscalePipeline(
        **parts,
        vae=autoencoder(scaling_factor=0.08333),  # diffusers warns of others
        unet=unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=d.DDPMScheduler(),
        scheduler=d.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
        max_noise_level=350,
    )


def stable_diffusion_depth() -> d.DiffusionPipeline:
    """A depth map is given in the call."""
    parts = {name: stable_diffusion().components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return d.StableDiffusionDepth2ImgPipeline(
        **parts, unet=unet(in_channels=5), depth_estimator=None, feature_extractor=None
    )


def stable_diffusion_edit() -> d.DiffusionPipeline:
    """Two guidances: by the text, and by the image, that the unet gets beside the sample."""
    parts = {**stable_diffusion().components, "unet": unet(in_channels=8)}
    return d.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def stable_diffusion_adapter() -> d.DiffusionPipeline:
    conditioned = unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    parts = {**without(stable_diffusion(), "image_encoder"), "unet": conditioned}
    adapter = d.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    return d.StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)


def marigold() -> d.DiffusionPipeline:
    """Depth of an image."""
    parts = {name: stable_diffusion().components[name] for name in ("vae", "text_encoder", "tokenizer")}
    scheduler = d.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    return d.MarigoldDepthPipeline(
        **parts,
        unet=unet(in_channels=8),
        scheduler=scheduler,
        prediction_type="depth",
        scale_invariant=True,
        shift_invariant=True,
        default_denoising_steps=3,
        default_processing_resolution=0,
    )


def cascade_unet(**changes: Any) -> Any:
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return d.StableCascadeUNet(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (blocks, blocks),
            "clip_text_pooled_in_channels": WIDTH,
            "timestep_ratio_embedding_dim": 8,
            **changes,
        }
    ).eval()


def stable_cascade_decoder() -> d.DiffusionPipeline:
    """From image embeddings; its denoiser is called ``decoder``."""
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8, latent_channels=4)
    return d.StableCascadeDecoderPipeline(
        cascade_unet(patch_size=2, effnet_in_channels=4, timestep_conditioning_type=("sca",)),
        clip_tokenizer(),
        clip_encoder(CLIPTextModelWithProjection),
        d.DDPMWuerstchenScheduler(),
        vqgan.eval(),
        latent_dim_scale=4.0,
    )


def stable_cascade_prior() -> d.DiffusionPipeline:
    """Its denoiser is called ``prior``."""
    prior = cascade_unet(
        clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH, timestep_conditioning_type=("sca", "crp")
    )
    return d.StableCascadePriorPipeline(
        clip_tokenizer(), clip_encoder(CLIPTextModelWithProjection), prior, d.DDPMWuerstchenScheduler()
    )


def stable_unclip() -> d.DiffusionPipeline:
    """Text to an image embedding with a prior of its own scheduler, and that to an image."""
    prior = d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, num_embeddings=LENGTH
    )
    sd = stable_diffusion().components
    return d.StableUnCLIPPipeline(
        prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=clip_encoder(CLIPTextModelWithProjection),
        prior=prior.eval(),
        prior_scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample=True
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=sd["tokenizer"],
        text_encoder=sd["text_encoder"],
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        scheduler=d.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
        vae=sd["vae"],
    )


def gligen() -> d.DiffusionPipeline:
    """Phrases in boxes, in the first steps only."""
    parts = without(stable_diffusion(), "image_encoder", "unet")
    return d.StableDiffusionGLIGENPipeline(
        **parts, unet=stirred(unet(attention_type="gated")), requires_safety_checker=False
    )


class NoChecks(d.ModelMixin, d.ConfigMixin):
    """In the place of a safety checker that cannot be left out."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_transformer(**changes: Any) -> Any:
    return d.CosmosTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "mlp_ratio": 2,
            "text_embed_dim": WIDTH,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
            **changes,
        }
    ).eval()


def cosmos() -> d.DiffusionPipeline:
    vae = d.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    )
    scheduler = d.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="sigma_min",
    )
    parts = (t5_encoder(), t5_tokenizer(), cosmos_transformer(), vae.eval(), scheduler)
    return d.CosmosTextToWorldPipeline(*parts, safety_checker=NoChecks())


def lumina() -> d.DiffusionPipeline:
    """With a learned variance that the pipeline drops."""
    transformer = d.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=WIDTH,
    )
    return d.LuminaPipeline(transformer.eval(), flow(), autoencoder(), gemma(), gemma_tokenizer())


def allegro() -> d.DiffusionPipeline:
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    vae = d.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    vae.enable_tiling()  # it decodes in no other way
    return d.AllegroPipeline(t5_tokenizer(), t5_encoder(), vae.eval(), transformer.eval(), d.DDIMScheduler())


def easy_animate() -> d.DiffusionPipeline:
    transformer = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = d.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return d.EasyAnimatePipeline(vae.eval(), qwen2_5_vl(), qwen_tokenizer(), transformer.eval(), flow())


def hunyuan_vae() -> Any:
    return d.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def kandinsky_5() -> d.DiffusionPipeline:
    """Channels come last; the transformer may get a condition beside the sample."""
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
    )
    parts = (stirred(transformer), hunyuan_vae(), qwen2_5_vl(), qwen_tokenizer(), long_clip(), clip_tokenizer(), flow())
    return d.Kandinsky5T2VPipeline(*parts)


def byt5_encoder() -> Any:
    return t5_encoder(config=lambda **size: T5Config(**{**size, "vocab_size": 384}))


def hunyuan_image() -> d.DiffusionPipeline:
    """A guider of the pipeline's own calls the transformer once a condition."""
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    vae = d.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        sample_size=128,
    )
    pipe = d.HunyuanImagePipeline(
        flow(),
        vae.eval(),
        qwen2_5_vl(),
        qwen_tokenizer(),
        byt5_encoder(),
        ByT5Tokenizer(),
        transformer.eval(),
        guider=d.AdaptiveProjectedMixGuidance(),
        ocr_guider=d.AdaptiveProjectedMixGuidance(),
    )
    pipe.tokenizer_max_length = 256
    return pipe


def ltx_image() -> d.DiffusionPipeline:
    """The first frame is given, and left out of the steps."""
    return d.LTXImageToVideoPipeline(**ltx().components)


def i2vgen_xl() -> d.DiffusionPipeline:
    """A step's rows are frames."""
    frames = d.I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(crop_size=size, size={"shortest_edge": 32})
    scheduler = d.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    vision = vision_encoder(image_size=32, patch_size=16)
    return d.I2VGenXLPipeline(autoencoder(), clip_encoder(), clip_tokenizer(), vision, images, frames.eval(), scheduler)


def skyreels() -> d.DiffusionPipeline:
    transformer = d.SkyReelsV2Transformer3DModel(
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
    parts = {name: wan().components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return d.SkyReelsV2Pipeline(**parts, transformer=transformer.eval())


def wan_vace() -> d.DiffusionPipeline:
    """Conditions on a video go through blocks of their own."""
    transformer = d.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=8 + 64,
    )
    parts = {name: wan().components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return d.WanVACEPipeline(**parts, transformer=stirred(transformer))


def cogview_3() -> d.DiffusionPipeline:
    transformer = d.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = d.CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return d.CogView3PlusPipeline(t5_tokenizer(), t5_encoder(), autoencoder(), transformer.eval(), scheduler)


def flux_fill() -> d.DiffusionPipeline:
    """The transformer gets the masked image and the mask beside the sample."""
    parts = without(flux(), "image_encoder", "feature_extractor")
    config = {**settings(parts["transformer"]), "in_channels": 16 + 16 + 16, "out_channels": 16}
    return d.FluxFillPipeline(**{**parts, "transformer": d.FluxTransformer2DModel(**config).eval()})


def flux_controlnet() -> d.DiffusionPipeline:
    parts = flux().components
    config = {name: value for name, value in settings(parts["transformer"]).items() if name != "out_channels"}
    net = d.FluxControlNetModel(**config)
    return d.FluxControlNetPipeline(**parts, controlnet=stirred(net))


def stable_diffusion_3_controlnet() -> d.DiffusionPipeline:
    """Its last block takes nothing from the controlnet."""
    parts = stable_diffusion_3().components
    config = settings(parts["transformer"])
    transformer = d.SD3Transformer2DModel(**{**config, "num_layers": 2}).eval()
    net = stirred(d.SD3ControlNetModel(**config))
    return d.StableDiffusion3ControlNetPipeline(**{**parts, "transformer": transformer}, controlnet=net)


def kandinsky_prior() -> d.DiffusionPipeline:
    """Steps image embeddings, that have no pixels; its denoiser is called ``prior``."""
    prior = d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, num_embeddings=LENGTH
    )
    torch.nn.init.ones_(prior.clip_std)
    return d.KandinskyV22PriorPipeline(
        prior=prior.eval(),
        image_encoder=vision_encoder(),
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_processor=CLIPImageProcessorPil(),
    )


def amused() -> d.DiffusionPipeline:
    """Steps tokens of a codebook."""
    transformer = d.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=32,
        codebook_size=16,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        sample_size=8,
    )
    vqvae = d.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        num_vq_embeddings=16,
        vq_embed_dim=4,
        lookup_from_codebook=True,
    )
    encoder = long_clip(CLIPTextModelWithProjection)
    return d.AmusedPipeline(
        vqvae.eval(), clip_tokenizer(), encoder, transformer.eval(), d.AmusedScheduler(mask_token_id=31)
    )


def sana_video() -> d.DiffusionPipeline:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        mlp_ratio=2.5,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return d.SanaVideoPipeline(
        gemma_tokenizer(),
        gemma(),
        video_autoencoder(),
        transformer.eval(),
        d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def clap(kind: Any) -> Any:
    text: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "max_position_embeddings": 80,
        "pad_token_id": 1,
    }
    if kind is not ClapModel:
        return kind(ClapTextConfig(**text)).eval()
    audio: dict[str, Any] = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "depths": [1, 1],
    }
    audio |= {"patch_embeds_hidden_size": 8, "hidden_size": 16, "num_attention_heads": [1, 1], "projection_dim": WIDTH}
    config: Any = ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH)
    model: Any = kind(config)
    return model.eval()


def roberta_tokenizer() -> Any:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *string.ascii_letters, "Ġ"]
    return RobertaTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def vocoder() -> Any:
    size: dict[str, Any] = {"model_in_dim": 8, "sampling_rate": 64, "upsample_initial_channel": 16}
    size |= {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    size |= {"resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]]}
    model: Any = SpeechT5HifiGan(SpeechT5HifiGanConfig(**size, normalize_before=False))
    return model.eval()


def sound_unet() -> Any:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
    )


def music_ldm() -> d.DiffusionPipeline:
    """Sound; the text is a class embedding, given in the call: what makes it breaks with transformers 5."""
    vae = autoencoder(in_channels=1, out_channels=1)
    parts = (vae, clap(ClapModel), roberta_tokenizer(), None, sound_unet(), d.DDIMScheduler(**SCHEDULE), vocoder())
    return d.MusicLDMPipeline(*parts)


def audio_ldm_2() -> d.DiffusionPipeline:
    """Sound; two sequences of text embeddings are given in the call."""
    conditioned = d.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=([None, WIDTH, WIDTH], [None, WIDTH, WIDTH]),
    )
    language: Any = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_head=2, n_layer=1, vocab_size=64, n_positions=32))
    return d.AudioLDM2Pipeline(
        vae=autoencoder(in_channels=1, out_channels=1),
        text_encoder=clap(ClapModel),
        text_encoder_2=t5_encoder(),
        projection_model=None,
        language_model=language.eval(),
        tokenizer=roberta_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=None,
        unet=conditioned.eval(),
        scheduler=d.DDIMScheduler(**SCHEDULE),
        vocoder=vocoder(),
    )


def wan_2_2_small() -> d.DiffusionPipeline:
    """A timestep for each token (Wan 2.2 5B)."""
    return d.WanPipeline(**wan().components, expand_timesteps=True)


def hunyuan_video_1_5() -> d.DiffusionPipeline:
    """A guider of the pipeline's own calls the transformer once a condition."""
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 8),
        target_size=16,
        task_type="t2v",
    )
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
    )
    text: Any = Qwen2_5_VLTextModel(qwen2_5_vl().config.text_config)
    pipe = d.HunyuanVideo15Pipeline(
        text.eval(),
        qwen_tokenizer(),
        transformer.eval(),
        vae.eval(),
        flow(),
        byt5_encoder(),
        ByT5Tokenizer(),
        d.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe.system_message = "Describe the video. " * 6  # 108 tokens of it are dropped
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 64, 32
    return pipe


def qwen3_vl(layers: int = 2) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config: Any = Qwen3VLConfig(
        text_config={**decoder_size(layers), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    model: Any = Qwen3VLModel(config)
    return model.eval()


def krea_2() -> d.DiffusionPipeline:
    transformer = d.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    parts = (dynamic_flow(), video_autoencoder(d.AutoencoderKLQwenImage), qwen3_vl(), qwen_tokenizer())
    return d.Krea2Pipeline(*parts, transformer.eval(), text_encoder_select_layers=(1, 2))


def ernie_image() -> d.DiffusionPipeline:
    """Text embeddings, of any length, are given in the call."""
    transformer = d.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        patch_size=1,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    vae = flux_2_klein().components["vae"]
    return d.ErnieImagePipeline(stirred(transformer), vae, None, None, flow())


def wuerstchen_prior() -> d.DiffusionPipeline:
    """Its denoiser is called ``prior``."""
    prior = WuerstchenPrior(c_in=4, c=16, c_cond=WIDTH, c_r=8, depth=1, nhead=2)
    return d.WuerstchenPriorPipeline(
        clip_tokenizer(), clip_encoder(), prior.eval(), d.DDPMWuerstchenScheduler(), latent_mean=42.0, latent_std=1.0
    )


def ltx_2() -> d.DiffusionPipeline:
    """A video and its sound; the sound is stepped by a copy of the scheduler. Text embeddings are given in the call."""
    rope: dict[str, Any] = {"rope_double_precision": False, "rope_type": "split"}
    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
        **rope,
    )
    connector: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    connector["num_learnable_registers"] = None
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=2,
        connector_rope_base_seq_len=32,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
        **rope,
    )
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    sound = d.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder_2 = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return d.LTX2Pipeline(
        scheduler=dynamic_flow(),
        vae=vae.eval(),
        audio_vae=sound.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=stirred(transformer),
        vocoder=vocoder_2.eval(),
    )


def embeddings(n: int, seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(n, *(shape or (WIDTH,)), generator=torch.Generator().manual_seed(seed))


def tensors(n: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


SMALL: dict[str, Any] = {"height": 16, "width": 16}

SHORT: dict[str, Any] = {"max_sequence_length": LENGTH}

VIDEO: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9}

EMBEDDED: dict[str, Any] = {  # of the pipelines that clean their prompts with ftfy
    "prompt_embeds": embeddings(3, 0, LENGTH, WIDTH),
    "negative_prompt_embeds": embeddings(3, 1, LENGTH, WIDTH),
    "guidance_scale": 1.0,
}

ONE_BIN: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}


MORE_CASES: dict[str, Case] = {
    "qwen-image": Case(
        qwen_image,
        {"prompt": PROMPTS, "negative_prompt": [" "], "true_cfg_scale": 1.0, "height": 32, "width": 48},
        channels=16,
        guidance={"true_cfg_scale": 3.0},
    ),
    "z-image": Case(
        z_image,
        {"prompt": PROMPTS, "guidance_scale": 0.0, "max_sequence_length": 32, **SMALL},
        guidance={"guidance_scale": 3.0},
    ),
    "wan-2.2": Case(wan_2_2, {**TEXT, **VIDEO, **SHORT}, guidance={"guidance_scale": 3.0, "guidance_scale_2": 2.0}),
    "wan-image": Case(wan_image, {**EMBEDDED, **VIDEO, "image": pictures(1, 32)[0]}, guidance=GUIDED),
    "hunyuan-video": Case(
        hunyuan_video,
        {
            "prompt": PROMPTS,
            "prompt_template": {"template": "video:{}", "crop_start": 4},
            "max_sequence_length": 24,
            **VIDEO,
        },
        guidance={"negative_prompt": ["x"], "true_cfg_scale": 2.0},
    ),
    "consistency-model": Case(consistency_model, {"class_labels": [0, 1, 2]}, channels=3),
    "sana-sprint": Case(
        sana_sprint,
        {
            "prompt": PROMPTS,
            "height": 32,
            "width": 32,
            **SHORT,
            **ONE_BIN,
            "complex_human_instruction": None,
            "intermediate_timesteps": None,
        },
    ),
    "lumina-2": Case(lumina_2, {**TEXT, **SMALL, "max_sequence_length": 32, "system_prompt": "draw"}, guidance=GUIDED),
    "flux-2-klein": Case(
        flux_2_klein,
        {**TEXT, **SMALL, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
        channels=16,
        guidance=GUIDED,
    ),
    "flux-img2img": Case(
        flux_image,
        {"prompt": PROMPTS, "image": pictures(3), "strength": 0.6, **SMALL, **SHORT},
        channels=16,
        guidance={"negative_prompt": ["x"], "true_cfg_scale": 2.0},
        steps=5,
    ),
    "flux-control": Case(
        flux_control, {"prompt": PROMPTS, "control_image": pictures(3), **SMALL, **SHORT}, channels=16
    ),
    "chroma": Case(chroma, {**TEXT, **SMALL, **SHORT}, channels=16, guidance=GUIDED),
    "aura-flow": Case(aura_flow, {**TEXT, **SMALL, **SHORT}, guidance=GUIDED),
    "cogview-4": Case(cogview_4, {**TEXT, **SMALL, "max_sequence_length": 32}, guidance=GUIDED),
    "mochi": Case(mochi, {**TEXT, **SMALL, "num_frames": 7, **SHORT}, channels=12, guidance=GUIDED),
    "hunyuan-dit": Case(hunyuan_dit, {**TEXT, **SMALL, "use_resolution_binning": False}, guidance=GUIDED),
    "pixart-alpha": Case(pixart_alpha, {**TEXT, **SMALL, **SHORT, **ONE_BIN}, guidance=GUIDED),
    "latte": Case(latte, {**TEXT, **SMALL, "video_length": 2, "clean_caption": False}, guidance=GUIDED, eta=1.0),
    "hidream": Case(hidream, {**TEXT, **SMALL, **SHORT}, guidance=GUIDED),
    "sd-controlnet": Case(
        stable_diffusion_controlnet, {**TEXT, "image": pictures(3), **SMALL}, guidance=GUIDED, eta=0.5
    ),
    "sd-controlnets": Case(
        stable_diffusion_controlnets,
        {**TEXT, "image": [pictures(2), pictures(3)[1:], pictures(4)[2:]], "controlnet_conditioning_scale": (1.0, 0.5)},
        guidance=GUIDED,
    ),
    "sdxl-refiner": Case(stable_diffusion_xl_refiner, IMAGE, guidance=GUIDED, steps=5),
    "sdxl-controlnet": Case(stable_diffusion_xl_controlnet, {**TEXT, "image": pictures(3), **SMALL}, guidance=GUIDED),
    "sdxl-inpaint": Case(stable_diffusion_xl_inpaint, {**IMAGE, **MASK}, guidance=GUIDED, steps=5),
    "sd-pag": Case(stable_diffusion_pag, {**TEXT, "pag_scale": 2.0}, guidance=GUIDED),
    "sd3-img2img": Case(
        stable_diffusion_3_image, {**IMAGE, **SMALL, "max_sequence_length": LENGTH}, guidance=GUIDED, steps=5
    ),
    "animate-diff": Case(animate_diff, {**TEXT, **SMALL, "num_frames": 3}, guidance=GUIDED),
    "kandinsky-2.2": Case(
        kandinsky_2_2,
        {"image_embeds": embeddings(3), "negative_image_embeds": embeddings(3, 1), "guidance_scale": 1.0, **SMALL},
        guidance=GUIDED,
    ),
    "kandinsky-3": Case(kandinsky_3, {**TEXT, **SMALL}, guidance=GUIDED),
    "sd-upscale": Case(stable_diffusion_upscale, {**TEXT, "image": pictures(3, 8)}, guidance=GUIDED),
    "sd-depth": Case(stable_diffusion_depth, {**IMAGE, "depth_map": tensors(3, 16)[:, 0]}, guidance=GUIDED, steps=5),
    "sd-edit": Case(
        stable_diffusion_edit,
        {**TEXT, "image": pictures(3)},
        guidance={"guidance_scale": 3.0, "image_guidance_scale": 1.5},
    ),
    "sd-adapter": Case(stable_diffusion_adapter, {**TEXT, "image": pictures(3), **SMALL}, guidance=GUIDED),
    "marigold": Case(marigold, {"image": pictures(3)}),
    "cascade-decoder": Case(stable_cascade_decoder, {**TEXT, "image_embeddings": tensors(3, 4, 4)}, guidance=GUIDED),
    "cascade-prior": Case(stable_cascade_prior, {**TEXT, "height": 128, "width": 128}, guidance=GUIDED),
    "stable-unclip": Case(
        stable_unclip,
        {**TEXT, **SMALL, "prior_num_inference_steps": 2, "prior_guidance_scale": 1.0},
        guidance=GUIDED,
    ),
    "gligen": Case(
        gligen,
        {
            **TEXT,
            **SMALL,
            "gligen_phrases": ("a cat", "a dog"),
            "gligen_boxes": ((0.1, 0.1, 0.5, 0.5), (0.2, 0.2, 0.9, 0.9)),
            "gligen_scheduled_sampling_beta": 0.5,
        },
        guidance=GUIDED,
    ),
    "cosmos": Case(cosmos, {**TEXT, **VIDEO, **SHORT}, guidance=GUIDED),
    "lumina": Case(
        lumina,
        {**TEXT, **SMALL, "max_sequence_length": 32, "clean_caption": False},
        guidance={**GUIDED, "negative_prompt": ["x"]},
    ),
    "allegro": Case(
        allegro,
        {**TEXT, "height": 32, "width": 32, "num_frames": 8, **SHORT, "clean_caption": False},
        guidance=GUIDED,
    ),
    "easy-animate": Case(
        easy_animate, {**TEXT, **SMALL, "num_frames": 5}, guidance={**GUIDED, "negative_prompt": ["x"]}
    ),
    "kandinsky-5": Case(kandinsky_5, {**TEXT, **VIDEO, "num_frames": 5, "max_sequence_length": 1024}, guidance=GUIDED),
    "hunyuan-image": Case(hunyuan_image, {"prompt": PROMPTS, "height": 32, "width": 32}),
    "ltx-image": Case(
        ltx_image,
        {**TEXT, "image": pictures(3, 32), "height": 32, "width": 64, "num_frames": 9, **SHORT},
        channels=8,
        guidance=GUIDED,
    ),
    "i2vgen-xl": Case(
        i2vgen_xl, {**TEXT, **SMALL, "image": pictures(3), "num_frames": 3, "clip_skip": None}, guidance=GUIDED
    ),
    "skyreels": Case(skyreels, {**EMBEDDED, **VIDEO}, guidance=GUIDED),
    "wan-vace": Case(wan_vace, {**EMBEDDED, **VIDEO}, guidance=GUIDED),
    "cogview-3": Case(cogview_3, {**TEXT, **SMALL, **SHORT}, guidance=GUIDED),
    "flux-fill": Case(
        flux_fill, {"prompt": PROMPTS, "image": pictures(3), "mask_image": masks(3), **SMALL, **SHORT}, channels=16
    ),
    "flux-controlnet": Case(
        flux_controlnet,
        {"prompt": PROMPTS, "control_image": pictures(3), **SMALL, **SHORT},
        channels=16,
        guidance={"negative_prompt": ["x"], "true_cfg_scale": 2.0},
    ),
    "sd3-controlnet": Case(
        stable_diffusion_3_controlnet, {**TEXT, "control_image": pictures(3), **SMALL, **SHORT}, guidance=GUIDED
    ),
    "kandinsky-prior": Case(kandinsky_prior, TEXT, channels=WIDTH, guidance=GUIDED),
    "amused": Case(amused, {**TEXT, **SMALL}, guidance=GUIDED),
    "sana-video": Case(
        sana_video,
        {
            **TEXT,
            "height": 32,
            "width": 32,
            "frames": 9,
            **SHORT,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
        guidance=GUIDED,
    ),
    "music-ldm": Case(
        music_ldm,
        {
            "prompt_embeds": embeddings(3),
            "negative_prompt_embeds": embeddings(3, 1),
            "guidance_scale": 1.0,
            "audio_length_in_s": 1.0,
        },
        guidance=GUIDED,
    ),
    "audio-ldm-2": Case(
        audio_ldm_2,
        {
            "prompt_embeds": embeddings(3, 0, LENGTH, WIDTH),
            "negative_prompt_embeds": embeddings(3, 1, LENGTH, WIDTH),
            "generated_prompt_embeds": embeddings(3, 2, 8, WIDTH),
            "negative_generated_prompt_embeds": embeddings(3, 3, 8, WIDTH),
            "attention_mask": torch.ones(3, LENGTH, dtype=torch.long),
            "negative_attention_mask": torch.ones(3, LENGTH, dtype=torch.long),
            "audio_length_in_s": 1.0,
            "guidance_scale": 1.0,
        },
        guidance=GUIDED,
    ),
    "wan-2.2-small": Case(wan_2_2_small, {**TEXT, **VIDEO, **SHORT}, guidance=GUIDED),
    "hunyuan-video-1.5": Case(hunyuan_video_1_5, {"prompt": PROMPTS, **VIDEO}),
    "krea-2": Case(
        krea_2,
        {**TEXT, "guidance_scale": 0.0, "height": 32, "width": 32, "max_sequence_length": 192},
        channels=16,
        guidance=GUIDED,
    ),
    "ernie-image": Case(
        ernie_image,
        {
            "prompt_embeds": [embeddings(1, i, 4 + i, WIDTH)[0] for i in range(3)],
            "negative_prompt_embeds": [embeddings(1, 5, 3, WIDTH)[0]],
            "guidance_scale": 1.0,
            "use_pe": False,
            **SMALL,
        },
        channels=16,
        guidance=GUIDED,
    ),
    "wuerstchen-prior": Case(wuerstchen_prior, {**TEXT, "height": 128, "width": 128}, guidance=GUIDED),
    "ltx-2": Case(
        ltx_2,
        {
            "prompt_embeds": embeddings(3, 0, LENGTH, 2 * WIDTH),
            "negative_prompt_embeds": embeddings(3, 1, LENGTH, 2 * WIDTH),
            "prompt_attention_mask": torch.ones(3, LENGTH, dtype=torch.long),
            "negative_prompt_attention_mask": torch.ones(3, LENGTH, dtype=torch.long),
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_modality_scale": 1.0,
        },
        guidance={"guidance_scale": 3.0, "audio_guidance_scale": 3.0},
    ),
}
