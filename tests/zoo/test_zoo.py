"""The bundled models load the plain way, are small, and know their captions."""

import json

import pytest
import torch
from diffusers import DiTPipeline, LattePipeline, StableDiffusionPipeline

from regrow import zoo


def test_plain_from_pretrained_draws_without_arguments():
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path("emoji"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red apple", num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_photographs_are_drawn_by_the_name_of_their_class():
    pipe = DiTPipeline.from_pretrained(zoo.path("cifar10"))
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.labels) == zoo.captions("cifar10")
    made = pipe(pipe.get_label_ids(["ship", "truck"]), num_inference_steps=2, guidance_scale=2.0).images
    assert [image.size for image in made] == [(32, 32)] * 2
    assert (pipe.transformer.config.sample_size // pipe.transformer.config.patch_size) ** 2 == 256


def test_load_is_quiet_and_has_one_precision(capfd):
    pipe = zoo.load("emoji", dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert pipe.safety_checker is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("model", "megabytes"), [("emoji", 30), ("cifar10", 40), ("clips", 6)])
def test_everything_together_stays_small(model, megabytes):
    files = [f for f in zoo.path(model).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < megabytes * 1e6


def test_captions_are_many_and_of_words_that_the_tokenizer_knows():
    captions = zoo.captions("emoji")
    tokenizer = json.loads((zoo.path("emoji") / "tokenizer" / "tokenizer.json").read_text())
    assert len(captions) == len(set(captions)) >= 1000
    words = {word for caption in captions for word in caption.split()}
    assert words <= set(tokenizer["model"]["vocab"])


@pytest.mark.parametrize("model", zoo.MODELS)
def test_no_local_paths_in_the_configs(model):
    for config in zoo.path(model).rglob("*.json"):
        assert "_name_or_path" not in config.read_text()


@pytest.mark.parametrize("model", zoo.MODELS)
def test_every_model_has_its_card_and_its_guidance(model):
    card = (zoo.path(model) / "README.md").read_text()
    assert card.startswith(f"# {model}\n")
    assert f"guidance_scale={zoo.GUIDANCE[model]}" in card


def test_prompts_of_a_model_begin_again_where_they_end(tmp_path):
    assert zoo.prompts_of("cifar10", 12, "")[9:] == ("truck", "airplane", "automobile")
    (tmp_path / "captions.json").write_text('["one", "two"]')
    assert zoo.prompts_of(str(tmp_path), 3, "") == ("one", "two", "one")
    with pytest.raises(ValueError, match="prompts: nowhere has no prompts of its own; give a file"):
        zoo.prompts_of("nowhere", 1, "give a file")


def test_a_folder_goes_before_a_bundled_model_of_its_name(tmp_path, monkeypatch):
    assert zoo.guidance_of("emoji") == zoo.GUIDANCE["emoji"]
    assert zoo.guidance_of("emoji", 1.5) == 1.5
    assert zoo.guidance_of("a/model") is zoo.guidance_of(None) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    # What a command with --out emoji leaves.
    (tmp_path / "emoji" / "setting.json").write_text("{}")
    assert zoo.bundles("emoji")
    assert zoo.from_anywhere("emoji") == "emoji"
    (tmp_path / "emoji" / "model_index.json").write_text("{}")
    assert not zoo.bundles("emoji")
    assert zoo.from_anywhere("emoji") == str(tmp_path / "emoji")
    assert zoo.from_anywhere("a/model") == "a/model"
    assert zoo.guidance_of("emoji") is None
    assert zoo.bundles("cifar10")


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match=r"'emojis' is not bundled; .* emoji, cifar10, clips; did you mean 'emoji'"
    ):
        zoo.path("emojis")


def test_videos_are_drawn_by_the_word_of_their_class():
    pipe = LattePipeline.from_pretrained(zoo.path("clips"))
    pipe.set_progress_bar_config(disable=True)
    options = {"video_length": 8, "height": 32, "width": 32, "clean_caption": False}
    (frames,) = pipe("penguin", num_inference_steps=2, guidance_scale=3.0, **options).frames
    assert [frame.size for frame in frames] == [(32, 32)] * 8
    assert zoo.captions("clips")[0] == "penguin"
