import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler
from PIL import Image

from ptqd import InputError, Sampling, correct, measure, quantize, sample, search_correction
from ptqd.diffusion import denoiser_name, final_samples, run_batch, sample_generator, with_components
from ptqd.diffusion.sampling import _generators_handed, guidance_of
from tiny import dit, ldm


def images(pipe: Any, run: Sampling) -> np.ndarray:
    return np.concatenate([batch for _, batch in sample(pipe, run)])


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_does_not_change_images(pipe: Any, run: Sampling, batch: int) -> None:
    run = run.replace(samples=64, steps=2)
    want = images(pipe, run.replace(batch=64))
    assert np.allclose(images(pipe, run.replace(batch=batch)), want, atol=1e-4)
    assert want.shape == (64, 16, 16, 1)


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_does_not_change_quantized_images(pipe: Any, qpipe: Any, run: Sampling, batch: int) -> None:
    run = run.replace(samples=64, steps=2)
    want = images(qpipe, run.replace(batch=64))
    difference = np.abs(images(qpipe, run.replace(batch=batch)) - want)
    # float rounding moves an activation to the neighbouring code now and then: far less than quantization does
    noise = np.abs(want - images(pipe, run.replace(batch=64)))
    assert np.median(difference) < 1e-6
    assert difference.mean() < noise.mean() / 50


def test_a_step_with_other_arguments_is_left_as_it_is(pixel_pipe: DDIMPipeline) -> None:
    """CogVideoXDPMScheduler's has the sample in fifth place; others call it something else."""

    class Odd(DDIMScheduler):
        def step(self, model_output: Any, old: Any, timestep: Any, latents: Any, generator: Any = None) -> Any:
            assert generator is None
            return super().step(model_output, timestep, latents)

    scheduler = Odd.from_config(pixel_pipe.scheduler.config)
    scheduler.set_timesteps(2)
    pipe = with_components(pixel_pipe, scheduler=scheduler)
    x = torch.randn(1, 1, 8, 8)
    want = scheduler.step(x, None, scheduler.timesteps[0], x)[0]
    with _generators_handed(pipe, [sample_generator(0, 0)]):
        assert torch.equal(pipe.scheduler.step(x, None, scheduler.timesteps[0], x)[0], want)


def test_every_sample_has_its_own_seed() -> None:
    draws = {torch.rand(1, generator=sample_generator(s, i)).item() for s in range(5) for i in range(50)}
    assert len(draws) == 250
    assert torch.equal(*(torch.rand(3, generator=sample_generator(1, 2)) for _ in range(2)))


def test_resuming_gives_the_rest(pipe: Any, run: Sampling) -> None:
    parts = list(sample(pipe, run, start=4))
    assert [list(indices) for indices, _ in parts] == [[4, 5, 6, 7]]
    assert np.allclose(parts[0][1], images(pipe, run)[4:], atol=1e-5)


def test_lists_are_one_value_a_sample() -> None:
    run = Sampling(call={"class_labels": [1, 2, 3], "b": torch.tensor([5, 6]), "c": "x"})
    call = run.call_for(range(2, 5))
    assert call["class_labels"] == [3, 1, 2]
    assert call["b"].tolist() == [5, 6, 5]
    assert call["c"] == "x"
    assert run.to_dict()["call"]["b"] == [5, 6]


def test_tuples_and_pictures_go_to_every_batch() -> None:
    picture = Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8))
    run = Sampling(
        call={"a": ["x", "y"], "size": (16, 24), "image": picture, "more": {"scale": np.ones(2)}, "hook": print}
    )
    call = run.call_for(range(3))
    assert call["size"] == (16, 24)
    assert call["image"] is picture
    plain = run.shared_call
    assert json.loads(json.dumps(plain)) == plain
    assert plain["size"] == [16, 24]
    assert "a" not in plain
    other = Sampling(call={**run.call, "image": Image.fromarray(np.ones((2, 2, 3), dtype=np.uint8))})
    assert {k for k, v in other.shared_call.items() if v != plain[k]} == {"image"}
    assert {**run.to_dict()["call"], "a": None} == {**plain, "a": None}


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("samples", 0), ("batch", 0), ("eta", -1.0)])
def test_bad_values_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty list"):
        Sampling(call={"class_labels": []})


