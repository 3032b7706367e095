"""The bundled models: small, complete pipelines without a download."""

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
"""Suitable guidance scale of each bundled model."""


def bundles(model: str | None) -> bool:
    """Whether a name means a bundled model, because no folder of that name holds a pipeline."""
    return model in MODELS and not (Path(model) / "model_index.json").is_file()


def from_anywhere(model: str) -> str:
    """Make a folder's path absolute, for processes with other working directories; keep other names."""
    return model if bundles(model) or not Path(model).exists() else str(Path(model).resolve())


def guidance_of(model: str | None, guidance: float | None = None) -> float | None:
    """Choose the guidance scale: the given one, or a bundled model's; None for the pipeline's default."""
    return GUIDANCE[model] if guidance is None and model and bundles(model) else guidance


def path(name: str) -> Path:
    """Find the folder of a bundled model, for `from_pretrained`."""
    if name not in MODELS:
        raise ValueError(
            f"model: {shown(name)} is not bundled; use one of {', '.join(MODELS)}{offer(name, MODELS)}"
        )
    return Path(str(resources.files("regrow.zoo") / name))


def captions(name: str) -> list[str]:
    """List the captions that a bundled model can draw."""
    return captions_in(path(name))


def captions_in(folder: Path) -> list[str]:
    """Read the captions that a model of this kind can draw, from its folder."""
    file = folder / "captions.json"
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found) or not found:
        raise FileError(f"{said(file)}: it must be a list of texts")
    return found


def prompts_of(model: str, count: int, hint: str) -> tuple[str, ...]:
    """List prompts of a model's own, repeated from the first if there are too few.

    Args:
        model: name of a bundled model, or a folder with a ``captions.json``.
        count: number of prompts.
        hint: advice in the error for a model without prompts.

    Raises:
        ValueError: if the model has no prompts of its own.
    """
    folder = path(model) if bundles(model) else Path(model)
    if not (folder / "captions.json").exists():
        raise ValueError(f"prompts: {model} has no prompts of its own; {hint}")
    return tuple(islice(cycle(captions_in(folder)), count))


def load(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """Load a bundled model as a pipeline, with progress bars off."""
    return load_from(path(name), dtype, device)


def load_from(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """Load a pipeline from a folder, without the libraries' loading bars and remarks."""
    with _quiet():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' loading bars and remarks off the screen inside this context."""
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
