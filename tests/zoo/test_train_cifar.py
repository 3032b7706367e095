"""Training on photographs: both published forms are read, resuming is exact, and DiTPipeline loads it."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import card_cifar
import check_cifar
import cifar
import numpy as np
import pytest
import torch
import train_cifar
from cifar import CLASSES, read_cifar, write
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file
from test_training import Killed, ticking
from train_cifar import Recipe, pixel_vae

from regrow import zoo
from regrow.lab.measure.sampling import make

TINY = Recipe(batch=2, layers=2, heads=1, head_size=32)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def archive(pictures: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches of two to train on, one of two to test."""
    file = tmp_path_factory.mktemp("data") / "cifar-10-binary.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, first in (("data_batch_1.bin", 0), ("data_batch_2.bin", 2), ("test_batch.bin", 4)):
            rows = [bytes([i]) + pictures[i].numpy().tobytes() for i in (first, first + 1)]
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(b"".join(rows))
            tar.addfile(member, io.BytesIO(b"".join(rows)))
    return file


def test_the_binary_version_is_read(archive: Path, pictures: torch.Tensor) -> None:
    for test, expected in ((False, range(4)), (True, range(4, 6))):
        found, labels = read_cifar([archive], test=test)
        assert torch.equal(found, pictures[list(expected)])
        assert labels.tolist() == list(expected)


def test_photographs_are_written_over_those_of_a_killed_run_only(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "00000.png").touch()
    write([archive], 2, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00001.png", "captions.txt"]
    assert (tmp_path / "00000.png").stat().st_size > 0
    with pytest.raises(ValueError, match="is not empty"):
        write([archive], 2, tmp_path)


def test_the_parquet_form_is_read(pictures: torch.Tensor, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for name, rows in (("train", range(4)), ("test", range(4, 6))):
        coded = []
        for i in rows:
            file = io.BytesIO()
            Image.fromarray(pictures[i].permute(1, 2, 0).numpy()).save(file, "png")
            coded.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"img": coded, "label": list(rows)})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    files = sorted(tmp_path.glob("*.parquet"))
    found, labels = read_cifar(files, test=True)
    assert torch.equal(found, pictures[4:])
    assert labels.tolist() == [4, 5]
    assert len(read_cifar(files, test=False)[0]) == 4


def test_test_photographs_are_written_with_their_classes(
    archive: Path, pictures: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "test"
    words = ["cifar.py", "--data", str(archive), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*words, "--count", "2"])
    cifar.main()
    assert (out / "captions.txt").read_text() == f"{CLASSES[4]}\n{CLASSES[5]}\n"
    for i, file in enumerate(sorted(out.glob("*.png"))):
        with Image.open(file) as picture:
            assert torch.equal(torch.tensor(np.array(picture)).permute(2, 0, 1), pictures[4 + i])
    monkeypatch.setattr("sys.argv", [*words, "--count", "3"])
    with pytest.raises(ValueError, match="count: 3 is not allowed, it must be from 1 to 2"):
        cifar.main()


def test_files_without_photographs_are_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no test photographs"):
        read_cifar([tmp_path / "train-0.parquet"], test=True)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="holds no binary batches"):
        read_cifar([tmp_path / "empty.tar"], test=False)


def test_the_autoencoder_of_pixels_gives_them_back() -> None:
    vae = pixel_vae()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(x).latents
        again = vae.decode(latents).sample
    torch.testing.assert_close(latents, x)
    # A tenth of a step between the 256 values that a pixel has.
    assert (again - x).abs().max() < 0.1 * 2 / 255


def train(data: Path, out: Path, export_to: Path | None = None, until: int | None = None) -> dict:
    """The state after four steps."""
    train_cifar.run(
        [data], out, 4 / 60, TINY, export_to, torch.device("cpu"), ticking(until), checkpoint_seconds=2
    )
    index = json.loads((out / "denoiser.json").read_text())
    assert (index["step"], index["done"]) == (4, True)
    return load_file(out / index["tensors"])


def test_a_finished_training_goes_on_if_it_is_given_more_minutes(archive: Path, tmp_path: Path) -> None:
    train(archive, tmp_path)
    for _ in range(2):
        train_cifar.run([archive], tmp_path, 6 / 60, TINY, None, torch.device("cpu"), ticking(None))
        index = json.loads((tmp_path / "denoiser.json").read_text())
        assert (index["step"], index["done"]) == (6, True)


