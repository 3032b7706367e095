"""The papers' MAC figures, from the real configurations."""

from pathlib import Path

import pipelines
import pytest
import transformer_pipelines

from regrow import FORA, DaTo, SiTo
from regrow.core.inputs import without_data
from regrow.lab.measure.architectures import architecture, architecture_of
from regrow.lab.measure.macs import PlanCounter, profile
from regrow.schedule import FULL, Schedule

PUBLISHED = {
    "sd15": (401.64, 338.61),
    "sd2": (402.13, 339.10),
    "sdxl": (3380.6, 2988.7),
    "dit-xl-256": (118.67, 114.44),
    "dit-xl-512": (524.58, 456.94),
    "pixart-alpha-1024": (3254.8, 2140.7),
    "pixart-sigma-1024": (3316.8, 2155.2),
    "sd3-1024": (4452.2, 3005.9),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_a_full_call_costs_what_the_papers_say(arch: str) -> None:
    whole, without_attention = PUBLISHED[arch]
    model = architecture(arch)
    found = PlanCounter(model.denoiser, model.inputs()).full()
    assert found.denoiser / 1e9 == pytest.approx(whole, rel=1e-3)
    assert (found.denoiser - found.attention) / 1e9 == pytest.approx(without_attention, rel=1e-3)


def test_a_profile_is_of_one_sample_with_attention_unless_said_otherwise() -> None:
    model = architecture("dit-xl-256")
    whole, without_attention = PUBLISHED["dit-xl-256"]
    result = profile(model, None, 1)
    assert result.baseline_macs_per_call / 1e9 == pytest.approx(whole, rel=1e-3)
    assert result.macs_ratio == 1
    less = profile(model, None, 1, attention=False)
    assert less.macs / 1e9 == pytest.approx(without_attention, rel=1e-3)
    assert profile(model, None, 1, guided=True).macs == 2 * result.macs


def test_a_full_call_costs_what_its_blocks_add_up_to() -> None:
    """No paper has these; all else is less than a thousandth."""
    # PixArt: 256 tokens, 1,152 wide; 120 of the text, whose 4,096 channels are projected first.
    tokens, text, width = 256, 120, 1152
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    cross = 2 * (tokens + text) * width**2 + 2 * tokens * text * width
    pixart = 28 * (attention + cross + 8 * tokens * width**2) + text * (4096 + width) * width
    # Flux: 4,096 tokens and 512 of the text, 3,072 wide; double and single blocks cost the same.
    tokens, width = 4096 + 512, 3072
    flux = (19 + 38) * (12 * tokens * width**2 + 2 * tokens**2 * width)
    for arch, macs, blocks in (("pixart-alpha-256", 149.05, pixart), ("flux-1024", 37192, flux)):
        result = profile(architecture(arch), None, 1)
        assert result.baseline_macs_per_call / 1e9 == pytest.approx(macs, rel=1e-3)
        assert result.baseline_macs_per_call == pytest.approx(blocks, rel=1e-3)


def test_fora_computes_next_to_nothing_between_its_full_calls() -> None:
    result = profile(architecture("dit-xl-256"), FORA(interval=3), 50)
    full, cached = (kind.macs for kind in result.kinds)
    assert cached < 0.004 * full
    assert [kind.count for kind in result.kinds] == [17, 33]
    assert [kind.depth for kind in result.kinds] == ["full", "layers"]


@pytest.mark.parametrize(("kind", "text"), [("dit", None), ("pixart", 120), ("sd3", 333), ("flux", 512)])
def test_a_transformers_folder_is_profiled(kind: str, text: int | None, tmp_path: Path) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    pipe.save_pretrained(tmp_path)
    arch = architecture_of(str(tmp_path))
    sides = (None, None) if kind != "flux" else (32, 48)
    arguments = arch.inputs(*sides)[1]
    if text is not None:
        assert arguments["encoder_hidden_states"].shape[1] == text
    result = profile(arch, FORA(interval=2), 4, height=sides[0], width=sides[1])
    # Half of the calls, and the text only once.
    assert 1.9 < result.macs_ratio < 2.5
    assert {kind.depth for kind in result.kinds} == {"full", "layers"}


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 5.61), (0.5, 6.73)])
def test_b1_saves_what_the_paper_computes(ratio: float, expected: float) -> None:
    config = DaTo.preset("b1", schedule=DaTo.preset("b1").schedule.with_ratio(ratio))
    result = profile(architecture("sd15"), config, 50)
    assert result.macs_ratio == pytest.approx(expected, abs=0.02)
    assert (result.calls, len(result.per_call), sum(result.per_call)) == (50, 50, result.macs)


def test_fast_saves_nine_times() -> None:
    assert profile(architecture("sd15"), DaTo.preset("fast"), 50).macs_ratio == pytest.approx(9.0, abs=0.05)


def test_choosing_tokens_is_counted_apart() -> None:
    arch = architecture("emoji")
    result = profile(arch, SiTo.preset("c"), 3)
    # 3 x 1,024 queries' products with 256 bases of 64 channels, in one down and two up blocks.
    blocks = sum(kind.selection_macs for kind in result.kinds)
    pairs = 768 * 256 * 64
    assert blocks >= 3 * pairs
    assert result.macs + result.selection_macs < result.baseline_macs


def test_a_non_square_picture_has_fewer_macs() -> None:
    arch = architecture("sd15")
    wide, square = (profile(arch, None, 1, height=256, width=w).macs for w in (384, 512))
    assert wide < square


@pytest.mark.parametrize("size", [0, -8, 100])
def test_sizes_that_are_no_multiple_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"height: .*multiple of 8"):
        profile(architecture("sd15"), None, 1, height=size)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="arch: 'sd9' is not known; use one of sd15, sd2, sdxl, emoji"):
        architecture("sd9")


def test_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="steps: 0"):
        profile(architecture("emoji"), DaTo(schedule=Schedule.constant(0.5)), 0)


def test_calls_that_compute_no_layer_to_prune_are_shown_with_nothing_pruned() -> None:
    """SDXL's outermost branch has no attention."""
    unet = pipelines.sdxl_unet()
    counter = PlanCounter(unet, without_data(((), pipelines.unet_inputs(unet))))
    plan = [kind for kind, _ in counter.calls(DaTo.preset("b1"), 50)]
    assert {ratio for depth, ratio in plan if depth < FULL} == {0.0}
    assert sum(ratio > 0 for _, ratio in plan) == 6
    deeper = DaTo(schedule=Schedule(depth=(FULL, 4, 4), ratio=(0.5, 0.5, 0.0)))
    assert [kind for kind, _ in counter.calls(deeper, 3)] == [(FULL, 0.5), (4, 0.5), (4, 0.0)]
