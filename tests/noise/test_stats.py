import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from conftest import stats_of
from ptqd import InputError, MismatchError, NoiseStats, Sampling, correct, measure
from ptqd.diffusion import fingerprint, run_batch, with_components
from ptqd.noise import POWERS, MeasuredOn, normality_p_value, paired_moments, per_sample


def pair(n: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    eps = torch.randn(n, channels, 6, 6, generator=g) + 0.3
    delta = 0.07 * eps + 0.05 + 0.1 * torch.rand(eps.shape, generator=g) ** 2
    return eps, eps + delta


def test_regression_agrees_with_scipy_on_stored_tensors() -> None:
    eps, eps_q = pair(20, 1)
    fit = stats_of(eps, eps_q).fit()
    e, d = eps.double().flatten().numpy(), (eps_q.double() - eps.double()).flatten().numpy()
    oracle = scipy_stats.linregress(e, d)
    residual = d - oracle.slope * e - oracle.intercept
    assert fit.k.value.item() == pytest.approx(oracle.slope, rel=1e-9)
    assert fit.bias.value.item() == pytest.approx(oracle.intercept, rel=1e-9)
    assert fit.r2.value.item() == pytest.approx(oracle.rvalue**2, rel=1e-9)
    assert fit.variance.value.item() == pytest.approx(residual.var(), rel=1e-9)
    assert fit.snr.value.item() == pytest.approx((e**2).mean() / (d**2).mean(), rel=1e-9)
    assert fit.skewness.value.item() == pytest.approx(scipy_stats.skew(residual), rel=1e-7)
    assert fit.kurtosis.value.item() == pytest.approx(scipy_stats.kurtosis(residual), rel=1e-7)
    assert fit.normality.item() == pytest.approx(scipy_stats.normaltest(residual).pvalue, rel=1e-6, abs=1e-300)


def test_channels_share_the_slope_and_keep_their_own_bias() -> None:
    eps, _ = pair(30, 3)
    shift = torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1)
    fit = stats_of(eps, eps * 1.05 + shift).fit()
    assert fit.k.value.item() == pytest.approx(0.05, abs=1e-6)
    assert fit.bias.value[0].tolist() == pytest.approx([0, 1, -2], abs=1e-5)
    without = stats_of(eps, eps * 1.05 + shift).fit(slope=False)
    assert without.k.value.item() == 0
    assert without.bias.value[0, 1].item() == pytest.approx(1 + 0.05 * eps[:, 1].mean().item(), abs=1e-5)


@settings(max_examples=15)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_any_split_and_order_gives_the_same_statistics(order: list[int], cut: int) -> None:
    eps, eps_q = pair(6, 2)
    parts = [stats_of(eps[i : i + 1], eps_q[i : i + 1], first=i) for i in order]
    merged = NoiseStats.merge([NoiseStats.merge(parts[:cut]), NoiseStats.merge(parts[cut:])])
    whole = stats_of(eps, eps_q)
    assert torch.equal(merged.indices, whole.indices)
    assert torch.allclose(merged.moments, whole.moments, rtol=1e-12)
    assert torch.allclose(merged.fit().k.high, whole.fit().k.high, rtol=1e-9)
    assert torch.allclose(merged.joint, whole.joint, rtol=1e-12)
    assert torch.allclose(merged.cross, whole.cross, rtol=1e-12)


def test_tokens_have_their_channels_last() -> None:
    eps, eps_q = pair(4, 3)
    tokens, tokens_q = (x.flatten(2).transpose(1, 2) for x in (eps, eps_q))
    assert torch.allclose(paired_moments(tokens, tokens_q), paired_moments(eps, eps_q))


def test_intervals_cover_the_truth_at_their_rate() -> None:
    """Samples with a slope of their own: pixels of one sample are not independent, samples are."""
    g = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(200):
        eps = torch.randn(40, 1, 4, 4, generator=g)
        own = 0.1 + 0.05 * torch.randn(40, 1, 1, 1, generator=g)
        fit = stats_of(eps, eps * (1 + own)).fit()
        covered += int(fit.k.low.item() <= 0.1 <= fit.k.high.item())
    assert 180 <= covered <= 199


def test_degenerate_statistics_are_defined() -> None:
    zero = torch.zeros(3, 2, 4, 4)
    fit = stats_of(zero, zero).fit()
    assert fit.k.value.item() == 0
    assert fit.r2.value.item() == 0
    assert fit.snr.value.item() == math.inf
    eps, _ = pair(3, 2)
    same = stats_of(eps, eps).fit()
    assert same.variance.value.item() == 0
    assert not bool(torch.isnan(same.kurtosis.value).any())
    with pytest.raises(InputError, match="at least two samples"):
        stats_of(zero[:1], zero[:1]).fit()


