"""Networks of EDM as pipelines of diffusers, against the original code."""

import itertools
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import published
from ptqd import InputError, PixelPipeline, Sampling, correct, load, measure, quantize
from ptqd.diffusion.converters.family import convert
from ptqd.diffusion.edm import pipeline_from
from ptqd.pipelines.edm_unet import EDMDownBlock, EDMUNet2DModel
from ptqd_cli.main import main
from published import apart

NAMES = ("edm-ddpmpp", "edm-ncsnpp", "edm-adm")
FULL = ("edm-cifar10-32x32-cond-vp", "edm-ffhq-64x64-uncond-ve", "edm-imagenet-64x64-cond-adm")
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def converted(name: str) -> tuple[Any, published.Tensors]:
    state, given, io = published.small(name)
    return pipeline_from(state, given), io


def preconditioned(pipe: Any) -> Denoiser:
    """EDMPrecond of the original (arXiv 2206.00364, table 1), in single precision, around the converted network."""

    @torch.no_grad()
    def denoise(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        total = (sigma**2 + 0.25).sqrt()
        output: torch.Tensor = pipe.unet(x / total, sigma.flatten().log() / 4, class_labels=labels).sample
        return 0.25 / total**2 * x + sigma * 0.5 / total * output

    return denoise


@torch.no_grad()
def answer(pipe: Any, io: published.Tensors) -> torch.Tensor:
    output: torch.Tensor = pipe.unet(io["model.x"], io["model.c_noise"], class_labels=io.get("class_labels")).sample
    return output


@pytest.mark.parametrize("name", NAMES)
def test_a_network_answers_as_the_original(name: str) -> None:
    pipe, io = converted(name)
    assert type(pipe) is PixelPipeline
    assert type(pipe.unet) is EDMUNet2DModel
    labels, denoise = io.get("class_labels"), preconditioned(pipe)
    assert apart(answer(pipe, io), io["model.out"]) < 2e-5
    assert apart(denoise(io["net.x"], io["net.sigma"], labels), io["net.denoised"]) < 2e-5
    if labels is not None:
        assert apart(denoise(io["net.x"], io["net.sigma"], None), io["net.denoised_unlabelled"]) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_heuns_method_samples_as_the_original(name: str) -> None:
    """Algorithm 1 of arXiv 2206.00364 without churn, in double precision around the network."""
    pipe, io = converted(name)
    denoise, steps, labels = preconditioned(pipe), io["heun8.t_steps"], io.get("sample.class_labels")
    x = io["sample.noise"].double() * steps[0]
    for now, after in itertools.pairwise(steps):
        slope = (x - denoise(x, now, labels).double()) / now
        ahead = x + (after - now) * slope
        if after > 0:
            slope = (slope + (ahead - denoise(ahead, after, labels).double()) / after) / 2
            ahead = x + (after - now) * slope
        x = ahead
    assert apart(x, io["heun8.sample"]) < 3e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_schedulers_precondition_as_the_original(name: str) -> None:
    """Euler's method on the original's grid and preconditioning, which DPM-Solver++ of first order is as well."""
    pipe, io = converted(name)
    denoise, labels, scheduler = preconditioned(pipe), io.get("sample.class_labels"), pipe.scheduler
    scheduler.set_timesteps(8)
    assert scheduler.sigmas.double() == pytest.approx(io["heun8.t_steps"], rel=1e-6)
    assert scheduler.timesteps.double() == pytest.approx(io["heun8.t_steps"][:-1].log() / 4, abs=1e-6)
    assert scheduler.init_noise_sigma == pytest.approx(80.00625, rel=1e-7)  # where the original has 80
    x = io["sample.noise"] * scheduler.init_noise_sigma
    for now, after in itertools.pairwise(scheduler.sigmas):
        x = x + (after - now) * (x - denoise(x, now, labels)) / now
    call: dict[str, Any] = {"latents": io["sample.noise"], "num_inference_steps": 8, "output_type": "latent"}
    call |= {"batch_size": 2} if labels is None else {"class_labels": labels}
    assert apart(pipe(**call).images, x) < 3e-5
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=1)
    assert apart(pipe(**call).images, x) < 1e-4  # its grid is of single precision
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(scheduler.config)
    assert torch.isfinite(pipe(**call).images).all()


