"""CAT Pruning with block caching: cached calls compute some tokens, through some blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
import transformer_pipelines
from pydantic import ValidationError
from rows import rows_of
from test_cat import KINDS, All, slow
from torch import Tensor
from transformer_pipelines import FORMS, LAYERS, SKIP_LAYER, STEPS, generate, in_turn

import regrow
from regrow import ATEDM, FORA, FULL, CATPruning, Combined, DeepCache, Schedule, TokenChoice
from regrow.core.recipe import Recipe, recipe_of
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.lab.measure.variants import variant
from regrow.methods.base import MethodConfig
from regrow.schedule import Both


class Everything(MethodConfig):
    """DeepCache on the way of some tokens, with all of them."""

    method: Literal["everything"] = "everything"
    interval: int = 2
    branch: int = 2


@recipe_of.register
def _(config: Everything) -> Recipe:
    caching = DeepCache(interval=config.interval, branch=config.branch)
    return Recipe(Both(recipe_of(caching).plan, Schedule.constant(0.5)), sites=All())


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest) -> Any:
    return transformer_pipelines.KINDS[request.param]()


BRANCHES = {"guided": 0, "batch": 3, "wide": 3}
"""Of block caching, by the form."""


def test_all_tokens_on_the_way_of_some_are_block_caching_bit_for_bit(pipe: Any) -> None:
    with regrow.apply(pipe, DeepCache(interval=2, branch=3)):
        expected = generate(pipe, count=2)
    with regrow.apply(pipe, Everything(branch=3)) as run:
        assert torch.equal(generate(pipe, count=2), expected)
    calls = [(c.depth, c.ratio) for c in rows_of(run)]
    # The choice of tokens needs two outputs.
    assert calls == [("full", 0), ("4", 0), ("full", 0.5), ("4", 0.5), ("full", 0.5)]


@contextmanager
def slow_blocks(
    transformer: Any, tokens: list[Tensor | None], shallow: list[bool], first: int, last: int
) -> Iterator[None]:
    """Computes every block; in shallow calls those between hand on, and the last adds what was kept."""
    stack = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    call, entered, kept = [-1], [], []

    def begin(*_: Any) -> None:
        call[0] += 1

    def after(index: int, args: Any, kwargs: Any, out: Any) -> Any:
        joint = isinstance(out, tuple)
        given = [kwargs["encoder_hidden_states"], kwargs["hidden_states"]] if joint else [args[0]]
        made = list(out) if joint else [out]
        if index == first:
            entered[:] = given
        if not shallow[call[0]]:
            if index == last - 1:
                added = [None if y is None else y - x for x, y in zip(entered, made, strict=True)]
                chosen = tokens[call[0]]
                if chosen is not None:
                    fresh, added[-1] = added[-1], kept[-1].clone()
                    for b in range(len(fresh)):
                        added[-1][b, chosen[b]] = fresh[b, chosen[b]]
                kept[:] = added
            return None
        new = given
        if index == last - 1:
            new = [x if d is None else x + d for x, d in zip(entered, kept, strict=True)]
        return tuple(new) if joint else new[0]

    hooks = [transformer.register_forward_pre_hook(begin)]
    for i in range(first, last):
        hook = stack[i].register_forward_hook(
            lambda m, args, kwargs, out, i=i: after(i, args, kwargs, out), with_kwargs=True
        )
        hooks.append(hook)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("kind", "form", "choice"), in_turn((TokenChoice.NOISE, TokenChoice.CLUSTERS), BRANCHES)
)
def test_calls_are_full_ones_with_old_rows_and_blocks_put_back(
    kind: str, form: str, choice: TokenChoice
) -> None:
    pipe, branch = KINDS[kind](), BRANCHES[form]
    options: dict[str, Any] = FORMS[form] | {"num_inference_steps": 7}
    chosen: list[Tensor | None] = []

    def note(module: Any, args: Any, out: Any) -> None:
        tokens = run._engine.call.tokens
        chosen.append(None if tokens is None else tokens.tokens)

    tokens = CATPruning(alpha=0.4, t0=2, choice=choice)
    with regrow.apply(pipe, Combined(caching=DeepCache(interval=3, branch=branch), tokens=tokens)) as run:
        hook = pipe.transformer.pos_embed.register_forward_hook(note)
        ours = generate(pipe, **options)
        hook.remove()
    shallow = [False, False, True, False, True, True, False]
    assert [c.depth for c in rows_of(run)] == [str(branch + 1) if s else "full" for s in shallow]
    assert [t is None for t in chosen] == [True, True] + [False] * 5
    tokens_of = [t for t in chosen if t is not None]
    assert torch.equal(tokens_of[2], tokens_of[1])
    assert torch.equal(tokens_of[3], tokens_of[1])
    first, last = (branch + 2) // 2, LAYERS - (branch + 1) // 2

    def skips(call: int, block: int) -> bool:
        return shallow[call] and first <= block < last

    with slow(pipe.transformer, chosen, skips), slow_blocks(pipe.transformer, chosen, shallow, first, last):
        expected = generate(pipe, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if form == "guided":
        # Counting takes longer than the run.
        calls = run.report().calls
        assert calls[2].macs < calls[3].macs < calls[0].macs


@pytest.mark.parametrize(("kind", "form", "early_ratio"), in_turn((0.0, 0.25), BRANCHES))
def test_at_edm_reuses_under_cached_calls(kind: str, form: str, early_ratio: float) -> None:
    """Its first block computes all tokens in every call."""
    pipe, branch = KINDS[kind](), BRANCHES[form]
    options: dict[str, Any] = FORMS[form] | {"num_inference_steps": 8}
    seen: list[regrow.Observation] = []
    tokens = ATEDM.preset("reuse", ratio=0.5, early=4, early_ratio=early_ratio)
    config = Combined(caching=DeepCache(interval=3, branch=branch), tokens=tokens)
    with regrow.apply(pipe, config) as run, run.observed(seen.append):
        ours = generate(pipe, **options)
    shallow = [False, False, True, False, True, True, False, True]
    assert [c.depth for c in rows_of(run)] == [str(branch + 1) if s else "full" for s in shallow]
    early = early_ratio > 0
    chosen = [o.tokens for o in seen]
    assert [t is None for t in chosen] == [True, True, not early, not early] + [False] * 4
    assert torch.equal(chosen[6], chosen[7])
    if early:
        # The most important of those that the last call of all blocks computed.
        first, then = chosen[3], chosen[4]
        assert first is not None
        assert then is not None
        assert first.shape[1] > then.shape[1]
        for more, fewer in zip(first.tolist(), then.tolist(), strict=True):
            assert set(fewer) < set(more)
        assert torch.equal(chosen[4], chosen[5])
    first_block, last = (branch + 2) // 2, LAYERS - (branch + 1) // 2

    def skips(call: int, block: int) -> bool:
        return block == 0 or (shallow[call] and first_block <= block < last)

    with (
        slow(pipe.transformer, chosen, skips),
        slow_blocks(pipe.transformer, chosen, shallow, first_block, last),
    ):
        expected = generate(pipe, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_first_calls_are_full_wherever_a_generation_begins() -> None:
    """Image-to-image begins late in the sampler's steps, where the plan is at cached calls."""
    from diffusers import StableDiffusion3Img2ImgPipeline
    from PIL import Image

    pipe: Any = StableDiffusion3Img2ImgPipeline.from_pipe(transformer_pipelines.sd3())
    pipe.set_progress_bar_config(disable=True)
    config = Combined(caching=DeepCache(interval=2), tokens=CATPruning(alpha=0.4, t0=3))
    with regrow.apply(pipe, config) as run:
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
    calls = [(c.depth, c.ratio > 0) for c in rows_of(run)]
    assert calls == [("full", False)] * 3 + [("1", True), ("full", True), ("1", True)]


