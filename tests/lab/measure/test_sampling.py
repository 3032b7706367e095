"""What pipelines are asked for, and what they say of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_pipelines
from diffusers import DDPMScheduler, LattePipeline
from diffusers.utils import logging
from torch import Tensor

from regrow.lab.measure import sampling


class Listening(LattePipeline):  # type: ignore[misc]
    """Keeps what texts are cleaned by."""

    def _text_preprocessing(self, text: Any, clean_caption: bool = False) -> Any:
        self.cleaned = clean_caption
        return super()._text_preprocessing(text, clean_caption=clean_caption)


@pytest.mark.parametrize("missing", ["bs4", "ftfy", None])
def test_texts_are_cleaned_only_by_what_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str | None
) -> None:
    monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda name: None if name == missing else 1)
    pipe = transformer_pipelines.latte_of_texts()
    pipe = Listening(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    remarks = logging.get_logger(LattePipeline.__module__)
    monkeypatch.setattr(remarks, "level", logging.WARNING)
    remarks.addHandler(caplog.handler)
    try:
        sampling.make(pipe, ["a penguin"], steps=1, guidance=2.0, latents=True)
    finally:
        remarks.removeHandler(caplog.handler)
    assert pipe.cleaned == (missing is None)
    assert missing is None or not caplog.records


def test_what_is_asked_for_by_name_is_handed_on() -> None:
    pipe = Listening(**transformer_pipelines.latte_of_texts().components)
    pipe.set_progress_bar_config(disable=True)
    sampling.make(pipe, ["a penguin"], steps=1, latents=True, more={"clean_caption": True})
    assert pipe.cleaned


def test_noise_of_the_global_generator_comes_from_the_seed_and_that_generator_goes_on_as_before() -> None:
    """DiT's pipeline gives its generators to no sampler; DDPM draws noise in each step."""
    pipe = transformer_pipelines.dit()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def pictures(seed: int) -> Tensor:
        made = sampling.make(pipe, ("1", "2"), steps=3, seed=seed, more={"output_type": "np"})
        return torch.as_tensor(made.images)

    before = torch.random.get_rng_state()
    first = pictures(7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(pictures(7), first)
    assert not torch.equal(pictures(8), first)
