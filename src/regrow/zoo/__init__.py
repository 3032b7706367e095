"""The bundled models: small, complete pipelines that need no download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from regrow.files import FileError, read_json, said
from regrow.words import offer, shown

MODELS = ("emoji", "cifar10", "clips")
GUIDANCE = {"emoji": 3.0, "cifar10": 2.0, "clips": 3.0}
"""Guidance scale that suits a bundled model."""


def bundles(model: str | None) -> bool:
    """Whether a model of the package is meant: by its name, where no folder of that name holds another."""
    return model in MODELS and not (Path(model) / "model_index.json").is_file()


def from_anywhere(model: str) -> str:
    """A model as processes with other working directories find it: a folder by its absolute path."""
    return model if bundles(model) or not Path(model).exists() else str(Path(model).resolve())


def guidance_of(model: str | None, guidance: float | None = None) -> float | None:
    """The guidance scale that was asked for, or that suits a bundled model; None for the pipeline's own."""
    return GUIDANCE[model] if guidance is None and model and bundles(model) else guidance


def path(name: str) -> Path:
    """The folder of a bundled model, as `from_pretrained` takes it."""
    if name not in MODELS:
        raise ValueError(
            f"model: {shown(name)} is not bundled; bundled are {', '.join(MODELS)}{offer(name, MODELS)}"
        )
    return Path(str(resources.files("regrow.zoo") / name))


def captions(name: str) -> list[str]:
    """Captions that a bundled model can draw."""
    return captions_in(path(name))


def captions_in(folder: Path) -> list[str]:
    """Captions that a model of this kind can draw, from its folder."""
    file = folder / "captions.json"
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found) or not found:
        raise FileError(f"{said(file)}: it must be a list of texts")
    return found


def prompts_of(model: str, count: int, instead: str) -> tuple[str, ...]:
    """So many prompts of a model's own, again from the first if there are fewer.

    Args:
        model: bundled by name, or a folder, whose ``captions.json`` has them.
        count: how many.
        instead: what to say where there are none.

    Raises:
        ValueError: if the model has no prompts of its own.
    """
    folder = path(model) if bundles(model) else Path(model)
    if not (folder / "captions.json").exists():
        raise ValueError(f"prompts: {model} has no prompts of its own; {instead}")
    return tuple(islice(cycle(captions_in(folder)), count))


def load(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A bundled model as a pipeline, with progress bars off."""
    return load_from(path(name), dtype, device)


def load_from(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A pipeline from a folder, without the libraries' loading bars and remarks."""
    with _quiet():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' loading bars and remarks off the screen, for as long as this lasts."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()
