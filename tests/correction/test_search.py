"""auto on Gaussian data, where it is known what helps, and statistics carried over to other steps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from gaussian import gaussian_pipeline
from ptqd import (
    CorrectionSearch,
    InputError,
    MismatchError,
    NoiseStats,
    Sampling,
    correct,
    fit_correction,
    load,
    measure,
    sample,
    search_correction,
)
from ptqd.correction import describe, distribution_distance, features
from ptqd.diffusion import run_batch

RUN = Sampling(steps=8, eta=0.0, samples=64, batch=64, seed=3)
NOISE: dict[str, Any] = {"k": 0.1, "bias": (0.05, -0.03), "v": 0.001, "c": 0.1}


def latents(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.cat([batch for _, batch in sample(pipe, run, output="latent")])


@pytest.fixture(scope="module")
def stats() -> NoiseStats:
    return measure(gaussian_pipeline(), gaussian_pipeline(**NOISE), RUN)


@pytest.fixture(scope="module")
def choice(stats: NoiseStats) -> CorrectionSearch:
    return search_correction(gaussian_pipeline(**NOISE), stats, RUN)


def test_what_helps_is_taken_and_helps(choice: CorrectionSearch) -> None:
    assert choice.name != "none"
    assert choice.checked == 64
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(**NOISE)
    want, bad = latents(exact, RUN), latents(noisy, RUN)
    got = latents(correct(noisy, choice.correction), RUN)
    assert ((got - want) ** 2).mean() < 0.2 * ((bad - want) ** 2).mean()
    taken = next(trial for trial in choice.trials if trial.kept)
    assert taken.score < 0.5 * min(trial.score for trial in choice.trials) < 0
    assert taken.ratio < 0.2
    assert len(choice.steps) == 8
    assert all(step.kept != "nothing" and step.gain > step.half_width for step in choice.steps)


def test_a_choice_is_plain_values(choice: CorrectionSearch) -> None:
    again = CorrectionSearch.from_dict(json.loads(json.dumps(choice.to_dict())))
    assert again == choice
    lines = describe(choice.trials)
    assert len(lines) == len(choice.trials)
    assert sum(line.startswith("*") for line in lines) == 1


def test_where_nothing_helps_nothing_is_done() -> None:
    """Nothing was lost, so nothing can be put back."""
    exact = gaussian_pipeline()
    choice = search_correction(exact, measure(exact, exact, RUN), RUN)
    assert choice.name == "none"
    assert choice.steps == ()
    assert [trial.name for trial in choice.trials] == ["none"]
    assert torch.equal(latents(correct(exact, choice.correction), RUN), latents(exact, RUN))


def test_a_correction_that_the_trajectories_refute_is_dropped(stats: NoiseStats) -> None:
    """Statistics that hold step by step, but of samples that end where the uncorrected ones do."""
    noisy = gaussian_pipeline(**{**NOISE, "v": 0.0})
    apart = RUN.with_seed_for("measuring")
    elsewhere = dataclasses.replace(stats, finals=latents(noisy, apart) + 0.01)
    choice = search_correction(gaussian_pipeline(**NOISE), elsewhere, RUN)
    assert choice.name == "none"
    assert [trial.why for trial in choice.trials if trial.kept] == ["nothing is better by a tenth"]
    assert {trial.name for trial in choice.trials} >= {"none", "cnc+bc", "joint", "trajectory"}
    assert all("worse on" in trial.why for trial in choice.trials if not trial.kept)


def test_a_correction_already_there_does_not_count(stats: NoiseStats, choice: CorrectionSearch) -> None:
    noisy = gaussian_pipeline(**NOISE)
    again = search_correction(correct(noisy, choice.correction), stats, RUN)
    assert again.trials[0].error == pytest.approx(choice.trials[0].error, rel=0.1)


def test_another_run_and_too_few_samples_are_refused(stats: NoiseStats) -> None:
    noisy = gaussian_pipeline(**NOISE)
    with pytest.raises(MismatchError, match="measured with another seed"):
        search_correction(noisy, stats, RUN.replace(seed=4))
    with pytest.raises(MismatchError, match="measured with another steps"):
        search_correction(noisy, stats, RUN.replace(steps=9))
    few = measure(gaussian_pipeline(), noisy, RUN.replace(samples=4))
    with pytest.raises(InputError, match="to check against are too few; measure at least 8"):
        search_correction(noisy, few, RUN)


def test_smoothing_shows_as_lost_energy() -> None:
    g = torch.Generator().manual_seed(0)
    wanted = torch.randn(40, 3, 8, 8, generator=g)
    smooth = torch.nn.functional.avg_pool2d(wanted, 3, 1, 1)
    noisy = wanted + 0.3 * torch.randn(wanted.shape, generator=g)
    astray = wanted.clone()
    astray[7] *= 30
    ours = features(wanted, 1, wanted)
    shifts = [features(x, 1, wanted) - ours for x in (wanted, smooth, noisy, astray)]
    same, lost, gained, one = map(distribution_distance, shifts)
    assert same == 0
    assert lost > gained > 0.005
    assert one < gained
    tokens = wanted.flatten(2).transpose(1, 2)
    assert features(tokens, 2, tokens).shape == (40, 6)
    assert distribution_distance(features(0.9 * tokens, 2, tokens) - features(tokens, 2, tokens)) > 0.01


def test_closed_loop_statistics_are_of_the_corrected_trajectory(stats: NoiseStats) -> None:
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(**NOISE)
    closed = measure(exact, correct(noisy, stats, ("joint",)), RUN, closed_loop=True)
    shifted = correct(noisy, stats, ("stepbaq",))
    with pytest.raises(InputError, match="correct without stepbaq"):
        measure(exact, shifted, RUN, closed_loop=True)
    assert closed.measured_on.closed_loop
    assert len(closed.finals) == 0
    fit, opened = closed.fit(), stats.fit()
    assert torch.allclose(fit.bias.value, opened.bias.value, atol=0.05)  # the raw outputs' noise, not the corrected
    got, want = latents(correct(noisy, closed, ("joint",)), RUN), latents(exact, RUN)
    assert ((got - want) ** 2).mean() < 0.2 * ((latents(noisy, RUN) - want) ** 2).mean()


@pytest.mark.parametrize("scheduler", ["ddim", "euler ancestral", "sde-dpmsolver++ 2"])
def test_statistics_of_other_steps_are_interpolated_and_flagged(
    scheduler: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured at 25 steps, applied at 12: nearly what measuring at 12 gives."""
    exact, noisy = gaussian_pipeline(scheduler), gaussian_pipeline(scheduler, **NOISE)
    eta = 1.0 if scheduler == "ddim" else 0.0
    many = measure(exact, noisy, Sampling(steps=25, eta=eta, samples=64, batch=64))
    run = Sampling(steps=12, eta=eta, samples=64, batch=64, seed=5)
    with caplog.at_level("WARNING"):
        carried = correct(noisy, many, ("joint", "vsc"), steps=12)
    assert "statistics of 25 steps are applied at 12, interpolated over log-SNR" in caplog.text
    assert carried.scheduler.correction.measured_on.interpolated_from == 25
    want, bad, got = (latents(p, run) for p in (exact, noisy, carried))
    assert ((got - want) ** 2).mean() < 0.15 * ((bad - want) ** 2).mean()
    assert correct(noisy, many, ("cnc", "bc", "vsc"), steps=25).scheduler.correction == fit_correction(many)
    with pytest.raises(MismatchError, match=r"carry the statistics over: ptqd\.correct\(\.\.\., steps=12\)"):
        latents(correct(noisy, many, ("cnc", "bc", "vsc")), run)


