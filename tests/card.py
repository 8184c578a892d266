"""A device that stands in for a GPU: its tensors are elsewhere for all who ask, and refuse to meet those of the CPU.

Its numbers are computed by the CPU's own kernels. Importing this registers the device for the whole process: tests that
need it run in a process of their own.
"""

import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")
CARD = torch.device("card", 0)
CPU = torch.device("cpu")
MEETING = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_")  # take what is on the CPU as well
FACTORIES = (
    *("empty.memory_format", "empty_strided", "scalar_tensor", "full", "zeros", "ones", "eye", "eye.m", "linspace"),
    *("arange", "arange.start", "arange.start_step", "randperm", "rand", "randn", "randint", "randint.low"),
)


class Memory:
    """Bytes on the card: now, and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._tensors: dict[int, int] = {}

    def take(self, tensor: "Card") -> None:
        storage = tensor.raw.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self._tensors[place] = self._tensors.get(place, 0) + 1
        self.now += size if self._tensors[place] == 1 else 0
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._give_back, place, size)

    def _give_back(self, place: int, size: int) -> None:
        self._tensors[place] -= 1
        self.now -= 0 if self._tensors[place] else size


memory = Memory()


class Card(torch.Tensor):
    """A tensor on the card."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False) -> Any:
        if isinstance(raw, Card):
            return raw
        if raw.is_meta:  # accelerate makes a parameter of the class that it finds
            return torch.nn.Parameter(raw, requires_grad)
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=CARD
        )
        made.raw = raw
        memory.take(made)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if name not in MEETING and any(not isinstance(x, Card) and x.ndim for x in leaves):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found card:0 and cpu")
        stays = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != CARD.type
        if kwargs.get("device") is not None and not stays:
            kwargs["device"] = CPU
        given = {id(x.raw): x for x in leaves if isinstance(x, Card)}
        result = func(*tree_map_only(Card, _raw, args), **tree_map_only(Card, _raw, kwargs))
        if name == "copy_":
            return args[0]
        return (
            result
            if stays
            else tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else Card(x), result)
        )

    def storage(self) -> Any:
        return self.raw.storage()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Card({self.raw!r})"


def _raw(x: Card) -> torch.Tensor:
    return x.raw


def _factory(op: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        return Card(op(*args, **{**kwargs, "device": CPU, "pin_memory": False}))

    return make


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """As ``torch.tensor(..., device="card")`` copies, below Python's own dispatch."""
    getattr(target, "raw", target).copy_(getattr(source, "raw", source))
    return target


_library = torch.library.Library("aten", "IMPL")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
for _name in FACTORIES:
    _op, _, _overload = _name.partition(".")
    _library.impl(_name, _factory(getattr(getattr(torch.ops.aten, _op), _overload or "default")), "PrivateUse1")
