"""Our metrics against torch-fidelity's and scipy's, from the same features; our networks, from the same weights.

    pip install --no-deps torch-fidelity
    python bench/metrics.py

torchvision is replaced by an empty module: torch-fidelity imports it for images, and for VGG16, which it is handed.
The networks' weights are random; the published ones have the same names and shapes.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from scipy import linalg
from torch import nn

from ptqd.metrics import Inception, Lpips, Moments, density_coverage, frechet_distance, inception_score, kernel_distance
from ptqd.metrics.precision_recall import precision_recall

for missing in ("", ".datasets", ".transforms", ".transforms.functional", ".models"):
    sys.modules[f"torchvision{missing}"] = MagicMock()

WIDTH, REAL, FAKE = 64, 2500, 2000


def main() -> None:
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    random = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5
    real = torch.randn(REAL, WIDTH, generator=random) @ mix
    fake = torch.randn(FAKE, WIDTH, generator=random) @ mix * 1.1 + 0.1
    logits = 3 * torch.randn(FAKE, 10, generator=random)
    a, b = Moments.of(fake), Moments.of(real)
    statistics = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
    root = linalg.sqrtm(statistics[0]["sigma"] @ statistics[1]["sigma"]).real
    difference = statistics[0]["mu"] - statistics[1]["mu"]
    by_scipy = difference @ difference + np.trace(statistics[0]["sigma"] + statistics[1]["sigma"] - 2 * root)
    ours = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    precision, recall = precision_recall(fake, real)
    theirs = calculate_precision_recall_full(fake.double(), real.double(), 3)
    kernel = kernel_mmd(fake[:2000].double().numpy(), real[:2000].double().numpy(), kid_kernel="poly",
                        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)  # fmt: skip
    score = isc_features_to_metric(logits, shuffle=False)
    mean, spread = inception_score(logits)
    rows = [
        (
            "Frechet distance, torch-fidelity",
            ours,
            fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        ),
        ("Frechet distance, scipy's sqrtm", ours, float(by_scipy)),
        ("kernel distance, torch-fidelity", kernel_distance(fake[:2000], real[:2000]), float(kernel)),
        ("Inception score, mean", mean, score["inception_score_mean"]),
        ("Inception score, deviation", spread, score["inception_score_std"]),
        ("precision, torch-fidelity", precision.value, theirs[0]),
        ("recall, torch-fidelity", recall.value, theirs[1]),
    ]
    radii = torch.cdist(real.double(), real.double()).kthvalue(6, 1).values  # Naeem et al., eq. 3 and 4, in one go
    inside = torch.cdist(fake.double(), real.double()) < radii
    density, coverage = density_coverage(fake, real)
    rows += [
        ("density, by its equation", density.value, inside.double().sum().item() / 5 / FAKE),
        ("coverage, by its equation", coverage.value, inside.any(0).double().mean().item()),
    ]
    print(f"{FAKE} and {REAL} x {WIDTH} features, torch {torch.__version__}")
    for name, mine, other in rows:
        print(f"  {name:34s} {mine:.9f}  {other:.9f}  relative difference {abs(mine - other) / abs(other):.1e}")
    networks()


@torch.no_grad()
def networks() -> None:
    from torch_fidelity import sample_similarity_lpips
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 64, 48), dtype=torch.uint8)
    ours = Inception().eval()
    for norm in (module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.01, 0.1)  # type: ignore[union-attr]
    with TemporaryDirectory() as folder:
        torch.save(ours.state_dict(), Path(folder) / "weights.pth")
        theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], Path(folder) / "weights.pth")
    first: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: first.append(output[:, :7]))
    pooled, logits = theirs(images)
    made = ours.features(images / 127.5 - 1)
    print("8 images of 64 x 48, random weights, largest difference against largest value")
    for name, mine, other in (
        ("Inception's pool3", made.pooled, pooled),
        ("Inception's logits without bias", made.logits, logits),
        ("ADM's spatial features", made.spatial, first[0].permute(0, 2, 3, 1).flatten(1)),
    ):
        print(f"  {name:34s} {((mine - other).abs().max() / other.abs().max()).item():.1e}")

    perceptual = Lpips().eval()
    for i in range(5):
        nn.init.uniform_(getattr(perceptual, f"lin{i}").model[1].weight)
    linear = {n: v for n, v in perceptual.state_dict().items() if n.startswith("lin")}
    vgg = MagicMock(features=nn.Sequential(*perceptual.net.features, nn.MaxPool2d(2)))
    with (
        patch.object(sample_similarity_lpips, "load_state_dict_from_url", return_value=linear),
        patch.object(sample_similarity_lpips, "torchvision_load_pretrained_vgg16", return_value=vgg),
    ):
        judge = sample_similarity_lpips.SampleSimilarityLPIPS("theirs")
    other = judge(images, images.flip(0)).flatten()
    mine = perceptual.distances(images / 127.5 - 1, images.flip(0) / 127.5 - 1)
    print(f"  {'LPIPS':34s} {((mine - other).abs().max() / other.abs().max()).item():.1e}")


if __name__ == "__main__":
    main()
