"""Every kind of pipeline: what is recorded, measured and corrected there."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from conftest import quick_recipe
from ptqd import MismatchError, NoiseStats, Recipe, Sampling, correct, load, measure, quantize, search_correction
from ptqd.diffusion import denoiser_name, record, replay, run_batch, with_components
from ptqd.noise import POWERS
from tiny import CASES, PROMPTS, Case

SETTINGS = [
    (name, guided) for name, case in CASES.items() for guided in (False, True)[: 1 + (case.guidance is not None)]
]
QUICK = ("latent-class", "sd1", "dit", "flux", "wan")  # of which the quick tests run guidance too
HEAVY = ("stable-video", "text-to-video")
each_setting = pytest.mark.parametrize(
    ("name", "guided"),
    [
        pytest.param(
            *(name, guided),
            id=f"{name}-guided" if guided else name,
            marks=[pytest.mark.slow] if name in HEAVY or (guided and name not in QUICK) else [],
        )
        for name, guided in SETTINGS
    ],
)


@functools.cache
def pipeline(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name].build()


def setting(name: str, guided: bool) -> Sampling:
    case: Case = CASES[name]
    call = {**case.call, **((case.guidance or {}) if guided else {})}
    return Sampling(steps=case.steps, eta=case.eta, samples=4, batch=2, call=call)


@functools.cache
def quantized(name: str) -> Any:
    pipe = pipeline(name)
    layers = {n for n, m in getattr(pipe, denoiser_name(pipe)).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    rules = [rule for rule in Recipe.parse("w4a8").to_dict()["rules"] if rule["match"] in layers]
    return quantize(pipe, quick_recipe("w4a8", rules=rules), setting(name, guided=CASES[name].guidance is not None))


@functools.cache
def statistics(name: str, guided: bool) -> NoiseStats:
    return measure(pipeline(name), quantized(name), setting(name, guided))


def samples(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, run, range(2), "latent"))


@each_setting
def test_replayed_on_itself_a_pipeline_gives_what_was_recorded(name: str, guided: bool) -> None:
    pipe, run = pipeline(name), setting(name, guided)
    want = samples(pipe, run)
    with record(pipe) as trajectory:
        assert torch.equal(samples(pipe, run), want)
    with replay(pipe, trajectory) as answer:
        assert torch.equal(samples(pipe, run), want)
    assert len(answer.outputs) == 3
    for a, b in zip(answer.outputs, trajectory.outputs, strict=True):
        assert torch.equal(a, b)


@each_setting
def test_every_step_and_channel_is_measured(name: str, guided: bool) -> None:
    stats = statistics(name, guided)
    assert stats.moments.shape == (4, 3, CASES[name].channels, len(POWERS))
    assert stats.response.exact
    fit = stats.fit()
    for estimate in (fit.k, fit.bias, fit.variance, fit.r2, fit.snr, fit.skewness, fit.kurtosis):
        assert bool(torch.isfinite(torch.stack([estimate.value, estimate.low, estimate.high])).all())
    assert bool((fit.variance.value > 0).all())


@each_setting
def test_a_samples_moments_do_not_depend_on_the_batch(name: str, guided: bool) -> None:
    """Whether a step's rows are samples, their copies, or their frames."""
    stats = statistics(name, guided)
    run = setting(name, guided)
    alone = measure(pipeline(name), quantized(name), run.replace(batch=1, samples=2))
    outputs = [POWERS.index((i, 0)) for i in (1, 2)]  # of the full-precision output alone
    a, b = stats.moments[:2, ..., outputs], alone.moments[..., outputs]
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(a, b.flip(0), rtol=1e-3, atol=1e-4)


@each_setting
def test_a_correction_changes_the_samples_and_an_empty_one_does_not(name: str, guided: bool) -> None:
    qpipe, run, stats = quantized(name), setting(name, guided), statistics(name, guided)
    plain = samples(qpipe, run)
    assert not torch.equal(plain, samples(pipeline(name), run))
    assert not torch.equal(samples(correct(qpipe, stats, ("cnc", "bc")), run), plain)
    assert torch.equal(samples(correct(qpipe, stats, ()), run), plain)


def scaled_and_shifted(name: str) -> Any:
    """The pipeline with a denoiser that answers 1.2 eps + 0.1, its learned variance as it was."""
    pipe, channels = pipeline(name), CASES[name].channels

    def change(module: nn.Module, inputs: Any, output: Any) -> Any:
        eps = output[0]
        changed = 1.2 * eps + 0.1
        if eps.shape[1] == 2 * channels:
            changed = torch.cat([changed[:, :channels], eps[:, channels:]], dim=1)
        return (changed,) if isinstance(output, tuple) else type(output)(sample=changed)

    denoiser = copy.deepcopy(getattr(pipe, denoiser_name(pipe)))
    denoiser.register_forward_hook(change)
    return with_components(pipe, **{denoiser_name(pipe): denoiser})