def test_statistics_are_carried_over_only_within_a_schedule(stats: NoiseStats) -> None:
    ddpm = DDPMScheduler.from_config(gaussian_pipeline().scheduler.config)
    ddpm.set_timesteps(5)
    with pytest.raises(MismatchError, match="another scheduler"):
        stats.at(ddpm)
    noisy = gaussian_pipeline(**NOISE)
    with pytest.raises(InputError, match="the noise schedule of DDIMScheduler is not known; measure these steps"):
        correct(noisy, dataclasses.replace(stats, levels=None), ("cnc", "bc", "vsc"), steps=5)


def test_carried_over_statistics_take_as_much_noise_away_as_measured_ones() -> None:
    exact, noisy = gaussian_pipeline("ddpm"), gaussian_pipeline("ddpm", v=0.02)
    many, few = (measure(exact, noisy, Sampling(steps=n, samples=64, batch=64)) for n in (50, 10))
    scheduler = DDPMScheduler.from_config(noisy.scheduler.config)
    scheduler.set_timesteps(10)
    carried = many.at(scheduler)
    assert carried.attenuation().min() > 0.99
    want = torch.tensor(fit_correction(few, ("cnc", "bc", "vsc")).noise)
    got = torch.tensor(fit_correction(carried, ("cnc", "bc", "vsc")).noise)
    assert torch.allclose(got, want, atol=0.02)
    assert want.min() < 0.9


