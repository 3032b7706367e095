"""Scores against the equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import features
import pytest
import reference
import torch
from torch import Tensor

from regrow.tokens import scores
from regrow.tokens.grid import Grid
from regrow.tokens.scores import (
    Heads,
    attention_entropy,
    attention_influence,
    attention_page_rank,
    diff_score,
    inverse_norm,
    most_attended,
    noise,
    random_score,
    sim_score,
)

SIZES = [(8, 8), (7, 5), (4, 9), (1, 6)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", features.ALL.values(), ids=features.ALL)
def test_sim_score_is_the_sum_of_a_row_of_the_full_matrix(
    make: Callable[..., Tensor], size: tuple[int, int], batch: int
) -> None:
    x = make(batch, *size)
    expected = torch.stack([reference.sim_score(sample) for sample in x])
    torch.testing.assert_close(sim_score(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [features.random, features.areas])
def test_sim_score_in_bfloat16_is_within_its_precision(make: Callable[..., Tensor]) -> None:
    x = make(2, 8, 8).bfloat16()
    expected = torch.stack([reference.sim_score(sample) for sample in x])
    torch.testing.assert_close(sim_score(x).double(), expected, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_sim_score_does_not_depend_on_the_scale(scale: float) -> None:
    x = features.random(1, 6, 6)
    torch.testing.assert_close(sim_score(scale * x), sim_score(x), rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_has_no_part_in_any_similarity() -> None:
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    torch.testing.assert_close(inverse_norm(x), torch.tensor([[0.2, 0.0]]))
    torch.testing.assert_close(sim_score(x), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("grid", [(8, 10), (4, 5), (3, 4), (2, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_diff_score_is_the_mean_change_of_the_area_a_token_covers(
    grid: tuple[int, int], batch: int
) -> None:
    g = torch.Generator().manual_seed(0)
    last, before = torch.randn(2, batch, 4, 8, 10, generator=g)
    expected = [reference.diff_score(a, b, *grid) for a, b in zip(last, before, strict=True)]
    score = diff_score(last, before, Grid(*grid))
    torch.testing.assert_close(score.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_diff_score_of_half_precision_outputs_subtracts_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    last, before = torch.randn(2, 1, 4, 6, 6, generator=g).bfloat16()
    expected = reference.diff_score(last[0], before[0], 6, 6)
    score = diff_score(last, before, Grid(6, 6))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_random_numbers_come_from_the_generator_alone() -> None:

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return random_score(16, generator), noise(16, 0.1, generator)

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    again, other = draw(0), draw(1)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (1, 16)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_noise_has_the_sigma_asked_for() -> None:
    sample = noise(20_000, 0.1, torch.Generator().manual_seed(0))
    assert abs(float(sample.std()) - 0.1) < 0.005
    assert abs(float(sample.mean())) < 0.005


@pytest.mark.parametrize("norm", [1.0, 40.0, 400.0])
def test_sim_score_does_not_overflow_in_float16(norm: float) -> None:
    x = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    x = (x / x.norm(dim=-1, keepdim=True) * norm).half()
    score = sim_score(x)
    assert score.isfinite().all()
    assert torch.equal(score, sim_score(x.float()))


def attention(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and a bias for each pair."""
    g = torch.Generator().manual_seed(4)
    shapes = (2, 3, queries, 4), (2, 3, keys, 4), (2, 1, queries, keys)
    query, key, bias = (2 * torch.randn(shape, generator=g) for shape in shapes)
    return query, key, bias


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("held", [1, 500, 1 << 24])
def test_attention_scores_are_those_of_the_map_which_is_never_held_whole(
    monkeypatch: pytest.MonkeyPatch, held: int, biased: bool
) -> None:
    monkeypatch.setattr(scores, "WEIGHTS", held)
    query, key, bias = attention(20, 30)
    given = bias if biased else None
    expected = reference.attention_map(query, key, given)
    torch.testing.assert_close(attention_influence(query, key, None, given), expected.sum(1))
    entropy = -(expected * expected.log()).sum(-1)
    torch.testing.assert_close(attention_entropy(query, key, given), entropy)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("queries", [1, 4, 7, 20, 99])
def test_influence_of_some_queries_is_theirs_scaled_to_all(queries: int, biased: bool) -> None:
    query, key, bias = attention(20, 30)
    given = bias if biased else None
    some = min(queries, 20)
    rows = [20 * i // some for i in range(some)]
    expected = reference.attention_map(query, key, given)[:, rows].sum(1) * 20 / some
    torch.testing.assert_close(attention_influence(query, key, queries, given), expected)


def test_no_more_weights_are_held_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "WEIGHTS", 400)
    query, key = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 7, 4)
    blocks = list(scores._attention_weights(query, key, None))
    assert [block.shape for block in blocks] == [(2, 3, 9, 7), (2, 3, 1, 7)]

    monkeypatch.setattr(scores, "WEIGHTS", 1)
    assert [block.shape for block in scores._attention_weights(query, key, None)] == [(2, 3, 1, 7)] * 10


