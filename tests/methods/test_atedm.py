"""AT-EDM: calls that leave tokens out, against slow ones that choose and put back by the definitions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pipelines
import pytest
import reference
import torch
import transformer_pipelines
from diffusers import StableDiffusionPAGPipeline
from diffusers.models.transformers import transformer_flux
from pydantic import ValidationError
from rows import rows_of
from test_cat import All
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformer_pipelines import FORMS, TWO_CALLS, generate
from whole_unet import assert_near, guided_inputs, outputs

import regrow
from regrow import ATEDM, Combined, DeepCache, PruneAfter, Restored, Similarity
from regrow.core.inputs import without_data
from regrow.core.meta import meta_copy
from regrow.core.recipe import Recipe, recipe_of
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.lab.measure.variants import variant
from regrow.methods.base import MethodConfig
from regrow.schedule import Schedule
from regrow.tokens.alignment import Alignment
from regrow.tokens.scores import Heads


def reuse(**fields: Any) -> ATEDM:
    """Every call from the third on leaves tokens out."""
    return ATEDM.preset("reuse", **({"early": 0, "ratio": 0.6} | fields))


def copying(**fields: Any) -> ATEDM:
    """Every call leaves tokens out."""
    return ATEDM(**({"early": 0, "ratio": 0.5} | fields))


def aligned(score: Tensor, config: ATEDM, *, conditional_first: bool = False) -> Tensor:
    """Both halves of a guided batch with the same scores."""
    if config.alignment is Alignment.OFF:
        return score
    first, second = score.chunk(2)
    by = {
        Alignment.MEAN: (first + second) / 2,
        Alignment.CONDITIONAL: first if conditional_first else second,
        Alignment.UNCONDITIONAL: second if conditional_first else first,
    }
    return by[config.alignment].repeat(2, 1)


def heads_of(attention: Any, x: Tensor, name: str) -> Tensor:
    """What a projection gives, by heads."""
    return getattr(attention, name)(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def ranks(query: Tensor, key: Tensor, config: ATEDM) -> Tensor:
    return reference.page_rank(query, key, config.iterations, None, rms=config.heads is not Heads.MEAN)


@contextmanager
def slow_transformer(
    transformer: Any, config: ATEDM, tokens: int, branches: int = 1
) -> Iterator[list[list[set[int]]]]:
    """Computes all tokens in every call; after two calls puts old rows back but for those it chooses.

    Calls are those of ``branches`` in turn, each with rows of its own.
    """
    now = [-1]
    caught: dict[str, Tensor] = {}
    kept: dict[tuple[int, int], Tensor] = {}
    chosen: list[list[set[int]]] = []
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    attentions = [getattr(block, "attn1", None) or block.attn for block in blocks]
    attention = attentions[config.block]
    # Flux turns queries and keys behind their norms, the text's tokens before those of the image.
    turned: list[list[Tensor]] = []

    def begin(*_: Any) -> None:
        now[0] += 1
        turned.clear()

    def multiply(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        turned.append([x.transpose(1, 2) for x in (query, key)])
        return dispatch(query, key, *args, **kwargs)

    def catch(name: str, out: Tensor) -> None:
        caught[name] = out.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    def choose(*_: Any) -> None:
        if now[0] // branches < 2:
            return
        # The image's tokens come before those of the text.
        query = torch.cat([caught[n] for n in ("to_q", "add_q_proj") if n in caught], dim=2)
        key = torch.cat([caught[n] for n in ("to_k", "add_k_proj") if n in caught], dim=2)
        if turned:
            query, key = (x.roll(tokens, 2) for x in turned[config.block])
        first = type(transformer).__name__ == "DiTTransformer2DModel"
        score = aligned(ranks(query, key, config)[:, :tokens], config, conditional_first=first)
        count = int((1 - config.ratio) * tokens + 1e-6)
        chosen.append([set(sorted(range(tokens), key=lambda t: -float(s[t]))[:count]) for s in score])

    def after(module: Any, args: Any, out: Tensor) -> Tensor:
        key = id(module), now[0] % branches
        if now[0] // branches >= 2:
            old, text = kept[key].clone(), out.shape[1] - tokens
            old[:, :text] = out[:, :text]
            for b, own in enumerate(chosen[-1]):
                rows = [text + token for token in sorted(own)]
                old[b, rows] = out[b, rows]
            out = old
        kept[key] = out
        return out

    hooks = [transformer.register_forward_pre_hook(begin), attention.register_forward_hook(choose)]
    for name in ("to_q", "to_k", "add_q_proj", "add_k_proj"):
        module = getattr(attention, name, None)
        if module is not None:
            hooks.append(module.register_forward_hook(lambda m, a, out, n=name: catch(n, out)))
    modules = [getattr(transformer, "proj_out_2", None) or transformer.proj_out]
    for own in attentions[config.block + 1 :]:
        modules += [own.to_k, own.to_v]
    hooks += [module.register_forward_hook(after) for module in modules]
    dispatch = transformer_flux.dispatch_attention_fn
    transformer_flux.dispatch_attention_fn = multiply
    try:
        yield chosen
    finally:
        transformer_flux.dispatch_attention_fn = dispatch
        for hook in hooks:
            hook.remove()


CASES = [
    ("sd3", "guided", {"alignment": "mean"}),
    ("sd3", "wide", {}),
    ("sd3", "batch", {"alignment": "conditional"}),
    ("sd3", "unguided", {"block": 2}),
    ("pixart", "guided", {"alignment": "unconditional"}),
    ("pixart", "batch", {"block": 1}),
    ("pixart", "wide", {"heads": "mean", "iterations": 2}),
    ("pixart", "unguided", {"block": 2}),
    ("dit", "guided", {"alignment": "conditional", "block": 1}),
    ("dit", "batch", {}),
    ("dit", "unguided", {"heads": "mean"}),
    ("flux", "guided", {}),
    ("flux", "wide", {"block": 1, "heads": "mean"}),
    ("flux", "batch", {"block": 3}),
    ("flux", "unguided", {"block": 1, "iterations": 1}),
]


@pytest.mark.parametrize(("kind", "form", "fields"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_call_of_some_tokens_is_a_full_one_with_old_rows_put_back(
    kind: str, form: str, fields: Any
) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    config = reuse(**fields)
    seen: list[regrow.Observation] = []
    with regrow.apply(pipe, config) as run, run.observed(seen.append):
        ours = generate(pipe, **FORMS[form])
    tokens = 96 if form == "wide" else 64
    with slow_transformer(pipe.transformer, config, tokens) as chosen:
        expected = generate(pipe, **FORMS[form])
    assert [o.tokens is None for o in seen] == [True, True, False, False, False]
    for observation, sets in zip(seen[2:], chosen, strict=True):
        assert observation.leading == config.block + 1
        assert observation.tokens is not None
        assert [set(t.tolist()) for t in observation.tokens] == sets
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_two_calls_of_flux_choose_for_themselves() -> None:
    pipe = transformer_pipelines.flux()
    seen: list[regrow.Observation] = []
    with regrow.apply(pipe, reuse()) as run, run.observed(seen.append):
        ours = generate(pipe, **TWO_CALLS)
    with slow_transformer(pipe.transformer, reuse(), 64, branches=2) as chosen:
        expected = generate(pipe, **TWO_CALLS)
    tokens = [o.tokens for o in seen]
    assert [t is None for t in tokens] == [True] * 4 + [False] * 6
    assert [[set(own.tolist()) for own in t] for t in tokens if t is not None] == chosen
    assert chosen[::2] != chosen[1::2]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Everything(MethodConfig):
    """A method whose calls compute all tokens the way that leaves tokens out, behind a block."""

    method: Literal["everything_behind"] = "everything_behind"


@recipe_of.register
def _(config: Everything) -> Recipe:
    return Recipe(Schedule.constant(0.5), sites=All(reads=3))


@pytest.mark.parametrize(("kind", "form"), [("sd3", "batch"), ("pixart", "wide"), ("flux", "wide")])
def test_all_tokens_on_the_way_of_some_are_bit_for_bit_the_plain_pipeline(kind: str, form: str) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    plain = generate(pipe, **FORMS[form])
    with regrow.apply(pipe, Everything()) as run:
        assert torch.equal(generate(pipe, **FORMS[form]), plain)
    assert [c.ratio for c in rows_of(run)] == [0, 0, 0.5, 0.5, 0.5]


class SlowStages:
    """Transformer blocks of a U-Net whose layers compute kept tokens only, by the definitions.

    Args:
        stages: lists of blocks that follow each other.
        config: of the method.
    """

    def __init__(self, stages: list[Any], config: ATEDM) -> None:
        self.config = config
        for blocks in stages:
            state: dict[str, Any] = {}
            self.read(blocks[0].attn1, state)
            own = config.after is PruneAfter.SELF_ATTENTION
            layers = [blocks[0].attn2, blocks[0].ff] if own else []
            layers += [layer for b in blocks[1:] for layer in (b.attn1, b.attn2, b.ff)]
            for layer in layers:
                self.wrap(layer, state)

    def read(self, attention: Any, state: dict[str, Any]) -> None:
        forward, c = attention.forward, self.config

        def selecting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            query, key = heads_of(attention, x, "to_q"), heads_of(attention, x, "to_k")
            weights = reference.attention_map(query, key)
            state["chosen"] = []
            for b, score in enumerate(aligned(ranks(query, key, c), c)):
                n = len(score)
                order = sorted(range(n), key=[-own for own in score.tolist()].__getitem__)
                keep = n - int(c.ratio * n + 1e-6)
                similar = weights[b] if c.similarity is Similarity.ATTENTION else reference.cosines(x[b])
                similar = similar.tolist()
                kept = order[:keep]
                source = {t: max(kept, key=lambda k: similar[t][k]) for t in order[keep:]}
                state["chosen"].append((kept, source))
            return forward(x, *args, **kwargs)

        attention.forward = selecting

    def wrap(self, layer: Any, state: dict[str, Any]) -> None:
        forward = layer.forward

        def pruned(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            short = torch.stack([row[kept] for row, (kept, _) in zip(x, state["chosen"], strict=True)])
            each = zip(forward(short, *args, **kwargs), state["chosen"], strict=True)
            return torch.stack([reference.recover(y, *chosen) for y, chosen in each])

        layer.forward = pruned


def slow_unet(model: Any, config: ATEDM, levels: set[int]) -> Any:
    """A copy of the U-Net whose stages at these levels of the down path prune."""
    twin = copy.deepcopy(model)
    last = len(twin.down_blocks) - 1
    places = [twin.down_blocks[level] for level in levels] + [
        twin.up_blocks[last - level] for level in levels
    ]
    if last in levels:
        places.append(twin.mid_block)
    found = [a.transformer_blocks for place in places for a in getattr(place, "attentions", [])]
    stages = [s for s in found if len(s) > 1 or config.after is PruneAfter.SELF_ATTENTION]
    assert stages
    SlowStages(stages, config)
    return twin


@pytest.mark.parametrize(
    ("make", "levels", "width", "fields"),
    [
        (pipelines.sdxl_unet, {1, 2}, 16, {}),
        (pipelines.sdxl_unet, {1, 2}, 24, {"after": "feed_forward", "alignment": "mean"}),
        (pipelines.sdxl_unet, {1}, 16, {"similarity": "features", "max_downsample": 2, "heads": "mean"}),
        (pipelines.unet, {0, 1}, 20, {"alignment": "conditional", "ratio": 0.7, "iterations": 1}),
    ],
)
def test_a_unets_calls_are_those_of_the_definitions(
    make: Any, levels: set[int], width: int, fields: Any
) -> None:
    model, config = make().double(), copying(**fields)
    inputs, twin = (
        guided_inputs(model, 2, pairs=2 if width == 16 else 1, width=width),
        slow_unet(model, config, levels),
    )
    for one, got in zip(inputs, outputs(model, config, inputs), strict=True):
        with torch.no_grad():
            assert_near(got, twin(**one).sample)
            plain = model(**one).sample
        assert not torch.allclose(got, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "levels", "branch", "restored"),
    [
        (pipelines.sdxl_unet, {1, 2}, 2, "up_blocks.1.attentions.0"),
        (partial(pipelines.unet, layers_per_block=2), {0, 1}, 1, "up_blocks.1.attentions.0"),
    ],
)
def test_a_unets_cached_calls_are_those_of_the_definitions(
    make: Any, levels: set[int], branch: int, restored: str
) -> None:
    """The slow ones compute everything, and hand on what the last full call gave where the layers begin."""
    model, config, kept = make().double(), copying(), []
    inputs, twin = guided_inputs(model, 4), slow_unet(model, config, levels)

    def hand_on(module: Any, args: Any, out: Any) -> Any:
        if index % 2 == 0:
            kept[:] = [out]
        return kept[0]

    twin.get_submodule(restored).register_forward_hook(hand_on)
    both = Combined(caching=DeepCache(interval=2, branch=branch), tokens=config)
    only_caching = outputs(model, both.caching, inputs)
    for index, got in enumerate(outputs(model, both, inputs)):
        with torch.no_grad():
            assert_near(got, twin(**inputs[index]).sample)
        assert not torch.allclose(got, only_caching[index], rtol=1e-4, atol=1e-5)


def test_the_first_steps_prune_less() -> None:
    plan = recipe_of(ATEDM(ratio=0.5, early_ratio=0.2)).plan
    for calls, early in ((50, 15), (20, 6), (10, 3), (1, 0)):
        ratios = [step.ratio for step in plan.resample(calls).steps()]
        assert ratios == [0.2] * early + [0.5] * (calls - early)
    reused = [step.ratio for step in recipe_of(reuse(early=0.2)).plan.resample(20).steps()]
    assert reused == [0.0] * 4 + [0.6] * 16
    assert [s.ratio for s in recipe_of(reuse()).plan.resample(4).steps()] == [0, 0, 0.6, 0.6]


def make(kind: str) -> tuple[Any, Any, ATEDM]:
    """A pipeline, how it generates, and the method."""
    if kind == "sdxl":
        pipe = pipelines.make(kind)
        return pipe, lambda **options: pipelines.generate(pipe, kind=kind, **options), copying()
    other = transformer_pipelines.KINDS[kind]()
    return other, lambda **options: generate(other, **options), reuse()


def test_the_report_counts_what_the_calls_compute() -> None:
    """On a U-Net and on a transformer, the attention maps that are looked at counted apart."""
    cases: list[tuple[Any, dict[str, Any], ATEDM]] = []
    unet = pipelines.unet(transformer_layers_per_block=2)
    cases.append((unet, guided_inputs(unet, 1)[0], copying()))
    transformer = transformer_pipelines.pixart(3).transformer
    inputs = {
        "hidden_states": torch.zeros(2, 4, 16, 16),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 5, pipelines.TEXT),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    cases.append((transformer, inputs, reuse()))
    for denoiser, given, config in cases:
        model, counted = meta_copy(denoiser), []
        kwargs = without_data(given)
        with regrow.apply(model, config) as run, run.generation(3) as clock, torch.no_grad():
            for _ in range(3):
                with FlopCounterMode(display=False) as counter:
                    model(**kwargs)
                counted.append(counter.get_total_flops() // 2)
                clock.step()
            calls = run.report().calls
        assert [c.macs + c.selection_macs for c in calls] == counted
        assert calls[2].macs < calls[2].full_macs
        assert calls[2].selection_macs > 0
        whole = config.recovery is Restored.REUSE
        assert [c.selection_macs > 0 for c in calls] == [not whole, not whole, True]


def test_choosing_costs_the_maps_that_are_formed() -> None:
    """DiT-XL/2: a map of 256 x 256 in each of 16 heads, 72 wide, and three products with the scores."""
    result = profile(architecture("dit-xl-256"), reuse(iterations=3), 10)
    assert result.selection_macs == 8 * 16 * 256 * 256 * (72 + 3)


@pytest.mark.parametrize(
    ("arch", "published"),
    [("sd3-1024", {28: 93.48, 50: 143.42}), ("pixart-sigma-1024", {28: 62.08, 50: 92.44})],
)
def test_macs_are_those_of_cat_prunings_comparison(arch: str, published: dict[int, float]) -> None:
    """Both halves of guidance, attention not counted; the text projected in each of eight full calls."""
    what, config = architecture(arch), ATEDM.preset("reuse")
    for steps, macs in published.items():
        result = profile(what, config, steps, attention=False, guided=True, text_once=False)
        assert [kind.count for kind in result.kinds] == [8, steps - 8]
        assert result.macs / 1e12 == pytest.approx(macs, rel=3e-3)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_an_attention_that_cant_be_seen_is_said_and_nothing_is_left_out(kind: str) -> None:
    pipe, picture, config = make(kind)
    plain = picture()
    with regrow.apply(pipe, config) as run:
        (pipe.unet if kind == "sdxl" else pipe.transformer).fuse_qkv_projections()
        with pytest.warns(UserWarning, match="projections were fused"):
            out = picture()
    torch.testing.assert_close(out, plain, rtol=1e-3, atol=1e-3)
    assert {c.ratio for c in rows_of(run)} == {0}


def test_fused_projections_are_refused() -> None:
    pipe = transformer_pipelines.sd3()
    pipe.transformer.transformer_blocks[0].attn.fuse_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        regrow.apply(pipe, reuse())


def test_what_a_model_can_not_is_refused() -> None:
    unet, dit = pipelines.unet(), transformer_pipelines.dit(num_layers=9).transformer
    with pytest.raises(regrow.UnsupportedModelError, match="recovery: AT-EDM's copy works on U-Nets"):
        regrow.apply(dit, ATEDM())
    with pytest.raises(regrow.UnsupportedModelError, match="recovery: AT-EDM's copy works on U-Nets"):
        regrow.apply(unet, reuse())
    with pytest.raises(ValueError, match="block: 8 is not allowed, it must be < 8"):
        regrow.apply(dit, reuse(block=8))
    with pytest.raises(
        ValueError, match="block: 2 is not allowed with cached calls of depth 3, it must be < 2"
    ):
        regrow.apply(dit, Combined(caching=DeepCache(branch=2), tokens=reuse(block=2)))
    assert not dit._forward_pre_hooks
    with pytest.raises(ValueError, match="after: feed_forward is not allowed on UNet2DConditionModel"):
        regrow.apply(unet, ATEDM.preset("paper"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ratio": 1}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"early": -0.1}, "early"),
        ({"early": 1.5}, "early: 1.5 is not allowed, it must be a share or a number of calls"),
        ({"early_ratio": 0.7}, "early_ratio: 0.7 is not allowed"),
        ({"iterations": 0}, "iterations"),
        ({"heads": "max"}, "heads"),
        ({"recovery": "merge"}, "recovery"),
        ({"after": "norm1"}, "after"),
        ({"max_downsample": 3}, "max_downsample"),
        ({"block": -1}, "block"),
        ({"block": 1}, "block: 1 is not allowed with recovery=copy"),
        ({"recovery": "reuse", "similarity": "features"}, "similarity: .* with recovery=reuse"),
        ({"recovery": "reuse", "after": "feed_forward"}, "after: .* with recovery=reuse"),
        (
            {"recovery": "reuse", "max_downsample": 1},
            "max_downsample: 1 is not allowed with recovery=reuse",
        ),
        ({"fresh": 0.1}, "fresh"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ATEDM(**fields)


def test_configurations_by_name_and_as_json() -> None:
    assert variant("atedm:.3", 50).config == ATEDM(ratio=0.3)
    assert variant("atedm:reuse:ratio=0.5", 50).config == ATEDM(ratio=0.5, early=8, recovery=Restored.REUSE)
    steps = recipe_of(variant("atedm:reuse:early=0.2", 50).config).plan.resample(50).steps()
    assert [step.ratio for step in steps].count(0.0) == 10
    assert variant("atedm:paper", 50).config == ATEDM(after=PruneAfter.FEED_FORWARD)
    config = reuse(block=2, alignment="mean")
    assert ATEDM.model_validate_json(config.model_dump_json()) == config
    assert hash(ATEDM.preset("reuse")) == hash(ATEDM.preset("reuse"))


@pytest.mark.parametrize(("layer", "third"), [(0, [0, 0, 0, 0]), (3, [0, 0, 0.6, 0.6])])
def test_a_call_that_leaves_out_the_block_to_read_computes_all_tokens(
    layer: int, third: list[float]
) -> None:
    """SD3's skip-layer guidance makes a third call, without a layer."""
    pipe = transformer_pipelines.sd3()
    with regrow.apply(pipe, reuse()) as run:
        images = generate(
            pipe,
            guidance_scale=4.0,
            skip_guidance_layers=[layer],
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )
    assert images.isfinite().all()
    ratios = [[c.ratio for c in rows_of(run) if c.branch == branch] for branch in (0, 1)]
    assert ratios == [[0, 0, 0.6, 0.6, 0.6], third]


