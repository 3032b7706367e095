"""Training on moving emoji: clips, resuming, and a folder that LattePipeline and the command open."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import train_video
from diffusers import LattePipeline
from emoji_scenes import Sprites
from PIL import Image
from safetensors.torch import load_file
from test_training import Killed, ticking
from train_video import CLASSES, FASTEST, SIDE, Recipe, clip, draw, fold

from regrow.lab.cli import main
from regrow.lab.measure.sampling import make

TINY = Recipe(batch=2, frames=3, patch=8, pairs=2, heads=1, head_size=32)


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    """An opaque square of a colour of its own for every class."""
    colours = torch.randint(256, (len(CLASSES), 4, 1, 1), generator=torch.Generator().manual_seed(0))
    colours[:, 3] = 255
    return colours.to(torch.uint8).expand(-1, -1, SIDE, SIDE).contiguous()


def train(
    sprites: torch.Tensor, out: Path, export_to: Path | None = None, until: int | None = None
) -> dict:
    """The state after four steps."""
    train_video.run(
        sprites, out, 4 / 60, TINY, export_to, torch.device("cpu"), ticking(until), checkpoint_seconds=2
    )
    index = json.loads((out / "denoiser.json").read_text())
    assert (index["step"], index["done"]) == (4, True)
    return load_file(out / index["tensors"])


@pytest.fixture(scope="module")
def model(sprites: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline trained for four steps."""
    folder = tmp_path_factory.mktemp("trained")
    train(sprites, folder / "work", folder / "model")
    return folder / "model"


def test_borders_send_back() -> None:
    assert [fold(way, 1.0) for way in (0.25, 1.25, 2.25, -0.25)] == [0.25, 0.75, 0.25, 0.25]


def test_an_object_moves_evenly_inside_the_picture() -> None:
    for seed in range(40):
        index, scenes = clip(seed, 8)
        assert {scene.placed[0].index for scene in scenes} == {index}
        assert len({scene.ends for scene in scenes}) == 1
        places = [(s.placed[0].x, s.placed[0].y) for s in scenes]
        reach = scenes[0].placed[0].size / 2 - 0.04
        assert all(reach - 1e-9 <= p <= 1 - reach + 1e-9 for place in places for p in place)
        steps = [abs(b - a) for one, two in pairwise(places) for a, b in zip(one, two, strict=True)]
        assert 0 < max(steps) <= FASTEST + 1e-9
    assert clip(3, 8)[1][:4] == clip(3, 4)[1]


def test_drawn_videos_show_their_class(sprites: torch.Tensor) -> None:
    labels, videos = draw(Sprites(sprites), 3, 4, torch.Generator().manual_seed(1))
    assert videos.shape == (3, 3, 4, SIDE, SIDE)
    for label, video in zip(labels, videos, strict=True):
        colour = sprites[label, :3, 0, 0].float() / 127.5 - 1
        same = (video - colour.view(3, 1, 1, 1)).abs().amax(0) < 1e-3
        assert same.flatten(1).any(1).all()
        assert not torch.equal(video[:, 0], video[:, 3])


def test_killed_and_resumed_equals_straight(sprites: torch.Tensor, tmp_path: Path) -> None:
    straight = train(sprites, tmp_path / "straight")
    with pytest.raises(Killed):
        train(sprites, tmp_path / "killed", until=2 * 3 + 1)
    resumed = train(sprites, tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_texts_are_those_of_the_pipeline(model: Path) -> None:
    pipe = LattePipeline.from_pretrained(model)
    one, several = train_video.read_texts(pipe.text_encoder, pipe.tokenizer)
    of_one = pipe.encode_prompt("cat", clean_caption=False)
    index = CLASSES.index("cat")
    torch.testing.assert_close(of_one[0][0], one[index])
    torch.testing.assert_close(of_one[1][0], one[-1])
    of_two = pipe.encode_prompt(["cat", "owl"], clean_caption=False)
    torch.testing.assert_close(of_two[0][0], several[index])
    torch.testing.assert_close(of_two[1][0], several[-1])
    assert not torch.allclose(one[0], one[1], atol=1e-2)


def test_the_model_is_a_pipeline_of_its_own_size(model: Path) -> None:
    pipe = LattePipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    [frames] = make(pipe, ["cat"], steps=2, guidance=2.0).images
    assert [frame.size for frame in frames] == [(SIDE, SIDE)] * TINY.frames
    with pytest.raises(ValueError, match="frames: 5 is not allowed, this model makes 3 frames"):
        make(pipe, ["cat"], steps=2, frames=5)


def generate(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, *words: str) -> int:
    given = ["--model", str(model), "--steps", "3", "--device", "cpu", "--prompt", "cat", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["regrow", "generate", *given, *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_saves_animated_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    method = "--method tokencache --preset dit-256-50 --full-steps 1 --predictor untrained --last-blocks 1"
    out = tmp_path / "cat.gif"
    assert (
        generate(monkeypatch, model, out, *method.split(), "--prompt", "owl", "--fps", "10", "--compare")
        == 0
    )
    for i in range(2):
        with Image.open(tmp_path / f"cat-{i}.gif") as video:
            assert (video.n_frames, video.info["duration"], video.size) == (TINY.frames, 100, (SIDE, SIDE))
    assert (tmp_path / "cat-compare.gif").exists()
    said = json.loads((tmp_path / "cat.json").read_text())
    assert said["what"] == "generated videos"
    assert said["fps"] == 10
    assert said["results"][1]["macs_ratio"] > 1.2
    assert "psnr" in said["results"][1]


def test_the_command_saves_mp4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    imageio = pytest.importorskip("imageio.v3")
    assert generate(monkeypatch, model, tmp_path / "cat.mp4", "--method", "fora:2") == 0
    assert imageio.imread(tmp_path / "cat.mp4").shape == (TINY.frames, SIDE, SIDE, 3)


def test_other_endings_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    assert generate(monkeypatch, model, tmp_path / "cat.jpg") == 2
    assert "a video must end in .mp4, .gif" in " ".join(capsys.readouterr().err.split())
    found = "importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    assert generate(monkeypatch, model, tmp_path / "cat.mp4") == 2
    assert "pip install 'regrow[video]'" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
