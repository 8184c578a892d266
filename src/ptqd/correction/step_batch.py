"""One batch that waits before its scheduler's step, its samples corrected by estimates of their own."""

from collections.abc import Iterable

import torch

from ptqd.correction.correction import corrected_output
from ptqd.diffusion.in_step import Arrival
from ptqd.diffusion.pipeline_parts import channel_axis
from ptqd.noise.second_moments import Layout, OutputEstimate
from ptqd.noise.stats import NoiseStats


class StepBatch:
    """A step of some samples, in the rows (R, C, ...) that the scheduler steps; a learned variance is kept aside.

    Args:
        arrival: the batch.
        stats: that it is corrected by.
        samples: how many it holds (n).

    Attributes:
        axis: of the channels.
        x: the samples before the step.
        eps_q: the denoiser's output.
        chosen: the output to go on with.
        each: rows of a sample.
        sample_of: of which sample each row is (R,). Some pipelines step a guided batch twice, the second half a copy;
            in others a sample is several rows, its frames.
    """

    def __init__(self, arrival: Arrival, stats: NoiseStats, samples: int) -> None:
        self.arrival, self.samples = arrival, samples
        axis = stats.measured_on.channel_axis
        self.axis = channel_axis(arrival.sample) if axis is None else axis
        self.x = arrival.sample
        self.eps_q = arrival.output.narrow(self.axis, 0, arrival.sample.shape[self.axis])
        self.chosen = self.eps_q
        self.each = stats.finals[0].numel() // self.x[0].numel()
        self.copies = len(self.x) // (samples * self.each)
        self.sample_of = (torch.arange(len(self.x)) // self.each) % samples

    def correct(self, estimates: Iterable[tuple[torch.Tensor, OutputEstimate]], layout: Layout) -> None:
        """Correct the rows of some samples (integers, within the batch) by an estimate each (G, C, taps C)."""
        chosen = self.eps_q.clone()
        for samples, estimate in estimates:
            rows = torch.isin(self.sample_of, samples).nonzero().flatten().to(self.x.device)
            if len(rows):
                chosen[rows] = corrected_output(estimate, layout, self.eps_q[rows], self.x[rows], self.axis)
        self.chosen = chosen

    def full_output(self) -> torch.Tensor:
        """The chosen output, with the learned variance."""
        whole, channels = self.arrival.output, self.eps_q.shape[self.axis]
        if whole.shape[self.axis] == channels:
            return self.chosen
        rest = whole.narrow(self.axis, channels, whole.shape[self.axis] - channels)
        return torch.cat([self.chosen, rest], dim=self.axis)
