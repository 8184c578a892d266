"""An evaluator by the names of its networks, as a command line gives them."""

from pathlib import Path

from ptqd.errors import InputError
from ptqd.metrics.evaluator import Evaluator
from ptqd.metrics.features.extractor import Extractor, Reference
from ptqd.metrics.features.fashion_classifier import FashionClassifier
from ptqd.metrics.features.image_encoder import ImageEncoder
from ptqd.metrics.features.inception import Inception
from ptqd.metrics.features.lpips import Lpips
from ptqd.metrics.references import load_reference
from ptqd.zoo import CLASSIFIER, REFERENCE

FASHION, INCEPTION, NONE = "fashion", "inception", "none"


def load_evaluator(
    features: str = NONE,
    *,
    reference: str | Path | None = None,
    lpips: str | None = None,
    clip: str | None = None,
    device: str = "cpu",
    needs_reference: bool = True,
) -> Evaluator | None:
    """Load what images are judged by.

    Args:
        features: ``"fashion"`` (a classifier that ships with the package), ``"inception"`` or the file of its weights,
            an image encoder of transformers (folder or hub id), or ``"none"``.
        reference: what images are compared with: a folder of images, a dataset, an .npz or a .safetensors file; of
            ``"fashion"`` its test images by default.
        lpips: folder of LPIPS' weights, or ``"hub"`` for torch hub's; None for no LPIPS.
        clip: a CLIP of transformers, folder or hub id; None for no CLIP score.
        device: where the networks run.
        needs_reference: refuse features without a reference.

    Returns:
        None where nothing was asked for.

    Raises:
        InputError: a reference without features, or the other way round; weights that cannot be loaded.
    """
    reference = None if reference is None else Path(reference)
    options = {"judge": features, "reference": None if reference is None else str(reference)}
    options |= {"lpips": lpips, "clip": clip}
    if features == NONE and reference is not None:
        raise InputError("--reference goes with a --judge: fashion, inception, or an image encoder of transformers")
    if features not in (NONE, FASHION) and reference is None and needs_reference:
        raise InputError(
            f"--judge {features} needs --reference: a folder of images, a dataset, an .npz or a .safetensors file"
        )
    lpips_network = None
    if lpips is not None:
        lpips_network = Lpips.from_pretrained(None if lpips in ("", "hub") else Path(lpips)).to(device)
    clip_network = None
    if clip is not None:
        clip_network = ImageEncoder.from_pretrained(clip, texts=True)
        clip_network.model.to(device)
    if features == NONE:
        name = " and ".join(["LPIPS"] * (lpips_network is not None) + [str(clip)] * (clip is not None))
        return Evaluator(name=name, lpips=lpips_network, clip=clip_network, options=options) if name else None
    extractor, title = _extractor(features, device)
    against: Path | str | None = reference
    statistics: Reference | None = None
    if reference is not None or features == FASHION:
        statistics = load_reference(reference or REFERENCE, extractor)
        against = reference or "the 10,000 test images"
    return Evaluator(extractor, statistics, f"{title}, against {against}", lpips_network, clip_network, options)


def _extractor(features: str, device: str) -> tuple[Extractor, str]:
    """The network, and what it is called in a report."""
    if features == FASHION:
        classifier: FashionClassifier = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
        return classifier, "ptqd's Fashion-MNIST classifier"
    if features == INCEPTION or Path(features).suffix in (".pth", ".pt", ".safetensors"):
        inception = Inception.from_pretrained(None if features == INCEPTION else Path(features)).to(device)
        return inception, "Inception v3 of the FID literature"
    encoder = ImageEncoder.from_pretrained(features)
    encoder.model.to(device)
    return encoder, features
