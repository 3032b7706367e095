"""ToCa: its choice of tokens, and its calls against full ones with old rows put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import reference
import torch
import transformer_pipelines
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rows import rows_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformer_pipelines import FORMS, TWO_CALLS, generate

import regrow
from regrow import FORA, ToCa
from regrow.core.decision import SKIP, Decider, Decision, Sited, Some, View
from regrow.core.recipe import Attention, CallInfo, Recipe, recipe_of
from regrow.core.store import Store, copied
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.lab.measure.variants import variant
from regrow.methods.base import MethodConfig
from regrow.methods.toca import ToCaDecider
from regrow.models import layout_of
from regrow.models.layers import LayerKind
from regrow.models.table import Keeps, Layout, Site
from regrow.schedule import FULL, LAYERS, Schedule, Step
from regrow.tokens.alignment import Alignment
from regrow.tokens.grid import Grid

KINDS = ("sd3", "pixart", "dit", "flux")
FLAT = {"layer_weight": 0.0, "step_weight": 0.0}
EVERYWHERE = FLAT | {"self_attention": 1.0, "cross_attention": 1.0}


def layer(name: str, kind: LayerKind, index: int) -> Site:
    """A layer of a block."""
    return Site(name, nn.Identity(), Keeps.OUTPUT, f"blocks.{index}", index, able=True, kind=kind)


MLP = layer("blocks.1.ff", LayerKind.FEED_FORWARD, 1)
ATTENTION = layer("blocks.1.attn1", LayerKind.SELF_ATTENTION, 1)
CROSS = layer("blocks.1.attn2", LayerKind.CROSS_ATTENTION, 1)

pytestmark = pytest.mark.filterwarnings(
    "ignore:DiTTransformer2DModel has no", "ignore:SD3T.* has no", "ignore:Flux.* has no"
)


Chosen = Mapping[str, Tensor] | None


def chosen_by(pipe: Any, config: Any, **options: Any) -> tuple[Tensor, list[Chosen], Any]:
    """A generation, the tokens that the layers of each call computed (None: all), and its run."""
    seen: list[Chosen] = []

    def note(observation: regrow.Observation) -> None:
        cached = observation.record.depth == LAYERS
        seen.append(dict(observation.refreshed) if cached else None)

    with regrow.apply(pipe, config) as run, run.observed(note):
        out = generate(pipe, **options)
    return out, seen, run


def put_back(old: Tensor, new: Tensor, tokens: Tensor, text: int = 0) -> Tensor:
    """The old rows, but for those of the tokens, and of the text before them."""
    mixed, batch = old.clone(), torch.arange(len(new))[:, None]
    mixed[:, :text] = new[:, :text]
    mixed[batch, text + tokens] = new[batch, text + tokens]
    return mixed


@contextmanager
def slow(transformer: Any, calls: list[Chosen], branches: int = 1) -> Iterator[None]:
    """Computes every layer for all tokens in every call, then puts back what it should not have known."""
    now = [-1]
    kept: dict[str, Any] = {}
    memories: list[dict[str, Any]] = [{} for _ in range(branches)]
    image = 0

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal image, kept
        now[0] += 1
        kept = memories[now[0] % branches]
        image = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def layer(name: str, out: Any) -> Any:
        chosen = calls[now[0]]
        if chosen is not None:
            if name not in chosen:
                return kept[name]
            if isinstance(out, tuple):
                out = (put_back(kept[name][0], out[0], chosen[name]), *out[1:])
            else:
                out = put_back(kept[name], out, chosen[name])
        kept[name] = out
        return out

    def text(name: str, out: Any) -> Any:
        chosen = calls[now[0]]
        if chosen is not None and name.replace("_context", "") not in chosen:
            return kept[name]
        kept[name] = out
        return out

    def projection(name: str, out: Any) -> Any:
        chosen = calls[now[0]]
        attention = name.rpartition(".")[0]
        if chosen is not None and attention in chosen:
            out = put_back(kept[name], out, chosen[attention])
        if chosen is None or attention in chosen:
            kept[name] = out
        return out

    def single(name: str, out: Tensor) -> Tensor:
        """Of Flux's single blocks, whose text comes first; the attention joins in if others compute any."""
        chosen = calls[now[0]]
        if chosen is not None:
            tokens = chosen.get(".".join((*name.split(".")[:2], "proj_out")))
            attends = any(key.endswith(".attn") for key in chosen)
            if tokens is None or ("attn" in name and not attends):
                return kept[name]
            out = put_back(kept[name], out, tokens, out.shape[1] - image)
        kept[name] = out
        return out

    hooks = [transformer.register_forward_pre_hook(begin, with_kwargs=True)]
    places: dict[str, Any] = {}
    for i, block in enumerate(transformer.transformer_blocks):
        acts = {"attn": layer, "attn1": layer, "attn2": layer, "ff": layer, "ff_context": text}
        # The second attention of SD 3.5 is of the image alone, that of PixArt reads the text.
        joins = ("attn", "attn2") if hasattr(block, "attn") else ("attn1",)
        acts |= {f"{own}.{part}": projection for own in joins for part in ("to_k", "to_v")}
        places |= {
            f"transformer_blocks.{i}.{child}": act
            for child, act in acts.items()
            if getattr(block, child.split(".")[0], None) is not None
        }
    for i, _ in enumerate(getattr(transformer, "single_transformer_blocks", [])):
        parts = ("attn", "attn.to_k", "attn.to_v", "act_mlp")
        places |= {f"single_transformer_blocks.{i}.{part}": single for part in parts}
    for path, act in places.items():
        module = transformer.get_submodule(path)
        hooks.append(module.register_forward_hook(lambda m, a, out, p=path, f=act: f(p, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


CASES = [
    ("sd3", "guided", EVERYWHERE),
    ("sd3", "wide", EVERYWHERE),
    ("sd3", "batch", {}),
    ("sd3", "unguided", EVERYWHERE),
    ("pixart", "guided", EVERYWHERE),
    ("pixart", "unguided", EVERYWHERE),
    ("pixart", "wide", {}),
    ("pixart", "batch", EVERYWHERE),
    ("dit", "guided", EVERYWHERE),
    ("dit", "batch", EVERYWHERE),
    ("dit", "unguided", {}),
    ("flux", "guided", EVERYWHERE),
    ("flux", "batch", EVERYWHERE),
    ("flux", "wide", {}),
    ("flux", "unguided", EVERYWHERE),
]


@pytest.mark.parametrize(("kind", "form", "fields"), CASES, ids=[f"{k}-{f}-{len(c)}" for k, f, c in CASES])
def test_a_call_is_a_full_one_with_old_rows_put_back(kind: str, form: str, fields: Any) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    ours, chosen, run = chosen_by(pipe, ToCa(ratio=0.6, **fields), **FORMS[form])
    assert [c is None for c in chosen] == [True, False, False, True, False]
    assert chosen[1]
    with slow(pipe.transformer, chosen):
        expected = generate(pipe, **FORMS[form])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if form == "guided":
        # Counting takes longer than the run.
        macs = [c.macs for c in run.report().calls]
        assert macs[1] < 0.85 * macs[3]


def test_the_two_calls_of_flux_choose_for_themselves() -> None:
    pipe = transformer_pipelines.flux()
    ours, chosen, _ = chosen_by(pipe, ToCa(ratio=0.6, **EVERYWHERE), **TWO_CALLS)
    assert [c is None for c in chosen] == [True, True, *[False] * 4, True, True, False, False]
    first, second = chosen[2:4]
    assert first is not None
    assert second is not None
    assert not all(torch.equal(first[name], second[name]) for name in first)
    with slow(pipe.transformer, chosen, branches=2):
        expected = generate(pipe, **TWO_CALLS)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("sd3", "guided"),
        ("sd3", "wide"),
        ("pixart", "guided"),
        ("pixart", "batch"),
        ("dit", "guided"),
        ("flux", "wide"),
        ("flux", "batch"),
    ],
)
def test_all_tokens_everywhere_are_bit_for_bit_the_plain_pipeline(kind: str, form: str) -> None:
    """Calls take the way of those that compute some: every row is gathered, computed and put back."""
    pipe = transformer_pipelines.KINDS[kind]()
    plain = generate(pipe, **FORMS[form])
    ours, chosen, _ = chosen_by(pipe, ToCa(ratio=0, **EVERYWHERE), **FORMS[form])
    assert torch.equal(ours, plain)
    assert chosen[1] is not None
    assert set(chosen[1]) == {s.name for s in layout_of(pipe.transformer).layer_sites if s.kind is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_are_bit_for_bit_fora(kind: str) -> None:
    """Of 0.5% of 64 tokens none is left; the calls are those that compute some all the same."""
    pipe = transformer_pipelines.KINDS[kind]()
    with regrow.apply(pipe, FORA(interval=3)) as run:
        expected = generate(pipe, guidance_scale=4.0)
    fora = run.report()
    with regrow.apply(pipe, ToCa(ratio=0.995)) as run:
        assert torch.equal(generate(pipe, guidance_scale=4.0), expected)
    assert [c.macs for c in run.report().calls] == [c.macs for c in fora.calls]
    assert recipe_of(ToCa(ratio=1)) == recipe_of(FORA(interval=3))


@pytest.mark.filterwarnings("ignore:the method prunes nothing")
def test_nothing_is_chosen_where_every_call_is_full() -> None:
    with regrow.apply(transformer_pipelines.dit(), ToCa(interval=1)) as run:
        generate(run._pipeline)
    assert run.report().selection_macs == 0


class PerBlock(MethodConfig):
    """A method that computes the same tokens in all layers of a block."""

    method: Literal["per_block"] = "per_block"


@dataclass(frozen=True)
class _PerBlock(Decider, Sited):
    """Two of every three blocks compute every third token, another third in each block."""

    sites: tuple[Site, ...] = ()

    def on(self, denoiser: nn.Module, layout: Layout) -> _PerBlock:
        return _PerBlock(layout.layer_sites)

    def plan(self, view: View) -> Mapping[str, Decision]:
        some = {s.name for s in self.sites if s.index % 3 and s.kind is not None}
        share = 1 - view.step.ratio
        return {
            s.name: Some(share, s.block, SKIP, down=True) if s.name in some else SKIP for s in self.sites
        }

    def choose(
        self, memory: None, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        assert info.grid is not None
        return torch.arange(site.index % 3, info.grid.tokens, 3)[:count].repeat(info.batch, 1)


@recipe_of.register
def _(config: PerBlock) -> Recipe:
    plan = Schedule(depth=(FULL, LAYERS, LAYERS), ratio=(0.0, 0.7, 0.8))
    return Recipe(plan, sites=_PerBlock())


@pytest.mark.parametrize("kind", ["sd3", "dit"])
def test_a_rule_may_choose_for_whole_blocks(kind: str) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    options = {"guidance_scale": 4.0}
    ours, chosen, _ = chosen_by(pipe, PerBlock(), **options)
    names = [s for s in layout_of(pipe.transformer).layer_sites if s.kind is not None]
    assert {k for c in chosen if c for k in c} == {n.name for n in names if n.index % 3}
    for call in (c for c in chosen if c):
        of_block = {n.block: call[n.name] for n in names if n.name in call}
        assert all(call[n.name] is of_block[n.block] for n in names if n.name in call)
    with slow(pipe.transformer, chosen):
        expected = generate(pipe, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def map_of(attention: Attention) -> Tensor:
    """The attention map ``(B, n, m)``."""
    return reference.attention_map(attention.query, attention.key, attention.bias)


class SlowChoice:
    """ToCa's scores by their definitions, a token after the other."""

    def __init__(self, config: ToCa, grid: Grid) -> None:
        self.config, self.grid = config, grid
        self.s1: Tensor | None = None
        self.s2: Tensor | None = None
        self.reused: dict[str, Tensor] = {}

    def choose(self, layer: str, count: int, batch: int, halves: bool) -> list[set[int]]:
        c, n = self.config, self.grid.tokens
        reused = self.reused.setdefault(layer, torch.zeros(batch, n))
        score = torch.zeros(batch, n)
        for part in (self.s1, self.s2):
            if part is not None:
                score += part / part.pow(2).sum(1, keepdim=True).sqrt()
        score += c.staleness * reused / c.interval
        if halves:
            score = ((score[: batch // 2] + score[batch // 2 :]) / 2).repeat(2, 1)
        bonus = torch.zeros_like(score)
        for b in range(batch):
            cells: dict[tuple[int, int], list[int]] = {}
            for t in range(n):
                row, column = divmod(t, self.grid.width)
                cells.setdefault((row // c.cell, column // c.cell), []).append(t)
            for members in cells.values():
                best = max(members, key=lambda t: float(score[b, t]))
                bonus[b, best] = score[b, best]
        score = score + c.spread * bonus
        chosen = [set(sorted(range(n), key=lambda t: -float(score[b, t]))[:count]) for b in range(batch)]
        reused += 1
        for b in range(batch):
            reused[b, list(chosen[b])] = 0
        return chosen


def random_attention(batch: int, n: int, m: int, seed: int) -> Attention:
    g = torch.Generator().manual_seed(seed)
    shape = (batch, 2, n, 4), (batch, 2, m, 4)
    query, key = (2 * torch.randn(s, generator=g) for s in shape)
    return Attention(query, key, n, None)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    share=st.floats(0.01, 1),
    cell=st.integers(1, 3),
    guided=st.booleans(),
    cross=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tokens_are_those_of_the_highest_scores(
    height: int, width: int, share: float, cell: int, guided: bool, cross: bool, seed: int
) -> None:
    grid, batch = Grid(height, width), 2
    config = ToCa(cell=cell, queries=None, influence=1, staleness=0.4)
    rule = ToCaDecider(config, (MLP,))
    memory, expected = rule.begin(), SlowChoice(config, grid)
    own = random_attention(batch, grid.tokens, grid.tokens, seed)
    rule.observe(memory, ATTENTION, own)
    expected.s1 = map_of(own).sum(1)
    if cross:
        text = random_attention(batch, grid.tokens, 5, seed + 1)
        rule.observe(memory, CROSS, text)
        weights = map_of(text)
        expected.s2 = 1 - (weights * weights.log()).sum(-1)
    call, x = CallInfo(batch, guided, (), torch.Generator(), grid=grid), torch.empty(batch, grid.tokens, 1)
    count = max(int(share * grid.tokens), 1)
    for _ in range(4):
        tokens = rule.choose(memory, None, MLP, x, count, call)
        assert tokens.shape == (batch, count)
        assert (tokens[:, 1:] > tokens[:, :-1]).all()
        assert [set(t.tolist()) for t in tokens] == expected.choose("ff", count, batch, guided)


def test_tokens_of_a_generation_are_those_of_the_highest_scores() -> None:
    """Queries, keys and masks as they are in a real model, with text of two lengths."""
    pipe = transformer_pipelines.pixart()
    config = ToCa(ratio=0.7, queries=None, **FLAT)
    block = pipe.transformer.transformer_blocks[4]
    grabbed: dict[str, Tensor] = {}
    full: list[SlowChoice] = []

    def end_of_attention(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        q, k = (grabbed.pop(n).unflatten(-1, (4, 8)).transpose(1, 2) for n in ("to_q", "to_k"))
        bias = kwargs["attention_mask"]
        weights = map_of(Attention(q, k, 64, None if bias is None else bias[:, None]))
        if module is block.attn1:
            full.append(SlowChoice(config, Grid(8, 8)))
            full[-1].s1 = weights.sum(1)
        else:
            full[-1].s2 = 1 - (weights * (weights + 1e-30).log()).sum(-1)

    wrapped: list[Any] = []
    seen: list[Chosen] = []

    def look(module: Any, after: Any) -> None:
        """Tell what a module gives; a forward hook would have it computed in every call."""
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            after(module, args, kwargs, out)
            return out

        module.forward = forward
        wrapped.append(module)

    for attention in (block.attn1, block.attn2):
        for name in ("to_q", "to_k"):
            look(getattr(attention, name), lambda m, a, k, out, n=name: grabbed.__setitem__(n, out))

    def note(observation: regrow.Observation) -> None:
        seen.append(observation.refreshed if observation.record.depth == LAYERS else None)
        grabbed.clear()

    # A text that is known would not be projected again.
    with regrow.apply(pipe, config, keep_text=False) as run, run.observed(note):
        for attention in (block.attn1, block.attn2):
            look(attention, _only_full(run, end_of_attention))
        with pytest.warns(UserWarning, match="has a replaced forward method"):
            generate(pipe, guidance_scale=4.0)
    for module in wrapped:
        del module.forward
    assert len(full) == 2
    for expected, calls in zip(full, (seen[1:3], seen[4:]), strict=True):
        for call in calls:
            tokens = call["transformer_blocks.4.ff"]
            assert tokens.shape == (2, 19)
            assert [set(t.tolist()) for t in tokens] == expected.choose("ff", 19, 2, True)


def test_attentions_of_flux_are_seen_as_they_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned by position, in double and in single blocks, which have the text in another place."""
    from diffusers.models.transformers import transformer_flux

    pipe = transformer_pipelines.flux()
    dispatch = transformer_flux.dispatch_attention_fn
    maps: list[Tensor] = []

    def multiply(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        maps.append(reference.attention_map(query.transpose(1, 2), key.transpose(1, 2), None))
        return dispatch(query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformer_flux, "dispatch_attention_fn", multiply)
        generate(pipe, width=24, num_inference_steps=1)
    seen: dict[str, Tensor] = {}

    def note(observation: regrow.Observation) -> None:
        if observation.record.position.index == 0:
            slot = run._engine.generation.slots[0]
            seen.update(slot.observed.attended)

    with regrow.apply(pipe, ToCa(queries=None)) as run, run.observed(note):
        generate(pipe, width=24, num_inference_steps=1)
    assert len(seen) == len(maps) == transformer_pipelines.LAYERS
    for found, whole in zip(seen.values(), maps, strict=True):
        image = whole.sum(1)[:, -96:]
        torch.testing.assert_close(found, image / image.norm(dim=1, keepdim=True))


def test_of_a_single_block_what_is_read_is_kept() -> None:
    """Its attention's output, or instead the keys and values by which that is computed anew."""
    pipe = transformer_pipelines.flux()
    kept: set[str] = set()

    def look(_: Any, step: int, *__: Any) -> dict[str, Any]:
        kept.update(*(slot.store for slot in run._engine.generation.slots.values()))
        return {}

    for config, parts in ((ToCa(), {"attn"}), (ToCa(self_attention=1), {"attn.norm_k", "attn.to_v"})):
        kept.clear()
        with regrow.apply(pipe, config) as run:
            generate(pipe, callback_on_step_end=look)
        assert {name.split(".", 2)[2] for name in kept if name.startswith("single")} == {"proj_out"} | parts


def test_an_image_adapter_of_flux_is_refused_unless_nothing_is_to_be_seen() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = transformer_pipelines.flux()
    torch.manual_seed(0)
    adapted = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,))
    options: dict[str, Any] = {"joint_attention_kwargs": {"ip_hidden_states": [torch.ones(1, 4, 32)]}}
    attention = pipe.transformer.transformer_blocks[1].attn
    stock = attention.processor
    attention.set_processor(adapted)
    for refused in (ToCa(), ToCa(influence=0, self_attention=1)):
        with pytest.raises(ValueError, match="1 attentions have special processors"):
            regrow.apply(pipe, refused)
    with regrow.apply(pipe, FORA(interval=3)):
        reused = generate(pipe, **options)
    with regrow.apply(pipe, ToCa(influence=0, ratio=0.5)):
        assert not torch.equal(generate(pipe, **options), reused)
    attention.set_processor(stock)
    with regrow.apply(pipe, ToCa()):
        attention.set_processor(adapted)
        with pytest.warns(UserWarning, match="layers reuse .* processors were replaced"):
            assert torch.equal(generate(pipe, **options), reused)


def test_tokens_of_two_pictures_are_handed_on_whole() -> None:
    """As Kontext hands them on: the picture to edit behind the one that is made."""
    pipe = transformer_pipelines.flux()
    calls: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    generate(pipe)
    hook.remove()
    sequences = {"hidden_states": 1, "img_ids": 0}
    twice = [c | {name: torch.cat([c[name]] * 2, dim) for name, dim in sequences.items()} for c in calls]

    def outputs(config: Any) -> list[Tensor]:
        with torch.no_grad(), regrow.apply(pipe.transformer, config) as run, run.generation(5) as clock:
            found = []
            for words in twice:
                found.append(pipe.transformer(**words)[0])
                clock.step()
        return found

    expected = outputs(FORA(interval=3))
    with pytest.warns(UserWarning, match="layers reuse .* not those of one picture"):
        found = outputs(ToCa())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _only_full(run: Any, hook: Any) -> Any:
    """A hook that sees nothing of calls that hand on what attentions last returned."""
    return lambda *a: hook(*a) if run._engine.call.skip_plan is None else None


@pytest.mark.parametrize("staleness", [0.25, 0.0])
def test_nobody_waits_for_ever_unless_told_so(staleness: float) -> None:
    config, grid = ToCa(interval=99, staleness=staleness), Grid(6, 6)
    rule = ToCaDecider(config, (MLP,))
    memory = rule.begin()
    rule.observe(memory, ATTENTION, random_attention(1, 36, 36, 0))
    call, x = CallInfo(1, False, (), torch.Generator(), grid=grid), torch.empty(1, 36, 1)
    last = torch.full((36,), -1)
    for turn in range(400):
        last[rule.choose(memory, None, MLP, x, 4, call)[0]] = turn
    assert (last > 250).all() == (staleness > 0)


@pytest.mark.parametrize("alignment", Alignment)
def test_alignment_gives_both_halves_the_same_tokens(alignment: Alignment) -> None:
    grid, own = Grid(8, 8), random_attention(4, 64, 64, 1)

    def tokens(first: bool, attention: Attention = own, guided: bool = True) -> Tensor:
        rule = ToCaDecider(ToCa(alignment=alignment, queries=None), (MLP,))
        memory = rule.begin()
        rule.observe(memory, ATTENTION, attention)
        batch = len(attention.query)
        info = CallInfo(batch, guided, (), torch.Generator(), conditional_first=first, grid=grid)
        return rule.choose(memory, None, MLP, torch.empty(batch, 64, 1), 20, info)

    chosen = tokens(False)
    assert torch.equal(chosen[:2], chosen[2:]) == (alignment is not Alignment.OFF)
    sides = {Alignment.UNCONDITIONAL: slice(0, 2), Alignment.CONDITIONAL: slice(2, 4)}
    if alignment in sides:
        for first in (False, True):
            side = sides[alignment] if not first else slice(*((2, 4), (0, 2))[sides[alignment].start // 2])
            half = Attention(own.query[side], own.key[side], 64, None)
            assert torch.equal(tokens(first)[:2], tokens(first, half, guided=False))


def count_of(
    config: ToCa, kind: LayerKind, index: int, tokens: int, ratio: float, blocks: int = 28
) -> int | None:
    """How many tokens a layer of a model of so many blocks computes in a call of a ratio."""
    sites = tuple(layer(f"{i}", kind, i) for i in range(blocks))
    decision = ToCaDecider(config, sites).plan(View(1, 2, Step(LAYERS, ratio)))[f"{index}"]
    return decision.count(tokens) if isinstance(decision, Some) else 0


def test_shares_are_by_block_call_and_kind() -> None:
    config = ToCa(interval=2, ratio=0.8, cross_attention=0.5, layer_weight=0.8, step_weight=0.4)
    steps = list(recipe_of(config).plan.resample(50).steps())
    cached = [1 - s.ratio for s in steps if s.depth == LAYERS]
    assert len(cached) == 25
    assert sum(cached) / 25 == pytest.approx(0.2, rel=0.02)
    assert cached == sorted(cached)
    assert cached[0] == pytest.approx(0.2 * (0.6 + 0.8 * 2 / 50))
    assert cached[-1] == pytest.approx(0.2 * 1.4)
    assert all(s.ratio == 0 for s in steps if s.full)
    counts = [count_of(config, LayerKind.FEED_FORWARD, i, 1024, 0.8) for i in range(28)]
    assert counts[0] == int(1024 * 0.2 * 1.8)
    assert counts[-1] == int(1024 * 0.2 * 0.2)
    assert sum(counts) / (28 * 1024) == pytest.approx(0.2, rel=0.01)
    assert count_of(config, LayerKind.CROSS_ATTENTION, 0, 1024, 0.8) == int(1024 * 0.18)
    assert count_of(config, LayerKind.SELF_ATTENTION, 0, 1024, 0.8) == 0
    assert count_of(config, LayerKind.FEED_FORWARD, 0, 10, 0.0, blocks=1) == 10


def test_shares_that_binary_fractions_miss_lose_no_token() -> None:
    config = ToCa(ratio=0.9, layer_weight=0)
    assert (1 - 0.9) * 10 < 1
    assert count_of(config, LayerKind.FEED_FORWARD, 0, 10, 0.9) == 1


def test_macs_are_those_of_fora_and_of_the_tokens_computed() -> None:
    """DiT-XL/2 at 256 x 256: 256 tokens, 1,152 wide, MLPs four times as wide."""
    arch, config = architecture("dit-xl-256"), ToCa()
    ours, fora = profile(arch, config, 6), profile(arch, FORA(interval=3), 6)
    steps = list(recipe_of(config).plan.resample(6).steps())
    for step, mine, cached in zip(steps, ours.per_call, fora.per_call, strict=True):
        counts = [count_of(config, LayerKind.FEED_FORWARD, i, 256, step.ratio) or 0 for i in range(28)]
        tokens = 0 if step.full else sum(counts)
        assert mine == cached + tokens * 8 * 1152**2
    assert 0 < ours.selection_macs < 0.01 * ours.macs
    exact = profile(arch, ToCa(queries=None), 1)
    # Products of queries and keys, the map itself, of one call.
    assert exact.selection_macs == 28 * 256 * 256 * 1152
    assert exact.macs == ours.per_call[0]


@pytest.mark.parametrize("attends", [False, True])
def test_macs_of_flux_are_those_of_the_tokens_computed_and_of_all_of_the_text(attends: bool) -> None:
    """32 wide, 64 tokens and 16 of the text; 2 double blocks and 7 single ones."""
    pipe, config = transformer_pipelines.flux(9), ToCa(ratio=0.5, self_attention=float(attends), **FLAT)
    calls = []
    for method in (FORA(interval=3), config):
        with regrow.apply(pipe, method) as run:
            generate(pipe)
        calls.append([c.macs for c in run.report().calls])
    fora, ours = calls
    assert [a == b for a, b in zip(fora, ours, strict=True)] == [True, False, False, True, False]
    image, text, square = 32, 16, 32**2
    feed_forward = 2 * (image + text) * 8 * square + 7 * (image + text) * 9 * square
    projections = 2 * (image + text) * 4 * square + 7 * (image + text) * 3 * square
    products = 9 * 2 * (image + text) * (64 + 16) * 32
    assert ours[1] - fora[1] == feed_forward + (projections + products if attends else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_counts_what_the_calls_compute(kind: str) -> None:
    # Of Flux two blocks are double, and one is single.
    pipe = transformer_pipelines.KINDS[kind](3)  # type: ignore[operator]
    given: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, *a: given.append(a), with_kwargs=True)
    generate(pipe)
    hook.remove()
    args, kwargs = given[0]
    model = pipe.transformer.to("meta")
    args = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    kwargs = {k: v.to("meta") if isinstance(v, Tensor) and v.ndim else v for k, v in kwargs.items()}
    counted = []
    config = ToCa(interval=2, ratio=0.6, **EVERYWHERE)
    with regrow.apply(model, config) as run, run.generation(3) as clock, torch.no_grad():
        for _ in range(3):
            with FlopCounterMode(display=False) as counter:
                model(*args, **kwargs)
            counted.append(counter.get_total_flops() // 2)
            clock.step()
        report = run.report()
    assert [c.macs + c.selection_macs for c in report.calls] == counted
    assert report.calls[1].macs < 0.9 * report.calls[2].macs
    assert [c.selection_macs > 0 for c in report.calls] == [True, False, True]


def test_a_method_and_its_fields_by_their_short_name() -> None:
    assert variant("toca:3", 50).config == ToCa(interval=3)
    assert variant("toca:4:ratio=0.9:alignment=off", 50).config == ToCa(
        interval=4, ratio=0.9, alignment=Alignment.OFF
    )


def test_chunked_feed_forwards_are_said_to_be_reused() -> None:
    pipe = transformer_pipelines.sd3()
    pipe.transformer.enable_forward_chunking(1, 1)
    with regrow.apply(pipe, FORA(interval=3)):
        expected = generate(pipe)
    with regrow.apply(pipe, ToCa()), pytest.warns(UserWarning, match="disable_forward_chunking"):
        assert torch.equal(generate(pipe), expected)


class Adapted(torch.nn.Module):
    """As peft does it: the old layer, with its hook, inside a new one that adds to it."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * self.base(2 * x)


@pytest.mark.filterwarnings("ignore:.*is lost with the removal")
@pytest.mark.parametrize(
    ("kind", "name", "projection"),
    [
        ("sd3", "transformer_blocks.1.attn", "to_k"),
        ("flux", "transformer_blocks.1.attn", "to_v"),
        ("flux", "single_transformer_blocks.1.attn", "to_v"),
    ],
)
def test_projections_replaced_after_apply_are_as_before(kind: str, name: str, projection: str) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    attention = pipe.transformer.get_submodule(name)
    plain = getattr(attention, projection)
    with regrow.apply(pipe, ToCa(ratio=0.6, **EVERYWHERE)) as run:
        without = generate(pipe)
        setattr(attention, projection, Adapted(plain))
        after = generate(pipe)
        assert any(c.depth == "layers" for c in rows_of(run))
    with regrow.apply(pipe, ToCa(ratio=0.6, **EVERYWHERE)):
        assert torch.equal(generate(pipe), after)
    assert not torch.equal(after, without)


def test_fused_projections_are_refused() -> None:
    pipe = transformer_pipelines.sd3()
    pipe.transformer.transformer_blocks[0].attn.fuse_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        regrow.apply(pipe, ToCa())
    regrow.apply(pipe, ToCa(influence=0, control=0)).remove()


def test_models_without_such_layers_are_refused() -> None:
    import pipelines

    with pytest.raises(regrow.UnsupportedModelError, match="UNet2DConditionModel has no layer"):
        regrow.apply(pipelines.sd(), ToCa())
    with pytest.raises(regrow.UnsupportedModelError, match="asked for: cross_attention"):
        regrow.apply(transformer_pipelines.dit(), ToCa(feed_forward=0, cross_attention=1))


@pytest.mark.filterwarnings("default")
def test_layers_that_a_model_lacks_are_said() -> None:
    with pytest.warns(UserWarning, match="DiTTransformer2DModel has no cross_attention"):
        regrow.apply(transformer_pipelines.dit(), ToCa(cross_attention=1)).remove()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"interval": 0}, "interval"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": 1.1}, "ratio"),
        ({"self_attention": -1}, "self_attention"),
        ({"feed_forward": 0}, "feed_forward: 0 is not allowed"),
        ({"layer_weight": 1.1}, "layer_weight"),
        ({"step_weight": 1}, "step_weight"),
        ({"cell": 0}, "cell"),
        ({"queries": 0}, "queries"),
        ({"spread": float("nan")}, "spread"),
        ({"alignment": "both"}, "alignment"),
        ({"fresh": 0.1}, "fresh"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ToCa(**fields)


def test_configurations_go_to_json_and_back() -> None:
    config = ToCa(interval=4, ratio=0.5, queries=None)
    assert ToCa.model_validate_json(config.model_dump_json()) == config
    assert hash(ToCa()) == hash(ToCa())
    assert ToCa.preset("paper") == ToCa(queries=None, alignment=Alignment.OFF)


def test_the_preset_of_pixart_computes_the_released_codes_shares() -> None:
    """0.3 times 1.6 of a feed-forward's tokens and 0.3 times 0.6 of a cross-attention's, from 1.9 times in
    the first call to 0.1 times, and from 1.6 times in the first block to 0.4 times."""
    config, calls, tokens = ToCa.preset("pixart"), 2000, 10_000
    steps = list(recipe_of(config).plan.resample(calls).steps())
    assert steps[0].full
    assert not steps[1].full
    for step, growth in ((steps[1], 1.9), (steps[1000], 1.0), (steps[-1], 0.1)):
        for kind, share in ((LayerKind.FEED_FORWARD, 0.3 * 1.6), (LayerKind.CROSS_ATTENTION, 0.3 * 0.6)):
            for index, factor in ((0, 1.6), (14, 1 + 0.6 - 1.2 * 14 / 27), (27, 0.4)):
                expected = min(share * growth * factor, 1) * tokens
                found = count_of(config, kind, index, tokens, step.ratio)
                assert found == pytest.approx(expected, abs=0.002 * tokens)


class Added(nn.Module):
    """As peft puts a LoRA around a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out + 0.1 * x.mean(-1, keepdim=True)


@pytest.mark.parametrize("config", [FORA(interval=2), ToCa(interval=2, ratio=0.5)], ids=["fora", "toca"])
@pytest.mark.parametrize("part", ["proj_mlp", "proj_out"])
def test_a_layer_replaced_after_apply_is_as_one_replaced_before(config: Any, part: str) -> None:
    pipe = transformer_pipelines.flux()
    block = pipe.transformer.single_transformer_blocks[0]
    base = getattr(block, part)
    setattr(block, part, Added(base))
    with regrow.apply(pipe, config):
        expected = generate(pipe)
    setattr(block, part, base)
    with regrow.apply(pipe, config) as run:
        reused = generate(pipe)
        setattr(block, part, Added(base))
        assert torch.equal(generate(pipe), expected)
        assert {call.depth for call in rows_of(run)} == {"full", "layers"}
        setattr(block, part, base)
        assert torch.equal(generate(pipe), reused)
    assert not torch.equal(reused, expected)


def test_a_layer_replaced_within_a_generation_makes_its_next_call_full() -> None:
    pipe = transformer_pipelines.flux()
    block = pipe.transformer.single_transformer_blocks[0]

    def replace(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == 0:
            block.proj_out = Added(block.proj_out)
        return {}

    with regrow.apply(pipe, FORA(interval=9)) as run:
        generate(pipe, callback_on_step_end=replace)
        depths = [c.depth for c in rows_of(run) if c.branch == 0]
    assert depths == ["full", "full", *["layers"] * (len(depths) - 2)]


def test_self_attentions_of_a_part_of_the_batch_hand_on_their_last_output() -> None:
    pipe = transformer_pipelines.sd3_perturbed()
    config = ToCa(interval=2, ratio=0.5, self_attention=1.0, influence=0.0)
    with (
        regrow.apply(pipe, config) as run,
        pytest.warns(UserWarning, match="a part of the batch only"),
    ):
        made = generate(pipe, max_sequence_length=16, pag_scale=3.0)
    assert torch.isfinite(made).all()
    assert {call.depth for call in rows_of(run)} == {"full", "layers"}


def test_a_forecast_writes_to_no_value_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single value a forecast is that value itself, into which chosen tokens' rows must not go."""
    kept: list[tuple[Any, Any]] = []
    add = Store.add

    def spy(store: Store, key: str, value: Any) -> None:
        add(store, key, value)
        kept.append((value, copied(value)))

    monkeypatch.setattr(Store, "add", spy)
    pipe = transformer_pipelines.pixart()
    with regrow.apply(pipe, ToCa(interval=3, ratio=0.5, recovery="taylor")) as run:
        generate(pipe, num_inference_steps=6)
    assert {call.depth for call in rows_of(run)} == {"full", "layers"}
    tensors = [(a, b) for a, b in kept if isinstance(a, Tensor) and not a.is_meta]
    assert tensors
    assert all(torch.equal(a, b) for a, b in tensors)
