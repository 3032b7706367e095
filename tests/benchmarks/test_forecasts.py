"""The benchmark of forecasts on a small pipeline, and its arithmetic."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import forecasts
import numpy as np
import pytest
from forecasts import Case, computed_calls, gain, rows_of, table
from transformer_pipelines import dit

from regrow.calibration.calibrate import Costs
from regrow.methods.calibrated import Calibrated
from regrow.schedule import FULL, Schedule

STEPS = 6


def plan(*depth: int) -> Calibrated:
    schedule = Schedule(depth=depth, ratio=(0.0,) * len(depth))
    return Calibrated(steps=len(depth), schedule=schedule, instead_of=STEPS)


def test_computed_calls() -> None:
    assert computed_calls(plan(FULL, 0, FULL, 0, 0, 0)) == 2
    assert computed_calls(Calibrated(steps=3, schedule=Schedule.constant(), instead_of=STEPS)) == 3


def test_rivals_have_as_many_calls() -> None:
    case = Case(None, STEPS, (2.0, 3.0))
    rows = list(
        rows_of("cifar10", case, {2.0: plan(FULL, 1, 1, 1, 1, FULL), 3.0: plan(FULL, 0, 0, FULL, 0, 0)})
    )
    assert [(row.name, row.variant.steps) for row in rows[:8]] == [
        ("calibrated 2x", 6),
        ("3 steps", 3),
        ("DPM++ 2M, 3 steps", 3),
        ("UniPC, 3 steps", 3),
        ("calibrated 3x", 6),
        ("2 steps", 2),
        ("DPM++ 2M, 2 steps", 2),
        ("UniPC, 2 steps", 2),
    ]
    assert [row.name for row in rows[8:]] == list(forecasts.PUBLISHED["cifar10"])
    own = list(rows_of("cifar10", Case(forecasts.DPM, 25, (2.0,)), {2.0: plan(FULL, 0)}))
    assert [row.name for row in own] == ["calibrated 2x", "12 steps", "UniPC, 12 steps"]


def test_gain() -> None:
    mean, error = gain((3.0, 5.0, 7.0), (2.0, 2.0, 2.0))
    assert mean == pytest.approx(3)
    assert error == pytest.approx(np.std([1, 3, 5], ddof=1) / math.sqrt(3))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model instead of the bundled one, and few runs."""
    monkeypatch.setattr(forecasts.zoo, "load", lambda name: dit())
    monkeypatch.setattr(forecasts.zoo, "prompts_of", lambda model, count, instead: ("0", "1", "2") * count)
    monkeypatch.setattr(forecasts, "FITTED", 4)
    monkeypatch.setattr(forecasts, "CASES", {"cifar10": (Case(None, STEPS, (2.0,)),)})
    monkeypatch.setattr(forecasts, "PUBLISHED", {"cifar10": ("fora:2",)})


def test_it_goes_on_and_tells_what_it_measured(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["forecasts.py", "--model", "cifar10", "--pictures", "2", "--batch", "2"]
    words += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    monkeypatch.setattr(forecasts, "Calibration", _of_few_runs)
    monkeypatch.setattr(sys, "argv", words)
    forecasts.main()
    first = json.loads((tmp_path / "forecasts-cifar10.json").read_text())
    rows = first["cases"][0]["rows"]
    assert rows[0]["name"] == "calibrated 2x"
    assert rows[-1]["name"] == "fora:2"
    # Pictures beside themselves.
    pipe = forecasts.Bench("cifar10", Case(None, STEPS, (2.0,)), 2, 2, tmp_path / "work" / "own-6")
    made = pipe.run(pipe.base, pipe.pipeline(None), 0)[0]
    assert np.array_equal(made, pipe.base_pictures()[:2])
    monkeypatch.setattr(forecasts.Bench, "run", None)
    forecasts.main()
    assert json.loads((tmp_path / "forecasts-cifar10.json").read_text()) == first
    assert "| 2x | calibrated 2x |" in capsys.readouterr().out


def _of_few_runs(*args: Any) -> Any:
    """A calibration in which calls cost nothing but the full ones, and plans are as fast as wished."""

    class Fast(_CALIBRATION):
        def timed(self) -> Costs:
            return Costs(0.0, 0.0, None)

        def speedup(self, config: Calibrated, rounds: int = 3) -> float:
            return 2.0

    return Fast(*args)


_CALIBRATION = forecasts.Calibration


def test_a_table_compares_with_the_plan_of_the_same_wish() -> None:
    rows = [
        {"name": "calibrated 2x", "wish": 2.0, "speedup": 2.1, "psnr": [30.0, 34.0]},
        {"name": "3 steps", "wish": 2.0, "speedup": 2.0, "psnr": [29.0, 31.0]},
        {"name": "fora:2", "wish": None, "speedup": 1.7, "psnr": [20.0, 21.0]},
    ]
    lines = table({"name": "own-6", "rows": rows})
    assert "| 2x | calibrated 2x | 2.10x | 32.00 |  |" in lines
    assert "| 2x | 3 steps | 2.00x | 30.00 | +2.00 ± 1.00 |" in lines
    assert "|  | fora:2 | 1.70x | 20.50 |  |" in lines