def test_depth_0_hands_on_all_tokens_between_calls_of_some() -> None:
    pipe = transformer_pipelines.sd3()
    outputs: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda m, i, out: outputs.append(out[0].clone()))
    plan = Schedule(depth=(FULL, FULL, FULL, 0, FULL), ratio=(0.0,) * 5)
    with regrow.apply(pipe, Combined(caching=plan, tokens=CATPruning(alpha=0.4, t0=2))) as run:
        generate(pipe)
    hook.remove()
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[3], outputs[4])
    assert [c.ratio > 0 for c in rows_of(run)] == [False, False, True, False, True]


@pytest.mark.parametrize(
    "config",
    [
        CATPruning(t0=STEPS),
        Combined(
            caching=Schedule(depth=(FULL, *(0,) * (STEPS - 1)), ratio=(0.0,) * STEPS),
            tokens=CATPruning(t0=2),
        ),
    ],
    ids=["all-full", "all-reused"],
)
def test_a_generation_that_leaves_no_token_out_says_so(config: Any) -> None:
    pipe = transformer_pipelines.sd3()
    with (
        regrow.apply(pipe, config) as run,
        pytest.warns(UserWarning, match="no call of this generation leaves tokens out"),
    ):
        generate(pipe)
    assert not any(c.ratio for c in rows_of(run))


