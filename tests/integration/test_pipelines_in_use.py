"""Pipelines as people really use them: compiled, offloaded, with LoRAs, two denoisers, at parts of a schedule."""

import copy
import functools
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from ptqd import (
    InputError,
    MismatchError,
    Recipe,
    Sampling,
    apply_plan,
    correct,
    explain,
    export,
    load,
    measure,
    measure_widths,
    quantize,
    search_correction,
)
from ptqd.diffusion import fingerprint, record, run_batch, run_macs, with_components
from ptqd.diffusion.call_rows import CallLayout
from ptqd.diffusion.sampling import default_call
from ptqd.experiments.report.model_card import model_card
from ptqd.quantization import coverage_of, disk_bytes, run_cost
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.sites import activation_quantizers, quantized_sites
from ptqd_cli.main import main
from tiny import CASES, PROMPTS, stable_diffusion, stable_diffusion_xl
from tiny_more import MORE_CASES

SD = Sampling(steps=3, samples=4, batch=2, call={"prompt": PROMPTS, "guidance_scale": 3.0})


FLUX = Sampling(steps=3, samples=4, batch=2, call={**CASES["flux"].call, "sigmas": (1.0, 0.7, 0.3)})


def quick(shorthand: str, **changes: Any) -> Recipe:
    """A recipe whose ranges are not what is tested."""
    values = Recipe.parse(shorthand).to_dict()
    values |= {"calibration_samples": 2, "calibration_rows": 0, **changes}
    for part in ("weights", "activations"):
        values[part] = {**values[part], "range": "minmax"}
    values["rules"] = [{**rule, "optional": True} for rule in values["rules"]]
    for method in values["methods"]:
        method |= {k: v for k, v in {"inputs": 16, "iterations": 4, "batch": 4}.items() if k in method}
    return Recipe.from_dict(values)


@functools.cache
def original() -> Any:
    torch.manual_seed(0)
    return stable_diffusion()


def own() -> Any:
    """The pipeline, its denoiser to do with as one likes."""
    return with_components(original(), unet=copy.deepcopy(original().unet))


@functools.cache
def flux() -> Any:
    torch.manual_seed(0)
    return CASES["flux"].build()


@functools.cache
def quantized_once() -> Any:
    return quantize(original(), quick("w4a8"), SD)


def quantized() -> Any:
    """The quantized pipeline, its denoiser to do with as one likes."""
    return with_components(quantized_once(), unet=copy.deepcopy(quantized_once().unet))


def samples(pipe: Any, run: Sampling = SD) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, run, range(2), "latent"))


