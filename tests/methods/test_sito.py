"""SiTo's calls against a U-Net pruned by the reference, and its configuration."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pipelines
import pytest
import reference
import torch
from torch import Tensor
from whole_unet import assert_near, guided_inputs, outputs, with_reference

import regrow
from regrow import Alignment, BaseChoice, Features, Recovery, SiTo
from regrow.core.recipe import CallInfo, recipe_of
from regrow.tokens.grid import Grid

V = BaseChoice.BEST_IN_PATCH


class Base:
    """Base tokens of the choices that need no chance."""

    def __init__(self, choice: BaseChoice, *, side: int = 2, align: str = "off") -> None:
        self.choice, self.side, self.align = choice, side, align

    def __call__(self, x: Tensor, height: int, width: int) -> list[list[int]]:
        patches = reference.patches(height, width, self.side)
        if self.choice is BaseChoice.TOP_LEFT:
            return [[patch[0] for patch in patches]] * len(x)
        scores = reference.aligned([reference.sim_score(s) for s in x], self.align)
        if self.choice is BaseChoice.HIGHEST:
            return [s.argsort(descending=True)[: len(patches)].tolist() for s in scores]
        return [reference.base_tokens(s, height, width, self.side) for s in scores]


def check(
    config: SiTo,
    *,
    unet: Any = pipelines.unet,
    size: tuple[int, int] = (16, 16),
    pairs: int = 1,
    masks: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    model = unet().double()
    (inputs,) = guided_inputs(model, 1, pairs=pairs, height=size[0], width=size[1])
    inputs |= masks or {}
    (got,) = outputs(model, config, [inputs])
    base = Base(config.base, side=config.patch, align=config.alignment.value)
    assert_near(got, with_reference(model, inputs, base, config.ratio, side=config.patch, **options))
    with torch.no_grad():
        assert not torch.allclose(got, model(**inputs).sample, rtol=1e-3)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.75])
def test_a_call_is_the_references_at_every_ratio(ratio: float) -> None:
    check(SiTo(ratio=ratio, base=V))


@pytest.mark.parametrize("size", [(16, 24), (15, 13), (9, 16)])
@pytest.mark.parametrize("patch", [2, 3, 4])
def test_a_call_is_the_references_on_every_grid(size: tuple[int, int], patch: int) -> None:
    check(SiTo(ratio=0.6, base=V, patch=patch), size=size)


@pytest.mark.parametrize("base", [BaseChoice.TOP_LEFT, BaseChoice.HIGHEST, V])
def test_a_call_is_the_references_for_every_choice_without_chance(base: BaseChoice) -> None:
    check(SiTo(ratio=0.5, base=base), pairs=2)


def test_choice_vi_without_noise_is_choice_v() -> None:
    model = pipelines.unet()
    inputs = guided_inputs(model, 1)
    silent = outputs(model, SiTo(ratio=0.5, noise=0.0), inputs)[0]
    assert torch.equal(silent, outputs(model, SiTo(ratio=0.5, base=V), inputs)[0])


@pytest.mark.parametrize("alignment", Alignment)
def test_aligned_halves_share_their_base_scores(alignment: Alignment) -> None:
    check(SiTo(ratio=0.6, base=V, alignment=alignment))


@pytest.mark.parametrize(
    "layers",
    [("attn1",), ("attn2",), ("ff",), ("attn1", "attn2"), ("attn1", "attn2", "ff")],
    ids="+".join,
)
def test_every_layer_prunes_by_its_own_switch(layers: tuple[str, ...]) -> None:
    config = SiTo(
        ratio=0.5,
        base=V,
        self_attention="attn1" in layers,
        cross_attention="attn2" in layers,
        feed_forward="ff" in layers,
    )
    check(config, layers=layers)


@pytest.mark.parametrize("layers", [("attn1",), ("attn1", "attn2")], ids="+".join)
def test_of_a_mask_of_all_tokens_the_kept_ones_parts_are_read(layers: tuple[str, ...]) -> None:
    """Each sample hides other tokens; the mask of the text stays whole."""
    g = torch.Generator().manual_seed(0)
    masks = {
        "attention_mask": (torch.rand(2, 256, generator=g) > 0.4).long(),
        "encoder_attention_mask": (torch.rand(2, 7, generator=g) > 0.4).long(),
    }
    config = SiTo(ratio=0.5, base=V, cross_attention="attn2" in layers)
    # A mask is of one level: the middle has fewer tokens.
    check(config, unet=lambda: pipelines.unet(mid_block_type=None), masks=masks, layers=layers)


def test_merging_computes_means() -> None:
    check(SiTo(ratio=0.5, base=V, recovery=Recovery.MEAN), means=True)


def test_features_may_be_those_after_the_norm() -> None:
    check(SiTo(ratio=0.5, base=V, features=Features.NORM1), norm1=True)


def test_base_tokens_may_be_sought_nearby_only() -> None:
    check(SiTo(ratio=0.5, base=V, nearby=True), nearby=True)


@pytest.mark.parametrize("size", [(16, 16), (15, 19)], ids=["even", "odd"])
@pytest.mark.parametrize(("deepest", "levels"), [("top", (0,)), (1, (0,)), (2, (0, 1)), (4, (0, 1, 2))])
def test_deeper_levels_prune_on_their_own_grids(
    deepest: Any, levels: tuple[int, ...], size: tuple[int, int]
) -> None:
    config = SiTo(ratio=0.5, base=V, max_downsample=deepest)
    unet = partial(pipelines.sd1_unet, layers_per_block=1)
    check(config, unet=unet, size=size, levels=levels)


@pytest.mark.parametrize(("deepest", "levels"), [("top", (1,)), (2, (1,))])
def test_sdxl_prunes_at_its_finest_level_with_attention(deepest: Any, levels: tuple[int, ...]) -> None:
    config = SiTo(ratio=0.5, base=V, max_downsample=deepest)
    check(config, unet=pipelines.sdxl_unet, levels=levels)


def test_pipelines_run_every_switch_at_once(sdxl_pipe: Any) -> None:
    config = SiTo(
        ratio=0.6,
        cross_attention=True,
        feed_forward=True,
        max_downsample=8,
        recovery=Recovery.MEAN,
        features=Features.NORM1,
        alignment=Alignment.MEAN,
    )
    with regrow.apply(sdxl_pipe, config):
        assert pipelines.generate(sdxl_pipe).isfinite().all()


@pytest.mark.parametrize("base", [b for b in BaseChoice if b.value in ("II", "IV", "VI")])
def test_chance_comes_from_the_seed_alone(pipe: Any, base: BaseChoice) -> None:
    def pictures(seed: int) -> Tensor:
        with regrow.apply(pipe, SiTo(ratio=0.7, base=base, seed=seed)):
            first = pipelines.generate(pipe)
            torch.manual_seed(99)
            assert torch.equal(pipelines.generate(pipe), first)
        return first

    assert torch.equal(pictures(0), pictures(0))
    assert not torch.equal(pictures(0), pictures(1))


def test_the_global_random_state_is_left_alone(pipe: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with regrow.apply(pipe, SiTo(ratio=0.7)):
        pipelines.generate(pipe)
    assert torch.equal(torch.rand(3), expected)


def base_tokens(config: SiTo, x: Tensor, grid: Grid, seed: int = 0) -> list[list[int]]:
    """The tokens that stay when every other token goes, in ascending order."""
    rule = recipe_of(config).sites
    call = CallInfo(len(x), False, (), torch.Generator().manual_seed(seed))
    prepared = rule.prepare([grid], call).get(grid)
    kept = rule.select(x, grid, grid.tokens - grid.patches, prepared, call).kept
    return kept.sort(dim=1).values.tolist()


@pytest.mark.parametrize("base", BaseChoice)
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_every_choice_gives_as_many_different_base_tokens_as_patches(
    base: BaseChoice, size: tuple[int, int]
) -> None:
    x = torch.randn(3, size[0] * size[1], 6, generator=torch.Generator().manual_seed(0))
    for row in base_tokens(SiTo(ratio=0.5, base=base), x, Grid(*size)):
        assert len(set(row)) == math.ceil(size[0] / 2) * math.ceil(size[1] / 2)
        if base not in (BaseChoice.RANDOM, BaseChoice.HIGHEST):
            for patch in reference.patches(*size, 2):
                assert len(set(row) & set(patch)) == 1


def test_every_place_of_a_patch_is_chosen_equally_often_at_random() -> None:
    grid, x = Grid(40, 40), torch.ones(1, 1600, 2)
    config = SiTo(ratio=0.5, base=BaseChoice.RANDOM_IN_PATCH)
    chosen = torch.tensor(base_tokens(config, x, grid)[0])
    place = chosen // 40 % 2 * 2 + chosen % 2
    for share in place.bincount(minlength=4) / 400:
        assert abs(float(share) - 0.25) < 0.08


def test_noise_changes_close_races_only() -> None:
    """Scores that differ by far more than sigma keep their order, equal ones don't."""
    grid = Grid(8, 8)
    x = torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(0))
    silent = base_tokens(SiTo(ratio=0.5, base=V), x, grid)
    for seed in range(5):
        assert base_tokens(SiTo(ratio=0.5, noise=1e-6), x, grid, seed) == silent
    same = torch.ones(1, 64, 6)
    first, second = (base_tokens(SiTo(ratio=0.5), same, grid, seed) for seed in range(2))
    assert first != second


@pytest.mark.parametrize(("name", "ratio"), [("a", 0.3), ("b", 0.4), ("c", 0.5), ("d", 0.6), ("e", 0.7)])
def test_presets_are_the_papers_settings(name: str, ratio: float) -> None:
    config = SiTo.preset(name)
    assert config == SiTo(ratio=ratio)
    assert (config.base.value, config.noise, config.patch) == ("VI", 0.1, 2)
    assert SiTo.presets() == ("a", "b", "c", "d", "e")


def test_presets_take_changes_and_check_them() -> None:
    assert SiTo.preset("a", seed=3) == SiTo(ratio=0.3, seed=3)
    with pytest.raises(ValueError, match="ratio"):
        SiTo.preset("a", ratio=2.0)


def test_configurations_are_values() -> None:
    config = SiTo(ratio=0.5, base=V, max_downsample=2)
    again = SiTo.model_validate_json(config.model_dump_json())
    assert again == config
    assert hash(again) == hash(config)
    assert config != SiTo(ratio=0.6, base=V, max_downsample=2)
    with pytest.raises(ValueError, match="frozen"):
        config.ratio = 0.1
