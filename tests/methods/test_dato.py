"""DaTo's calls against a U-Net pruned by the reference, and its configuration."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pipelines
import pytest
import reference
import torch
import transformer_pipelines
from rows import rows_of
from torch import Tensor
from whole_unet import assert_near, guided_inputs, outputs, with_reference

import regrow
from regrow import FULL, Alignment, DaTo, Features, Recovery, Schedule
from regrow.core.recipe import CallInfo, recipe_of
from regrow.methods.dato import Score
from regrow.tokens.grid import Grid, patch_of_token


def plan(ratio: float, *depths: int) -> Schedule:
    return Schedule(depth=depths, ratio=(ratio,) * len(depths))


class Base:
    """Base tokens from the two outputs before, the same for every layer of a grid."""

    def __init__(self, last: Tensor, before: Tensor, *, side: int = 2, align: str) -> None:
        self.last, self.before, self.side, self.align = last, before, side, align

    def __call__(self, x: Tensor, height: int, width: int) -> list[list[int]]:
        scores = [
            reference.diff_score(a, b, height, width) for a, b in zip(self.last, self.before, strict=True)
        ]
        scores = reference.aligned(scores, self.align)
        return [reference.base_tokens(s, height, width, self.side) for s in scores]


four_levels = partial(pipelines.sd1_unet, layers_per_block=1)


def check(
    ratio: float = 0.5,
    *,
    unet: Any = pipelines.unet,
    size: tuple[int, int] = (16, 16),
    pairs: int = 1,
    guided: bool = True,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """The third call, the first with a DiffScore, is the reference's."""
    model = unet().double()
    inputs = guided_inputs(model, 3, pairs=pairs, height=size[0], width=size[1])
    if not guided:
        for one in inputs:
            one["sample"] = torch.randn_like(one["sample"])
    dato = DaTo(schedule=plan(ratio, FULL, FULL, FULL), **(config or {}))
    before, last, third = outputs(model, dato, inputs)
    align = dato.alignment.value if guided else "off"
    base = Base(last, before, side=dato.patch, align=align)
    assert_near(third, with_reference(model, inputs[2], base, ratio, side=dato.patch, **options))
    with torch.no_grad():
        assert not torch.allclose(third, model(**inputs[2]).sample, rtol=1e-3)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.75])
def test_the_third_call_is_the_references_at_every_ratio(ratio: float) -> None:
    check(ratio)


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("alignment", Alignment)
def test_guided_halves_are_aligned_as_asked(alignment: Alignment, pairs: int) -> None:
    check(0.7, pairs=pairs, config={"alignment": alignment})


@pytest.mark.parametrize("alignment", Alignment)
def test_a_batch_of_different_latents_is_not_aligned(alignment: Alignment) -> None:
    check(0.7, guided=False, config={"alignment": alignment})


@pytest.mark.parametrize("size", [(16, 24), (15, 13)])
@pytest.mark.parametrize("patch", [2, 3])
def test_the_third_call_is_the_references_on_every_grid(size: tuple[int, int], patch: int) -> None:
    check(0.6, size=size, config={"patch": patch})


def test_merging_computes_means() -> None:
    check(config={"recovery": Recovery.MEAN}, means=True)


def test_features_may_be_those_after_the_norm() -> None:
    check(config={"features": Features.NORM1}, norm1=True)


def test_base_tokens_may_be_sought_nearby_only() -> None:
    check(config={"nearby": True}, nearby=True)


def test_pruned_tokens_may_copy_from_all_kept_tokens() -> None:
    check(0.3, config={"from_all_kept": True}, from_all_kept=True)


@pytest.mark.parametrize("size", [(16, 16), (15, 19)], ids=["even", "odd"])
def test_coarser_levels_take_the_mean_difference_of_their_area(size: tuple[int, int]) -> None:
    check(size=size, unet=four_levels, config={"max_downsample": 2}, levels=(0, 1))


def test_sdxl_prunes_at_its_finest_level_with_attention() -> None:
    check(unet=pipelines.sdxl_unet, levels=(1,))


def test_the_score_compares_computed_outputs_and_skips_reused_ones() -> None:
    """Calls of depth 0 compute nothing, so they are no news to the difference of outputs."""
    model = pipelines.unet().double()
    inputs = guided_inputs(model, 5)
    dato = DaTo(schedule=plan(0.5, FULL, FULL, 0, 0, FULL))
    found = outputs(model, dato, inputs)
    base = Base(found[1], found[0], align="conditional")
    assert torch.equal(found[3], found[1])
    assert_near(found[4], with_reference(model, inputs[4], base, 0.5))


