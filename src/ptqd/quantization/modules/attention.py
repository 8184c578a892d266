"""Quantized attention products, whatever computes them.

The operands of q.k and p.v are rounded where torch multiplies them: inside an attention's ``forward`` a torch function
mode takes ``scaled_dot_product_attention``, and the two plain products that diffusers' older processors make. So the
processor stays diffusers' own, of any class, and may be exchanged: attention slicing, an IP-Adapter or PAG change who
asks for the products, not that they are rounded. A processor that leaves torch's products aside is an error.
"""

import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.overrides import TorchFunctionMode

from ptqd.diffusion.from_module import WRITTEN_OUT
from ptqd.errors import InputError
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.recipe import QuantSpec

PRODUCTS = "products"  # the child of an attention that rounds its operands
_MULTIPLIES = {"scaled_dot_product_attention", "dispatch_attention_fn", "get_attention_scores", "baddbmm"}


class AttentionProducts(nn.Module):
    """The products q.k and p.v with quantized operands."""

    def __init__(
        self,
        activations: QuantSpec,
        softmax_bits: int,
        widths: Sequence[int] = (),
        ranges: int = 1,
        *,
        rowwise: bool = False,
    ) -> None:
        super().__init__()
        self.query, self.key = (
            ActivationQuantizer(activations, widths, ranges=ranges, rowwise=rowwise) for _ in range(2)
        )
        self.value = ActivationQuantizer(activations, widths, axis=-2, ranges=ranges, rowwise=True)
        self.probabilities = ActivationQuantizer(QuantSpec(softmax_bits, symmetric=False, range="minmax"))

    @property
    def quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """Of q, k, softmax and v."""
        return self.query, self.key, self.probabilities, self.value

    def observe(self) -> None:
        """Show the operands of the following forward passes to the observers."""
        for quantizer in self.quantizers:
            quantizer.observe()

    def bypass(self) -> None:
        """Compute in full precision, and collect nothing."""
        for quantizer in self.quantizers:
            quantizer.bypass()

    def freeze(self) -> None:
        """Fix the operands' ranges."""
        for quantizer in self.quantizers:
            quantizer.freeze()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """What ``torch.nn.functional.scaled_dot_product_attention`` computes, without dropout.

        Args:
            query: (..., L, D).
            key: (..., K, D); with ``enable_gqa`` of fewer heads.
            value: (..., K, V).
            attn_mask: boolean, or added to the scores, of a shape that broadcasts to (..., L, K).
            dropout_p: ignored; there is none at inference.
            is_causal: a query sees the keys up to its own place.
            scale: of the scores; ``1 / sqrt(D)`` where it is not said.
            enable_gqa: neighbouring heads of the query share a head of key and value.

        Returns:
            (..., L, V).
        """
        heads = query.shape[:-2]
        if not key.shape[-2]:  # nothing to see
            return F.scaled_dot_product_attention(query, key, value)
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        key, value = (x.expand(*heads, *x.shape[-2:]) for x in (key, value))
        q, k, v = (x.flatten(0, -3) if x.ndim > 2 else x[None] for x in (query, key, value))  # N*heads,L,D
        scores = self.scores(q, k, query.shape[-1] ** -0.5 if scale is None else scale)
        seen = None
        if is_causal:
            attn_mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            whole = scores.view(*heads, *scores.shape[1:])
            boolean = attn_mask.dtype == torch.bool
            hidden = ~attn_mask if boolean else attn_mask == -math.inf
            if not boolean:
                whole = whole + attn_mask.masked_fill(hidden, 0)
            seen = ~hidden.all(-1, keepdim=True)  # a query that sees no key gets 0, as torch does it
            scores = whole.masked_fill(hidden, torch.finfo(whole.dtype).min).view(scores.shape)
        probabilities = scores.softmax(-1)
        if seen is not None:
            probabilities = (probabilities.view(*heads, *scores.shape[1:]) * seen).view(scores.shape)
        output = self.weighted(probabilities, v)
        return output.view(*heads, *output.shape[1:])

    def scores(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores (N*heads, L, K) of queries (N*heads, L, D) and keys (N*heads, K, D)."""
        query, key = self.query(query), self.key(key)
        return torch.baddbmm(query.new_zeros(1), query, key.transpose(-1, -2), beta=0, alpha=scale)

    def weighted(self, probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Values (N*heads, K, V) weighted by probabilities (N*heads, L, K): (N*heads, L, V)."""
        return torch.bmm(self.probabilities(probabilities), self.value(value))


class _Rounding(TorchFunctionMode):
    """Inside the block the operands of attention products are rounded.

    Attributes:
        seen: products of queries and keys so far.
    """

    def __init__(self, products: AttentionProducts) -> None:
        super().__init__()
        self.products, self.seen = products, 0

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, products = kwargs or {}, self.products
        if func is F.scaled_dot_product_attention:
            self.seen += 1
            return products(*args, **kwargs)
        if func is torch.baddbmm:  # of Attention.get_attention_scores, the key turned
            self.seen += 1
            added, query, turned = args
            scores = products.scores(query, turned.transpose(1, 2), kwargs.get("alpha", 1))
            return scores + added if kwargs.get("beta", 1) else scores
        if func is torch.Tensor.unflatten:  # whose own code in Python torch.compile does not trace inside a mode
            return torch.unflatten(*args, **kwargs)
        if func is torch.bmm and not kwargs:
            return products.weighted(*args)
        return func(*args, **kwargs)


class _PlainRounding(TorchFunctionMode):
    """The same for attention that is written out: products come in pairs, queries with keys, and with the values.

    The second product's probabilities are what the first one's scores became; its other operand are the values.

    Attributes:
        seen: products so far.
    """

    def __init__(self, products: AttentionProducts) -> None:
        super().__init__()
        self.products, self.seen = products, 0

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, products = kwargs or {}, self.products
        if func is F.scaled_dot_product_attention:
            self.seen += 2
            return products(*args, **kwargs)
        places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)][-2:]
        if func not in WRITTEN_OUT or len(places) < 2 or any(args[i].ndim < 3 for i in places):
            return func(*args, **kwargs)
        first = self.seen % 2 == 0
        self.seen += 1
        rounding = (products.query, products.key) if first else (products.probabilities, products.value)
        rounded = list(args)
        for place, each in zip(places, rounding, strict=True):
            rounded[place] = each(args[place])
        return func(*rounded, **kwargs)


