"""A checkpoint's tensors, of which each is taken once."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from ptqd.diffusion.compvis.config import Model
from ptqd.errors import InputError
from ptqd.files import read_pickle

_SCHEDULE = (  # what the original keeps beside the weights and makes from its YAML
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
    "cond_ids",
)  # fmt: skip
_BOOKKEEPING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # a key of Lightning's own notes
_NESTS = ("state_dict", "model_state_dict", "model", "module")  # Lightning's, others', DeepSpeed's
_WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module")  # DDP, torch.compile, Lightning, FSDP
_EMA = ("model_ema", "ema_model", "ema")
_STAGE = "first_stage_model."


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's state dict, mapped from disk.

    Raises:
        InputError: the file is missing, damaged, or holds code or no state dict.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the checkpoint's file")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    with torch.serialization.safe_globals([(_Inert, _BOOKKEEPING)]):
        state = read_pickle(path)
    for _ in range(3):  # one in another at most
        if isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return {str(name): value for name, value in state.items()}
        state = next((state[name] for name in _NESTS if name in state), None) if isinstance(state, dict) else None
    raise InputError(f"{path} holds no state_dict of tensors; save the model's state_dict() alone")


def originals(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Tensors by the names that the original gives, without those of wrappers around the model or its parts."""
    outer = min((name.partition(_STAGE)[0] for name in tensors if _STAGE in name), key=len, default="")
    result = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.removeprefix(outer).split(".") if part not in _WRAPPERS]
        plain = ".".join(parts)
        if parts and parts[0] in _EMA:  # which leaves the dots of a parameter's name out
            plain = functools.reduce(lambda text, wrapper: text.replace(wrapper, ""), _WRAPPERS, "".join(parts[1:]))
            plain = f"model_ema.{plain.removeprefix('model')}"
        if plain in result:
            raise InputError(f"{where} holds {plain!r} twice, once as {name!r}; leave one of them out")
        result[plain] = tensor
    return result


class _Inert:
    """Stands for a class that is named in a checkpoint and never called."""


class State:
    """A checkpoint's tensors, of which each is taken once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.left, self.where = originals(tensors, where), where

    def take(self, name: str) -> torch.Tensor:
        """One of them."""
        if name not in self.left:
            raise InputError(f"{self.where} lacks {name!r}; it is of another architecture than the YAML says")
        return self.left.pop(name)

    def suffixes(self, prefix: str) -> list[str]:
        """What follows a prefix, of those that are left."""
        return [name.removeprefix(prefix) for name in self.left if name.startswith(prefix)]

    def drop(self, prefix: str) -> None:
        """Leave those of a prefix out."""
        self.left = {name: value for name, value in self.left.items() if not name.startswith(prefix)}

    def check_schedule(self, model: Model) -> None:
        """The noise schedule that was trained is the YAML's."""
        if "betas" not in self.left:
            return
        ends = (model.linear_start**0.5, model.linear_end**0.5)
        required = torch.linspace(*ends, model.timesteps, dtype=torch.float64) ** 2
        betas = self.left["betas"].double()
        kept = next((d for d in (torch.bfloat16, torch.float16) if torch.equal(betas.to(d).double(), betas)), None)
        rtol, atol = 1e-4, 1e-8
        if kept is not None:  # they were in half precision once, whatever they are stored in now
            rtol, atol = torch.finfo(kept).eps, torch.finfo(kept).smallest_normal * torch.finfo(kept).eps
        if betas.shape != required.shape or not torch.allclose(betas, required, rtol=rtol, atol=atol):
            raise InputError(
                f"{self.where} was trained with other betas than linear_start and linear_end in the YAML say"
            )

    def scale(self, model: Model) -> float:
        """What latents are multiplied with: as found in training, else as the YAML says."""
        if "scale_factor" in self.left:
            return float(self.left["scale_factor"].reshape(-1)[0])
        if model.scaled:
            raise InputError(f"{self.where} lacks 'scale_factor', which the YAML says was found in training")
        return model.scale

    def check_empty(self) -> None:
        """Nothing is left over but what is no part of the model."""
        unused = ("first_stage_model.loss.", "first_stage_model.model_ema.")
        known = (*_SCHEDULE, "scale_factor", "model_ema.decay", "model_ema.num_updates")
        left = [name for name in self.left if name not in known and not name.startswith(unused)]
        if left:
            raise InputError(
                f"{self.where} holds {len(left)} tensors more than the YAML has a place for ({left[0]}, ...); it is of "
                "another architecture"
            )