def test_statistics_of_a_schedule_that_the_call_sets_are_not_carried_over(stats: NoiseStats) -> None:
    noisy = gaussian_pipeline(**NOISE)
    own = dataclasses.replace(stats, timesteps=stats.timesteps - 3)
    with pytest.raises(InputError, match="takes a schedule of its own, that of 5 steps is not known"):
        correct(noisy, own, ["bc"], steps=5)
    assert correct(noisy, stats, ["bc"], steps=8).scheduler.correction == fit_correction(stats, ["bc"])


def test_samples_that_are_not_finite_are_never_chosen(stats: NoiseStats, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptqd.diffusion.in_step import run_in_step as plain

    def overflow(pipe: Any, run: Any, batches: Any, decide: Any) -> list[torch.Tensor]:
        ends = plain(pipe, run, batches, decide)
        ends[-1][-1] = float("nan")  # of the last candidate, joint where all run
        return ends

    calls = [overflow]

    def first_overflows(*args: Any) -> list[torch.Tensor]:
        run: Any = calls.pop() if calls else plain
        return list(run(*args))

    monkeypatch.setattr("ptqd.correction.search.run_in_step", first_overflows)
    choice = search_correction(gaussian_pipeline(**NOISE), stats, RUN)
    assert [trial.name for trial in choice.trials][:3] == ["trajectory", "none", "cnc+bc"]
    assert all("joint" not in trial.name for trial in choice.trials)
    monkeypatch.setattr("ptqd.correction.trajectory.run_in_step", overflow)
    monkeypatch.setattr("ptqd.correction.search.run_in_step", plain)
    assert "trajectory" not in [t.name for t in search_correction(gaussian_pipeline(**NOISE), stats, RUN).trials]
    monkeypatch.setattr("ptqd.correction.search.run_in_step", lambda *a: [part * float("nan") for part in plain(*a)])
    with pytest.raises(InputError, match="the quantized pipeline's samples hold NaN"):
        search_correction(gaussian_pipeline(**NOISE), stats, RUN)
    with pytest.raises(InputError, match="the full-precision samples hold NaN"):
        search_correction(
            gaussian_pipeline(**NOISE), dataclasses.replace(stats, finals=stats.finals * float("inf")), RUN
        )


def test_what_cannot_be_repeated_cannot_be_checked(stats: NoiseStats) -> None:
    run = RUN.replace(eta=1.0)
    drawing = measure(gaussian_pipeline(), gaussian_pipeline(**NOISE), run)
    unseeded = dataclasses.replace(drawing, measured_on=dataclasses.replace(drawing.measured_on, repeatable=False))
    with pytest.raises(InputError, match="takes no generator"):
        search_correction(gaussian_pipeline(**NOISE), unseeded, run)
    with pytest.raises(MismatchError, match="measured with other arguments of the call"):
        search_correction(gaussian_pipeline(**NOISE), stats, RUN.replace(call={"colour": "red"}))


def test_closed_loop_statistics_do_not_take_the_correction_for_clipping(stats: NoiseStats) -> None:
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(**NOISE)
    closed = measure(exact, correct(noisy, stats, ("cnc", "bc")), RUN, closed_loop=True)
    assert closed.attenuation().min() > 0.999
    assert closed.measured_on.corrected == ("cnc", "bc")


def test_another_guidance_scale_is_refused(pipe: Any, qpipe: Any, run: Sampling, tmp_path: Path) -> None:
    corrected = correct(qpipe, measure(pipe, qpipe, run), ("cnc", "bc", "vsc"))
    call = {"class_labels": [1], "num_inference_steps": run.steps, "eta": run.eta, "output_type": "latent"}
    assert corrected(**call, guidance_scale=2.0).images.shape == (1, 4, 8, 8)
    with pytest.raises(MismatchError, match="measured at guidance scale 2, the pipeline runs at 3"):
        corrected(**call, guidance_scale=3.0)
    corrected.save_pretrained(tmp_path)
    again = load(tmp_path)
    with pytest.raises(MismatchError, match="measured at guidance scale 2, the pipeline runs at 3"):
        again(**call, guidance_scale=3.0)
    with pytest.raises(MismatchError, match="measured at guidance scale 2, the pipeline runs at 3"):
        run_batch(again, run.replace(call={"class_labels": [1], "guidance_scale": 3.0}), range(1))


@pytest.mark.parametrize("samples", [24, 64])
def test_where_no_correction_is_best_it_is_judged_on_its_own_samples(samples: int) -> None:
    """Ends that are those of the uncorrected samples: none wins, on as many samples as it ran."""
    run = RUN.replace(samples=samples, batch=20)
    noisy = gaussian_pipeline(**{**NOISE, "v": 0.0})
    stats = measure(gaussian_pipeline(), noisy, run)
    ends = latents(noisy, run.with_seed_for("measuring")) + 0.01
    choice = search_correction(noisy, dataclasses.replace(stats, finals=ends.float()), run)
    assert choice.name == "none"
    assert choice.checked <= samples
    none = next(trial for trial in choice.trials if trial.name == "none")
    assert none.error == pytest.approx(1e-4, rel=0.05)


def test_few_kept_trajectories_are_enough_for_a_search(stats: NoiseStats) -> None:
    """Of large samples fewer trajectories are kept than ends."""
    few = dataclasses.replace(stats, paths=stats.paths[:9])
    choice = search_correction(gaussian_pipeline(**NOISE), few, RUN)
    assert choice.name != "none"
    assert next(trial for trial in choice.trials if trial.name == "trajectory").samples == 9


def test_a_leader_that_runs_away_later_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trajectories a map leads; on the further samples the best two are NaN, and the next best is taken."""
    from ptqd.diffusion.in_step import run_in_step as plain

    noisy = gaussian_pipeline(std=(0.25, 1.6), **NOISE)
    stats = measure(gaussian_pipeline(std=(0.25, 1.6)), noisy, RUN)
    stats = dataclasses.replace(stats, paths=stats.paths[:0])
    calls = [0]

    def overflow(pipe: Any, run: Any, batches: Any, decide: Any) -> list[torch.Tensor]:
        calls[0] += 1
        ends = plain(pipe, run, batches, decide)
        return ends if calls[0] == 1 else [part * float("nan") for part in ends]

    monkeypatch.setattr("ptqd.correction.search.run_in_step", overflow)
    monkeypatch.setattr("ptqd.correction.search._Search._variances", lambda self: ())
    choice = search_correction(noisy, stats, RUN)
    assert calls[0] == 2
    assert len(choice.trials) > 1
    assert bool(torch.isfinite(latents(correct(noisy, choice), RUN)).all())


def test_what_is_far_behind_runs_fewer_samples(stats: NoiseStats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond doubt, in distance and score; no correction, which the others are held against, runs them all."""
    search = search_correction(gaussian_pipeline(**NOISE), stats, RUN)
    ran = {trial.name: trial.samples for trial in search.trials}
    assert ran["none"] == 16
    assert set(ran.values()) <= {8, 16, 32, len(stats.paths)}
    monkeypatch.setattr("ptqd.correction.search.QUICK", 16)
    whole = search_correction(gaussian_pipeline(**NOISE), stats, RUN)
    assert whole.name == search.name
    assert all(trial.samples >= 16 for trial in whole.trials)
    for trial in search.trials:
        if trial.samples == 8:
            other = next(t for t in whole.trials if t.name == trial.name)
            assert other.why.startswith("worse")
