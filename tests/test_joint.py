import numpy as np
import pytest
import torch

from ptqd import InputError
from ptqd.correction.correction import Correction
from ptqd.joint import (
    FOLDS,
    MAX_CHANNELS,
    estimate_output,
    fold_of,
    fold_sums,
    held_out_gain,
    joint_moments,
    output_error,
)

N, C = 40, 3


def triple(channels: int = C, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, eps and eps_q with noise that depends on both, across channels."""
    g = torch.Generator().manual_seed(0)
    x, e, r = (torch.randn(N, channels, 5, 5, generator=g, dtype=torch.float64) for _ in range(3))
    eps = 0.8 * x + 0.3 * e + 0.2
    mix = 0.1 * torch.randn(channels, channels, generator=g, dtype=torch.float64)
    eps_q = eps + torch.einsum("oc,nchw->nohw", mix, eps) + 0.2 * x.flip(1) + noise * r - 0.1
    return x, eps, eps_q


def table_of(x: torch.Tensor, eps: torch.Tensor, eps_q: torch.Tensor) -> torch.Tensor:
    return joint_moments(x, eps, eps_q, 1).mean(0)


def pixels(x: torch.Tensor) -> np.ndarray:
    array: np.ndarray = x.movedim(1, -1).flatten(0, -2).numpy()
    return array


def apply(table: torch.Tensor, coherence: float, x: torch.Tensor, eps_q: torch.Tensor) -> torch.Tensor:
    e = estimate_output(table, coherence)
    output, sample, bias = (tuple(t[:1].tolist()) for t in (e.output, e.sample, e.bias))
    return Correction(("joint",), (1.0,), output, sample, bias, (), 0.0, {}).correct(eps_q, x, 0)


def test_the_table_is_the_second_moments() -> None:
    x, eps, eps_q = triple()
    u = np.concatenate([np.ones((N * 25, 1)), *(pixels(t) for t in (eps_q, x, eps))], axis=1)
    assert np.allclose(table_of(x, eps, eps_q)[0].numpy(), u.T @ u / len(u))


def test_folds_do_not_depend_on_batches_and_order() -> None:
    moments = joint_moments(*triple(), 1)
    indices = torch.arange(N)
    whole = fold_sums(moments, indices)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    parts = [fold_sums(moments[part], indices[part]) for part in order.split(7)]
    assert torch.allclose(torch.stack(parts).sum(0), whole)
    assert torch.allclose(whole.sum(0) / N, moments.mean(0))
    assert torch.equal(whole[3], moments[fold_of(indices) == 3].sum(0))


@pytest.mark.parametrize("period", [2, 3, 10, 16, 32, 100])
def test_classes_taken_in_turn_do_not_fall_into_folds_of_their_own(period: int) -> None:
    indices = torch.arange(period * 64)
    halves = fold_of(indices) % 2
    share = torch.stack([halves[indices % period == label].double().mean() for label in range(period)])
    assert bool(((share > 0.2) & (share < 0.8)).all())
    assert torch.bincount(fold_of(torch.arange(64)), minlength=FOLDS).tolist() == [4] * FOLDS


def test_a_weight_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        estimate_output(table_of(*triple()), 0.5)


def test_at_coherence_one_it_is_least_squares() -> None:
    x, eps, eps_q = triple()
    features = np.concatenate([pixels(eps_q), pixels(x), np.ones((N * 25, 1))], axis=1)
    want = features @ np.linalg.lstsq(features, pixels(eps), rcond=None)[0]
    assert np.allclose(pixels(apply(table_of(x, eps, eps_q), 1.0, x, eps_q)), want)


def test_at_endless_coherence_it_is_unbiased() -> None:
    """Regressed on eps and x_t, the estimate is eps: nothing of it is withheld."""
    x, eps, eps_q = triple()
    estimate = apply(table_of(x, eps, eps_q), 1e9, x, eps_q)
    features = np.concatenate([pixels(eps), pixels(x), np.ones((N * 25, 1))], axis=1)
    slopes = np.linalg.lstsq(features, pixels(estimate), rcond=None)[0]
    assert np.allclose(slopes, np.concatenate([np.eye(C), np.zeros((C + 1, C))]), atol=1e-6)


def test_between_them_error_is_traded_for_what_is_withheld() -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    estimates = [apply(table, coherence, x, eps_q) for coherence in (1.0, 3.0, 10.0, 1e9)]
    errors = [((e - eps) ** 2).mean().item() for e in estimates]
    assert errors == sorted(errors)
    assert errors[-1] < ((eps_q - eps) ** 2).mean()
    excess = [estimate_output(table, coherence).excess.item() for coherence in (1.0, 3.0, 10.0, 1e9)]
    assert excess == sorted(excess)
    assert excess[0] < 0 < excess[-1]
    variance = [(pixels(e).var(0) - pixels(eps).var(0)).mean() for e in estimates]
    assert np.allclose(variance, excess)


def test_noise_that_is_a_function_of_what_is_known_is_taken_away_whole() -> None:
    x, eps, eps_q = triple(noise=0.0)
    for coherence in (1.0, 8.0):
        assert torch.allclose(apply(table_of(x, eps, eps_q), coherence, x, eps_q), eps, atol=1e-6)


def test_the_error_on_a_table_is_the_error_on_its_samples() -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    want = ((apply(table, 3.0, x, eps_q) - eps) ** 2).mean().item()
    assert output_error(table, estimate_output(table, 3.0)).item() == pytest.approx(want)


def test_a_gain_is_judged_on_samples_that_were_not_fitted() -> None:
    """With noise that is independent of all that is known, fitting finds something, and the other half refutes it."""
    g = torch.Generator().manual_seed(0)
    x, eps, r = (torch.randn(N, C, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    indices = torch.arange(N)
    samples = torch.bincount(fold_of(indices), minlength=FOLDS)

    def gains(eps_q: torch.Tensor) -> tuple[float, float]:
        gain, half = held_out_gain(fold_sums(joint_moments(x, eps, eps_q, 1), indices)[:, None], samples, 1e9)
        return gain.item(), half.item()

    gain, half = gains(eps + r)
    assert gain < half
    table = table_of(x, eps, eps + r)
    assert output_error(table, estimate_output(table, 1e9)) < (r**2).mean()  # on its own samples it looks good
    gain, half = gains(1.3 * eps + 0.1 * r + 0.2)
    assert gain > half > 0


def test_many_channels_get_a_table_each() -> None:
    channels = MAX_CHANNELS + 1
    x, eps, eps_q = triple(channels)
    table = table_of(x, eps, eps_q)
    assert table.shape == (channels, 4, 4)
    alone = table_of(x[:, 4:5], eps[:, 4:5], eps_q[:, 4:5])
    assert torch.allclose(table[4], alone[0])


def test_a_constant_channel_and_one_that_copies_another_are_no_trouble() -> None:
    x, eps, eps_q = triple()
    for t in (x, eps, eps_q):
        t[:, 1] = 0
        t[:, 2] = t[:, 0]
    estimate = apply(table_of(x, eps, eps_q), 8.0, x, eps_q)
    assert bool(torch.isfinite(estimate).all())
    assert torch.allclose(estimate[:, 1], eps[:, 1], atol=1e-9)


@pytest.mark.parametrize("shape", [(2, C, 4, 4), (2, 7, C), (2, C, 2, 4, 4)])
def test_a_map_across_channels_acts_on_images_tokens_and_video(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    eps_q, x = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    d_q, d_x = torch.randn(1, C, C, generator=g), torch.randn(1, C, C, generator=g)
    nested = tuple(tuple(map(tuple, d[0].tolist())) for d in (d_q, d_x))
    got = Correction(("joint",), (1.0,), nested[:1], nested[1:], (), (), 0.0, {}).correct(eps_q, x, 0)
    letters = "nlc,oc->nlo" if len(shape) == 3 else "nc...,oc->no..."
    want = eps_q - torch.einsum(letters, eps_q, d_q[0]) - torch.einsum(letters, x, d_x[0])
    assert torch.allclose(got, want, atol=1e-5)
