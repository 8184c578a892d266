"""What a quantization that was killed goes on from: what calibration saw so far, and the layers that are done.

Files are written every minute of work at most, and hold tensors and plain containers alone. What cannot be kept, or
read again, is done again. How many rows are called at once, and how many GPTQ looks at, depends on the memory that is
free: what is done after a kill may have other ones than what was done before.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.plain_values import NotPlainError, as_plain, from_plain
from ptqd.errors import InputError
from ptqd.files import is_whole, make_folder, opened_tensors, read_pickle, remove, replacing, write_tensors
from ptqd.quantization.numerics.observer import Observer

logger = logging.getLogger(__name__)

SECONDS = 60.0  # of work between two writes
_FILES = "ptqd.files"  # in the metadata of the last file: how many there are


class _Clock:
    """Says when it is time to write."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Something was written."""
        self._written = time.monotonic()

    def is_time(self) -> bool:
        """Whether it is."""
        return time.monotonic() - self._written >= SECONDS


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
        self._count = 0  # of files
        while folder is not None and is_whole(self._path()):
            with opened_tensors(self._path()) as file:
                self.is_whole = (file.metadata() or {}).get(_FILES) == str(self._count + 1)
                for key in file.keys():  # noqa: SIM118
                    self._files.setdefault(key.rpartition("/")[0], (self._path(), []))[1].append(key)
            self._count += 1
        for path in [] if folder is None else folder.glob("layers-*.safetensors"):
            if path.name >= self._path().name:  # one that a loss of power damaged, and what came after it
                remove(path)

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
            self._write({})

    def finish(self) -> None:
        """All layers are done."""
        if self._folder is not None and not self.is_whole:
            self._write({_FILES: str(self._count + 1)})

    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"layers-{self._count:04d}.safetensors"

    def _write(self, metadata: Mapping[str, str]) -> None:
        make_folder(self._path().parent)
        write_tensors(self._path(), self._new, metadata)
        self._count, self._new = self._count + 1, {}
        self._clock.start()


class PassCheckpoint:
    """A pass over many batches: how many samples or batches of it are done, and what was seen of them.

    Args:
        folder: of the pass; None where nothing is to be kept.
        observers: that see it; they get what they had seen.
        device: that tensors were on which were not on the CPU.

    Attributes:
        observers: that see it.
        done: how many samples, or batches, are done.
        state: what else was kept, as it was given.
        taken: what was kept of each batch, in order.
    """

    def __init__(self, folder: Path | None, observers: Sequence[Observer], device: torch.device | str = "cpu") -> None:
        self._folder, self.observers, self._clock = folder, observers, _Clock()
        self.done, self.state = 0, dict[str, Any]()
        self.taken: list[Any] = []
        self._new: list[Any] = []
        self._files: list[int] = []
        if folder is None or not (folder / _STATE).is_file():
            return
        try:
            kept = read_pickle(folder / _STATE)
            plain = [item for number in kept["files"] for item in read_pickle(folder / _rows(number))]
        except InputError as error:  # after a loss of power
            logger.warning("what was done before the kill is done again: %s", error)
            remove(folder)
            return
        if len(kept["observers"]) != len(observers):
            return
        moved: dict[int, Any] = {}
        self.taken = [from_plain(item, device, moved) for item in plain]
        self.done, self.state, self._files = kept["done"], from_plain(kept["state"], device, moved), kept["files"]
        for observer, seen in zip(observers, kept["observers"], strict=True):
            observer.load(seen)

    def keep(self, done: int, taken: Sequence[Any], state: Mapping[str, Any], *, last: bool = False) -> None:
        """After a batch: what was taken of it, and all that the pass would need; written if it is time, or the last."""
        self.done = done
        if self._folder is None:
            return
        self._new += taken
        if not (self._clock.is_time() or last):
            return
        moved: dict[int, Any] = {}
        try:
            plain, rest = [as_plain(item, moved) for item in self._new], as_plain(dict(state), moved)
        except NotPlainError as error:
            logger.info("the pass is not kept over a kill: its calls are given a %s", error)
            self._folder, self._new = None, []
            return
        make_folder(self._folder)
        with replacing(self._folder / _rows(done)) as temporary:
            torch.save(plain, temporary)
        self._files, self._new = [*self._files, done], []
        seen = [observer.state() for observer in self.observers]
        with replacing(self._folder / _STATE) as temporary:
            torch.save({"done": done, "state": rest, "files": self._files, "observers": seen}, temporary)
        self._clock.start()


_STATE = "state.pt"


def _rows(number: int) -> str:
    return f"rows-{number:08d}.pt"
