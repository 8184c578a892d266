"""The rows of a denoiser's calls: what of the arguments belongs to each sample, and what all samples share.

Which is which is asked of the pipeline itself: what is twice as long for two samples as for one belongs to the samples.
A length alone does not say it: the rotary table of a transformer may be as long as the batch is large.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.pipeline_parts import denoiser_name, denoiser_of, scheduler_of
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.timesteps import Call, timestep_argument, timestep_in, with_timestep
from ptqd.errors import InputError

PROBED_PROMPTS = 16  # of which it is asked whether they are as long as each other


class _Stop(Exception):  # noqa: N818  # no error: the call was seen
    pass


@dataclass(frozen=True)
class Leaf:
    """What one row has in a place of the arguments.

    Attributes:
        how: ``"stacked"``: a tensor, the rows' to be put together along an axis; ``"item"``: an element of a list with
            one for each row; ``"shared"``: the same for all rows.
        value: it.
        axis: of rows that are stacked: the first, but for features that come by layer first.
    """

    how: str
    value: Any
    axis: int = 0


@dataclass(frozen=True)
class Row:
    """One row of a call.

    Attributes:
        tree: the call's arguments and keywords, with a leaf in each place.
        kind: rows of one kind can be called together.
    """

    tree: Any
    kind: Any

    def kept(self) -> "Row":
        """The same with tensors of its own, that do not hold the whole batch in memory."""
        return Row(_mapped(self.tree), self.kind)


@dataclass(frozen=True)
class CallLayout:
    """Where in a denoiser's arguments the samples' rows are.

    Attributes:
        model: the denoiser.
        by_row: the places, as paths of keys, of tensors and lists with an entry for each row, and along which axis.
        padded: see :func:`padded`.
    """

    model: nn.Module
    by_row: Mapping[tuple[Any, ...], int]
    padded: bool

    @classmethod
    def of(cls, pipe: DiffusionPipeline, sampling: Sampling, name: str | None = None) -> "CallLayout":
        """Of a run: found by the first calls for one sample and for two.

        Raises:
            InputError: the denoiser is never called, or no argument is longer for two samples.
        """
        model = denoiser_of(pipe, name)
        run = sampling.replace(samples=max(2, sampling.samples))
        one = dict(_sizes(_with_timestep_by_row(model, *_first_call(pipe, run, range(1), name))))
        try:
            two = dict(_sizes(_with_timestep_by_row(model, *_first_call(pipe, run, range(2), name))))
        except InputError:
            if sampling.batch > 1:
                raise
            rows = next((size[0] for size in one.values() if len(size) > 1), 0)  # a pipeline that takes one at a time
            argument = timestep_argument(model) or ()
            two = {
                path: (2 * size[0], *size[1:])
                for path, size in one.items()
                if size and size[0] == rows and (len(size) > 1 or path[-1] in argument)
            }
        by_row: dict[tuple[Any, ...], int] = {}
        for path, size in one.items():
            pairs = zip(size, two.get(path, ()), strict=False)
            axis = next((axis for axis, (a, b) in enumerate(pairs) if a and b == 2 * a), None)
            if axis is not None:
                by_row[path] = axis
        if not by_row:
            raise InputError(
                f"no argument of {type(model).__name__} is longer for two samples than for one, so that ptqd cannot "
                "tell their rows apart; use a recipe without methods"
            )
        return cls(model, by_row, padded(pipe, run, name))

    def rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Row]:
        """The rows of a call."""
        call = _with_timestep_by_row(self.model, args, dict(kwargs))
        lengths = [size[self.by_row[path]] for path, size in _sizes(call) if path in self.by_row]
        trees = _split(call, (), self.by_row, min(lengths, default=1))
        digests: dict[int, str] = {}
        return [Row(tree, _kind(tree, digests)) for tree in trees]


def first_rows(pipe: DiffusionPipeline, sampling: Sampling, name: str | None = None) -> list[Row]:
    """The rows of a denoiser's first call for one sample: two, with classifier-free guidance in one call.

    Raises:
        InputError: as :meth:`CallLayout.of`.
    """
    layout = CallLayout.of(pipe, sampling, name)
    return [row.kept() for row in layout.rows(*_first_call(pipe, sampling, range(1), name))]


def padded(pipe: DiffusionPipeline, sampling: Sampling, name: str | None = None) -> bool:
    """Whether samples alone differ in the shapes of what a denoiser is given, so that in a batch some are padded.

    That is asked of the first :data:`PROBED_PROMPTS` samples whose arguments differ.
    """
    run = sampling.replace(samples=max(2, sampling.samples))
    shapes = {repr(list(_sizes(_first_call(pipe, run, [i], name)))) for i in _different(run)}
    return len(shapes) > 1


def plain_rows(*args: torch.Tensor) -> list[Row]:
    """The rows of a call whose arguments are tensors with one entry for each row."""
    by_row = {(0, i): 0 for i in range(len(args))}
    return [Row(tree, _kind(tree, {})) for tree in _split((args, {}), (), by_row, len(args[0]))]


def join_rows(rows: Sequence[Row]) -> Call:
    """The arguments of a call with some rows, of one kind."""
    args, kwargs = _join([row.tree for row in rows])
    return args, kwargs


def _different(sampling: Sampling) -> list[int]:
    """Samples whose arguments may be of different lengths: other texts, or pictures and tensors of other sizes."""

    def size(value: object) -> object:
        return value if isinstance(value, str) else getattr(value, "shape", getattr(value, "size", None))

    lists = [value for value in sampling.call.values() if isinstance(value, list) and len(set(map(size, value))) > 1]
    return list(range(min(max(map(len, lists), default=0), sampling.samples, PROBED_PROMPTS)))


def _first_call(pipe: DiffusionPipeline, sampling: Sampling, indices: Sequence[int], name: str | None) -> Call:
    """The arguments of a denoiser's first call, for some samples.

    The pipeline is stopped there. What it would set back at its end is set back here: its scheduler, and the processors
    of the attentions, which perturbed-attention guidance (PAG) exchanges.
    """
    called: Any = getattr(pipe, name or denoiser_name(pipe))
    processors = [(module, module.processor) for module in called.modules() if hasattr(module, "processor")]
    seen: list[Call] = []

    def keep(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    state = dict(vars(scheduler_of(pipe)))
    try:
        with hooked(called.register_forward_pre_hook(keep, with_kwargs=True)):
            run_batch(pipe, sampling, indices, "latent")
    except _Stop:
        pass
    finally:
        vars(pipe.scheduler).clear()
        vars(pipe.scheduler).update(state)
        for module, processor in processors:
            module.processor = processor
    if not seen:
        raise InputError(f"{type(pipe).__name__} never calls its {name or denoiser_name(pipe)}")
    return seen[0]


def _with_timestep_by_row(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The same call with one timestep for each row of the batch, so that rows of several steps can be mixed."""
    call = (args, dict(kwargs))
    told = timestep_in(model, call)
    if told is None:
        return call
    others = [value for value in (*args, *kwargs.values()) if value is not told]
    sample = next((x for x in others if isinstance(x, torch.Tensor) and x.ndim > 1), None)
    listed = next((x for x in others if isinstance(x, list) and x and isinstance(x[0], torch.Tensor)), None)
    if sample is None and listed is None:
        return call
    rows, device = (len(sample), sample.device) if sample is not None else (len(listed), listed[0].device)  # type: ignore[arg-type, index]
    given = torch.as_tensor(told).to(device)
    return with_timestep(model, call, given.expand(rows) if given.numel() == 1 else given)


