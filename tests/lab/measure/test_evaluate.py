"""Pictures are made once, whatever kills the run, and compared with independent measures."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import metadata
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import pipelines
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cosine
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from regrow.lab import cli
from regrow.lab.cli.ablations import ABLATIONS, ablated
from regrow.lab.cli.evaluate import print_rows
from regrow.lab.cli.terminal import progress
from regrow.lab.measure import machine
from regrow.lab.measure.evaluate import Gain, PictureFolder, QualityFigures, Setting, ShardMaker, compare
from regrow.lab.measure.extractors import Labels, PictureFeatures
from regrow.lab.measure.quality import frechet_distance, inception_score
from regrow.lab.measure.reference import Reference
from regrow.lab.measure.variants import variant
from regrow.lab.workers import LocalWorkers

PROMPTS = ("a penguin", "a pizza", "a cat", "a dog", "an owl")
SETTING = Setting("tiny", PROMPTS, guidance=5.0, shard=2)
VARIANTS = [variant(spec, 4) for spec in ("steps:4", "steps:2", "deepcache:2+tome:0.5")]


class Colours:
    """Coarse colours, as features; counts the pictures it has seen."""

    name = "colours"
    labels = Labels("colours", "FD", "sFD", "KD", "IS")

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> PictureFeatures:
        self.seen += len(images)
        means = torch.nn.functional.adaptive_avg_pool2d(images, 2)
        return PictureFeatures(
            means.flatten(1), images[:, :, ::16, ::16].flatten(1), 9 * means.mean((2, 3))
        )


def extractor(pictures: Tensor) -> Tensor:
    """The pooled ones."""
    return Colours()(pictures).pooled


def small() -> Any:
    return pipelines.sd(pipelines.one_level_unet())


def made(folder: Path) -> PictureFolder:
    pictures = PictureFolder(folder, SETTING)
    for one in VARIANTS:
        pictures.make(small(), one)
    return pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureFolder:
    return made(tmp_path_factory.mktemp("pictures"))


def copied(pictures: PictureFolder, folder: Path) -> PictureFolder:
    """The same pictures, as `made` makes them, in another folder; nothing of them was measured."""
    shutil.copytree(pictures.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("measured"))
    return PictureFolder(folder, SETTING)


def test_every_prompt_has_its_picture_from_its_own_seed(pictures: PictureFolder) -> None:
    pipe = small()
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


def test_a_second_run_makes_nothing_again(pictures: PictureFolder) -> None:
    again = PictureFolder(pictures.folder, SETTING)
    again.make(None, VARIANTS[0])
    assert compare(again, VARIANTS, Colours()) == compare(pictures, VARIANTS, Colours())


def test_lost_pictures_are_made_again_as_they_were(tmp_path: Path, pictures: PictureFolder) -> None:
    mine = copied(pictures, tmp_path)
    file = next(iter(sorted(tmp_path.glob("*/000001.safetensors"))))
    before = load_file(file)["pictures"]
    file.unlink()
    for one in VARIANTS:
        mine.make(small(), one)
    assert torch.equal(load_file(file)["pictures"], before)
    assert not list(tmp_path.rglob("*.partial"))


def test_distances_are_those_of_other_libraries(pictures: PictureFolder) -> None:
    rows = compare(pictures, VARIANTS, Colours())
    base, other = (torch.cat(list(pictures.of(VARIANTS[i]))) for i in (0, 2))
    assert rows[0].psnr is None
    assert rows[0].ssim == 1
    assert rows[0].feature_distance == pytest.approx(0, abs=1e-9)
    assert rows[0].fd == pytest.approx(0, abs=1e-9)
    assert (rows[0].precision, rows[0].recall) == (1, 1)
    assert rows[2].ssim == pytest.approx(
        sum(
            structural_similarity(a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1)
            for a, b in zip(base, other, strict=True)
        )
        / len(base),
        abs=1e-6,
    )
    values = sorted(
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1)
        for a, b in zip(base, other, strict=True)
    )
    assert rows[2].psnr == pytest.approx(values[2], abs=1e-6)
    assert 0 < rows[2].ssim < 1
    pairs = zip(extractor(base).double().numpy(), extractor(other).double().numpy(), strict=True)
    apart = statistics.fmean(cosine(a, b) for a, b in pairs)
    assert rows[2].feature_distance == pytest.approx(apart, rel=1e-6)
    assert apart > 1e-7
    assert rows[2].fd == pytest.approx(frechet_distance(extractor(base), extractor(other)))
    features = Colours()(other)
    assert rows[2].sfd == pytest.approx(frechet_distance(Colours()(base).spatial, features.spatial))
    assert rows[2].inception_score == pytest.approx(inception_score(features.logits))
    g = torch.Generator().manual_seed(0)
    reference = Reference("data", torch.rand(6, 12, generator=g), torch.rand(6, 48, generator=g))
    with_data = compare(pictures, VARIANTS, Colours(), reference)
    assert with_data[0].fd == pytest.approx(frechet_distance(reference.pooled, extractor(base)))
    assert with_data[2].sfd == pytest.approx(frechet_distance(reference.spatial, features.spatial))
    assert with_data[2].psnr == rows[2].psnr


def test_the_median_of_an_even_number_of_pictures_lies_between_two(tmp_path: Path) -> None:
    mine = PictureFolder(tmp_path, Setting("tiny", PROMPTS[:4], guidance=5.0, shard=2))
    for one in VARIANTS[:2]:
        mine.make(small(), one)
    base, other = (torch.cat(list(mine.of(one))).double().numpy() for one in VARIANTS[:2])
    values = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(base, other, strict=True)]
    found = compare(mine, VARIANTS[:2], Colours())[1].psnr
    assert found == pytest.approx(statistics.median(values), abs=1e-6)


def test_a_gain_is_the_mean_difference_of_the_pictures_psnr(pictures: PictureFolder) -> None:
    rows = compare(pictures, VARIANTS, Colours(), against={VARIANTS[2].name: VARIANTS[1].name})
    assert rows[:2] == compare(pictures, VARIANTS[:2], Colours())
    base, other, own = (torch.cat(list(pictures.of(one))).double().numpy() for one in VARIANTS)
    more = [
        peak_signal_noise_ratio(a, c, data_range=1) - peak_signal_noise_ratio(a, b, data_range=1)
        for a, b, c in zip(base, other, own, strict=True)
    ]
    gain = rows[2].gain
    assert gain is not None
    assert gain.over == "steps:2"
    assert gain.psnr == pytest.approx(statistics.mean(more), abs=1e-6)
    assert gain.error == pytest.approx(statistics.stdev(more) / len(more) ** 0.5, abs=1e-6)
    assert rows[2].to_dict()["gain"] == {"over": "steps:2", "psnr": gain.psnr, "error": gain.error}


def test_there_is_no_gain_over_pictures_that_equal_the_baselines(pictures: PictureFolder) -> None:
    base, *_, last = VARIANTS
    row = compare(pictures, [base, last], Colours(), against={last.name: base.name})[1]
    assert row.gain == Gain(base.name, None, None)


def test_a_gain_over_one_picture_has_no_error(tmp_path: Path, pictures: PictureFolder) -> None:
    shutil.copytree(pictures.folder, tmp_path, dirs_exist_ok=True)
    base, other, own = VARIANTS
    mine = PictureFolder(tmp_path, SETTING)
    for number, _ in SETTING.shards():
        same, file = mine.shard(base, number), mine.folder_of(own) / f"{number:06d}.safetensors"
        tensors = load_file(file)
        # All but the last picture are the baseline's.
        save_file(tensors | {"pictures": same if number < 2 else tensors["pictures"]}, file)
    gain = compare(mine, [base, other, own], Colours(), against={own.name: other.name})[2].gain
    assert gain is not None
    assert gain.psnr is not None
    assert gain.error is None


def test_a_gain_of_what_is_no_variant_is_refused(pictures: PictureFolder) -> None:
    with pytest.raises(ValueError, match="against: steps:3 is not known; allowed are steps:4, steps:2"):
        compare(pictures, VARIANTS, Colours(), against={"steps:3": "steps:4"})


def test_a_gain_over_what_comes_later_is_refused(pictures: PictureFolder) -> None:
    with pytest.raises(
        ValueError, match="against: steps:2 is not allowed for steps:4, it must come before"
    ):
        compare(pictures, VARIANTS, Colours(), against={"steps:4": "steps:2"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"shard": 3}, "shard"),
        ({"guidance": 1.0}, "guidance"),
    ],
)
def test_a_folder_of_another_setting_is_refused(
    pictures: PictureFolder, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"{named}: the pictures in .* were made with another value"):
        PictureFolder(pictures.folder, Setting(**(vars(SETTING) | changes)))


def test_a_folder_of_a_model_that_was_trained_further_is_refused(tmp_path: Path) -> None:
    before = Setting(**(vars(SETTING) | {"model_key": "some"}))
    PictureFolder(tmp_path, before).make(small(), VARIANTS[1])
    with pytest.raises(ValueError, match=r"model_key: the pictures in .* were made with another value"):
        PictureFolder(tmp_path, Setting(**(vars(SETTING) | {"model_key": "others"})))
    # The model is not at hand, its pictures are.
    assert not PictureFolder(tmp_path, SETTING).missing(VARIANTS[1])


def test_a_folder_is_gone_on_with_for_more_prompts_and_for_fewer(tmp_path: Path) -> None:
    at_once = PictureFolder(tmp_path / "at once", SETTING)
    at_once.make(small(), VARIANTS[0])
    folder = tmp_path / "grown"
    first = PictureFolder(folder, Setting(**(vars(SETTING) | {"prompts": PROMPTS[:4]})))
    first.make(small(), VARIANTS[0])
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    more = PictureFolder(folder, SETTING)
    assert [number for number, _ in more.missing(VARIANTS[0])] == [2]
    more.make(small(), VARIANTS[0])
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    assert compare(more, VARIANTS[:1], Colours()) == compare(at_once, VARIANTS[:1], Colours())
    fewer = PictureFolder(folder, first.setting)
    assert sum(len(shard) for shard in fewer.of(VARIANTS[0])) == 4
    # The folder is still that of all prompts.
    with pytest.raises(ValueError, match="prompts: 5 and 6 can't share"):
        PictureFolder(folder, Setting(**(vars(SETTING) | {"prompts": (*PROMPTS, "a hat")})))
    assert not PictureFolder(folder, SETTING).missing(VARIANTS[0])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("a penguin", "a cat"), "prompts: the pictures in .* were made with another value"),
        (PROMPTS[:3], "prompts: 3 and 5 can't share .*, the lower number must be a multiple of .* 2"),
        ((*PROMPTS, "a hat"), "prompts: 5 and 6 can't share"),
    ],
)
def test_a_folder_of_other_prompts_or_part_of_a_shard_is_refused(
    pictures: PictureFolder, prompts: tuple[str, ...], message: str
) -> None:
    file = pictures.folder / "setting.json"
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        PictureFolder(pictures.folder, Setting(**(vars(SETTING) | {"prompts": prompts})))
    assert file.read_bytes() == before


def test_another_batch_is_named_before_the_prompts(pictures: PictureFolder) -> None:
    changes = {"prompts": (*PROMPTS, "a hat"), "shard": 3}
    with pytest.raises(ValueError, match="shard: the pictures"):
        PictureFolder(pictures.folder, Setting(**(vars(SETTING) | changes)))


def test_the_first_prompts_are_done_by_all_variants_first(tmp_path: Path) -> None:
    order: list[str] = []
    mine = PictureFolder(tmp_path, Setting(**(vars(SETTING) | {"prompts": PROMPTS[:4]})))
    with LocalWorkers(lambda: ShardMaker(SETTING, small())) as workers:
        mine.make_all(workers, VARIANTS[1:], lambda one: order.append(one.name))
    assert order == [one.name for one in VARIANTS[1:]] * 2


def test_pictures_of_another_device_are_compared_but_not_gone_on_with(tmp_path: Path) -> None:
    PictureFolder(tmp_path, SETTING, "cuda").make(small(), VARIANTS[1])
    here = PictureFolder(tmp_path, SETTING)
    assert not here.missing(VARIANTS[1])
    (row,) = compare(here, VARIANTS[1:2], Colours())
    assert row.ssim == 1
    with pytest.raises(
        ValueError, match=r"cpu is not allowed for the missing .* of steps:4, those .* cuda"
    ):
        here.make(small(), VARIANTS[0])
    PictureFolder(tmp_path, SETTING, "cuda").make(small(), VARIANTS[0])


def test_too_many_pictures_for_the_device_are_told_with_their_method(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any, **options: Any) -> NoReturn:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("regrow.lab.measure.evaluate.make", full)
    with pytest.raises(MemoryError, match="batch: 2 pictures by steps:2 need more memory"):
        PictureFolder(tmp_path, SETTING).make(small(), VARIANTS[1])


def test_another_configuration_of_the_same_name_is_refused(pictures: PictureFolder) -> None:
    with pytest.raises(ValueError, match="holds pictures of another steps:2"):
        pictures.missing(type(VARIANTS[1])("steps:2", None, 3))


def coded(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> PictureFolder:
    """The pictures of a folder as other code opens it."""
    monkeypatch.setattr("regrow.lab.measure.evaluate.maker_key", lambda *_: code)
    return PictureFolder(folder, SETTING)


def test_pictures_of_other_code_are_used_and_marked(
    tmp_path: Path, pictures: PictureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = copied(pictures, tmp_path)
    rows = compare(mine, VARIANTS, Colours())
    assert not any(row.made_otherwise for row in rows)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    later = coded(monkeypatch, tmp_path, "later")
    assert not any(map(later.missing, VARIANTS))
    assert compare(later, VARIANTS, Colours()) == [replace(row, made_otherwise=True) for row in rows]
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())


def test_one_batch_of_other_code_marks_its_variant(
    tmp_path: Path, pictures: PictureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(pictures, tmp_path)
    for one in VARIANTS[:2]:
        for number in (0, 1) if one is VARIANTS[0] else (0, 1, 2):
            (tmp_path / f"steps-{one.steps}" / f"{number:06d}.safetensors").unlink()
    later = coded(monkeypatch, tmp_path, "later")
    for one in VARIANTS[:2]:
        later.make(small(), one)
    assert [later.made_otherwise(one) for one in VARIANTS[:2]] == [True, False]


def test_pictures_of_another_machine_are_made_otherwise(
    tmp_path: Path, pictures: PictureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, one = copied(pictures, tmp_path), VARIANTS[1]
    keys = set()
    for seen in ("model name : A", "model name : B", "model name : A\nflags : amx_bf16 avx512_bf16"):
        with monkeypatch.context() as patch:
            patch.setattr(machine, "_cpuinfo", lambda seen=seen: seen)
            assert PictureFolder(tmp_path, SETTING).made_otherwise(one)
            keys.add(machine.maker_key("cpu"))
    assert len(keys) == 3
    assert not mine.made_otherwise(one)


def test_pictures_of_a_gpu_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert machine.maker_key("cuda") == f"{machine.code_key()} on H100"


def test_pictures_that_do_not_say_what_made_them_are_made_otherwise(
    tmp_path: Path, pictures: PictureFolder
) -> None:
    mine = copied(pictures, tmp_path)
    file = mine.folder_of(VARIANTS[1]) / "000001.safetensors"
    save_file(load_file(file), file)
    # Older ones say the code alone.
    older = mine.folder_of(VARIANTS[2]) / "000002.safetensors"
    save_file(load_file(older), older, {"code": machine.code_key()})
    assert [mine.made_otherwise(one) for one in VARIANTS] == [False, True, True]
    assert not mine.missing(VARIANTS[1])


def test_the_key_changes_with_what_can_change_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return machine.code_key.__wrapped__()

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "lab/measure/machine.py"))
    seen = [write("methods/dato.py", "1"), write("methods/dato.py", "2"), write("zoo/__init__.py", "1")]
    # A model has a key of its own.
    for name in ("methods/__pycache__/dato.pyc", "zoo/emoji/unet/weights.safetensors"):
        assert write(name, "1") == seen[-1]
    monkeypatch.setattr(metadata, "version", lambda name: "0")
    seen.append(write("methods/dato.py", "2"))
    assert len(set(seen)) == 4


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"out: .*letter.txt is not allowed, it is a file"):
        PictureFolder(tmp_path / "letter.txt", SETTING)
    with pytest.raises(ValueError, match=r"pictures can't be written, .*txt is not a writable folder"):
        PictureFolder(tmp_path / "letter.txt" / "pictures", SETTING)


def test_a_folder_from_before_model_and_device_were_kept_is_gone_on_with(
    tmp_path: Path, pictures: PictureFolder
) -> None:
    copied(pictures, tmp_path)
    setting, variant = tmp_path / "setting.json", tmp_path / "steps-2" / "variant.json"
    said = json.loads(setting.read_text())
    setting.write_text(json.dumps({k: v for k, v in said.items() if k not in ("model_key", "device")}))
    # Others name what was known to make the same pictures.
    variant.write_text(json.dumps(json.loads(variant.read_text()) | {"alike": ["earlier"]}))
    later = PictureFolder(tmp_path, Setting(**(vars(SETTING) | {"model_key": "some"})))
    assert not any(map(later.missing, VARIANTS))
    assert not any(map(later.made_otherwise, VARIANTS))


def test_a_model_that_was_trained_further_or_configured_otherwise_has_another_key(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return machine.model_key(str(tmp_path))

    assert write("unet/weights.safetensors", bytes(5 * 2**20)) == ""
    keys = [
        write("model_index.json", b'{"_class_name": "Any", "unet": ["diffusers", "Any"], "vae": [1, 2]}')
    ]
    for place in (0, 40 * 5 * 2**14, 5 * 2**20 - 1):
        changed = bytearray(5 * 2**20)
        changed[place] = 1
        keys.append(write("unet/weights.safetensors", changed))
    keys.append(write("unet/config.json", b"{}"))
    weights = tmp_path / "unet" / "weights.safetensors"
    weights.rename(weights.with_name("other.safetensors"))
    keys.append(machine.model_key(str(tmp_path)))
    assert len(set(keys)) == 6
    # A card of the model, or pictures by it, don't count.
    for name in ("README.md", "unet/README.md", "eval/result.json", "eval/steps-50/000000.safetensors"):
        assert write(name, b"hello") == keys[-1]
    assert machine.model_key(str(weights.parent)) == ""
    assert machine.model_key("someone/a-model") == ""
    assert machine.model_key("emoji") not in ("", machine.model_key("cifar10"))


def test_nothing_to_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: 0 is not allowed"):
        PictureFolder(tmp_path, Setting("tiny", ()))


def evaluate(words: Sequence[str], printed: Path) -> None:
    """Run the command, and write what it prints."""
    sys.argv = ["regrow", "eval", *words]
    with printed.open("w") as file, redirect_stdout(file):
        cli.main()


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Starts processes that have their imports behind them, from one that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        # It imports this module from the folder of the tests.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload([__name__])
        forkserver.ensure_running()
    return context


def killed(process: ForkServerProcess, folder: Path, files: str, wanted: int) -> None:
    """Start a process, and kill it as soon as a folder has so many files."""
    process.start()
    end = time.monotonic() + 120
    while len(list(folder.glob(files))) < wanted and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def completed(process: ForkServerProcess) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0


class KilledError(Exception):
    """Stands for a kill."""


def test_a_comparison_killed_anywhere_goes_on_to_the_same_figures(
    tmp_path: Path, pictures: PictureFolder
) -> None:
    mine = copied(pictures, tmp_path)
    undisturbed = compare(mine, VARIANTS, Colours())
    for file in tmp_path.rglob("measured/*"):
        file.unlink()
    left = 4

    def die() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KilledError

    with pytest.raises(KilledError):
        compare(mine, VARIANTS, Colours(), on_shard=die)
    again, third = Colours(), Colours()
    assert compare(mine, VARIANTS, again) == undisturbed
    # The first four of nine shards hold 2 + 2 + 1 + 2 pictures.
    assert again.seen == 15 - 7
    assert compare(mine, VARIANTS, third) == undisturbed
    assert third.seen == 0


def test_figures_of_sets_are_kept_for_one_reference(
    tmp_path: Path, pictures: PictureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pictures.folder, tmp_path, dirs_exist_ok=True)
    mine, noise = PictureFolder(tmp_path, SETTING), torch.Generator().manual_seed(0)
    one, other = (
        Reference(name, *(torch.rand(6, width, generator=noise) for width in (12, 48))) for name in "ab"
    )
    undisturbed = compare(mine, VARIANTS, Colours(), one)

    def refuse(*_: Any) -> NoReturn:
        raise KilledError

    with monkeypatch.context() as patch:
        for name in ("frechet_distance", "kernel_distance", "precision_recall", "inception_score"):
            patch.setattr(f"regrow.lab.measure.evaluate.{name}", refuse)
        assert compare(mine, VARIANTS, Colours(), one) == undisturbed
        with pytest.raises(KilledError):
            compare(mine, VARIANTS, Colours(), other)
    assert all(
        row.fd != before.fd and row.psnr == before.psnr
        for row, before in zip(compare(mine, VARIANTS, Colours(), other), undisturbed, strict=True)
    )


def test_changed_pictures_are_measured_anew(tmp_path: Path, pictures: PictureFolder) -> None:
    shutil.copytree(pictures.folder, tmp_path, dirs_exist_ok=True)
    mine = PictureFolder(tmp_path, SETTING)
    before = compare(mine, VARIANTS, Colours())
    file = mine.folder_of(VARIANTS[1]) / "000000.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"pictures": 255 - tensors["pictures"]}, file)
    seer = Colours()
    after = compare(mine, VARIANTS, seer)
    assert seer.seen == 2
    assert after[1] != before[1]
    assert (after[0], after[2]) == (before[0], before[2])
    # The baseline's pictures count for every other's pairs.
    file = mine.folder_of(VARIANTS[0]) / "000002.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"pictures": 255 - tensors["pictures"]}, file)
    assert compare(mine, VARIANTS, Colours())[2].ssim != before[2].ssim


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["regrow", "eval", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


SMALL = (
    "--methods",
    "steps:2,dato:b1",
    "--steps",
    "2",
    "--prompts",
    "4",
    "--batch",
    "4",
    "--device",
    "cpu",
)


@pytest.mark.slow
def test_the_command_killed_twice_prints_what_an_undisturbed_one_prints(
    tmp_path: Path, forks: ForkServerContext, small_emoji_folder: Path
) -> None:
    words = ("--model", str(small_emoji_folder), "--methods", "steps:2,deepcache:2", "--steps", "2")
    words += ("--prompts", "4", "--batch", "1", "--device", "cpu", "--json", "--out")
    whole, again = tmp_path / "whole.json", tmp_path / "again.json"
    completed(forks.Process(target=evaluate, args=((*words, str(tmp_path / "whole")), whole)))
    shards = "killed/*/*.safetensors"
    kept: dict[Path, int] = {}
    # Once while pictures are made, once while they are compared.
    for files, wanted in ((shards, 3), ("killed/*/measured/*.safetensors", 3)):
        one = forks.Process(target=evaluate, args=((*words, str(tmp_path / "killed")), again))
        killed(one, tmp_path, files, wanted)
        now = {file: file.stat().st_mtime_ns for file in tmp_path.glob("killed/**/*.safetensors")}
        assert now.items() >= kept.items()
        kept = now
        made = len(list(tmp_path.glob(shards)))
        assert wanted <= made < 8 if files == shards else made == 8
    assert len(kept) < 8 + 2 * 8
    completed(forks.Process(target=evaluate, args=((*words, str(tmp_path / "killed")), again)))
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    assert again.read_text() == whole.read_text() != ""


@pytest.mark.usefixtures("small_emoji")
def test_the_command_goes_on_and_prints_what_it_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = ("--out", str(tmp_path / "eval"))
    printed = []
    for _ in range(2):
        assert command(monkeypatch, *SMALL, "--json", *out) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == (tmp_path / "eval" / "result.json").read_text()
    result = json.loads(printed[0])
    assert result["model_key"] == machine.model_key("emoji")
    assert [row["name"] for row in result["rows"]] == ["steps:2", "dato:b1"]
    assert result["rows"][1]["psnr"] > 5
    assert result["rows"][0]["fd"] == pytest.approx(0, abs=1e-6)
    assert [result[name] for name in ("height", "width", "reference_pictures")] == [None] * 3
    assert result["labels"]["fd"] == "FD-EffNet"
    assert result["rows"][1]["inception_score"] >= 1

    # Exported, scored by something else, and shown with a reference of the same pictures.
    folder, scores = tmp_path / "png", tmp_path / "scores.json"
    assert command(monkeypatch, *SMALL, "--json", *out, "--export", str(folder)) == 0
    capsys.readouterr()
    scores.write_text('{"dato:b1": {"ImageReward": 0.5}}')
    kept = tmp_path / "kept.safetensors"
    reference = ("--reference", str(folder / "steps-2"), "--save-reference", str(kept))
    assert command(monkeypatch, *SMALL, *out, *reference, "--scores", str(scores)) == 0
    shown = capsys.readouterr().out
    count = result["prompts"]
    assert shown.startswith(
        f"Only {count} pictures: small differences are chance, and figures of sets (FD-E"
    )
    for text in ("distance", "ImageReward", "0.5000"):
        assert text in shown
    assert "recall" not in shown
    sheet = Image.open(tmp_path / "eval" / "contact-sheet.png")
    assert sheet.width > 2 * 128
    assert sheet.height > count * 128
    assert command(monkeypatch, *SMALL, "--json", *out, "--reference", str(kept)) == 0
    again = json.loads(capsys.readouterr().out)
    count = len(list((folder / "steps-2").glob("*.png")))
    assert (again["reference"], again["reference_pictures"]) == ("steps-2", count)
    assert again["rows"][1]["sfd"] == pytest.approx(result["rows"][1]["sfd"], rel=1e-4)

    # Later code says that it did not make these.
    assert not any(row["made_otherwise"] for row in again["rows"])
    monkeypatch.setattr("regrow.lab.measure.evaluate.maker_key", lambda *_: "later")
    assert command(monkeypatch, *SMALL, "--json", *out) == 0
    seen = capsys.readouterr()
    assert seen.err.count("made by other code") == 1
    assert "pictures of steps:2, dato:b1 in" in seen.err
    assert [row["made_otherwise"] for row in json.loads(seen.out)["rows"]] == [True, True]
    assert command(monkeypatch, *SMALL, *out) == 0
    shown = capsys.readouterr().out
    assert "dato:b1 *" in shown
    assert "* made by other code or packages, or on another machine\n" in shown


def test_what_cannot_be_made_costs_no_look_at_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for i in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    (tmp_path / "classes.txt").write_text("cat\nship\nlion\n")
    monkeypatch.setattr("regrow.lab.cli.evaluate.of_pictures", lambda *_, **__: pytest.fail("looked at"))
    common = ("--model", "cifar10", "--batch", "1", "--device", "cpu", "--reference", str(tmp_path))
    for words, said in (
        (("--methods", "steps:2,sito:d", "--prompts", "4"), "methods: sito:d can't"),
        (
            ("--methods", "steps:2", "--prompts", str(tmp_path / "classes.txt")),
            "prompt: 'lion' is not allowed",
        ),
    ):
        assert command(monkeypatch, *common, *words, "--out", str(tmp_path / "eval")) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(("after", "shows"), [(0.0, True), (2.0, False)])
def test_progress_shows_only_what_takes_long(after: float, shows: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with progress(console, "comparing", 3, after) as advance:
        for _ in range(3):
            time.sleep(0.001)
            advance()
    assert ("comparing" in text.getvalue() and "3/3" in text.getvalue()) == shows
    assert bool(text.getvalue()) == shows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--save-reference", "x.safetensors"), "--save-reference: it needs --reference with a folder"),
        (
            ("--save-reference", "x", "--reference", "docs"),
            "--save-reference: x is not allowed, it must end in",
        ),
        (("--template", "a {}"), "--template, --each, --first: they go with a file"),
        (("--first", "3"), "--template, --each, --first: they go with a file"),
        (("--ablation", "noise"), "--ablation, --methods: only one of them is allowed"),
        (("--methods", "steps:2,sito:a,steps:2"), "--methods: steps:2 is there 2 times"),
        (("--height", "64"), "width: it is missing, give it together with height"),
        (
            ("--methods", "steps:2,sito:0.5:max_downsample=1:feed_forward=false,cat:0.3"),
            "methods: cat:0.3 can't",
        ),
        (("--prompts", "vbench"), "'vbench' is neither a file nor a number nor one of coco, parti"),
        (("--reference", "nowhere"), "nowhere must be a folder or a .safetensors"),
        (("--reference", "nowhere.safetensors"), "nowhere.safetensors: there is no such file"),
        (("--scores", "nowhere.json"), "nowhere.json"),
        (("--features", "inception"), "pip install torch-fidelity"),
        (("--export", "tests"), "export: tests holds other files"),
        (
            ("--save-reference", "Makefile/x.safetensors", "--reference", "docs"),
            "--save-reference: Makefile/x.safetensors can't be written",
        ),
        (("--workers", "2"), "--workers, --address: they go with --engine ray"),
        (("--against", "steps:2"), "--against: 'steps:2' is not allowed, it must be two methods, a comma"),
        (("--against", "sito:b,steps:2"), "against: sito:b is not known; allowed are steps:"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "eval"
    assert command(monkeypatch, *SMALL, "--out", str(out), *words) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("small_emoji")
def test_an_ablation_compares_its_alternatives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(ABLATIONS, "noise", (("steps:2", "steps:3"),))  # type: ignore[arg-type]
    monkeypatch.setattr(
        "regrow.lab.cli.evaluate.ablated", lambda name, steps: ("steps:4", *ablated(name, steps)[1:])
    )
    words = ("--ablation", "noise", "--prompts", "2", "--out", str(tmp_path))
    assert command(monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["steps:4", "steps:2", "steps:3"]
    assert [row["gain"] and row["gain"]["over"] for row in rows] == [None, None, "steps:2"]
    gain = rows[2]["gain"]
    assert gain["psnr"] > 0
    assert f"{gain['psnr']:.2f} ± {gain['error']:.2f}" in shown
    assert "gain: PSNR more than steps:2" in shown


@pytest.mark.usefixtures("small_emoji")
def test_two_methods_are_compared_picture_by_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--methods", "steps:3,steps:2,steps:1", "--prompts", "2", "--out", str(tmp_path))
    assert command(monkeypatch, *words, "--against", "steps:1, steps:2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["gain"] and row["gain"]["over"] for row in result["rows"]] == [None, None, "steps:2"]
    assert result["rows"][2]["gain"]["psnr"] < 0
    assert (result["engine"], result["workers"]) == ("local", None)
    for wrong, said in (
        (("steps:2,steps:1",), "against: steps:1 is not allowed for steps:2, it must come before it"),
        (("steps:1,steps:2", "steps:1,steps:3"), "--against: steps:1 is compared with steps:2, not"),
    ):
        options = (word for pair in wrong for word in ("--against", pair))
        assert command(monkeypatch, *words, *options) == 2
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("small_emoji")
def test_gains_over_several_methods_name_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--methods", "steps:4,steps:3,steps:2,steps:1", "--prompts", "2", "--out", str(tmp_path))
    pairs = ("--against", "steps:2,steps:3", "--against", "steps:1,steps:2")
    assert command(monkeypatch, *words, *pairs) == 0
    shown = capsys.readouterr().out
    assert "gain: PSNR more than steps:3 or steps:2" in shown
    for row in json.loads((tmp_path / "result.json").read_text())["rows"][2:]:
        gain = row["gain"]
        assert f"{gain['psnr']:.2f} ± {gain['error']:.2f} over {gain['over']}" in shown


@pytest.mark.parametrize("pictures", [255, 256])
def test_figures_of_sets_are_shown_of_enough_pictures_and_tables_fit_into_80_columns(
    capsys: pytest.CaptureFixture[str], pictures: int
) -> None:
    names = ("steps:50", "dato:b1:ratio=0.5:alignment=conditional")
    figures = dict.fromkeys(("fd", "sfd", "kd", "precision", "recall", "inception_score"), 123.4)
    rows = [QualityFigures(name, 12.3, 0.5, 0.1, **figures, clip_score=30.0, gain=None) for name in names]
    labels = Labels("effnet", "FD-EffNet", "sFD-EffNet", "KD-EffNet", "IS-EffNet")
    print_rows(
        rows, dict.fromkeys(names, 12.345), "steps:50", labels, {name: {} for name in names}, pictures
    )
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("Only"))
    for name in (labels.fd, "recall", labels.inception_score):
        assert (f" {name}" in printed) == (pictures == 256)
    assert printed.startswith("Only 255 pictures") == (pictures == 255)
