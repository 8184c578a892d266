"""The correction that is fitted along the trajectory, where it is known what it must reach."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from gaussian import gaussian_pipeline
from ptqd import InputError, MismatchError, NoiseStats, Sampling, correct, fit_correction, load, measure, sample
from ptqd.correction import fit_trajectory
from ptqd.correction.correction import Correction
from ptqd.correction.search import CorrectionSearch, fit_along_runs
from ptqd.diffusion import final_samples
from ptqd.diffusion.in_step import run_in_step
from ptqd.noise.second_moments import neighbours
from ptqd.paused import PausedThread

RUN = Sampling(steps=8, eta=0.0, samples=64, batch=64, seed=3)
STD = (0.25, 1.6)
NOISE: dict[str, Any] = {"k": 0.1, "bias": (0.05, -0.03), "v": 0.001, "c": 0.1}
SCHEDULERS = [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("euler ancestral", 0.0), ("sde-dpmsolver++ 2", 0.0)]


def edges(x: torch.Tensor) -> torch.Tensor:
    return x - torch.stack(neighbours(x)).mean(0)


def latents(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.cat([batch for _, batch in sample(pipe, run, output="latent")]).double()


def pair(scheduler: str = "ddim", **noise: Any) -> tuple[Any, Any]:
    return gaussian_pipeline(scheduler, std=STD), gaussian_pipeline(scheduler, std=STD, **noise)


@pytest.fixture(scope="module")
def stats() -> NoiseStats:
    exact, noisy = pair(**NOISE)
    return measure(exact, noisy, RUN)


@pytest.mark.parametrize(("scheduler", "eta"), SCHEDULERS)
def test_it_takes_away_what_is_linear(scheduler: str, eta: float) -> None:
    """Noise that is linear in what a step knows leaves nothing, whatever the scheduler draws or remembers."""
    exact, noisy = pair(scheduler, k=0.1, bias=(0.05, -0.03), c=0.1)
    run = RUN.replace(eta=eta)
    fit = fit_trajectory(noisy, measure(exact, noisy, run), run)
    want, bad, got = (latents(pipe, run) for pipe in (exact, noisy, correct(noisy, fit.correction)))
    assert ((got - want) ** 2).mean() < 1e-3 * ((bad - want) ** 2).mean()
    assert all(step.gain > 0.99 for step in fit.steps)


@pytest.mark.parametrize(("scheduler", "eta"), SCHEDULERS)
def test_it_is_nearer_than_the_named_methods_and_keeps_the_energy(scheduler: str, eta: float) -> None:
    """With a residual too: nearer than the paper's correction and ours from statistics, and no smoother."""
    exact, noisy = pair(scheduler, k=0.1, bias=(0.05, -0.03), v=0.01, c=0.1)
    run = RUN.replace(eta=eta)
    stats = measure(exact, noisy, run)
    fit = fit_trajectory(noisy, stats, run)
    test = run.replace(samples=200, batch=200)
    want, got = latents(exact, test), latents(correct(noisy, fit.correction), test)
    error = ((got - want) ** 2).mean()
    for methods in (("cnc", "bc"), ("joint",)):
        assert error < 1.02 * ((latents(correct(noisy, stats, methods), test) - want) ** 2).mean()
    assert torch.allclose(got.std((0, 2, 3)), want.std((0, 2, 3)), rtol=0.05)


@pytest.mark.parametrize(("scheduler", "eta"), SCHEDULERS)
def test_energy_is_given_back_to_the_whole_and_to_edges(scheduler: str, eta: float) -> None:
    """Outputs that are blurred, not shorter: on top of no estimate at all, the energy of both is right."""
    exact, noisy = (gaussian_pipeline(scheduler, std=(1.0, 1.6)) for _ in range(2))

    def dull(module: Any, args: Any, output: Any) -> Any:
        return output + 0.04 * (output - edges(output))

    noisy.unet.register_forward_hook(dull)
    run = RUN.replace(eta=eta)
    corrected = correct(noisy, measure(exact, noisy, run), "energy", sampling=run)
    assert corrected.scheduler.correction.methods == ("energy",)
    test = run.replace(samples=400, batch=200, seed=5)
    want, bad, got = (latents(pipe, test) for pipe in (exact, noisy, corrected))
    for part in (lambda x: x - x.mean((0, 2, 3), keepdim=True), edges):
        full, without, within = (part(x).square().mean((0, 2, 3)).log() for x in (want, bad, got))
        assert ((within - full).abs() < 0.25 * (without - full).abs() + 0.01).all()


