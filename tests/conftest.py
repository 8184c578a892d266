"""Small pipelines with random weights, and runs on them."""

import os
from collections.abc import Iterator
from typing import Any

if "PTQD_TEST_GPU" not in os.environ:  # before triton is first imported, by whomever
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel

from ptqd import InputError, LatentClassPipeline, NoiseStats, Recipe, Sampling, quantize
from ptqd.diffusion import Response
from ptqd.engines.cpu import this_processor
from ptqd.noise import MeasuredOn, cross_moments, fold_sums, joint_moments, paired_moments
from ptqd.pipelines.latent_class import ClassEmbedder

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


collect_ignore = ["card.py", "integration/on_a_card.py"]  # whoever imports them gets a device that is no device

MARKERS = {  # by the path that a test is in
    "tests/cli": "cli",
    "tests/engines": "engines",
    "tests/integration/test_backends": "backends",
    "tests/integration/test_pipelines": "pipelines",
    "tests/integration/test_processes": "processes",
    "tests/integration/test_devices": "gpu",
    "tests/engines/test_integer_layers": "gpu",
}


@pytest.hookimpl(tryfirst=True)  # xdist then finds the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by where they are; the pipelines of one name share what is built for them, and so a process."""
    for item in items:
        for path, marker in MARKERS.items():
            if path in item.nodeid or f"/{path.removeprefix('tests/')}" in item.path.as_posix():
                item.add_marker(marker)
        case = getattr(item, "callspec", None)
        name = case.params.get("name") if case is not None and "test_pipelines" in item.nodeid else None
        item.add_marker(pytest.mark.xdist_group(str(name or item.path.stem)))


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are asked for on a GPU do not pass on a CPU instead."""
    if "PTQD_TEST_GPU" in os.environ and not torch.cuda.is_available():
        raise pytest.UsageError("this machine has no GPU that torch knows; 'make test' runs the same tests on the CPU")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Any:
    """Models that openvino is rightly refused on this processor are not tested with it."""
    try:
        return (yield)
    except InputError as error:
        if this_processor().vnni or "on this processor (without VNNI)" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="session")
def _caches_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither what a user keeps there nor what tests make is seen by the other."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
            patched.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


def stats_of(
    eps: torch.Tensor, eps_q: torch.Tensor, first: int = 0, measured_on: MeasuredOn | None = None
) -> NoiseStats:
    """Statistics of one step."""
    moments = paired_moments(eps, eps_q)[:, None]
    indices = torch.arange(first, first + len(eps))
    timesteps = torch.tensor([1.0], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    return NoiseStats(
        timesteps=timesteps,
        indices=indices,
        moments=moments,
        elements=eps[0, 0].numel(),
        measured_on=measured_on or MeasuredOn("DDIMScheduler"),
        response=Response(one, one.clone(), one.clone(), one[0].clone(), exact=True),
        levels=None,
        joint=fold_sums(joint_moments(torch.zeros_like(eps), eps, eps_q, 1), indices)[:, None],
        cross=cross_moments([eps], [eps_q]),
        moved=((eps_q - eps) ** 2).flatten(1).mean(1).sum().double()[None],
        finals=eps[:0].float(),
        final_indices=indices[:0],
        paths=eps[:0].float(),
    )


def tiny_pipeline(seed: int = 0, *, attention: bool = False) -> LatentClassPipeline:
    """A pipeline whose denoiser has attention in its middle, or beside that in its inner blocks too."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D" if attention else "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    parts = (vae.eval(), unet.eval(), ClassEmbedder(10, 8), DDIMScheduler(**SCHEDULE))
    return LatentClassPipeline(*parts)


def quick_recipe(shorthand: str, calibration_samples: int = 2, **changes: Any) -> Recipe:
    """A recipe whose activations' ranges are not what is tested: they are the extremes of few samples."""
    values = {**Recipe.parse(shorthand).to_dict(), "calibration_samples": calibration_samples, **changes}
    if "activations" not in changes:
        values["activations"] = {**values["activations"], "range": "minmax"}
    return Recipe.from_dict(values)


@pytest.fixture(scope="session")
def pipe() -> LatentClassPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="session")
def run() -> Sampling:
    return Sampling(steps=4, eta=1.0, samples=8, batch=4, call={"class_labels": list(range(10)), "guidance_scale": 2.0})


@pytest.fixture(scope="session")
def qpipe(pipe: LatentClassPipeline, run: Sampling) -> Any:
    return quantize(pipe, quick_recipe("w4a8", 4), run)


@pytest.fixture(scope="session")
def pixel_pipe() -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler())
