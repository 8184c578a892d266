"""A denoiser that ptqd quantized: what marks it, and how diffusers saves and loads it."""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ptqd.diffusion.macs import on_meta
from ptqd.diffusion.pipeline_parts import denoiser_name, denoiser_names, denoiser_of
from ptqd.diffusion.plain_copy import weights_elsewhere
from ptqd.errors import ArtifactError, InputError, PtqdError, raised_by
from ptqd.quantization.budget import release_memory
from ptqd.quantization.modules.adapters import adapters_to_dict, insert_adapters, know_quantized, support_lora
from ptqd.quantization.modules.attention import PRODUCTS, AttentionProducts, QuantAttention, attention_modules
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.plan_steps import set_plan
from ptqd.quantization.recipe import LayerType, Recipe, Rule
from ptqd.quantization.sites import activation_quantizers, quantized_layers, quantized_sites
from ptqd.quantization.step_ranges import StepRanges, set_ranges
from ptqd.quantization.swap import (
    Coverage,
    check_weights,
    has_ip_adapter,
    insert_quantizers,
    layer_types,
    names_of,
    quantized_by_earlier_versions,
)
from ptqd.quantization.weights_in_memory import choose_weights


def with_weights(recipe: Recipe, plan: PrecisionPlan, layers: Mapping[str, LayerType]) -> Recipe:
    """A recipe with a plan's bits for the weights of layers, by a rule for each.

    Raises:
        InputError: the plan names something else than the quantized layers.
    """
    rules = []
    for layer, bits in plan.weights.items():
        rule = recipe.rule_for(names_of(layer), layers[layer]) if layer in layers else None
        if layer not in layers or (rule is not None and rule.skip):
            raise InputError(
                f"the plan gives bits to the weights of {layer!r}, which is no quantized layer of the model"
            )
        rules.append(replace(rule or Rule(layer), match=layer, weight_bits=bits, type=None))
    return replace(recipe, rules=(*recipe.rules, *rules))


def ptqd_quantizer(pipe: DiffusionPipeline, name: str | None = None) -> "PtqdQuantizer":
    """What ptqd left with the denoiser that it quantized; of two with the first, or the named one.

    Raises:
        InputError: ptqd did not quantize it.
    """
    model = denoiser_of(pipe, name)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, PtqdQuantizer):
        raise InputError(not_ours(model, name or denoiser_name(pipe)))
    return quantizer


def not_ours(model: nn.Module, name: str) -> str:
    """What to say of a denoiser that ptqd's quantized layers are expected in, and that has none."""
    method = getattr(model, "quantization_method", None)
    if method is None:
        return f"the {name} is not quantized; quantize it with ptqd first"
    return (
        f"the {name} is quantized by {getattr(method, 'value', method)}; give what ptqd.quantize made, not its export"
    )


def coverage_of(pipe: DiffusionPipeline) -> Coverage:
    """What a recipe did to a pipeline that ptqd quantized; of two denoisers by their names.

    Raises:
        InputError: ptqd did not quantize it.
    """
    names = denoiser_names(pipe)
    each = {name: ptqd_quantizer(pipe, name).coverage for name in names}
    if len(names) == 1:
        return each[names[0]]
    return Coverage(
        tuple(f"{name}.{layer}" for name, coverage in each.items() for layer in coverage.quantized),
        tuple((f"{name}.{layer}", why) for name, coverage in each.items() for layer, why in coverage.skipped),
    )


class _Method(StrEnum):
    PTQD = "ptqd"


