import numpy as np
import pytest
import torch

from ptqd import InputError
from ptqd.correction import cnc_bc, d2, joint, rows, tac
from ptqd.correction.correction import Correction
from ptqd.noise import (
    FOLDS,
    MAX_CHANNELS,
    MAX_NEIGHBOUR_CHANNELS,
    Estimator,
    Layout,
    MeasuredOn,
    OutputEstimate,
    excess_variance,
    fold_of,
    fold_sums,
    held_out_gain,
    joint_moments,
    output_errors,
    smoothed,
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


def near(x: torch.Tensor) -> np.ndarray:
    """Each pixel, and those above, below, left and right of it."""
    parts = [pixels(x)]
    for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        moved = torch.zeros_like(x)
        height, width = x.shape[-2:]
        for i in range(height):
            for j in range(width):
                if 0 <= i + di < height and 0 <= j + dj < width:
                    moved[..., i, j] = x[..., i + di, j + dj]
        parts.append(pixels(moved))
    return np.concatenate(parts, axis=1)


def layout_of(table: torch.Tensor) -> Layout:
    return Layout.read(table, C)


def apply(table: torch.Tensor, method: float | Estimator, x: torch.Tensor, eps_q: torch.Tensor) -> torch.Tensor:
    estimator = joint(method) if isinstance(method, float) else method
    e = estimator(table, layout_of(table))
    correction = Correction(("joint",), (1.0,), rows(e.output), rows(e.sample), rows(e.bias), (), (), 0.0, MeasuredOn())
    return correction.corrector()(eps_q, x, 0)


def test_the_table_is_the_second_moments() -> None:
    x, eps, eps_q = triple()
    u = np.concatenate([np.ones((N * 25, 1)), near(eps_q), near(x), pixels(eps)], axis=1)
    assert np.allclose(table_of(x, eps, eps_q)[0].numpy(), u.T @ u / len(u))


@pytest.mark.parametrize(
    ("channels", "spatial", "layout"),
    [
        (MAX_NEIGHBOUR_CHANNELS, True, (1, MAX_NEIGHBOUR_CHANNELS, 5)),
        (MAX_NEIGHBOUR_CHANNELS, False, (1, MAX_NEIGHBOUR_CHANNELS, 1)),
        (MAX_CHANNELS, True, (1, MAX_CHANNELS, 1)),
        (MAX_CHANNELS + 1, True, (MAX_CHANNELS + 1, 1, 5)),
        (MAX_CHANNELS + 1, False, (MAX_CHANNELS + 1, 1, 1)),
    ],
)
def test_a_layout_is_read_off_its_table(channels: int, spatial: bool, layout: tuple[int, int, int]) -> None:
    want = Layout(*layout)
    assert Layout.of(channels, spatial) == want
    shape = (2, channels, 4, 4) if spatial else (2, 7, channels)
    x = torch.randn(shape)
    assert Layout.read(joint_moments(x, x, x, 1 if spatial else 2)[0], channels) == want


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
        joint(0.5)


def test_at_coherence_one_it_is_least_squares() -> None:
    x, eps, eps_q = triple()
    features = np.concatenate([near(eps_q), near(x), np.ones((N * 25, 1))], axis=1)
    want = features @ np.linalg.lstsq(features, pixels(eps), rcond=None)[0]
    assert np.allclose(pixels(apply(table_of(x, eps, eps_q), 1.0, x, eps_q)), want)


def test_at_endless_coherence_it_is_unbiased() -> None:
    """Regressed on eps and x_t, the estimate is eps: nothing of it is withheld."""
    x, eps, eps_q = triple()
    estimate = apply(table_of(x, eps, eps_q), 1e9, x, eps_q)
    features = np.concatenate([pixels(eps), near(x), np.ones((N * 25, 1))], axis=1)
    slopes = np.linalg.lstsq(features, pixels(estimate), rcond=None)[0]
    assert np.allclose(slopes, np.concatenate([np.eye(C), np.zeros((5 * C + 1, C))]), atol=1e-5)


def test_between_them_error_is_traded_for_what_is_withheld() -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    estimates = [apply(table, coherence, x, eps_q) for coherence in (1.0, 3.0, 10.0, 1e9)]
    errors = [((e - eps) ** 2).mean().item() for e in estimates]
    assert errors == sorted(errors)
    assert errors[-1] < ((eps_q - eps) ** 2).mean()
    layout = layout_of(table)
    excess = [excess_variance(table, joint(c)(table, layout)).mean().item() for c in (1.0, 3.0, 10.0, 1e9)]
    assert excess == sorted(excess)
    assert excess[0] < 0 < excess[-1]
    variance = [(pixels(e).var(0) - pixels(eps).var(0)).mean() for e in estimates]
    assert np.allclose(variance, excess, atol=1e-6)


def test_noise_that_is_a_function_of_what_is_known_is_taken_away_whole() -> None:
    x, eps, eps_q = triple(noise=0.0)
    for coherence in (1.0, 8.0):
        assert torch.allclose(apply(table_of(x, eps, eps_q), coherence, x, eps_q), eps, atol=1e-6)


def test_the_error_on_a_table_is_the_error_on_its_samples() -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    want = ((apply(table, 3.0, x, eps_q) - eps) ** 2).mean().item()
    assert output_errors(table, joint(3.0)(table, layout_of(table))).mean().item() == pytest.approx(want)


def test_a_gain_is_judged_on_samples_that_were_not_fitted() -> None:
    """With noise that is independent of all that is known, fitting finds something, and the other half refutes it."""
    g = torch.Generator().manual_seed(0)
    x, eps, r = (torch.randn(N, C, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    indices = torch.arange(N)
    samples = torch.bincount(fold_of(indices), minlength=FOLDS)

    def gains(eps_q: torch.Tensor) -> tuple[float, float]:
        folds = fold_sums(joint_moments(x, eps, eps_q, 1), indices)[:, None]
        gain = held_out_gain(folds, samples, layout_of(folds), joint(1e9))
        assert gain.outputs.mean().item() == pytest.approx(gain.steps.item())
        assert gain.before.item() == pytest.approx(((eps_q - eps) ** 2).mean().item(), rel=0.02)
        return gain.steps.item(), gain.half_width.item()

    gain, half = gains(eps + r)
    assert gain < half
    table = table_of(x, eps, eps + r)
    own = output_errors(table, joint(1e9)(table, layout_of(table)))
    assert own.mean() < (r**2).mean()  # on its own samples it looks good
    gain, half = gains(1.3 * eps + 0.1 * r + 0.2)
    assert gain > half > 0


def test_many_channels_get_a_table_each() -> None:
    channels = MAX_CHANNELS + 1
    x, eps, eps_q = triple(channels)
    table = table_of(x, eps, eps_q)
    assert table.shape == (channels, 12, 12)
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
    got = Correction(("joint",), (1.0,), nested[:1], nested[1:], (), (), (), 0.0, MeasuredOn()).corrector()(eps_q, x, 0)
    letters = "nlc,oc->nlo" if len(shape) == 3 else "nc...,oc->no..."
    want = eps_q - torch.einsum(letters, eps_q, d_q[0]) - torch.einsum(letters, x, d_x[0])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, C, 4, 4), (2, C, 2, 4, 4)])
