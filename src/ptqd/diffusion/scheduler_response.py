"""How a sampler's samples answer to the denoiser's outputs and to the noise it draws.

With clipping off, every step of the schedulers people use is linear in the sample, the outputs (its own and those a
multistep method remembers) and the noise. So a whole run is

    x_{i+1} = X_i x_0 + sum_j O_ij out_j + sum_j Z_ij z_j + sum_j S_ij d_j,        j <= i,

``d_j`` being any change of the sample after step j; and all of them are read off the scheduler's own ``step``, run
once on unit inputs: T calls on 3 T + 3 numbers, for any scheduler, its history, predictor-corrector and Runge-Kutta
stages included. The network's answer to a changed sample is not part of it.

On the diagonal stand the coefficients that papers state. With ``a`` the cumulative alpha product of this step and of
the next one (``_s``), ``x_0 = (x - sqrt(1 - a) out) / sqrt(a)`` for epsilon (``D = d x_0 / d out`` is then ``-sqrt((1 -
a) / a)``; for v_prediction ``-sqrt(1 - a)``, for sample 1, for flow ``-sigma``):

    DDIM                O = sqrt(a_s) D + sqrt(1 - a_s - sigma^2) E,    E = d eps / d out = -sqrt(a / (1 - a)) D
                        Z = sigma = eta sqrt((1 - a_s) / (1 - a)) sqrt(1 - a / a_s)           (arXiv 2010.02502, eq. 12)
    DDPM                O = sqrt(a_s) (1 - a / a_s) / (1 - a) D,    Z^2 = (1 - a_s) / (1 - a) (1 - a / a_s)
                                                                                              (arXiv 2006.11239, eq. 7)
    Euler               O = (sigma_s - sigma) / sigma (-D'),  D' = d x_0 / d out for x = x_0 + sigma eps:
                        -sigma, -sigma / sqrt(sigma^2 + 1) or 1                               (arXiv 2206.00364)
    Euler ancestral     as Euler, to sigma_down;    Z = sigma_up,
                        sigma_up^2 = sigma_s^2 (1 - sigma_s^2 / sigma^2), sigma_down^2 = sigma_s^2 - sigma_up^2
    DPM-Solver++ (SDE)  first order: O = sqrt(a_s) (1 - exp(-2 h)) D,    Z = sqrt(1 - a_s) sqrt(1 - exp(-2 h)),
                        h the step in log-SNR / 2; second order (midpoint): O times 1 + 1 / (2 r) with r the
                        previous h over this one, and the output before enters once more, by -1 / (2 r) times
                        this step's sqrt(a_s) (1 - exp(-2 h)) and its own D                 (arXiv 2211.01095, sec. 5)
    DPM-Solver++ (ODE)  first order: O = sqrt(a_s) (1 - exp(-h)) D
    LCM                 O = sqrt(a_s) c_out D,    Z = sqrt(1 - a_s)                           (arXiv 2310.04378)
    flow matching       O = sigma_s - sigma                                                   (arXiv 2210.02747)
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin

from ptqd.diffusion.intercept import step_with_noise

CLIPPING_OPTIONS = ("clip_sample", "clip_denoised", "thresholding")  # of schedulers' configurations


@dataclass(frozen=True)
class Response:
    """A run's linear response; float64, 0 above the diagonal.

    Attributes:
        outputs: ``O``, d x_{i+1} / d out_j (T, T).
        noise: ``Z``, d x_{i+1} / d z_j (T, T).
        state: ``S``, d x_{i+1} / d d_j (T, T), of a change after step j; 1 on the diagonal.
        start: ``X``, d x_{i+1} / d x_0 (T,).
        exact: a random input's run was the sum of its parts: the step is linear, and all its noise was seen. Where it
            is False the matrices mean nothing.
    """

    outputs: torch.Tensor
    noise: torch.Tensor
    state: torch.Tensor
    start: torch.Tensor
    exact: bool

    @property
    def draws(self) -> bool:
        """Whether any step is known to draw noise."""
        return self.exact and bool(self.noise.any())

    @property
    def own_state(self) -> torch.Tensor:
        """``A_i = d x_{i+1} / d x_i`` (T,); the first step's, which nothing precedes, is that of the start."""
        return torch.cat([self.start[:1], self.state.diagonal(-1)])

    @property
    def one_step(self) -> bool:
        """Whether every step sees nothing but its own sample, output and noise."""
        reach = self.state.tril() * self.outputs.diagonal()
        size = self.outputs.abs().max().clamp(min=1e-12)
        return self.exact and bool(((reach - self.outputs).abs() <= 1e-6 * size).all())


