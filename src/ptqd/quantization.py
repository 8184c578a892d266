"""A model and a Recipe give a quantized model; what matched and what did not is reported."""

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ptqd.clock import set_clock
from ptqd.components import denoiser_name, scheduler_of, with_components
from ptqd.errors import InputError
from ptqd.layers import ActivationQuantizer, QuantAttnProcessor, QuantConv2d, QuantLayer, QuantLinear
from ptqd.plan import StepPlan
from ptqd.progress import track
from ptqd.recipe import Quantizer, Recipe, Rule
from ptqd.sampling import Sampling, sample

QuantModule = QuantLayer | QuantAttnProcessor


@dataclass(frozen=True)
class Coverage:
    """What a recipe did to a model.

    Attributes:
        quantized: dotted names of the quantized layers and attention products.
        skipped: name and reason of those left in full precision.
    """

    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def insert_quantizers(model: nn.Module, recipe: Recipe) -> Coverage:
    """Replace a denoiser's layers, in place, by quantized ones that still have to observe and freeze, or to be loaded.

    Args:
        model: holds ``nn.Conv2d``, ``nn.Linear`` and diffusers ``Attention`` modules; may be on the meta device.
        recipe: which bits where.

    Returns:
        What matched and what did not.

    Raises:
        InputError: a rule of the recipe matches no layer, or nothing at all was quantized.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for rule in recipe.rules:
        if not rule.optional and not any(fnmatchcase(name, rule.match) for name in layers):
            raise InputError(
                f"the rule match={rule.match!r} matches no layer of {type(model).__name__}; "
                f"its layers are named like {', '.join(sorted(layers)[:3])}"
            )
    quantized: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name, layer in layers.items():
        rule_or_none = recipe.rule_for(name)
        if rule_or_none is not None and rule_or_none.skip:
            skipped.append((name, f"rule {rule_or_none.match!r}"))
            continue
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            skipped.append((name, f"padding_mode {layer.padding_mode!r}"))
            continue
        weights, activations, widths = recipe.weights, recipe.activations, recipe.widths
        if rule_or_none is not None:
            weights = _with_bits(weights, rule_or_none.weight_bits)
            activations = _with_bits(activations, rule_or_none.activation_bits)
            if rule_or_none.activation_bits is not None:
                widths = ()
        kind: Any = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        put_layer(model, name, kind(layer, weights, activations, widths))
        quantized.append(name)
    if recipe.attention:
        _insert_products(model, recipe, quantized, skipped)
    if not quantized:
        raise InputError(f"{type(model).__name__} holds no convolution, linear layer or attention to quantize")
    return Coverage(tuple(quantized), tuple(skipped))


def _insert_products(model: nn.Module, recipe: Recipe, quantized: list[str], skipped: list[tuple[str, str]]) -> None:
    """The attention products' part of :func:`insert_quantizers`."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Attention):
            continue
        if type(module.processor) in (AttnProcessor, AttnProcessor2_0):
            module.set_processor(QuantAttnProcessor(recipe.activations, recipe.softmax_bits, recipe.widths))
            quantized.append(f"{name}.processor")
        else:
            skipped.append((name, f"attention products of {type(module.processor).__name__}"))


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _with_bits(spec: Quantizer, bits: int | None) -> Quantizer:
    return spec if bits is None else replace(spec, bits=bits)


def quant_modules(model: nn.Module) -> list[QuantModule]:
    """Its quantized layers and attention products."""
    return [m for m in model.modules() if isinstance(m, QuantLayer | QuantAttnProcessor)]


def check_weights(model: nn.Module, name: str) -> None:
    """Raise InputError, naming the first, if parameters are NaN or infinite."""
    for key, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name}.{key} holds NaN or infinite weights; the checkpoint is damaged, get it again")


