"""The networks whose features are used to compare pictures, and the names of figures on them.

Only the standard Inception network's features give FID, sFID, KID and IS. The same formulas on
EfficientNet-Lite0 are FD-EffNet, sFD-EffNet, KD-EffNet and IS-EffNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from regrow.lab.measure.features import EfficientNetFeatures


class Network(str, Enum):
    """A network whose features are used to compare pictures."""

    EFFNET = "effnet"
    INCEPTION = "inception"


@dataclass(frozen=True)
class PictureFeatures:
    """The features of N pictures, float32 on the CPU.

    Args:
        pooled: features before the classifier ``(N, C)``, for Fréchet and kernel distance and others.
        spatial: a few channels of a middle layer at all positions ``(N, S)``, S near 2,000, for the spatial
            Fréchet distance (Nash et al., 2021).
        logits: the classifier's outputs ``(N, classes)``, for the Inception Score's formula.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    @classmethod
    def joined(cls, parts: Sequence[PictureFeatures]) -> PictureFeatures:
        """Join the features of several sets."""
        names = ("pooled", "spatial", "logits")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Labels:
    """The names of figures on a network's features.

    Args:
        network: the network itself.
        fd: Fréchet distance of the pooled features.
        sfd: Fréchet distance of the spatial features.
        kd: kernel distance.
        inception_score: the Inception Score's formula.
    """

    network: str
    fd: str
    sfd: str
    kd: str
    inception_score: str


class Extractor(Protocol):
    """Features of pictures.

    Attributes:
        name: short, for file names; two extractors with one name must give the same features.
        labels: names of figures on its features.
    """

    name: str
    labels: Labels

    def __call__(self, images: Tensor) -> PictureFeatures:
        """Compute the features of pictures ``(B, 3, H, W)`` with values in [0, 1], of any size."""


class EffNet:
    """Computes features by EfficientNet-Lite0: works offline, with the weights of a small package.

    Args:
        device: where it runs.

    Raises:
        MissingWeightsError: if that package is not installed (extra ``measure``).
    """

    name = Network.EFFNET.value
    labels = Labels("EfficientNet-Lite0", "FD-EffNet", "sFD-EffNet", "KD-EffNet", "IS-EffNet")

    def __init__(self, device: str = "cpu") -> None:
        self.network = EfficientNetFeatures().to(device)
        # The weights are loaded at the first use; if they are missing, raise the error now.
        self.network(torch.zeros(1, 3, 8, 8))

    def __call__(self, images: Tensor) -> PictureFeatures:
        return _on_cpu(*self.network.measured(images))


class Inception:
    """Computes features by the published FID's Inception v3; torch-fidelity downloads its weights.

    torch-fidelity needs torchvision. Its weights come from its GitHub page at the first use and stay in
    torch.hub's folder (``~/.cache/torch/hub/checkpoints``). The spatial features are the first 7 channels
    of ``mixed_6/conv`` (in torch-fidelity ``Mixed_6d.branch1x1``), 17 x 17 x 7 = 2,023 numbers (Nash et
    al., 2021). Pictures are rounded to 8 bits, as it takes them.

    Args:
        device: where it runs.

    Raises:
        ImportError: if torch-fidelity is not installed.
        OSError: if the weights can't be fetched.
    """

    name = Network.INCEPTION.value
    labels = Labels("Inception v3 of torch-fidelity", "FID", "sFID", "KID", "IS")
    spatial_channels = 7

    def __init__(self, device: str = "cpu") -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "features: inception needs torch-fidelity, which downloads the weights at its first use: "
                f"run pip install torch-fidelity ({error})"
            ) from error
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        self.network: Any = network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> PictureFeatures:
        seen: list[Tensor] = []
        layer = self.network.Mixed_6d.branch1x1
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            pooled, logits = self.network((images * 255).round().to(self.device, torch.uint8))
        finally:
            hook.remove()
        return _on_cpu(pooled, seen[0][:, : self.spatial_channels].flatten(1), logits)


def extractor(network: Network, device: str = "cpu") -> Extractor:
    """Make the extractor of a network, with its weights.

    Args:
        network: the network.
        device: where it runs.

    Raises:
        ImportError: if the package with the weights, or the one that downloads them, is not installed.
        OSError: if the weights can't be downloaded.
    """
    return EffNet(device) if network is Network.EFFNET else Inception(device)


def _on_cpu(pooled: Tensor, spatial: Tensor, logits: Tensor) -> PictureFeatures:
    return PictureFeatures(*(part.float().cpu() for part in (pooled, spatial, logits)))
