"""The deep part of a denoiser: what changes least from step to step, and can be held while the outer blocks compute.

Of a UNet (DeepCache, Ma et al., arXiv 2312.00858) it is all but the first of its down blocks and the last of its up
blocks: what it gives are features of a lower resolution. Of a transformer whose blocks take and give one stream
(Delta-DiT, Chen et al., arXiv 2406.01125) it is all blocks but the first and the last: what it gives is what it adds.

The modules' classes are what changes, as a hook cannot leave out a call: each subclass is otherwise its own class.
"""

import functools
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ptqd.errors import InputError, UnsupportedError

LEAST_BLOCKS = 3  # of a transformer


@dataclass
class Features:
    """What the deep part gave in a call.

    Attributes:
        shape: of the sample that the call was for.
        outputs: of each module, by its path; of a transformer what all of them add, as ``"added"``.
        known: whether they are to be held, not computed.
    """

    shape: torch.Size | None
    outputs: dict[str, Any] = field(default_factory=dict)
    known: bool = False


_current = threading.local()


FeaturesOrNone = TypeVar("FeaturesOrNone", bound=Features | None)


@contextmanager
def using(features: FeaturesOrNone) -> Iterator[FeaturesOrNone]:
    """Let the deep part give what is known, or keep what it computes, in the calls of the block's time."""
    before = getattr(_current, "features", None)
    _current.features = features
    try:
        yield features
    finally:
        _current.features = before


def current_features() -> Features | None:
    """Those of :func:`using`, inside its block."""
    return getattr(_current, "features", None)


class OwnDeepPart:
    """A denoiser without modules, which keeps and holds what :func:`using` says itself."""

    @abstractmethod
    def open_deep_part(self) -> None:
        """Be ready for it.

        Raises:
            InputError: it cannot do it.
        """


def deep_modules(model: nn.Module) -> dict[str, str]:
    """The modules of a denoiser's deep part: their paths, in order, and what is done with each.

    Raises:
        InputError: it is not known which they are.
    """
    down, up, blocks = (
        list(found) if isinstance(found := getattr(model, name, None), nn.ModuleList) else []
        for name in ("down_blocks", "up_blocks", "transformer_blocks")
    )
    called = not any(isinstance(block, nn.ModuleList) for block in (*down, *up))  # as one, not part by part
    if called and len(down) == len(up) > 1:
        middle = ["mid_block"] if getattr(model, "mid_block", None) is not None else []
        inner = [f"down_blocks.{i}" for i in range(1, len(down))], [f"up_blocks.{i}" for i in range(len(up) - 1)]
        return dict.fromkeys([*inner[0], *middle, *inner[1]], "output")
    if len(blocks) > LEAST_BLOCKS and not hasattr(model, "single_transformer_blocks"):
        paths = [f"transformer_blocks.{i}" for i in range(1, len(blocks) - 1)]
        return {paths[0]: "first", **dict.fromkeys(paths[1:-1], "between"), paths[-1]: "last"}
    raise InputError(
        f"ptqd does not know the deep part of {type(model).__name__}, which has neither a UNet's blocks nor more than "
        f"{LEAST_BLOCKS} transformer blocks of one stream; let steps hold their output"
    )


def is_deep(layer: str, deep: Mapping[str, str]) -> bool:
    """Whether a layer, by its dotted name, is in the deep part."""
    return any(layer == path or layer.startswith(f"{path}.") for path in deep)


class _Deep:
    """What the class of a module in the deep part is given."""

    proxy_for: ClassVar[type[nn.Module]]
    deep_path: str
    deep_role: str

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickle knows no classes that are made; the module's own is."""
        return _made_again, (type(self).proxy_for,), vars(self)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        features = _features()
        if features is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.deep_role == "output":
            if not features.known:
                features.outputs[self.deep_path] = super().__call__(*args, **kwargs)  # type: ignore[misc]
            return features.outputs[self.deep_path]
        stream = _stream(self, args, kwargs)
        if features.known:
            return stream + features.outputs["added"] if self.deep_role == "last" else stream
        if self.deep_role == "first":
            features.outputs["before"] = stream
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.deep_role == "last":
            if not isinstance(output, torch.Tensor):
                raise UnsupportedError(f"the blocks of {type(self).__name__} give more than one stream; hold outputs")
            features.outputs["added"] = output - features.outputs.pop("before")
        return output


@torch.compiler.disable
def _features() -> Features | None:
    return current_features()


def _stream(block: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    stream = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(stream, torch.Tensor):
        raise UnsupportedError(f"{type(block).__name__} is not given its stream as ptqd knows it; hold outputs")
    return stream


def follow_deep_part(model: nn.Module) -> None:
    """Let a denoiser's deep part keep and hold what :func:`using` says, from now on.

    Raises:
        InputError: it is not known which modules it is, or it was exported as a whole.
    """
    if isinstance(model, OwnDeepPart):
        model.open_deep_part()
        return
    for path, role in deep_modules(model).items():
        module = model.get_submodule(path)
        kind: Any = type(module)
        module.__class__ = _deep(kind)
        vars(module).update(deep_path=path, deep_role=role)


def leave_deep_part(model: nn.Module) -> None:
    """Undo :func:`follow_deep_part`."""
    for module in model.modules():
        if isinstance(module, _Deep):
            module.__class__ = type(module).proxy_for  # type: ignore[assignment]
            for name in ("deep_path", "deep_role"):
                vars(module).pop(name, None)


def _made_again(kind: Any) -> Any:
    made = _deep(kind)
    return made.__new__(made)


@functools.cache
def _deep(kind: type[nn.Module]) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Deep, kind), {**names, "proxy_for": kind})