class QuantAttention:
    """What a quantized attention adds to its own class, of diffusers; see :func:`quantized_class`.

    Attributes:
        products: rounds the operands; None where a recipe leaves the products in full precision.
    """

    products: AttentionProducts | None
    plain_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention computes, its products' operands rounded.

        Raises:
            InputError: its processor computes no product that ptqd can round.
        """
        own: Any = super()
        if self.products is None:
            return own.forward(*args, **kwargs)
        plain = not hasattr(self, "processor")
        rounding = _PlainRounding(self.products) if plain else _Rounding(self.products)
        with rounding:
            output = own.forward(*args, **kwargs)
        if not rounding.seen:
            processor: Any = self.processor  # type: ignore[attr-defined]
            backend = getattr(processor, "_attention_backend", None)
            by = type(processor).__name__ + ("" if backend is None else f" with the backend {str(backend)!r}")
            raise InputError(
                f"{by} leaves torch's attention aside, so a quantized attention cannot round its products; use one of "
                "torch's scaled_dot_product_attention (the denoiser's set_default_attn_processor(), or "
                "set_attention_backend('native')), or quantize with a recipe of attention = false"
            )
        return output

    def fuse_projections(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the fused layer would be a copy in full precision.

        Raises:
            InputError: always.
        """
        raise InputError(
            "the projections of a quantized attention cannot be fused: the fused layer would not be quantized; leave "
            "fuse_qkv_projections out"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles know the class it was made from."""
        return _new, (self.plain_class,), self.__dict__


@functools.cache
def quantized_class(base: Any) -> Any:
    """The quantized subclass of an attention's class, of the same name."""
    body = {"plain_class": base, "__doc__": base.__doc__, "__module__": base.__module__}
    return types.new_class(base.__name__, (QuantAttention, base), exec_body=lambda space: space.update(body))


def _new(base: Any) -> nn.Module:
    kind = quantized_class(base)
    return cast(nn.Module, kind.__new__(kind))


def quantize_attention(attention: nn.Module, products: AttentionProducts | None) -> None:
    """Make an attention of diffusers a quantized one, in place."""
    changed: Any = attention
    kind: Any = type(attention)
    changed.__class__ = quantized_class(kind)
    changed.products = products


def attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A denoiser's attentions by name: modules of diffusers that a processor computes, or a plain network's own."""
    plain = _plain_attentions(model)
    for name, module in model.named_modules():
        if name in plain or isinstance(module, Attention) or callable(getattr(module, "processor", None)):
            yield name, module


def _plain_attentions(model: nn.Module) -> frozenset[str]:
    """The modules of a network that is none of diffusers' that multiply activations; see ``ModuleDenoiser``."""
    config: Any = getattr(model, "config", {})
    return frozenset(config.get("attentions") or ()) if isinstance(config, Mapping) else frozenset()


def has_products(attention: Any) -> bool:
    """Whether an attention's code names a product that ptqd can round; linear attention, for one, has none.

    Of an attention of diffusers it is its processor's code; a plain one was found by its products.
    """
    processor = getattr(attention, "processor", None)
    if processor is None:
        return True
    kind: Any = type(processor)
    return any(_names(method, 2) & _MULTIPLIES for method in (kind.__call__, getattr(kind, "forward", None)))


def _names(function: Any, depth: int) -> set[str]:
    """What a function's code names, and what functions of its module that it calls do."""
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    names = set(code.co_names)
    near = (function.__globals__.get(name) for name in names)
    inner = [f for f in near if isinstance(f, types.FunctionType) and f.__module__ == function.__module__]
    return names.union(*(_names(f, depth - 1) for f in inner)) if depth else names
