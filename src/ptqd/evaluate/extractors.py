"""Image encoders of transformers as feature extractors: DINOv2, CLIP, and any with a pooled output."""

from pathlib import Path
from typing import Any

import torch

from ptqd.errors import InputError
from ptqd.evaluate.features import Features


class ImageEncoder:
    """Pooled features of an image encoder: CLIP's projected embedding, else the pooled output.

    It has neither spatial features nor class logits, so there is no spatial distance and no class agreement in it.

    Args:
        model: of transformers.
        processor: its image processor, which resizes and normalises.
    """

    image_shape = None

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "ImageEncoder":
        """From a folder or hub id, such as ``facebook/dinov2-base`` or ``openai/clip-vit-large-patch14``.

        Raises:
            InputError: transformers is not installed, or there is no such model.
        """
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError as error:
            raise InputError("features by an image encoder need transformers; pip install transformers") from error
        try:
            processors: Any = AutoImageProcessor
            loaded = AutoModel.from_pretrained(name), processors.from_pretrained(name)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{name} is no image encoder of transformers ({reason}); give a folder that save_pretrained wrote, "
                "or a hub id"
            ) from error
        return cls(*loaded)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        """Features of images (N, C, H, W) in [-1, 1]; grey ones are shown as RGB."""
        pixels = ((images.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        inputs = self.processor(images=list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        values = inputs["pixel_values"].to(self.model.device)
        embed = getattr(self.model, "get_image_features", self.model)
        made = embed(pixel_values=values)
        pooled = made if isinstance(made, torch.Tensor) else made.pooler_output
        if pooled is None:
            raise InputError(f"{type(self.model).__name__} has no pooled output; choose an encoder that has one")
        nothing = pooled.new_zeros(len(pooled), 0)
        return Features(pooled.flatten(1).float(), nothing, nothing)
