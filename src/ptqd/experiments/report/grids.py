"""Images side by side, as one picture."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


def grid(rows: Sequence[torch.Tensor], scale: int = 2, gap: int = 2) -> Image.Image:
    """Images side by side.

    Args:
        rows: each uint8 (n, H, W, C), all of one shape.
        scale: enlargement, by whole pixels.
        gap: white pixels between images.
    """
    n, height, width, channels = rows[0].shape
    sheet = np.full((len(rows) * (height + gap) - gap, n * (width + gap) - gap, channels), 255, np.uint8)
    for i, images in enumerate(rows):
        for j, image in enumerate(images.numpy()):
            sheet[i * (height + gap) : i * (height + gap) + height, j * (width + gap) : j * (width + gap) + width] = (
                image
            )
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
