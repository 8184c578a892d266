"""A state dict's tensors under other names, each of which is taken once."""

from collections.abc import Mapping

import torch

from ptqd.diffusion.compvis.checkpoint import originals
from ptqd.errors import InputError


class Tensors:
    """A state dict.

    Args:
        tensors: of it, by the original's names, or by those that wrappers around the model made of them.
        where: they come from, for messages.
        described: what says how the network is built, for messages.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str, described: str) -> None:
        self.left, self.where, self.described = originals(tensors, where), where, described

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one.

        Raises:
            InputError: it is not there.
        """
        if name not in self.left:
            raise InputError(f"{self.where} lacks {name!r}; it is of another architecture than {self.described} says")
        return tuple(self.left[name].shape)

    def take(self, name: str) -> torch.Tensor:
        """One of them.

        Raises:
            InputError: it is not there.
        """
        self.shape(name)
        return self.left.pop(name)

    def take_all(self, prefix: str) -> dict[str, torch.Tensor]:
        """Those of a prefix, without it."""
        names = [name for name in self.left if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.left.pop(name) for name in names}

    def check_empty(self) -> None:
        """Nothing is left over.

        Raises:
            InputError: so it is.
        """
        if self.left:
            raise InputError(
                f"{self.where} holds {len(self.left)} tensors more than {self.described} has a place for "
                f"({next(iter(self.left))}, ...); it is of another architecture"
            )
