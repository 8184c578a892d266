import copy
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)
from torch import nn

from ptqd import InputError, LatentClassPipeline, MismatchError, Sampling, correct, measure
from ptqd.diffusion import find_channel_axis, record, replay, run_batch, with_components


def test_recording_changes_nothing(pipe: Any, run: Sampling) -> None:
    want = run_batch(pipe, run, range(3), "latent")
    with record(pipe) as trajectory:
        got = run_batch(pipe, run, range(3), "latent")
    assert torch.equal(got, want)
    assert len(trajectory.samples) == len(trajectory.outputs) == run.steps
    assert trajectory.timesteps == [float(t) for t in pipe.scheduler.timesteps]
    assert type(pipe.scheduler) is type(trajectory.scheduler) is DDIMScheduler


def test_replaying_on_the_same_pipeline_gives_the_recorded_outputs(pipe: Any, run: Sampling) -> None:
    with record(pipe) as trajectory:
        want = run_batch(pipe, run, range(3), "latent")
    with replay(pipe, trajectory) as answer:
        got = run_batch(pipe, run, range(3), "latent")
    assert torch.equal(got, want)
    for a, b in zip(answer.outputs, trajectory.outputs, strict=True):
        assert torch.equal(a, b)


def test_both_pipelines_see_the_same_samples(pipe: Any, qpipe: Any, run: Sampling) -> None:
    with record(pipe) as trajectory:
        want = run_batch(pipe, run, range(3), "latent")
    with replay(qpipe, trajectory) as answer:
        got = run_batch(qpipe, run, range(3), "latent")
    assert torch.equal(got, want)  # teacher forcing: the end is the recorded one
    assert all(not torch.equal(a, b) for a, b in zip(answer.outputs, trajectory.outputs, strict=True))


def test_replay_refuses_other_seeds_and_steps(pipe: Any, run: Sampling) -> None:
    with record(pipe) as trajectory:
        run_batch(pipe, run, range(3), "latent")
    with pytest.raises(MismatchError, match="not the recorded one"), replay(pipe, trajectory):
        run_batch(pipe, run.replace(seed=5), range(3), "latent")
    with pytest.raises(MismatchError, match="same steps"), replay(pipe, trajectory):
        run_batch(pipe, run.replace(steps=run.steps + 1), range(3), "latent")
    with pytest.raises(MismatchError, match="same steps"), replay(pipe, trajectory):
        pass
    assert type(pipe.scheduler) is DDIMScheduler


def test_pixel_pipelines_replay_too(pixel_pipe: DDIMPipeline) -> None:
    run = Sampling(steps=3, eta=0.5)
    with record(pixel_pipe) as trajectory:
        run_batch(pixel_pipe, run, range(2))
    with replay(pixel_pipe, trajectory) as answer:
        run_batch(pixel_pipe, run, range(2))
    assert torch.equal(answer.outputs[-1], trajectory.outputs[-1])


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_that_count_their_steps_are_replayed(kind: Any, pipe: Any, run: Sampling) -> None:
    """The same pipeline twice: no noise at any step, repeated timesteps and second-order steps included."""
    counting = with_components(pipe, scheduler=kind.from_config(pipe.scheduler.config, skip_prk_steps=True))
    fit = measure(counting, counting, run).fit()
    assert bool((fit.variance.value == 0).all())
    assert bool(fit.snr.value.isinf().all())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (None, r"LatentClassPipeline has no scheduler; .* give it one with pipe.register_modules"),
        (CogVideoXDPMScheduler(), r"steps by step\(model_output, old_pred_original_sample, timestep, .* use another"),
        (ScoreSdeVeScheduler(), r"ScoreSdeVeScheduler has no step; .* use another scheduler"),
    ],
)
def test_what_cannot_be_recorded_is_named(scheduler: Any, message: str, pipe: Any, qpipe: Any, run: Sampling) -> None:
    stats = measure(pipe, qpipe, run)
    with record(pipe) as trajectory:
        run_batch(pipe, run, range(2), "latent")
    without, qwithout = (with_components(p, scheduler=scheduler) for p in (pipe, qpipe))
    with pytest.raises(InputError, match=message), record(without):
        pass
    with pytest.raises(InputError, match=message), replay(without, trajectory):
        pass
    with pytest.raises(InputError, match=message):
        measure(without, qpipe, run)
    with pytest.raises(InputError, match=message):
        measure(pipe, qwithout, run)
    with pytest.raises(InputError, match=message):
        correct(qwithout, stats, ("cnc", "bc", "vsc"))


