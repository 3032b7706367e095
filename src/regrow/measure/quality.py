"""Distances between two sets of pictures, on features of any extractor. All in float64.

Which network made the features decides what a number may be called: only the standard Inception network's
give FID, KID and IS. With EfficientNet-Lite0 the Fréchet distance is FD-EffNet.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., 2017).

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2))``. With fewer pictures than
    features the covariances are singular, and the distance is larger than that of the distributions:
    compare only figures of equally many pictures.

    Args:
        a: features ``(N, C)``, N >= 2.
        b: features ``(M, C)``, M >= 2.

    Raises:
        ValueError: if there are too few rows, or the widths differ.
    """
    _check(a, b, least=2)
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    # The trace of the root is the sum of the singular values of A B' for any A'A = S_a, B'B = S_b.
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum(float((x * x).sum()) for x in roots)
    return float(difference @ difference) + spread - 2 * float(cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x . y / C + 1)^3`` (KID).

    Over all pairs, without the subsets that the original averages over; may be slightly negative.

    Args:
        a: features ``(N, C)``, N >= 2.
        b: features ``(M, C)``, M >= 2.

    Raises:
        ValueError: if there are too few rows, or the widths differ.
    """
    _check(a, b, least=2)
    a, b = a.double(), b.double()

    def within(x: Tensor) -> float:
        kernel = _cubic(x, x)
        return float(kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * float(_cubic(a, b).mean())


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    Precision: the share of generated pictures that lie within some real picture's distance to its k-th
    nearest real neighbour. Recall: the same with the sets exchanged.

    Args:
        real: features ``(N, C)``, N > ``neighbours``.
        generated: features ``(M, C)``, M > ``neighbours``.
        neighbours: k (the paper: 3).

    Raises:
        ValueError: if there are too few rows, or the widths differ.
    """
    _check(real, generated, least=neighbours + 1)
    real, generated = real.double(), generated.double()
    between = _distances(real, generated)
    precision = (between <= _radius(real, neighbours)[:, None]).any(0)
    recall = (between <= _radius(generated, neighbours)[None]).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def inception_score(logits: Tensor) -> float:
    """``exp E KL(p(y|x) || p(y))`` (Salimans et al., 2016), over all pictures at once, without splits.

    Args:
        logits: of a classifier ``(N, classes)``.
    """
    share = logits.double().softmax(1)
    divergence = share * (share.clamp_min(1e-300).log() - share.mean(0).clamp_min(1e-300).log())
    return float(divergence.sum(1).mean().exp())


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radius(x: Tensor, neighbours: int) -> Tensor:
    """The distance of each row to its k-th nearest other row."""
    # The nearest of all is the row itself.
    return _distances(x, x).kthvalue(neighbours + 1, dim=1).values


def _check(a: Tensor, b: Tensor, *, least: int) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"{name}: shape {tuple(x.shape)} is not allowed, it must be (N >= {least}, C)")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: {b.shape[1]} features are not allowed, it must be those of a, {a.shape[1]}")
