"""A checkpoint's tensors, of which each is taken once."""

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


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's state dict, mapped from disk.

    Raises:
        InputError: the file is missing, damaged, or holds code or no state dict.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    with torch.serialization.safe_globals([(_Inert, _BOOKKEEPING)]):
        read = read_pickle(path)
    state = read.get("state_dict", read) if isinstance(read, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state_dict of tensors")
    return state


class _Inert:
    """Stands for a class that is named in a checkpoint and never called."""


class State:
    """A checkpoint's tensors, of which each is taken once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.left, self.where = dict(tensors), where

    def take(self, name: str) -> torch.Tensor:
        """One of them."""
        if name not in self.left:
            raise InputError(f"{self.where} lacks {name!r}; it is of another architecture than the YAML says")
        return self.left.pop(name)

    def suffixes(self, prefix: str) -> list[str]:
        """What follows a prefix, of those that are left."""
        return [name.removeprefix(prefix) for name in self.left if name.startswith(prefix)]

    def check_schedule(self, model: Model) -> None:
        """The noise schedule that was trained is the YAML's."""
        if "betas" not in self.left:
            return
        ends = (model.linear_start**0.5, model.linear_end**0.5)
        required = torch.linspace(*ends, model.timesteps, dtype=torch.float64) ** 2
        betas = self.left["betas"].double()
        if betas.shape != required.shape or not torch.allclose(betas, required, rtol=1e-4):
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

    def check_empty(self, model: Model) -> None:
        """Nothing is left over but what is no part of the model."""
        unused = ("first_stage_model.loss.",) if model.ema else ("first_stage_model.loss.", "model_ema.")
        known = (*_SCHEDULE, "scale_factor", "model_ema.decay", "model_ema.num_updates")
        left = [name for name in self.left if name not in known and not name.startswith(unused)]
        if left:
            raise InputError(
                f"{self.where} holds {len(left)} tensors more than the YAML has a place for ({left[0]}, ...); it is of "
                "another architecture"
            )
