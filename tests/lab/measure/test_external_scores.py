"""Pictures go out as files, scores come in."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import PROMPTS, SETTING, VARIANTS, PictureFolder, made

from regrow.lab.measure.evaluate import Setting
from regrow.lab.measure.external_scores import check_export, export, read_scores

SCRIPTS = Path(__file__).parents[3] / "benchmarks" / "external"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureFolder:
    return made(tmp_path_factory.mktemp("pictures"))


def test_exported_pictures_are_those_made_with_their_prompts(
    tmp_path: Path, pictures: PictureFolder
) -> None:
    folder = tmp_path / "png"
    export(folder, pictures, VARIANTS[:1])
    export(folder, pictures, VARIANTS[1:])
    listing = json.loads((folder / "export.json").read_text())
    assert list(listing["variants"].values()) == [one.name for one in VARIANTS]
    for name, one in zip(listing["variants"], VARIANTS, strict=True):
        prompts = json.loads((folder / name / "prompts.json").read_text())
        assert tuple(prompts.values()) == PROMPTS
        assert sorted(file.name for file in (folder / name).glob("*.png")) == list(prompts)
        expected = torch.cat([pictures.shard(one, n) for n in range(3)])
        for file, picture in zip(prompts, expected, strict=True):
            found = np.asarray(Image.open(folder / name / file))
            assert np.array_equal(found, picture.permute(1, 2, 0).numpy())


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, pictures: PictureFolder) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        export(tmp_path, pictures, VARIANTS)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]
    export(tmp_path / "png", pictures, VARIANTS[:1])
    with pytest.raises(ValueError, match="holds other files"):
        check_export(tmp_path / "png", Setting("tiny", PROMPTS[:3], guidance=5.0, shard=2))
    assert check_export(tmp_path / "png", SETTING) == {"steps-4": "steps:4"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    for folder in (tmp_path / "letter.txt", tmp_path / "letter.txt" / "png"):
        with pytest.raises(ValueError, match=r"export: .*letter\.txt"):
            check_export(folder, SETTING)


def test_scores_of_several_files_are_merged(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('{"steps:4": {"ImageReward": 1}, "steps:2": {"ImageReward": 0.5}}')
    other.write_text('{"steps:4": {"aesthetic": -2.5}}')
    assert read_scores([one, other], VARIANTS) == {
        "steps:4": {"ImageReward": 1.0, "aesthetic": -2.5},
        "steps:2": {"ImageReward": 0.5},
        VARIANTS[2].name: {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "must be of the form"),
        ('{"steps:4": 1}', "must be of the form"),
        ('{"steps:9": {"a": 1}}', "'steps:9' in .* is not allowed; allowed are steps:4, steps:2"),
        ('{"steps:4": {"a": "1"}}', "'1' of steps:4, a in .* must be a finite number"),
        ('{"steps:4": {"a": true}}', "True of steps:4, a in .* must be a finite number"),
        ('{"steps:4": {"a": NaN}}', "nan of steps:4, a in .* must be a finite number"),
    ],
)
def test_scores_of_another_form_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scores([file], VARIANTS)


def test_a_score_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text('{"steps:4": {"a": 1}}')
    with pytest.raises(ValueError, match="'a' of steps:4 is given twice"):
        read_scores([file, file], VARIANTS)


class Rewards:
    """Stands for ImageReward's model: the mean of the red channel and the prompt's length."""

    def score(self, prompt: str, file: str) -> float:
        return float(np.asarray(Image.open(file))[..., 0].mean()) + len(prompt)


class VBench:
    """Stands for VBench: as it does, finds the pictures, wants a prompt of each, and writes a file."""

    def __init__(self, device: torch.device, full_info_dir: str, output_path: str) -> None:
        self.output_path = output_path

    def evaluate(
        self, videos_path: str, name: str, prompt_list: dict[str, str], dimension_list: list[str], mode: str
    ) -> None:
        files = [file for file in os.listdir(videos_path) if file.endswith((".png", ".jpg", ".mp4"))]
        assert set(files) == set(prompt_list)
        assert mode == "custom_input"
        results = {dimension: [len(files) / 10, []] for dimension in dimension_list}
        Path(self.output_path, f"{name}_eval_results.json").write_text(json.dumps(results))


def test_the_scripts_write_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: PictureFolder
) -> None:
    export(tmp_path / "png", pictures, VARIANTS)
    reward: Any = ModuleType("ImageReward")
    reward.load = lambda name, device: Rewards()
    bench: Any = ModuleType("vbench")
    bench.VBench = VBench
    monkeypatch.setitem(sys.modules, "ImageReward", reward)
    monkeypatch.setitem(sys.modules, "vbench", bench)
    files = []
    for script in ("image_reward", "vbench_scores"):
        files.append(tmp_path / f"{script}.json")
        words = [script, str(tmp_path / "png"), "--out", str(files[-1]), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", words)
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    scores = read_scores(files, VARIANTS)
    reds = torch.cat([pictures.shard(VARIANTS[1], n)[:, 0].double().mean((1, 2)) for n in range(3)])
    expected = float(reds.mean()) + sum(map(len, PROMPTS)) / 5
    assert scores["steps:2"]["ImageReward"] == pytest.approx(expected)
    assert scores["steps:2"]["VBench imaging quality"] == 0.5
    assert set(scores["steps:4"]) == {"ImageReward", "VBench imaging quality", "VBench aesthetic quality"}
