"""``regrow generate`` with prompts from a file, negative prompts, pictures to begin with, single files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import regrow
from regrow import zoo
from regrow.lab.cli import main
from regrow.lab.cli.models import check_room, config_of
from regrow.lab.measure.machine import model_key


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["regrow", "generate", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(folder)
    return folder


def small(model: Path, out: Path) -> tuple[str, ...]:
    size = ("--height", "64", "--width", "64")
    return ("--model", str(model), "--guidance", "5", "--steps", "4", "--out", str(out), *size)


def pixels(file: Path) -> Any:
    return np.asarray(Image.open(file)).astype(int)


def test_what_made_a_picture_is_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "owl.png"
    assert (
        run(monkeypatch, *small(model, out), "--prompt", "owl", "--seed", "3", "--method", "dato:b1") == 0
    )
    said = json.loads((tmp_path / "owl.json").read_text())
    assert said["regrow"] == regrow.__version__
    assert said["files"] == ["owl.png"]
    assert (said["prompts"], said["seed"], said["steps"], said["guidance"]) == (["owl"], 3, 4, 5.0)
    assert said["model_key"] == model_key(str(model))
    assert said["scheduler"] == "DDIMScheduler"
    assert said["config"] == regrow.DaTo.preset("b1").model_dump(mode="json")
    assert said["machine"]["versions"]["diffusers"]
    (row,) = said["results"]
    assert row["full_macs"] / row["macs"] == pytest.approx(row["macs_ratio"])
    assert row["macs_ratio"] > 1.5
    assert set(row["recovered"]) <= {"copy", "reuse", "reuse + copy"}
    assert 0 < sum(row["recovered"].values()) <= 4
    assert str(tmp_path / "owl.json") in capsys.readouterr().out


def test_prompts_of_a_file_are_made_batch_by_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("owl\n\npear\napple\n")
    out = tmp_path / "all.png"
    words = (*small(model, out), "--prompts", str(tmp_path / "prompts.txt"), "--batch", "2")
    assert run(monkeypatch, *words, "--method", "fora:2") == 0
    assert run(monkeypatch, *small(model, tmp_path / "third.png"), "--prompt", "apple", "--seed", "2") == 0
    assert sorted(file.name for file in tmp_path.glob("all*.png")) == [
        "all-0.png",
        "all-1.png",
        "all-2.png",
    ]
    said = json.loads((tmp_path / "all.json").read_text())
    assert said["prompts"] == ["owl", "pear", "apple"]
    assert run(monkeypatch, *words) == 0
    # Each picture has its own seed, whichever batch it is in.
    assert np.abs(pixels(tmp_path / "all-2.png") - pixels(tmp_path / "third.png")).max() <= 2


def test_a_picture_to_begin_with_and_a_negative_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    source = tmp_path / "source.png"
    Image.effect_noise((90, 45), 80).convert("RGB").save(source)
    common = ("--model", str(model), "--guidance", "5", "--steps", "4", "--prompt", "owl")
    common += ("--image", str(source), "--strength", "0.5", "--method", "deepcache:2")
    assert run(monkeypatch, *common, "--out", str(tmp_path / "own.png")) == 0
    # The picture's shape, about the model's area.
    assert Image.open(tmp_path / "own.png").size == (88, 48)
    said = json.loads((tmp_path / "own.json").read_text())
    assert said["pipeline"] == "StableDiffusionImg2ImgPipeline"
    size = ("--height", "64", "--width", "64")
    assert run(monkeypatch, *common, *size, "--out", str(tmp_path / "a.png")) == 0
    assert (
        run(monkeypatch, *common, *size, "--negative-prompt", "red", "--out", str(tmp_path / "b.png")) == 0
    )
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--prompt, --prompts: give one of them"),
        (
            ("--prompt", "a", "--prompts", "b.txt"),
            "--prompt, --prompts: give one of them",
        ),
        (("--prompts", "b.txt"), "b.txt: there is no such file"),
        (("--prompt", "a", "--strength", "0.5"), "--strength: it goes with --image"),
        (
            ("--prompt", "a", "--image", "text.txt", "--strength", "2"),
            "--strength: 2 is not allowed, it must",
        ),
        (
            ("--prompt", "a", "--image", "text.txt", "--steps", "10", "--strength", "0.09"),
            "--strength: 0.09 is not allowed, it must be from 0.1 to 1: at least one of 10 steps",
        ),
        (("--prompt", "a", "--image", "text.txt"), "--image: text.txt can't be read as a picture"),
        (("--prompt", "a", "--image", "none.png"), "none.png: No such file"),
        (
            ("--prompt", "a", "--negative-prompt", "b", "--guidance", "1"),
            "--negative-prompt: it does nothing",
        ),
        (("--prompt", "a", "--height", "64"), "width: it is missing, give it together with height"),
        (
            ("--prompt", "a", "--height", "65536", "--width", "65536"),
            "height, width, batch: 1 picture of 65536 x 65536 by emoji in float32 need more than",
        ),
        (
            ("--prompt", "a", "--model", "emojy"),
            "model: 'emojy' is not known; use",
        ),
        (("--prompt", "a", "--model", "./none"), "model: './none' is not known; use"),
        (
            ("--prompt", "a", "--model", "broken.safetensors"),
            "model: broken.safetensors can't be read as wei",
        ),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr("regrow.lab.cli.models._load", lambda *_: pytest.fail("loaded"))
    assert run(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_single_file_is_opened_by_the_configuration_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, file)
    (tmp_path / "mine").symlink_to(model)
    assert config_of(str(file)) == str(tmp_path / "mine")
    asked = []

    def opened(place: str, **options: Any) -> Any:
        asked.append((place, options["config"], options["dtype"]))
        return pipelines.sd()

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", opened)
    assert run(monkeypatch, *small(file, tmp_path / "owl.png"), "--prompt", "owl") == 0
    assert asked == [(str(file), str(tmp_path / "mine"), torch.float32)]
    assert (tmp_path / "owl.png").exists()


def test_a_single_file_whose_configuration_is_nowhere_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, file)

    def unreachable(place: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", unreachable)
    assert run(monkeypatch, "--model", str(file), "--prompt", "owl", "--out", str(tmp_path / "a.png")) == 2
    said = capsys.readouterr().err
    assert f"model: the configuration of {file}, that of stable-diffusion-v1-5/" in said
    assert f"put it into {tmp_path / 'mine'} (model_index.json" in said


def test_the_least_that_pictures_need_grows_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(p.numel() for p in zoo.load("emoji").unet.parameters())
    weights = 4 * parameters
    monkeypatch.setattr("regrow.lab.cli.models._memory", lambda device: weights)
    with pytest.raises(
        ValueError, match=r"height, width, batch: 1 picture of 128 x 128 by emoji in float32"
    ):
        check_room("emoji", None, None, 1, "cpu", torch.float32)
    # A half-precision model of half the size leaves room for pictures.
    check_room("emoji", None, None, 1, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="1024 pictures of 128 x 128"):
        check_room("emoji", None, None, 1024, "cpu", torch.bfloat16)
    monkeypatch.setattr("regrow.lab.cli.models._memory", lambda device: weights - 1)
    with pytest.raises(ValueError, match="model: "):
        check_room("emoji", None, None, 1, "cpu", torch.float32)


def test_what_the_calls_did_is_kept_as_a_schedule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    plan, out, again = tmp_path / "plan.yaml", tmp_path / "a.png", tmp_path / "b.png"
    words = ("--prompt", "owl", "--steps", "8")
    saved = ("--method", "adaptive:budget=4", "--save-schedule", str(plan))
    assert run(monkeypatch, *small(model, out), *words, *saved) == 0
    assert json.loads((tmp_path / "a.json").read_text())["files"] == ["a.png", "plan.yaml"]
    depth = regrow.Schedule.load(plan).depth
    assert (len(depth), depth.count(regrow.FULL)) == (8, 4)
    assert run(monkeypatch, *small(model, again), *words, "--schedule", str(plan)) == 0
    assert (pixels(out) == pixels(again)).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "sito:d"), "sito can't be kept as a schedule: its calls leave out tokens"),
        ((), "--save-schedule: it needs --method"),
        (("--method", "fora:3", "--prompt", "cat", "--batch", "1"), "2 prompts in batches of 1"),
        (("--method", "fora:3", "--save-schedule", "plan.txt"), "plan.txt is not allowed"),
    ],
)
def test_what_can_not_be_kept_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    out, plan = tmp_path / "out.png", tmp_path / "plan.yaml"
    given = (*small(model, out), "--prompt", "owl", "--save-schedule", str(plan), *words)
    assert run(monkeypatch, *given) != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert not plan.exists()