@each_setting
def test_a_scaled_and_shifted_denoiser_is_put_right(name: str, guided: bool) -> None:
    """With k and b divided out the samples are the full-precision ones again."""
    pipe, noisy, run = pipeline(name), scaled_and_shifted(name), setting(name, guided)
    stats = measure(pipe, noisy, run)
    assert torch.allclose(stats.fit().k.value, torch.tensor(0.2, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(stats.fit().bias.value, torch.tensor(0.1, dtype=torch.float64), atol=1e-3)
    want, plain, corrected = (samples(p, run) for p in (pipe, noisy, correct(noisy, stats, ("cnc", "bc"))))
    assert (corrected - want).abs().max() < 1e-3 * (plain - want).abs().max()


@pytest.mark.parametrize("name", ["sd1", "flux", "cogvideox", "ltx", "stable-audio"])
def test_the_joint_estimate_finds_the_channels_too(name: str) -> None:
    pipe, noisy, run = pipeline(name), scaled_and_shifted(name), setting(name, guided=True).replace(samples=8, batch=4)
    want, plain, corrected = (
        samples(p, run) for p in (pipe, noisy, correct(noisy, measure(pipe, noisy, run), ("joint",)))
    )
    assert (corrected - want).abs().max() < 5e-2 * (plain - want).abs().max()


@pytest.mark.parametrize("name", ["sd-img2img", "sd-inpaint"])
def test_a_correction_for_the_end_of_a_schedule_serves_shorter_ends_alone(name: str) -> None:
    run, stats = setting(name, guided=True), statistics(name, guided=True)
    assert stats.timesteps.tolist() == [401, 201, 1]
    qpipe, corrected = quantized(name), correct(quantized(name), stats, ("cnc", "bc"))
    shorter = run.replace(call={**run.call, "strength": 0.4})
    assert not torch.equal(samples(corrected, shorter), samples(qpipe, shorter))
    with pytest.raises(MismatchError, match="knows no step at timestep 601"):
        samples(corrected, run.replace(call={**run.call, "strength": 0.8}))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in CASES]
)
def test_a_corrected_pipeline_is_the_same_after_loading(name: str, tmp_path: Path) -> None:
    guided = CASES[name].guidance is not None
    run = setting(name, guided)
    corrected = correct(quantized(name), statistics(name, guided), ("cnc", "bc"))
    corrected.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is type(corrected)
    assert torch.equal(samples(again, run), samples(corrected, run))


@pytest.mark.parametrize("name", ["sdxl", "sd-img2img"])
def test_statistics_of_calls_with_tuples_and_pictures_merge_after_loading(name: str, tmp_path: Path) -> None:
    pipe, qpipe, run = pipeline(name), quantized(name), setting(name, guided=True)
    measure(pipe, qpipe, run.replace(samples=2)).save(tmp_path / "first.safetensors")
    first, second = NoiseStats.load(tmp_path / "first.safetensors"), measure(pipe, qpipe, run, start=2)
    merged = NoiseStats.merge([first, second])
    assert torch.equal(merged.moments, statistics(name, guided=True).moments)


def test_noise_is_seeded_where_a_pipeline_hands_its_scheduler_no_generator() -> None:
    dit, run = pipeline("dit"), setting("dit", guided=True)
    pipe = with_components(dit, scheduler=DDPMScheduler.from_config(dit.scheduler.config))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = samples(pipe, run)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(samples(pipe, run), first)
    assert not torch.equal(samples(pipe, run.replace(seed=1)), first)


@pytest.mark.parametrize("name", ["flux", "cogvideox", "wan", "stable-audio"])
def test_pipelines_in_half_precision_are_corrected_and_loaded(name: str, tmp_path: Path) -> None:
    run = setting(name, guided=True)
    pipeline(name).save_pretrained(tmp_path / "full")
    quantized(name).save_pretrained(tmp_path / "quantized")
    pipe, qpipe = (load(tmp_path / folder, dtype=torch.bfloat16) for folder in ("full", "quantized"))
    stats = measure(pipe, qpipe, run)
    corrected = correct(qpipe, stats, ("cnc", "bc"))
    want = samples(corrected, run)
    assert bool(torch.isfinite(want).all())
    assert bool(torch.isfinite(samples(correct(qpipe, stats, ("joint",)), run)).all())
    assert not torch.equal(want, samples(qpipe, run))
    corrected.save_pretrained(tmp_path / "corrected")
    assert torch.equal(samples(load(tmp_path / "corrected", dtype=torch.bfloat16), run), want)


def test_every_prompt_makes_samples_of_its_own() -> None:
    run = setting("sd1", guided=True)
    first, other = (samples(pipeline("sd1"), run.replace(call={**run.call, "prompt": [p]})) for p in PROMPTS[:2])
    assert bool(((first - other).abs().amax(dim=(1, 2, 3)) > 1e-6).all())
    both = samples(pipeline("sd1"), run)
    assert torch.allclose(both[0], first[0], atol=1e-5)
    assert torch.allclose(both[1], other[1], atol=1e-5)


@pytest.mark.parametrize(
    "name", ["sd1", "sd-img2img", "dit", "flux", pytest.param("text-to-video", marks=pytest.mark.slow), "stable-audio"]
)
def test_auto_checks_whole_trajectories_of_any_pipeline(name: str) -> None:
    """A denoiser that answers 1.2 eps + 0.1: that is found, and the ends it is checked against are whole samples."""
    pipe, bad = pipeline(name), scaled_and_shifted(name)
    run = setting(name, guided=False).replace(samples=16, batch=8)
    stats = measure(pipe, bad, run)
    assert len(stats.finals) == len(stats.paths) == 16
    assert stats.finals[0].numel() == stats.elements * CASES[name].channels
    choice = search_correction(bad, stats, run)
    assert choice.name != "none"
    assert min(trial.ratio for trial in choice.trials) < 0.05
