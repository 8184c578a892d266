"""Making a PrecisionPlan: the paper's rule, or the least error of the final sample for a budget of bit operations.

The paper's rule (He et al., arXiv 2305.10657, section 4.3): at each step the fewest bits b with

    SNR_Q(t, b) = E|eps|^2 / E|delta_b|^2  >  SNR_F(t) = alpha_t^2 / sigma_t^2,

the most bits where none does.

The budgeted plan minimises what the noise does to the final sample. With O_ij = d x_{i+1} / d out_j the sampler's
response (:mod:`ptqd.diffusion.scheduler_response`), n_j the noise in the output of step j, and the network's answer to
a changed sample taken as its regression on the sample, ``d out_j = g_j d x_j`` with ``g_j = Cov(eps, x) / Var(x)``,

    d x_{i+1} = sum_j O_ij (g_j d x_j + n_j)   =>   d x_T = c . n,   c = last row of (1 - O diag(g) shift)^-1 O.

Without g the early steps of a diffusion count hundreds of times too much: the network takes a change of the sample
back. The expected squared error is ``c^T R c`` with R the residuals' covariance over the steps, which repeats from step
to step (R_ij = rho_ij s_i s_j). Step j's contribution at b bits is its row of that form, at b bits throughout:

    E_j(b) = c_j s_j(b) sum_i rho_ij(b) c_i s_i(b),

so that contributions add up to the whole error of each uniform width, and to ``sum c_j^2 V_j`` where residuals are
independent. Each layer's part of E_j(b) is its first-order share (:mod:`ptqd.mixed_precision.sensitivity`). Then error
and cost are sums over steps and groups of layers, and the choice is a multiple-choice knapsack, solved exactly
(scipy's milp). With
the weights' bits to choose as well, cost is bilinear: bits of a layer's weight times the sum of its activations' bits.
For any price of a bit operation the best pair is found exactly, group by group; the price that meets the budget gives
the weights, the knapsack then the activations, and the dual bound says how far from the optimum that can be.
"""

from ptqd.mixed_precision.contributions import final_coefficients
from ptqd.mixed_precision.paper_rule import forward_snr
from ptqd.mixed_precision.problem import Problem, planning_problem
from ptqd.mixed_precision.seconds import StepSeconds, measure_seconds
from ptqd.mixed_precision.sensitivity import measure_sensitivity
from ptqd.mixed_precision.solver import pareto, priced, rated, solve, uniform

__all__ = [
    "Problem",
    "StepSeconds",
    "final_coefficients",
    "forward_snr",
    "measure_seconds",
    "measure_sensitivity",
    "pareto",
    "planning_problem",
    "priced",
    "rated",
    "solve",
    "uniform",
]
