import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptqd import Quantizer, Sampling
from ptqd.bops import LayerCost, counting, image_cost, weight_bytes
from ptqd.components import with_components
from ptqd.layers import QuantAttnProcessor, QuantConv2d, QuantLinear
from ptqd.sampling import run_batch


def test_a_hand_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 5 * 5, 10))
    with counting(model) as costs:
        model(torch.zeros(2, 3, 5, 5))
    assert [c.macs for c in costs] == [2 * 8 * 25 * 27, 2 * 10 * 200]
    assert sum(c.bops for c in costs) == (2 * 8 * 25 * 27 + 2 * 10 * 200) * 1024


def test_bits_of_quantized_layers_by_hand() -> None:
    w4, a8 = Quantizer(4), Quantizer(8, symmetric=False)
    model = nn.Sequential(QuantConv2d(nn.Conv2d(4, 6, 3, groups=2), w4, a8), nn.Flatten())
    linear = QuantLinear(nn.Linear(6, 5), w4, a8)
    with counting(model) as conv, counting(linear) as product:
        model(torch.zeros(1, 4, 3, 3))
        linear(torch.zeros(7, 6))
    assert conv == [LayerCost("0", 6 * 2 * 9, 4, 8)]
    assert product == [LayerCost("", 7 * 5 * 6, 4, 8)]
    assert conv[0].bops == 6 * 18 * 32


def test_attention_products() -> None:
    attention = Attention(16, cross_attention_dim=6, heads=2, dim_head=8)
    attention.set_processor(QuantAttnProcessor(Quantizer(4, symmetric=False), 8))
    with counting(attention) as costs:
        attention(torch.zeros(3, 9, 16), encoder_hidden_states=torch.zeros(3, 5, 6))
    products = {c.name: c for c in costs if c.name.endswith((".qk", ".pv"))}
    assert {c.macs for c in products.values()} == {3 * 9 * 5 * 16}
    assert (products[".qk"].left_bits, products[".qk"].right_bits) == (4, 4)
    assert (products[".pv"].left_bits, products[".pv"].right_bits) == (8, 4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_agrees_with_torchs_flop_counter(pipe: Any, guidance: float) -> None:
    run = Sampling(steps=1, samples=1, batch=1, call={"class_labels": [1], "guidance_scale": guidance})
    pipe = with_components(pipe, unet=copy.deepcopy(pipe.unet))
    pipe.unet.set_attn_processor(AttnProcessor())  # torch counts plain products, not the fused ones
    macs = sum(c.macs for c in image_cost(pipe, run))
    with FlopCounterMode(display=False) as counter:
        run_batch(pipe, run, range(1), "latent")
    assert 2 * macs == counter.get_total_flops()


def test_guidance_doubles_and_bits_divide(pipe: Any, qpipe: Any) -> None:
    run = Sampling(steps=3, call={"class_labels": [1], "guidance_scale": 1.0})
    once = sum(c.bops for c in image_cost(pipe, run))
    twice = sum(c.bops for c in image_cost(pipe, run.replace(call={"class_labels": [1], "guidance_scale": 2.0})))
    assert twice == 2 * once
    ratio = once / sum(c.bops for c in image_cost(qpipe, run))
    assert 16 < ratio < 32  # w4a8 is 32 times fewer, but for the layers and products at 8 x 8


def test_bytes(pipe: Any, qpipe: Any) -> None:
    full = weight_bytes(pipe.unet)
    assert full == 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert 4 < full / weight_bytes(qpipe.unet) < 8
