"""Checkpoints of guided-diffusion and consistency_models as pipelines of diffusers, against the original codes."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    UNet2DModel,
)
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import nn

import published
from ptqd import InputError, PixelPipeline, Sampling, correct, load, measure, pipelines, quantize
from ptqd.diffusion.compvis import save_converted
from ptqd.diffusion.guided_diffusion import pipeline_from
from ptqd.loading import with_scheduler
from ptqd.pipelines.edm_unet import EDMUNet2DModel
from ptqd.pipelines.guided_unet import GuidedUNet2DModel
from ptqd.pipelines.pixel import _warn_of_another_stride
from ptqd.pipelines.respaced import RespacedDDIMScheduler, RespacedDDPMScheduler
from ptqd_cli.main import main
from published import apart

OURS = ("adm-imagenet128", "adm-imagenet512")  # which UNet2DModel cannot say
ADM = (
    *("adm-imagenet64", "adm-imagenet128", "adm-imagenet256", "adm-imagenet512"),
    *("adm-lsun", "adm-plain", "adm-upsampler"),
)
CM = ("cm-imagenet64", "cm-lsun256")
FULL = (
    *("64x64_diffusion", "128x128_diffusion", "256x256_diffusion", "256x256_diffusion_uncond", "512x512_diffusion"),
    *("64_256_upsampler", "128_512_upsampler", "lsun_bedroom", "cd_imagenet64", "cd_bedroom256"),
)


def converted(name: str, **flags: Any) -> tuple[Any, published.Tensors]:
    state, given, io = published.small(name)
    return pipeline_from(state, {**given, **flags}), io


def enlarged(small: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(small, (size, size), mode="bilinear")


@torch.no_grad()
def answer(pipe: Any, io: published.Tensors) -> torch.Tensor:
    x = io["unet.x"]
    if "unet.low_res" in io:
        x = torch.cat([x, enlarged(io["unet.low_res"], x.shape[-1])], dim=1)
    output: torch.Tensor = pipe.unet(x, io["unet.t"], class_labels=io.get("class_labels")).sample
    return output


@pytest.mark.parametrize("name", [*ADM, *CM])
def test_a_network_answers_as_the_original(name: str) -> None:
    pipe, io = converted(name)
    assert type(pipe) is (ConsistencyModelPipeline if name in CM else PixelPipeline)
    assert type(pipe.unet) is (GuidedUNet2DModel if name in OURS else UNet2DModel)
    assert apart(answer(pipe, io), io["unet.out"]) < 5e-5
    if "unet.emb" in io:
        with torch.no_grad():
            embedding = pipe.unet.time_embedding(pipe.unet.time_proj(io["unet.t"]))
            if "class_labels" in io:
                embedding = embedding + pipe.unet.class_embedding(io["class_labels"])
        assert apart(embedding, io["unet.emb"]) < 2e-5


def attentions(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "to_q")]


def resnets(network: nn.Module) -> list[ResnetBlock2D]:
    return [module for module in network.modules() if isinstance(module, ResnetBlock2D)]


def other_epsilon(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6


def other_heads(network: Any) -> None:
    for module in attentions(network):
        module.heads = 2 * module.heads


def one_head_width(network: Any) -> None:
    for module in attentions(network):
        module.heads = module.inner_dim // 8  # right at the first width alone


def sines_first(network: Any) -> None:
    network.time_proj.flip_sin_to_cos = False


def last_frequency(network: Any) -> None:
    network.time_proj.downscale_freq_shift = 1


def scale_and_shift_swapped(network: Any) -> None:
    for module in resnets(network):
        for tensor in (module.time_emb_proj.weight, module.time_emb_proj.bias):
            tensor.data = torch.cat(tensor.data.chunk(2)[::-1])


def no_middle_norm(network: Any) -> None:
    network.mid_block.attentions[0].group_norm = None


def resampled_first(network: Any) -> None:
    """The pixels that are skipped, instead of the mean of four."""
    for module in resnets(network):
        if module.downsample is not None:
            module.downsample = nn.AvgPool2d(1, 2)


def labels_before_the_second_layer(network: Any) -> None:
    table = network.class_embedding.weight
    table.data = table.data @ network.time_embedding.linear_2.weight.data.T


def rows_of_the_other_order(network: Any) -> None:
    for module in attentions(network):
        rows = torch.cat([module.to_q.weight.data, module.to_k.weight.data, module.to_v.weight.data])
        layers, width = (module.to_q, module.to_k, module.to_v), module.inner_dim // module.heads
        parts = rows.view(module.heads, 3, width, -1).unbind(1)
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part.flatten(0, 1)


@pytest.mark.parametrize(
    ("name", "slip"),
    [
        *[(name, other_epsilon) for name in (*ADM, *CM)],
        *[(name, sines_first) for name in ("adm-imagenet64", "adm-imagenet512", "cm-lsun256")],
        *[(name, rows_of_the_other_order) for name in ("adm-imagenet64", "adm-lsun", "cm-imagenet64")],
        *[(name, other_heads) for name in ("adm-imagenet256", "cm-lsun256")],
        *[(name, no_middle_norm) for name in ("adm-lsun", "cm-lsun256")],
        ("adm-imagenet128", one_head_width),
        ("adm-imagenet512", last_frequency),
        ("adm-imagenet64", scale_and_shift_swapped),
        ("adm-lsun", resampled_first),
        ("adm-imagenet256", labels_before_the_second_layer),
    ],
)
def test_a_slip_would_be_seen(name: str, slip: Callable[[Any], None]) -> None:
    pipe, io = converted(name)
    slip(pipe.unet)
    assert apart(answer(pipe, io), io["unet.out"]) > (2.5e-5 if slip is other_epsilon else 0.01)


def nothing_of_the_first(scheduler: Any, level: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """1 - alpha - sigma^2 of a cosine schedule's first step is 7.7e-8, of which the reference's rounding made 0."""
    exact = (1 - level - deviation**2).clamp(min=0).sqrt()
    return exact * (level > 0.05)


RUNS = [
    (name, grid, clip)
    for name, clips in (("adm-imagenet64", [True]), ("adm-plain", [True]), ("adm-lsun", [True, False]))
    for grid in ("10", "ddim10")
    for clip in clips
]


@pytest.mark.parametrize(("name", "grid", "clip"), RUNS)
def test_a_run_is_the_originals(name: str, grid: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids "10" (from 999 on) and "ddim10" (from 900 on), DDPM with a learned and a fixed variance, DDIM."""
    for sampler, eta in (("ddpm", 0.0), ("ddim.eta0", 0.0), ("ddim.eta1", 1.0)):
        ddim = sampler != "ddpm"
        pipe, io = converted(name, use_ddim=ddim, timestep_respacing=grid, clip_denoised=clip)
        kind = RespacedDDPMScheduler if not ddim else DDIMScheduler if grid == "ddim10" else RespacedDDIMScheduler
        assert type(pipe.scheduler) is kind
        wanted = io.get(f"S{grid}.{sampler}{'' if clip else '.noclip'}.sample")
        if wanted is None:
            assert (clip, sampler) == (False, "ddim.eta1")
            continue
        given = {"class_labels": io["sample.class_labels"]} if "sample.class_labels" in io else {"batch_size": 2}
        if (name, grid, sampler) == ("adm-imagenet64", "10", "ddim.eta1"):
            monkeypatch.setattr(RespacedDDIMScheduler, "direction", nothing_of_the_first)
        with published.noise(io["sample.step_noise"]):
            run = pipe(**given, num_inference_steps=10, eta=eta, latents=io["sample.noise"], output_type="latent")
        assert apart(run.images, wanted) < (1e-4 if clip else 1e-3)
        assert pipe.scheduler.timesteps.flip(0).tolist() == io[f"S{grid}.timesteps"].tolist()
        assert pipe.scheduler.alphas_cumprod[io[f"S{grid}.timesteps"]].double() == pytest.approx(
            io[f"S{grid}.alphas_cumprod"], rel=1e-4
        )