class PtqdConfig(QuantizationConfigMixin):
    """``quantization_config`` in a saved denoiser's ``config.json``; or given to diffusers' ``from_pretrained``.

    Given to it, with nothing but a recipe, it has a denoiser in full precision rounded to nearest while it is loaded.
    Nothing is calibrated then: activations get ranges for each token as it comes (:meth:`ptqd.Recipe.uncalibrated`).
    :func:`ptqd.quantize` is for all other recipes, and for fewer errors.

    >>> PtqdConfig("w8a8").recipe["activations"]["dynamic"]
    True

    Args:
        recipe: by which it was quantized, as plain values; or by which it is to be, also a shorthand or a
            :class:`ptqd.Recipe`.
        plan: of its bits by step, if it has one.
        ranges: by step, if it has any.
        quantized: the names of what is quantized; None in folders of earlier versions, where the recipe says it.
        skipped: what is not, and why.
        adapters: LoRAs that are loaded; see :func:`ptqd.quantization.modules.adapters.adapters_to_dict`.
        fused: the ranks of LoRAs that were fused, by layer.
        quant_method: ``"ptqd"``.

    Raises:
        InputError: a shorthand or a Recipe that needs calibration.
    """

    def __init__(
        self,
        recipe: dict[str, Any] | str | Recipe,
        plan: dict[str, object] | None = None,
        ranges: dict[str, object] | None = None,
        quantized: list[str] | None = None,
        skipped: list[list[str]] | None = None,
        adapters: dict[str, object] | None = None,
        fused: dict[str, int] | None = None,
        quant_method: str = "ptqd",
    ) -> None:
        self.quant_method = _Method(quant_method)
        self.recipe = recipe if isinstance(recipe, dict) else Recipe.parse(recipe).uncalibrated().to_dict()
        self.plan = plan
        self.ranges = ranges
        self.quantized = quantized
        self.skipped = skipped
        self.adapters = adapters
        self.fused = fused

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        names = ("plan", "ranges", "quantized", "skipped", "adapters", "fused")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"quant_method": self.quant_method.value, "recipe": self.recipe, **given}

    to_diff_dict = to_dict

    def describe(self, model: nn.Module, coverage: Coverage) -> None:
        """Take up what the model holds now: layers, adapters that were loaded or fused since."""
        sites = list(quantized_sites(model))
        self.quantized = [f"{site.name}.{PRODUCTS}" if site.weight is None else site.name for site in sites]
        self.skipped = [list(pair) for pair in coverage.skipped]
        self.adapters = adapters_to_dict(model)
        self.fused = {name: layer.adapter_rank for name, layer in quantized_layers(model) if layer.adapter_rank} or None


class PtqdQuantizer(DiffusersQuantizer):
    """Lets diffusers' ``from_pretrained`` and ``save_pretrained`` handle denoisers that ptqd quantized."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    coverage: Coverage
    model: ModelMixin | None = None
    dtype: torch.dtype | None = None  # that is loaded
    _wide: tuple[str, ...] = ()  # modules that the class keeps in float32

    def __setstate__(self, state: dict[str, Any]) -> None:
        """PEFT has to know the quantized layers in the process that a pickle is read in, too."""
        support_lora()
        self.__dict__.update(state)

    def adopt(self, model: ModelMixin, coverage: Coverage) -> None:
        """Mark a model as quantized by ptqd, so that it saves as such."""
        support_lora()
        know_quantized(model)
        self.coverage, self.model = coverage, model
        _register(model, self.quantization_config)
        model.hf_quantizer = self
        model.is_quantized = False  # as which diffusers would not cast it; these layers know how to be cast
        model.quantization_method = self.quantization_config.quant_method

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a file that lacks some of the model's tensors."""
        if missing_keys:
            raise ArtifactError(f"the saved model lacks {missing_keys[0]!r}; the file is damaged or of another model")
        return missing_keys

    def check_if_quantized_param(self, *args: object, **kwargs: object) -> bool:
        """False: codes and scales are ordinary buffers."""
        return False

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Take note of the type that is loaded, which stays."""
        self.dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else None
        return torch_dtype

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        keep: list[str] = kwargs["keep_in_fp32_modules"]  # the class's own
        self._wide = tuple(name for name in keep if name not in QuantLayer.kept)
        keep.extend(name for name in QuantLayer.kept if name not in keep)
        support_lora()
        self.coverage = prepare(model, self.quantization_config)
        for _, layer in quantized_layers(model):
            layer.weight = torch.empty(0, dtype=layer.weight.dtype)  # made of the codes, once these are here
        if self.quantization_config.quantized is None:
            _products_as_processors(model)
        self.model = model
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: object) -> None:
        if not self.pre_quantized:
            self._round_to_nearest(model)
            return
        kept: Any = type(model)._keep_in_fp32_modules
        if isinstance(kept, list):
            kept[:] = [name for name in kept if name not in QuantLayer.kept]
        _processors_as_products(model)
        choose_weights(model)
        for name, layer in quantized_layers(model):
            wide = any(part in self._wide for part in name.split("."))
            layer.refresh(torch.float32 if wide else self.dtype or model.dtype)
        for _, quantizer in activation_quantizers(model):
            quantizer.refresh()
        model.is_quantized = False  # see adopt

    def _round_to_nearest(self, model: ModelMixin) -> None:
        """Quantize what was loaded in full precision, a layer at a time; see :class:`PtqdConfig`."""
        recipe = Recipe.from_dict(self.quantization_config.recipe, "the recipe").uncalibrated()
        check_weights(model, type(model).__name__)
        coverage = insert_quantizers(model, recipe)
        choose_weights(model)
        for _, layer in quantized_layers(model):
            layer.encode(layer.weight)
            if layer.holds_codes:
                release_memory()
        for module in model.modules():
            if isinstance(module, AttentionProducts):
                module.probabilities.set_static_range(torch.tensor([[0.0, 1.0]]))  # all that a softmax gives
        self.adopt(model, coverage)

    @property
    def is_serializable(self) -> bool:
        """True; asked before saving, so that what the model holds now is what is written.

        Raises:
            InputError: the model holds what its configuration does not make, so that it could not be loaded again.
        """
        if self.model is not None:
            config = self.quantization_config
            config.describe(self.model, self.coverage)
            _register(self.model, config)
            _check_loadable(self.model, config)
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is written: weights that are offloaded are fetched."""
        elsewhere = {} if self.model is None else weights_elsewhere(self.model)
        return {name: elsewhere.get(name, value) for name, value in state_dict.items()}, {}

    @property
    def is_trainable(self) -> bool:
        """Codes are integers."""
        return False


