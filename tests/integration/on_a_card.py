"""What ptqd does with a GPU, on a device that stands in for one; see :mod:`card`.

PYTHONPATH=tests python tests/integration/on_a_card.py PART        # "quick", "offloaded" or "there"
"""

import contextlib
import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import test_devices
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from peft import LoraConfig
from safetensors.torch import load_file
from test_devices import RUN, latents, near, quick
from torch import nn

import card
import ptqd.quantization.quantize
from conftest import tiny_pipeline
from ptqd import Budget, PrecisionPlan, Sampling, apply_plan, correct, explain, load, measure, quantize
from ptqd.diffusion import run_batch
from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.offload import bring_like, send_home, stay, weights_left_behind
from ptqd.mixed_precision import measure_sensitivity
from ptqd_cli.main import main


def whole(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="card")


def layer_by_layer(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="card")


def in_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("card"), torch.device("cpu"), offload_type="leaf_level")


def offloaded_pipelines_are_quantized_on_the_card() -> None:
    compare_with_the_cpu({"w8a8": (whole, layer_by_layer, in_groups)})


def their_codes_are_the_cpus() -> None:
    compare_with_the_cpu({"w4a8-smooth-gptq": (layer_by_layer,), "w4a8-time-steps2": (in_groups,)})


def compare_with_the_cpu(recipes: dict[str, tuple[Any, ...]]) -> None:
    base = tiny_pipeline()
    for text, offloads in recipes.items():
        want = quantize(base, quick(text), RUN)
        for offload in offloads:
            pipe = copy.deepcopy(base)
            offload(pipe)
            card.memory.most = card.memory.now
            made = quantize(pipe, quick(text), RUN)
            assert card.memory.most > card.memory.now
            assert {x.device.type for x in made.unet.state_dict().values()} == {"cpu"}
            for (name, x), y in zip(made.unet.state_dict().items(), want.unet.state_dict().values(), strict=True):
                assert torch.equal(x, y), (text, offload.__name__, name)
            assert torch.equal(latents(made), latents(want))  # brought to the card as it was


def what_is_learned_is_nearly_the_same() -> None:
    base = tiny_pipeline()
    pipe = copy.deepcopy(base)
    whole(pipe)
    made, want = (quantize(each, quick("w4a4-best"), RUN) for each in (pipe, base))
    assert near(latents(made), latents(want), 1e-3)
    pipe = copy.deepcopy(base)
    layer_by_layer(pipe)
    made, want = (quantize(each, quick("w4a8-brecq"), RUN) for each in (pipe, base))
    assert near(latents(made), latents(want), 0.05)  # Adam's last bits: 2 codes of 31,008 are others


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
    for text in ("w8a8", "w4a8-smooth", "w4a4-wide"):
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
    found, reports = ({each.name: each.effect for each in explain(*two, RUN)} for two in ((pipe, qpipe), (base, qbase)))
    assert found.keys() == reports.keys()
    assert all(abs(found[name] - effect) <= 1e-2 * effect + 1e-12 for name, effect in reports.items())
    shares = measure_sensitivity(pipe, qpipe, RUN, weight_bits=(4, 8)).weights
    assert near(shares, measure_sensitivity(base, qbase, RUN, weight_bits=(4, 8)).weights, 1e-3)
    corrected = latents(correct(qpipe, stats, ("cnc", "bc")))
    assert near(corrected, latents(correct(qbase, want, ("cnc", "bc"))), 1e-3)


def what_it_takes_is_told_and_kept() -> None:
    base = tiny_pipeline()
    pipe = copy.deepcopy(base)
    whole(pipe)
    budget = Budget(memory=8 << 30)  # of the process: the stand-in counts none
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = quantize(pipe, quick("w4a8-smooth-gptq-distill"), RUN, budget=budget, progress=True)
    assert near(latents(made), latents(quantize(base, quick("w4a8-smooth-gptq-distill"), RUN)), 1e-2)


def a_quantized_one_lives_on() -> None:
    pipe = tiny_pipeline()
    layer_by_layer(pipe)
    made: Any = quantize(pipe, quick("w8a8"), RUN)
    want = latents(made)

    def interrupt(module: object, args: object) -> None:
        raise KeyboardInterrupt

    hook = made.unet.mid_block.resnets[0].conv1.register_forward_pre_hook(interrupt)
    with hooked(hook), contextlib.suppress(KeyboardInterrupt):
        latents(made)
    send_home(made.unet)
    now = card.memory.now
    assert torch.equal(latents(made), want)
    assert card.memory.now == now
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.equal(latents(made), want)  # layers that came later are brought too
    unet = copy.deepcopy(made.unet).to("card")
    x, context = torch.randn(1, unet.config.in_channels, 8, 8), torch.randn(1, 1, unet.config.cross_attention_dim)
    with torch.no_grad():
        there = unet(x.to("card"), 1, context.to("card"))[0]
        assert torch.equal(there.cpu(), made.unet(x, 1, context)[0])
        stay(unet.to("cpu"))
        before = card.memory.most = card.memory.now
        unet(x, 1, context)
        assert card.memory.most == before


def a_gradient_comes_home() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(8)]
    network, like = nn.Sequential(*layers), nn.Linear(1, 1)
    cpu_offload_with_hook(like, "card")
    bring_like(network, like)
    x = torch.randn(2, 64)
    network(x).sum().backward()
    own = [parameter.grad for parameter in network.parameters()]
    plain = copy.deepcopy(network)
    stay(plain)
    want = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    assert all(a is not None and torch.allclose(a, b, rtol=1e-4) for a, b in zip(own, want, strict=True))
    x = x.requires_grad_()
    card.memory.most = now = card.memory.now
    with weights_left_behind(network):
        output = network(x).sum()
        assert card.memory.now - now < 2 * 64 * 64 * 4
        output.backward()
    assert card.memory.most - now < 3 * 64 * 64 * 4
    assert all(parameter.requires_grad for parameter in network.parameters())


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
    "quick": (offloaded_pipelines_are_quantized_on_the_card, a_gradient_comes_home, a_quantized_one_lives_on),
    "offloaded": (
        their_codes_are_the_cpus,
        a_layer_at_a_time_is_there,
        offloaded_pipelines_go_the_whole_way,
        what_it_takes_is_told_and_kept,
        commands_offload,
        what_is_learned_is_nearly_the_same,
    ),
    "there": (pipelines_on_the_card,),
}

if __name__ == "__main__":
    for each in PARTS[sys.argv[1]]:
        each()
        print("done:", each.__name__, flush=True)
