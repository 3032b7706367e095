"""Pipelines of public architectures with random weights run without text encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regrow.lab.measure import random_weights
from regrow.lab.measure.bench import bench
from regrow.lab.measure.random_weights import NAMES, random_pipeline
from regrow.lab.measure.sampling import make
from regrow.lab.measure.variants import variant

SMALL = {
    "layers_per_block": 1,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "sample_size": 8,
}
SMALL_XL = SMALL | {"block_out_channels": (8, 8, 8), "transformer_layers_per_block": 1}
PATCHES = {"num_layers": 2, "num_attention_heads": 2, "sample_size": 8}
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}
CHANGES = {
    "sd15": SMALL | {"cross_attention_dim": 24},
    "sd2": SMALL | {"cross_attention_dim": 32},
    "sdxl": SMALL_XL | {"cross_attention_dim": 40},
    "dit-xl-256": PATCHES,
    "dit-xl-512": PATCHES,
    "pixart-alpha-256": PATCHES | {"cross_attention_dim": 144},
    "pixart-alpha-1024": PATCHES | {"cross_attention_dim": 144, "sample_size": 128},
    "pixart-sigma-1024": PATCHES | {"cross_attention_dim": 144},
    "sd3-1024": PATCHES | {"caption_projection_dim": 128, "joint_attention_dim": 32},
    "latte-512": {
        "num_attention_heads": 2,
        "cross_attention_dim": 144,
        "num_layers": 2,
        "video_length": 3,
        "caption_channels": 32,
    },
    "wan-1.3b-480": WAN,
    "wan-14b-480": WAN,
    "flux-1024": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
    },
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public architectures, but for their sizes."""
    unets, transformers = random_weights.CONFIGS, random_weights.TRANSFORMERS
    monkeypatch.setattr(random_weights, "CONFIGS", {n: unets[n] | CHANGES[n] for n in unets})
    smaller = {n: (k, text, config | CHANGES[n]) for n, (k, text, config) in transformers.items()}
    monkeypatch.setattr(random_weights, "TRANSFORMERS", smaller)


# Of the same classes as another one here.
ALIKE = ("sd2", "dit-xl-512", "pixart-alpha-256", "wan-14b-480")


def options(name: str) -> dict[str, Any]:
    """What its pictures or videos are asked for with."""
    size = {} if name.startswith("dit") else {"height": 64, "width": 128}
    return {"guidance": 5.0, **size, **({"frames": 5} if name.startswith("wan") else {})}


def prompts(name: str) -> list[str]:
    """One that it takes."""
    return ["1" if name.startswith("dit") else "a penguin"]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_makes_latents_and_saves_something(name: str) -> None:
    pipe = random_pipeline(name, dtype=torch.bfloat16)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert denoiser.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    if name in ALIKE:
        assert make(pipe, prompts(name), steps=1, **options(name)).seconds > 0
        return
    saves = variant("sito:d" if hasattr(pipe, "unet") else "deepcache:2", 2)
    rows = bench(pipe, [variant("steps:2", 2), saves], prompts(name), rounds=1, **options(name))
    assert [row.error for row in rows] == [None, None]
    assert rows[1].macs < rows[0].macs


def test_pictures_have_no_frames() -> None:
    with pytest.raises(ValueError, match="frames: StableDiffusionPipeline makes pictures"):
        bench(random_pipeline("sd15"), [variant("steps:2", 2)], ["a penguin"], frames=5)
    with pytest.raises(ValueError, match="frames: 0 is not allowed, it must be >= 1"):
        bench(random_pipeline("wan-1.3b-480"), [variant("steps:2", 2)], ["a penguin"], frames=0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="arch: 'sd9' is not known"):
        random_pipeline("sd9")
