"""Image encoders of transformers as feature extractors: DINOv2, CLIP, and any with a pooled output."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ptqd.errors import InputError, MissingDependencyError
from ptqd.metrics.features.extractor import Features
from ptqd.metrics.features.weights import weights_key


class ImageEncoder:
    """Pooled features of an image encoder: CLIP's projected embedding, else the pooled output.

    It has neither spatial features nor class logits, so there is no spatial distance and no class agreement in it.

    Args:
        model: of transformers.
        processor: its image processor, which resizes and normalises.
        tokenizer: for texts, which CLIP embeds too.
    """

    image_shape = None
    classifies = False
    inception = False

    def __init__(self, model: Any, processor: Any, tokenizer: Any = None) -> None:
        self.model, self.processor, self.tokenizer = model.eval(), processor, tokenizer

    @classmethod
    def from_pretrained(cls, name: str | Path, *, texts: bool = False) -> "ImageEncoder":
        """From a folder or hub id, such as ``facebook/dinov2-base`` or ``openai/clip-vit-large-patch14``.

        Args:
            name: the folder or hub id.
            texts: with its tokenizer, to embed texts too.

        Raises:
            InputError: transformers is not installed, there is no such model, or it embeds no texts.
        """
        try:
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "features by an image encoder need transformers; pip install transformers"
            ) from error
        try:
            processors: Any = AutoImageProcessor
            tokenizer = AutoTokenizer.from_pretrained(name) if texts else None
            loaded = AutoModel.from_pretrained(name), processors.from_pretrained(name), tokenizer
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{name} is no image encoder of transformers ({reason}); give a folder that save_pretrained wrote, "
                "or a hub id"
            ) from error
        encoder = cls(*loaded)
        if texts and not hasattr(encoder.model, "get_text_features"):
            raise InputError(
                f"{name} embeds no texts; a CLIP score needs a CLIP, such as openai/clip-vit-large-patch14"
            )
        return encoder

    @property
    def key(self) -> str:
        """Changes with the weights and with how images are taken."""
        return sha256((weights_key(self.model) + self.processor.to_json_string()).encode()).hexdigest()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings of texts (N, D), as wide as those of images; what is too long is cut off, as CLIP does."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        output = self.model.get_text_features(**inputs)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        """Features of images (N, C, H, W) in [-1, 1]; grey ones are shown as RGB."""
        pixels = ((images.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        inputs = self.processor(images=list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        values = inputs["pixel_values"].to(self.model.device)
        embed = getattr(self.model, "get_image_features", self.model)
        output = embed(pixel_values=values)
        pooled = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
        if pooled is None:
            raise InputError(f"{type(self.model).__name__} has no pooled output; choose an encoder that has one")
        nothing = pooled.new_zeros(len(pooled), 0)
        return Features(pooled.flatten(1).float(), nothing, nothing)
