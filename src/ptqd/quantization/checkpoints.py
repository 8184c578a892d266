"""What a quantization that was killed goes on from: what calibration saw so far, and the layers that are done.

Files are written every minute of work at most, and hold tensors and plain containers alone. What a file does not hold
is done again, with the same result.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.plain_values import NotPlainError, as_plain, from_plain
from ptqd.errors import InputError
from ptqd.files import is_whole, make_folder, opened_tensors, read_pickle, replacing, write_tensors
from ptqd.quantization.numerics.observer import Observer

SECONDS = 60.0  # of work between two writes
_LAST = "ptqd.last"  # in the metadata: whether there are no more layers


class _Clock:
    """Says when it is time to write."""

    def __init__(self) -> None:
        self._written = time.monotonic()

    def is_time(self) -> bool:
        """Whether it is; then it starts anew."""
        if time.monotonic() - self._written < SECONDS:
            return False
        self._written = time.monotonic()
        return True


class DoneLayers:
    """Tensors of the layers that a method is done with, in files of as many layers as a minute had.

    Args:
        folder: of the method's own; None where nothing is to be kept.

    Attributes:
        is_whole: whether the method was done with all of them.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._clock, self.is_whole = folder, _Clock(), False
        self._files: dict[str, tuple[Path, list[str]]] = {}
        self._new: dict[str, torch.Tensor] = {}
        self._paths = [] if folder is None else [p for p in sorted(folder.glob("layers-*.safetensors")) if is_whole(p)]
        for path in self._paths:
            with opened_tensors(path) as file:
                self.is_whole = self.is_whole or (file.metadata() or {}).get(_LAST) == "yes"
                for key in file.keys():  # noqa: SIM118
                    self._files.setdefault(key.rpartition("/")[0], (path, []))[1].append(key)

    def has(self, *names: str) -> bool:
        """Whether all of these layers are done."""
        return all(name in self._files for name in names)

    def restore(self, name: str, layer: nn.Module) -> None:
        """Give a layer that is done its tensors."""
        path, keys = self._files[name]
        with opened_tensors(path) as file:
            for key in keys:
                getattr(layer, key.rpartition("/")[2]).copy_(file.get_tensor(key))

    def keep(self, layers: Mapping[str, nn.Module], tensors: Sequence[str]) -> None:
        """Keep tensors, by their names, of layers that are done together."""
        if self._folder is None:
            return
        for name, layer in layers.items():
            self._new |= {f"{name}/{key}": getattr(layer, key).detach().cpu().clone() for key in tensors}
        if self._clock.is_time():
            self._write(last=False)

    def finish(self) -> None:
        """All layers are done."""
        if self._folder is not None and not self.is_whole:
            self._write(last=True)

    def _write(self, *, last: bool) -> None:
        assert self._folder is not None
        make_folder(self._folder)
        path = self._folder / f"layers-{len(self._paths):04d}.safetensors"
        write_tensors(path, self._new, {_LAST: "yes" if last else "no"})
        self._paths.append(path)
        self._new = {}


class PassCheckpoint:
    """A pass over many batches: how many samples or rows of it are done, and what was seen of them.

    Args:
        folder: of the pass; None where nothing is to be kept.
        observers: that see it; they get what they had seen.

    Attributes:
        done: how many samples, or rows, are done.
        state: what else was kept, as it was given.
        taken: what was kept of each batch, in order.
    """

    def __init__(self, folder: Path | None, observers: Sequence[Observer]) -> None:
        self._folder, self._observers, self._clock = folder, observers, _Clock()
        self.done, self.state = 0, dict[str, Any]()
        self.taken: list[Any] = []
        self._new: list[Any] = []
        try:
            kept = None if folder is None or not (folder / "state.pt").is_file() else read_pickle(folder / "state.pt")
            if folder is None or kept is None or len(kept["observers"]) != len(observers):
                return
            taken = [item for number in kept["files"] for item in read_pickle(folder / _rows(number))]
        except InputError:  # after a loss of power
            return
        self.taken = [from_plain(item) for item in taken]
        self.done, self.state, self._files = kept["done"], from_plain(kept["state"]), kept["files"]
        for observer, seen in zip(observers, kept["observers"], strict=True):
            observer.load(seen)

    _files: Sequence[int] = ()

    def keep(self, done: int, taken: Sequence[Any], state: Mapping[str, Any], *, last: bool = False) -> None:
        """After a batch: what was taken of it, and all that the pass would need; written if it is time, or the last."""
        self.done = done
        self._new += taken
        if self._folder is None or not (self._clock.is_time() or last):
            return
        moved: dict[int, Any] = {}
        try:
            plain, rest = [as_plain(item, moved) for item in self._new], as_plain(dict(state))
        except NotPlainError:  # arguments that no file may hold: the pass is done again after a kill
            self._folder = None
            return
        make_folder(self._folder)
        with replacing(self._folder / _rows(done)) as temporary:
            torch.save(plain, temporary)
        self._files, self._new = [*self._files, done], []
        seen = [observer.state() for observer in self._observers]
        with replacing(self._folder / "state.pt") as temporary:
            torch.save({"done": done, "state": rest, "files": list(self._files), "observers": seen}, temporary)


def _rows(number: int) -> str:
    return f"rows-{number:08d}.pt"