def test_cached_calls_prune_and_feed_the_score_too() -> None:
    """After a full call, one of depth 1 and then a full one: the last two outputs are theirs."""
    model = pipelines.unet().double()
    inputs = guided_inputs(model, 3)
    found = outputs(model, DaTo(schedule=plan(0.5, FULL, 1, FULL)), inputs)
    plain = outputs(model, DaTo(schedule=plan(0.0, FULL, 1, FULL)), inputs)
    assert not torch.allclose(found[1], plain[1], rtol=1e-3)
    base = Base(found[1], found[0], align="conditional")
    assert_near(found[2], with_reference(model, inputs[2], base, 0.5))


def test_the_score_compares_the_newest_two_outputs() -> None:
    model = pipelines.unet().double()
    inputs = guided_inputs(model, 4)
    found = outputs(model, DaTo(schedule=plan(0.5, FULL, FULL, FULL, FULL)), inputs)
    base = Base(found[2], found[1], align="conditional")
    assert_near(found[3], with_reference(model, inputs[3], base, 0.5))


def test_outputs_written_to_by_others_do_not_reach_the_score() -> None:
    model = pipelines.unet()
    inputs = guided_inputs(model, 3)
    dato = DaTo(schedule=plan(0.5, FULL, FULL, FULL))
    expected = outputs(model, dato, inputs)[2]
    with regrow.apply(model, dato) as run, run.generation(3) as clock, torch.no_grad():
        for one in inputs:
            output = model(**one).sample
            last = output.clone()
            output.uniform_()
            clock.step()
    assert torch.equal(last, expected)


def bases(
    config: DaTo, grid: Grid, outputs: list[Tensor], *, batch: int = 2, guided: bool, seed: int = 0
) -> Tensor:
    call = CallInfo(batch, guided, tuple(outputs), torch.Generator().manual_seed(seed))
    return recipe_of(config).sites.prepare([grid], call)[grid]


@pytest.mark.parametrize("known", [0, 1])
@pytest.mark.parametrize("alignment", Alignment)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_without_two_outputs_base_tokens_are_random_one_a_patch(
    known: int, alignment: Alignment, guided: bool, size: tuple[int, int]
) -> None:
    config = DaTo(schedule=plan(0.5, FULL), alignment=alignment)
    grid = Grid(*size)
    before = [torch.randn(4, 4, *size)] * known
    drawn = [bases(config, grid, before, batch=4, guided=guided, seed=s) for s in (0, 0, 1)]
    patch = patch_of_token(grid)
    for base in drawn:
        assert torch.equal(patch[base], torch.arange(grid.patches).expand(4, -1))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], drawn[0][:1].expand(4, -1))


def test_random_base_tokens_differ_from_call_to_call_and_by_seed(pipe: Any) -> None:
    def picture(seed: int) -> Tensor:
        config = DaTo(schedule=plan(0.7, FULL), score=Score.RANDOM, seed=seed)
        with regrow.apply(pipe, config):
            first = pipelines.generate(pipe)
            assert torch.equal(pipelines.generate(pipe), first)
        return first

    assert not torch.equal(picture(0), picture(1))


def test_the_same_seed_gives_the_same_picture_and_another_another(pipe: Any) -> None:
    def picture(seed: int) -> Tensor:
        with regrow.apply(pipe, DaTo(schedule=plan(0.7, FULL, 1, 1, FULL), seed=seed)):
            return pipelines.generate(pipe)

    assert torch.equal(picture(0), picture(0))
    assert not torch.equal(picture(0), picture(1))


def test_the_released_codes_sign_flip_turns_the_whole_score() -> None:
    g = torch.Generator().manual_seed(0)
    last, before = torch.randn(2, 2, 4, 8, 8, generator=g)
    config = DaTo(schedule=plan(0.5, FULL), sign_flip=True, alignment=Alignment.OFF)
    scores = [reference.diff_score(a, b, 8, 8) for a, b in zip(last, before, strict=True)]
    upright = [reference.base_tokens(s, 8, 8, 2) for s in scores]
    turned = [reference.base_tokens(-s, 8, 8, 2) for s in scores]
    drawn = [bases(config, Grid(8, 8), [before, last], guided=False, seed=s).tolist() for s in range(30)]
    assert all(d in (upright, turned) for d in drawn)
    assert 5 <= sum(d == upright for d in drawn) <= 25


def test_the_weight_alone_changes_nothing_and_noise_the_choice() -> None:
    g = torch.Generator().manual_seed(0)
    last, before = torch.randn(2, 2, 4, 8, 8, generator=g)
    plain, weighted, noisy = (
        bases(DaTo(schedule=plan(0.5, FULL), **o), Grid(8, 8), [before, last], guided=True)
        for o in ({}, {"score_weight": 0.1}, {"score_weight": 0.1, "score_noise": 0.1})
    )
    assert torch.equal(plain, weighted)
    assert not torch.equal(plain, noisy)


