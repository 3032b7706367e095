"""``regrow calibrate``, as a user types it, on a small pipeline in a folder."""

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
from PIL import Image

from regrow.lab.calibration.calibrate import Calibration, Costs
from regrow.lab.cli import main
from regrow.methods.calibrated import Calibrated
from regrow.methods.catalogue import load_plan

STEPS = 8


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["regrow", *words])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("model")
    pipelines.sd(pipelines.one_level_unet()).save_pretrained(folder)
    return folder


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> tuple[str, ...]:
    """A short calibration."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a penguin\na pizza\nan owl\na cat\n")
    common = ("--model", str(model), "--prompts", str(prompts), "--guidance", "5", "--steps", str(STEPS))
    size = ("--height", "32", "--width", "32", "--device", "cpu", "--batch", "2")
    return ("calibrate", *common, *size, "--out", str(tmp_path / "out"))


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls cost the same, on any machine."""

    def speedup(self: Calibration, config: Calibrated) -> float:
        steps = config.schedule.resample(config.steps).steps()
        return STEPS / sum(step.full for step in steps)

    monkeypatch.setattr(Calibration, "timed", lambda self: Costs(0.0, 0.0, None))
    monkeypatch.setattr(Calibration, "speedup", speedup)


def test_it_leaves_a_plan_and_pictures(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    asked: tuple[str, ...],
    alike: None,
) -> None:
    assert run(monkeypatch, *asked, "--speedup", "2") == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    plan: Any = load_plan(out / "plan.json")
    assert (plan.instead_of, plan.speedup) == (STEPS, 2)
    assert f"the plan: {plan.tried[0].name}" in said.replace("\n", " ")
    assert f"{STEPS // 2} steps" in said
    assert Image.open(out / "compare.png").size[0] > 2 * 32
    command = said.split("next: ")[1]
    assert f"--method {out / 'plan.json'}" in command
    picture = tmp_path / "picture.png"
    words = ("generate", "--method", str(out / "plan.json"), "--prompt", "a", "--out", str(picture))
    assert (
        run(monkeypatch, *words, "--model", asked[2], "--height", "32", "--width", "32", "--compare") == 0
    )
    made = json.loads(picture.with_suffix(".json").read_text())
    assert made["steps"] == plan.steps
    assert made["config"]["method"] == "calibrated"


def test_as_json_and_by_macs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *asked, "--fewer-macs", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert all(Path(file).is_file() for file in result["files"])
    near = [one["psnr"] for one in result["tried"] if one["prompts"] == 2]
    fewer = [one for one in result["tried"] if one["name"].startswith(f"{STEPS // 2} steps")]
    assert fewer
    assert result["tried"][0]["psnr"] >= max(one["psnr"] for one in fewer)
    assert near


def test_what_was_recorded_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    asked: tuple[str, ...],
    alike: None,
) -> None:
    def stop(self: Calibration, *_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Calibration, "measure", stop)
        assert run(patched, *asked, "--speedup", "2") == 130
    assert "the same command" in capsys.readouterr().err
    kept = (tmp_path / "out" / "recording.json").read_text()
    monkeypatch.setattr(
        "regrow.lab.calibration.recording.watched", lambda *_: pytest.fail("recorded again")
    )
    assert run(monkeypatch, *asked, "--speedup", "2") == 0
    assert (tmp_path / "out" / "recording.json").read_text() == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "speedup, fewer_macs, psnr: one of them must be given"),
        (("--speedup", "2", "--fewer-macs", "2"), "only one"),
        (("--speedup", "1"), "speedup: 1.0 is not allowed, it must be > 1"),
        (("--speedup", "nan"), "speedup: nan is not allowed"),
        (("--psnr", "-3"), "psnr: -3.0 is not allowed"),
    ],
)
def test_wishes_are_checked_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: tuple[str, ...],
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr("regrow.lab.cli.models._load", lambda *_: pytest.fail("loaded"))
    assert run(monkeypatch, *asked, *words) == 2
    assert said in capsys.readouterr().err
