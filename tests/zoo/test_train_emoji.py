"""The training script: resuming is exact, exports load, both archives read alike."""

import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from emoji_data import read_emoji
from PIL import Image
from safetensors.torch import load_file
from train_emoji import Muon, Recipe, build_scheduler, decay, orthogonalised, read_log, run

TINY = Recipe(batch=2, channels=(32, 32, 32), text_width=32, tokens=6)
# A fake clock ticks one second a step.
MINUTES = {"vae": 2 / 60, "decoder": 2 / 60, "denoiser": 6 / 60}
FOOD = ("Food & Drink",)


class Killed(BaseException):
    """Stands for kill -9: nothing in the script may catch it."""


def ticking(until: int | None = None):
    """A clock of one second a step that kills the run at its `until`-th reading."""
    count = itertools.count()

    def read() -> float:
        now = next(count)
        if until is not None and now >= until:
            raise Killed
        return float(now)

    return read


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


ENTRIES = [
    {"name": "RED APPLE", "image": "1.png", "category": "Food & Drink"},
    {"name": "PIE: WARM", "image": "2.png", "category": "Food & Drink"},
    {"name": "hand, dark", "image": "3-1f3ff.png", "category": "People & Body"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "emoji.zip"
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("captions.json", json.dumps(ENTRIES))
        for seed, entry in enumerate(ENTRIES):
            pack.writestr(f"images/{entry['image']}", picture(seed))
    return path


def train(data: Path, out: Path, export_to: Path | None = None, until: int | None = None) -> None:
    device = torch.device("cpu")
    run(data, out, MINUTES, TINY, FOOD, export_to, device, ticking(until), checkpoint_seconds=3)


def final_state(out: Path) -> dict[str, torch.Tensor]:
    index = json.loads((out / "denoiser.json").read_text())
    assert (index["step"], index["done"]) == (6, True)
    return load_file(out / index["tensors"])


def test_killed_and_resumed_equals_straight_bit_for_bit(data, tmp_path):
    train(data, tmp_path / "straight", tmp_path / "model")
    # Two readings a step: 2 + 2 steps before the denoiser, then its fifth step is cut off.
    with pytest.raises(Killed):
        train(data, tmp_path / "killed", until=2 * (2 + 2 + 4) + 1)
    assert json.loads((tmp_path / "killed" / "denoiser.json").read_text())["step"] == 3
    train(data, tmp_path / "killed")
    straight, resumed = final_state(tmp_path / "straight"), final_state(tmp_path / "killed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert_draws(tmp_path / "model")
    with pytest.raises(SystemExit, match="recipe was"):
        run(data, tmp_path / "straight", MINUTES, Recipe(), FOOD)


def assert_draws(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", num_inference_steps=2).images[0].size == (64, 64)
    assert json.loads((folder / "captions.json").read_text()) == ["red apple", "pie warm"]


def test_zip_and_npm_tarball_read_alike(data, tmp_path):
    tarball = tmp_path / "emoji.tgz"
    with tarfile.open(tarball, "w:gz") as tar:
        files = {f"package/img/google/64/{e['image']}": picture(i) for i, e in enumerate(ENTRIES)}
        for name, content in ({"package/emoji.json": json.dumps(ENTRIES).encode()} | files).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    a, b = read_emoji(data), read_emoji(tarball)
    assert a.captions == b.captions == ["red apple", "pie warm"]
    assert torch.equal(a.pictures, b.pictures)
    with pytest.raises(ValueError, match="known: Food & Drink"):
        a.of(("Drinks",))


def test_orthogonalised_update_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(16, 48), (48, 16)]:
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_reduces_a_quadratic():
    target = torch.eye(8)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def test_learning_rate_falls_over_the_second_half():
    assert [decay(f) for f in (0, 0.49, 0.75, 1)] == [1, 1, 0.5, 0.02]


def test_learning_rate_may_fall_earlier():
    assert [decay(f, 0.2) for f in (0, 0.19, 0.6, 1)] == [1, 1, 0.5, 0.02]


@pytest.mark.parametrize("pure_noise", [False, True])
def test_noise_levels_end_in_pure_noise_if_asked(pure_noise: bool) -> None:
    last = build_scheduler(pure_noise=pure_noise).alphas_cumprod[-1]
    assert (last == 0) == pure_noise


def test_log_cut_short_by_a_kill_is_still_read(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(log) == [{"step": 1}, {"step": 2}]