def test_energy_is_on_top_of_named_methods(stats: NoiseStats) -> None:
    """The estimate is theirs, at every step but for the factors; which every channel's map shows."""
    exact, noisy = pair(**NOISE)
    plain = fit_correction(stats, ("cnc", "bc"))
    choice = fit_along_runs(noisy, stats, RUN, ("cnc", "bc", "energy"))
    assert choice.correction.methods == ("cnc", "bc", "energy")
    assert choice.steps[0].kept == "cnc+bc"
    assert CorrectionSearch.from_dict(json.loads(json.dumps(choice.to_dict()))).correction == choice.correction
    test = RUN.replace(samples=200, batch=200, seed=5)
    want, base, got = (latents(p, test) for p in (exact, correct(noisy, plain), correct(noisy, choice)))
    assert ((got - want) ** 2).mean() < 1.1 * ((base - want) ** 2).mean()
    with pytest.raises(InputError, match="vsc and energy both answer for the residual's variance"):
        correct(noisy, stats, ("cnc", "vsc", "energy"), sampling=RUN)
    with pytest.raises(InputError, match="energy is fitted along runs"):
        fit_correction(stats, ("cnc", "energy"))


def test_the_groups_ends_are_a_fair_trial(stats: NoiseStats) -> None:
    """What samples that were not fitted on came to is what other seeds come to."""
    exact, noisy = pair(**NOISE)
    fit = fit_trajectory(noisy, stats, RUN)
    other = RUN.replace(seed=11, samples=200, batch=200)
    fresh = ((latents(correct(noisy, fit.correction), other) - latents(exact, other)) ** 2).mean()
    held_out = ((fit.finals.double() - stats.finals.double()) ** 2).mean()
    assert fit.samples == tuple(range(64))
    assert float(held_out) == pytest.approx(float(fresh), rel=0.3)


def test_noise_without_structure_is_left_alone() -> None:
    """Nothing can be said of fresh noise; the estimates of 64 samples do no harm."""
    exact, noisy = pair(v=0.01)
    stats = measure(exact, noisy, RUN)
    fit = fit_trajectory(noisy, stats, RUN)
    want, bad, got = (latents(p, RUN) for p in (exact, noisy, correct(noisy, fit.correction)))
    assert ((got - want) ** 2).mean() < 1.03 * ((bad - want) ** 2).mean()


def test_batches_do_not_matter(stats: NoiseStats) -> None:
    """Noise that the network draws depends on the batch; without it the fit is the same in batches of 64 and of 20."""
    noise = {"k": 0.1, "c": 0.1}
    exact, noisy = pair("euler ancestral", **noise)
    drawn = measure(exact, noisy, RUN)
    whole, parts = (fit_trajectory(noisy, drawn, RUN, batch=n) for n in (64, 20))
    assert torch.allclose(whole.finals, parts.finals, atol=1e-4)
    alike = [a.kept == b.kept for a, b in zip(whole.steps, parts.steps, strict=True)]
    assert sum(alike) >= len(alike) - 1  # where two choices leave no error, rounding chooses
    for name in ("output", "sample", "bias"):
        a, b = (torch.tensor(getattr(fit.correction, name))[alike] for fit in (whole, parts))
        assert torch.allclose(a, b, atol=1e-3)


def test_the_fit_is_plain_numbers_and_saves(stats: NoiseStats, tmp_path: Any) -> None:
    _, noisy = pair(**NOISE)
    corrected = correct(noisy, stats, "trajectory", sampling=RUN)
    correction = corrected.scheduler.correction
    assert correction.methods == ("trajectory",)
    assert Correction.from_dict(json.loads(json.dumps(correction.to_dict()))) == correction
    path = tmp_path / "noise.safetensors"
    stats.save(path)
    again = NoiseStats.load(path)
    assert torch.equal(again.paths, stats.paths)
    assert again.paths.shape == (64, 8, 1, 2, 4, 4)


def test_what_it_needs_is_said(stats: NoiseStats) -> None:
    _, noisy = pair(**NOISE)
    with pytest.raises(InputError, match=r"'trajectory' runs whole trajectories; give sampling="):
        correct(noisy, stats, "trajectory")
    with pytest.raises(InputError, match="fitted along runs, not from statistics alone"):
        fit_correction(stats, ("trajectory",))
    with pytest.raises(InputError, match="trajectory answers for the whole of a step, vsc too; give it alone"):
        correct(noisy, stats, ("trajectory", "vsc"))
    with pytest.raises(InputError, match="hold full-precision trajectories of 3 samples, and 8 are needed"):
        fit_trajectory(noisy, dataclasses.replace(stats, paths=stats.paths[:3]), RUN)
    with pytest.raises(MismatchError, match="another seed"):
        fit_trajectory(noisy, stats, RUN.replace(seed=4))
    unknown = dataclasses.replace(stats, response=dataclasses.replace(stats.response, exact=False))
    with pytest.raises(InputError, match="how DDIMScheduler steps is not known"):
        fit_trajectory(noisy, unknown, RUN)


