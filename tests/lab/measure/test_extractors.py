"""What an extractor gives is what its network computes; figures carry the network's name."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.lab.measure.extractors import EffNet, Inception, Network, PictureFeatures, extractor
from regrow.lab.measure.features import EfficientNetFeatures


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def test_effnets_features_are_those_of_its_layers() -> None:
    features = extractor(Network.EFFNET)(pictures())
    plain = EfficientNetFeatures()
    assert torch.equal(features.pooled, plain(pictures()))
    network: Any = plain.network
    assert torch.equal(features.logits, network._fc(features.pooled))
    assert features.spatial.shape == (3, 14 * 14 * 10)
    seen = []
    # Of 16 blocks, those at stride 16 are 5 to 10.
    for block in network._blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain(pictures())
    at_stride_16 = [output for output in seen if output.shape[-1] == 14]
    assert torch.equal(features.spatial, at_stride_16[-2][:, :10].flatten(1))


def test_joined_features_are_those_of_all_pictures() -> None:
    seer = EffNet()
    joined = PictureFeatures.joined([seer(pictures()[:1]), seer(pictures()[1:])])
    torch.testing.assert_close(vars(joined), vars(seer(pictures())), rtol=1e-4, atol=1e-5)


class StandIn(nn.Module):
    """The part of torch-fidelity's documented extractor that is used, with other layers."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        generator = torch.Generator().manual_seed(0)
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        h = self.Mixed_6d.branch1x1(F.interpolate(x.float() / 128 - 1, (17, 17)))
        pooled = h.mean((2, 3)).repeat(1, 11)[:, :2048]
        return pooled, pooled[:, :1008]


def test_inceptions_features_come_from_the_documented_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    seer = extractor(Network.INCEPTION)
    assert isinstance(seer, Inception)
    bytes_ = torch.randint(0, 256, (3, 3, 20, 20), generator=torch.Generator().manual_seed(1))
    features = seer(bytes_.float() / 255)
    network = StandIn("", ["2048", "logits_unbiased"])
    pooled, logits = network(bytes_.to(torch.uint8))
    assert torch.equal(features.pooled, pooled)
    assert torch.equal(features.logits, logits)
    layer = network.Mixed_6d.branch1x1(F.interpolate(bytes_.float() / 128 - 1, (17, 17)))
    assert torch.equal(features.spatial, layer[:, :7].flatten(1))
    assert features.spatial.shape == (3, 2023)
    assert not seer.network.Mixed_6d.branch1x1._forward_hooks


def test_inception_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        extractor(Network.INCEPTION)


def test_only_inceptions_figures_are_called_fid() -> None:
    assert list(vars(Inception.labels).values())[1:] == ["FID", "sFID", "KID", "IS"]
    assert all(label.endswith("-EffNet") for label in list(vars(EffNet.labels).values())[1:])
