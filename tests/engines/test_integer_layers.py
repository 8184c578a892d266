"""Layers that multiply integers in torch: exact sums of products, by torch's integer product and by our own kernels.

Kernels run on a GPU where there is one, else in Triton's interpreter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import quick_recipe
from ptqd import InputError, Sampling, correct, measure, quantize
from ptqd.diffusion import run_batch
from ptqd.engines import integer_layers
from ptqd.engines.integer_layers import IntegerLayer, with_integer_layers
from ptqd.engines.torchao import to_torchao
from ptqd.quantization.modules import QuantConv, QuantLinear
from ptqd.quantization.modules.linear_conv import LayerOptions
from ptqd.quantization.recipe import QuantSpec
from tiny import CASES as CASES_OF_PIPELINES
from tiny_more import MORE_CASES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("int_mm", "triton")
RUN = Sampling(2, 0.0, samples=2, batch=2, call={"class_labels": [0, 1], "guidance_scale": 2.0})


@pytest.fixture(autouse=True)
def _has_triton(request: pytest.FixtureRequest) -> None:
    if "triton" in request.node.name:
        pytest.importorskip("triton")


def exact(layer: Any, codes: torch.Tensor, zero: int) -> torch.Tensor:
    """Sums of products in float64, which holds them exactly; of codes channels last, less their zero point."""
    weight = layer.integer_weight().double()
    if layer.zero_point is not None:
        weight -= layer.zero_point.double().view(-1, *[1] * (weight.ndim - 1))
    values = codes.double() - zero
    if isinstance(layer, QuantLinear):
        return F.linear(values, weight)
    result = F.conv2d(values.movedim(-1, 1), weight, None, layer.stride, layer.padding, layer.dilation)
    return result.movedim(1, -1)


def frozen(layer: Any, weights: QuantSpec, activations: QuantSpec, x: torch.Tensor) -> Any:
    kind = QuantConv if isinstance(layer, nn.Conv2d) else QuantLinear
    quantized = kind(layer.to(DEVICE), weights, activations).to(DEVICE)
    quantized.observe()
    quantized(x)
    quantized.freeze()
    return quantized


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 3x3": (lambda: nn.Conv2d(5, 7, 3, padding=1), (2, 5, 6, 4)),
    "conv of a stride": (lambda: nn.Conv2d(40, 70, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 40, 9, 11)),
    "conv of a dilation": (lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2, bias=False), (1, 6, 7, 7)),
    "conv 1x1": (lambda: nn.Conv2d(33, 9, 1), (3, 33, 2, 2)),
    "linear": (lambda: nn.Linear(70, 67), (3, 5, 70)),
    "linear of one row": (lambda: nn.Linear(8, 16, bias=False), (1, 8)),
}
BITS = {
    "w8a8": (QuantSpec(8), QuantSpec(8, symmetric=False)),
    "w4a8": (QuantSpec(4), QuantSpec(8, symmetric=False)),
    "w4a8-affine": (QuantSpec(4, symmetric=False), QuantSpec(8)),
    "w3a4": (QuantSpec(3), QuantSpec(4, symmetric=False)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_sums_of_products_are_exact(case: str, bits: str, kernel: Any) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    x = torch.randn(shape, device=DEVICE) + 0.3
    layer = frozen(make(), *BITS[bits], x)
    integer = IntegerLayer(layer, kernel).to(DEVICE)
    codes, scale, zero = integer.layer(x)
    assert torch.equal((codes.float() - zero) * scale, layer.input(x))  # the simulation's codes, bit by bit
    channels_last = codes.movedim(1, -1) if isinstance(layer, QuantConv) else codes
    found = integer.products(channels_last.contiguous(), zero)
    assert found.dtype == torch.int32
    assert torch.equal(found.double(), exact(layer, channels_last, zero))
    with torch.no_grad():
        torch.testing.assert_close(integer(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_of_each_token(symmetric: bool, kernel: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 24, device=DEVICE) * torch.rand(2, 9, 1, device=DEVICE)
    layer = frozen(nn.Linear(24, 16), QuantSpec(8), QuantSpec(8, symmetric=symmetric, dynamic=True), x)
    with torch.no_grad():
        torch.testing.assert_close(IntegerLayer(layer, kernel).to(DEVICE)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("text", ["w8a8", pytest.param("w4a8-smooth", marks=pytest.mark.slow), "w4a8-affine-dynamic"])
def test_a_pipeline_gives_the_simulations_samples(pipe: Any, text: str, kernel: Any) -> None:
    quantized = quantize(pipe.to(DEVICE), quick_recipe(text), RUN)
    made, products = with_integer_layers(quantized, kernel)
    assert products.integer
    want, found = (torch.as_tensor(run_batch(each, RUN, range(2), "latent")) for each in (quantized, made))
    assert float((want - found).norm()) < 0.02 * float(want.norm())  # a sum that is rounded elsewhere moves few codes
    assert {reason for _, reason in products.floating} <= {
        "attention products",
        "ranges of each sample as they come",
        "8-bit weights with zero points",
    }


@pytest.mark.parametrize("engine", ["integer layers", "torchao"])
def test_a_corrected_pipeline_stays_corrected(pipe: Any, engine: str) -> None:
    quantized = quantize(pipe.to(DEVICE), quick_recipe("w8a8", attention=False), RUN)
    corrected = correct(quantized, measure(pipe, quantized, RUN.replace(samples=8)), methods=("cnc", "bc"))
    both = [
        with_integer_layers(each)[0] if engine == "integer layers" else to_torchao(each, RUN, "int8")[0]
        for each in (quantized, corrected)
    ]
    plain, want, before, found = (
        torch.as_tensor(run_batch(each, RUN, range(2), "latent")) for each in (quantized, corrected, *both)
    )
    moved = want - plain  # which in torchao, whose convolutions are not of integers, is the same nearly
    assert float((found - before - moved).norm()) < 0.5 * float(moved.norm())


def test_it_compiles_whole(pipe: Any) -> None:
    quantized = quantize(pipe.to(DEVICE), quick_recipe("w8a8", attention=False), RUN)
    made: Any = with_integer_layers(quantized)[0]
    want = torch.as_tensor(run_batch(made, RUN, range(2), "latent"))
    made.unet.compile(fullgraph=True, backend="eager")
    assert torch.equal(torch.as_tensor(run_batch(made, RUN, range(2), "latent")), want)


@pytest.mark.parametrize("name", ["sdxl", "wan", "flux", "sd3"])
def test_networks_that_look_at_their_layers(name: str) -> None:
    case = (CASES_OF_PIPELINES | MORE_CASES)[name]
    full: Any = case.build()
    full.set_progress_bar_config(disable=True)
    run = Sampling(case.steps, 0.0, 2, 2, call=dict(case.call))
    made = with_integer_layers(quantize(full, quick_recipe("w8a8-smooth", 1), run))[0]
    assert torch.as_tensor(run_batch(made, run, range(2), "latent")).isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_in_half_precision(dynamic: bool, kernel: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 512, device=DEVICE)
    layer = frozen(nn.Linear(512, 64), QuantSpec(8), QuantSpec(8, dynamic=dynamic), x)
    integer = IntegerLayer(layer, kernel).to(device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(integer(x.half()).float(), layer(x), rtol=1e-2, atol=1e-2)


def test_smoothing_moves_along() -> None:
    layer = QuantLinear(nn.Linear(8, 4), QuantSpec(8), QuantSpec(8), extras=LayerOptions(smooth=True))
    integer = IntegerLayer(layer, "int_mm")
    assert not any(isinstance(value, QuantLinear) for module in integer.modules() for value in vars(module).values())
    moved = integer.to("meta")
    assert moved.layer.smooth_scale is not None
    assert moved.layer.smooth_scale.is_meta


def test_what_it_refuses(pipe: Any) -> None:
    with pytest.raises(InputError, match="the unet is not quantized; quantize it with ptqd first"):
        with_integer_layers(pipe)
    with pytest.raises(InputError, match="unknown kernel 'cutlass'; known are int_mm, triton"):
        with_integer_layers(pipe, "cutlass")  # type: ignore[arg-type]
    assert integer_layers.KERNELS == KERNELS
