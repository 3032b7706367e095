"""The parts of training: Muon, the learning rate, logs; and a clock that kills."""

import itertools
from pathlib import Path

import torch
from training import Muon, build_scheduler, decay, orthogonalised, read_log


class Killed(BaseException):
    """Stands for kill -9: nothing in the script may catch it."""


def ticking(until: int | None = None):
    """A clock of one second a step that kills the run at its `until`-th reading."""
    count = itertools.count()

    def read() -> float:
        now = next(count)
        if until is not None and now >= until:
            raise Killed
        return float(now)

    return read


def test_orthogonalised_update_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(16, 48), (48, 16)]:
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_reduces_a_quadratic():
    target = torch.eye(8)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def test_learning_rate_falls_after_a_fifth():
    assert [decay(f) for f in (0, 0.19, 0.6, 1)] == [1, 1, 0.5, 0.02]


def test_log_cut_short_by_a_kill_is_still_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(log) == [{"step": 1}, {"step": 2}]


def test_noise_levels_end_in_pure_noise() -> None:
    assert build_scheduler().alphas_cumprod[-1] == 0