@pytest.mark.parametrize(
    ("weights", "held", "heads"),
    [
        # Maps of 2 heads at once, or of 1, are kept for all iterations; larger ones are made in each again.
        (900, 800, [2, 1]),
        (900, 799, [2, 2, 2, 1]),
        (900, 399, [2, 2, 2, 1, 1, 1]),
        (399, 400, [1, 1, 1]),
        (399, 399, [1] * 9),
        (1 << 24, 1 << 26, [3]),
    ],
)
def test_page_rank_holds_no_more_weights_and_no_larger_maps_than_allowed(
    monkeypatch: pytest.MonkeyPatch, weights: int, held: int, heads: list[int]
) -> None:
    monkeypatch.setattr(scores, "WEIGHTS", weights)
    monkeypatch.setattr(scores, "MAP", held)
    made, whole = [], scores._attention_weights

    def watched(query: Tensor, key: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        made.append(query.shape[:2])
        return whole(query, key, bias)

    monkeypatch.setattr(scores, "_attention_weights", watched)
    query, key, _ = attention(20, 20)
    attention_page_rank(query, key, 3)
    assert made == [(1, count) for count in heads] * 2


def test_masked_keys_have_no_part_in_the_entropy() -> None:
    query, key, _ = attention(20, 30)
    mask = torch.zeros(2, 1, 1, 30)
    mask[..., 10:] = -10000
    expected = attention_entropy(query, key[:, :, :10])
    torch.testing.assert_close(attention_entropy(query, key, mask), expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("weights", "held"), [(1, 1), (90, 400), (900, 1 << 26), (1 << 24, 1 << 26)])
@pytest.mark.parametrize(
    ("iterations", "heads"), [(0, Heads.MEAN), (1, Heads.MEAN), (7, Heads.ROOT_MEAN_SQUARE)]
)
def test_page_rank_is_the_power_iteration_on_whole_maps(
    monkeypatch: pytest.MonkeyPatch, iterations: int, heads: Heads, weights: int, held: int, biased: bool
) -> None:
    monkeypatch.setattr(scores, "WEIGHTS", weights)
    monkeypatch.setattr(scores, "MAP", held)
    query, key, bias = attention(20, 20)
    given = bias if biased else None
    rms = heads is Heads.ROOT_MEAN_SQUARE
    expected = reference.page_rank(query, key, iterations, given, rms=rms)
    score = attention_page_rank(query, key, iterations, heads=heads, bias=given)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-7)


def test_page_rank_comes_to_rest_where_the_graph_leaves_it_unchanged() -> None:
    """On the leading left eigenvector of each head's map, as an eigensolver finds it."""
    query, key, _ = attention(20, 20)
    score = attention_page_rank(query[:, :1], key[:, :1], 300)
    weights = reference.attention_map(query[:, :1].double(), key[:, :1].double())
    for own, map_ in zip(score, weights, strict=True):
        values, vectors = torch.linalg.eig(map_.T)
        first = vectors[:, values.real.argmax()].real
        torch.testing.assert_close(own.double(), first / first.sum(), rtol=1e-4, atol=1e-6)


def test_means_of_heads_are_called_as_in_files() -> None:
    assert [Heads("rms"), Heads("mean")] == [Heads.ROOT_MEAN_SQUARE, Heads.MEAN]


def test_page_rank_of_one_iteration_is_the_influence() -> None:
    query, key, bias = attention(20, 20)
    score = attention_page_rank(query, key, 1, heads=Heads.MEAN, bias=bias)
    torch.testing.assert_close(score, attention_influence(query, key, None, bias) / 20)


def test_page_rank_of_half_precision_is_of_float32_scores() -> None:
    query, key, _ = attention(20, 20)
    score = attention_page_rank(query.bfloat16(), key.bfloat16(), 3)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, attention_page_rank(query, key, 3), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("biased", ["no", "keys", "pairs"])
@pytest.mark.parametrize("held", [1, 1 << 24])
def test_the_most_attended_candidate_is_the_largest_weight_of_the_map(
    monkeypatch: pytest.MonkeyPatch, held: int, biased: str
) -> None:
    monkeypatch.setattr(scores, "WEIGHTS", held)
    query, key, bias = attention(20, 30)
    given = {"no": None, "keys": bias[:1, :, :1], "pairs": bias}[biased]
    g = torch.Generator().manual_seed(5)
    asking = torch.stack([torch.randperm(20, generator=g)[:7] for _ in range(2)])
    candidate = torch.stack([torch.randperm(30, generator=g)[:11] for _ in range(2)])
    weights = reference.attention_map(query, key, given)
    found = most_attended(query, key, asking, candidate, given)
    for b in range(2):
        for i, token in enumerate(asking[b].tolist()):
            best = max(range(11), key=lambda c: float(weights[b, token, candidate[b, c]]))
            assert found[b, i] == best