def other_epsilon(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5 if module.eps == 1e-6 else 1e-6


def other_groups(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups *= 2


def sines_last(network: Any) -> None:
    network.time_proj.flip_sin_to_cos = not network.time_proj.flip_sin_to_cos


def other_last_frequency(network: Any) -> None:
    network.time_proj.downscale_freq_shift = 1 - network.time_proj.downscale_freq_shift


def frequencies_in_radians(network: Any) -> None:
    network.time_proj.freqs /= 2 * torch.pi


def residuals_as_they_are(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.output_scale_factor = 1.0


def attention_as_it_is(network: Any) -> None:
    for module in network.modules():
        if hasattr(module, "to_q"):
            module.rescale_output_factor = 1.0


def activated_once_more(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.skip_time_act = False


def box_filter(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, ResnetBlock2D) and module.down:
            module.downsample = nn.AvgPool2d(2)


def other_padding(network: Any) -> None:
    """The filter's padding after the convolution, not before it."""
    for module in network.modules():
        if isinstance(module, EDMDownBlock):
            paths: Any = module.residuals
            for path in paths:
                path.conv.padding = (1, 1)
                path.register_forward_pre_hook(
                    lambda _, args: nn.functional.pad(args[0], (1, 1, 1, 1), mode="replicate")
                )


def no_middle_attention(network: Any) -> None:
    network.mid_block.attentions[0] = nn.Identity()


def label_of_unit_size(network: Any) -> None:
    network.class_embedding.num_embeddings = 1


def label_before_its_layer(network: Any) -> None:
    table = network.class_embedding.weight
    table.data = table.data.roll(1, dims=1)


def heads_as_blocks(network: Any) -> None:
    """Rows of queries, keys and values taken as three blocks."""
    for module in network.modules():
        if hasattr(module, "to_q"):
            layers = (module.to_q, module.to_k, module.to_v)
            rows = torch.stack([layer.weight.data for layer in layers], dim=1).flatten(0, 1)
            for layer, part in zip(layers, rows.chunk(3), strict=True):
                layer.weight.data = part


@pytest.mark.parametrize(
    ("name", "slip"),
    [
        *[(name, other_epsilon) for name in NAMES],
        *[(name, other_groups) for name in NAMES],
        *[(name, heads_as_blocks) for name in NAMES],
        *[(name, no_middle_attention) for name in NAMES],
        *[(name, activated_once_more) for name in NAMES],
        *[(name, slip) for name in ("edm-ddpmpp", "edm-adm") for slip in (sines_last, other_last_frequency)],
        *[
            (name, slip)
            for name in ("edm-ddpmpp", "edm-ncsnpp")
            for slip in (residuals_as_they_are, attention_as_it_is)
        ],
        *[("edm-ncsnpp", slip) for slip in (frequencies_in_radians, box_filter, other_padding)],
        ("edm-ddpmpp", label_of_unit_size),
        ("edm-adm", label_before_its_layer),
    ],
)
def test_a_slip_would_be_seen(name: str, slip: Callable[[Any], None]) -> None:
    pipe, io = converted(name)
    slip(pipe.unet)
    assert apart(answer(pipe, io), io["model.out"]) > (2.5e-5 if slip is other_epsilon else 0.01)


@pytest.mark.parametrize("name", FULL)
def test_every_parameter_of_a_published_network_has_its_place(name: str) -> None:
    """On the meta device, which holds names and shapes alone."""
    state, count = published.shapes(name)
    pipe: Any = pipeline_from(state, published.arguments(f"{name}.full"))
    assert sum(p.numel() for p in pipe.unet.parameters()) == count


@pytest.mark.parametrize("name", NAMES)
def test_the_verb_and_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, loaded, quantized, measured, corrected, saved and loaded again, bit by bit."""
    state, given, io = published.small(name)
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "edm.pt")
    (tmp_path / "edm.json").write_text(json.dumps(given))
    assert main(["convert", str(tmp_path / "edm.pt"), str(tmp_path / "edm.json"), str(tmp_path / "out")]) == 0
    assert "PixelPipeline" in capsys.readouterr().out
    plain, direct = load(tmp_path / "out"), pipeline_from(state, given)
    assert torch.equal(answer(plain, io), answer(direct, io))
    call: dict[str, Any] = {"class_labels": [0, 9]} if "class_labels" in io else {}
    run = Sampling(steps=2, samples=4, batch=2, call=call)
    quantized = quantize(plain, "w8a8", run)
    stats = measure(plain, quantized, run)
    assert stats.samples == 4
    corrected = correct(quantized, stats, ["joint"])
    for number, pipe in enumerate((quantized, corrected)):
        pipe.save_pretrained(tmp_path / str(number))
        images = [
            p(**call, batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(1),
              output_type="np").images
            for p in (pipe, load(tmp_path / str(number)))
        ]  # fmt: skip
        assert (images[0] == images[1]).all()


def said(state: published.Tensors, arguments: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        pipeline_from(state, arguments, where="edm.pt", described="edm.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_named() -> None:
    state, arguments, _ = published.small("edm-ncsnpp")
    bias = "model.dec.16x16_block1.norm1.bias"
    assert "up_blocks.1.resnets.1.norm2.bias should be (16,), and it has none" in said(
        {key: value for key, value in state.items() if key != bias}, arguments
    )
    assert "and it has (15,) there" in said({**state, bias: torch.zeros(15)}, arguments)
    assert "holds 1 tensors more than edm.json has a place for (model.extra" in said(
        {**state, "model.extra": torch.zeros(1)}, arguments
    )
    assert "holds 1 tensors more than edm.json has a place for (model.map_noise.freqs" in said(
        state, {**arguments, "embedding_type": "positional"}
    )
    assert "resample_filter is no filter of resample_filter [1, 1]" in said(
        state, {**arguments, "resample_filter": [1, 1]}
    )
    assert "edm.pt lacks 'model.map_label.weight'" in said(state, {**arguments, "label_dim": 10})
    assert "is of another architecture" in said(state, {**arguments, "num_blocks": 2})
    assert "holds 1 tensors more than edm.json has a place for (model.map_augment.weight" in said(
        state, {**arguments, "augment_dim": 0}
    )


def test_arguments_that_are_not_understood_are_named() -> None:
    state, arguments, _ = published.small("edm-adm")

    def changed(**other: Any) -> str:
        return said(state, {key: value for key, value in {**arguments, **other}.items() if value is not None})

    assert "'turbo' is no option of EDM's DhariwalUNet that is known here" in changed(turbo=1)
    assert "'encoder_type' is no option of EDM's DhariwalUNet" in changed(encoder_type="standard")
    assert "lacks class_name, which says how the network is preconditioned" in changed(class_name=None)
    assert "class_name 'training.networks.VPPrecond' is not supported, only EDMPrecond" in changed(
        class_name="training.networks.VPPrecond"
    )
    assert "model_type should be 'SongUNet' or 'DhariwalUNet'; it is 'UNet'" in changed(model_type="UNet")
    assert "edm.json lacks img_resolution" in changed(img_resolution=None)
    assert "channel_mult should be whole numbers above 0" in changed(channel_mult=[1, 0.5])
    assert "5 pixels cannot be halved 1 times" in changed(img_resolution=5)
    assert "attention over 16 channels cannot have heads of 64" in changed(channels_per_head=64, attn_resolutions=[16])
    state, arguments, _ = published.small("edm-ncsnpp")
    assert "encoder_type should be 'standard' or 'residual'; it is 'skip'" in changed(encoder_type="skip")
    assert "decoder_type 'skip' is not supported" in changed(decoder_type="skip")
    assert "resample_filter should be [1, 1] or [1, 3, 3, 1]; it is [1, 2, 1]" in changed(resample_filter=[1, 2, 1])


def test_the_file_that_is_given_tells_the_project(tmp_path: Path) -> None:
    for name, values, text in (
        ("a.json", {"dropout": 0.1}, "may be of any project; add class_name and img_resolution"),
        (
            "a.json",
            {"img_resolution": 16, "image_size": 16},
            "'img_resolution' is of EDM's networks and 'image_size' of",
        ),
        ("a.json", [1], "should map the names of options to values; it holds list"),
        ("a.json", None, "cannot be read as JSON"),
        ("a.toml", None, "cannot be read as TOML"),
        ("a.yaml", {"image_size": 16}, "describes no model; give the YAML"),
        ("b.json", ..., "does not exist"),
    ):
        if values is not ...:
            (tmp_path / name).write_text("{" if values is None else json.dumps(values))
        with pytest.raises(InputError, match=text.replace("[", r"\[")):
            convert(tmp_path / "edm.pt", tmp_path / name)


class Persistent:
    """Pickled as EDM's networks are: a call of a function in the original's module."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({"type": "class"},)


def test_a_pickle_with_code_is_refused_and_the_way_out_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that the refusal gives is run, in an environment where the pickle's module is another."""
    state, arguments, _ = published.small("edm-adm")

    class EDMPrecond:
        init_kwargs = {key: value for key, value in arguments.items() if key != "class_name"}  # noqa: RUF012

        def cpu(self) -> "EDMPrecond":
            return self

        def state_dict(self) -> published.Tensors:
            return state

    def _reconstruct_persistent_obj(meta: object) -> EDMPrecond:
        return EDMPrecond()

    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    path = tmp_path / "edm-adm.pkl"
    (tmp_path / "edm.json").write_text(json.dumps(arguments))
    for options, protocol in itertools.product(("none.json", "edm.json"), (2, 4, 5)):
        path.write_bytes(pickle.dumps({"ema": Persistent()}, protocol=protocol))
        assert main(["convert", str(path), str(tmp_path / options), str(tmp_path / "out")]) == 2
        refused = capsys.readouterr().err
        assert f"{path} holds code beside tensors (_reconstruct_persistent_obj of EDM's repository)" in refused
        assert not (tmp_path / "out").exists()
    line = refused[refused.index('python -c "') + len('python -c "') : refused.rindex('"')]
    exec(line)
    assert json.loads((tmp_path / "edm-adm.json").read_text())["class_name"] == "EDMPrecond"
    pipe: Any = convert(tmp_path / "edm-adm.pt", tmp_path / "edm-adm.json")
    direct, io = converted("edm-adm")
    assert torch.equal(answer(pipe, io), answer(direct, io))
