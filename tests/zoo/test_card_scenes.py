"""The card of a model of scenes says what was measured, and its reference is what the captions say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import card_scenes
import compose_scenes
import pytest
import torch
from check_scenes import border_right
from emoji_scenes import OBJECTS, Caption, Phrase, Sprites, compose, scene
from PIL import Image

from regrow.lab.measure.images import to_tensor

NAMES = list(OBJECTS[:6])
CHECK: dict[str, Any] = {
    "objects": 6,
    "steps": 20,
    "guidance": 3.0,
    "precision": "fp32",
    "machine": {"processor": "P", "threads": 2, "date": "2026-01-01", "versions": {"torch": "2"}},
    "right_picture": {
        "scenes_to_fit": 8000,
        "composed, one object": {"objects": 1.0, "colour": 0.99},
        "generated, one object": {"objects": 0.851, "colour": 0.96, "pictures": 500, "border": 0.987},
        "decoded, one object": {"objects": 0.983, "colour": 0.974},
        "decoded, two objects": {"objects": 0.895, "colour": 0.97},
        "composed, two objects": {"objects": 0.9, "colour": 0.99},
        "generated, two objects": {"objects": 0.612, "colour": 0.97, "pictures": 300},
    },
    "variety": {"captions": 64, "generated": 0.3, "composed": 0.33, "ratio": 0.91},
    "trajectory": {"captions": 32, "steps": {"25": 40.1, "10": 31.2}, "reuse": {"1:2": 38.0}},
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    recipe = {"caption_dropout": 0.1, "batch": 16, "lr": 1e-3, "ema": 0.998, "pure_noise": False}
    minutes = {"vae": 1, "decoder": 1, "denoiser": 2}
    settings = {
        "threads": 2,
        "processor": "P",
        "torch": "2",
        "recipe": recipe,
        "minutes": minutes,
        "objects": 6,
    }
    (tmp_path / "run.json").write_text(json.dumps(settings))
    for stage in ("vae", "decoder", "denoiser"):
        lines = [{"step": 50 * i, "seconds": 60.0 * i, "loss": 1 / i} for i in (1, 2)]
        (tmp_path / f"{stage}.log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_the_card_has_every_figure_beside_its_bar(log: Path) -> None:
    text = card_scenes.card(CHECK, "", card_scenes.trained([log]), NAMES, {"U-Net": 12_600_000})
    for figure in (
        "85.1%",
        "61.2%",
        "96.0%",
        "98.7%",
        "98.3%",
        "97.4%",
        "0.91",
        "31.2 dB",
        "38.0 dB",
        "12.60 M",
        "All bars are met.",
        "--lr 0.001",
    ):
        assert figure in text


def test_border_is_nearest_the_named_plain_colour() -> None:
    captions = [
        Caption((Phrase(0, None, None),), ground)
        for ground in (("red",), ("green",), ("blue",), ("red", "blue"), ())
    ]
    pictures = torch.zeros(5, 3, 16, 16)
    pictures[0, 0], pictures[1, 0] = 0.85, 0.85
    pictures[2, 2] = 0.8
    # What stands in the middle does not count.
    pictures[0, :, 5:11, 5:11] = 1
    assert border_right(pictures, captions) == pytest.approx(2 / 3)


def test_the_card_tells_of_every_round(log: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    settings = json.loads((log / "run.json").read_text())
    del settings["recipe"]["pure_noise"]
    (second / "run.json").write_text(json.dumps(settings | {"objects": 9}))
    (second / "denoiser.log.jsonl").write_text(
        json.dumps({"step": 70, "seconds": 600.0, "loss": 0.1}) + "\n"
    )
    text = card_scenes.card(CHECK, "", card_scenes.trained([log, second]), NAMES, {})
    assert "- Round 1, 6 objects, noise levels not yet scaled: vae 2 minutes, 100 steps; decoder" in text
    assert "- Round 2, 9 objects: denoiser 10 minutes, 70 steps;" in text
    assert "--start work/first" in text
    assert (
        "--start work/round1/model \\\n    --objects 9 --lr 0.001 --minutes 2 \\\n    --out work/round2"
        in text
    )


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("right_picture", "generated, one object", "objects"), 0.84, "one object"),
        (("right_picture", "generated, one object", "colour"), 0.94, "background"),
        (("right_picture", "generated, two objects", "objects"), 0.59, "two objects"),
        (("right_picture", "generated, two objects", "colour"), 0.94, "background"),
        (("variety", "ratio"), 0.79, "variety"),
        (("trajectory", "steps", "10"), 32.1, "10 steps"),
    ],
)
def test_the_card_says_which_bar_is_missed(where: tuple[str, ...], value: float, named: str) -> None:
    check = copy.deepcopy(CHECK)
    *path, last = where
    inner = check
    for key in path:
        inner = inner[key]
    inner[last] = value
    assert f"Missed: {named}." in card_scenes.card(check, "", "", NAMES, {})


@pytest.mark.parametrize(
    ("ten", "said"),
    [(10.4, "10 steps can't be told from 50"), (10.6, "10 steps or fewer are worse than 50")],
)
def test_the_card_says_whether_fewer_steps_can_be_told(ten: float, said: str) -> None:
    figures = {"kd": 0.001, "precision": 0.5, "recall": 0.4}
    rows = [{"name": f"steps:{n}", "fd": fd} | figures for n, fd in ((50, 10.0), (25, 10.1), (10, ten))]
    text = card_scenes.fewer_steps(
        {"rows": rows, "prompts": 128, "dtype": "bfloat16", "reference": "scenes"}
    )
    assert said in text
    assert f"| 10 | {ten:.2f} | 0.0010 | 0.50 | 0.40 |" in text


@pytest.mark.parametrize(
    ("reference", "steps"), [("the baseline's pictures", (50, 10)), ("scenes", (50, 25))]
)
def test_steps_beside_their_own_pictures_say_nothing(reference: str, steps: tuple[int, int]) -> None:
    rows = [{"name": f"steps:{n}", "fd": 1.0} for n in steps]
    with pytest.raises(SystemExit, match="--fewer: it must be beside true pictures"):
        card_scenes.fewer_steps({"rows": rows, "prompts": 128, "reference": reference})


def test_without_logs_what_a_card_tells_of_training_stays(log: Path) -> None:
    training = card_scenes.trained([log])
    assert card_scenes.told(card_scenes.card(CHECK, "", training, NAMES, {})) == training
    assert "learning rate 0.001" in training


def test_the_sheet_shows_every_caption_with_all_seeds() -> None:
    drawn = [torch.zeros(5, 3, 16, 16) for _ in range(2)]
    drawn[0][:, 0], drawn[1][:, 2] = 1, 1
    sheet = card_scenes.contact_sheet(drawn, ["cat"] * 5)
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=2**20)}
    assert counts[255, 0, 0] == counts[0, 0, 255] == 5 * card_scenes.SIDE**2


def test_the_reference_is_the_scenes_of_its_seeds(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (6, 4, 32, 32), dtype=torch.uint8)
    sprites = Sprites(pictures)
    compose_scenes.write_scenes(sprites, NAMES, 70, tmp_path / "out")
    captions = (tmp_path / "out" / "captions.txt").read_text().splitlines()
    assert len(captions) == len(list((tmp_path / "out").glob("*.png"))) == 70
    last = scene(compose_scenes.FIRST + 69, 6)
    assert captions[69] == last.caption.text(NAMES)
    expected = compose([last], sprites)[0].mul(255).round()
    assert torch.equal(to_tensor(Image.open(tmp_path / "out" / "000069.png")).float(), expected)
