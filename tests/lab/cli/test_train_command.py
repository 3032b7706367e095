"""``regrow train``: its commands from options to files, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformer_pipelines
from PIL import Image

from regrow.lab import cli
from regrow.lab.measure.videos import save_clip

FEW = ("--pictures", "2", "--picture-steps", "1", "--batch", "1", "--steps", "1", "--sampler-steps", "2")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["regrow", "train", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_a_router_is_trained_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("router", *FEW, "--device", "cpu", "--out", str(tmp_path / "r"))
    assert run(monkeypatch, *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 1
    assert [Path(file).name for file in told["files"]] == ["router.safetensors", "loss.json", "loss.png"]
    assert all(Path(file).exists() for file in told["files"])
    # It is done: the same command only tells it again.
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "untrained" in said
    assert "--steps 2 --method l2c --router" in said


def test_a_model_of_videos_is_trained_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, videos = tmp_path / "model", tmp_path / "videos" / "a penguin"
    transformer_pipelines.latte_of_texts().save_pretrained(model)
    videos.mkdir(parents=True)
    for name in ("a.gif", "b.gif"):
        save_clip(videos / name, [Image.new("RGB", (16, 16), (80 * i, 9, 9)) for i in range(3)], 8)
    words = ("router", "--model", str(model), "--data", str(videos.parent), *FEW[4:], "--frames", "3")
    assert run(monkeypatch, *words, "--device", "cpu", "--out", str(tmp_path / "r"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert (tmp_path / "r" / "router.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("predictor", "--lr", "-1"), "lr: -1.0 is not allowed, it must be > 0 and <= 1000"),
        (("predictor", "--data", "nowhere"), "--data: nowhere is not allowed, it must be a folder"),
        (("predictor", "--model", "emoji", *FEW), "UNet2D.* is not allowed in training"),
        (("refine", "--precision", "half"), "half"),
        (("router", "--sampler-steps", "1"), "1"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    assert run(monkeypatch, *words, "--device", "cpu", "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("regrow: ")
    assert re.search(said, error), error


@pytest.mark.parametrize("name", ["predictor", "refine", "router"])
def test_help_has_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(monkeypatch, name, "--help") == 0
    assert "Example: regrow train" in " ".join(capsys.readouterr().out.split())
