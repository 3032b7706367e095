"""CAT Pruning: its choice of tokens, and calls of some tokens against full ones with old rows put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
import transformer_pipelines
from pydantic import ValidationError
from rows import rows_of
from torch import Tensor, nn
from transformer_pipelines import (
    CASES,
    FORMS,
    KINDS,
    SKIP_LAYER,
    TWO_CALLS,
    VARIETIES,
    generate,
    in_turn,
    plain,
)
from waiting import NoWaiting

import regrow
from regrow import CATPruning, TokenChoice
from regrow.core.decision import Decider, Decision, Sited, View
from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.methods.base import MethodConfig
from regrow.methods.cat import CATDecider, Memory
from regrow.methods.sites import some_of_stream, stream_of
from regrow.models.table import Keeps, Layout, Site
from regrow.schedule import Schedule
from regrow.tokens.alignment import Alignment
from regrow.tokens.cluster import ClusterAlgorithm, k_means
from regrow.tokens.grid import Grid

GRID = Grid(8, 8)
SITE = Site("blocks", nn.Identity(), Keeps.OUTPUT, "blocks", 0, able=True)


class Everything(MethodConfig):
    """A method whose calls compute all tokens the way that leaves tokens out."""

    method: Literal["everything"] = "everything"


class _Choosing(Decider):
    """Choose all tokens; behind a block, once its attention was seen."""

    def __init__(self, site: Site) -> None:
        self.sites = (site,)

    def plan(self, view: View) -> Mapping[str, Decision]:
        return some_of_stream(view.step.ratio)

    def choose(
        self, memory: None, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        assert info.grid is not None
        if site.leading:
            assert info.attention is not None
            assert info.attention.tokens == info.grid.tokens
        return torch.arange(info.grid.tokens).repeat(info.batch, 1)


@dataclass(frozen=True)
class All(Sited):
    """All tokens, on the way of some."""

    reads: int | None = None

    full_calls = 1

    def on(self, denoiser: Any, layout: Layout) -> _Choosing:
        return _Choosing(stream_of(denoiser, layout, self.reads))


@recipe_of.register
def _(config: Everything) -> Recipe:
    return Recipe(Schedule.constant(0.5), sites=All())


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_all_tokens_on_the_way_of_some_are_bit_for_bit_the_plain_pipeline(kind: str, form: str) -> None:
    pipe = KINDS[kind]()
    with regrow.apply(pipe, Everything()) as run:
        assert torch.equal(generate(pipe, **FORMS[form]), plain(kind, form))
    assert [c.ratio for c in rows_of(run)] == [0, 0, 0.5, 0.5, 0.5]


@contextmanager
def slow(
    transformer: Any,
    tokens: list[Tensor | None],
    skips: Callable[[int, int], bool] = lambda call, block: False,
    branch: Callable[[int], int] = lambda call: 0,
) -> Iterator[None]:
    """Computes all tokens in every call, then puts back old keys, values and outputs of those left out.

    Where ``skips(call, block)``, what a block computes is not kept. A call puts back what calls of the same
    ``branch(call)`` computed.
    """
    call = [-1]
    kept: dict[tuple[int, int], Tensor] = {}
    singles = list(getattr(transformer, "single_transformer_blocks", []))
    joint = {id(m) for block in singles for m in (block.attn.to_k, block.attn.to_v)}
    image = 0

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal image
        call[0] += 1
        image = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def after(module: Any, args: Any, out: Tensor) -> Tensor:
        chosen = tokens[call[0]]
        key = id(module), branch(call[0])
        if id(module) in owner and skips(call[0], owner[id(module)]):
            return out
        if chosen is not None:
            old = kept[key].clone()
            # Flux's single blocks put the text before the image; it is always new.
            text = out.shape[1] - image if id(module) in joint else 0
            old[:, :text] = out[:, :text]
            for b in range(len(out)):
                old[b, chosen[b] + text] = out[b, chosen[b] + text]
            out = old
        kept[key] = out
        return out

    hooks = [transformer.register_forward_pre_hook(begin, with_kwargs=True)]
    modules = [getattr(transformer, "proj_out_2", None) or transformer.proj_out]
    owner = {}
    for i, block in enumerate([*transformer.transformer_blocks, *singles]):
        # The second attention of SD 3.5 is of the image alone, that of PixArt reads the text.
        own = [block.attn1] if hasattr(block, "attn1") else [block.attn, getattr(block, "attn2", None)]
        places = [m for attention in own if attention is not None for m in (attention.to_k, attention.to_v)]
        owner |= dict.fromkeys(map(id, places), i)
        modules += places
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("kind", "form", "choice"), in_turn(list(TokenChoice)))
def test_a_call_of_some_tokens_is_a_full_one_with_old_rows_put_back(
    kind: str, form: str, choice: TokenChoice
) -> None:
    pipe = KINDS[kind]()
    chosen: list[Tensor | None] = []

    def note(module: Any, args: Any, out: Any) -> None:
        tokens = run._engine.call.tokens
        chosen.append(None if tokens is None else tokens.tokens)

    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2, clusters=5, choice=choice)) as run:
        hook = pipe.transformer.pos_embed.register_forward_hook(note)
        ours = generate(pipe, **FORMS[form])
        hook.remove()
    assert [t is None for t in chosen] == [True, True, False, False, False]
    with slow(pipe.transformer, chosen):
        expected = generate(pipe, **FORMS[form])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, plain(kind, form), rtol=1e-4, atol=1e-5)
    if form == "guided":
        # Counting takes longer than the run.
        calls = run.report().calls
        assert calls[2].macs < 0.75 * calls[0].macs


@pytest.mark.parametrize(
    ("kind", "options", "branches", "share"),
    [
        ("flux", TWO_CALLS, [0, 1] * 5, 1),
        # Without one or two of nine blocks, and for one half of the guided batch.
        ("sd3", SKIP_LAYER, [0, *[0, 1] * 4], 8 / 9 / 2),
        ("sd3", SKIP_LAYER | {"skip_guidance_layers": [0, 4]}, [0, *[0, 1] * 4], 7 / 9 / 2),
        # The block left out has two attentions.
        ("sd35", SKIP_LAYER, [0, *[0, 1] * 4], 0.439),
    ],
    ids=["flux-two-calls", "sd3-skip-3", "sd3-skip-0-4", "sd35-skip-3"],
)
def test_every_call_of_guidance_has_old_rows_of_its_own(
    kind: str, options: dict[str, Any], branches: list[int], share: float
) -> None:
    """Each leaves tokens out after two calls of its own."""
    pipe = (KINDS | VARIETIES)[kind](9)  # type: ignore[operator]
    chosen: list[Tensor | None] = []

    def note(observation: regrow.Observation) -> None:
        chosen.append(observation.tokens)

    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run, run.observed(note):
        ours = generate(pipe, **options)
    calls = run.report().calls
    assert [c.branch for c in calls] == branches
    assert calls[-1].full_macs == pytest.approx(share * calls[-2].full_macs, rel=0.01)
    for branch in (0, 1):
        own = [c for c in calls if c.branch == branch]
        assert [c.ratio > 0 for c in own] == [False] * 2 + [True] * (len(own) - 2)
        assert max(c.macs for c in own[2:]) < 0.75 * own[0].full_macs
    assert [t is None for t in chosen] == [c.ratio == 0 for c in calls]
    with slow(pipe.transformer, chosen, branch=branches.__getitem__):
        expected = generate(pipe, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("flux", TWO_CALLS), ("sd3", SKIP_LAYER)])
def test_guidance_of_several_calls_is_bit_for_bit_plain_with_all_tokens_and_after_removal(
    kind: str, options: dict[str, Any]
) -> None:
    pipe = KINDS[kind]()
    plain = generate(pipe, **options)
    with (
        pytest.warns(UserWarning, match="prunes nothing"),
        regrow.apply(pipe, CATPruning(alpha=1, t0=2)),
    ):
        assert torch.equal(generate(pipe, **options), plain)
    with regrow.apply(pipe, Everything()):
        assert torch.equal(generate(pipe, **options), plain)
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)):
        ours = generate(pipe, **options)
    assert ours.isfinite().all()
    assert not torch.equal(ours, plain)
    assert torch.equal(generate(pipe, **options), plain)


def select(
    config: CATPruning,
    outputs: list[tuple[Tensor, Tensor]],
    count: int,
    guided: bool = False,
    cached: Sequence[bool] = (),
) -> tuple[list[Tensor], list[Memory]]:
    """The tokens of one call after the other."""
    rule = CATDecider(config, ())
    state, tokens, memories = rule.begin(), [], []
    generator = torch.Generator().manual_seed(config.seed)
    flags = cached or [False] * len(outputs)
    for pair, leaves_out in zip(outputs, flags, strict=True):
        call = CallInfo(len(pair[0]), guided, pair, generator, cached=leaves_out, grid=GRID)
        tokens.append(rule.choose(state, None, SITE, pair[0], count, call))
        assert state.memory is not None
        memories.append(state.memory)
    return tokens, memories


def noises(calls: int, batch: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    each = [torch.randn(batch, GRID.tokens, 6, generator=g) for _ in range(calls + 1)]
    return list(pairwise(each))


@pytest.mark.parametrize("count", [1, 3, 19, 40, 64])
@pytest.mark.parametrize("choice", TokenChoice)
def test_tokens_are_different_and_ascending(choice: TokenChoice, count: int) -> None:
    for tokens in select(CATPruning(choice=choice), noises(4), count)[0]:
        assert tokens.shape == (2, count)
        assert (tokens[:, 1:] > tokens[:, :-1]).all()
        assert 0 <= tokens.min() <= tokens.max() < GRID.tokens


def test_noise_alone_takes_what_moved_most_since_the_reference() -> None:
    pairs = noises(3)
    tokens, _ = select(CATPruning(choice=TokenChoice.NOISE), pairs, 10)
    for (_, now), chosen in zip(pairs, tokens, strict=True):
        moved = (now - pairs[0][0]).norm(dim=2)
        for b in range(2):
            assert set(chosen[b].tolist()) == set(moved[b].topk(10).indices.tolist())


def test_rows_come_in_turn() -> None:
    tokens, _ = select(CATPruning(choice=TokenChoice.ROWS), noises(4), 24)
    assert tokens[0][0].tolist() == list(range(24))
    assert tokens[1][0].tolist() == list(range(24, 48))
    assert sorted(tokens[2][0].tolist()) == [*range(8), *range(48, 64)]


def test_staleness_forgets_by_its_decay() -> None:
    config = CATPruning(decay=0.5)
    tokens, memories = select(config, noises(5), 20)
    expected = torch.zeros(2, GRID.tokens)
    for chosen in tokens:
        expected = 0.5 * expected
        for b in range(2):
            expected[b, chosen[b]] += 1
    torch.testing.assert_close(memories[-1].staleness, expected)


@pytest.mark.parametrize("choice", TokenChoice)
def test_calls_that_leave_out_blocks_make_no_token_fresh(choice: TokenChoice) -> None:
    config = CATPruning(choice=choice)
    pairs, cached = noises(6), [True, False, True, True, False, True]
    tokens, memories = select(config, pairs, 20, cached=cached)
    assert torch.equal(tokens[2], tokens[1])
    assert torch.equal(tokens[3], tokens[1])
    assert torch.equal(tokens[5], tokens[4])
    assert not torch.equal(tokens[4], tokens[1])
    expected = torch.zeros(2, GRID.tokens)
    for chosen in (tokens[1], tokens[4]):
        expected = config.decay * expected + torch.zeros_like(expected).scatter(1, chosen, 1.0)
    torch.testing.assert_close(memories[-1].staleness, expected)
    assert memories[-1].calls == 3


def test_the_stalest_fill_up_and_nobody_waits_for_ever() -> None:
    config = CATPruning(cluster_share=0.25)
    pairs = noises(12, batch=1)
    tokens, _ = select(config, pairs, 20)
    last = torch.full((GRID.tokens,), -1)
    for turn, chosen in enumerate(tokens):
        missing = set(range(GRID.tokens)) - set(chosen[0].tolist())
        filled = 15
        if turn > 0:
            # Whoever was left out waited no longer than the last of those filled up with.
            waited = sorted((turn - int(last[n]) for n in chosen[0].tolist()), reverse=True)
            assert max(turn - int(last[n]) for n in missing) <= waited[filled - 1] + 1
        last[chosen[0]] = turn
    assert (last >= len(tokens) - 6).all()


def test_clusters_give_the_tokens_that_moved_most_in_the_cluster_that_moved_most() -> None:
    """Noise moves in one corner only; with no filling up, its cluster gives the first tokens."""
    before = torch.zeros(1, GRID.tokens, 6)
    now = before.clone()
    corner = [r * 8 + c for r in range(3) for c in range(3)]
    for k, n in enumerate(corner):
        now[0, n] = 5 + k
    config = CATPruning(clusters=6, cluster_share=1, balance=0, noise_scale=1)
    tokens, memories = select(config, [(before, now), (now, now)], 5)
    assert memories[0].clusters is not None
    label = memories[0].clusters[0][0]
    strongest = label[corner[-1]]
    members = [n for n in corner if label[n] == strongest]
    best = sorted(members, key=lambda n: -float(now[0, n].norm()))[: min(3, len(members))]
    assert set(best) <= set(tokens[1][0].tolist())


def place_of(token: int, channels: int) -> Tensor:
    """The paper's pos_enc of one token."""
    row, column = divmod(token, GRID.width)
    half = channels // 2
    return torch.tensor([row / GRID.height] * half + [column / GRID.width] * (channels - half))


