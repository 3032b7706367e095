"""The papers' MAC figures, from the real configurations."""

import pytest

from regrow.measure import architecture, profile
from regrow.methods import DaTo, SiTo
from regrow.schedule import Schedule


@pytest.mark.parametrize(("arch", "gmacs"), [("sd15", 401.64), ("sd2", 402.13), ("sdxl", 3380.6)])
def test_a_full_call_costs_what_the_papers_say(arch: str, gmacs: float) -> None:
    result = profile(architecture(arch), None, 1)
    assert result.baseline_macs_per_call / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert result.macs_ratio == 1


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
    with pytest.raises(ValueError, match="arch: 'sd9' is not known; known are sd15, sd2, sdxl, emoji"):
        architecture("sd9")


def test_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="steps: 0"):
        profile(architecture("emoji"), DaTo(schedule=Schedule.constant(0.5)), 0)
