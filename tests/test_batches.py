"""A picture is the same alone and anywhere in a batch, also where chance has a part in it.

In double precision: products of batches of another size differ in their last bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pipelines
import pytest
import torch
import transformer_pipelines
from torch import Tensor

import regrow
from regrow import ATEDM, FULL, BaseChoice, CATPruning, DaTo, Schedule, SiTo, ToCa, ToMeSD
from regrow.methods.dato import Score

PLAN = Schedule(depth=(FULL, FULL, FULL, 1), ratio=(0.6,) * 4)

OF_UNETS: dict[str, Any] = {
    **{f"sito-{base.value}": SiTo(ratio=0.6, base=base, max_downsample=2) for base in BaseChoice},
    "tome": ToMeSD(ratio=0.6, max_downsample=2),
    "dato": DaTo(schedule=PLAN),
    "dato-random": DaTo(schedule=PLAN, score=Score.RANDOM),
    "dato-noise": DaTo(schedule=PLAN, score_noise=0.1),
    "dato-flip": DaTo(schedule=PLAN, sign_flip=True, from_all_kept=True),
    "atedm": ATEDM(early=0.0, max_downsample=2),
}

OF_TRANSFORMERS: dict[str, Any] = {
    "cat": CATPruning(alpha=0.4, t0=2, clusters=5),
    "cat-released": CATPruning.preset("released", alpha=0.4, t0=2, clusters=5),
    "atedm": ATEDM.preset("reuse", early=2),
    "toca": ToCa(ratio=0.5),
}


@lru_cache(maxsize=1)
def unet() -> Any:
    """Of two levels, both with attention."""
    down, up = (pipelines.CROSS_DOWN,) * 2, (pipelines.CROSS_UP,) * 2
    return pipelines.unet(down_block_types=down, up_block_types=up, layers_per_block=1).double()


def drawn(picture: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(picture)).double()


@torch.no_grad()
def latents(name: str, pictures: tuple[int, ...], guided: bool) -> Tensor:
    """The latents of these pictures, made in one batch."""
    x = torch.stack([drawn(n, 4, 8, 8) for n in pictures])
    text = torch.stack([drawn(100 + n, 7, pipelines.TEXT) for n in pictures])
    if guided:
        text = torch.cat([drawn(99, 7, pipelines.TEXT).expand_as(text), text])
    with regrow.apply(unet(), OF_UNETS[name]) as run, run.generation(4) as clock:
        for timestep in (900, 600, 300, 10):
            sample = torch.cat([x, x]) if guided else x
            noise = unet()(sample, torch.tensor(timestep), encoder_hidden_states=text).sample
            if guided:
                without, noise = noise.chunk(2)
                noise = without + 3 * (noise - without)
            x = x - 0.3 * noise
            clock.step()
    return x


@pytest.mark.parametrize("name", OF_UNETS)
@pytest.mark.parametrize(("pictures", "guided"), [((0, 1, 2), False), ((3, 0), True)])
def test_a_picture_of_a_unet_is_the_same_alone_and_in_a_batch(
    name: str, pictures: tuple[int, ...], guided: bool
) -> None:
    together = latents(name, pictures, guided)
    for place in (0, len(pictures) - 1):
        own = latents(name, pictures[place : place + 1], guided)[0]
        assert float((together[place] - own).abs().max()) <= 1e-12


@lru_cache
def transformer(kind: str) -> Any:
    pipe = transformer_pipelines.sd3(layers=4) if kind == "sd3" else transformer_pipelines.dit(num_layers=4)
    return pipe.to(torch.float64)


def made(kind: str, config: Any, pictures: tuple[int, ...], guidance: float) -> Tensor:
    """As `latents`, by the pipeline of a transformer."""
    pipe = transformer(kind)
    words: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(n) for n in pictures],
        "guidance_scale": guidance,
        "num_inference_steps": 4,
        "output_type": "np" if kind == "dit" else "latent",
    }
    if kind == "dit":
        words["class_labels"] = [1 + n for n in pictures]
    else:
        words |= {"prompt": [f"a penguin {'abcd'[n]}" for n in pictures], "height": 32, "width": 32}
    with regrow.apply(pipe, config):
        return torch.as_tensor(pipe(**words).images)


@pytest.mark.parametrize("kind", ["dit", "sd3"])
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_of_a_transformer_is_the_same_alone_and_in_a_batch(
    kind: str, name: str, guidance: float
) -> None:
    config = OF_TRANSFORMERS[name]
    together = made(kind, config, (0, 1, 2), guidance)
    for place in (0, 2):
        own = made(kind, config, (place,), guidance)[0]
        # Arrays of pictures are float32.
        assert float((together[place] - own).abs().max()) <= (1e-6 if kind == "dit" else 1e-10)
