"""Reference outputs of the original codes, which tests/data/adm/README.md describes, and what runs them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data" / "adm"
Tensors = dict[str, torch.Tensor]


def arguments(name: str) -> dict[str, Any]:
    """The options of a model, ``"adm-lsun.small"`` or ``"512x512_diffusion.full"``."""
    read: dict[str, Any] = json.loads((DATA / f"{name}.args.json").read_text())
    return read


def small(name: str) -> tuple[Tensors, dict[str, Any], Tensors]:
    """A narrow variant's weights in full precision, its options, and what the original answers."""
    state = {key: value.float() for key, value in load_file(DATA / f"{name}.small.safetensors").items()}
    return state, arguments(f"{name}.small"), load_file(DATA / f"{name}.small.io.safetensors")


def shapes(name: str) -> tuple[Tensors, int]:
    """A published model's names and shapes on the meta device, and how many parameters it has."""
    read = json.loads((DATA / f"{name}.full.keys.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in read["shapes"].items()}
    return state, read["unet_parameters"]


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference."""
    assert mine.shape == theirs.shape
    return float((mine - theirs).abs().max())


@contextmanager
def noise(given: torch.Tensor) -> Iterator[None]:
    """Let schedulers draw this noise (steps, N, C, H, W), in order."""
    left = iter(given)

    def draw(shape: Any, **_: object) -> torch.Tensor:
        z: torch.Tensor = next(left)
        assert tuple(shape) == tuple(z.shape)
        return z

    with pytest.MonkeyPatch.context() as patched:
        for module in ("ddpm", "ddim", "consistency_models"):
            patched.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", draw)
        patched.setattr("ptqd.pipelines.respaced.randn_tensor", draw)
        yield
