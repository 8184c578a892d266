"""Small trained models that ship with the package and the architectures of large ones."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"

MODELS = {name: _WEIGHTS / name for name in ("fashion-ldm", "fashion-ddpm", "fashion-dit", "fashion-flow")}
CLASSIFIER = _WEIGHTS / "fashion-classifier"
_PUBLISHED = Path(__file__).parent / "architectures"
ARCHITECTURES = {path.stem: path for path in sorted(_PUBLISHED.glob("*.json"))}  # denoisers' configurations
CONFIGS = {  # as CompVis published them
    name: _PUBLISHED / f"{name}.yaml"
    for name in ("ldm4-imagenet", "ldm4-bedrooms", "ldm8-churches", "ldm4-celebahq", "ldm4-ffhq")
}
REFERENCE = _WEIGHTS / "fashion-reference.safetensors"