def test_tokens_are_chosen_in_half_precision_too() -> None:
    model = pipelines.sdxl_unet()
    inputs = guided_inputs(model, 1)
    half = {
        k: v.bfloat16() if k in ("sample", "encoder_hidden_states") else v for k, v in inputs[0].items()
    }
    half["added_cond_kwargs"] = {k: v.bfloat16() for k, v in half["added_cond_kwargs"].items()}
    expected = outputs(model, copying(similarity=Similarity.FEATURES), inputs)[0]
    got = outputs(model.bfloat16(), copying(similarity=Similarity.FEATURES), [half])[0]
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).norm() / expected.norm()) < 0.2


@pytest.mark.filterwarnings("ignore:.*forward methods:UserWarning")
def test_perturbed_attention_guidance_is_said_and_its_block_computes_all_tokens() -> None:
    """Its processor projects the perturbed third of the batch for itself."""
    pipe = StableDiffusionPAGPipeline(**pipelines.sd().components, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 2 * pipelines.SIZE, "width": 2 * pipelines.SIZE, "num_inference_steps": 3}
    with (
        regrow.apply(pipe, copying(early=0)),
        pytest.warns(UserWarning, match="perturbed-attention guidance"),
    ):
        made = pipe("a penguin", pag_scale=3.0, output_type="latent", **size).images
    assert made.isfinite().all()


def test_an_embedding_wrapped_after_apply_is_as_before() -> None:
    pipe = transformer_pipelines.sd3()
    embed = pipe.transformer.pos_embed
    config = regrow.CATPruning(alpha=0.25, t0=2)
    with regrow.apply(pipe, config):
        expected = generate(pipe)
    with regrow.apply(pipe, config):
        embed.forward = type(embed).forward.__get__(embed)
        assert torch.equal(generate(pipe), expected)
    assert embed.__dict__.pop("forward").__func__ is type(embed).forward