def _sizes(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """The size of every tensor and list in a tree, by its path."""
    if isinstance(node, torch.Tensor):
        yield path, tuple(node.shape)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _sizes(value, (*path, key))
    elif isinstance(node, list | tuple):
        if path and isinstance(node, list):
            yield path, (len(node),)
        for i, value in enumerate(node):
            yield from _sizes(value, (*path, i))


def _split(node: Any, path: tuple[Any, ...], by_row: Mapping[tuple[Any, ...], int], rows: int) -> list[Any]:
    """A tree for each row, with leaves in the places of tensors and plain values."""
    axis = by_row.get(path)
    if axis is not None and isinstance(node, torch.Tensor) and node.shape[axis] % rows == 0:
        each_has = node.shape[axis] // rows  # frames, in some
        return [Leaf("stacked", node.narrow(axis, i * each_has, each_has), axis) for i in range(rows)]
    if axis is not None and isinstance(node, list) and len(node) == rows:
        return [Leaf("item", value) for value in node]
    if isinstance(node, Mapping):
        each = {key: _split(value, (*path, key), by_row, rows) for key, value in node.items()}
        return [{key: trees[i] for key, trees in each.items()} for i in range(rows)]
    if isinstance(node, tuple | list):
        lists = [_split(value, (*path, i), by_row, rows) for i, value in enumerate(node)]
        return [type(node)(trees[i] for trees in lists) for i in range(rows)]
    return [Leaf("shared", node)] * rows


def _join(trees: Sequence[Any]) -> Any:
    first = trees[0]
    if isinstance(first, Leaf):
        if first.how == "stacked":
            return torch.cat([tree.value for tree in trees], first.axis)
        return [tree.value for tree in trees] if first.how == "item" else first.value
    if isinstance(first, Mapping):
        return {key: _join([tree[key] for tree in trees]) for key in first}
    return type(first)(_join([tree[i] for tree in trees]) for i in range(len(first)))


def _mapped(node: Any) -> Any:
    """The same tree with copies of the tensors that are stacked or items."""
    if isinstance(node, Leaf):
        own = node.how != "shared" and isinstance(node.value, torch.Tensor)
        return Leaf(node.how, node.value.clone(), node.axis) if own else node
    if isinstance(node, Mapping):
        return {key: _mapped(value) for key, value in node.items()}
    return type(node)(_mapped(value) for value in node)


def _kind(node: Any, digests: dict[int, str]) -> Any:
    """What rows have in common that can be called together: shapes of their own tensors, and all that is shared."""
    if isinstance(node, Leaf):
        return (node.how, _facts(node.value, digests if node.how == "shared" else None))
    if isinstance(node, Mapping):
        return tuple((key, _kind(value, digests)) for key, value in node.items())
    return (type(node).__name__, *(_kind(value, digests) for value in node))


def _facts(value: Any, digests: dict[int, str] | None) -> Any:
    """Plain facts of a value: of tensors the shape, and what they hold where all rows share it."""
    if isinstance(value, torch.Tensor):
        shape = (tuple(value.shape), str(value.dtype))
        if digests is None:
            return shape
        if id(value) not in digests:
            digests[id(value)] = _digest(value)
        return (*shape, digests[id(value)])
    if isinstance(value, Mapping):
        return tuple((key, _facts(one, digests)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(_facts(one, digests) for one in value)
    return value if value is None or isinstance(value, str | int | float) else repr(type(value))


def _digest(value: torch.Tensor) -> str:
    data = value.detach().cpu().contiguous()
    return hashlib.sha256(data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest() if data.numel() else ""