@pytest.mark.parametrize("name", ["adm-lsun", "adm-imagenet64", "adm-plain"])
def test_each_step_is_the_originals(name: str) -> None:
    """The posterior at two steps: its mean, its variance and the clean image, of the network's own output."""
    pipe, io = converted(name)
    scheduler = pipe.scheduler
    assert scheduler.alphas_cumprod == pytest.approx((1 - io["betas"]).cumprod(0), rel=1e-12)
    scheduler.set_timesteps(10)
    x = io["sample.noise"]
    for row, index in enumerate(io["S10.p.index"].tolist()):
        t, labels = int(io["S10.timesteps"][index]), io.get("sample.class_labels")
        with torch.no_grad():
            output = pipe.unet(x, torch.full((2,), t), class_labels=labels).sample
        draws = torch.ones(1, 2, 3, 16, 16)
        with published.noise(draws):
            with_noise = scheduler.step(output, t, x)
        with published.noise(0 * draws):
            mean = scheduler.step(output, t, x).prev_sample
        wanted = {key: io[f"S10.p.{key}"] for key in ("mean", "variance", "pred_xstart")}
        assert apart(mean[row], wanted["mean"][row]) < 2e-5
        assert apart(with_noise.pred_original_sample[row], wanted["pred_xstart"][row]) < 2e-5
        deviation = (with_noise.prev_sample - mean)[row]
        assert apart(deviation, wanted["variance"][row].sqrt() if t else 0 * deviation) < 2e-5


