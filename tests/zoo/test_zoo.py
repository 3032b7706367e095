"""The bundled model loads the plain way, is small, and knows its captions."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from regrow import zoo


def test_plain_from_pretrained_draws_without_arguments():
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path("emoji"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red apple", num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_load_is_quiet_and_has_one_precision(capfd):
    pipe = zoo.load("emoji", dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert pipe.safety_checker is None
    assert capfd.readouterr().err == ""


def test_everything_together_stays_small():
    files = [f for f in zoo.path("emoji").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 30e6


def test_captions_are_many_and_of_words_that_the_tokenizer_knows():
    captions = zoo.captions("emoji")
    tokenizer = json.loads((zoo.path("emoji") / "tokenizer" / "tokenizer.json").read_text())
    assert len(captions) == len(set(captions)) >= 1000
    words = {word for caption in captions for word in caption.split()}
    assert words <= set(tokenizer["model"]["vocab"])


def test_no_local_paths_in_the_configs():
    for config in zoo.path("emoji").rglob("*.json"):
        assert "_name_or_path" not in config.read_text()


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no bundled model 'emojis'; there is: emoji"):
        zoo.path("emojis")
