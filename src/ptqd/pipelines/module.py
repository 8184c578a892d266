"""A network that is no model of diffusers, with a scheduler that is: what :func:`ptqd.from_module` makes.

The network is called as it always is, ``network(x, t, **conditions)``; its code is not saved, so that a folder needs
the network again (``ptqd.load(folder, network=...)``), whose weights are then the folder's.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from ptqd.errors import InputError

Generators = torch.Generator | list[torch.Generator] | None
CONVENTIONS = ("timestep", "sigma")
_given: ContextVar[nn.Module | None] = ContextVar("network", default=None)


@contextmanager
def network_for_loading(network: nn.Module | None) -> Iterator[None]:
    """Inside the block a saved :class:`ModuleDenoiser` is loaded into this network, or a copy of it."""
    token = _given.set(network)
    try:
        yield
    finally:
        _given.reset(token)


class ModuleDenoiser(ModelMixin, ConfigMixin):
    """A network as a denoiser of diffusers.

    Args:
        network_class: the name of its class.
        sample_shape: of a sample, without the batch.
        convention: ``"timestep"`` or ``"sigma"``; see :func:`ptqd.from_module`.
        conditions: names of its further arguments, one entry a sample each.
        attentions: modules that multiply two activations, as attention does.
        concatenations: convolutions that are given two tensors side by side, and the channels of the first.
        left: what cannot be quantized, and why.
        folded: layers of torch's in the place of the network's own, as :func:`torch_layer` makes them.

    Raises:
        InputError: it is loaded, and no network was given.
    """

    network: nn.Module
    architecture: tuple[nn.Module]

    @register_to_config
    def __init__(
        self,
        network_class: str = "",
        sample_shape: tuple[int, ...] = (),
        convention: str = "timestep",
        conditions: tuple[str, ...] = (),
        attentions: tuple[str, ...] = (),
        concatenations: Mapping[str, int] | None = None,
        left: tuple[tuple[str, str], ...] = (),
        folded: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        given = _given.get()
        if given is None:
            raise InputError(
                f"the folder has the weights of a {network_class}, and not its code; give the network: "
                "ptqd.load(folder, network=...), whose weights are then the folder's"
            )
        self.network = copy.deepcopy(given).eval().requires_grad_(False)
        for name, facts in (folded or {}).items():
            put_module(self, name, torch_layer(facts))
        self.architecture = (copy.deepcopy(self.network).to("meta"),)

    def on_meta(self) -> "ModuleDenoiser":
        """The same in full precision, on the meta device."""
        with network_for_loading(self.architecture[0]):
            own = {name: value for name, value in self.config.items() if name in _PARAMETERS}
            made: ModuleDenoiser = type(self)(**own)
            return made

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, **conditions: Any) -> UNet2DOutput:
        """What the network makes of samples (N, C, ...) at a timestep, or at a sigma, one or (N,)."""
        t = torch.as_tensor(timestep, device=sample.device)
        t = t.expand(len(sample)) if t.numel() == 1 else t
        output = self.network(sample, t, **conditions)
        while not isinstance(output, torch.Tensor):
            output = output.sample if hasattr(output, "sample") else output[0]
        return UNet2DOutput(sample=output)


def torch_layer(facts: Mapping[str, Any]) -> Any:
    """A layer of torch, without numbers yet.

    Args:
        facts: its ``kind``, the ``shape`` of its weight, and of a convolution stride, padding, dilation and groups.
    """
    shape = tuple(facts["shape"])
    if facts["kind"] == "Linear":
        return nn.Linear(shape[1], shape[0])
    rest = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items() if name not in ("kind", "shape")}
    kind: Any = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}[facts["kind"]]
    return kind(shape[1] * rest.get("groups", 1), shape[0], shape[2:], **rest)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.eval().requires_grad_(False))


_PARAMETERS = tuple(inspect.signature(ModuleDenoiser.__init__).parameters)[1:]


class ModulePipeline(DiffusionPipeline):
    """Samples from a network that is no model of diffusers; :func:`ptqd.from_module` makes one."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModuleDenoiser, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        **conditions: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample.

        Args:
            batch_size: N, how many.
            num_inference_steps: denoising steps.
            eta: noise of DDIM's step, where the scheduler takes it (arXiv 2010.02502).
            generator: one for the batch, or one for each sample.
            latents: (N, C, ...) start noise of unit variance instead of drawn one.
            output_type: ``"np"``, the samples (N, H, W, C) from [-1, 1] to [0, 1], those that are no pictures as they
                are; ``"pt"`` or ``"latent"``, the samples as they are.
            return_dict: a tuple when False.
            conditions: the network's further arguments, (N, ...) each.

        Raises:
            InputError: a condition that the network does not take, or of another length; start noise of another shape.
        """
        network: Any = self.unet
        device, dtype = self._execution_device, network.dtype
        given = self._conditions(conditions, batch_size, device)
        shape = (batch_size, *network.config.sample_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        x: torch.Tensor = latents.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        accepted = inspect.signature(scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            x = scheduler.step(self._predicted(x, t, i, given), t, x, **extra).prev_sample
        images: Any = x
        if output_type not in ("pt", "latent"):
            images = (x / 2 + 0.5).clamp(0, 1).movedim(1, -1) if x.ndim == 4 and x.shape[1] in (1, 3) else x
            images = images.float().cpu().numpy()
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predicted(self, x: torch.Tensor, t: torch.Tensor, i: int, conditions: Mapping[str, Any]) -> torch.Tensor:
        """What the scheduler's step is given."""
        scheduler = self.scheduler
        if self.unet.config.convention == "timestep":
            scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
            output: torch.Tensor = self.unet(scale(x, t), t, **conditions).sample
            learned = isinstance(scheduler, DDPMScheduler) and scheduler.variance_type in ("learned", "learned_range")
            return output if learned else output[:, : x.shape[1]]  # without a learned variance
        scheduler.scale_model_input(x, t)  # which some steps want to have been called
        sigma = scheduler.sigmas[i].to(x)
        denoised: torch.Tensor = self.unet(x, sigma, **conditions).sample
        if not hasattr(scheduler, "precondition_outputs"):
            return denoised
        skip = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)  # c_skip x + c_out F (EDM, eq. 7)
        scale = scheduler.precondition_outputs(torch.zeros_like(x), torch.ones_like(x), sigma)
        return (denoised - skip) / scale  # type: ignore[no-any-return]

    def _conditions(self, given: Mapping[str, Any], count: int, device: torch.device) -> dict[str, torch.Tensor]:
        known = tuple(self.unet.config.conditions)
        for name in given:
            if name not in known:
                takes = ", ".join(known) or "none"
                raise InputError(f"the network takes no condition {name!r}; it was made with: {takes}")
        missing = [name for name in known if name not in given]
        if missing:
            raise InputError(f"the network takes {missing[0]!r}; give a tensor of one entry for each sample")
        tensors = {name: torch.as_tensor(value, device=device) for name, value in given.items()}
        for name, value in tensors.items():
            if value.ndim == 0 or len(value) != count:
                entries = len(value) if value.ndim else "one number"
                raise InputError(f"{name} must have an entry for each of {count} samples; got {entries}: give a tensor")
        return tensors