def _register(model: Any, config: PtqdConfig) -> None:
    """Put a configuration into a model's, and keep what diffusers has set there beside the values it was made with."""
    before = vars(model.config)
    model.register_to_config(quantization_config=config)
    for name, value in before.items():
        if not name.startswith("_") and name != "quantization_config":
            setattr(model.config, name, value)


def prepare(model: nn.Module, config: PtqdConfig) -> Coverage:
    """Give an architecture, on the meta device, the layers, adapters, ranges and plan that a configuration says."""
    recipe = Recipe.from_dict(config.recipe, "the saved recipe")
    plan = None if config.plan is None else PrecisionPlan.from_dict(config.plan, "the saved plan")
    ranges = None if config.ranges is None else StepRanges.from_dict(config.ranges)
    if config.adapters is not None:
        insert_adapters(model, config.adapters)
    if plan is not None:
        recipe = with_weights(recipe, plan, layer_types(model, recipe))
    saved = config.quantized
    if saved is None:
        saved = quantized_by_earlier_versions(model, recipe)
    coverage = insert_quantizers(model, recipe, ranges, saved)
    know_quantized(model)
    for name, rank in (config.fused or {}).items():
        dict(quantized_layers(model))[name].make_adapter(rank)
    if ranges is not None:
        set_ranges(model, ranges)
    if plan is not None:
        set_plan(model, plan)
    skipped = coverage.skipped if config.skipped is None else tuple((name, why) for name, why in config.skipped)
    return Coverage(coverage.quantized, skipped)


def _check_loadable(model: ModelMixin, config: PtqdConfig) -> None:
    """Whether a folder of this model would load.

    Raises:
        InputError: it would not.
    """
    kind = type(model).__name__
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    attached = next((name for name in own if ".processor." in name), None)
    if attached is None and has_ip_adapter(model):
        attached = "encoder_hid_proj"
    try:
        fresh = on_meta(model)
        prepare(fresh, config)
        wanted = {name: tuple(value.shape) for name, value in fresh.state_dict().items()}
    except (PtqdError, TypeError, ValueError, LookupError, AttributeError) as error:
        if raised_by(error, "ptqd") and not isinstance(error, PtqdError):
            raise  # a bug
        if attached is None:
            raise InputError(f"{kind} cannot be saved, its configuration does not make it again: {error}") from error
        wanted = {}
    different = sorted(name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name))
    if attached is not None and different:
        raise InputError(
            f"{kind} has an IP-Adapter ({attached!r}), which is not saved with it; unload it "
            "(pipe.unload_ip_adapter()), save, and load it onto the saved pipeline"
        )
    if different:
        raise InputError(
            f"{kind} was changed since it was made: its {different[0]!r} is not what its configuration makes, so that "
            "the folder could not be loaded; undo the change, or make it before quantizing"
        )


def _products_as_processors(model: nn.Module) -> None:
    """Put attention products where the files of earlier versions have them: in the processor's place."""
    for _, attention in attention_modules(model):
        if isinstance(attention, QuantAttention) and attention.products is not None:
            kept: Any = attention
            kept.__dict__["_own_processor"] = kept.__dict__.pop("processor")
            kept._modules["processor"] = kept._modules.pop(PRODUCTS)
            kept.products = None


def _processors_as_products(model: nn.Module) -> None:
    """Undo :func:`_products_as_processors`."""
    for module in model.modules():
        if isinstance(module, QuantAttention) and "_own_processor" in module.__dict__:
            kept: Any = module
            del kept.products
            kept._modules[PRODUCTS] = kept._modules.pop("processor")
            kept.processor = kept.__dict__.pop("_own_processor")


AUTO_QUANTIZER_MAPPING["ptqd"] = PtqdQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["ptqd"] = PtqdConfig