def test_a_step_that_was_replaced_on_the_instance_is_neither_recorded_nor_lost(
    pipe: Any, qpipe: Any, run: Sampling
) -> None:
    stats = measure(pipe, qpipe, run)
    with record(pipe) as trajectory:
        run_batch(pipe, run, range(2), "latent")
    patched, qpatched = (with_components(p, scheduler=copy.deepcopy(p.scheduler)) for p in (pipe, qpipe))

    def step(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for p in (patched, qpatched):
        p.scheduler.step = step
    message = "step of this DDIMScheduler was replaced on the instance.*del pipe.scheduler.step"
    with pytest.raises(InputError, match=message), record(patched):
        pass
    with pytest.raises(InputError, match=message), replay(patched, trajectory):
        pass
    with pytest.raises(InputError, match=message):
        measure(patched, qpatched, run)
    with pytest.raises(InputError, match=message):
        correct(qpatched, stats, ("cnc", "bc", "vsc"))
    assert patched.scheduler.step is step
    del patched.scheduler.step
    with record(patched) as again:
        run_batch(patched, run, range(2), "latent")
    assert torch.equal(again.outputs[-1], trajectory.outputs[-1])


class Unfollowed(LatentClassPipeline):
    """Steps copies of its scheduler, as pipelines of video with sound do, or discrete samples, or not at all."""

    kind = torch.float32
    copies = True
    steps = 1

    def __call__(self, num_inference_steps: int = 1, **kwargs: Any) -> Any:  # type: ignore[override]
        scheduler = copy.deepcopy(self.scheduler) if self.copies else self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        x = torch.ones(1, 4, 8, 8)
        for t in scheduler.timesteps[: self.steps]:
            scheduler.step(x, t, x.to(self.kind))
        return (x,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Unfollowed steps copies of its scheduler"),
        ({"copies": False, "kind": torch.int64}, "DDIMScheduler steps discrete samples"),
        ({"steps": 0}, "Unfollowed took no step with its DDIMScheduler"),
    ],
)
def test_pipelines_that_step_in_another_way_are_refused(changes: dict[str, Any], message: str, pipe: Any) -> None:
    other: Any = Unfollowed(**pipe.components)
    vars(other).update(changes)
    with pytest.raises(InputError, match=message), record(other):
        run_batch(other, Sampling(), range(1))
    assert type(pipe.scheduler) is DDIMScheduler


@pytest.mark.parametrize(
    ("inputs", "outputs", "output", "sample", "axis"),
    [
        (4, 4, (2, 4, 8, 8), (2, 4, 8, 8), 1),  # images
        (4, 4, (2, 4, 4, 4), (2, 4, 4, 4), 1),  # as wide as they have channels
        (4, 8, (2, 8, 8, 8), (2, 4, 8, 8), 1),  # a learned variance
        (4, 8, (2, 4, 8, 8), (2, 4, 8, 8), 1),  # dropped before the step
        (9, 4, (2, 4, 9, 9), (2, 4, 9, 9), 1),  # inpainting: mask and picture are inputs too
        (64, None, (2, 24, 64), (2, 24, 64), 2),  # tokens
        (64, 16, (2, 24, 64), (2, 24, 64), 2),  # packed
        (2, 2, (2, 2, 128), (2, 2, 128), 1),  # sound
        (16, 16, (2, 16, 3, 8, 8), (2, 16, 3, 8, 8), 1),  # video
        (16, 16, (2, 3, 16, 8, 8), (2, 3, 16, 8, 8), 2),  # frames first
        (8, 4, (2, 8, 4, 6, 6), (2, 8, 4, 6, 6), 2),  # with as many frames as inputs
        (3, 6, (2, 5, 9, 9), (2, 5, 9, 9), 1),  # none fits
    ],
)
def test_the_channel_axis_is_the_one_the_denoiser_names(
    inputs: int, outputs: int | None, output: tuple[int, ...], sample: tuple[int, ...], axis: int
) -> None:
    model = nn.Module()
    model.config = {"in_channels": inputs, "out_channels": outputs}  # type: ignore[assignment]
    assert find_channel_axis(model, torch.zeros(output), torch.zeros(sample)) == axis