def test_the_upsampler_sees_its_image_after_the_sample() -> None:
    pipe, io = converted("adm-upsampler", use_ddim=True)
    small, labels = io["unet.low_res"], io["class_labels"]
    start = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"num_inference_steps": 2, "latents": start, "output_type": "latent"}
    found = pipe(labels, small, **call).images
    pipe.scheduler.set_timesteps(2)
    x = start
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            eps = pipe.unet(torch.cat([x, enlarged(small, 16)], dim=1), t, class_labels=labels).sample[:, :3]
        x = pipe.scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
    assert torch.equal(found, x)
    pictures = [pipe.image_processor.numpy_to_pil(p.permute(1, 2, 0).numpy())[0] for p in (small / 2 + 0.5).clamp(0, 1)]
    assert apart(pipe(labels, pictures, **call).images, pipe(labels, small.clamp(-1, 1), **call).images) < 0.2
    for wrong, said in (
        ({"class_labels": labels}, "enlarges images; give image"),
        ({"class_labels": labels[:2], "image": small}, "2 class_labels and 3 images"),
        ({"class_labels": labels, "image": small[:, :1]}, r"image must be \(N, 3, height, width\)"),
    ):
        with pytest.raises(InputError, match=said):
            pipe(**wrong)


@pytest.mark.parametrize("name", CM)
def test_a_consistency_model_samples_as_the_original(name: str) -> None:
    """In one step, and in two of grids of 40 and of 151 or 201."""
    pipe, io = converted(name)
    given = {"class_labels": io["sample.class_labels"]} if "sample.class_labels" in io else {}
    call: dict[str, Any] = {**given, "batch_size": 2, "latents": io["sample.noise"], "output_type": "pt"}
    assert apart(pipe(**call, num_inference_steps=1).images, (io["onestep.sample"] / 2 + 0.5).clamp(0, 1)) < 3e-5
    grids = [int(key.split(".")[1]) for key in io if key.endswith(".ts")]
    assert len(grids) == 2
    for steps in grids:
        pipe, _ = converted(name, steps=steps)
        taken = io[f"multistep.{steps}.ts"].tolist()[-2::-1]  # diffusers adds the end, and begins with the largest
        with published.noise(io[f"multistep.{steps}.step_noise"]):
            found = pipe(**call, num_inference_steps=None, timesteps=taken).images
        assert apart(found, (io[f"multistep.{steps}.sample"] / 2 + 0.5).clamp(0, 1)) < 3e-5