@pytest.mark.parametrize("across", [True, False])
def test_a_map_with_neighbours_is_what_the_table_says(shape: tuple[int, ...], across: bool) -> None:
    g = torch.Generator().manual_seed(0)
    eps_q = torch.randn(shape, generator=g, dtype=torch.float64)
    weights = torch.randn(1, C, 5 * C if across else 5, generator=g, dtype=torch.float64)
    got = Correction(("joint",), (1.0,), rows(weights), (), (), (), (), 0.0, MeasuredOn()).corrector()(eps_q, eps_q, 0)
    around = near(eps_q).reshape(-1, 5, C)  # pixels, taps, channels
    if across:
        noise = around.reshape(-1, 5 * C) @ weights[0].numpy().T
    else:
        noise = np.einsum("mtc,ct->mc", around, weights[0].numpy())
    assert np.allclose(pixels(got), pixels(eps_q) - noise)


def test_neighbours_tell_signal_from_noise() -> None:
    """A smooth signal under white noise: the neighbourhood knows it better than the pixel alone."""
    g = torch.Generator().manual_seed(0)
    white, r, x = (torch.randn(N, C, 12, 12, generator=g, dtype=torch.float64) for _ in range(3))
    eps = torch.nn.functional.avg_pool2d(white, 3, 1, 1) * 3
    eps_q = eps + r
    with_neighbours = apply(table_of(x, eps, eps_q), 1.0, x, eps_q)
    alone = apply(table_of(x, eps, eps_q), d2, x, eps_q)
    errors = [((e - eps) ** 2).mean().item() for e in (with_neighbours, alone, eps_q)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize("kind", ["cnc+bc", "d2", "tac"])
def test_published_estimates_are_their_formulas(kind: str) -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    e, q = pixels(eps), pixels(eps_q)
    delta = q - e
    if kind == "cnc+bc":  # one slope for all channels, fitted with a constant for each
        centred_e, centred_d = e - e.mean(0), delta - delta.mean(0)
        k = (centred_e * centred_d).sum() / (centred_e**2).sum()
        want = (q - (delta.mean(0) - k * e.mean(0))) / (1 + k)
        got = apply(table, cnc_bc(cnc=True, bc=True), x, eps_q)
    elif kind == "d2":
        slopes = [np.polyfit(q[:, c], delta[:, c], 1) for c in range(C)]
        want = np.stack([q[:, c] - np.polyval(slopes[c], q[:, c]) for c in range(C)], axis=1)
        got = apply(table, d2, x, eps_q)
    else:
        pull = 0.3
        gains = np.linspace(0.3, 1.7, 1401)
        loss = np.stack([((g * q - e) ** 2).mean(0) + pull * (q**2).mean(0) * (g - 1) ** 2 for g in gains])
        got = apply(table, tac(pull), x, eps_q)
        assert np.allclose(pixels(got)[0] / q[0], gains[loss.argmin(0)], atol=1e-3)
        return
    assert np.allclose(pixels(got), want)


def test_bc_alone_takes_the_mean_and_cnc_alone_the_slope() -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    delta = pixels(eps_q - eps)
    assert np.allclose(pixels(apply(table, cnc_bc(cnc=False, bc=True), x, eps_q)), pixels(eps_q) - delta.mean(0))
    e = pixels(eps)
    k = ((e - e.mean(0)) * (delta - delta.mean(0))).sum() / ((e - e.mean(0)) ** 2).sum()
    assert np.allclose(pixels(apply(table, cnc_bc(cnc=True, bc=False), x, eps_q)), pixels(eps_q) / (1 + k))


def test_a_pull_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="at least 0"):
        tac(-1.0)


def test_smoothing_brings_neighbours_in_time_to_this_steps_size() -> None:
    """Steps that differ in nothing but the sample's scale stay what they are."""
    x, eps, eps_q = triple()
    scales = (1.0, 3.0, 0.2)
    table = torch.stack([table_of(s * x, eps, eps_q) for s in scales])
    assert torch.allclose(smoothed(table, layout_of(table), 1.0), table)
    other = torch.stack([table[0], table[0], 2 * table[0]])
    other[:, :, 0, 0] = 1
    nothing = smoothed(other, layout_of(table), 0.0)
    assert torch.equal(nothing, other)


def test_an_estimate_can_be_kept_for_some_outputs() -> None:
    x, eps, eps_q = triple()
    table = table_of(x, eps, eps_q)
    layout = layout_of(table)
    estimate = joint(1.0)(table, layout)
    some = estimate.where(torch.tensor([[True, False, True]]), OutputEstimate.nothing(table, layout))
    errors, all_of_it = output_errors(table, some), output_errors(table, estimate)
    assert torch.allclose(errors[0, [0, 2]], all_of_it[0, [0, 2]])
    assert errors[0, 1].item() == pytest.approx(((eps_q - eps)[:, 1] ** 2).mean().item())
