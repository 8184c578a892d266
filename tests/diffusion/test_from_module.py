"""Networks that are no models of diffusers, in the manners of guided-diffusion, EDM2 and k-diffusion, the whole way."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import nn

import ptqd
from plain_networks import Edm2Network, GuidedNetwork, KDiffusionNetwork
from ptqd import InputError, Sampling, UnsupportedError, from_module
from ptqd.diffusion import fingerprint, run_batch
from ptqd.quantization.bops import run_cost
from ptqd.quantization.hf_quantizer import coverage_of

SHAPE = (3, 8, 8)


def euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(prediction_type="sample", use_karras_sigmas=True, sigma_min=0.02, sigma_max=20.0)


def made(kind: str) -> tuple[nn.Module, Any, Sampling]:
    """The user's network, its pipeline, and how it samples."""
    torch.manual_seed(0)
    if kind == "guided":
        network: nn.Module = GuidedNetwork()
        pipe = from_module(network, DDIMScheduler(), SHAPE, conditions={"y": torch.tensor([0])})
        given = {"y": torch.tensor([0, 3, 1])}
    elif kind == "edm2":
        network = Edm2Network()
        example = {"class_labels": torch.eye(4)[:1]}
        pipe = from_module(network, EDMEulerScheduler(), SHAPE, convention="sigma", conditions=example)
        given = {"class_labels": torch.eye(4)}
    else:
        network = KDiffusionNetwork()
        pipe = from_module(network, euler(), SHAPE, convention="sigma", conditions={"aug_cond": torch.zeros(1, 3)})
        given = {"aug_cond": torch.randn(5, 3, generator=torch.Generator().manual_seed(1))}
    return network.eval(), pipe, Sampling(steps=3, samples=32, batch=16, call=given)


KINDS = ("guided", "edm2", "k-diffusion")
RECIPE = {**ptqd.Recipe.parse("w8a8-split").to_dict(), "calibration_samples": 4}


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Sampling, Any]:
    network, pipe, run = made(request.param)
    return network, pipe, run, ptqd.quantize(pipe, ptqd.Recipe.from_dict(RECIPE), run)


@torch.no_grad()
def test_samples_are_those_of_a_loop_by_hand() -> None:
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    network, pipe, _ = made("guided")
    labels = torch.tensor([2, 4])
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    x = noise.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2), y=labels)[:, :3], t, x).prev_sample
    got = pipe(batch_size=2, num_inference_steps=3, latents=noise, output_type="latent", y=labels).images
    torch.testing.assert_close(got, x)

    network, pipe, _ = made("edm2")
    one_hot = torch.eye(4)[:2]
    pipe.scheduler.set_timesteps(3)
    sigmas = pipe.scheduler.sigmas
    x = noise * pipe.scheduler.init_noise_sigma
    for sigma, following in itertools.pairwise(sigmas):  # Euler's method (EDM, algorithm 1)
        x = x + (following - sigma) * (x - network(x, sigma.expand(2), one_hot)) / sigma
    got = pipe(batch_size=2, num_inference_steps=3, latents=noise, output_type="latent", class_labels=one_hot).images
    torch.testing.assert_close(got, x, atol=2e-5, rtol=1e-5)


def test_all_of_it_is_quantized(whole: tuple[nn.Module, Any, Sampling, Any]) -> None:
    network, pipe, run, quantized = whole
    coverage = coverage_of(quantized)
    assert coverage.skipped == ()
    assert sum(name.endswith(".products") for name in coverage.quantized) == 1
    assert run_cost(quantized, run).ratio > 14
    if not isinstance(network, KDiffusionNetwork):
        assert sum(".hidden" in name for name in coverage.quantized) == 1
        assert pipe.unet.config.concatenations
    full, got = (run_batch(each, run, range(4), "latent") for each in (pipe, quantized))
    assert 0 < (got - full).abs().mean() < 0.1 * full.abs().mean()


