"""What ptqd does with a GPU, on a device that stands in for one; see :mod:`card`.

PYTHONPATH=tests python tests/integration/on_a_card.py PART        # "offloaded" or "there"
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import test_devices
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file
from test_devices import RUN, latents, near, quick

import card
import ptqd.quantization.quantize
from conftest import tiny_pipeline
from ptqd import PrecisionPlan, Sampling, apply_plan, correct, explain, load, measure, quantize
from ptqd.diffusion import run_batch
from ptqd.mixed_precision import measure_sensitivity
from ptqd_cli.main import main


def whole(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="card")


def layer_by_layer(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="card")


def in_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("card"), torch.device("cpu"), offload_type="leaf_level")


def offloaded_pipelines_are_quantized_on_the_card() -> None:
    base = tiny_pipeline()
    offloads = (whole, layer_by_layer, in_groups)
    for text, kinds in {"w8a8": offloads, "w4a8-smooth-gptq": offloads[1:2], "w4a8-time-steps2": offloads[2:]}.items():
        want = quantize(base, quick(text), RUN)
        for offload in kinds:
            pipe = copy.deepcopy(base)
            offload(pipe)
            card.memory.most = card.memory.now
            made = quantize(pipe, quick(text), RUN)
            assert card.memory.most > card.memory.now
            assert {x.device.type for x in made.unet.state_dict().values()} == {"cpu"}
            for (name, x), y in zip(made.unet.state_dict().items(), want.unet.state_dict().values(), strict=True):
                assert torch.equal(x, y), (text, offload.__name__, name)
            assert torch.equal(latents(made), latents(want))  # brought to the card as it was


def what_is_learned_of_one_is_nearly_the_same() -> None:
    base = tiny_pipeline()
    pipe = copy.deepcopy(base)
    whole(pipe)
    made, want = (quantize(each, quick("w4a4-best"), RUN) for each in (pipe, base))
    assert near(latents(made), latents(want), 1e-3)
    pipe = copy.deepcopy(base)
    layer_by_layer(pipe)
    made, want = (quantize(each, quick("w4a8-rotate-svd2x8-brecq"), RUN) for each in (pipe, base))
    assert near(latents(made), latents(want), 1e-3)


def wide_pipeline() -> Any:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet, DDIMScheduler())


def a_layer_at_a_time_is_there() -> None:
    run = Sampling(2, 0.0, samples=4, batch=1)
    size = sum(x.numel() * x.element_size() for x in wide_pipeline().unet.parameters())
    largest = max(x.numel() * x.element_size() for x in wide_pipeline().unet.parameters())
    for text in ("w4a8-smooth", "w4a4-wide"):
        pipe = wide_pipeline()
        whole(pipe)
        card.memory.most = card.memory.now
        made = quantize(pipe, quick(text), run)
        print(f"{text}: {card.memory.most / size:.2f} of the weights at most, the largest is {largest / size:.2f}")
        assert card.memory.most < size / 3
        made.save_pretrained(folder := tempfile.mkdtemp())
        pictures = [torch.as_tensor(run_batch(each, run, range(2))) for each in (made, load(folder))]
        assert torch.equal(*pictures)


def offloaded_pipelines_go_the_whole_way() -> None:
    base = tiny_pipeline()
    pipe, qbase = copy.deepcopy(base), quantize(base, quick("w4a4+8"), RUN)
    whole(pipe)
    qpipe = quantize(pipe, quick("w4a4+8"), RUN)
    stats, want = measure(pipe, qpipe, RUN), measure(base, qbase, RUN)
    assert near(stats.moments, want.moments, 1e-3)
    plan = PrecisionPlan.uniform(tuple(stats.measured_on.model_timesteps), 8)
    assert torch.equal(latents(apply_plan(qpipe, plan, pipe)), latents(apply_plan(qbase, plan, base)))
    reports = zip(explain(pipe, qpipe, RUN), explain(base, qbase, RUN), strict=True)
    assert all(a.name == b.name and abs(a.effect - b.effect) <= 1e-3 * b.effect + 1e-12 for a, b in reports)
    shares = measure_sensitivity(pipe, qpipe, RUN, weight_bits=(4, 8)).weights
    assert near(shares, measure_sensitivity(base, qbase, RUN, weight_bits=(4, 8)).weights, 1e-3)
    corrected = latents(correct(qpipe, stats, ("cnc", "bc")))
    assert near(corrected, latents(correct(qbase, want, ("cnc", "bc"))), 1e-3)


def commands_offload() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny_pipeline().save_pretrained(folder / "model")
    options = ["--steps", "2", "--batch", "2", "--device", "card", "--offload"]
    model, quantized, plain = (str(folder / name) for name in ("model", "quantized", "plain"))
    main(["quantize", model, "--recipe", "w8a8", "--out", quantized, *options])
    main(["quantize", model, "--recipe", "w8a8", "--out", plain, *options[:4], "--device", "cpu"])
    weights = [load_file(Path(each) / "unet/diffusion_pytorch_model.safetensors") for each in (quantized, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    main(["measure", model, quantized, "--out", str(folder / "noise.safetensors"), "--samples", "4", *options])
    main(["run", model, "--recipe", "w8a8", "--samples", "4", "--out", str(folder / "run"), *options])


def pipelines_on_the_card() -> None:
    """What ``make test-gpu`` does on a GPU."""
    test_devices.DEVICE = "card"
    ptqd.quantization.quantize.check_full_precision = lambda model, name: None  # type: ignore[attr-defined]
    pipe = tiny_pipeline()
    for text in test_devices.RECIPES:
        test_devices.test_quantized_there(copy.deepcopy(pipe).to("card"), pipe, text, Path(tempfile.mkdtemp()))
    test_devices.test_measured_corrected_and_planned_there(copy.deepcopy(pipe).to("card"))


PARTS = {
    "offloaded": (
        offloaded_pipelines_are_quantized_on_the_card,
        a_layer_at_a_time_is_there,
        offloaded_pipelines_go_the_whole_way,
        commands_offload,
    ),
    "there": (pipelines_on_the_card, what_is_learned_of_one_is_nearly_the_same),
}

if __name__ == "__main__":
    for each in PARTS[sys.argv[1]]:
        each()
        print("done:", each.__name__, flush=True)