def linear_response(
    scheduler: SchedulerMixin,
    step: object,
    timesteps: Sequence[torch.Tensor],
    keywords: Mapping[str, object],
    *,
    learned_variance: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> Response:
    """The response of a run over ``timesteps``; not exact where the scheduler refuses such a run.

    Args:
        scheduler: its timesteps set, no step taken; it is copied, not changed.
        step: the class's plain ``step``.
        timesteps: those that will be taken.
        keywords: further arguments of ``step``, such as ``eta``.
        learned_variance: of a network whose outputs have twice the sample's channels: what the second half is at each
            step, from -1 for the least variance to 1 for the largest (T,).
        device: where the scheduler's own tensors are.
    """
    nothing = torch.zeros(len(timesteps), len(timesteps), dtype=torch.float64)
    try:
        return _probe(scheduler, step, timesteps, keywords, learned_variance, torch.device(device))
    except _StepRefusedError:  # it takes only its own pipeline's samples
        return Response(nothing, nothing.clone(), nothing.clone(), nothing[0].clone(), exact=False)


# what foreign schedulers raise
_FOREIGN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _StepRefusedError(Exception):
    """A scheduler's step does not run on plain numbers."""


def _probe(
    scheduler: SchedulerMixin,
    step: object,
    timesteps: Sequence[torch.Tensor],
    keywords: Mapping[str, object],
    learned_variance: Sequence[float] | None,
    device: torch.device,
) -> Response:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    probe: Any = copy.deepcopy(scheduler)
    clipping = {name: False for name in CLIPPING_OPTIONS if probe.config.get(name)}
    if clipping:
        probe.register_to_config(**clipping)
    steps = len(timesteps)
    zero, unit_outputs, unit_noise, unit_state = 0, 1, 1 + steps, 1 + 2 * steps
    start, mixed = 1 + 3 * steps, 2 + 3 * steps
    mix = torch.randn(3 * steps + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.zeros(mixed + 1, 1, 1, 1, dtype=dtype, device=device)
    x[start], x[mixed] = 1, mix[-1]
    rows = []
    # a scheduler that draws elsewhere must not move the user's generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for j, t in enumerate(timesteps):
            out, z, change = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
            out[unit_outputs + j], out[mixed] = 1, mix[j]
            z[unit_noise + j], z[mixed] = 1, mix[steps + j]
            change[unit_state + j], change[mixed] = 1, mix[2 * steps + j]
            if learned_variance is not None:
                out = torch.cat([out, torch.full_like(out, learned_variance[j])], dim=1)
            if hasattr(probe, "scale_model_input"):
                try:
                    probe.scale_model_input(x, t)  # some count their steps here
                except _FOREIGN as refusal:
                    raise _StepRefusedError from refusal

            def draw(shape: object, z: torch.Tensor = z, **_: object) -> torch.Tensor:
                return z

            try:
                stepped = step_with_noise(step, draw)(probe, out, t, x, **{**keywords, "return_dict": False})[0]
            except _FOREIGN as refusal:
                raise _StepRefusedError from refusal
            x = stepped.to(dtype) + change
            rows.append(x.flatten().cpu().double())
    table = torch.stack(rows)  # T, 3T + 3
    table = table - table[:, [zero]]
    parts = table[:, unit_outputs:mixed]
    error = (parts @ mix - table[:, mixed]).abs()
    size = (parts.abs() @ mix.abs()).clamp(min=1e-12)
    exact = bool(torch.isfinite(table).all()) and bool((error <= 1e-3 * size).all())
    outputs, noise, state = (parts[:, i * steps : (i + 1) * steps].clone() for i in range(3))
    return Response(outputs, noise, state, table[:, start].clone(), exact)


def added_variance(response: Response, variance: torch.Tensor) -> torch.Tensor:
    """Variance ``u_i`` that residuals add to each sample beyond what earlier steps have answered for (T,).

        u_i = sum_j O_ij^2 V_j - sum_{j<i} S_ij^2 u_j

    Residuals count as independent, as the paper has it; without history the sums cancel but for ``u_i = O_ii^2 V_i``.
    Correlations between steps cannot be counted this way: the response leaves out how the network answers, and so grows
    without bound towards early steps, where a correlation of 0.01 that is chance would take all noise away.

    Args:
        response: of the run.
        variance: ``V`` of the steps' residuals (T,).
    """
    squared_state = response.state**2
    total = response.outputs**2 @ variance.double()
    added = torch.zeros_like(total)
    for i in range(len(added)):
        added[i] = total[i] - squared_state[i, :i] @ added[:i]
    return added


def noise_scales(response: Response, added: torch.Tensor) -> list[float]:
    """What is left to draw at each step, as a share of the standard deviation, once residuals count as drawn noise.

    ``s_i^2 = 1 - u_i / Z_ii^2``: for independent residuals and no history PTQD's VSC (arXiv 2305.10657, section 4.2).
    What a step has too little noise to give back is not asked of the next: the network has answered by then.

    Args:
        response: of the run.
        added: variance that residuals add (T,); see :func:`added_variance`.
    """
    drawn = response.noise.diagonal() ** 2
    share = 1 - added / torch.where(drawn > 0, drawn, 1.0)
    return [float(s) for s in torch.where(drawn > 0, share, 1.0).clamp(min=0).sqrt()]