def slow_choice(
    config: CATPruning, pairs: list[tuple[Tensor, Tensor]], count: int, sample: int, labels: list[int]
) -> list[list[int]]:
    """The tokens of one sample in each call, token by token."""
    tokens, width = range(GRID.tokens), GRID.width
    released = config.algorithm is ClusterAlgorithm.RELEASED
    members = [[n for n in tokens if labels[n] == k] for k in range(config.clusters)]
    near = [(n, m) for n in tokens for m in (n - 1, n - width) if m >= 0 and (m != n - 1 or n % width)]
    touch = {(labels[n], labels[m]) for pair in near for n, m in (pair, pair[::-1])}
    around = [
        [j for j in range(config.clusters) if j == k or (k, j) in touch] for k in range(config.clusters)
    ]
    stale, chosen = [0.0] * GRID.tokens, []
    for _, now in pairs:
        begins = not chosen
        noise = now[sample] - pairs[0][0][sample]
        moved = [float(noise[n].norm()) for n in tokens]
        pooled = noise
        if not released:
            pooled = torch.stack(
                [noise[n] * config.noise_scale + place_of(n, noise.shape[1]) for n in tokens]
            )
        largest = [pooled[own].max(0).values if own else torch.zeros(noise.shape[1]) for own in members]
        counted = [[k] if released and not begins else around[k] for k in range(len(members))]
        value = [float(sum(largest[j] for j in own).norm() / len(own)) for own in counted]
        share = count if begins else int(count * config.cluster_share)
        early: list[int] = []
        late: list[int] = []
        for place, k in enumerate(sorted(range(len(members)), key=lambda k: -value[k])):
            by_moved = sorted(members[k], key=lambda n: -moved[n])
            by_stale = sorted(members[k], key=lambda n: stale[n])
            quota = max(share // 5, 1) * max(3 - place, 1)
            own = by_moved
            if begins:
                given = set(by_moved[: max(share // 10, 1)])
            elif released:
                also = by_stale[: int(quota * config.balance)] if place > 0 else []
                given = {*by_moved[:quota], *also}
            else:
                turn = {
                    n: min(
                        by_moved.index(n) / (1 - config.balance) if config.balance < 1 else GRID.tokens,
                        (by_stale.index(n) + 0.5) / config.balance if config.balance else GRID.tokens,
                    )
                    for n in members[k]
                }
                own = by_moved if config.balance == 0 else sorted(members[k], key=lambda n: turn[n])
                given = set(own[:quota])
            early += [n for n in own if n in given]
            late += [n for n in own if n not in given]
        first = (early + late)[:share]
        rest = sorted((n for n in tokens if n not in first), key=lambda n: (stale[n], -moved[n]))
        chosen.append(sorted(first + rest[: count - share]))
        stale = [config.decay * f + (n in chosen[-1]) for n, f in enumerate(stale)]
    return chosen


CHOICES = {
    "paper": CATPruning(),
    "released": CATPruning.preset("released"),
    "released, half by clusters": CATPruning.preset("released", cluster_share=0.5, clusters=6),
    "released, clusters alone": CATPruning.preset("released", cluster_share=1, balance=0.7, clusters=6),
    "weak noise": CATPruning(noise_scale=0.05, cluster_share=0.75),
    "slowly forgotten": CATPruning(decay=0.9, cluster_share=0.5),
    "stalest alone": CATPruning(cluster_share=0),
    "clusters alone": CATPruning(cluster_share=1, clusters=7),
    "stalest of clusters": CATPruning(cluster_share=0.75, balance=1),
    "a quarter of the stalest": CATPruning(cluster_share=1, balance=0.25, clusters=3),
    "one cluster": CATPruning(clusters=1, cluster_share=0.5),
    "another beginning": CATPruning(seed=5),
}


@pytest.mark.parametrize("count", [3, 24, 38, 50])
@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_is_that_of_a_slow_one(name: str, count: int) -> None:
    config, pairs = CHOICES[name], noises(6)
    tokens, memories = select(config, pairs, count)
    assert memories[0].clusters is not None
    noise = pairs[0][1] if config.absolute_noise else pairs[0][1] - pairs[0][0]
    place = torch.stack([place_of(n, noise.shape[2]) for n in range(GRID.tokens)])
    drawn = torch.Generator().manual_seed(config.seed)
    labels = k_means(noise * config.noise_scale + place, config.clusters, drawn)
    for sample in range(2):
        expected = slow_choice(config, pairs, count, sample, labels[sample].tolist())
        assert [chosen[sample].tolist() for chosen in tokens] == expected


def test_positions_are_of_a_clusters_value_as_printed() -> None:
    """All tokens moved as much: the cluster at the end of rows and columns is of most value."""
    before = torch.zeros(1, GRID.tokens, 6)
    now = before + 0.01
    (tokens,), (memory,) = select(CATPruning(clusters=4), [(before, now)], 1)
    assert memory.clusters is not None
    labels = memory.clusters[0][0]
    assert labels[tokens[0, 0]] == labels[-1]
    (without,), _ = select(CATPruning(clusters=4, algorithm=ClusterAlgorithm.RELEASED), [(before, now)], 1)
    assert labels[without[0, 0]] == 0 != labels[-1]


def test_a_file_without_the_algorithm_has_the_printed_one() -> None:
    old = CATPruning().model_dump(mode="json")
    del old["algorithm"]
    assert CATPruning.model_validate(old) == CATPruning(algorithm=ClusterAlgorithm.PRINTED)


def test_where_clusters_begin_is_drawn_by_the_seed() -> None:
    first, same, other = (select(CATPruning(seed=seed), noises(3), 20)[0] for seed in (0, 0, 1))
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("config", [*CHOICES.values(), *(CATPruning(choice=c) for c in TokenChoice)])
def test_nothing_waits_for_the_device(config: CATPruning) -> None:
    pairs = noises(4, batch=4)
    with NoWaiting():
        select(config, pairs, 24, guided=True)
        with pytest.raises(AssertionError):
            float(pairs[0][0].max())


def test_half_precision_chooses_as_single_does_of_the_same_noise() -> None:
    """A bfloat16 norm has eight bits, too few to tell tokens apart."""
    pairs = [(a.bfloat16(), b.bfloat16()) for a, b in noises(6)]
    tokens, _ = select(CATPruning(), pairs, 24)
    expected, _ = select(CATPruning(), [(a.float(), b.float()) for a, b in pairs], 24)
    assert all(map(torch.equal, tokens, expected))


@pytest.mark.parametrize("alignment", Alignment)
def test_the_conditional_half_decides_for_both(alignment: Alignment) -> None:
    config = CATPruning(alignment=alignment)
    pairs = noises(3, batch=4)
    tokens, _ = select(config, pairs, 20, guided=True)
    same = all(torch.equal(t[:2], t[2:]) for t in tokens)
    assert same == (alignment is not Alignment.OFF)
    halves = {Alignment.CONDITIONAL: slice(2, 4), Alignment.UNCONDITIONAL: slice(0, 2)}
    if alignment in halves:
        own = [tuple(n[halves[alignment]] for n in pair) for pair in pairs]
        alone, _ = select(config, own, 20)
        assert all(torch.equal(a, t[:2]) for a, t in zip(alone, tokens, strict=True))


@pytest.mark.parametrize("alignment", [Alignment.CONDITIONAL, Alignment.UNCONDITIONAL])
@pytest.mark.parametrize("kind", ["sd3", "pixart", "dit"])
def test_in_a_generation_one_half_decides_by_its_noise(kind: str, alignment: Alignment) -> None:
    """DiT has the conditional half first; DiT and PixArt predict a variance behind the noise."""
    pipe = KINDS[kind]()
    outputs: list[Tensor] = []
    chosen: list[Tensor | None] = []
    pipe.transformer.register_forward_hook(lambda _, args, out: outputs.append(out[0].clone()))
    config = CATPruning(alpha=0.4, t0=3, choice=TokenChoice.NOISE, alignment=alignment)
    with regrow.apply(pipe, config) as run, run.observed(lambda seen: chosen.append(seen.tokens)):
        generate(pipe, guidance_scale=4.0)
    half = (kind == "dit") != (alignment is Alignment.CONDITIONAL)
    noises = [output.chunk(2)[half][0, :4] for output in outputs]
    for call in (3, 4):
        moved = (noises[call - 1] - noises[1]).square().sum(0)
        expected = moved.unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)).flatten().topk(25).indices
        tokens = chosen[call]
        assert tokens is not None
        assert tokens.tolist() == [sorted(expected.tolist())] * 2


@pytest.mark.parametrize(("alpha", "count"), [(1e-6, 1), (0.1, 8), (0.31, 24), (0.4, 32), (0.995, 79)])
def test_the_share_computed_of_80_tokens_is_rounded_down(alpha: float, count: int) -> None:
    pipe = transformer_pipelines.flux()
    chosen: list[Tensor | None] = []
    config = CATPruning(alpha=alpha, t0=2, choice=TokenChoice.ROWS)
    with regrow.apply(pipe, config) as run, run.observed(lambda seen: chosen.append(seen.tokens)):
        generate(pipe, width=20, num_inference_steps=3)
    assert chosen[2] is not None
    assert chosen[2].shape == (1, count)


def test_who_writes_to_an_output_changes_no_later_call() -> None:
    """Of Flux the denoiser's output is that of its last module."""
    pipe = transformer_pipelines.flux()

    def spoil(module: Any, args: Any, out: tuple[Tensor]) -> tuple[Tensor]:
        mine = out[0].clone()
        out[0].zero_()
        return (mine,)

    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run:
        expected = generate(pipe)
        hook = pipe.transformer.register_forward_hook(spoil)
        assert torch.equal(generate(pipe), expected)
        hook.remove()
    assert any(c.ratio for c in rows_of(run))


@pytest.mark.parametrize(
    ("arch", "steps", "full", "pruned"),
    [
        ("sd3-1024", 28, 168.28, 90.28),
        ("sd3-1024", 50, 300.50, 136.70),
        ("pixart-sigma-1024", 28, 120.68, 60.08),
        ("pixart-sigma-1024", 50, 215.40, 88.24),
    ],
)
def test_macs_are_the_papers(arch: str, steps: int, full: float, pruned: float) -> None:
    """Both halves of guidance, attention not counted, the text in each of the eight full calls."""
    what = architecture(arch)
    result = profile(what, CATPruning(), steps, attention=False, guided=True, text_once=False)
    assert result.baseline_macs / 1e12 == pytest.approx(full, rel=2e-3)
    assert result.macs / 1e12 == pytest.approx(pruned, rel=2e-3)


def test_the_text_is_counted_once_as_it_is_computed() -> None:
    arch, config = architecture("pixart-sigma-1024"), CATPruning()
    once, every = (profile(arch, config, 10, text_once=o).per_call for o in (True, False))
    text = once[0] - once[1]
    assert text > 0
    assert every == tuple(macs + (text if 0 < i < 8 else 0) for i, macs in enumerate(once))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_t0_counts_from_where_a_generation_begins(kind: str) -> None:
    """Image-to-image begins late in the sampler's steps."""
    from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
    from PIL import Image

    make: Any = {"sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline}[kind]
    pipe = make.from_pipe(KINDS[kind]())
    pipe.set_progress_bar_config(disable=True)
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=3)) as run:
        pipe(
            ["a penguin"],
            image=Image.new("RGB", (32, 32)),
            strength=0.5,
            num_inference_steps=12,
            height=32,
            width=32,
            max_sequence_length=16,
            output_type="latent",
        )
    assert [c.ratio > 0 for c in rows_of(run)] == [False] * 3 + [True] * 3


def test_a_projection_replaced_after_apply_is_as_one_replaced_before() -> None:
    """As peft does it: the old layer inside a new one that adds to it."""

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x

    pipe = transformer_pipelines.sd3()
    attention = pipe.transformer.transformer_blocks[1].attn
    plain = attention.to_k
    attention.to_k = Adapted(plain)
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)):
        expected = generate(pipe)
    attention.to_k = plain
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run:
        without = generate(pipe)
        attention.to_k = Adapted(plain)
        assert torch.equal(generate(pipe), expected)
        attention.to_k = plain
        assert torch.equal(generate(pipe), without)
    assert not torch.equal(without, expected)
    assert any(c.ratio for c in rows_of(run))