def saved_and_loaded(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    return load(folder)


def products(pipe: Any) -> int:
    return sum(site.weight is None for site in quantized_sites(pipe.unet))


# B1: what was quantized is saved, and read


def sliced(pipe: Any) -> None:
    pipe.unet.set_attention_slice("max")


def fused(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def without_attention_processors_of_torch(pipe: Any) -> None:
    pipe.unet.set_attn_processor(d.models.attention_processor.AttnProcessor())


STATES = [sliced, fused, compiled, compiled_in_place, without_attention_processors_of_torch]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_pipeline_in_any_state_is_quantized_as_it_is_without_and_loads(state: Any, tmp_path: Path) -> None:
    pipe = own()
    state(pipe)
    made = quantize(pipe, quick("w4a8"), SD)
    assert coverage_of(made) == coverage_of(quantized_once())
    assert products(made) == 8
    for name in ("conv_in", "conv_out"):
        assert made.unet.get_submodule(name).weights.bits == 8
    if state is not sliced:
        assert fingerprint(made.unet) == fingerprint(quantized_once().unet)
    assert torch.equal(samples(saved_and_loaded(made, tmp_path)), samples(made))


def test_diffusers_itself_loads_what_was_saved(tmp_path: Path) -> None:
    quantized_once().save_pretrained(tmp_path)
    loaded = d.DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(samples(loaded), samples(quantized_once()))


def test_a_folder_of_an_earlier_version_has_its_products_in_the_processors_place(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from ptqd.files import read_json, write_json

    quantized_once().save_pretrained(tmp_path)
    path, config = tmp_path / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "unet" / "config.json"
    save_file({name.replace(".products.", ".processor."): value for name, value in load_file(path).items()}, path)
    values = read_json(config)
    for name in ("quantized", "skipped"):
        del values["quantization_config"][name]
    write_json(config, values)
    loaded = load(tmp_path)
    assert fingerprint(loaded.unet) == fingerprint(quantized_once().unet)
    assert torch.equal(samples(loaded), samples(quantized_once()))


def test_a_folder_of_an_earlier_version_has_no_products_of_newer_attention(tmp_path: Path) -> None:
    """Before, a recipe said what was quantized, and of FLUX that was the layers alone."""
    from ptqd.files import read_json, write_json

    made = quantize(flux(), quick("w4a8", attention=False), FLUX)
    made.save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    values = read_json(config)
    values["quantization_config"]["recipe"]["attention"] = True
    for name in ("quantized", "skipped"):
        del values["quantization_config"][name]
    write_json(config, values)
    assert torch.equal(samples(load(tmp_path), FLUX), samples(made, FLUX))


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    pipe = quantized()
    pipe.unet.mid_block.resnets[0].conv1.bias = None
    with pytest.raises(InputError, match=r"'mid_block.resnets.0.conv1.bias' is not what its configuration makes"):
        pipe.save_pretrained(tmp_path)


# B2, B9: compiled, and attention that stays quantized


@pytest.mark.parametrize("state", [sliced, without_attention_processors_of_torch], ids=lambda state: state.__name__)
def test_what_is_done_to_attention_afterwards_leaves_it_quantized(state: Any) -> None:
    pipe = quantized()
    state(pipe)
    assert products(pipe) == 8
    assert torch.allclose(samples(pipe), samples(quantized_once()), atol=1e-4)


def test_projections_of_quantized_attention_are_not_fused() -> None:
    pipe = quantized()
    with pytest.raises(InputError, match="cannot be fused: the fused layer would not be quantized"):
        pipe.fuse_qkv_projections()


def test_a_processor_that_leaves_torchs_products_aside_is_an_error() -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    pipe = quantized()
    pipe.unet.set_attn_processor(Own())
    with pytest.raises(InputError, match="Own leaves torch's attention aside"):
        samples(pipe)


@pytest.mark.parametrize("loaded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["made", "loaded"])
def test_a_corrected_pipelines_denoiser_compiles_without_graph_breaks(loaded: bool, tmp_path: Path) -> None:
    """As one whole graph, and whatever was called before."""
    want, pipe = samples(corrected_once()), copy.deepcopy(corrected_once())
    if loaded:
        pipe = saved_and_loaded(corrected_once(), tmp_path)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    assert torch.allclose(samples(pipe), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("state", [compiled, compiled_in_place])
def test_a_plan_is_followed_by_a_compiled_denoiser(state: Any) -> None:
    base = quantize(original(), quick("w4a4+8-steps2"), SD)
    steps = tuple(measure(original(), base, SD).measured_on.model_timesteps)
    plan = PrecisionPlan.uniform(steps, 4).replace(bits=((8,), (4,), (8,)))
    planned = apply_plan(base, plan)
    want = samples(planned)
    assert not torch.equal(want, samples(apply_plan(base, PrecisionPlan.uniform(steps, 4))))
    pipe = with_components(planned, unet=copy.deepcopy(planned.unet))
    state(pipe)
    for _ in range(2):
        assert torch.allclose(samples(pipe), want, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_quantized_pipeline_is_measured_corrected_and_samples_alike() -> None:
    pipe, plain = quantized(), quantized()
    compiled(pipe)
    stats = measure(original(), pipe, SD)
    assert stats.measured_on == measure(original(), plain, SD).measured_on
    corrected = correct(pipe, stats, ("cnc", "bc"))
    assert torch.allclose(samples(corrected), samples(correct(plain, stats, ("cnc", "bc"))), atol=1e-5)


def test_recipes_that_follow_the_steps_are_made_of_compiled_pipelines() -> None:
    pipe = own()
    compiled(pipe)
    recipe = quick("w4a8-time-steps2-gptq")
    assert fingerprint(quantize(pipe, recipe, SD).unet) == fingerprint(quantize(own(), recipe, SD).unet)


# B3, B7: schedules as they are


@functools.cache
def xl() -> Any:
    torch.manual_seed(0)
    return stable_diffusion_xl()


@functools.cache
def quantized_xl() -> Any:
    return quantize(xl(), quick("w4a8"), XL)


XL = Sampling(steps=5, samples=4, batch=2, call={"prompt": PROMPTS, "guidance_scale": 3.0, "denoising_end": 0.6})


def test_the_beginning_of_a_schedule_is_measured_and_corrected() -> None:
    pipe, made = xl(), quantized_xl()
    stats = measure(pipe, made, XL)
    assert 1 < len(stats.timesteps) < 5
    assert torch.equal(samples(correct(made, stats, ()), XL), samples(made, XL))
    assert not torch.equal(samples(correct(made, stats, ("cnc", "bc")), XL), samples(made, XL))
    call = {name: value for name, value in XL.call.items() if name != "denoising_end"}
    with pytest.raises(MismatchError, match="knows no step at timestep"):
        samples(correct(made, stats, ("cnc", "bc")), XL.replace(call=call))


def test_the_search_runs_on_the_beginning_of_a_schedule() -> None:
    run = XL.replace(samples=16, batch=8)
    assert search_correction(quantized_xl(), measure(xl(), quantized_xl(), run), run).trials


def test_an_interrupted_run_is_measured_and_corrected() -> None:
    def stop(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        pipe._interrupt = step >= 1
        return values

    run = SD.replace(steps=4, call={**SD.call, "callback_on_step_end": stop})
    stats = measure(original(), quantized_once(), run)
    assert len(stats.timesteps) == 2
    made = correct(quantized_once(), stats, ())
    assert torch.equal(samples(made, run), samples(quantized_once(), run))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_list_of_sigmas_is_the_schedule_at_any_batch(batch: int) -> None:
    case = CASES["flux"]
    run = Sampling(steps=4, samples=4, batch=batch, call={**case.call, "sigmas": [1.0, 0.7, 0.4, 0.1]})
    pipe = flux()
    with record(pipe) as trajectory:
        run_batch(pipe, run, range(batch), "latent")
    assert len(trajectory.timesteps) == 4


def test_another_size_of_a_schedule_that_follows_the_size_is_refused_in_true_words() -> None:
    run, made = FLUX, quantize(flux(), quick("w4a8"), FLUX)
    stats = measure(flux(), made, run)
    assert torch.equal(samples(correct(made, stats, ()), run), samples(made, run))
    corrected = correct(made, stats, ("cnc", "bc"))
    with pytest.raises(MismatchError, match=r"depends on the image's size .use_dynamic_shifting.: sample at the size"):
        samples(corrected, run.replace(call={**run.call, "width": 64}))


def test_arguments_for_every_batch_are_not_one_for_each_sample() -> None:
    run = SD.replace(shared={"negative_prompt": "x", "cross_attention_kwargs": None})
    assert run.call_for([0, 1])["negative_prompt"] == ["x", "x"]
    pair = SD.replace(shared={"ip_adapter_image": ["a", "b"]})
    assert pair.call_for([2])["ip_adapter_image"] == ["a", "b"]
    with pytest.raises(InputError, match="'prompt' is given for every sample and for all"):
        SD.replace(shared={"prompt": "x"})


# B4: the guidance of the call itself


@functools.cache
def corrected_once() -> Any:
    return correct(quantized_once(), measure(original(), quantized_once(), SD), ("cnc", "bc"))


def guided(scale: float) -> dict[str, Any]:
    return {"prompt": "a red cat", "guidance_scale": scale, "num_inference_steps": 3, "output_type": "latent"}


def test_copies_and_pickles_correct_and_know_their_own_calls_guidance() -> None:
    pipe = corrected_once()
    want = samples(pipe)
    with pytest.raises(MismatchError, match="guidance scale 3, the pipeline runs at 9"):
        pipe(**guided(9.0))
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(samples(other), want)
        with pytest.raises(MismatchError, match="guidance scale 3, the pipeline runs at 9"):
            other(**guided(9.0))
        other(**guided(3.0))


def test_every_argument_of_guidance_is_looked_at() -> None:
    with pytest.raises(MismatchError, match=r"guidance rescale 0, the pipeline runs at 0.7"):
        corrected_once()(**guided(3.0), guidance_rescale=0.7)
    case = CASES["flux"]
    run = Sampling(steps=3, samples=4, batch=2, call={**case.call, **(case.guidance or {})})
    made = quantize(flux(), quick("w4a8"), run)
    corrected = correct(made, measure(flux(), made, run), ("cnc", "bc"))
    with pytest.raises(MismatchError, match="true cfg scale 2, the pipeline runs at 3"):
        samples(corrected, run.replace(call={**run.call, "true_cfg_scale": 3.0}))


def test_a_corrected_pipeline_notices_another_denoiser() -> None:
    pipe = with_components(corrected_once(), unet=own().unet)
    with pytest.raises(MismatchError, match="the denoiser is no longer the one that was measured"):
        samples(pipe)


def test_a_class_of_pipeline_that_drops_the_correction_says_so(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pipe, run = CASES["ddim"].build(), Sampling(steps=3, samples=4, batch=2)
    made = quantize(pipe, quick("w4a8"), run)
    corrected = correct(made, measure(pipe, made, run), ("cnc", "bc"))
    corrected.save_pretrained(tmp_path)
    d.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            d.DDIMPipeline.from_pretrained(tmp_path)
    finally:
        d.utils.logging.disable_propagation()
    assert "'correction': <what ptqd corrects; to keep it, load the pipeline with ptqd.load>" in caplog.text
    assert torch.equal(samples(load(tmp_path), run), samples(corrected, run))


@pytest.mark.parametrize(
    "scale", [np.float32(9), np.int64(9), torch.tensor(9.0)], ids=lambda scale: type(scale).__name__
)
def test_guidance_may_be_any_number(scale: Any) -> None:
    with pytest.raises(MismatchError, match="guidance scale 3, the pipeline runs at 9"):
        corrected_once()(**guided(scale))


# B5: two denoisers


@functools.cache
def wan() -> Any:
    torch.manual_seed(0)
    pipe = CASES["wan"].build()
    second = CASES["wan"].build().transformer
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.9)
    return pipe


WAN = Sampling(
    steps=4,
    samples=4,
    batch=2,
    call={**CASES["wan"].call, "guidance_scale": 3.0, "guidance_scale_2": 2.0},
)


def test_both_denoisers_are_quantized_measured_planned_counted_saved_and_loaded(tmp_path: Path) -> None:
    pipe = wan()
    with record(pipe) as trajectory:
        run_batch(pipe, WAN, range(2), "latent")
    assert len(trajectory.model_timesteps) == 4
    made = quantize(pipe, quick("w4a4+8"), WAN)
    names = coverage_of(made).quantized
    assert sum(name.startswith("transformer_2.") for name in names) == len(names) / 2 > 10
    assert run_macs(pipe, WAN).counts.sum(1).min() > 0
    one, both = disk_bytes(made.transformer), disk_bytes(made)
    assert both > 1.9 * one
    stats = measure_widths(pipe, made, WAN)
    steps = stats[8].measured_on.model_timesteps
    plan = PrecisionPlan.uniform(steps, 4)
    plan = plan.replace(bits=((8,), *plan.bits[1:-1], (8,)))
    planned = apply_plan(made, plan)
    assert run_cost(planned, WAN).ratio < run_cost(apply_plan(made, PrecisionPlan.uniform(steps, 4)), WAN).ratio
    corrected = correct(planned, measure(pipe, planned, WAN), ("cnc", "bc"))
    want = samples(corrected, WAN)
    loaded = saved_and_loaded(corrected, tmp_path)
    assert torch.equal(samples(loaded, WAN), want)
    with pytest.raises(MismatchError, match="guidance scale 2 2, the pipeline runs at 4"):
        samples(loaded, WAN.replace(call={**WAN.call, "guidance_scale_2": 4.0}))
    other = with_components(corrected, transformer_2=pipe.transformer_2)
    with pytest.raises(MismatchError, match="no longer the one"):
        samples(other, WAN)


def test_two_denoisers_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ptqd.files import parse_json

    made = quantize(wan(), quick("w4a8"), WAN)
    made.save_pretrained(tmp_path / "q")
    call = [f"--call={name}={json.dumps(value)}" for name, value in WAN.call.items()]
    capsys.readouterr()
    assert main(["cost", str(tmp_path / "q"), "--steps", "4", *call, "--json"]) == 0
    cost = parse_json(capsys.readouterr().out, "cost")
    assert cost["disk_bytes"] == disk_bytes(made)
    assert cost["parameters"] == sum(
        p.numel() for name in ("", "_2") for p in getattr(wan(), f"transformer{name}").parameters()
    )
    half = with_components(made, transformer_2=wan().transformer_2)  # in full precision
    half.save_pretrained(tmp_path / "half")
    assert main(["cost", str(tmp_path / "half"), "--steps", "4", *call, "--json"]) == 0
    assert parse_json(capsys.readouterr().out, "cost")["disk_bytes"] == disk_bytes(half)
    assert "`transformer_2` is in full precision" in model_card(half, "user/half")


def test_a_prompt_that_is_missing_is_asked_for_and_costs_are_counted_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original().save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--recipe", "w8a8", "--steps", "2", "--out", str(tmp_path / "q")]
    assert main(command) == 2
    assert "give it prompts: --call 'prompt=" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # refused work leaves nothing behind
    assert main(["cost", str(tmp_path / "model"), "--recipe", "w8a8", "--steps", "2"]) == 0
    assert "x fewer than FP32" in capsys.readouterr().out


def test_a_denoiser_that_the_run_never_calls_is_named() -> None:
    pipe = with_components(wan(), scheduler=wan().scheduler)
    pipe.register_to_config(boundary_ratio=0.0)
    with pytest.raises(InputError, match="never calls its transformer_2"):
        quantize(pipe, quick("w4a8"), WAN.replace(call={k: v for k, v in WAN.call.items() if k != "guidance_scale_2"}))


def test_products_of_flux_are_counted_as_they_are_quantized() -> None:
    """Of 8 bits by 8, sixteen times fewer than of 32 by 32."""
    made = quantize(flux(), quick("w8a8"), FLUX)
    cost = run_cost(made, FLUX)
    products = torch.tensor([name.endswith((".qk", ".pv")) for name in cost.macs.layers])
    assert products.sum() == 4
    full = cost.macs.counts[:, products].sum() * 32**2
    assert full / cost.bops[:, products].sum() == 16


# B6, B10: rows of any shape, and calls as people write them


def test_one_prompt_is_every_samples(tmp_path: Path) -> None:
    run = SD.replace(call={"prompt": "a red cat", "guidance_scale": 3.0})
    assert torch.equal(
        samples(original(), run), samples(original(), run.replace(call={**run.call, "prompt": ["a red cat"]}))
    )
    with pytest.raises(InputError, match="leave 'num_images_per_prompt' out, and ask for more samples"):
        SD.replace(call={**SD.call, "num_images_per_prompt": 2})


def test_statistics_show_themselves_in_a_line() -> None:
    text = repr(measure(original(), quantized_once(), SD))
    assert text == "NoiseStats(4 samples, 3 steps of DDIMScheduler, guidance 3, 4 channels)"


def test_a_folder_of_half_precision_alone_is_loaded(tmp_path: Path) -> None:
    original().save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob("unet/*.fp16.safetensors"))
    assert torch.equal(samples(load(tmp_path)), samples(original()))


def test_a_pipeline_with_code_of_its_own_is_refused_in_a_line(tmp_path: Path) -> None:
    from ptqd.files import read_json, write_json

    original().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    write_json(index, {**read_json(index), "_class_name": ["pipeline", "Own"]})
    with pytest.raises(InputError, match="cannot be loaded as a pipeline"):
        load(tmp_path)


# B6: rows of any shape


def test_a_batch_as_large_as_a_number_of_tokens_is_told_apart() -> None:
    """Six tokens of the image are as many as the rows of six samples."""
    recipe = quick("w4a8-smooth-gptq", calibration_samples=6)
    call = {**CASES["flux"].call, "height": 16, "width": 24, "max_sequence_length": 6}
    whole, parts = (
        quantize(flux(), recipe, Sampling(steps=3, samples=6, batch=batch, call=call)).transformer.state_dict()
        for batch in (6, 2)
    )
    for name, tensor in whole.items():  # a batch's size may change a last bit, and a code that lies between two
        alike = torch.isclose(tensor.double(), parts[name].double(), rtol=1e-4, atol=1e-6)
        assert alike.double().mean() > (0.99 if name.endswith("codes") else 0.999), name


@pytest.mark.parametrize("shorthand", ["w4a8", "w4a8-steps2"])
def test_prompts_of_other_lengths_give_the_same_ranges_at_any_batch(shorthand: str) -> None:
    """Also where nothing is learned: in a batch, some prompts are padded."""
    case = MORE_CASES["qwen-image"]
    torch.manual_seed(0)
    pipe = case.build()
    call = {**case.call, "prompt": ["a cat", "a very long description of two red birds and a dog", "birds"]}
    recipe = quick(shorthand, calibration_samples=3)
    scales = []
    for batch in (1, 3):
        made = quantize(pipe, recipe, Sampling(steps=3, samples=3, batch=batch, call=call))
        quantizers = activation_quantizers(made.transformer)
        scales.append(torch.cat([q.scale.flatten() for _, q in quantizers]))
    assert torch.allclose(scales[0], scales[1], rtol=1e-4)


# B8: offloaded, dispatched, cast


def sequentially(pipe: Any) -> None:
    cpu_offload(pipe.unet, torch.device("cpu"))


def by_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize(
    "state",
    [sequentially, pytest.param(by_groups, marks=pytest.mark.slow)],
    ids=lambda state: state.__name__,
)
def test_an_offloaded_pipeline_gives_the_same_codes(state: Any, tmp_path: Path) -> None:
    pipe = own()
    state(pipe)
    recipe = quick("w4a8-smooth-gptq")
    made, want = quantize(pipe, recipe, SD), quantize(own(), recipe, SD)
    assert fingerprint(made.unet) == fingerprint(want.unet)
    assert torch.equal(samples(saved_and_loaded(made, tmp_path)), samples(want))


@pytest.mark.parametrize("state", [sequentially, by_groups], ids=lambda state: state.__name__)
def test_a_quantized_pipeline_is_offloaded(state: Any) -> None:
    pipe = quantized()
    state(pipe)
    assert torch.equal(samples(pipe), samples(quantized_once()))


def test_weights_in_files_are_not_taken_for_others(tmp_path: Path) -> None:
    pipe, place = own(), torch.device("cpu")
    pipe.unet.enable_group_offload(place, place, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    with pytest.raises(InputError, match="is offloaded to the disk in groups; load it without that"):
        quantize(pipe, "w4a8", SD)


def test_weights_that_are_stored_narrow_are_quantized_as_they_compute() -> None:
    pipe, rounded = own(), own()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, module in rounded.unet.named_modules():
        if "layerwise_casting" in getattr(getattr(pipe.unet.get_submodule(name), "_diffusers_hook", None), "hooks", {}):
            module.to(torch.float8_e4m3fn).to(torch.float32)
    recipe = quick("w4a8")
    assert fingerprint(quantize(pipe, recipe, SD).unet) == fingerprint(quantize(rounded, recipe, SD).unet)


@pytest.mark.parametrize("state", [sequentially, by_groups], ids=lambda state: state.__name__)
def test_offloaded_pipelines_go_the_whole_way(state: Any, tmp_path: Path) -> None:
    full, pipe, base = own(), own(), quantize(original(), quick("w4a4+8"), SD)
    offloaded = with_components(base, unet=copy.deepcopy(base.unet))
    for one in (pipe, offloaded):
        state(one)
    stats = measure(pipe, offloaded, SD)
    assert stats.measured_on == measure(full, base, SD).measured_on
    steps = tuple(stats.measured_on.model_timesteps)
    plan = PrecisionPlan.uniform(steps, 8).replace(weights={"mid_block.resnets.0.conv1": 8})
    want = apply_plan(base, plan, full)
    planned = apply_plan(offloaded, plan, pipe)
    assert fingerprint(planned.unet) == fingerprint(want.unet)
    assert len(explain(pipe, offloaded, SD)) == len(coverage_of(base).quantized)
    corrected = correct(offloaded, stats, ("cnc", "bc"))
    want = samples(correct(base, stats, ("cnc", "bc")))
    assert torch.equal(samples(corrected), want)
    assert torch.equal(samples(saved_and_loaded(corrected, tmp_path)), want)


def test_a_dispatched_pipeline_samples_alike() -> None:
    pipe = quantized()
    dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)
    assert torch.equal(samples(pipe), samples(quantized_once()))


@pytest.mark.parametrize("place", ["cpu", "balanced"])
def test_a_saved_pipeline_is_dispatched(place: str, tmp_path: Path) -> None:
    quantized_once().save_pretrained(tmp_path)
    if place == "balanced" and not torch.cuda.is_available():
        pytest.skip("a map of devices needs one that is no CPU")
    loaded = d.DiffusionPipeline.from_pretrained(tmp_path, device_map=place)
    assert torch.allclose(samples(loaded).cpu(), samples(quantized_once()), atol=1e-4)


def test_a_denoiser_alone_is_dispatched(tmp_path: Path) -> None:
    quantized_once().save_pretrained(tmp_path)
    denoiser = d.UNet2DConditionModel.from_pretrained(tmp_path / "unet", device_map="cpu")
    assert torch.equal(samples(with_components(original(), unet=denoiser)), samples(quantized_once()))


def test_a_quantized_pipeline_is_cast_and_cast_back(tmp_path: Path) -> None:
    pipe = quantized()
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    denoiser = pipe.unet.to(torch.bfloat16)
    assert fingerprint(denoiser) == fingerprint(loaded.unet)
    run = SD.replace(samples=2)
    cast = with_components(loaded, unet=denoiser)
    assert torch.equal(samples(cast, run), samples(loaded, run))
    back = with_components(original(), unet=quantized().unet.to(torch.bfloat16).to(torch.float32))
    assert torch.equal(back.unet.conv_in.weight, quantized_once().unet.conv_in.weight)
    assert (samples(back) - samples(quantized_once())).abs().mean() < 0.5


def test_another_class_of_pipeline_is_made_of_a_corrected_one() -> None:
    other = d.StableDiffusionImg2ImgPipeline.from_pipe(corrected_once(), requires_safety_checker=False)
    assert type(other.scheduler) is type(corrected_once().scheduler)
    assert torch.equal(samples(d.StableDiffusionPipeline.from_pipe(other)), samples(corrected_once()))


# B10: what a pipeline has to give


def labelled() -> Any:
    torch.manual_seed(0)
    network = d.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=5,
    )
    return d.ConsistencyModelPipeline(network.eval(), d.CMStochasticIterativeScheduler(num_train_timesteps=10))


def test_a_pipeline_without_latents_goes_the_whole_way() -> None:
    pipe = labelled()
    assert default_call(pipe) == {"class_labels": [0, 1, 2, 3, 4]}
    run = Sampling(steps=3, samples=4, batch=2, call=default_call(pipe))
    made = quantize(pipe, quick("w4a8-gptq"), run)
    corrected = correct(made, measure(pipe, made, run), ("cnc", "bc"))
    got = [torch.as_tensor(run_batch(corrected, run.replace(batch=n), range(n))) for n in (1, 2)]
    assert (got[0] - got[1][:1]).abs().max() < 0.02
    assert (got[0] - got[1][1:]).abs().max() > 0.3


def test_lists_of_numbers_are_one_for_all_but_for_class_labels() -> None:
    run = Sampling(call={"skip_guidance_layers": [1, 3], "class_labels": [4, 5], "original_size": (32, 24)})
    assert run.call_for([0, 1, 2]) == {
        "skip_guidance_layers": [1, 3],
        "class_labels": [4, 5, 4],
        "original_size": (32, 24),
    }
    assert run.shared_call == {"skip_guidance_layers": [1, 3], "original_size": [32, 24]}


def test_two_control_nets_get_a_picture_each_of_every_sample() -> None:
    run = Sampling(call={"image": [(1j, 2j), (3j, 4j)]})
    assert run.call_for([0, 1]) == {"image": [[1j, 3j], [2j, 4j]]}
    assert Sampling(call={"image": (1j, 2j)}).call_for([0, 1]) == {"image": [1j, 2j]}


# B11: already quantized, never reached, inference mode


def test_what_is_quantized_already_is_named() -> None:
    with pytest.raises(InputError, match=r"unet is already quantized .ptqd.; give the full-precision pipeline"):
        quantize(quantized_once(), "w4a8", SD)


@pytest.mark.backends
def test_models_of_other_libraries_are_named() -> None:
    from optimum.quanto import freeze, qint8
    from optimum.quanto import quantize as quanto

    pipe = own()
    quanto(pipe.unet, weights=qint8)
    freeze(pipe.unet)
    with pytest.raises(InputError, match=r"unet is already quantized .quanto.; give the full-precision pipeline"):
        quantize(pipe, "w4a8", SD)


def test_float8_weights_are_named() -> None:
    pipe = own()
    pipe.unet.to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"already quantized .conv_in.weight in float8_e4m3fn."):
        quantize(pipe, "w4a8", SD)


def test_layers_that_no_call_reaches_are_named_and_stay(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """HunyuanDiT pools its text by torch's own attention, which takes the layers' weights and calls none of them."""
    case = MORE_CASES["hunyuan-dit"]
    torch.manual_seed(0)
    pipe = case.build()
    run = Sampling(steps=case.steps, samples=4, batch=2, call=case.call)
    with caplog.at_level(logging.WARNING):
        made = quantize(pipe, quick("w4a8-gptq"), run)
    assert "no calibration call reaches 4 layers of transformer" in caplog.text
    assert "time_extra_emb.pooler.c_proj" in caplog.text
    assert ("time_extra_emb.pooler.c_proj", "no calibration call reaches it") in coverage_of(made).skipped
    loaded = saved_and_loaded(made, tmp_path)
    assert torch.equal(samples(loaded, run), samples(made, run))
    assert coverage_of(loaded) == coverage_of(made)


@pytest.mark.filterwarnings("ignore")  # of the libraries' own code
@pytest.mark.parametrize(
    "name",
    [
        "qwen-image",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("z-image", "sd-pag", "hunyuan-dit", "wan-image")),
    ],
)
def test_denoisers_are_distilled_whatever_they_are_given(name: str) -> None:
    """Lists with an element a row, attention that a run exchanges, a table of one entry, no tokens of an image."""
    case = MORE_CASES[name]
    torch.manual_seed(0)
    pipe = case.build()
    run = Sampling(steps=case.steps, samples=4, batch=2, call={**case.call, **(case.guidance or {})})
    want, values, errors = samples(pipe, run), quick("w4a8-best").to_dict(), []
    for methods in ([], [{"name": "distill", "inputs": 32, "iterations": 40, "batch": 8}]):
        recipe = Recipe.from_dict({**values, "methods": methods})
        errors.append(float((samples(quantize(pipe, recipe, run), run) - want).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_a_look_at_the_first_call_leaves_the_attention_that_pag_exchanges() -> None:
    case = MORE_CASES["sd-pag"]
    pipe = case.build()
    before = dict(pipe.unet.attn_processors)
    CallLayout.of(pipe, Sampling(steps=case.steps, samples=4, batch=2, call={**case.call, **(case.guidance or {})}))
    assert pipe.unet.attn_processors == before


@pytest.mark.slow
def test_rounding_is_learned_in_inference_mode() -> None:
    recipe = quick("w4a8-brecq")
    with torch.inference_mode():
        made = quantize(own(), recipe, SD)
    assert fingerprint(made.unet) == fingerprint(quantize(own(), recipe, SD).unet)


def test_a_scheduler_that_was_exchanged_and_exchanged_back_is_the_same() -> None:
    made, first = quantized_once(), original().scheduler
    stats = measure(original(), made, SD)
    back = d.DDIMScheduler.from_config(d.EulerDiscreteScheduler.from_config(first.config).config)
    assert torch.equal(samples(correct(with_components(made, scheduler=back), stats, ())), samples(made))


def test_modular_pipelines_are_named() -> None:
    class Blocks:
        blocks = ()

    with pytest.raises(InputError, match="Blocks is a modular pipeline"):
        quantize(Blocks(), "w4a8", SD)


# LoRA

TARGETS = ("attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "resnets.0.conv1", "resnets.0.conv_shortcut")


def lora(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA on linear layers and convolutions, as ``load_lora_weights`` takes it."""
    random = torch.Generator().manual_seed(seed)
    values: dict[str, torch.Tensor] = {}
    for name, module in original().unet.named_modules():
        if name.endswith(TARGETS):
            out, columns, *kernel = module.weight.shape
            values[f"unet.{name}.lora_A.weight"] = torch.randn((rank, columns, *kernel), generator=random) * 0.2
            values[f"unet.{name}.lora_B.weight"] = torch.randn((out, rank, *[1] * len(kernel)), generator=random) * 0.2
    return values


def by_hand(pipe: Any, *weighted: tuple[dict[str, torch.Tensor], float]) -> torch.Tensor:
    """Samples of a pipeline whose layers' outputs have ``s B A x`` added: the LoRA on what the codes stand for."""
    denoiser = copy.deepcopy(pipe.unet)

    def add(module: Any, args: Any, output: torch.Tensor, terms: list[tuple[torch.Tensor, torch.Tensor, float]]) -> Any:
        for down, up, scale in terms:
            if down.ndim == 2:
                output = output + scale * (args[0] @ down.T @ up.T)
            else:
                stride, padding = module.stride, module.padding
                output = output + scale * torch.conv2d(torch.conv2d(args[0], down, None, stride, padding), up)
        return output

    for name, module in denoiser.named_modules():
        terms = [
            (values[f"unet.{name}.lora_A.weight"], values[f"unet.{name}.lora_B.weight"], scale)
            for values, scale in weighted
            if f"unet.{name}.lora_A.weight" in values
        ]
        if terms:
            module.register_forward_hook(functools.partial(add, terms=terms))
    return samples(with_components(pipe, unet=denoiser))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of PEFT, for every second adapter
@pytest.mark.parametrize(
    "shorthand", ["w4a8", "w4a8-dynamic", pytest.param("w4a4-split-smooth", marks=pytest.mark.slow), "w4a4-svd2"]
)
def test_a_lora_is_loaded_onto_a_quantized_pipeline(shorthand: str, tmp_path: Path) -> None:
    base = quantize(original(), quick(shorthand), SD)
    codes, plain = fingerprint(base.unet), samples(base)
    pipe = with_components(base, unet=copy.deepcopy(base.unet))
    first, second = lora(1), lora(2, rank=3)
    pipe.load_lora_weights(dict(first), adapter_name="first")
    assert not close(samples(pipe), plain)
    assert close(samples(pipe), by_hand(base, (first, 1.0)))
    pipe.load_lora_weights(dict(second), adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 0.25])
    want = by_hand(base, (first, 0.5), (second, 0.25))
    assert close(samples(pipe), want)
    loaded = saved_and_loaded(pipe, tmp_path / "both")
    assert torch.equal(samples(loaded), samples(pipe))
    loaded.set_adapters("second")
    assert close(samples(loaded), by_hand(base, (second, 1.0)))
    loaded.disable_lora()
    assert close(samples(loaded), plain)
    loaded.unload_lora_weights()
    assert torch.equal(samples(loaded), plain)
    assert fingerprint(loaded.unet) == codes
    pipe.delete_adapters("second")
    pipe.set_adapters("first", 2.0)
    assert close(samples(pipe), by_hand(base, (first, 2.0)))
    pipe.unload_lora_weights()
    assert fingerprint(pipe.unet) == codes
    assert torch.equal(samples(saved_and_loaded(pipe, tmp_path / "none")), plain)


def test_a_lora_is_fused_into_a_branch_and_the_codes_stay(tmp_path: Path) -> None:
    base, first = quantized(), lora(1)
    pipe = quantized()
    pipe.load_lora_weights(dict(first), adapter_name="first")
    want = by_hand(base, (first, 0.5))
    pipe.fuse_lora(lora_scale=0.5)
    assert close(samples(pipe), want)
    assert torch.equal(samples(saved_and_loaded(pipe, tmp_path / "fused")), samples(pipe))
    other = with_components(pipe, unet=copy.deepcopy(pipe.unet))
    other.unfuse_lora()
    other.unload_lora_weights()
    assert fingerprint(other.unet) == fingerprint(base.unet)
    pipe.unload_lora_weights()
    assert close(samples(pipe), want)
    loaded = saved_and_loaded(pipe, tmp_path / "alone")
    assert torch.equal(samples(loaded), samples(pipe))
    codes = [site.weight.codes for site in quantized_sites(loaded.unet) if site.weight is not None]
    before = [site.weight.codes for site in quantized_sites(base.unet) if site.weight is not None]
    assert all(torch.equal(a, b) for a, b in zip(codes, before, strict=True))


@pytest.mark.parametrize(
    "shorthand", ["w4a8", pytest.param("w4a8-time-smooth-gptq-brecq", marks=pytest.mark.slow), "w4a8-split"]
)
def test_a_lora_that_is_loaded_before_stays_exact(shorthand: str, tmp_path: Path) -> None:
    pipe, first = own(), lora(1)
    pipe.load_lora_weights(dict(first), adapter_name="first")
    made = quantize(pipe, quick(shorthand), SD)
    weights = [value for name, value in made.unet.state_dict().items() if ".lora_" in name]
    known = [value for name, value in pipe.unet.state_dict().items() if ".lora_" in name]
    assert len(weights) == len(known) == len(first)
    assert all(torch.equal(a, b) for a, b in zip(weights, known, strict=True))
    assert set(coverage_of(made).quantized) >= {"conv_in", "mid_block.resnets.0.conv1"}
    assert made.unet.conv_in.weights.bits == 8
    error = (samples(made) - samples(pipe)).abs().mean()
    assert error < 0.6 * (samples(pipe) - samples(original())).abs().mean()
    assert torch.equal(samples(saved_and_loaded(made, tmp_path)), samples(made))
    corrected = correct(made, measure(pipe, made, SD), ("cnc", "bc"))
    assert torch.equal(samples(saved_and_loaded(corrected, tmp_path / "corrected")), samples(corrected))


@pytest.mark.parametrize("when", ["before", "saved"])
def test_a_lora_is_fused_whenever_it_was_loaded(when: str, tmp_path: Path) -> None:
    pipe, first = own(), lora(1)
    pipe.load_lora_weights(dict(first), adapter_name="first")
    made = quantize(pipe, quick("w4a8"), SD)
    if when == "saved":
        made = saved_and_loaded(made, tmp_path / "loaded")
    want = samples(made)
    pickled = pickle.loads(pickle.dumps(made))
    assert torch.equal(samples(pickled), want)
    made.fuse_lora()
    assert close(samples(made), want)
    made.unload_lora_weights()
    assert close(samples(saved_and_loaded(made, tmp_path / "fused")), want)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of PEFT, for every second adapter
def test_loras_of_other_layers_are_saved_as_each_is_fused(tmp_path: Path) -> None:
    pipe = quantized()
    linear = {name: value for name, value in lora(1).items() if "attn1" in name}
    convolution = {name: value for name, value in lora(2).items() if "conv1" in name}
    pipe.load_lora_weights(linear, adapter_name="first")
    pipe.load_lora_weights(convolution, adapter_name="second")
    pipe.set_adapters(["first", "second"])
    pipe.fuse_lora(adapter_names=["second"])
    assert torch.equal(samples(saved_and_loaded(pipe, tmp_path)), samples(pipe))


def test_a_lora_is_loaded_onto_flux(tmp_path: Path) -> None:
    """Whose loader looks for the layers' weights itself."""
    base = quantize(flux(), quick("w4a8"), FLUX)
    random, values = torch.Generator().manual_seed(3), dict[str, torch.Tensor]()
    for name, module in flux().transformer.named_modules():
        if name.endswith(("attn.to_q", "attn.to_k")):
            values[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=random)
            values[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=random)
    pipe = with_components(base, transformer=copy.deepcopy(base.transformer))
    pipe.load_lora_weights(dict(values), adapter_name="own")
    got = samples(pipe, FLUX)
    assert not torch.allclose(got, samples(base, FLUX), atol=1e-3)
    assert torch.equal(samples(saved_and_loaded(pipe, tmp_path), FLUX), got)
    pipe.unload_lora_weights()
    assert torch.equal(samples(pipe, FLUX), samples(base, FLUX))


def test_statistics_of_a_lora_are_of_its_scale() -> None:
    pipe = quantized()
    pipe.load_lora_weights(lora(1), adapter_name="first")
    full = own()
    full.load_lora_weights(lora(1), adapter_name="first")
    stats = measure(full, pipe, SD)
    pipe.set_adapters("first", 0.3)
    with pytest.raises(MismatchError, match="measured on another unet"):
        correct(pipe, stats, ("cnc", "bc"))


def test_layers_under_a_lora_are_explained() -> None:
    pipe = own()
    pipe.load_lora_weights(lora(1), adapter_name="first")
    reports = explain(pipe, quantize(pipe, quick("w4a8"), SD), SD)
    assert all(math.isfinite(report.error) for report in reports)


def test_a_lora_that_was_fused_before_is_part_of_the_weights() -> None:
    pipe, first = own(), lora(1)
    pipe.load_lora_weights(dict(first), adapter_name="first")
    pipe.fuse_lora()
    made = quantize(pipe, quick("w4a8"), SD)
    assert not [name for name in made.unet.state_dict() if "lora_" in name or "base_layer" in name]
    pipe.unload_lora_weights()
    assert fingerprint(made.unet) == fingerprint(quantize(pipe, quick("w4a8"), SD).unet)


def test_a_lora_on_a_corrected_pipeline_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = copy.deepcopy(corrected_once())
    pipe.load_lora_weights(lora(1), adapter_name="first")
    with caplog.at_level(logging.WARNING):
        samples(pipe)
    assert "the correction was measured with other LoRAs than are loaded now (first)" in caplog.text


def test_plans_and_costs_see_the_layers_under_a_lora() -> None:
    base = quantize(original(), quick("w4a4+8"), SD)
    steps = tuple(measure(original(), base, SD).measured_on.model_timesteps)
    plan = PrecisionPlan.uniform(steps, 8)
    want = run_cost(apply_plan(base, plan), SD).ratio
    pipe = with_components(base, unet=copy.deepcopy(base.unet))
    pipe.load_lora_weights(lora(1), adapter_name="first")
    planned = apply_plan(pipe, plan)
    assert close(samples(planned), by_hand(apply_plan(base, plan), (lora(1), 1.0)))
    assert run_cost(planned, SD).ratio == pytest.approx(want, rel=0.05)


@pytest.mark.slow
@pytest.mark.engines
@pytest.mark.parametrize("fused", [False, True], ids=["loaded", "fused"])
def test_a_lora_is_exported(fused: bool, tmp_path: Path) -> None:
    pipe, first = quantized(), lora(1)
    pipe.load_lora_weights(dict(first), adapter_name="first")
    if fused:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    made = export(pipe, SD, "onnxruntime", tmp_path / "made", others="none")
    got, want = samples(made.pipeline), samples(pipe)
    assert (got - want).abs().mean() < 0.2 * (want - samples(quantized_once())).abs().mean()
    assert torch.equal(samples(load(tmp_path / "made")), got)


# IP-Adapter and PAG


def ip_adapter() -> dict[str, Any]:
    """An IP-Adapter of random weights, of the published layout."""
    torch.manual_seed(7)
    denoiser, values = original().unet, dict[str, torch.Tensor]()
    number = 1
    for name, module in denoiser.named_modules():
        if name.endswith("attn2"):
            for what in ("k", "v"):
                values[f"{number}.to_{what}_ip.weight"] = torch.randn(module.to_k.weight.shape) * 0.2
            number += 2
    width = denoiser.config.cross_attention_dim
    image = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.randn(4 * width)}
    return {
        "image_proj": {**image, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": values,
    }


IP = SD.replace(
    call={**SD.call, "guidance_scale": 1.0},
    shared={"ip_adapter_image_embeds": [torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))]},
)


def test_an_ip_adapter_is_loaded_onto_a_quantized_pipeline_and_is_not_saved(tmp_path: Path) -> None:
    pipe = quantized()
    plain = IP.replace(shared={})
    before = samples(pipe, plain)
    pipe.unet._load_ip_adapter_weights([ip_adapter()])
    assert products(pipe) == 8
    with_image = samples(pipe, IP.replace(batch=1))
    full = own()
    full.unet._load_ip_adapter_weights([ip_adapter()])
    effect = samples(full, IP.replace(batch=1)) - samples(original(), plain)
    assert torch.cosine_similarity((with_image - before).flatten(), effect.flatten(), dim=0) > 0.6  # 0.78
    with pytest.raises(InputError, match=r"has an IP-Adapter .*; unload it"):
        pipe.save_pretrained(tmp_path / "not")
    pipe.unload_ip_adapter()
    assert torch.equal(samples(pipe, plain), before)
    assert torch.equal(samples(saved_and_loaded(pipe, tmp_path / "yes"), plain), before)


def test_a_pipeline_with_an_ip_adapter_is_quantized_around_it(tmp_path: Path) -> None:
    pipe, run = own(), IP.replace(batch=1)
    pipe.unet._load_ip_adapter_weights([ip_adapter()])
    made = quantize(pipe, quick("w8a8"), run)
    effect = (samples(pipe, run) - samples(original(), run.replace(shared={}))).abs().mean()
    assert (samples(made, run) - samples(pipe, run)).abs().mean() < 0.5 * effect
    before = samples(made, run)
    with pytest.raises(InputError, match="has an IP-Adapter"):
        made.save_pretrained(tmp_path / "not")
    assert torch.equal(samples(made, run), before)
    made = quantize(pipe, quick("w4a8"), IP.replace(batch=1))
    assert coverage_of(made).quantized == coverage_of(quantized_once()).quantized
    made.unload_ip_adapter()
    plain = IP.replace(shared={})
    assert torch.equal(samples(saved_and_loaded(made, tmp_path), plain), samples(made, plain))


def test_a_corrected_pipeline_notices_an_ip_adapter() -> None:
    pipe = copy.deepcopy(corrected_once())
    pipe.unet._load_ip_adapter_weights([ip_adapter()])
    embeds = IP.shared["ip_adapter_image_embeds"][0]
    run = IP.replace(call=SD.call, shared={"ip_adapter_image_embeds": [torch.cat([0 * embeds, embeds])]})
    with pytest.raises(MismatchError, match="an IP-Adapter, another model"):
        run_batch(pipe, run, range(1), "latent")


def test_perturbed_attention_is_quantized_measured_and_corrected(tmp_path: Path) -> None:
    pipe = d.StableDiffusionPAGPipeline(
        **original().components, pag_applied_layers=["mid"], requires_safety_checker=False
    )
    run = SD.replace(call={**SD.call, "pag_scale": 2.0})
    made = quantize(pipe, quick("w4a8-gptq"), run)
    assert products(made) == 8
    corrected = correct(made, measure(pipe, made, run), ("cnc", "bc"))
    want = samples(corrected, run)
    assert torch.equal(samples(saved_and_loaded(corrected, tmp_path), run), want)
    with pytest.raises(MismatchError, match="pag scale 2, the pipeline runs at 3"):
        samples(corrected, run.replace(call={**run.call, "pag_scale": 3.0}))


# From the shell


def test_the_shell_takes_the_pipelines_own_steps_and_keeps_floats(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    labelled().save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--samples", "3", "--device", "cpu", "--floats"]
    assert main([*command, "--out", str(tmp_path / "own")]) == 0
    kept = load_file(tmp_path / "own" / "samples.safetensors")
    assert kept["labels"].tolist() == [0, 1, 2]
    assert kept["latents"].dtype == torch.float32
    pictures = kept["latents"].movedim(1, -1).div(2).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(pictures, kept["images"])
    assert main([*command, "--steps", "1", "--out", str(tmp_path / "one")]) == 0
    assert torch.equal(load_file(tmp_path / "one" / "samples.safetensors")["latents"], kept["latents"])


def test_the_shell_gives_a_list_to_every_batch_and_a_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled().save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--samples", "3", "--batch", "2", "--device", "cpu"]
    assert main([*command, "--call", "timesteps=[9, 5, 0]", "--out", str(tmp_path / "three")]) == 0
    assert main([*command, "--steps", "3", "--out", str(tmp_path / "other")]) == 0
    images = [(tmp_path / name / "samples.safetensors").read_bytes() for name in ("three", "other")]
    assert images[0] != images[1]
    capsys.readouterr()
    given = ["--call", "class_labels=[1]", "--shared", "class_labels=[1]", "--out", str(tmp_path / "both")]
    assert main([*command, *given]) == 2
    assert "'class_labels' is given for every sample and for all; give it once" in capsys.readouterr().err
    given = ["--steps", "20", "--call", "timesteps=[9, 5, 0]", "--out", str(tmp_path / "twenty")]
    assert main([*command, *given]) == 2
    assert "--steps 20 and the 3 timesteps are one thing; give one of them" in capsys.readouterr().err
    assert main([*command, "--steps", "3", "--shared", "class_labels=[1]", "--out", str(tmp_path / "ones")]) == 0
    assert main([*command, "--steps", "3", "--call", "class_labels=[1]", "--out", str(tmp_path / "each")]) == 0
    assert (tmp_path / "ones" / "samples.safetensors").read_bytes() == (
        tmp_path / "each" / "samples.safetensors"
    ).read_bytes()


def test_images_that_are_no_fashion_are_not_judged_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled().save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--samples", "3", "--out", str(tmp_path / "out")]) == 0
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    assert "nothing judges these images; give --judge" in capsys.readouterr().err