def test_unknown_call_arguments_are_named(pipe: Any) -> None:
    with pytest.raises(InputError, match="takes no argument 'prompt'"):
        run_batch(pipe, Sampling(call={"prompt": ["a cat"]}), range(1))


def test_labels_outside_the_classes_and_latents_of_another_shape_are_named(pipe: Any) -> None:
    with pytest.raises(InputError, match=r"in 0\.\.9"):
        pipe(class_labels=[10])
    with pytest.raises(InputError, match="latents must have shape"):
        pipe(class_labels=[1], latents=torch.zeros(1, 3, 8, 8))


def test_the_pipeline_takes_latents_and_returns_tuples(pipe: Any) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2, "latents": latents}
    (a,) = pipe(**arguments, output_type="pt", return_dict=False)
    b = pipe(**arguments, output_type="pil").images
    assert a.shape == (2, 1, 16, 16)
    assert b[0].mode == "L"
    c = pipe(**arguments, output_type="latent", guidance_scale=1.0).images
    d = pipe(**arguments, output_type="latent", guidance_scale=1.0 + 1e-6).images
    assert torch.allclose(c, d, atol=1e-4)


def test_pixel_pipelines_get_a_batch_size(pixel_pipe: DDIMPipeline) -> None:
    assert run_batch(pixel_pipe, Sampling(steps=2), range(3)).shape == (3, 8, 8, 1)


def test_a_pipeline_without_denoiser_is_named(pipe: Any) -> None:
    class Bare(DiffusionPipeline):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(InputError, match="neither a unet nor a transformer"):
        denoiser_name(Bare(pipe.vae))


def test_a_guidance_scale_that_is_no_number_is_refused(pipe: Any) -> None:
    assert guidance_of(pipe, Sampling(call={"guidance_scale": 3})) == 3
    assert guidance_of(pipe, Sampling(call={"guidance_scale": torch.tensor([2.0])})) == 2.0
    for wrong in ("", [1.0, 2.0], {"a": 1}):
        with pytest.raises(InputError, match="guidance_scale must be a number; got"):
            guidance_of(pipe, Sampling(call={"guidance_scale": wrong}))


@pytest.mark.parametrize(
    ("pipe", "scheduler", "eta", "call"),
    [
        (dit(), DDPMScheduler, 0.0, {"class_labels": [0, 1], "guidance_scale": 2.0}),
        (dit(), EulerAncestralDiscreteScheduler, 0.0, {"class_labels": [0, 1], "guidance_scale": 2.0}),
        (ldm(), DDIMScheduler, 1.0, {}),
    ],
)
def test_a_pipeline_that_hands_its_scheduler_no_generator_draws_by_sample(
    pipe: Any, scheduler: Any, eta: float, call: dict[str, Any]
) -> None:
    """Their schedulers would draw from torch's own generator, noise that depends on the batch."""
    exact = with_components(pipe, scheduler=scheduler.from_config(pipe.scheduler.config))
    run = Sampling(4, eta, samples=4, batch=4, call=call)
    assert np.allclose(images(exact, run.replace(batch=2)), images(exact, run), atol=1e-4)
    assert type(exact.scheduler) is scheduler
    quantized = quantize(exact, "w4a8", run)
    stats = measure(exact, quantized, run.replace(samples=16))
    assert stats.finals.shape == (16, *final_samples(exact, run, range(4)).shape[1:])
    assert stats.paths.shape[:3] == (16, 4, 1)
    corrected = correct(quantized, stats, ("cnc", "bc", "vsc"))
    assert np.allclose(images(corrected, run.replace(batch=2)), images(corrected, run), atol=1e-4)
    assert "trajectory" in [trial.name for trial in search_correction(quantized, stats, run).trials]
