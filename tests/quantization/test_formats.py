import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqd import InputError, QuantSpec
from ptqd.quantization.numerics import (
    BLOCKS,
    Format,
    WeightGrid,
    block_codes,
    block_scales,
    fake_blocks,
    float_codes,
    float_values,
    groups_of,
    round_float,
    rounded_weight,
)

FORMATS: tuple[Format, ...] = ("e4m3", "e5m2", "mxfp4", "nvfp4")


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape, generator=generator).mul(6).exp()


def test_e2m1_is_torchaos() -> None:
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

    x = torch.cat([torch.linspace(-8, 8, 4097), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    theirs = f4_unpacked_to_f32(f32_to_f4_unpacked(x))
    assert torch.equal(round_float(x, "mxfp4"), theirs)
    codes = float_codes(round_float(x, "mxfp4"), "mxfp4")
    assert torch.equal(codes.to(torch.uint8), f32_to_f4_unpacked(x))


def test_mxfp4_is_torchaos() -> None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    x = numbers(0, 8, 96)
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(fake_blocks(x, "mxfp4", 1), theirs)


def test_nvfp4_is_torchaos() -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = numbers(1, 32, 64)
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max())).dequantize(torch.float32)
    difference = (fake_blocks(x[None], "nvfp4", 2)[0] - theirs).abs().max() / x.abs().max()
    assert difference < 1e-6  # they divide in another order


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_eight_bits_are_torchs(kind: Format) -> None:
    x = numbers(2, 1000)
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    limit = torch.finfo(dtype).max
    assert torch.equal(round_float(x, kind), x.clamp(-limit, limit).to(dtype).float())


@pytest.mark.parametrize("kind", FORMATS)
@given(seed=st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_codes_give_the_numbers_back(kind: Format, seed: int) -> None:
    x = round_float(numbers(seed, 64), kind)
    assert torch.equal(float_values(float_codes(x, kind), kind), x)
    assert torch.equal(round_float(x, kind), x)


def test_a_short_last_block_and_zeros() -> None:
    x = numbers(3, 4, 37)
    whole = torch.nn.functional.pad(x, (0, 27))
    assert torch.equal(fake_blocks(x, "mxfp4", 1), fake_blocks(whole, "mxfp4", 1)[:, :37])
    kinds: tuple[Format, ...] = ("mxfp4", "nvfp4")
    for kind in kinds:
        assert torch.equal(fake_blocks(torch.zeros(2, 40), kind, 1), torch.zeros(2, 40))
    assert torch.equal(fake_blocks(x.T, "mxfp4", 0), fake_blocks(x, "mxfp4", 1).T)
    for kind in kinds:  # whoever is with a sample
        assert torch.equal(fake_blocks(x[:, None], kind, 2)[1:2], fake_blocks(x[1:2, None], kind, 2))


def test_block_scales_round_trip() -> None:
    largest = torch.tensor([0.0, 1e-30, 0.5, 6.0, 7.0, 1e6])
    assert block_scales(*block_codes(largest, "mxfp4"), "mxfp4")[2:].tolist() == [0.125, 1.0, 1.0, 2.0**17]
    scale = block_scales(*block_codes(largest, "nvfp4"), "nvfp4")
    assert scale[-1].item() == pytest.approx(1e6 / 6)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(4), QuantSpec(3, symmetric=False), QuantSpec(4, group=8), *(QuantSpec(format=kind) for kind in FORMATS)],
    ids=str,
)
def test_a_grid_codes_what_it_rounds(spec: QuantSpec) -> None:
    rows = numbers(4, 6, 48)
    grid = WeightGrid.find(rows, spec)
    assert torch.equal(grid.values(grid.codes(rows)), grid.rounded(rows))
    assert torch.equal(grid.rounded(grid.rounded(rows)), grid.rounded(rows))
    assert (grid.codes(rows) >= spec.grid.qmin).all()
    assert (grid.codes(rows) <= spec.grid.qmax).all()
    assert torch.equal(rounded_weight(torch.zeros(2, 48), spec), torch.zeros(2, 48))
    with pytest.raises(InputError, match="NaN or infinite"):
        WeightGrid.find(torch.full((1, 48), float("inf")), spec)


def test_groups_have_scales_of_their_own() -> None:
    rows = torch.cat([torch.randn(3, 16), 100 * torch.randn(3, 16)], 1)
    whole, split = (rounded_weight(rows, QuantSpec(4, group=group)) for group in (0, 16))
    assert (split - rows)[:, :16].square().mean() < (whole - rows)[:, :16].square().mean() / 100
    assert groups_of(32, QuantSpec(4, group=8)) == (4, 8)
    assert groups_of(40, QuantSpec(format="mxfp4")) == (2, BLOCKS["mxfp4"])
    with pytest.raises(InputError, match="groups of 12 do not divide its 32 inputs; choose one of 2, 4, 8, 16, 32"):
        groups_of(32, QuantSpec(4, group=12))


def test_formats_are_strict() -> None:
    assert QuantSpec(format="mxfp4").bits == 4
    with pytest.raises(InputError, match="mxfp4 has 4 bits; got 8"):
        QuantSpec(8, format="mxfp4")
    with pytest.raises(InputError, match="group must be at least 1"):
        QuantSpec(group=-1)
