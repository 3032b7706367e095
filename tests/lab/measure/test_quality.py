"""Distances of feature sets against other libraries and against loops over their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from regrow.lab.measure.quality import (
    FeatureSet,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features(count: int, width: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g)
    return torch.randn(count, width, generator=g) @ mixing + torch.randn(width, generator=g)


SETS = [(40, 30, 8), (200, 150, 16), (10, 12, 24)]


def root_of(matrix: np.ndarray) -> np.ndarray:
    """The root of a covariance; scipy's own of a singular one is inexact."""
    values, vectors = scipy.linalg.eigh(matrix)
    values[values < 1e-12 * values.max()] = 0
    return (vectors * np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize(("n", "m", "width"), SETS)
def test_the_frechet_distance_is_that_of_scipys_root(n: int, m: int, width: int) -> None:
    a, b = features(n, width, 0), features(m, width, 1)
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    half = root_of(s)
    root = root_of(half @ t @ half)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_of_a_set_to_itself_is_zero_and_it_is_symmetric() -> None:
    a, b = features(50, 8, 0), features(60, 8, 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 8, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "width"), SETS)
def test_the_kernel_distance_is_that_of_loops_over_all_pairs(n: int, m: int, width: int) -> None:
    a, b = features(n, width, 0).double().numpy(), features(m, width, 1).double().numpy()

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / width + 1) ** 3)

    one = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    two = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    mixed = sum(kernel(x, y) for x in a for y in b) / (n * m)
    found = kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(one + two - 2 * mixed, rel=1e-6)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_loops(neighbours: int) -> None:
    real = features(30, 4, 0)
    generated = torch.cat([real[:10] + 0.05, features(15, 4, 2)])

    def inside(x: Tensor, manifold: Tensor) -> bool:
        for center in manifold:
            near = sorted(float((center - other).double().norm()) for other in manifold)
            if float((x - center).double().norm()) <= near[neighbours]:
                return True
        return False

    expected = (
        sum(inside(x, real) for x in generated) / len(generated),
        sum(inside(x, generated) for x in real) / len(real),
    )
    assert precision_recall(real, generated, neighbours) == pytest.approx(expected)
    assert 0 < expected[0] < 1


def test_precision_and_recall_of_equal_and_of_distant_sets() -> None:
    a = features(20, 4, 0)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 1000) == (0, 0)


def test_the_inception_score_is_that_of_its_definition() -> None:
    logits = 2 * torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    shares = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.double().tolist()]
    mean = [sum(column) / 30 for column in zip(*shares, strict=True)]
    divergence = [sum(p * math.log(p / q) for p, q in zip(row, mean, strict=True)) for row in shares]
    assert inception_score(logits) == pytest.approx(math.exp(sum(divergence) / 30), rel=1e-9)
    assert inception_score(torch.zeros(5, 7)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(7)) == pytest.approx(7)


class Given(nn.Module):
    """An extractor for torchmetrics whose pictures are the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.mark.parametrize(("n", "m", "width"), [*SETS, (32, 32, 64), (40, 50, 64)])
def test_the_frechet_distance_is_that_of_torchmetrics(n: int, m: int, width: int) -> None:
    a, b = features(n, width, 0).double(), features(m, width, 1).double()
    metric = FrechetInceptionDistance(Given(width)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_the_kernel_distance_is_that_of_torchmetrics_over_one_subset() -> None:
    a, b = features(60, 16, 0).double(), features(60, 16, 1).double()
    metric = KernelInceptionDistance(Given(16), subsets=1, subset_size=60)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_the_inception_score_is_that_of_torchmetrics_over_one_split() -> None:
    logits = 3 * features(50, 10, 0).double()
    metric = InceptionScore(Given(10), splits=1)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_prdc(neighbours: int) -> None:
    real = features(80, 6, 0).double()
    generated = torch.cat([real[:30] + 0.3 * features(30, 6, 3).double(), features(40, 6, 2).double()])
    other = compute_prdc(real.numpy(), generated.numpy(), nearest_k=neighbours)
    found = precision_recall(real, generated, neighbours)
    assert found == pytest.approx((other["precision"], other["recall"]), abs=1e-6)
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_sets_of_many_blocks_give_what_one_block_would() -> None:
    a, b = features(1300, 6, 0), features(700, 6, 1) / 4
    x, y = a.double(), b.double()

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return (p @ q.T / 6 + 1) ** 3

    within = [(kernel(s, s).sum() - kernel(s, s).trace()) / (len(s) * (len(s) - 1)) for s in (x, y)]
    expected = float(sum(within) - 2 * kernel(x, y).mean())
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    other = compute_prdc(x.numpy(), y.numpy(), nearest_k=3)
    assert precision_recall(a, b) == pytest.approx((other["precision"], other["recall"]), abs=1e-6)


def test_a_set_gives_the_same_however_often_it_is_compared() -> None:
    data, others = FeatureSet(features(40, 8, 0)), [features(30, 8, seed) for seed in (1, 2)]
    for measure in (frechet_distance, kernel_distance, precision_recall):
        assert [measure(data, x) for x in others] == [measure(data.features, x) for x in others]


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_sets_that_cannot_be_compared_are_refused(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match=r"a: shape \(1, 4\) is not allowed"):
        measure(torch.zeros(1, 4), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="b: 5 features are not allowed"):
        measure(torch.zeros(9, 4), torch.zeros(9, 5))
