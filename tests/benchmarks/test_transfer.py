"""The transfer table goes on where it was killed, and compares groups by one reference point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transfer import PLACES, done_before, summary


def test_what_was_done_is_known_by_setting_and_by_what_the_plan_is(tmp_path: Path) -> None:
    log = tmp_path / "rows.jsonl"
    assert done_before(log) == {}
    rows = [{"setting": "Euler", "plan": "searched a", "key": key, "macs": 0.5} for key in ("x", "y")]
    log.write_text("\n".join(["", *map(json.dumps, rows), '{"setting": "Eu']))
    assert done_before(log) == {("Euler", "x"): rows[0], ("Euler", "y"): rows[1]}


def test_hypervolumes_are_shares_up_to_the_worst_of_the_setting() -> None:
    points = {"searched a": (0.1, 0.5), "deepcache 2": (0.2, 0.25), "steps 25": (0.4, 1.0)}
    rows = [{"plan": name, "deviation": d, "macs": m} for name, (d, m) in points.items()]
    one = summary(PLACES[0], rows)
    assert one["hypervolume"] == {
        "searched": pytest.approx(0.3 * 0.5 / 0.4),
        "deepcache": pytest.approx(0.2 * 0.75 / 0.4),
        "steps": pytest.approx(0.0),
    }
