"""Distances between two sets of pictures, on features of any extractor, in float64.

The name of a figure depends on the network: only the standard Inception network's features give FID, KID
and IS. With EfficientNet-Lite0 the Fréchet distance is FD-EffNet. Figures are kept in files: if a formula
changes, raise `_MEASURE` in `regrow.lab.measure.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

_BLOCK = 512


class FeatureSet:
    """Features of one set of pictures; what several comparisons need is computed once, in float64.

    Args:
        features: ``(N, C)``.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self._radii: dict[int, Tensor] = {}

    def blocks(self) -> Iterator[Tensor]:
        """List the features in float64, a few rows at a time, so that 50,000 pictures fit in memory."""
        return (block.double() for block in self.features.split(_BLOCK))

    @cached_property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        """The mean ``(C,)`` and a root ``R`` of the covariance ``R'R``."""
        x = self.features.double()
        mean = x.mean(0)
        return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R

    @cached_property
    def likeness(self) -> float:
        """The cubic kernel's mean over all pairs of different rows."""
        x, count = self.features.double(), len(self.features)
        both = sum(float(_cubic(block, x).sum()) for block in self.blocks())
        own = float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())
        return (both - own) / (count * (count - 1))

    def radius(self, neighbours: int) -> Tensor:
        """Compute the distance of each row to its k-th nearest other row ``(N,)``."""
        if neighbours not in self._radii:
            x = self.features.double()
            # The nearest row is the row itself.
            nearest = [
                _distances(block, x).kthvalue(neighbours + 1, dim=1).values for block in self.blocks()
            ]
            self._radii[neighbours] = torch.cat(nearest)
        return self._radii[neighbours]


def frechet_distance(a: Tensor | FeatureSet, b: Tensor | FeatureSet) -> float:
    """Compute the Fréchet distance of two Gaussians (Heusel et al., 2017).

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2))``. With fewer pictures than
    features the covariances are singular, and the distance is larger than that of the distributions:
    compare only figures for the same number of pictures.

    Args:
        a: features ``(N, C)``, N >= 2.
        b: features ``(M, C)``, M >= 2.

    Raises:
        ValueError: if there are too few rows, or the widths differ.
    """
    (mean_a, root_a), (mean_b, root_b) = (x.gaussian for x in _sets(a, b, least=2))
    difference = mean_a - mean_b
    # The trace of the root is the sum of the singular values of A B' for any A'A = S_a, B'B = S_b.
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = sum(float((x * x).sum()) for x in (root_a, root_b))
    return float(difference @ difference) + spread - 2 * float(cross)


def kernel_distance(a: Tensor | FeatureSet, b: Tensor | FeatureSet) -> float:
    """Compute the unbiased squared maximum mean discrepancy with the kernel ``(x . y / C + 1)^3`` (KID).

    It uses all pairs, not random subsets as the original (Binkowski et al., 2018); both have the same
    expectation. The result may be slightly negative.

    Args:
        a: features ``(N, C)``, N >= 2.
        b: features ``(M, C)``, M >= 2.

    Raises:
        ValueError: if there are too few rows, or the widths differ.
    """
    one, other = _sets(a, b, least=2)
    y = other.features.double()
    between = sum(float(_cubic(block, y).sum()) for block in one.blocks())
    pairs = len(one.features) * len(other.features)
    return one.likeness + other.likeness - 2 * between / pairs


def precision_recall(
    real: Tensor | FeatureSet, generated: Tensor | FeatureSet, neighbours: int = 3
) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al., 2019).

    Precision: the share of generated pictures that lie within some real picture's distance to its k-th
    nearest real neighbour. Recall: the same with the sets exchanged.

    Args:
        real: features ``(N, C)``, N > ``neighbours``.
        generated: features ``(M, C)``, M > ``neighbours``.
        neighbours: k (the paper: 3).

    Raises:
        ValueError: if there are too few rows, or the widths differ.
    """
    data, made = _sets(real, generated, least=neighbours + 1)
    y, reach = made.features.double(), made.radius(neighbours)
    precise = torch.zeros(len(y), dtype=torch.bool)
    recalled = []
    for block, radius in zip(data.blocks(), data.radius(neighbours).split(_BLOCK), strict=True):
        between = _distances(block, y)
        precise |= (between <= radius[:, None]).any(0)
        recalled.append((between <= reach[None]).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def inception_score(logits: Tensor) -> float:
    """Compute ``exp E KL(p(y|x) || p(y))`` (Salimans et al., 2016) over all pictures, without splits.

    Args:
        logits: outputs of a classifier ``(N, classes)``.
    """
    share = logits.double().softmax(1)
    divergence = share * (share.clamp_min(1e-300).log() - share.mean(0).clamp_min(1e-300).log())
    return float(divergence.sum(1).mean().exp())


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _sets(a: Tensor | FeatureSet, b: Tensor | FeatureSet, *, least: int) -> tuple[FeatureSet, FeatureSet]:
    """Make a `FeatureSet` of both, and check their shapes."""
    one, other = (x if isinstance(x, FeatureSet) else FeatureSet(x) for x in (a, b))
    for name, x in (("a", one.features), ("b", other.features)):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"{name}: shape {tuple(x.shape)} is not allowed, it must be (N >= {least}, C)")
    widths = one.features.shape[1], other.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"b: {widths[1]} features are not allowed, a has {widths[0]}; both must be equal")
    return one, other