def test_keys_of_a_part_of_the_batch_are_not_kept() -> None:
    pipe = transformer_pipelines.sd3_perturbed()
    plain = generate(pipe, max_sequence_length=16, pag_scale=3.0)
    with (
        regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run,
        pytest.warns(UserWarning, match="a part of the batch only"),
    ):
        assert torch.equal(generate(pipe, max_sequence_length=16, pag_scale=3.0), plain)
    assert not any(call.ratio for call in rows_of(run))


def test_clusters_are_of_relative_noise_unless_told_otherwise() -> None:
    """All noise is alike between calls, and far apart between two halves of the picture."""
    before = torch.zeros(1, GRID.tokens, 6)
    before[:, ::2] = 1000
    labels = []
    for absolute in (False, True):
        config = CATPruning(clusters=2, absolute_noise=absolute)
        memory = select(config, [(before, before.clone())], 10)[1][0]
        assert memory.clusters is not None
        labels.append(memory.clusters[0][0].view(8, 8))
    halves = (labels[1][:, ::2] != labels[1][:, 1::2]).all()
    assert halves
    assert not (labels[0][:, ::2] != labels[0][:, 1::2]).all()


@pytest.mark.parametrize("choice", ["rows", "noise"])
def test_ablations_make_no_clusters(choice: str) -> None:
    memory = select(CATPruning(choice=choice), noises(2), 20)[1][0]
    assert memory.clusters is None


