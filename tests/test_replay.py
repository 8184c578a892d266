from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from ptqd import MismatchError, Sampling, measure
from ptqd.components import with_components
from ptqd.replay import record, replay
from ptqd.sampling import run_batch


def test_recording_changes_nothing(pipe: Any, run: Sampling) -> None:
    want = run_batch(pipe, run, range(3), "latent")
    with record(pipe) as trajectory:
        got = run_batch(pipe, run, range(3), "latent")
    assert torch.equal(got, want)
    assert len(trajectory.samples) == len(trajectory.outputs) == run.steps
    assert trajectory.timesteps == [float(t) for t in pipe.scheduler.timesteps]
    assert "step" not in vars(pipe.scheduler)


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
    assert "step" not in vars(pipe.scheduler)


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
