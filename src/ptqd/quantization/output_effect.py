r"""How much each rounding moves the denoiser's output, by one backward pass a row; and which layers read a stream.

Of a rounding that moves an operand by ``d``, the output moves by ``J d`` to first order, ``J`` the Jacobian of the
denoiser from that operand. With a random direction ``v ~ N(0, I)`` on the output, one backward pass gives
``g = J^T v`` of every operand, and ``(g . d)^2`` has the mean ``|J d|^2`` (Hutchinson's estimator): all roundings of a
denoiser at once, each on its own. The error of a layer's own output says little beside it: a layer whose output a norm
follows may err much, one that ends at the output may not.

A layer reads a *stream* where a sum of layers' outputs comes to it without a norm before it, as residual networks'
shortcuts do: its range has no bound, and its tails are heavy.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from ptqd.progress import track

EFFECT_ROWS = 16  # rows of the denoiser's calls, each with a direction of its own
Name = TypeVar("Name", bound=Hashable)

_NORMS = ("GroupNorm", "LayerNorm", "BatchNorm", "RmsNorm", "RMSNorm", "Softmax", "Rsqrt")
_LAYERS = ("Convolution", "Addmm", "Mm", "Bmm", "Linear", "ScaledDotProduct", "Embedding", "AccumulateGrad")


class OutputEffects(Generic[Name]):
    """What roundings do to a denoiser's output.

    Hooks on its modules pass what is rounded through :meth:`watch`; :meth:`run` then calls it, row by row.

    Attributes:
        streams: the places whose values are sums without a norm since.
    """

    def __init__(self, seed: int = 0) -> None:
        self.streams: set[str] = set()
        self._generator = torch.Generator().manual_seed(seed)
        self._squares: dict[Name, float] = {}
        self._dots: dict[Name, float] = {}
        self._energy = 0.0
        self._kinds: dict[Any, tuple[bool, bool]] | None = {}

    @property
    def effects(self) -> dict[Name, float]:
        """Of each rounding, the squared distance at the output over the output's energy."""
        return {name: value / self._energy for name, value in self._squares.items()} if self._energy > 0 else {}

    def watch(self, place: str, value: torch.Tensor, moves: Callable[[], Mapping[Name, torch.Tensor]]) -> torch.Tensor:
        """The value, to go on with instead; its gradient is that of this place alone.

        Args:
            place: a name.
            value: of any shape.
            moves: gives, when the gradient comes, how far each rounding moves the value, by the roundings' names.
        """
        self.note(place, value)
        own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_().clone()

        def add(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                for name, move in moves().items():
                    self._dots[name] = self._dots.get(name, 0.0) + float((gradient.double() * move).sum())

        own.register_hook(add)
        return own

    def note(self, place: str, value: torch.Tensor) -> None:
        """Find out whether a value is a stream."""
        if self._kinds is not None and _kind(value.grad_fn, self._kinds)[0]:
            self.streams.add(place)

    def run(self, call: Callable[[list[int]], object], rows: int, title: str | None = None) -> None:
        """Call a denoiser, and go back through it once, for each of so many rows.

        Args:
            call: the denoiser with some rows, by number.
            rows: how many.
            title: of a progress bar.
        """
        with torch.enable_grad():
            for row in track(range(rows), title):
                outputs = [x for x in tree_leaves(call([row])) if isinstance(x, torch.Tensor) and x.requires_grad]
                self._kinds = None
                directions = [torch.randn(x.shape, generator=self._generator).to(x) for x in outputs]
                self._energy += sum(float(x.detach().double().square().sum()) for x in outputs)
                if outputs:
                    torch.autograd.backward(outputs, directions)
                for name, value in self._dots.items():
                    self._squares[name] = self._squares.get(name, 0.0) + value**2
                self._dots.clear()


def _kind(node: Any, known: dict[Any, tuple[bool, bool]]) -> tuple[bool, bool]:
    """Whether what a node of autograd makes is a sum of layers' outputs with no norm since, and whether one bounds it.

    Args:
        node: that made a tensor; None of one that nothing made.
        known: of nodes that were looked at before.
    """
    order: list[Any] = [node]
    while order:  # no recursion: a network is deeper than Python's stack
        here = order[-1]
        if here in known or here is None:
            order.pop()
            continue
        name = here.name()
        if any(part in name for part in _NORMS):
            known[here] = (False, True)
        elif any(part in name for part in _LAYERS):
            known[here] = (False, False)
        else:
            below = [each for each, _ in here.next_functions if each is not None]
            missing = [each for each in below if each not in known]
            if missing:
                order.extend(missing)
                continue
            known[here] = _joined(here, name, below, known)
        order.pop()
    return known.get(node, (False, False))


def _joined(node: Any, name: str, below: list[Any], known: dict[Any, tuple[bool, bool]]) -> tuple[bool, bool]:
    kinds = [known[each] for each in below]
    stream, bounded = any(kind[0] for kind in kinds), any(kind[1] for kind in kinds)
    if name.startswith(("Add", "Sub")) and len(below) > 1:
        shapes = {tuple(each._input_metadata[0].shape) for each in below if each._input_metadata}
        alike = len(shapes) == 1  # a shift is of other shape
        return (stream or (alike and not all(kind[1] for kind in kinds)), bounded)
    return stream, bounded and not stream
