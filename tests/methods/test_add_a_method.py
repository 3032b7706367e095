"""The page on adding a method: its files work as they stand, and do what the page says of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pipelines
import pytest
import torch
from rows import rows_of

import regrow
from regrow.core.recipe import CallInfo, recipe_of
from regrow.core.store import Store
from regrow.recover.time import Reuse, Taylor, recovery_from
from regrow.tokens.grid import Grid

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
SELECTION, APPLIED, START, RECOVERY, FORECAST = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def module_of(code: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of the page as a module, imported; what it registers is forgotten after the test."""
    monkeypatch.setattr("regrow.methods.base._METHODS", dict(regrow.methods.base._METHODS))
    monkeypatch.setattr("regrow.recover.time._KINDS", dict(regrow.recover.time._KINDS))
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(compile(code, "add-a-method.md", "exec"), module.__dict__)
    return module


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module_of(SELECTION, monkeypatch)


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module_of(RECOVERY, monkeypatch)


def test_each_is_short() -> None:
    for code in (SELECTION, RECOVERY):
        assert len([line for line in code.splitlines() if line.strip()]) <= 45


def test_the_selection_prunes_tokens(selection: Any) -> None:
    pipe = pipelines.sd()
    plain = pipelines.generate(pipe)
    names: dict[str, Any] = {"pipe": pipe, "regrow": regrow}
    exec(compile(APPLIED, "add-a-method.md", "exec"), names)
    run = names["run"]
    assert run.config == selection.Detail(ratio=0.5)
    pruned = pipelines.generate(pipe)
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, plain)
    report = run.report()
    assert {call.ratio for call in report.calls} == {0.5}
    assert report.macs < report.full_macs
    run.remove()
    with pytest.warns(UserWarning, match="prunes nothing"), regrow.apply(pipe, "detail:0"):
        assert torch.equal(pipelines.generate(pipe), plain)
    with regrow.apply(pipe, "deepcache:2+detail:0.5") as run:
        pipelines.generate(pipe)
    assert [call.depth for call in rows_of(run)][:2] == ["full", "1"]


def test_the_selection_keeps_in_each_patch_what_differs_most(selection: Any) -> None:
    torch.manual_seed(0)
    x, grid = torch.randn(2, 4 * 6, 5), Grid(4, 6)
    call = CallInfo(batch=2, guided=False, outputs=(), generator=torch.Generator())
    chosen = recipe_of(selection.Detail()).sites.select(x, grid, 12, None, call)
    assert chosen.kept.shape == (2, 12)
    for sample, kept in zip(x, chosen.kept, strict=True):
        difference = [float(((token - sample.mean(0)) ** 2).sum()) for token in sample]
        for row in range(0, 4, 2):
            for column in range(0, 6, 2):
                patch = [(row + i) * 6 + column + j for i in (0, 1) for j in (0, 1)]
                assert max(patch, key=difference.__getitem__) in kept.tolist()


@pytest.mark.usefixtures("selection")
def test_the_file_brings_the_method_to_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mine.py", "methods", "detail"])
    with pytest.raises(SystemExit) as ended:
        exec(compile(START, "add-a-method.md", "exec"), {"__name__": "__main__"})
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "detail: Detail, works" in said
    assert "ratio (default 0.5)" in said


@pytest.mark.parametrize("times", [(0, 3), (0, 1, 5), (2, 4, 5, 9)])
def test_the_recovery_goes_a_part_of_the_way(recovery: Any, times: tuple[int, ...]) -> None:
    damped = recovery_from({"kind": "damped", "part": 0.25})
    assert damped == recovery.Damped(part=0.25)
    store = Store([damped], 12)
    for time in times:
        store.begin(time)
        store.add("site", torch.full((2, 3), 2.0 + 3.0 * time))
        store.end()
    for t in (10, 11):
        expected = 2.0 + 3.0 * times[-1] + 0.25 * 3.0 * (t - times[-1])
        assert store.at("site", t, damped)[0, 0] == pytest.approx(expected)
        assert sum(damped.weights(times, t, 12)) == pytest.approx(1)
        assert recovery.Damped(part=1).weights(times, t, 12) == pytest.approx(
            Taylor(order=1).weights(times, t, 12)
        )
    assert recovery.Damped().weights((0,), 1, 12) == Reuse().weights((0,), 1, 12)


def test_the_recovery_is_what_cached_calls_take(recovery: Any) -> None:
    pipe = pipelines.sd()

    def made(forecast: Any) -> torch.Tensor:
        config = regrow.DeepCache.model_validate({"interval": 3, "recovery": forecast})
        with regrow.apply(pipe, config):
            return pipelines.generate(pipe, num_inference_steps=8)

    names: dict[str, Any] = {"pipe": pipe, "regrow": regrow, "Damped": recovery.Damped}
    exec(compile(FORECAST, "add-a-method.md", "exec"), names)
    some = pipelines.generate(pipe, num_inference_steps=8)
    names["run"].remove()
    assert torch.equal(made(recovery.Damped(part=0.3)), some)
    assert torch.allclose(made(recovery.Damped(part=0)), made("reuse"))
    assert torch.allclose(made(recovery.Damped(part=1)), made("taylor1"), atol=1e-5)
    assert not torch.allclose(some, made("reuse"), atol=1e-3)
    assert not torch.allclose(some, made("taylor1"), atol=1e-3)
