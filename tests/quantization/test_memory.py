"""What a denoiser takes is counted before it is there, and is what it then takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import quick_recipe
from ptqd import Sampling, count_cost, keep_weights, quantize
from ptqd.experiments.report.cost import cost_json
from ptqd.quantization import memory, weights_in_memory
from ptqd.quantization.memory import calling_bytes
from ptqd.quantization.sites import quantized_layers
from ptqd.zoo import ARCHITECTURES

RUN = Sampling(2, 0.0, samples=2, batch=2, call={"class_labels": [0, 1], "guidance_scale": 2.0})


def held(model: nn.Module) -> int:
    """Bytes of the memory that its tensors are in, each once."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


@pytest.mark.parametrize("text", ["w4a8", "w8a8-affine", "wmxfp4a8"])
@pytest.mark.parametrize("large", [False, True])
def test_what_is_said_is_what_is_held(
    pipe: Any, text: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        for module in (weights_in_memory, memory):
            monkeypatch.setattr(module, "LARGE", 0)
    pipe.save_pretrained(tmp_path / "full")
    quantized: Any = quantize(pipe, quick_recipe(text, 1), RUN)
    keep_weights(quantized, "auto")
    told = count_cost(str(tmp_path / "full"), text, sampling=RUN).memory
    quantized.save_pretrained(tmp_path / "quantized")
    (file,) = (tmp_path / "quantized" / "unet").glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert told.disk == file.stat().st_size - header
    largest = max(layer.columns * layer.shape[0] for _, layer in quantized_layers(quantized.unet))
    room = told.resident - told.disk
    if large:
        assert held(quantized.unet) == pytest.approx(told.disk, rel=0.01)
        assert room == 4 * largest
    else:
        assert held(quantized.unet) == pytest.approx(told.resident, rel=0.01)
    full = held(pipe.unet)
    assert told.quantizing >= full + told.disk
    assert told.calling > 0


def test_a_call_takes_what_is_alive_at_once() -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.repeat(4)  # 4 parts are alive
            z = y + 1  # 8
            del y  # 4
            return z.view(4, -1).sum(0)  # 5

    x = torch.zeros(100, device="meta")
    assert calling_bytes(Network(), {"x": x}) == 8 * 400


def test_less_for_fewer_bits_and_more_for_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (count_cost("ldm8-churches", text, dtype=torch.bfloat16).memory for text in ("w4a8", "w8a8"))
    assert many.disk > 1.8 * few.disk
    assert many.resident - many.disk == few.resident - few.disk
    assert count_cost("ldm8-churches", "w4a8-gptq", dtype=torch.bfloat16).memory.quantizing > few.quantizing
    full = count_cost("ldm8-churches", dtype=torch.bfloat16).memory
    assert full.disk == full.resident == 2 * 294_966_916
    assert full.quantizing == 0


@pytest.mark.parametrize(
    "name", ["ddpm-cifar10-32", "dit-xl-2-256", "sana-1600m-1024", pytest.param("sdxl", marks=pytest.mark.slow)]
)
def test_published_architectures_are_counted_without_their_weights(name: str) -> None:
    plain = cost_json(count_cost(name, "w8a8", dtype=torch.bfloat16))
    parameters = {"ddpm-cifar10-32": 35.7, "dit-xl-2-256": 749.8, "sana-1600m-1024": 1604.5, "sdxl": 2567.5}[name]
    assert plain["parameters"] / 1e6 == pytest.approx(parameters, abs=0.1)
    assert plain["disk_bytes"] < plain["resident_bytes"] < plain["quantizing_bytes"]
    assert plain["calling_bytes"] > 0


def test_every_architecture_is_read() -> None:
    assert len(ARCHITECTURES) >= 15
    for path in ARCHITECTURES.values():
        assert json.loads(path.read_text("utf-8"))["_class_name"]