def test_presets_differ_where_the_code_differs_from_the_paper() -> None:
    paper, released = (CATPruning.preset(name).model_dump() for name in ("paper", "released"))
    assert {name for name in paper if paper[name] != released[name]} == {
        "balance",
        "noise_scale",
        "absolute_noise",
        "algorithm",
    }
    assert CATPruning() == CATPruning.preset("paper")


def test_models_without_such_calls_are_refused() -> None:
    import pipelines

    with pytest.raises(regrow.UnsupportedModelError, match="can't compute some of its tokens only"):
        regrow.apply(pipelines.sd(), CATPruning())


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fused_projections_are_refused_and_noticed_later(kind: str) -> None:
    pipe = KINDS[kind]()
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run:
        pipe.transformer.fuse_qkv_projections()
        with pytest.warns(UserWarning, match="projections were fused"):
            generate(pipe)
    assert {c.ratio for c in rows_of(run)} == {0}
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        regrow.apply(pipe, CATPruning())


def test_an_image_adapter_of_flux_is_refused_and_noticed_later() -> None:
    """Its processor reads queries that are not turned by position."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = transformer_pipelines.flux()
    transformer = pipe.transformer

    def adapt() -> None:
        block = transformer.transformer_blocks[1]
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,)))

    plain = generate(pipe)
    stock = transformer.attn_processors
    options: dict[str, Any] = {"joint_attention_kwargs": {"ip_hidden_states": [torch.ones(1, 4, 32)]}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapt()
    processor = transformer.transformer_blocks[1].attn.processor
    with pytest.raises(ValueError, match="1 attentions have special processors"):
        regrow.apply(pipe, CATPruning())
    adapted = generate(pipe, **options)
    assert not torch.equal(adapted, plain)
    transformer.set_attn_processor(stock)
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run:
        transformer.transformer_blocks[1].attn.set_processor(processor)
        with pytest.warns(UserWarning, match="processors were replaced"):
            assert torch.equal(generate(pipe, **options), adapted)
    assert {c.ratio for c in rows_of(run)} == {0}


def test_tokens_of_two_pictures_are_all_computed() -> None:
    """As Kontext hands them on: the picture to edit behind the one that is made."""
    pipe = transformer_pipelines.flux()
    kwargs = first_inputs(pipe)
    twice = kwargs | {name: torch.cat([kwargs[name]] * 2, dim) for name, dim in SEQUENCES.items()}
    with torch.no_grad():
        expected = pipe.transformer(**twice)[0]
        with regrow.apply(pipe.transformer, CATPruning(alpha=0.4, t0=2)) as run, run.generation(4) as clock:
            with pytest.warns(UserWarning, match="not those of one picture"):
                pipe.transformer(**twice)
            for _ in range(3):
                clock.step()
                assert torch.equal(pipe.transformer(**twice)[0], expected)
    assert {c.ratio for c in rows_of(run)} == {0}


SEQUENCES = {"hidden_states": 1, "img_ids": 0}


def first_inputs(pipe: Any) -> dict[str, Any]:
    """The arguments of the first call of a generation."""
    calls: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    generate(pipe)
    hook.remove()
    return dict(calls[0])


def test_the_two_calls_of_flux_choose_for_themselves() -> None:
    """Guidance in two calls: each has a memory of its own."""
    pipe = transformer_pipelines.flux()
    kwargs = first_inputs(pipe)
    other = kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].flip(1) + 1}
    config = CATPruning(alpha=0.4, t0=2, choice=TokenChoice.NOISE)

    def outputs(*each: dict[str, Any]) -> list[list[Tensor]]:
        found: list[list[Tensor]] = [[] for _ in each]
        with (
            torch.no_grad(),
            regrow.apply(pipe.transformer, config) as run,
            run.generation(4) as clock,
        ):
            for step in range(4):
                for branch, words in enumerate(each):
                    latents = kwargs["hidden_states"] * (1 + step)
                    found[branch].append(pipe.transformer(**words | {"hidden_states": latents})[0])
                clock.step()
        assert [c.ratio > 0 for c in rows_of(run)] == [step > 1 for step in range(4) for _ in each]
        return found

    both = outputs(kwargs, other)
    for alone, words in zip(both, (kwargs, other), strict=True):
        for found, expected in zip(alone, outputs(words)[0], strict=True):
            assert torch.equal(found, expected)


def test_another_negative_prompt_changes_no_token_of_the_positive_call() -> None:
    """With the same latents in every step, whatever the calls predict."""
    pipe = transformer_pipelines.flux()

    def given(_: Any, step: int, *__: Any) -> dict[str, Any]:
        return {"latents": torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(step))}

    def chosen(negative: str) -> tuple[list[Any], list[Any]]:
        seen: list[Any] = []
        options = TWO_CALLS | {"negative_prompt": [negative], "callback_on_step_end": given}
        with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run, run.observed(seen.append):
            generate(pipe, **options)
        tokens = [None if o.tokens is None else o.tokens.tolist() for o in seen]
        assert [o.record.branch for o in seen] == [0, 1] * 5
        return tokens[::2], tokens[1::2]

    first, second = chosen("a pizza"), chosen("a")
    assert first[0] == second[0]
    assert first[0][2] is not None
    assert first[1] != second[1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"alpha": 0}, "alpha"), ({"alpha": 1.1}, "alpha"), ({"t0": 1}, "t0"), ({"clusters": 0}, "clusters")],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        CATPruning(**fields)