def quantize(
    pipe: DiffusionPipeline, recipe: str | Recipe, run: Sampling, *, progress: bool = False
) -> DiffusionPipeline:
    """Quantize a pipeline's denoiser.

    The activation ranges are found while the full-precision pipeline samples ``recipe.calibration_samples`` whole
    trajectories: each layer sees exactly the inputs it really gets, drawn evenly over all sampling steps
    (Q-Diffusion, arXiv 2302.04304), guidance included.

    Args:
        pipe: any diffusers pipeline with a UNet or transformer; it is left untouched.
        recipe: a shorthand such as ``"w4a8"``, a TOML file, or a Recipe.
        run: how it samples.
        progress: show a bar.

    Returns:
        A pipeline of the same class that shares every other component with ``pipe``. ``save_pretrained`` writes
        packed integer codes; :func:`ptqd.load` loads it again.

    Raises:
        InputError: NaN weights or activations, or a rule that matches nothing.
    """
    recipe = Recipe.parse(recipe)
    name = denoiser_name(pipe)
    check_weights(getattr(pipe, name), name)
    model = copy.deepcopy(getattr(pipe, name))
    coverage = insert_quantizers(model, recipe)
    quantized = with_components(pipe, **{name: model}, scheduler=copy.deepcopy(scheduler_of(pipe)))
    modules = quant_modules(model)
    for module in modules:
        module.observe()
    calibration = run.apart("calibration").replace(samples=recipe.calibration_samples)
    for _ in sample(quantized, calibration, output="latent", progress="calibrating" if progress else None):
        pass
    for module in track(modules, "finding ranges" if progress else None):
        module.freeze()
    PtqdQuantizer(PtqdConfig(recipe.to_dict())).adopt(model, coverage)
    return quantized


def with_weights(recipe: Recipe, plan: StepPlan, layers: Collection[str]) -> Recipe:
    """A recipe with a plan's bits for the weights of layers, by a rule for each.

    Raises:
        InputError: the plan names something else than the quantized layers.
    """
    rules = []
    for layer, bits in plan.weights.items():
        rule = recipe.rule_for(layer)
        if layer not in layers or (rule is not None and rule.skip):
            raise InputError(
                f"the plan gives bits to the weights of {layer!r}, which is no quantized layer of the model"
            )
        rules.append(Rule(layer, bits, None if rule is None else rule.activation_bits))
    return replace(recipe, rules=(*recipe.rules, *rules))


def ptqd_quantizer(pipe: DiffusionPipeline) -> "PtqdQuantizer":
    """What ptqd left with the denoiser that it quantized.

    Raises:
        InputError: ptqd did not quantize it.
    """
    quantizer = getattr(getattr(pipe, denoiser_name(pipe)), "hf_quantizer", None)
    if not isinstance(quantizer, PtqdQuantizer):
        raise InputError("this pipeline was not quantized by ptqd; quantize it first")
    return quantizer


def coverage_of(pipe: DiffusionPipeline) -> Coverage:
    """What a recipe did to a pipeline that ptqd quantized.

    Raises:
        InputError: ptqd did not quantize it.
    """
    return ptqd_quantizer(pipe).coverage


class _Method(StrEnum):
    PTQD = "ptqd"


class PtqdConfig(QuantizationConfigMixin):
    """``quantization_config`` in a saved denoiser's ``config.json``."""

    def __init__(self, recipe: dict[str, Any], plan: dict[str, Any] | None = None, quant_method: str = "ptqd") -> None:
        self.quant_method = _Method(quant_method)
        self.recipe = recipe
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        plan = {} if self.plan is None else {"plan": self.plan}
        return {"quant_method": self.quant_method.value, "recipe": self.recipe, **plan}

    to_diff_dict = to_dict


class PtqdQuantizer(DiffusersQuantizer):
    """Lets diffusers' ``from_pretrained`` and ``save_pretrained`` handle denoisers that ptqd quantized."""

    use_keep_in_fp32_modules = False
    requires_calibration = False
    coverage: Coverage

    def adopt(self, model: ModelMixin, coverage: Coverage) -> None:
        """Mark a model as quantized by ptqd, so that it saves as such."""
        self.coverage = coverage
        model.register_to_config(quantization_config=self.quantization_config)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a file that lacks some of the model's tensors."""
        if missing_keys:
            raise InputError(f"the saved model lacks {missing_keys[0]!r}; the file is damaged or of another model")
        return missing_keys

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        """False: codes and scales are ordinary buffers."""
        return False

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        kwargs["keep_in_fp32_modules"].append("scale")  # half precision has not the range for them
        recipe, config = Recipe.from_dict(self.quantization_config.recipe, "the saved recipe"), self.quantization_config
        plan = None if config.plan is None else StepPlan.from_dict(config.plan, "the saved plan")
        if plan is not None:
            recipe = with_weights(recipe, plan, {name for name, _ in model.named_modules()})
        self.coverage = insert_quantizers(model, recipe)
        if plan is not None:
            set_clock(model, plan)
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantLayer):
                module.refresh(model.dtype)
            elif isinstance(module, ActivationQuantizer):
                module.refresh()

    @property
    def is_serializable(self) -> bool:
        """Codes, scales and zero points save as safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are integers."""
        return False


AUTO_QUANTIZER_MAPPING["ptqd"] = PtqdQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["ptqd"] = PtqdConfig