@pytest.mark.parametrize("name", CM)
def test_a_consistency_model_is_preconditioned_as_the_original(name: str) -> None:
    pipe, io = converted(name, clip_denoised=False)
    scheduler, labels = pipe.scheduler, io.get("class_labels")
    assert type(scheduler) is CMStochasticIterativeScheduler
    for i, sigma in enumerate(io["denoise.sigma"].double()):
        scheduler.set_timesteps(1)
        scheduler.sigmas = torch.tensor([float(sigma), scheduler.config.sigma_min])
        t = torch.tensor([float(scheduler.sigma_to_t(sigma.numpy()))])
        assert float(t) == pytest.approx(float(io["denoise.rescaled_t"][i]), rel=1e-6)
        scheduler.timesteps = t
        x = io["denoise.x"][[i]]
        label = None if labels is None else labels[[i]]
        with torch.no_grad():  # at the original's rounding of t, of which a last digit is worth 1e-4 at sigma 0.002
            output = pipe.unet(
                scheduler.scale_model_input(x, t[0]), io["denoise.rescaled_t"][[i]], class_labels=label
            ).sample
        assert apart(output, io["denoise.model_output"][[i]]) < 2e-5
        assert apart(scheduler.step(output, t[0], x).prev_sample, io["denoise.denoised"][[i]]) < 2e-5


