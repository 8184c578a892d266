from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from ptqd import InputError, QuantSpec
from ptqd.quantization.modules import ActivationQuantizer, AttentionProducts, QuantConv, QuantLayer, QuantLinear
from ptqd.quantization.modules.attention import quantize_attention

W4 = QuantSpec(4, symmetric=True, range="minmax")
W4_AFFINE = QuantSpec(4, symmetric=False, range="minmax")
A8 = QuantSpec(8, symmetric=False, range="minmax")


def oracle_weight(weight: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """4-bit weights per output channel, by torch's own fake quantization."""
    rows = weight.detach().flatten(1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if symmetric:
        scale, zero, ends = torch.maximum(-low, high) / 7, torch.zeros(len(rows), dtype=torch.int32), (-8, 7)
    else:
        scale, ends = (high - low) / 15, (0, 15)
        zero = (-low / scale).round().int()
    return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, *ends).view_as(weight)


def oracle_input(x: torch.Tensor) -> torch.Tensor:
    scale = (x.max() - x.min()) / 255
    zero = (-x.min() / scale).round().int()
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def frozen(layer: QuantLayer, x: torch.Tensor) -> QuantLayer:
    layer.observe()
    layer(x)
    layer.freeze()
    return layer


@pytest.mark.parametrize("weights", [W4, W4_AFFINE])
def test_linear_is_torchs_fake_quantization(weights: QuantSpec) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(12, 7), torch.randn(50, 12)
    quantized = frozen(QuantLinear(plain, weights, A8), x)
    want = F.linear(oracle_input(x), oracle_weight(plain.weight, weights.symmetric), plain.bias)
    assert torch.allclose(quantized(x), want, atol=2e-2)  # one 8-bit code may round the other way
    assert (quantized(x) - want).abs().mean() < 1e-4
    assert (quantized(x) - plain(x)).abs().max() > 0.05


def test_convolution_is_torchs_fake_quantization() -> None:
    torch.manual_seed(0)
    plain, x = nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=1, groups=2), torch.randn(4, 6, 9, 9)
    quantized = frozen(QuantConv(plain, W4, A8), x)
    want = F.conv2d(oracle_input(x), oracle_weight(plain.weight, True), plain.bias, (2, 2), (1, 1), (1, 1), 2)
    assert (quantized(x) - want).abs().mean() < 1e-4


def test_observing_is_full_precision() -> None:
    plain, x = nn.Linear(5, 3), torch.randn(9, 5)
    layer = QuantLinear(plain, W4, A8)
    layer.observe()
    assert torch.equal(layer(x), plain(x))


def test_the_weight_is_what_its_codes_say() -> None:
    torch.manual_seed(0)
    layer = frozen(QuantLinear(nn.Linear(10, 4), W4_AFFINE, A8), torch.randn(3, 10))
    assert layer.zero_point is not None
    want = layer.scale[:, None] * (layer.integer_weight().float() - layer.zero_point.float()[:, None])
    assert torch.equal(layer.weight, want)
    assert layer.codes.numel() == 20
    assert set(layer.state_dict()) == {"codes", "scale", "zero_point", "bias", "input.scale", "input.zero_point"}


