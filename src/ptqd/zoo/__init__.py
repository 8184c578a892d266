"""Small trained models that ship with the package, and the scripts that trained them."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"

MODELS = {"fashion-ldm": _WEIGHTS / "fashion-ldm"}
CLASSIFIER = _WEIGHTS / "fashion-classifier"
REFERENCE = _WEIGHTS / "fashion-reference.safetensors"
