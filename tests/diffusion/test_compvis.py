"""Checkpoints of CompVis' latent diffusion as pipelines of diffusers."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import save_file
from torch import nn

import original_ldm
from ptqd import InputError, LatentClassPipeline, LatentPipeline, Sampling, load, measure, quantize
from ptqd.diffusion.compvis import convert, save_converted
from ptqd.pipelines.latent import _warn_of_late_start
from ptqd.zoo import CONFIGS
from ptqd_cli.main import main

DATA = Path(__file__).parent.parent / "data" / "ldm"
BASES = {"ldm4-imagenet": 192, "ldm4-bedrooms": 224, "ldm8-churches": 192}
SHAPES = {name: json.loads((DATA / f"{name}.json").read_text()) for name in BASES}


def config(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(CONFIGS[name].read_text())
    return read


def small(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint with few channels, and its YAML."""
    made = config(name)
    model = made["model"]["params"]
    betas = torch.linspace(model["linear_start"] ** 0.5, model["linear_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    unet, stage = model["unet_config"]["params"], model["first_stage_config"]["params"]
    unet |= {"model_channels": 32, "image_size": 16}
    stage["ddconfig"] |= {"ch": 32, "resolution": 128 if name == "ldm8-churches" else 64}
    if "n_embed" in stage:
        stage["n_embed"] = 64
    if name == "ldm4-imagenet":
        unet["context_dim"] = model["cond_stage_config"]["params"]["embed_dim"] = 16
        model["cond_stage_config"]["params"]["n_classes"] = 11
    return original_ldm.small_state(SHAPES[name], BASES[name], betas.float()), made


def write(folder: Path, state: dict[str, Any], made: dict[str, Any]) -> tuple[Path, Path]:
    (folder / "model.ckpt").unlink(missing_ok=True)  # a pipeline may have it mapped
    torch.save({"state_dict": state, "epoch": 3}, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    return folder / "model.ckpt", folder / "config.yaml"


def without(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def ema_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's weights that count, by their plain names."""
    raw = without(state, "model.diffusion_model.")
    return {name: state.get(f"model_ema.diffusion_model{name.replace('.', '')}", value) for name, value in raw.items()}


def nearly(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (mine - theirs).abs().max().item() < 2e-5 * theirs.abs().max().item()


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_a_pipeline_computes_what_the_original_does(name: str, tmp_path: Path) -> None:
    state, made = small(name)
    model = made["model"]["params"]
    unet = model["unet_config"]["params"]
    save_converted(convert(*write(tmp_path, state, made)), tmp_path / "out")
    pipe: Any = load(tmp_path / "out")
    random = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, unet["in_channels"], 16, 16, generator=random), torch.tensor([1, 500, 999])
    context = pipe.class_embedder(torch.tensor([0, 7, 10])) if name == "ldm4-imagenet" else None
    if context is not None:
        assert isinstance(pipe, LatentClassPipeline)
        assert torch.equal(context[:, 0], state["cond_stage_model.embedding.weight"][[0, 7, 10]])
    else:
        assert isinstance(pipe, LatentPipeline)
    want = original_ldm.unet(
        ema_of(state), x, t, context=context, heads=unet.get("num_heads", -1),
        head_width=unet.get("num_head_channels", -1), scale_shift=unet.get("use_scale_shift_norm", False),
        updown=unet.get("resblock_updown", False), blocks=unet["num_res_blocks"],
    )  # fmt: skip
    given = {} if context is None else {"encoder_hidden_states": context}
    assert nearly(pipe.unet(x, t, **given).sample, want)
    first = without(state, "first_stage_model.")
    images = 2 * torch.rand(2, 3, 64, 64, generator=random) - 1
    latents = original_ldm.encode(first, images)
    encoded = pipe.vae.encode(images)
    found = encoded.latents if "n_embed" in model["first_stage_config"]["params"] else encoded.latent_dist.parameters
    assert nearly(found, latents)
    latents = latents[:, : unet["in_channels"]]
    assert nearly(pipe.vae.decode(latents).sample, original_ldm.decode(first, latents))
    assert pipe.vae.config.scaling_factor == pytest.approx(state.get("scale_factor", torch.tensor(1.0)).item())


@pytest.mark.parametrize("steps", [20, 50, 200, 250, 500])
def test_the_scheduler_takes_the_originals_steps(steps: int, tmp_path: Path) -> None:
    state, made = small("ldm4-bedrooms")
    scheduler: Any = convert(*write(tmp_path, state, made)).scheduler
    scheduler.set_timesteps(steps)
    t = torch.arange(0, 1000, 1000 // steps) + 1
    assert torch.equal(scheduler.timesteps.flip(0), t)
    alphas = (1 - state["betas"].double()).cumprod(0)
    before = torch.cat([alphas[:1], alphas[t[:-1]]])
    sigmas = ((1 - before) / (1 - alphas[t]) * (1 - alphas[t] / before)).sqrt()
    for i, step in enumerate(t.tolist()):
        assert scheduler._get_variance(step, step - 1000 // steps) ** 0.5 == pytest.approx(sigmas[i].item(), rel=1e-4)


@pytest.mark.parametrize("name", [*BASES, "ldm4-celebahq", "ldm4-ffhq"])
def test_every_parameter_of_a_published_checkpoint_has_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which holds names and shapes alone."""
    shapes = SHAPES.get(name, SHAPES["ldm4-bedrooms"])
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = config(name)["model"]["params"]
    ends = (model["linear_start"] ** 0.5, model["linear_end"] ** 0.5)
    state |= {"betas": torch.linspace(*ends, 1000) ** 2}
    if "scale_factor" in state:
        state["scale_factor"] = torch.tensor(0.2)
    monkeypatch.setattr("ptqd.diffusion.compvis.pipeline.read_checkpoint", lambda path: dict(state))
    pipe: Any = convert(tmp_path / "model.ckpt", CONFIGS[name])
    raw = [shape for key, shape in shapes.items() if key.startswith("model.diffusion_model.")]
    assert sum(p.numel() for p in pipe.unet.parameters()) == sum(math.prod(shape) for shape in raw)


@pytest.mark.slow
def test_a_converted_pipeline_is_quantized_measured_and_sampled(tmp_path: Path) -> None:
    state, made = small("ldm8-churches")
    pipe = convert(*write(tmp_path, state, made))
    run = Sampling(steps=2, eta=1.0, samples=2, batch=1)
    made_of = quantize(pipe, "w4a8", run.replace(samples=1))
    stats = measure(pipe, made_of, run)
    assert stats.measured_on.repeatable  # each sample's noise comes from its own generator
    assert stats.samples == 2
    assert stats.response.draws
    made_of.save_pretrained(tmp_path / "quantized")
    again: Any = load(tmp_path / "quantized")
    images = [pipe(batch_size=1, num_inference_steps=2, output_type="np").images for pipe in (made_of, again)]
    assert images[0].shape == (1, 128, 128, 3)


def test_the_verb_and_lightnings_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, made = small("ldm4-imagenet")
    checkpoint, path = write(tmp_path, state, made)
    assert main(["convert", str(checkpoint), str(path), str(tmp_path / "out")]) == 0
    assert "LatentClassPipeline" in capsys.readouterr().out
    plain: Any = load(tmp_path / "out")
    save_file(state, tmp_path / "state.safetensors")
    same: Any = convert(tmp_path / "state.safetensors", path)
    assert all(torch.equal(a, b) for a, b in zip(plain.unet.parameters(), same.unet.parameters(), strict=True))
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patched.setitem(sys.modules, name, types.ModuleType(name))
        patched.setitem(sys.modules, module.__name__, module)
        torch.save({"state_dict": state, "callbacks": {kind: {"best": 1}}}, checkpoint)
    noted: Any = convert(checkpoint, path)
    assert torch.equal(noted.unet.conv_in.weight, plain.unet.conv_in.weight)


def broken(tmp_path: Path, state: dict[str, Any], made: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        convert(*write(tmp_path, state, made))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, made = small("ldm4-bedrooms")
    wide = copy.deepcopy(made)
    wide["model"]["params"]["unet_config"]["params"]["model_channels"] = 64
    assert "is of another architecture than" in broken(tmp_path, state, wide)
    short = {name: value for name, value in state.items() if "middle_block.1" not in name}
    assert "mid_block.attentions.0" in broken(tmp_path, short, made)
    extra = {**state, "cond_stage_model.transformer.weight": torch.zeros(2)}
    assert "1 tensors more than the YAML has a place for (cond_stage_model" in broken(tmp_path, extra, made)
    part = {name: value for name, value in state.items() if name != "model_ema.diffusion_modelout2bias"}
    assert "lacks 'model_ema.diffusion_modelout2bias'" in broken(tmp_path, part, made)
    other = {**state, "betas": torch.linspace(1e-4, 2e-2, 1000)}
    assert "trained with other betas" in broken(tmp_path, other, made)
    label = {**state, "model.diffusion_model.label_emb.weight": torch.zeros(2, 2)}
    assert "1 tensors more than the YAML has a place for (model.diffusion_model.label_emb" in broken(
        tmp_path, label, made
    )
    qkv = "model.diffusion_model.middle_block.1.qkv.weight"
    odd = {**state, qkv: torch.zeros(100, 128, 1)}
    ema = "model_ema.diffusion_modelmiddle_block1qkvweight"
    assert "are no queries, keys and values" in broken(tmp_path, {**odd, ema: odd[qkv]}, made)
    whole = {**state, qkv: state[qkv].to(torch.int8), ema: state[ema].to(torch.int8)}
    assert "as torch.int8; give weights of floating point" in broken(tmp_path, whole, made)
    assert "'betas' twice, once as 'module.betas'" in broken(tmp_path, {**state, "module.betas": state["betas"]}, made)
    with pytest.raises(InputError, match="is a folder; give the checkpoint's file"):
        convert(tmp_path, tmp_path / "config.yaml")


def test_what_the_yaml_says_and_we_do_not_know_is_named(tmp_path: Path) -> None:
    state, made = small("ldm4-bedrooms")

    def changed(*path: str, value: Any) -> str:
        other = copy.deepcopy(made)
        node = other["model"]
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value
        return broken(tmp_path, state, other)

    unet = ("params", "unet_config")
    assert "unet_config is of the class ldm.Other; known is ldm.modules" in changed(*unet, "target", value="ldm.Other")
    assert "unet_config has 'turbo', which is not known" in changed(*unet, "params", "turbo", value=1)
    assert "conv_resample: False" in changed(*unet, "params", "conv_resample", value=False)
    assert "num_head_channels in unet_config should be int" in changed(*unet, "params", "num_head_channels", value="x")
    assert "needs num_heads or num_head_channels" in changed(*unet, "params", "num_heads", value=2)
    assert "context_dim 9 is not" in changed(*unet, "params", value={**made["model"]["params"]["unet_config"]["params"],
        "use_spatial_transformer": True, "context_dim": 9})  # fmt: skip
    assert "channel_mult in unet_config should be whole numbers" in changed(
        *unet, "params", "channel_mult", value=["a"]
    )
    assert "networks that cannot be built" in changed(*unet, "params", "model_channels", value=33)
    assert "are not between 0 and 1" in changed("params", "linear_start", value=-1.0)
    assert "num_heads_upsample: 4" in changed(*unet, "params", "num_heads_upsample", value=4)
    assert "parameterization: 'x0'" in changed("params", "parameterization", value="x0")
    stage = ("params", "first_stage_config", "params", "ddconfig")
    assert "attn_type: 'linear'" in changed(*stage, "attn_type", value="linear")
    assert "use_linear_attn: True" in changed(*stage, "use_linear_attn", value=True)
    assert "attn_resolutions: [32]" in changed(*stage, "attn_resolutions", value=[32])
    for text, said in (("a: 1", "describes no model"), ("a: [", "cannot be read as YAML")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            convert(tmp_path / "model.ckpt", tmp_path / "x.yaml")


def unet_of(pipe: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = pipe.unet.state_dict()
    return found


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_precision_is_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    state, made = small("ldm4-bedrooms")
    cast = {name: value.to(dtype) for name, value in state.items()}
    pipe = convert(*write(tmp_path, cast, made))
    save_converted(pipe, tmp_path / "out")
    assert unet_of(pipe)["conv_in.weight"].dtype == dtype
    assert pipe.scheduler.config.beta_end == 0.0195
    widened = convert(*write(tmp_path, {name: value.float() for name, value in cast.items()}, made))
    loaded: Any = load(tmp_path / "out")
    assert same(unet_of(loaded), unet_of(widened))
    made["model"]["params"]["linear_end"] *= 1.02
    assert "trained with other betas" in broken(tmp_path, cast, made)


def test_where_the_unet_alone_is_in_half_precision_all_is_widened(tmp_path: Path) -> None:
    state, made = small("ldm4-imagenet")
    made["model"]["params"]["unet_config"]["params"]["use_fp16"] = True
    mixed = {name: value.half() if name.startswith("model.") else value for name, value in state.items()}
    pipe: Any = convert(*write(tmp_path, mixed, made))
    assert torch.equal(pipe.unet.conv_in.weight, state["model.diffusion_model.input_blocks.0.0.weight"].half().float())
    images = pipe([1], num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


EMA = "model_ema.diffusion_model"


def with_ema_alone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rest = {name: value for name, value in state.items() if not name.startswith(("model.", "model_ema."))}
    averaged = {f"{EMA}{name.replace('.', '')}": value for name, value in ema_of(state).items()}
    return rest | averaged | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}


@pytest.mark.parametrize("name", BASES)
def test_a_checkpoint_of_ema_weights_alone_is_converted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, made = small(name)
    want = unet_of(convert(*write(tmp_path, state, made)))
    alone = with_ema_alone(state)
    assert same(unet_of(convert(*write(tmp_path, alone, made))), want)
    keeps = name != "ldm4-imagenet"
    assert ("EMA weights alone; they are taken, though the YAML says use_ema: false" in caplog.text) != keeps
    caplog.clear()
    pruned = {key: value for key, value in alone.items() if not key.startswith("model_ema.")}
    pruned |= {f"model.diffusion_model.{key}": value for key, value in ema_of(state).items()}
    assert same(unet_of(convert(*write(tmp_path, pruned, made))), want)
    assert ("are the EMA's only if it was pruned to them" in caplog.text) == keeps
    short = {key: value for key, value in alone.items() if key != f"{EMA}out2bias"}
    assert "conv_out.bias should be" in broken(tmp_path, short, made)
    assert "1 tensors more" in broken(tmp_path, {**alone, f"{EMA}label_embweight": torch.zeros(2)}, made)


def test_an_ema_copy_is_ignored_where_the_yaml_keeps_none(tmp_path: Path) -> None:
    state, made = small("ldm4-bedrooms")
    made["model"]["params"]["use_ema"] = False
    pipe: Any = convert(*write(tmp_path, state, made))
    assert torch.equal(pipe.unet.conv_in.weight, state["model.diffusion_model.input_blocks.0.0.weight"])


EMA_SPELLINGS = ("ema.", "ema_model.module.", "ema.model.")


def renamed(name: str, spelling: str) -> str:
    """A name as some wrappers have it."""
    inner = {"model.diffusion_model.": "model.{}.diffusion_model.", "first_stage_model.": "first_stage_model.{}."}
    if spelling in EMA_SPELLINGS:
        return name.replace("model_ema.", spelling)
    if spelling == "inner":
        for part, wrapped in inner.items():
            name = name.replace(part, wrapped.format("_orig_mod"))
        return name.replace(EMA, f"{EMA}_orig_mod")
    return spelling + name


@pytest.mark.parametrize("spelling", ["module.", "module._orig_mod.", "ldm.", "inner", *EMA_SPELLINGS])
def test_names_of_wrappers_are_stripped(spelling: str, tmp_path: Path) -> None:
    state, made = small("ldm4-bedrooms")
    want: Any = convert(*write(tmp_path, state, made))
    wrapped = {renamed(name, spelling): value for name, value in state.items()}
    assert wrapped.keys() != state.keys()
    pipe: Any = convert(*write(tmp_path, wrapped, made))
    assert same(unet_of(pipe), unet_of(want))
    assert same(pipe.vae.state_dict(), want.vae.state_dict())


@pytest.mark.parametrize("nest", ["model", "model_state_dict", "module", "state_dict module"])
def test_a_state_dict_is_found_where_trainers_keep_it(nest: str, tmp_path: Path) -> None:
    state, made = small("ldm4-imagenet")
    checkpoint, path = write(tmp_path, state, made)
    kept: Any = state
    for name in nest.split():
        kept = {name: kept, "epoch": 3}
    torch.save(kept, checkpoint)
    pipe: Any = convert(checkpoint, path)
    assert torch.equal(pipe.unet.conv_in.weight, state["model.diffusion_model.input_blocks.0.0.weight"])


def test_conditioning_that_is_not_supported_is_named(tmp_path: Path) -> None:
    for name in ("ldm4-imagenet", "ldm4-bedrooms"):
        state, made = small(name)
        model = made["model"]["params"]
        only = "only crossattn (the class" if name == "ldm4-imagenet" else "only null (no condition)"
        for key in ("concat", "hybrid", "adm", "nonsense", "None", ["crossattn"]):
            model["conditioning_key"] = key
            assert f"conditioning_key: {key!r} in model is not supported, {only}" in broken(tmp_path, state, made)
        for known in ("crossattn", None):
            model["conditioning_key"] = known
            assert convert(*write(tmp_path, state, made))
        model["concat_mode"] = True
        if name == "ldm4-imagenet":
            assert "only conditioning_key: crossattn is supported" in broken(tmp_path, state, made)
        else:
            assert convert(*write(tmp_path, state, made))


@pytest.mark.parametrize(
    ("target", "condition", "pipeline"),
    [
        ("ldm.models.diffusion.ddpm.LatentDiffusion", "FrozenCLIPEmbedder", "StableDiffusionPipeline"),
        ("ldm.models.diffusion.ddpm.LatentDiffusion", "FrozenOpenCLIPEmbedder", "StableDiffusionPipeline"),
        ("ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "FrozenCLIPEmbedder", "StableDiffusionInpaintPipeline"),
        ("sgm.models.diffusion.DiffusionEngine", "FrozenOpenCLIPEmbedder2", "StableDiffusionXLPipeline"),
    ],
)
def test_stable_diffusion_is_sent_to_diffusers(target: str, condition: str, pipeline: str, tmp_path: Path) -> None:
    _, made = small("ldm8-churches")
    model = made["model"]
    model["target"] = target
    embedder = {"target": f"ldm.modules.encoders.modules.{condition}", "params": {"freeze": True}}
    if target.startswith("sgm"):
        model["params"]["conditioner_config"] = {"params": {"emb_models": [embedder]}}
    else:
        model["params"] |= {"cond_stage_config": embedder, "parameterization": "v"}
    said = broken(tmp_path, {"a": torch.zeros(1)}, made)
    assert f"is of Stable Diffusion ({condition} reads its prompts)" in said
    assert f"{pipeline}.from_single_file(CHECKPOINT, original_config='{tmp_path / 'config.yaml'}')" in said
    import diffusers

    assert hasattr(getattr(diffusers, pipeline), "from_single_file")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_a_checkpoint_as_model_names_its_conversion(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / f"model{suffix}"
    checkpoint.write_bytes(b"")
    out = str(tmp_path.parent / "out")
    commands = (["quantize", "--recipe", "w8a8", "--out", out], ["sample", "--out", out], ["cost", "--recipe", "w8a8"])
    for (verb, *options), model in itertools.product(commands, (checkpoint, tmp_path)):
        assert main([verb, str(model), *options]) == 2
        said = capsys.readouterr().err
        assert f"'ptqd convert {checkpoint} CONFIG.yaml FOLDER'" in said
        assert f"StableDiffusionPipeline.from_single_file('{checkpoint}')" in said
    (tmp_path / "config.json").write_text("{}")  # a network's folder, of a pipeline
    with pytest.raises(InputError, match="save one with save_pretrained"):
        load(tmp_path)


def sampled(pipe: Any, steps: int) -> list[int]:
    """The timesteps that a denoiser of nothing is asked at."""
    asked: list[int] = []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Any:
        asked.append(int(t))
        return UNet2DOutput(sample=torch.zeros_like(x))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipe.unet, "forward", denoise)
        pipe(num_inference_steps=steps, output_type="latent")
    return asked


def test_step_counts_that_the_original_would_take_otherwise_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, made = small("ldm4-bedrooms")
    pipe: Any = convert(*write(tmp_path, state, made))
    _warn_of_late_start.cache_clear()
    near = {30: "25 or 40", 150: "125 or 200", 3: "2 or 4", 600: "500", 999: "500"}
    for steps in (1, 2, 20, 50, 125, 200, 250, 500, *near):
        original = list(range(1, 1001, 1000 // steps))[::-1]  # its make_ddim_timesteps, "uniform"
        caplog.clear()
        for _ in range(2):  # told once
            asked = sampled(pipe, steps)
        assert len(asked) == steps
        told = [record.getMessage() for record in caplog.records]
        if asked == original:
            assert not told
            assert steps not in near
            continue
        theirs = f"takes {len(original)} steps from {original[0]}" if original[0] < 1000 else "fails at that number"
        assert told == [
            f"{steps} steps do not divide 1000: sampling begins at timestep {asked[0]}, where CompVis' DDIM {theirs}; "
            f"both are alike at {near[steps]} steps"
        ]
    assert (asked[0], sampled(pipe, 30)[0], sampled(pipe, 150)[0]) == (999, 958, 895)
    with pytest.raises(
        InputError, match="1000 steps would begin at timestep 1000, beyond 999, the last; take 500 or fewer"
    ):
        sampled(pipe, 1000)
    with pytest.raises(ValueError, match="1001 cannot be larger than"):
        sampled(pipe, 1001)
    for steps in (0, -5):
        with pytest.raises(InputError, match=f"num_inference_steps must be at least 1; got {steps}"):
            sampled(pipe, steps)


def test_the_scale_of_latents_is_the_yamls_where_training_found_none(tmp_path: Path) -> None:
    state, made = small("ldm4-bedrooms")
    made["model"]["params"]["scale_factor"] = 0.18215
    pipe: Any = convert(*write(tmp_path, state, made))
    assert pipe.vae.config.scaling_factor == 0.18215


def test_code_and_damage_are_refused_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, made = small("ldm4-bedrooms")
    checkpoint, path = write(tmp_path, state, made)
    out = tmp_path / "out"
    out.mkdir()

    def refused() -> str:
        assert main(["convert", str(checkpoint), str(path), str(out)]) == 2
        assert not list(out.iterdir())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model.ckpt", "out"]
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    checkpoint.write_bytes(checkpoint.read_bytes()[:-5000])
    assert "get it again" in refused()
    torch.save({"state_dict": state, "hook": nn.Linear}, checkpoint)
    assert "holds torch.nn.modules.linear.Linear beside tensors and plain containers" in refused()
    checkpoint.write_bytes(b"not a checkpoint at all")
    assert "is damaged or no file of torch.save" in refused() or "is no whole checkpoint" in refused()
    torch.save({"state_dict": [1, 2]}, checkpoint)
    assert "holds no state_dict of tensors" in refused()
    checkpoint.unlink()
    assert main(["convert", str(checkpoint), str(path), str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
