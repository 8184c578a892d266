"""Published weights of the networks that judge: from a file, or torch hub's folder."""

from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from ptqd.errors import InputError
from ptqd.files import read_pickle


def weights_key(network: nn.Module) -> str:
    """A hash of a network's weights and their names."""
    result = sha256()
    for name, value in sorted(network.state_dict().items()):
        result.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return result.hexdigest()


def hub_file(url: str) -> Path:
    """Where torch hub keeps what an address leads to."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def load_weights(network: nn.Module, path: Path | None, url: str, what: str, only: str = "") -> None:
    """Load a network's published weights, all of them and no others.

    Args:
        network: to load into.
        path: a .pth or .safetensors file; by default torch hub's copy, downloaded if it is not there.
        url: where they are published; its name ends in the file's hash where torch hub shall check that.
        what: they are, in messages.
        only: those whose names begin like this; the file may hold others.

    Raises:
        InputError: they are neither here nor can be downloaded, or are not this network's.
    """
    state = _read(path, what) if path is not None else _from_hub(url, what)
    state = {name: value for name, value in state.items() if name.startswith(only)}
    own = network.state_dict()
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    wrong = {name for name in needed if name not in state or state[name].shape != own[name].shape}
    wrong |= {name for name in state if name not in own}
    if wrong:
        raise InputError(
            f"{path or hub_file(url)} does not hold {what}: {len(wrong)} are missing, of another shape or unknown "
            f"({min(wrong)}); they are published at {url}"
        )
    network.load_state_dict(state, strict=False)


def _read(path: Path, what: str) -> dict[str, torch.Tensor]:
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} does not hold {what}: it is no state dict of tensors")
    return state


def _from_hub(url: str, what: str) -> dict[str, torch.Tensor]:
    remaining = hub_file(url)
    if not remaining.is_file():
        try:
            torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{what} are not in {remaining.parent} and cannot be downloaded ({error}); get {url}, and give its path"
            ) from error
    return _read(remaining, what)