@pytest.fixture(scope="module")
def model(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline trained for four steps."""
    folder = tmp_path_factory.mktemp("trained")
    train(archive, folder / "work", folder / "model")
    return folder / "model"


def test_killed_and_resumed_equals_straight(archive: Path, tmp_path: Path) -> None:
    straight = train(archive, tmp_path / "straight")
    with pytest.raises(Killed):
        train(archive, tmp_path / "killed", until=2 * 3 + 1)
    resumed = train(archive, tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_model_is_a_pipeline_with_names_of_classes(model: Path) -> None:
    pipe = DiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {name: number for number, name in enumerate(CLASSES)}
    for guidance in (1.0, 4.0):
        made = pipe(
            class_labels=pipe.get_label_ids(["ship", "cat"]), num_inference_steps=2, guidance_scale=guidance
        )
        assert [image.size for image in made.images] == [(32, 32)] * 2
    assert tuple(zoo.captions_in(model)) == CLASSES
    loaded = zoo.load_from(model)
    by_name, by_number = (make(loaded, [one], steps=2).images[0].tobytes() for one in ("cat", "3"))
    assert by_name == by_number
    with pytest.raises(
        ValueError, match=r"'dragon' is not allowed, .* or its name, such as airplane, auto"
    ):
        make(loaded, ["dragon"], steps=2)


def test_the_contact_sheet_has_a_row_for_every_class() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(14, 3, 32, 32)
    sheet = check_cifar.sheet_of(red, [0] * 13 + [9]).convert("RGB")
    rows = [y for y in range(sheet.height) if sheet.getpixel((sheet.width // 2, y)) == (255, 0, 0)]
    assert len(rows) == 64
    reds = sum(
        n for n, colour in sheet.getcolors(sheet.width * sheet.height) or () if colour == (255, 0, 0)
    )
    assert reds == (check_cifar.COLUMNS + 1) * 64 * 64


def test_a_check_is_of_every_setting_and_goes_on(
    archive: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sheet = tmp_path / "check.json", tmp_path / "sheet.png"

    def check(*settings: str, seed: int = 0) -> dict[str, Any]:
        words = f"--data {archive} --model {model} --images 2 --fit 4 --batch 1".split()
        words += ["--seed", str(seed), "--json", str(out), "--work", str(tmp_path / "work")]
        words += ["--sheet", str(sheet), "--settings", *settings]
        monkeypatch.setattr("sys.argv", ["check_cifar.py", *words])
        check_cifar.main()
        return json.loads(out.read_text())

    first = check("1:1")
    assert Image.open(sheet).width > 64 * check_cifar.COLUMNS
    assert 0 <= first["settings"][0]["accuracy"] <= 1
    assert first["settings"][0]["fd"] > 0
    both = check("1:1", "1:3")
    assert both["settings"][0] == first["settings"][0]
    assert [(row["steps"], row["guidance"]) for row in both["settings"]] == [(1, 1.0), (1, 3.0)]
    assert both["settings"][1]["fd"] != first["settings"][0]["fd"]
    with pytest.raises(SystemExit, match=r"seed: .*check.json was made with 0, not 1; use another --json"):
        check("1:1", seed=1)


def test_a_killed_check_draws_no_picture_twice(
    archive: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = check_cifar.draw

    def draw(pipe: Any, labels: list[int], setting: Any, batch: int, seed: int, bf16: bool) -> torch.Tensor:
        if stop and len(drawn) == 1:
            raise Killed
        drawn.extend(range(seed, seed + len(labels)))
        return real(pipe, labels, setting, batch, seed, bf16)

    def check(name: str, *changes: str) -> dict[str, Any]:
        words = f"--data {archive} --model {model} --images 2 --fit 4 --batch 1 --settings 1:1".split()
        words += f"--json {tmp_path / name} --work {tmp_path / 'work'}".split()
        monkeypatch.setattr("sys.argv", ["check_cifar.py", *words, *changes])
        check_cifar.main()
        (row,) = json.loads((tmp_path / name).read_text())["settings"]
        return row

    monkeypatch.setattr(check_cifar, "BATCHES", 1)
    monkeypatch.setattr(check_cifar, "draw", draw)
    stop = True
    with pytest.raises(Killed):
        check("one.json")
    stop = False
    found = check("one.json")
    assert drawn == [0, 1]
    # Nor for another file of figures, or a sheet.
    assert check("two.json", "--sheet", str(tmp_path / "sheet.png")) == found
    assert drawn == [0, 1]
    # Other pictures are drawn, and those of the first are still there.
    for i, changes in enumerate((("--seed", "1"), ("--bf16",), ("--batch", "2"), ("--settings", "2:1"))):
        del drawn[:]
        check(f"other-{i}.json", *changes)
        assert len(drawn) == 2, changes
    del drawn[:]
    assert check("three.json") == found
    assert not drawn


def test_the_card_says_what_was_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {
        "processor": "P",
        "gpu": None,
        "threads": 2,
        "date": "2026-01-01",
        "versions": {"torch": "2"},
    }
    settings = [
        {"steps": 10, "guidance": 1.0, "fd": 33.04, "accuracy": 0.5, "machine": machine},
        {"steps": 50, "guidance": 2.0, "fd": 21.96, "accuracy": 0.601},
    ]
    check = {"images": 1000, "fit": 10000, "precision": "bf16 autocast", "settings": settings}
    check["settings"][0]["accuracy by class"] = {"cat": 0.25, "dog": 0.5}
    photographs = {"accuracy": 0.75, "accuracy by class": {"airplane": 1.0, "cat": 0.5}}
    check |= {
        "fd of training photographs": 9.0,
        "test photographs": photographs,
        "batch": 64,
        "device": "cpu",
    }
    more = check | {"images": 10_000, "settings": settings[:1], "device": "cuda", "batch": 500}
    files = [tmp_path / "check.json", tmp_path / "more.json"]
    for file, one in zip(files, (check, more), strict=True):
        file.write_text(json.dumps(one))
    words = ["--model", str(model), "--log", str(model.parent / "work"), "--check", *map(str, files)]
    monkeypatch.setattr("sys.argv", ["card_cifar.py", *words])
    card_cifar.main()
    card = (model / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| 50 | 2 | 22.0 | 60.1% |",
        "| 10 | none | 33.0 | 50.0% |",
        "| photographs | | 9.0 | 75.0% |",
        f"| found, of | {' | '.join(CLASSES)} |",
        "| 10 steps, guidance 1 |  |  |  | 25% |  | 50% |  |  |  |  |",
        "| photographs | 100% |  |  | 50% |  |  |  |  |  |  |",
        "| DDIM steps | guidance | FD-EffNet | classifier finds the class |",
        "| 10 | none | 33.0 | 50.0% |",
        "| photographs | | 9.0 | 75.0% |",
        f"| found, of | {' | '.join(CLASSES)} |",
        "| 10 steps, guidance 1 |  |  |  | 25% |  | 50% |  |  |  |  |",
        "| photographs | 100% |  |  | 50% |  |  |  |  |  |  |",
    ]
    for said in (
        "Of 1,000 pictures each:\n\n| DDIM steps |",
        "1,000 pictures each, bf16 autocast",
        "--images 1000 --batch 64 --bf16 --json",
        "Of 10,000 pictures each:\n\n| DDIM steps |",
        "--images 10000 --batch 500 --bf16 --device cuda --json",
        "--settings 10:1 50:2",
        "4 steps of 2 pictures",
    ):
        assert said in card
    assert "expect shapes, not details" in card
    assert Image.open(model / "loss.png").width > 300


@pytest.mark.parametrize("text", ["50", "0:2", "1001:2", "50:0.5", "a:2"])
def test_a_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not"):
        check_cifar.Setting.parse(text)


def test_a_classifier_learns_its_classes() -> None:
    labels = torch.arange(40) % 10
    features = torch.randn(10, 1280, generator=torch.Generator().manual_seed(0))[labels]
    head = check_cifar.fit(features, labels)
    assert check_cifar.accuracy(head, features, labels)["accuracy"] == 1.0
    wrong = (labels + 1) % 10
    assert check_cifar.accuracy(check_cifar.fit(features, labels), features, wrong)["accuracy"] == 0.0
    mixed = check_cifar.accuracy(head, features[:4], torch.tensor([0, 1, 2, 2]))
    assert mixed["accuracy"] == 0.75
    assert mixed["accuracy by class"] == {"airplane": 1.0, "automobile": 1.0, "bird": 0.5}
