"""Training on scenes: resuming is exact, and the model of one run can be the start of the next."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import train_scenes
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from emoji_scenes import OBJECTS, objects_in
from safetensors.torch import load_file
from test_training import Killed, ticking
from training import Recipe

from regrow import zoo

TINY = Recipe(batch=2, channels=(32, 32, 32), text_width=32, tokens=24)
NAMES = OBJECTS[:3]
MINUTES = {"vae": 1 / 60, "decoder": 1 / 60, "denoiser": 3 / 60}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    icons = {
        name: {"body": f'<circle cx="64" cy="64" r="60" fill="{colour}"/>'}
        for name, colour in zip(NAMES, ("#c80", "#08c", "#888"), strict=True)
    }
    text = json.dumps({"width": 128, "height": 128, "icons": icons}).encode()
    archive = tmp_path_factory.mktemp("data") / "noto.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    return archive


@pytest.fixture(scope="module", autouse=True)
def few_and_small() -> Iterator[None]:
    """Pictures of a quarter of the side, of which a few normalise latents, and a few prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_scenes, "SIDE", 32)
        patch.setattr(train_scenes, "STATISTICS", 4)
        patch.setattr(train_scenes, "PROMPTS", 50)
        yield


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
    assert (index["step"], index["done"]) == (3, True)
    return load_file(out / index["tensors"])


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An undisturbed run, which left a model beside its folder, and its state. Not to be written to."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(data, folder / "run", export_to=folder / "model")


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_and_a_model_starts_the_next(
    data: Path, straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, whole = straight
    model = folder / "model"
    with pytest.raises(Killed):
        train(data, tmp_path / "killed", until=2 * (1 + 1 + 2) + 1)
    resumed = train(data, tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(f"small {NAMES[0]} left on blue", num_inference_steps=2).images[0].size == (128, 128)
    assert objects_in(model) == list(NAMES)
    prompts = zoo.captions_in(model)
    assert len(set(prompts)) == train_scenes.PROMPTS
    with pytest.raises(SystemExit, match="objects was 3, now 2"):
        train_scenes.run(data, folder / "run", MINUTES, TINY, 2)

    train(data, tmp_path / "next", start=model, export_to=tmp_path / "second")
    assert not list((tmp_path / "next").glob("vae*"))
    second = StableDiffusionPipeline.from_pretrained(tmp_path / "second")
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(second.vae.state_dict()[name], value), name
    moved = (second.unet.conv_in.weight.float() - pipe.unet.conv_in.weight.float()).abs().max()
    assert 0 < moved < 0.1


@pytest.mark.slow
def test_an_autoencoder_of_half_the_size_teaches_its_latents(
    data: Path, straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    teacher = AutoencoderTiny(
        encoder_block_out_channels=(48, 48),
        decoder_block_out_channels=(48, 48),
        num_encoder_blocks=(1, 3),
        num_decoder_blocks=(3, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )
    pipe = StableDiffusionPipeline.from_pretrained(straight[0] / "model")
    pipe.vae = teacher
    pipe.save_pretrained(tmp_path / "half")
    train(data, tmp_path / "next", start=tmp_path / "half", export_to=tmp_path / "second")
    second = StableDiffusionPipeline.from_pretrained(tmp_path / "second").vae

    inner = list(second.encoder.layers)[-1].weight, list(teacher.encoder.layers)[-1].weight
    assert 0 < (inner[0] - inner[1]).abs().max() < 0.1

    vae = train_scenes.build_vae()
    train_scenes.inherit(vae, teacher)
    scenes = train_scenes.Scenes(train_scenes.Sprites(train_scenes.read_sprites(data, NAMES, 32)), NAMES)
    stage = train_scenes.vae_stage(vae, scenes, TINY, teacher)
    x = scenes.draw(2, torch.Generator().manual_seed(0))[1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = vae.encoder(x)
        error = (vae.decoder(latents).float() - x).square().mean()
        taught = teacher.encoder(torch.nn.functional.avg_pool2d(x, 2))
        expected = error + (latents.float() - taught.float()).square().mean()
        assert stage.loss(torch.Generator().manual_seed(0)) == pytest.approx(expected.item(), rel=1e-2)
