"""Pictures are made once, whatever kills the run, and compared with independent measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from regrow import cli
from regrow.measure.evaluate import Pictures, Setting, compare
from regrow.measure.prompts import read_prompts
from regrow.measure.quality import frechet_distance
from regrow.measure.variants import variant

PROMPTS = ("a penguin", "a pizza", "a cat", "a dog", "an owl")
SETTING = Setting("tiny", PROMPTS, guidance=5.0, shard=2)
VARIANTS = [variant(spec, 4) for spec in ("steps:4", "steps:2", "deepcache:2+tome:0.5")]


def extractor(pictures: Tensor) -> Tensor:
    """Coarse colours, as features."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1)


def made(folder: Path) -> Pictures:
    pictures = Pictures(folder, SETTING)
    for one in VARIANTS:
        pictures.make(pipelines.sd(), one)
    return pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return made(tmp_path_factory.mktemp("pictures"))


def test_every_prompt_has_its_picture_from_its_own_seed(pictures: Pictures) -> None:
    pipe = pipelines.sd()
    shards = list(pictures.of(VARIANTS[0]))
    assert [len(shard) for shard in shards] == [2, 2, 1]
    for i, prompt in enumerate(PROMPTS):
        (image,) = pipe(
            prompt,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(i),
            output_type="pt",
        ).images
        assert (shards[i // 2][i % 2] - image).abs().max() < 0.02
    assert pictures.seconds(VARIANTS[0]) > 0
    assert not any(pictures.missing(one) for one in VARIANTS)


def test_a_second_run_makes_nothing_again(pictures: Pictures) -> None:
    again = Pictures(pictures.folder, SETTING)
    again.make(None, VARIANTS[0])
    assert compare(again, VARIANTS, extractor) == compare(pictures, VARIANTS, extractor)


def test_lost_pictures_are_made_again_as_they_were(tmp_path: Path, pictures: Pictures) -> None:
    mine = made(tmp_path)
    file = next(iter(sorted(tmp_path.glob("*/000001.safetensors"))))
    before = load_file(file)["pictures"]
    file.unlink()
    for one in VARIANTS:
        mine.make(pipelines.sd(), one)
    assert torch.equal(load_file(file)["pictures"], before)
    assert not list(tmp_path.rglob("*.partial"))


def test_distances_are_those_of_other_libraries(pictures: Pictures) -> None:
    rows = compare(pictures, VARIANTS, extractor)
    base, other = (torch.cat(list(pictures.of(VARIANTS[i]))) for i in (0, 2))
    assert rows[0].psnr is None
    assert rows[0].ssim == 1
    assert rows[0].feature_distance == pytest.approx(0, abs=1e-9)
    assert rows[0].fd == pytest.approx(0, abs=1e-9)
    assert (rows[0].precision, rows[0].recall) == (1, 1)
    values = sorted(
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1)
        for a, b in zip(base, other, strict=True)
    )
    assert rows[2].psnr == pytest.approx(values[2], abs=1e-6)
    assert 0 < rows[2].ssim < 1
    assert rows[2].fd == pytest.approx(frechet_distance(extractor(base), extractor(other)))
    reference = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    with_data = compare(pictures, VARIANTS, extractor, reference)
    assert with_data[0].fd == pytest.approx(frechet_distance(reference, extractor(base)))
    assert with_data[2].psnr == rows[2].psnr


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"prompts": PROMPTS[:3]}, "prompts"), ({"seed": 1}, "seed"), ({"shard": 3}, "shard")],
)
def test_a_folder_of_another_setting_is_refused(
    pictures: Pictures, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"{named}: the pictures in .* were made with another one"):
        Pictures(pictures.folder, Setting(**(vars(SETTING) | changes)))


def test_another_configuration_of_the_same_name_is_refused(pictures: Pictures) -> None:
    with pytest.raises(ValueError, match="holds pictures of another steps:2"):
        pictures.missing(type(VARIANTS[1])("steps:2", None, 3))


def test_nothing_to_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: 0 is not allowed"):
        Pictures(tmp_path, Setting("tiny", ()))


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
import pipelines
from pathlib import Path
from test_evaluate import SETTING, VARIANTS
from regrow.measure.evaluate import Pictures
pictures = Pictures(Path(sys.argv[1]), SETTING)
for one in VARIANTS:
    pictures.make(pipelines.sd(), one, on_shard=lambda: time.sleep(float(sys.argv[3])))
"""


def test_killed_three_times_gives_what_an_undisturbed_run_gives(tmp_path: Path, pictures: Pictures) -> None:
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for wanted in (1, 3, 6):
        process = subprocess.Popen([*words, "0.5"], env=environment)
        end = time.monotonic() + 120
        while len(list(tmp_path.rglob("*.safetensors"))) < wanted and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(kept) >= 6
    subprocess.run([*words, "0"], env=environment, check=True)
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    assert compare(Pictures(tmp_path, SETTING), VARIANTS, extractor) == compare(
        pictures, VARIANTS, extractor
    )


def test_prompt_files_of_the_public_formats_are_read(tmp_path: Path) -> None:
    files = {
        "own.txt": "a cat\n\n a dog \n",
        "parti.tsv": "Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\n",
        "drawbench.csv": 'Prompts,Category\na cat,x\n"a dog",x\n',
        "list.json": '["a cat", "a dog"]',
        "coco.json": json.dumps(
            {
                "annotations": [
                    {"image_id": 7, "caption": "a cat"},
                    {"image_id": 3, "caption": "a dog\n"},
                    {"image_id": 7, "caption": "another cat"},
                ]
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == ["a cat", "a dog"], name
    assert read_prompts(tmp_path / "own.txt", "a photo of {}")[1] == "a photo of a dog"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "holds none"),
        ("a.json", "{", "neither a list"),
        ("a.json", '{"images": []}', "neither a list"),
        ("a.csv", "text\na cat\n", "no column Prompt"),
        ("a.parquet", "", "'.parquet' is not allowed"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_the_command_goes_on_and_prints_what_it_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["eval", "--methods", "steps:2,dato:b1", "--steps", "2", "--prompts", "4", "--batch", "4"]
    words += ["--json", "--device", "cpu", "--out", str(tmp_path / "eval")]
    printed = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["regrow", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == (tmp_path / "eval" / "result.json").read_text()
    result = json.loads(printed[0])
    assert [row["name"] for row in result["rows"]] == ["steps:2", "dato:b1"]
    assert result["rows"][1]["psnr"] > 5
    assert result["rows"][0]["fd"] == pytest.approx(0, abs=1e-6)