@pytest.mark.parametrize("name", CM)
def test_the_teacher_of_a_consistency_model_is_a_denoiser_of_edm(name: str) -> None:
    """The same network with the ordinary scalings, whose time is 1000 times that of EDM's schedulers."""
    pipe, io = converted(name, training_mode="edm")
    assert type(pipe) is PixelPipeline
    assert type(pipe.scheduler) is EDMEulerScheduler
    assert type(pipe.unet) is GuidedUNet2DModel

    @torch.no_grad()
    def denoise(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        scaled = pipe.scheduler.precondition_inputs(x.float(), sigma)
        t = pipe.scheduler.precondition_noise(sigma.flatten())
        output = pipe.unet(scaled, t.expand(len(x)), class_labels=labels).sample
        result: torch.Tensor = pipe.scheduler.precondition_outputs(x, output, sigma)
        return result

    labels = io.get("class_labels")
    assert apart(denoise(io["denoise.x"], io["denoise.sigma"], labels), io["edm.denoised"]) < 2e-5
    sigmas, labels = io["edm.heun8.sigmas"], io.get("sample.class_labels")
    x = io["sample.noise"] * sigmas[0]
    for now, after in itertools.pairwise(sigmas):
        slope = (x - denoise(x, now, labels).clamp(-1, 1)) / now
        ahead = x + (after - now) * slope
        if after > 0:
            ahead = x + (after - now) * (slope + (ahead - denoise(ahead, after, labels).clamp(-1, 1)) / after) / 2
        x = ahead
    assert apart(x, io["edm.heun8.sample"]) < 3e-5
    given: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    sampler: Any = pipe
    run = sampler(**given, batch_size=2, num_inference_steps=8, latents=io["sample.noise"], output_type="latent").images
    assert pipe.scheduler.sigmas == pytest.approx(sigmas, abs=1e-4)
    assert run.shape == x.shape


@pytest.mark.parametrize("name", FULL)
def test_every_parameter_of_a_published_checkpoint_has_its_place(name: str) -> None:
    """On the meta device, which holds names and shapes alone."""
    state, count = published.shapes(name)
    pipe: Any = pipeline_from(state, published.arguments(f"{name}.full"))
    assert sum(p.numel() for p in pipe.unet.parameters()) == count
    ours = name in ("128x128_diffusion", "512x512_diffusion", "64_256_upsampler")
    assert type(pipe.unet) is (GuidedUNet2DModel if ours else UNet2DModel)


def written(folder: Path, name: str, **flags: Any) -> tuple[Path, Path]:
    state, given, _ = published.small(name)
    torch.save({key: value.half() for key, value in state.items()}, folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps({**given, **flags}))
    return folder / f"{name}.pt", folder / f"{name}.json"


@pytest.mark.parametrize("name", ["adm-imagenet64", "adm-imagenet512", "adm-upsampler", "cm-imagenet64"])
def test_the_verb_and_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, loaded, quantized, measured, corrected, saved and loaded again, bit by bit."""
    checkpoint, flags = written(tmp_path, name)
    assert main(["convert", str(checkpoint), str(flags), str(tmp_path / "out")]) == 0
    plain, (direct, io) = load(tmp_path / "out"), converted(name)
    assert f"{type(direct).__name__}, {sum(p.numel() for p in direct.unet.parameters()):,} parameters" in (
        capsys.readouterr().out
    )
    assert torch.equal(answer(plain, io), answer(direct, io))
    call: dict[str, Any] = {"class_labels": [0, 9]}
    if name == "adm-upsampler":
        call["image"] = io["unet.low_res"][:2]
    run = Sampling(steps=2, samples=4, batch=2, call=call)
    quantized = quantize(plain, "w8a8", run)
    stats = measure(plain, quantized, run)
    assert stats.samples == 4
    assert stats.measured_on.learned_variance == (name != "cm-imagenet64")
    corrected = correct(quantized, stats, ["joint"])
    again = []
    for number, pipe in enumerate((quantized, corrected)):
        pipe.save_pretrained(tmp_path / str(number))
        again.append(load(tmp_path / str(number)))
    for pipe, loaded in zip((quantized, corrected), again, strict=True):
        assert type(loaded) is type(plain)
        images = [
            p(**call, batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(1),
              output_type="np").images
            for p in (pipe, loaded)
        ]  # fmt: skip
        assert (images[0] == images[1]).all()


def test_toml_and_safetensors_say_the_same(tmp_path: Path) -> None:
    from ptqd.diffusion.converters.family import convert

    state, given, _ = published.small("adm-lsun")
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in given.items()]
    (tmp_path / "flags.toml").write_text("".join(lines).replace('"1,1"', "[1, 1]"))
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "ema.safetensors")
    pipe: Any = convert(tmp_path / "ema.safetensors", tmp_path / "flags.toml")
    direct, _ = converted("adm-lsun")
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), direct.unet.parameters(), strict=True))
    save_converted(pipe, tmp_path / "out")
    loaded: Any = load(tmp_path / "out")
    assert type(loaded.scheduler) is RespacedDDPMScheduler
    assert torch.equal(loaded.scheduler.alphas_cumprod, direct.scheduler.alphas_cumprod)
    assert loaded.config.image_channels == 3


def test_images_of_one_channel_and_any_number_of_classes() -> None:
    """Channels and classes are the weights'; channel_mult may be a list; the attention of sequences is of its order."""
    state, given, _ = published.small("cm-imagenet64")
    narrow = dict(state)
    narrow["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :1]
    narrow["out.2.weight"], narrow["out.2.bias"] = state["out.2.weight"][:1], state["out.2.bias"][:1]
    narrow["label_emb.weight"] = torch.cat([state["label_emb.weight"]] * 10)
    flags = {
        **given,
        "channel_mult": [1, 1],
        "sigma_max": 40,
        "sigma_data": 0.25,
        "training_mode": "consistency_training",
    }
    pipe: Any = pipeline_from(narrow, flags)
    assert (pipe.unet.config.in_channels, pipe.unet.config.out_channels) == (1, 1)
    assert pipe.unet.config.num_class_embeds == 100
    assert (pipe.scheduler.config.sigma_max, pipe.scheduler.config.sigma_data) == (40, 0.25)
    assert pipe(1, class_labels=[99], num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 1)
    sequences = {key: value.squeeze(-1) if value.ndim == 4 and value.shape[2:] == (1, 1) and "qkv" in key else value
                 for key, value in narrow.items()}  # fmt: skip
    middle = "mid_block.attentions.0.to_q.weight"
    rows = sequences["middle_block.1.qkv.weight"].squeeze(-1)
    by_head: Any = pipeline_from(sequences, flags)
    assert torch.equal(by_head.unet.state_dict()[middle], torch.cat([rows[:16], rows[48:64]]))
    first: Any = pipeline_from(sequences, {**flags, "use_new_attention_order": True})
    assert torch.equal(first.unet.state_dict()[middle], rows[:32])
    assert torch.equal(pipe.unet.state_dict()[middle], rows[:32])


def test_a_process_that_only_loads_knows_the_networks() -> None:
    """Diffusers loads parts from modules that are imported."""
    assert set(pipelines.NETWORKS) == {EDMUNet2DModel, GuidedUNet2DModel}


def test_ddim_that_would_leave_its_grid_is_refused() -> None:
    pipe, io = converted("adm-lsun", timestep_respacing="10")
    with pytest.raises(InputError, match="DDIMScheduler leaves its own grid, timestep_spacing 'linspace', at 10 steps"):
        with_scheduler(pipe, "DDIMScheduler")(num_inference_steps=10)
    respaced: Any = with_scheduler(pipe, "RespacedDDIMScheduler")
    call: dict[str, Any] = {"batch_size": 2, "latents": io["sample.noise"], "output_type": "latent"}
    assert apart(respaced(num_inference_steps=10, **call).images, io["S10.ddim.eta0.sample"]) < 3e-5
    for other in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):  # which take the noise alone
        assert with_scheduler(pipe, other)(num_inference_steps=2, **call).images.shape == (2, 3, 16, 16)


BETAS = torch.linspace(1e-3, 0.03, 100).tolist()


@pytest.mark.parametrize(
    "config",
    [
        *[{"prediction_type": kind, "clip_sample": False} for kind in ("epsilon", "sample", "v_prediction")],
        {"clip_sample_range": 0.5, "beta_schedule": "squaredcos_cap_v2"},
        {"thresholding": True, "sample_max_value": 2.0, "set_alpha_to_one": False},
        {"trained_betas": BETAS, "num_train_timesteps": 100},
        {"beta_schedule": "scaled_linear", "clip_sample": False},
    ],
)
def test_the_samplers_of_ours_step_as_those_of_diffusers_on_a_grid_of_one_stride(config: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 2, 3, 4, 4, generator=random)
    pairs: list[tuple[Any, Any, dict[str, Any]]] = [
        (DDIMScheduler, RespacedDDIMScheduler, {"eta": eta, "use_clipped_model_output": clipped})
        for eta, clipped in ((0.0, False), (0.5, True))
    ]
    pairs.append((DDPMScheduler, RespacedDDPMScheduler, {}))
    for theirs, ours, given in pairs:
        known = {key: value for key, value in config.items() if key != "set_alpha_to_one" or theirs is DDIMScheduler}
        schedulers = [theirs(**known), ours(**known)]
        assert isinstance(schedulers[1], theirs)
        assert ours.from_config(schedulers[1].config).config == schedulers[1].config
        for scheduler in schedulers:
            scheduler.set_timesteps(10)
        for t in schedulers[0].timesteps:
            steps = [
                scheduler.step(output, t, x, generator=torch.Generator().manual_seed(1), **given)
                for scheduler in schedulers
            ]
            assert apart(steps[0].prev_sample, steps[1].prev_sample) < 1e-4
            assert apart(steps[0].pred_original_sample, steps[1].pred_original_sample) < 1e-4


def test_strides_that_the_original_would_choose_otherwise_are_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = converted("adm-plain", use_ddim=True)
    _warn_of_another_stride.cache_clear()
    for steps, told in (
        (3, "timesteps are 333 apart, from 666 on, where guided-diffusion's ddim3 has them 334 apart, from 668 on"),
        (4, None),
    ):
        caplog.clear()
        for _ in range(2):  # told once
            pipe(num_inference_steps=steps, output_type="latent")
        assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ([told] if told else [])
    with pytest.raises(InputError, match="num_inference_steps must be at least 1; got 0"):
        pipe(num_inference_steps=0)


def test_arguments_that_the_model_does_not_take_are_named() -> None:
    pipe, _ = converted("adm-imagenet64")
    for given, said in (
        ({}, r"the model has 10 classes; give class_labels, numbers in 0\.\.9"),
        ({"class_labels": [10]}, r"class_labels must be at least one number in 0\.\.9; got \[10\]"),
        ({"class_labels": []}, "class_labels must be at least one number"),
        ({"class_labels": 3, "image": torch.zeros(1, 3, 8, 8)}, "enlarges no images; leave image out"),
        ({"class_labels": 3, "latents": torch.zeros(1, 3, 8, 8)}, r"latents must have shape \(1, 3, 16, 16\)"),
    ):
        with pytest.raises(InputError, match=said):
            pipe(**given)
    plain, _ = converted("adm-plain")
    with pytest.raises(InputError, match="the model has no classes; leave class_labels out"):
        plain(class_labels=[1])


def said(state: published.Tensors, flags: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        pipeline_from(state, flags, where="ema.pt", described="flags.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_named() -> None:
    state, flags, _ = published.small("adm-imagenet256")
    bias = "output_blocks.0.0.in_layers.2.bias"
    assert "up_blocks.0.resnets.0.conv1.bias should be (32,), and it has none" in said(
        {key: value for key, value in state.items() if key != bias}, flags
    )
    assert "up_blocks.0.resnets.0.conv1.bias should be (32,), and it has (31,)" in said(
        {**state, bias: torch.zeros(31)}, flags
    )
    assert "holds 1 tensors more than flags.json has a place for (extra.weight, ...)" in said(
        {**state, "extra.weight": torch.zeros(1)}, flags
    )
    assert "ema.pt lacks 'middle_block.1.qkv.weight'; it is of another architecture than flags.json says" in said(
        {}, flags
    )
    assert "'out.2.bias' twice" in said({**state, "module.out.2.bias": state["out.2.bias"]}, flags)
    assert "holds 1 tensors more than flags.json has a place for (label_emb.weight" in said(
        state, {**flags, "class_cond": False}
    )
    unlabelled = {key: value for key, value in state.items() if key != "label_emb.weight"}
    assert "lacks 'label_emb.weight'" in said(unlabelled, flags)
    assert "3 input and 6 output channels, where flags.json gives 3 outputs; look at learn_sigma (false)" in said(
        state, {**flags, "learn_sigma": False}
    )
    assert "give weights of floating point" in said({**state, bias: torch.zeros(32, dtype=torch.int8)}, flags)
    assert "is of another architecture" in said(state, {**flags, "num_res_blocks": 2})
    odd = "middle_block.1.qkv.weight"
    assert "the 95 rows of middle_block.1.qkv.weight are no queries" in said({**state, odd: state[odd][:95]}, flags)
    images = {key: value[..., None] if "qkv.weight" in key else value for key, value in state.items()}
    assert "attention of ema.pt is of consistency_models (its weights have four axes)" in said(images, flags)


def test_flags_that_are_not_understood_are_named() -> None:
    state, flags, _ = published.small("adm-imagenet256")

    def changed(**other: Any) -> str:
        return said(state, {**flags, **other})

    assert "flags.json: 'turbo' is no option of guided-diffusion that is known here" in changed(turbo=1)
    assert "'training_mode' is no option" not in changed(training_mode="edm")
    assert "'noise_schedule' is an option of guided-diffusion and 'training_mode' one of" in changed(
        training_mode="edm"
    )
    shared = {key: value for key, value in flags.items() if key not in ("diffusion_steps", "noise_schedule")}
    assert "may be of guided-diffusion or of consistency_models; add noise_schedule (linear or cosine)" in said(
        state, shared
    )
    assert "'classifier_scale' is of a classifier that guides sampling" in changed(classifier_scale=1.0)
    assert "class_cond should be true or false; it is 'True'" in changed(class_cond="True")
    assert "num_channels should be a whole number of at least 1; it is 0" in changed(num_channels=0)
    assert "noise_schedule should be 'linear' or 'cosine'; it is 'sqrt'" in changed(noise_schedule="sqrt")
    assert "timestep_respacing should be a number of steps such as '250'" in changed(timestep_respacing="10,10,5")
    assert "attention_resolutions should be whole numbers above 0" in changed(attention_resolutions="a")
    assert "channel_mult should be numbers above 0" in changed(channel_mult="1,-1")
    assert "the originals know 64, 128, 256, 512 pixels, not 16; say channel_mult" in changed(channel_mult="")
    assert "6 pixels cannot be halved 2 times" in changed(image_size=6)
    assert "num_heads_upsample 2 is not supported" in changed(num_head_channels=-1, num_heads_upsample=2)
    assert "num_head_channels 24 does not divide the 32 channels of level 1" in changed(num_head_channels=24)
    assert "level 0 has 48 channels (num_channels 48 times 1), which 32 groups" in changed(num_channels=48)
    assert "rescale_timesteps True is not supported" in changed(diffusion_steps=500, rescale_timesteps=True)
    state, flags, _ = published.small("cm-lsun256")
    assert "training_mode should be 'consistency_distillation' or" in changed(training_mode="progdist")
    assert "sigma_min 90 is not below sigma_max 80" in changed(sigma_min=90)
    assert "learn_sigma is not supported for consistency_models" in changed(learn_sigma=True)
    state, flags, _ = published.small("adm-upsampler")
    assert "small_size 32 is larger than large_size 16" in changed(small_size=32)
    assert "image_size 8 is not supported, only 16" in changed(image_size=8)