def test_measured_corrected_planned_saved_and_loaded(
    whole: tuple[nn.Module, Any, Sampling, Any], tmp_path: Path
) -> None:
    network, pipe, run, quantized = whole
    corrected = ptqd.correct(quantized, ptqd.measure(pipe, quantized, run), sampling=run)
    corrected.save_pretrained(tmp_path)
    before = copy.deepcopy(network.state_dict())
    again = ptqd.load(tmp_path, network=network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert fingerprint(again.unet) == fingerprint(corrected.unet)
    assert torch.equal(run_batch(again, run, range(2), "latent"), run_batch(corrected, run, range(2), "latent"))
    with pytest.raises(InputError, match=r"not its code; give the network: ptqd.load\(folder, network=...\)"):
        ptqd.load(tmp_path)
    assert {report.name for report in ptqd.explain(pipe, quantized, run)}


@pytest.mark.engines
def test_an_engine_computes_the_same(whole: tuple[nn.Module, Any, Sampling, Any], tmp_path: Path) -> None:
    _, _, run, quantized = whole
    ptqd.export(quantized, run, "onnxruntime", tmp_path)
    got, want = (run_batch(each, run, range(2), "latent") for each in (ptqd.load(tmp_path), quantized))
    assert (got - want).abs().max() < 0.02 * want.abs().max()  # a code may round the other way


def test_a_full_precision_folder_loads_too(tmp_path: Path) -> None:
    network, pipe, run = made("edm2")
    pipe.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = ptqd.load(tmp_path, network=Edm2Network())
    again.unet.network.freqs.copy_(network.freqs)  # which is not saved
    assert torch.equal(run_batch(again, run, range(2), "latent"), run_batch(pipe, run, range(2), "latent"))


def test_own_layers_become_torchs_where_they_are_alike() -> None:
    network, pipe, _ = made("edm2")
    assert set(pipe.unet.config.folded) == {
        f"network.{name}" for name in ("conv_in", "conv_res", "attn_qkv", "attn_proj", "conv_skip")
    }
    assert dict(pipe.unet.config.left) == {}
    x, t, labels = torch.randn(2, *SHAPE), torch.tensor([0.5, 20.0]), torch.eye(4)[:2]
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, t, class_labels=labels).sample, network(x, t, labels))


class Resampling(nn.Module):
    """A layer of its own that does more than a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.nn.functional.conv2d(x, self.weight, padding=1).tanh()
        return result


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Conv2d(3, 3, 3, padding=1), Resampling()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.own(self.first(x))
        gram = h.flatten(2) @ h.flatten(2).transpose(1, 2)
        result: torch.Tensor = h + gram.mean((1, 2))[:, None, None, None]
        return result


def test_what_cannot_be_quantized_is_named() -> None:
    pipe = from_module(Odd(), DDIMScheduler(), SHAPE)
    run = Sampling(steps=2, samples=4, batch=2)
    skipped = dict(coverage_of(ptqd.quantize(pipe, ptqd.Recipe.from_dict(RECIPE), run)).skipped)
    assert skipped == {
        "network": "a product of two activations that is no attention",
        "network.own": "Resampling does more than one convolution or product by a constant weight",
    }


def test_a_learned_variance_is_for_ddpm() -> None:
    torch.manual_seed(0)
    scheduler = DDPMScheduler(variance_type="learned_range")
    pipe = from_module(GuidedNetwork(), scheduler, SHAPE, conditions={"y": torch.tensor([0])})
    run = Sampling(steps=3, samples=2, batch=2, call={"y": torch.tensor([0, 1])})
    assert torch.isfinite(run_batch(pipe, run, range(2), "latent")).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convention": "x0"}, "convention must be one of timestep, sigma; got 'x0'"),
        ({"convention": "sigma"}, "DDIMScheduler has no sigmas"),
        ({"convention": "sigma", "scheduler": EulerDiscreteScheduler()}, "expects 'epsilon' from the network"),
        ({"conditions": {}}, r"GuidedNetwork cannot be called as network\(x, t\)"),
        ({"shape": (4, 8, 8)}, r"cannot be called as network\(x, t, y=...\) with x \(1, 4, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {"scheduler": DDIMScheduler(), "shape": SHAPE, "conditions": {"y": torch.tensor([0])}, **changes}
    with pytest.raises(InputError, match=message):
        from_module(GuidedNetwork(), **values)


def test_conditions_are_one_a_sample() -> None:
    _, pipe, _ = made("guided")
    with pytest.raises(InputError, match="the network takes 'y'; give a tensor of one entry for each sample"):
        pipe(batch_size=2)
    with pytest.raises(InputError, match="y must have an entry for each of 2 samples; got 3"):
        pipe(batch_size=2, y=torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match="takes no condition 'z'; it was made with: y"):
        pipe(batch_size=2, y=torch.tensor([0, 1]), z=1)
    assert issubclass(UnsupportedError, ptqd.PtqdError)