@pytest.mark.parametrize("n", [20, 500])
def test_normality_agrees_with_scipy(n: int) -> None:
    for seed in range(5):
        x = np.random.default_rng(seed).gamma(3.0, size=n)
        p = normality_p_value(float(scipy_stats.skew(x)), float(scipy_stats.kurtosis(x)), n)
        assert p == pytest.approx(scipy_stats.normaltest(x).pvalue, rel=1e-8)


def test_saved_statistics_load_again(tmp_path: Path) -> None:
    stats = stats_of(*pair(4, 2), measured_on=MeasuredOn(model="a", eta=1.0))
    stats.save(tmp_path / "noise.safetensors")
    again = NoiseStats.load(tmp_path / "noise.safetensors")
    assert torch.equal(again.moments, stats.moments)
    assert again.measured_on == stats.measured_on
    assert again.elements == stats.elements
    assert torch.equal(again.joint, stats.joint)
    assert torch.equal(again.response.state, stats.response.state)
    assert again.response.exact


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "noise.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        NoiseStats.load(path)
    stats_of(*pair(4, 2)).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="no whole safetensors file"):
        NoiseStats.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds no noise statistics"):
        NoiseStats.load(path)


def test_only_statistics_that_belong_together_merge() -> None:
    a = stats_of(*pair(2, 1), measured_on=MeasuredOn(model="a"))
    b = stats_of(*pair(2, 1), first=2, measured_on=MeasuredOn(model="b"))
    with pytest.raises(MismatchError, match="differ in model"):
        NoiseStats.merge([a, b])
    with pytest.raises(MismatchError, match="share samples"):
        NoiseStats.merge([a, a])


def test_powers_are_all_up_to_order_four() -> None:
    assert sorted(POWERS) == sorted((i, j) for i in range(5) for j in range(5) if 1 <= i + j <= 4)


def test_measuring_depends_on_neither_batch_size_nor_split(pipe: Any, qpipe: Any, run: Sampling) -> None:
    run = run.replace(samples=64, steps=2)
    whole = measure(pipe, qpipe, run.replace(batch=64))
    parts = [
        measure(pipe, qpipe, run.replace(samples=20, batch=1)),
        measure(pipe, qpipe, run.replace(batch=7), start=20),
    ]
    merged, fit = NoiseStats.merge(parts), whole.fit()
    assert torch.equal(merged.indices, whole.indices)
    assert torch.allclose(merged.fit().variance.value, fit.variance.value, rtol=0.02)
    assert torch.allclose(merged.fit().snr.value, fit.snr.value, rtol=0.02)
    assert (merged.fit().k.value - fit.k.value).abs().max() < 0.1 * (fit.k.high - fit.k.value).min()
    other = measure(pipe, qpipe, run.replace(batch=64, seed=9)).fit()
    assert (other.variance.value / fit.variance.value - 1).abs().max() > 0.02
    assert whole.measured_on.model == fingerprint(pipe.unet)
    assert whole.measured_on.quantized != whole.measured_on.model
    assert whole.elements == 64


def test_a_full_precision_pipeline_has_no_noise(pipe: Any, run: Sampling) -> None:
    fit = measure(pipe, pipe, run).fit()
    assert bool((fit.variance.value == 0).all())
    assert bool((fit.k.value == 0).all())


def test_nan_outputs_are_named(pipe: Any, run: Sampling) -> None:
    from conftest import tiny_pipeline

    broken = tiny_pipeline()
    broken.unet.conv_out.bias.data[0] = math.nan
    with pytest.raises(InputError, match=r"timestep .* is NaN or infinite"):
        measure(pipe, broken, run)


def test_a_pipeline_that_steps_a_doubled_batch() -> None:
    """DiT steps both halves of a guided batch."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    scaled = copy.deepcopy(transformer)
    scaled.proj_out_2.weight.data *= 1.2
    scaled.proj_out_2.bias.data.mul_(1.2)
    noisy = with_components(pipe, transformer=scaled)
    run = Sampling(steps=3, samples=5, batch=3, call={"class_labels": [1, 2, 3], "guidance_scale": 2.0})
    stats = measure(pipe, noisy, run)
    assert stats.samples == 5
    assert torch.allclose(stats.fit().k.value, torch.tensor(0.2, dtype=torch.float64), atol=1e-4)
    want, plain, corrected = (run_batch(p, run, range(3)) for p in (pipe, noisy, correct(noisy, stats, ("cnc", "bc"))))
    assert np.abs(corrected - want).max() < 0.01 * np.abs(plain - want).max()


def test_rows_that_belong_to_no_sample_are_named() -> None:
    with pytest.raises(InputError, match="steps 5 rows for 3 samples"):
        per_sample(torch.zeros(5, 4, 14), 3)