def test_skip_layer_guidance_has_a_memory_of_its_own() -> None:
    """SD3's third call begins at the second step, with two full calls of its own."""
    pipe = transformer_pipelines.sd3()
    plain = generate(pipe, **SKIP_LAYER)
    with regrow.apply(pipe, Everything(interval=1)):
        assert torch.equal(generate(pipe, **SKIP_LAYER), plain)
    config = Combined(caching=DeepCache(interval=2, branch=2), tokens=CATPruning(alpha=0.4, t0=2))
    with regrow.apply(pipe, config) as run:
        ours = generate(pipe, **SKIP_LAYER)
    assert ours.isfinite().all()
    assert not torch.equal(ours, plain)
    calls = run.report().calls
    own = [[(c.depth, c.ratio > 0) for c in calls if c.branch == branch] for branch in (0, 1)]
    full, behind = ("full", False), [("full", True), ("3", True), ("full", True)]
    assert own == [[full, full, *behind], [full, full, *behind[1:]]]
    without = [c for c in calls if c.branch == 1]
    assert without[2].macs < without[3].macs < without[1].macs
    assert torch.equal(generate(pipe, **SKIP_LAYER), plain)


def test_macs_are_those_of_the_blocks_that_run() -> None:
    """DiT's 28 blocks: a cached call of depth 14 computes half of them."""
    arch = architecture("dit-xl-256")
    lean = profile(arch, variant("cat:0.3", 28).config, 28)
    both = profile(arch, variant("cat:0.3+deepcache:2:branch=13", 28).config, 28)
    assert both.per_call[:8] == lean.per_call[:8]
    assert both.per_call[8::2] == lean.per_call[8::2]
    cached = both.per_call[9]
    assert set(both.per_call[9::2]) == {cached}
    assert 0.5 * lean.per_call[9] < cached < 0.51 * lean.per_call[9]
    assert {(k.depth, k.ratio, k.count) for k in both.kinds} == {
        ("full", 0.0, 8),
        ("full", 0.7, 10),
        ("14", 0.7, 10),
    }


def test_layers_that_hand_on_their_output_are_refused() -> None:
    layers = Schedule(depth=("full", "layers"), ratio=(0.0, 0.0))
    for caching in (FORA(interval=2), layers):
        with pytest.raises(ValidationError, match="not allowed with cat"):
            Combined(caching=caching, tokens=CATPruning())
        with pytest.raises(ValidationError, match="not allowed with atedm"):
            Combined(caching=caching, tokens=ATEDM.preset("reuse"))
        assert Combined(caching=caching, tokens=ATEDM())
    config = Combined(caching=DeepCache(interval=2), tokens=CATPruning())
    assert Combined.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("depth", ["layers", "head"])
def test_calls_that_recover_whole_outputs_are_refused_beside_some_tokens(depth: str) -> None:
    """What a full call keeps for them would be of some tokens."""
    plan = Schedule(depth=("full", "full", "full", depth), ratio=(0.0,) * 4)
    with pytest.raises(ValidationError, match="caching: calls in which every layer"):
        Combined(caching=plan, tokens=CATPruning(alpha=0.25, t0=2))


def test_an_attention_of_another_class_is_refused_where_it_turns_queries() -> None:
    pipe = transformer_pipelines.flux()

    class Another(torch.nn.Module):
        """Says nothing of its processor."""

    pipe.transformer.transformer_blocks[0].attn = Another()
    with pytest.raises(ValueError, match="target: 1 attentions have special processors"):
        regrow.apply(pipe, CATPruning(alpha=0.25, t0=2))
