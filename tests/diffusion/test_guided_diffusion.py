"""Checkpoints of guided-diffusion and consistency_models as pipelines of diffusers, against the original codes."""

from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDIMScheduler, UNet2DModel

import published
from ptqd import PixelPipeline
from ptqd.diffusion.guided_diffusion import pipeline_from
from ptqd.pipelines.guided_unet import GuidedUNet2DModel
from published import apart

OURS = ("adm-imagenet128", "adm-imagenet512")  # which UNet2DModel cannot say
ADM = ("adm-imagenet64", "adm-imagenet128", "adm-imagenet256", "adm-imagenet512", "adm-lsun", "adm-plain", "adm-upsampler")
CM = ("cm-imagenet64", "cm-lsun256")
SAMPLED = ("adm-imagenet64", "adm-lsun", "adm-plain")


def converted(name: str, **flags: Any) -> tuple[Any, published.Tensors]:
    state, given, io = published.small(name)
    return pipeline_from(state, {**given, **flags}), io


@torch.no_grad()
def answer(pipe: Any, io: published.Tensors) -> torch.Tensor:
    x = io["unet.x"]
    if "unet.low_res" in io:
        x = torch.cat([x, torch.nn.functional.interpolate(io["unet.low_res"], x.shape[-2:], mode="bilinear")], dim=1)
    output: torch.Tensor = pipe.unet(x, io["unet.t"], class_labels=io.get("class_labels")).sample
    return output


@pytest.mark.parametrize("name", [*ADM, *CM])
def test_a_network_answers_as_the_original(name: str) -> None:
    pipe, io = converted(name)
    assert type(pipe) is (ConsistencyModelPipeline if name in CM else PixelPipeline)
    assert type(pipe.unet) is (GuidedUNet2DModel if name in OURS else UNet2DModel)
    print(name, apart(answer(pipe, io), io["unet.out"]))
    assert apart(answer(pipe, io), io["unet.out"]) < 2e-5


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("grid", ["S10", "Sddim10"])
def test_a_run_is_the_originals(name: str, clip: bool, grid: str) -> None:
    for sampler, eta in (("ddpm", 0.0), ("ddim.eta0", 0.0), ("ddim.eta1", 1.0)):
        pipe, io = converted(
            name, use_ddim=sampler != "ddpm", timestep_respacing=grid.removeprefix("S"), clip_denoised=clip
        )
        wanted = io.get(f"{grid}.{sampler}{'' if clip else '.noclip'}.sample")
        if wanted is None:
            continue
        labels = io.get("sample.class_labels")
        given = {} if labels is None else {"class_labels": labels}
        with published.noise(io["sample.step_noise"]):
            found = pipe(
                **given, batch_size=2, num_inference_steps=10, eta=eta, latents=io["sample.noise"], output_type="latent"
            ).images
        print(name, clip, grid, sampler, type(pipe.scheduler).__name__, apart(found, wanted))
        assert apart(found, wanted) < (3e-5 if clip else 1e-3)
        assert pipe.scheduler.timesteps.flip(0).tolist() == io[f"{grid}.timesteps"].tolist()


@pytest.mark.parametrize("name", CM)
def test_a_consistency_model_samples_as_the_original(name: str) -> None:
    pipe, io = converted(name)
    labels = {"class_labels": io["sample.class_labels"]} if "sample.class_labels" in io else {}
    found = pipe(**labels, batch_size=2, num_inference_steps=1, latents=io["sample.noise"], output_type="pt").images
    print(name, apart(found, (io["onestep.sample"] / 2 + 0.5).clamp(0, 1)))
    for key in io:
        if not key.endswith(".ts"):
            continue
        steps = int(key.split(".")[1])
        pipe, _ = converted(name, steps=steps)
        assert pipe.scheduler.config.num_train_timesteps == steps
        with published.noise(io[f"multistep.{steps}.step_noise"]):
            found = pipe(**labels, batch_size=2, num_inference_steps=None, timesteps=io[key].tolist()[-2::-1], latents=io["sample.noise"], output_type="pt").images
        print(name, steps, io[key], apart(found, (io[f"multistep.{steps}.sample"] / 2 + 0.5).clamp(0, 1)))
