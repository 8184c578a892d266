"""LoRA on quantized layers: PEFT's own layers, around ours.

``pipe.load_lora_weights`` and all that follows it (scales, several adapters, switching, unloading) stay PEFT's. A
quantized layer's output gets the adapter's in full precision beside it; codes and ranges are not touched. Fusing puts
the adapter into the layer, as a branch of its own that saves with it.
"""

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import skip_init

from ptqd.errors import ArtifactError, InputError, MissingDependencyError
from ptqd.quantization.modules.linear_conv import BASE, QuantConv, QuantLinear, SplitConv


class OnQuantized:
    """What a LoRA of PEFT on a quantized layer does otherwise: it is fused into a branch, not into the weight."""

    plain_class: ClassVar[type[nn.Module]]  # of PEFT

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        if isinstance(module, QuantLinear):
            return module.shape[1], module.shape[0]
        return module.in_channels, module.out_channels

    def merge(self: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """Put adapters into the layer, as branches of its own; codes and ranges stay.

        Raises:
            InputError: a kind of LoRA that is no product of two matrices.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            if name in self.lora_variant:
                raise InputError(f"the adapter {name!r} needs the weight itself (DoRA does); do not fuse it")
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            if self.lora_bias[name]:
                raise InputError(f"the adapter {name!r} has a bias, which a branch has no place for; do not fuse it")
            if safe_merge and not bool(torch.isfinite(up.float().flatten(1) @ down.float().flatten(1)).all()):
                raise InputError(f"the adapter {name!r} holds NaN or infinite weights; it is not fused")
            self.get_base_layer().push_adapter(down, up.float() * self.scaling[name])
            self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Take them out again."""
        while self.merged_adapters:
            self.get_base_layer().pop_adapter(self.r[self.merged_adapters.pop()])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Other kinds of adapters are not made into this one."""
        return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles know the class it was made from."""
        return _new, (self.plain_class,), self.__dict__


class OnConvolution(OnQuantized):
    """The same of convolutions."""

    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: PEFT makes it of the base layer's own class, which must be torch's for the time."""
        quantized = self._modules[BASE]
        self._modules[BASE] = _plain_convolution(quantized)
        try:
            super().update_layer(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._modules[BASE] = quantized


@functools.cache
def _on_quantized(plain: Any) -> Any:
    """The subclass of a LoRA layer of PEFT that knows quantized layers, of the same name."""
    from peft.tuners.lora.layer import Linear

    own = OnQuantized if issubclass(plain, Linear) else OnConvolution
    return type(plain.__name__, (own, plain), {"plain_class": plain, "__module__": plain.__module__})


def _new(plain: Any) -> Any:
    kind = _on_quantized(plain)
    return kind.__new__(kind)


def _is_quantized(layer: object) -> bool:
    return isinstance(layer, QuantLinear | QuantConv | SplitConv)


@functools.cache
def support_lora() -> None:
    """Let PEFT know the quantized layers, where it is installed."""
    if importlib.util.find_spec("peft") is None:
        return
    from diffusers.loaders import FluxLoraLoaderMixin
    from peft.tuners.lora import layer
    from peft.tuners.lora import model as peft_model

    model: Any = peft_model
    plain = model.dispatch_default
    convolutions = (layer.Conv1d, layer.Conv2d, layer.Conv3d)

    def dispatch(target: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_quantized(target):
            return plain(target, *args, **kwargs)
        own = layer.Linear if isinstance(target, QuantLinear) else convolutions[len(target.kernel_size) - 1]
        return _on_quantized(own)(target, *args, **kwargs)

    model.dispatch_default = dispatch

    flux: Any = FluxLoraLoaderMixin
    expand = flux._maybe_expand_lora_state_dict.__func__
    flux._maybe_expand_lora_state_dict = classmethod(
        lambda cls, transformer, *args, **kwargs: expand(cls, _WithWeights(transformer), *args, **kwargs)
    )


class _WithWeights:
    """A denoiser whose state dict has the weights of quantized layers too, for who asks for their shapes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """With ``weight`` of each quantized layer, by its path."""
        weights = {f"{name}.weight": m.weight for name, m in self._model.named_modules() if _is_quantized(m)}
        return {**self._model.state_dict(), **weights}


def know_quantized(model: nn.Module) -> None:
    """Let LoRAs that were there before their layers were quantized know it, in place."""
    for _, tuned in tuned_layers(model):
        kind: Any = type(tuned)
        if _is_quantized(tuned.get_base_layer()) and not isinstance(tuned, OnQuantized):
            tuned.__class__ = _on_quantized(kind)


def _plain_convolution(layer: Any) -> nn.Module:
    """A convolution of torch of a quantized one's sizes, type and place; its numbers are of no use."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel_size) - 1]
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    like = layer.weight
    made: nn.Module = skip_init(kind, *sizes, groups=layer.groups, device=like.device, dtype=like.dtype)
    return made


def tuned_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers of a model by their paths."""
    for path, module in model.named_modules():
        if hasattr(module, BASE) and hasattr(module, "lora_A"):
            yield path, module


def adapters_to_dict(model: nn.Module) -> dict[str, Any] | None:
    """What makes a model's adapters anew, as plain values; None where it has none.

    Raises:
        InputError: adapters that are no LoRA of PEFT's.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    layers = dict(tuned_layers(model))
    adapters = {}
    for name, config in configs.items():
        values = {key: _plain(value) for key, value in config.to_dict().items() if value is not None}
        if values.get("peft_type") != "LORA":
            kind = values.get("peft_type")
            raise InputError(f"the adapter {name!r} is no LoRA but {kind}, which cannot be saved; unload it")
        scales = {path: float(layer.scaling[name]) for path, layer in layers.items() if name in layer.scaling}
        adapters[name] = {"config": values, "scaling": scales}
    if not adapters or not layers:
        return None
    some = next(iter(layers.values()))
    merged = {path: list(layer.merged_adapters) for path, layer in layers.items() if layer.merged_adapters}
    return {
        "loras": adapters,
        "active": list(some.active_adapters),
        "disabled": bool(some.disable_adapters),
        "merged": merged,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if value is None or isinstance(value, str | int | float) else str(getattr(value, "value", value))


def insert_adapters(model: Any, values: Mapping[str, Any]) -> None:
    """Make the adapters of a saved model anew, without numbers, before its weights are loaded.

    Raises:
        MissingDependencyError: PEFT is not installed.
        ArtifactError: the saved adapters are damaged.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("the saved model has a LoRA; install peft to load it (pip install peft)")
    from peft import LoraConfig, inject_adapter_in_model

    support_lora()
    try:
        for name, adapter in values["loras"].items():
            make: Any = LoraConfig.from_peft_type
            inject_adapter_in_model(make(**adapter["config"]), model, adapter_name=name, low_cpu_mem_usage=True)
            layers = dict(tuned_layers(model))
            for path, scaling in adapter["scaling"].items():
                layers[path].scaling[name] = float(scaling)
        for path, layer in tuned_layers(model):
            layer.set_adapter([name for name in values["active"] if name in layer.lora_A])
            layer.enable_adapters(not values["disabled"])
            layer.merged_adapters = list(values["merged"].get(path, ()))
            layer.requires_grad_(False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the saved model's LoRA is damaged ({error}); save the pipeline again") from error
    model._hf_peft_config_loaded = True


def without_merged(model: nn.Module) -> None:
    """Take adapters that are fused into full-precision weights away from around them, in place."""
    for path, layer in list(tuned_layers(model)):
        if layer.merged_adapters and torch.is_floating_point(layer.get_base_layer().weight):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if not any(True for _ in tuned_layers(model)) and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