B1 = """1 1 1 1 1 1 1 1 12 1 1 1 1 1 1 1 0 0 12 1 1 1 1 1 1
        0 1 12 0 1 1 12 0 0 1 1 1 1 1 1 1 12 1 1 1 1 1 0 1 1"""
B1_RELEASED = """0 1 1 1 1 1 11 1 1 1 1 1 1 1 0 0 11 1 1 1 0 11 1 0 1
        1 1 1 1 11 0 0 1 1 1 1 1 1 1 1 11 1 1 1 1 1 1 1 1 1"""
FAST = """1 1 1 1 0 1 1 0 1 1 0 1 1 12 1 0 0 0 1 1 0 1 0 12 0
        0 0 0 0 0 1 0 1 0 1 12 0 0 0 0 0 0 1 0 1 12 0 1 0 1"""
B1_RATIOS = """.7 .5 .4 .4 .3 .5 .6 .5 .6 .5 .5 .3 .6 .5 .5 .4 .7 .3 .6 .5 .5 .3 .4 .3 .4
        .3 .6 .5 .6 .3 .6 .6 .3 .3 .5 .7 .6 .5 .6 .5"""


@pytest.mark.parametrize(("name", "printed"), [("b1", B1), ("b1-released", B1_RELEASED), ("fast", FAST)])
def test_presets_are_the_printed_plans(name: str, printed: str) -> None:
    config = DaTo.preset(name)
    expected = [FULL if int(d) > 1 else int(d) for d in printed.split()]
    assert list(config.schedule.depth) == expected
    assert len(config.schedule) == 50
    ratios = [float(r) for r in B1_RATIOS.split()] + [0.5] * 10
    assert list(config.schedule.ratio) == (ratios if name == "b1" else [0.5] * 50)
    assert DaTo.model_validate_json(config.model_dump_json()) == config
    assert hash(DaTo.preset(name)) == hash(config)


@pytest.mark.parametrize(
    ("name", "full", "shallow", "reused"),
    [("b1", 6, 37, 7), ("b1-released", 6, 38, 6), ("fast", 5, 20, 25)],
)
def test_presets_share_of_full_shallow_and_reused_calls(
    name: str, full: int, shallow: int, reused: int
) -> None:
    depth = DaTo.preset(name).schedule.resample(50).depth
    assert [depth.count(d) for d in (FULL, 1, 0)] == [full, shallow, reused]
    assert depth[0] == FULL


def test_the_released_settings_carry_the_released_codes_deviations() -> None:
    config = DaTo.preset("b1-released")
    assert config.alignment is Alignment.UNCONDITIONAL
    assert (config.score_weight, config.score_noise) == (0.1, 0.1)
    assert config.sign_flip
    assert config.from_all_kept


def test_the_papers_settings_are_the_defaults() -> None:
    config = DaTo.preset("b1")
    assert config.alignment is Alignment.CONDITIONAL
    assert (config.patch, config.score_weight, config.score_noise) == (2, 1.0, 0.0)
    assert not config.sign_flip
    assert not config.from_all_kept
    assert config.features is Features.BLOCK_INPUT


@pytest.mark.parametrize(
    ("name", "kind"), zip(DaTo.presets(), itertools.cycle(("sd1", "sd2", "sdxl", "img2img")), strict=False)
)
def test_presets_run_on_pipelines_of_all_kinds(name: str, kind: str) -> None:
    pipe = pipelines.make(kind)
    with regrow.apply(pipe, DaTo.preset(name)):
        assert pipelines.generate(pipe, kind=kind, num_inference_steps=8).isfinite().all()


def test_a_schedule_is_one_for_dato_and_without_ratios_for_any_denoiser() -> None:
    pruning = Schedule.every(3, 6, depth=1, ratio=0.5)
    pipe = pipelines.sd()
    with regrow.apply(pipe, DaTo(schedule=pruning)):
        expected = pipelines.generate(pipe, num_inference_steps=6)
    with regrow.apply(pipe, pruning) as run:
        assert torch.equal(pipelines.generate(pipe, num_inference_steps=6), expected)
    assert run.config == pruning
    dit = transformer_pipelines.dit()
    output_alone = Schedule.every(3, 6, depth=0).with_recovery(regrow.Taylor(order=1))
    with regrow.apply(dit, output_alone) as run:
        transformer_pipelines.generate(dit, num_inference_steps=6)
        assert [call.depth for call in rows_of(run)] == ["full", "0", "0"] * 2
    with pytest.raises(regrow.UnsupportedModelError):
        regrow.apply(dit, pruning)
