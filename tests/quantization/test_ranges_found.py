import math

import pytest
import torch

from ptqd import InputError
from ptqd.quantization.numerics import Grid, Observer, RangeMethod, affine_parameters, fake_quantize, find_range

AFFINE = Grid(4, symmetric=False)


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, p: float) -> float:
    scale, zero = affine_parameters(low, high, grid)
    return (fake_quantize(x, scale, zero, grid) - x).abs().pow(p).mean().item()


def test_minmax_is_the_extremes() -> None:
    x = torch.tensor([[1.0, -2.0, 5.0], [0.0, 0.0, 0.0]])
    low, high = find_range(x, AFFINE, "minmax")
    assert low.tolist() == [-2, 0]
    assert high.tolist() == [5, 0]


def test_percentile_agrees_with_torch_quantile() -> None:
    x = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0))
    low, high = find_range(x, AFFINE, "percentile", percentile=98)
    assert low.item() == pytest.approx(x.quantile(0.01).item(), abs=0.01)
    assert high.item() == pytest.approx(x.quantile(0.99).item(), abs=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pnorm_search_comes_near_the_best_of_a_fine_grid(symmetric: bool) -> None:
    grid = Grid(4, symmetric)
    x = torch.distributions.StudentT(4.0).sample((20_000,)) if symmetric else torch.randn(20_000).exp()
    low, high = find_range(x[None], grid, "pnorm")
    found = error(x, low[0], high[0], grid, 2.4)
    fine = [error(x, x.min() * a, x.max() * a, grid, 2.4) for a in torch.linspace(0.02, 1, 400).tolist()]
    assert found <= min(fine) * 1.1
    assert found < error(x, x.min(), x.max(), grid, 2.4) * 0.8


@pytest.mark.parametrize("method", ["minmax", "percentile", "pnorm"])
def test_an_observer_sees_one_batch_as_it_sees_its_parts(method: RangeMethod) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    whole, parts = Observer(), Observer()
    whole.update(x)
    for part in x.split(500):
        parts.update(part)
    a, b = (observer.range(AFFINE, method, 99.0, 2.4) for observer in (whole, parts))
    assert a[0].item() == pytest.approx(b[0].item())
    assert a[1].item() == pytest.approx(b[1].item())


def test_observer_memory_is_bounded_and_extremes_exact() -> None:
    observer = Observer()
    x = torch.zeros(1_000_000)
    x[123_457] = 9.0
    observer.update(x)
    assert observer.range(AFFINE, "minmax", 99.0, 2.4)[1].item() == 9
    assert observer.counts.numel() < 10_000


def test_the_order_of_batches_does_not_matter() -> None:
    batches = [torch.randn(500, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in (0, -3, 2)]
    first, second = Observer(), Observer()
    for a, b in zip(batches, reversed(batches), strict=True):
        first.update(a)
        second.update(b)
    assert first.exponent == second.exponent
    assert (first.counts - second.counts).abs().sum() <= 20  # of 1500: a value on a bin's edge may fall to either side
    assert first.counts.sum() == 1500


def test_degenerate_input_is_named() -> None:
    observer = Observer()
    observer.update(torch.empty(0))
    with pytest.raises(InputError, match="at least one value"):
        observer.range(AFFINE, "minmax", 99.0, 2.4)
    with pytest.raises(InputError, match="NaN or infinite"):
        observer.update(torch.tensor([math.nan]))
    with pytest.raises(InputError, match="NaN or infinite"):
        find_range(torch.tensor([[math.inf]]), AFFINE, "pnorm")
    with pytest.raises(InputError, match="at least one value"):
        find_range(torch.empty(1, 0), AFFINE, "pnorm")


@pytest.mark.parametrize(("shape", "axis"), [((64, 64, 64), 2), ((64, 32, 8, 8), 1), ((2, 4096, 320), 2)])
def test_no_channel_of_a_large_batch_is_passed_over(shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    x.select(axis, 5).mul_(100)
    observer = Observer()
    observer.update(x)
    _, high = observer.range(AFFINE, "percentile", 99.8, 2.4)
    assert high.item() == pytest.approx(x.flatten().sort().values[int(0.999 * x.numel())].item(), rel=0.25)
