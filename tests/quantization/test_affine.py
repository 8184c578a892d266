import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqd import InputError
from ptqd.quantization.numerics import (
    Grid,
    affine_parameters,
    check_weight_bits,
    dequantize_affine,
    fake_quantize,
    pack,
    quantize_affine,
    unpack,
)

bits = st.integers(2, 8)  # that are packed
grids = st.builds(Grid, bits, st.booleans())
arrays = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32, allow_nan=False, allow_infinity=False)
)


@given(arrays, grids)
def test_error_is_at_most_half_a_scale_inside_the_range(values: np.ndarray, grid: Grid) -> None:
    x = torch.from_numpy(values)
    scale, zero = affine_parameters(x.min(), x.max(), grid)
    low, high = scale * (grid.qmin - zero), scale * (grid.qmax - zero)
    inside = (x >= low) & (x <= high)
    error = (fake_quantize(x, scale, zero, grid) - x).abs()[inside]
    assert bool((error <= scale / 2 * (1 + 1e-4) + x.abs()[inside] * 1e-6).all())


@given(arrays, grids)
def test_codes_stay_on_the_grid_and_say_what_the_simulation_says(values: np.ndarray, grid: Grid) -> None:
    x = torch.from_numpy(values)
    scale, zero = affine_parameters(x.min(), x.max(), grid)
    codes = quantize_affine(x, scale, zero, grid)
    assert int(codes.min()) >= grid.qmin
    assert int(codes.max()) <= grid.qmax
    assert torch.equal(dequantize_affine(codes, scale, zero), fake_quantize(x, scale, zero, grid))


@given(grids, st.integers(0, 70), st.integers(0, 2**31))
def test_unpack_inverts_pack_at_the_claimed_size(grid: Grid, count: int, seed: int) -> None:
    codes = torch.randint(grid.qmin, grid.qmax + 1, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, grid)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(count * grid.bits / 8)
    assert torch.equal(unpack(packed, grid, count).long(), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_agrees_with_torch_fake_quantize(symmetric: bool, width: int) -> None:
    grid = Grid(width, symmetric)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(width)) * 3
    scale, zero = affine_parameters(x.min() / 2, x.max() / 2, grid)
    oracle = torch.fake_quantize_per_tensor_affine(x, scale, zero, grid.qmin, grid.qmax)
    ours = fake_quantize(x, scale, zero, grid)
    same = torch.isclose(ours, oracle, rtol=1e-6, atol=0)
    assert same.float().mean() > 0.999  # torch multiplies by the inverse scale: ties may fall the other way
    assert bool(((ours - oracle).abs() <= scale * 1.001).all())


def test_agrees_with_torch_per_channel() -> None:
    grid = Grid(4, symmetric=True)
    x = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    scale, zero = affine_parameters(x.amin(1), x.amax(1), grid)
    oracle = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, grid.qmin, grid.qmax)
    ours = fake_quantize(x, scale[:, None], zero[:, None], grid)
    assert torch.isclose(ours, oracle, rtol=1e-6, atol=0).float().mean() > 0.999


@settings(max_examples=30)
@given(grids, st.sampled_from([0.0, 1.0, -3.5, 1e-30, 3e38]))
def test_constant_and_zero_tensors_have_finite_codes(grid: Grid, value: float) -> None:
    x = torch.full((3,), value)
    scale, zero = affine_parameters(x.min(), x.max(), grid)
    assert 0 < scale.item() < math.inf
    restored = dequantize_affine(quantize_affine(x, scale, zero, grid), scale, zero)
    assert bool(torch.isfinite(restored).all())
    assert bool(((restored - x).abs() <= scale / 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ranges_and_tensors_that_are_no_numbers_are_refused(bad: float) -> None:
    grid = Grid(8, symmetric=False)
    with pytest.raises(InputError, match="NaN or infinite"):
        affine_parameters(torch.tensor(0.0), torch.tensor(bad), grid)


def test_nan_has_no_code() -> None:
    grid = Grid(8, symmetric=True)
    with pytest.raises(InputError, match="holds NaN"):
        quantize_affine(torch.tensor([1.0, math.nan]), torch.tensor(1.0), torch.tensor(0), grid)
    assert quantize_affine(torch.tensor([math.inf]), torch.tensor(1.0), torch.tensor(0), grid).item() == grid.qmax


@pytest.mark.parametrize("width", [1, 17, 0])
def test_bits_outside_two_to_sixteen_are_refused(width: int) -> None:
    with pytest.raises(InputError, match="bits must be 2 to 16"):
        Grid(width, symmetric=True)


@pytest.mark.parametrize("width", [1, 9, 16])
def test_weights_of_other_than_two_to_eight_bits_are_refused(width: int) -> None:
    with pytest.raises(InputError, match="weights' bits must be 2 to 8"):
        check_weight_bits(width)


def test_unpack_refuses_a_truncated_buffer() -> None:
    with pytest.raises(InputError, match="take 5 bytes"):
        unpack(torch.zeros(4, dtype=torch.uint8), Grid(4, symmetric=True), 10)
