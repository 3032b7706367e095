"""TokenCache on video models: tokens of frames, of places in all frames, and of turned queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

import pytest
import torch
import transformer_pipelines
from test_tokencache import SMALL, Chosen, put_back
from torch import Tensor
from transformer_pipelines import PAIRS, STEPS, TEXT

import regrow
from regrow import FORA, DeepCache
from regrow.core.decision import Entered
from regrow.core.recipe import CallInfo
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.methods.tokencache import Choice, Counts, TokenCache, _Rule
from regrow.models import layout_of
from regrow.models.table import Spans
from regrow.schedule import SITES
from regrow.tokens.grid import Grid

KINDS = ("latte", "wan")
FORMS: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 3.0},
    "unguided": {"guidance_scale": 1.0},
    "batch": {"guidance_scale": 3.0, "count": 2},
}
FRAMES = 3


def make(kind: str, **settings: Any) -> Any:
    return transformer_pipelines.latte() if kind == "latte" else transformer_pipelines.wan(**settings)


def generate(pipe: Any, *, seed: int = 0, count: int = 1, **options: Any) -> Tensor:
    """Latents of a video that is not square: of 4 x 6 tokens, 3 latent frames of Latte and 2 of Wan."""
    words = torch.randn(2, 6, TEXT, generator=torch.Generator().manual_seed(9))
    latte = type(pipe).__name__ == "LattePipeline"
    frames: dict[str, Any] = {"video_length": FRAMES} if latte else {"num_frames": 5}
    if latte:
        frames["negative_prompt"] = None
    made = pipe(
        prompt_embeds=words[:count],
        negative_prompt_embeds=words.flip(0)[:count],
        height=64,
        width=96,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **frames | {"num_inference_steps": STEPS} | options,
    )
    return torch.as_tensor(made.frames)


def chosen_by(pipe: Any, config: Any, **options: Any) -> tuple[Tensor, list[Chosen], Any]:
    """A generation, the tokens that the blocks of each call computed (None: all), and its run."""
    seen: list[Chosen] = []

    def note(observation: regrow.Observation) -> None:
        sited = observation.record.depth == SITES
        seen.append(dict(observation.refreshed) if sited else None)

    with regrow.apply(pipe, config) as run, run.observed(note):
        out = generate(pipe, **options)
    return out, seen, run


def blocks_of(transformer: Any) -> list[str]:
    """Paths of the blocks, as they run."""
    if not hasattr(transformer, "temporal_transformer_blocks"):
        return [f"blocks.{i}" for i in range(len(transformer.blocks))]
    pairs = range(len(transformer.transformer_blocks))
    return [
        f"{stack}.{i}" for i in pairs for stack in ("transformer_blocks", "temporal_transformer_blocks")
    ]


@contextmanager
def slow(transformer: Any, calls: list[Chosen], branches: int) -> Iterator[None]:
    """Computes each block for all tokens in every call, then puts back what it should not have known.

    Keys are kept as the projection gives them: those that are not computed are those of before in every
    position, so that it does not matter whether they were turned before they were kept.
    """
    now: list[int] = [-1]
    kept: dict[Any, Tensor] = {}

    def begin(*_: Any) -> None:
        now[0] += 1

    def mixed(name: str, block: str, new: Tensor) -> Tensor:
        chosen, key = calls[now[0]], (name, now[0] % branches)
        if chosen is not None:
            new = put_back(kept[key], new, chosen[block]) if block in chosen else kept[key]
        kept[key] = new
        return new

    def behind(name: str, x: Tensor, out: Tensor) -> Tensor:
        update = mixed(name, name, out - x)
        return out if calls[now[0]] is None else x + update

    hooks = [transformer.register_forward_pre_hook(begin)]
    for name in blocks_of(transformer)[:-1]:
        block = transformer.get_submodule(name)
        for part in ("to_k", "to_v"):
            own = f"{name}.{part}"
            hooks.append(
                getattr(block.attn1, part).register_forward_hook(
                    lambda m, a, out, own=own, name=name: mixed(own, name, out)
                )
            )
        hooks.append(block.register_forward_hook(lambda m, a, out, name=name: behind(name, a[0], out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def branches_of(kind: str, form: str) -> int:
    """Wan is called once for each half of guidance."""
    return 2 if kind == "wan" and FORMS[form]["guidance_scale"] > 1 else 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_a_full_one_with_old_updates_put_back(kind: str, form: str) -> None:
    pipe = make(kind)
    names, branches = blocks_of(pipe.transformer)[:-1], branches_of(kind, form)
    ours, chosen, run = chosen_by(pipe, TokenCache(**SMALL), **FORMS[form])
    assert [c is None for c in chosen[::branches]] == [True, False, False, True, False]
    assert all(list(c) == names for c in chosen if c)
    with slow(pipe.transformer, chosen, branches):
        expected = generate(pipe, **FORMS[form])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, generate(pipe, **FORMS[form]), rtol=1e-3)
    if form == "guided":
        # Counting takes longer than the run.
        calls = run.report().calls
        assert calls[branches].macs < 0.75 * calls[-2 * branches].macs
        assert calls[branches].selection_macs > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [Choice.RANDOM, Choice.TOCA, Choice.TOME])
def test_other_choices_are_calls_with_old_updates_put_back(kind: str, choice: Choice) -> None:
    pipe = make(kind)
    config = TokenCache(**SMALL | {"choice": choice, "predictor": None})
    ours, chosen, run = chosen_by(pipe, config, **FORMS["guided"])
    branches = branches_of(kind, "guided")
    with slow(pipe.transformer, chosen, branches):
        expected = generate(pipe, **FORMS["guided"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if choice is Choice.TOCA:
        assert run.report().calls[0].selection_macs > 0


def test_a_temporal_block_computes_a_share_of_the_frames_of_every_place() -> None:
    pipe = make("latte")
    _, chosen, _ = chosen_by(pipe, TokenCache(**SMALL | {"ratio": 0.5}), **FORMS["batch"])
    [first] = [c for c in chosen[1:2] if c is not None]
    spatial, temporal = (first[f"{stack}transformer_blocks.1"] for stack in ("", "temporal_"))
    assert spatial.shape == (4 * FRAMES, 12)
    assert temporal.shape == (4 * 24, ceil(0.5 * FRAMES))


@pytest.mark.parametrize("form", FORMS)
def test_alpha_of_a_temporal_block_is_that_of_its_tokens(form: str) -> None:
    pipe = make("latte")
    layout = layout_of(pipe.transformer)
    decider = _Rule(TokenCache(**SMALL)).on(pipe.transformer, layout)
    batch, places = 2, 6
    x = torch.randn(batch * FRAMES, places, 16)
    given = (
        None,
        torch.randn(batch * FRAMES, 5, 16),
        None,
        torch.randn(batch * FRAMES, 6 * 16),
        None,
        None,
    )
    info = CallInfo(batch, False, (), torch.Generator(), grid=Grid(2, 3))
    seen = decider.look(decider.begin(), Entered(x, given, {}), info)
    assert decider.predictor is not None
    alpha = torch.sigmoid(decider.predictor.head(decider.predictor.block(x, *given)))
    for site in layout.block_sites[:-1]:
        frames = site.spans is Spans.FRAME
        shape = (batch * FRAMES, places) if frames else (batch * places, FRAMES)
        chosen = decider.choose(decider.begin(), seen, site, torch.empty(*shape, 16), 2, info)
        for row, tokens in enumerate(chosen.tolist()):
            sample, within = divmod(row, FRAMES if frames else places)
            own = [
                float(
                    alpha[sample * FRAMES + (within if frames else t), t if frames else within, site.index]
                )
                for t in range(shape[1])
            ]
            assert sorted(tokens) == sorted(sorted(range(len(own)), key=lambda t: -own[t])[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_counts_from_the_call_are_the_cut_of_all_alphas(kind: str) -> None:
    pipe = make(kind)
    _, chosen, _ = chosen_by(pipe, TokenCache(**SMALL | {"counts": Counts.DATA}), **FORMS["unguided"])
    [first] = [c for c in chosen[1:2] if c is not None]
    frames = FRAMES if kind == "latte" else 2
    tokens = frames * 24
    shares = [t.numel() / tokens for t in first.values()]
    sites = len(blocks_of(pipe.transformer)) - 1
    # Counts of frames are whole: of three, a share is off by a sixth at most.
    assert abs(sum(shares) / sites - 0.4) < (1 / 6 if kind == "latte" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["guided", "unguided"])
def test_nothing_pruned_is_the_plain_pipeline_bit_for_bit(kind: str, form: str) -> None:
    pipe = make(kind)
    plain = generate(pipe, **FORMS[form])
    config = TokenCache(**SMALL | {"full_steps": 50})
    with pytest.warns(UserWarning, match="saved nothing"), regrow.apply(pipe, config):
        ours = generate(pipe, **FORMS[form])
    assert torch.equal(ours, plain)


def test_timesteps_of_each_token_are_those_of_the_tokens_computed() -> None:
    """Wan 2.2's smallest model."""
    pipe = make("wan", expand_timesteps=True)
    ours, chosen, _ = chosen_by(pipe, TokenCache(**SMALL), **FORMS["unguided"])
    assert chosen[1]
    with slow(pipe.transformer, chosen, 1):
        expected = generate(pipe, **FORMS["unguided"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_another_attention_processor_has_all_tokens_computed() -> None:
    pipe = make("wan")

    class Another(type(pipe.transformer.blocks[0].attn1.processor)):  # type: ignore[misc]
        """Of another class."""

    for block in pipe.transformer.blocks:
        block.attn1.set_processor(Another())
    plain = generate(pipe)
    run = regrow.apply(pipe, TokenCache(**SMALL))
    with pytest.warns(UserWarning, match=r"its processors .* were replaced"):
        ours = generate(pipe)
    run.remove()
    assert torch.equal(ours, plain)


def test_the_choice_of_toca_and_tome_knows_the_grid() -> None:
    """Of 4 x 6 tokens each patch of 2 x 2 has one that comes first; a row of 24 would have others."""
    layout = layout_of(make("wan").transformer)
    decider = _Rule(TokenCache(**SMALL | {"choice": Choice.TOME})).on(make("wan").transformer, layout)
    frames, grid = 2, Grid(4, 6)
    info = CallInfo(1, False, (), torch.Generator().manual_seed(0), grid=grid)
    x = torch.randn(1, frames * grid.tokens, 24)
    chosen = decider.choose(decider.begin(), None, layout.block_sites[0], x, frames * 6, info)
    for frame in range(frames):
        mine = [t - frame * 24 for t in chosen[0].tolist() if frame * 24 <= t < frame * 24 + 24]
        patches = {(t // 6 // 2, t % 6 // 2) for t in mine}
        assert len(mine) == len(patches) == 6


def test_pictures_that_are_not_square_have_their_own_grid() -> None:
    pipe = transformer_pipelines.pixart()
    seen: list[Mapping[str, Tensor]] = []
    config = TokenCache(**SMALL | {"choice": Choice.TOME, "predictor": None})
    with regrow.apply(pipe, config) as run, run.observed(lambda o: seen.append(o.refreshed)):
        transformer_pipelines.generate(pipe, width=24)
    chosen = [tokens for call in seen for tokens in call.values()]
    assert chosen
    for row in torch.cat(chosen).tolist():
        # Of each patch of 2 x 2 one token comes first.
        assert len({(t // 12 // 2, t % 12 // 2) for t in row}) == 4 * 6


def test_macs_of_latte_are_those_counted_by_hand() -> None:
    """Latte 1: 16 frames of 512 x 512, that is of 1,024 tokens 1,152 wide, 28 pairs of blocks."""
    frames, places, width, text, pairs = 16, 32 * 32, 1152, 120, 28
    tokens, linear = frames * places, 4 * width**2 + 8 * width**2
    attended = 2 * width * (places + frames)
    cross = tokens * (2 * width**2 + 2 * text * width) + 2 * frames * text * width**2
    full = pairs * (tokens * (2 * linear + attended) + cross)
    config = TokenCache(predictor="untrained", full_steps=1, last_blocks=0, ratio=0.5)
    result = profile(architecture("latte-512"), config, 2)
    assert result.baseline_macs_per_call == pytest.approx(full, rel=2e-3)
    # Of each frame half the tokens, of each place half the frames; keys and values of the text are kept.
    cached = pairs * (tokens * (linear + attended / 2) + tokens * (width**2 + text * width))
    assert result.per_call[1] == pytest.approx(cached, rel=2e-3)
    block = tokens * (linear + 2 * width * places) + cross
    assert result.selection_macs == pytest.approx(block + tokens * width * 2 * pairs, rel=5e-3)


class TestLatteElsewhere:
    """Methods of whole layers and blocks."""

    @pytest.mark.parametrize("form", FORMS)
    def test_fora(self, form: str) -> None:
        pipe = make("latte")
        layers = [
            (f"{name}.{layer}", getattr(pipe.transformer.get_submodule(name), layer))
            for name in blocks_of(pipe.transformer)
            for layer in ("attn1", "attn2", "ff")
        ]
        kept: dict[str, Tensor] = {}
        now = [-1]

        def begin(*_: Any) -> None:
            now[0] += 1

        def after(name: str, out: Tensor) -> Tensor:
            kept[name] = out if now[0] % 2 == 0 else kept[name]
            return kept[name]

        hooks = [pipe.transformer.register_forward_pre_hook(begin)]
        for name, layer in layers:
            if layer is not None:
                hooks.append(layer.register_forward_hook(lambda m, a, out, name=name: after(name, out)))
        expected = generate(pipe, **FORMS[form])
        for hook in hooks:
            hook.remove()
        with regrow.apply(pipe, FORA(interval=2)) as run:
            assert torch.equal(generate(pipe, **FORMS[form]), expected)
        if form == "guided":
            calls = run.report().calls
            assert calls[1].macs < 0.2 * calls[0].macs

    @pytest.mark.parametrize(("branch", "first", "last"), [(0, 1, 6), (1, 1, 4), (2, 2, 5)])
    def test_block_caching_is_of_blocks_of_one_kind_at_both_ends(
        self, branch: int, first: int, last: int
    ) -> None:
        """Blocks from ``first`` to before ``last`` are left out, an odd number."""
        pipe = make("latte")
        names = blocks_of(pipe.transformer)[first:last]
        now, entered, added = [-1], [torch.empty(0)], [torch.empty(0)]

        def begin(*_: Any) -> None:
            now[0] += 1

        def after(name: str, x: Tensor, out: Tensor) -> Tensor:
            cached = now[0] % 2 == 1
            if name == names[0]:
                entered[0] = x
            if name == names[-1] and not cached:
                added[0] = out - entered[0]
            if not cached:
                return out
            return entered[0] + added[0] if name == names[-1] else x

        hooks = [pipe.transformer.register_forward_pre_hook(begin)]
        for name in names:
            block = pipe.transformer.get_submodule(name)
            hooks.append(block.register_forward_hook(lambda m, a, out, name=name: after(name, a[0], out)))
        expected = generate(pipe)
        for hook in hooks:
            hook.remove()
        with regrow.apply(pipe, DeepCache(interval=2, branch=branch)) as run:
            torch.testing.assert_close(generate(pipe), expected)
        calls = run.report().calls
        assert calls[1].macs < calls[0].macs

    def test_the_text_is_projected_once(self) -> None:
        pipe = make("latte")
        plain = generate(pipe)
        with pytest.warns(UserWarning, match="prunes nothing"):
            run = regrow.apply(pipe, FORA(interval=1))
        with run:
            assert torch.equal(generate(pipe), plain)
        macs = [c.macs for c in run.report().calls]
        words = 2 * FRAMES * 6 * 2 * 16 * 16 * PAIRS + 2 * 6 * (TEXT * 16 + 16 * 16)
        assert macs[0] - macs[1] == words

    def test_calls_of_some_tokens_are_refused(self) -> None:
        with pytest.raises(regrow.UnsupportedModelError, match="can't compute some of its tokens only"):
            regrow.apply(make("latte"), regrow.CATPruning())
        with pytest.raises(regrow.UnsupportedModelError, match="has no layer"):
            regrow.apply(make("latte"), regrow.ToCa())
