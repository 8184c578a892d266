"""A denoiser that ptqd quantized: what marks it, and how diffusers saves and loads it."""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ptqd.diffusion.pipeline_parts import denoiser_name
from ptqd.errors import ArtifactError, InputError
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.plan_steps import set_plan
from ptqd.quantization.recipe import LayerType, Recipe, Rule
from ptqd.quantization.sites import activation_quantizers, quantized_layers
from ptqd.quantization.step_ranges import StepRanges, set_ranges
from ptqd.quantization.swap import Coverage, insert_quantizers, layer_types, names_of


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

    def __init__(
        self,
        recipe: dict[str, object],
        plan: dict[str, object] | None = None,
        ranges: dict[str, object] | None = None,
        quant_method: str = "ptqd",
    ) -> None:
        self.quant_method = _Method(quant_method)
        self.recipe = recipe
        self.plan = plan
        self.ranges = ranges

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        optional = {"plan": self.plan, "ranges": self.ranges}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"quant_method": self.quant_method.value, "recipe": self.recipe, **given}

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
            raise ArtifactError(f"the saved model lacks {missing_keys[0]!r}; the file is damaged or of another model")
        return missing_keys

    def check_if_quantized_param(self, *args: object, **kwargs: object) -> bool:
        """False: codes and scales are ordinary buffers."""
        return False

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        kwargs["keep_in_fp32_modules"].extend(
            ["scale", "smooth_scale", "global_scale"]
        )  # half precision has not the range for them
        recipe, config = Recipe.from_dict(self.quantization_config.recipe, "the saved recipe"), self.quantization_config
        plan = None if config.plan is None else PrecisionPlan.from_dict(config.plan, "the saved plan")
        ranges = None if config.ranges is None else StepRanges.from_dict(config.ranges)
        if plan is not None:
            recipe = with_weights(recipe, plan, layer_types(model, recipe))
        self.coverage = insert_quantizers(model, recipe, ranges)
        if ranges is not None:
            set_ranges(model, ranges)
        if plan is not None:
            set_plan(model, plan)
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: object) -> None:
        for _, layer in quantized_layers(model):
            layer.refresh(model.dtype)
        for _, quantizer in activation_quantizers(model):
            quantizer.refresh()

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