def test_loading_a_state_dict_restores_the_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 10)
    layer = frozen(QuantLinear(nn.Linear(10, 4), W4, A8), x)
    other = frozen(QuantLinear(nn.Linear(10, 4), W4, A8), 2 * x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("context", [None, 6])
@pytest.mark.parametrize("shape", [(2, 9, 16), (2, 16, 3, 3)])
def test_attention_observed_is_diffusers_own(context: int | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attention = Attention(16, cross_attention_dim=context, heads=2, dim_head=8, residual_connection=len(shape) == 4)
    x = torch.randn(shape)
    tokens = None if context is None else torch.randn(2, 5, context)
    want = attention(x, encoder_hidden_states=tokens)
    processor = AttentionProducts(QuantSpec(8, symmetric=False), 8)
    quantize_attention(attention, processor)
    processor.observe()
    assert torch.allclose(attention(x, encoder_hidden_states=tokens), want, atol=1e-5)
    processor.freeze()
    got = attention(x, encoder_hidden_states=tokens)
    assert 1e-5 < (got - want).abs().max() < 0.1
    assert processor.probabilities.scale.item() <= 1 / 255 + 1e-6


MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
MASK[0, 0, 2] = False  # a query that sees no key
PRODUCTS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 5, 4), (2, 3, 7, 4), {}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"scale": 0.3}),
    ((5, 4), (7, 4), {"is_causal": True}),
    ((2, 5, 4), (2, 7, 4), {}),
    ((2, 6, 5, 4), (2, 3, 7, 4), {"enable_gqa": True}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": MASK}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": torch.where(MASK, 0.5, -torch.inf)}),
    ((2, 3, 0, 4), (2, 3, 7, 4), {}),
]


@pytest.mark.parametrize(("query", "key", "how"), PRODUCTS)
def test_attention_products_in_full_precision_are_torchs(
    query: tuple[int, ...], key: tuple[int, ...], how: dict[str, Any]
) -> None:
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=random) for shape in (query, key, key))
    products = AttentionProducts(QuantSpec(8, symmetric=False), 8)
    products.bypass()
    want = F.scaled_dot_product_attention(q, k, v, **how)
    assert torch.allclose(products(q, k, v, **how), want, atol=1e-6)


def test_attention_takes_a_mask() -> None:
    torch.manual_seed(0)
    attention = Attention(16, heads=2, dim_head=8)
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 1, 5)
    mask[..., 3:] = -10000.0
    want = attention(x, attention_mask=mask)
    processor = AttentionProducts(QuantSpec(8, symmetric=False), 8)
    quantize_attention(attention, processor)
    processor.observe()
    assert torch.allclose(attention(x, attention_mask=mask), want, atol=1e-5)


def test_attention_gets_what_its_spatial_norm_needs() -> None:
    torch.manual_seed(0)
    attention = Attention(32, heads=2, dim_head=16, spatial_norm_dim=4)
    x, latents = torch.randn(2, 32, 6, 6), torch.randn(2, 4, 3, 3)
    want = attention(x, temb=latents)
    processor = AttentionProducts(QuantSpec(8, symmetric=False), 8)
    quantize_attention(attention, processor)
    processor.observe()
    assert torch.allclose(attention(x, temb=latents), want, atol=1e-5)


def test_a_convolution_of_one_place_has_dynamic_ranges_of_each_place() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 1)
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None, None])
        conv.bias.copy_(linear.bias)  # type: ignore[union-attr]
    dynamic = QuantSpec(4, symmetric=False, dynamic=True)
    x = torch.randn(2, 6, 5, 3) * torch.tensor([0.1, 1.0, 10.0])
    tokens = x.movedim(1, -1)
    made = frozen(QuantConv(conv, W4, dynamic), x)
    want = frozen(QuantLinear(linear, W4, dynamic), tokens)(tokens)
    assert torch.allclose(made(x).movedim(1, -1), want, atol=1e-5)


def test_constant_activations_and_dead_channels_stay_finite() -> None:
    plain = nn.Linear(4, 3)
    plain.weight.data[1] = 0
    layer = frozen(QuantLinear(plain, W4, A8), torch.zeros(2, 4))
    assert bool(torch.isfinite(layer(torch.ones(2, 4))).all())
    assert bool((layer.weight[1] == 0).all())


def test_freezing_without_observing_is_an_error() -> None:
    with pytest.raises(InputError, match="needs observe"):
        ActivationQuantizer(A8).freeze()
    quantizer = ActivationQuantizer(A8)
    quantizer.observe()
    with pytest.raises(InputError, match="never run during calibration"):
        quantizer.freeze()


def test_padding_modes_without_a_quantized_form_are_refused() -> None:
    with pytest.raises(InputError, match="padding_mode='circular'"):
        QuantConv(nn.Conv2d(1, 1, 3, padding_mode="circular"), W4, A8)
