"""Training on scenes: resuming is exact, and the model of one run can be the start of the next."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import train_scenes
from diffusers import StableDiffusionPipeline
from emoji_scenes import objects_in
from safetensors.torch import load_file
from test_training import Killed, ticking
from training import Recipe

from regrow import zoo

TINY = Recipe(batch=2, channels=(32, 32, 32), text_width=32, tokens=24)
MINUTES = {"vae": 2 / 60, "decoder": 2 / 60, "denoiser": 4 / 60}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    icons = {
        name: {"body": f'<circle cx="64" cy="64" r="60" fill="{colour}"/>'}
        for name, colour in (("cat", "#c80"), ("dog", "#08c"), ("penguin", "#888"))
    }
    text = json.dumps({"width": 128, "height": 128, "icons": icons}).encode()
    archive = tmp_path_factory.mktemp("data") / "noto.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    return archive


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are normalised by a few pictures."""
    monkeypatch.setattr(train_scenes, "STATISTICS", 4)


def train(
    data: Path,
    out: Path,
    *,
    start: Path | None = None,
    export_to: Path | None = None,
    until: int | None = None,
) -> dict[str, torch.Tensor]:
    """The state after a run."""
    train_scenes.run(
        data,
        out,
        MINUTES,
        TINY,
        3,
        start,
        export_to,
        torch.device("cpu"),
        ticking(until),
        checkpoint_seconds=2,
    )
    index = json.loads((out / "denoiser.json").read_text())
    assert (index["step"], index["done"]) == (4, True)
    return load_file(out / index["tensors"])


def test_killed_and_resumed_equals_straight_and_a_model_starts_the_next(data: Path, tmp_path: Path) -> None:
    straight = train(data, tmp_path / "straight", export_to=tmp_path / "model")
    with pytest.raises(Killed):
        train(data, tmp_path / "killed", until=2 * (2 + 2 + 3) + 1)
    resumed = train(data, tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("small cat left on blue", num_inference_steps=2).images[0].size == (128, 128)
    assert objects_in(tmp_path / "model") == ["cat", "dog", "penguin"]
    prompts = zoo.captions_in(tmp_path / "model")
    assert len(set(prompts)) == train_scenes.PROMPTS
    with pytest.raises(SystemExit, match="objects was 3, now 2"):
        train_scenes.run(data, tmp_path / "straight", MINUTES, TINY, 2)

    train(data, tmp_path / "next", start=tmp_path / "model", export_to=tmp_path / "second")
    assert not list((tmp_path / "next").glob("vae*"))
    second = StableDiffusionPipeline.from_pretrained(tmp_path / "second")
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(second.vae.state_dict()[name], value), name
    moved = (second.unet.conv_in.weight.float() - pipe.unet.conv_in.weight.float()).abs().max()
    assert 0 < moved < 0.1