def test_a_run_in_step_is_the_run_itself() -> None:
    """Batches that wait for each other draw what they draw alone, also where nobody hands them a generator."""
    exact, _ = pair("euler ancestral")
    batches = [[0, 1, 2], [3, 4], [5]]
    seen: list[int] = []

    def keep(step: int, arrivals: Any) -> list[torch.Tensor]:
        seen.append(step)
        for arrival in arrivals:
            once, again = (arrival.stepped(arrival.output) for _ in range(2))
            assert torch.equal(once, again)  # no noise was used up
        return [arrival.output for arrival in arrivals]

    state = torch.get_rng_state()
    ends = run_in_step(exact, RUN, batches, keep)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == list(range(8))
    for batch, rows in zip(batches, ends, strict=True):
        assert torch.equal(rows, final_samples(exact, RUN, batch))


def test_modes_hold_in_a_paused_thread() -> None:
    """What holds where it was made holds inside: autocast, inference, threads; and random numbers are its own."""
    found: list[Any] = []

    def look() -> None:
        found.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()))
        found.append(torch.rand(1))

    torch.manual_seed(5)
    with torch.no_grad(), torch.autocast("cpu"):
        thread = PausedThread(look)
    torch.rand(3)
    thread.advance()
    torch.manual_seed(5)
    assert found == [(False, True, torch.get_num_threads()), torch.rand(1)]


def test_statistics_of_an_earlier_version_merge(stats: NoiseStats) -> None:
    """They hold no trajectories and no bands; what is merged has those that are complete."""
    exact, noisy = pair(**NOISE)
    more = measure(exact, noisy, RUN.replace(samples=80), start=64)
    old = dataclasses.replace(more, paths=more.finals[:0], bands=None)
    merged = NoiseStats.merge([stats, old])
    assert merged.samples == 80
    assert torch.equal(merged.paths, stats.paths)
    assert merged.bands is None
    assert len(NoiseStats.merge([dataclasses.replace(stats, paths=stats.finals[:0]), more]).paths) == 0


def test_half_precision_is_no_clipping() -> None:
    """The rounding of half-precision samples moves them by more than noise of 0.3 %, and is not what a step clips."""
    exact, noisy = pair(k=0.003)
    exact.dtype_of_samples = noisy.dtype_of_samples = torch.float16
    run = RUN.replace(steps=50)
    stats = measure(exact, noisy, run)
    assert stats.paths.dtype == torch.float16
    off = (stats.moved / stats.unclipped() - 1).abs()
    assert int((off > 0.02).sum()) > 10  # what was taken for clipping
    assert not bool(stats.clips().any())
    assert fit_trajectory(noisy, stats, run).correction.methods == ("trajectory",)


def test_a_scheduler_that_clips_is_known_to() -> None:
    """Data of which half is beyond -1 and 1, clipped on its way: the steps differ from the linear response."""
    pipes = [gaussian_pipeline(std=(1.6, 1.6), k=k) for k in (0.0, 0.1)]
    for pipe in pipes:
        pipe.register_modules(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=True))
    stats = measure(pipes[0], pipes[1], RUN)
    assert stats.clips().sum() >= 6
    fit = fit_trajectory(pipes[1], stats, RUN)
    assert not any("ridge" in step.kept for step, clips in zip(fit.steps, stats.clips(), strict=True) if clips)


def test_an_error_in_one_batch_ends_all() -> None:
    exact, _ = pair()

    def fail(step: int, arrivals: Any) -> list[torch.Tensor]:
        if step == 3:
            raise ValueError("no")
        return [arrival.output for arrival in arrivals]

    with pytest.raises(ValueError, match="no"):
        run_in_step(exact, RUN, [[0], [1]], fail)


@pytest.mark.slow
def test_on_a_trained_model_with_a_plan(tmp_path: Any) -> None:
    """W4 with 4 and 8 bits by step, saved and loaded: nearer than no correction, on other seeds."""
    import ptqd

    pipe = load("fashion-ldm")
    run = Sampling(6, 0.0, 32, 16, 0, {"class_labels": list(range(10)), "guidance_scale": 1.5})
    wide = ptqd.quantize(pipe, "w4a4+8", run)
    rule = ptqd.paper_plan(ptqd.measure_widths(pipe, wide, run.replace(samples=8)))
    planned = ptqd.apply_plan(wide, rule.replace(bits=((4,), (8,)) * 3))
    fit = fit_trajectory(planned, measure(pipe, planned, run), run)
    test = run.replace(seed=9)
    want = latents(pipe, test)
    corrected = correct(planned, fit.correction)
    corrected.save_pretrained(tmp_path)
    got, bad = latents(load(tmp_path), test), latents(planned, test)
    assert ((got - want) ** 2).mean() < 0.7 * ((bad - want) ** 2).mean()
