"""Videos as files: mp4, or an animated picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ANIMATED = (".gif", ".webp", ".png")
"""Endings of pictures that hold several frames."""
FORMATS = (".mp4", *ANIMATED)
# Of which the encoder needs sides to be multiples.
EVEN = 2

Clip = list[Image.Image]
"""The frames of a video; a picture is one frame."""


def check_format(file: Path) -> None:
    """Refuse a name of a video that can't be written.

    Raises:
        ValueError: naming its ending, or what is not installed.
    """
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"--out: {file} is not allowed, a video must end in {', '.join(FORMATS)}")
    missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if file.suffix.lower() == ".mp4" and missing:
        raise ValueError(
            f"--out: {file} needs {' and '.join(missing)}: pip install 'regrow[video]'; "
            f"{', '.join(ANIMATED)} need nothing"
        )


def save_clip(file: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Write the frames of a video, or a picture.

    Args:
        file: its ending is one of `FORMATS`; of a single frame, any that a picture may have.
        frames: of one size, at least one.
        fps: frames a second.
    """
    if file.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video

        export_to_video(list(frames), str(file), fps=fps, macro_block_size=EVEN)
        return
    if len(frames) == 1:
        frames[0].save(file)
        return
    animated: dict[str, Any] = {"save_all": True, "append_images": list(frames[1:]), "loop": 0}
    # Webp's own default loses what is small.
    animated |= {"lossless": True} if file.suffix.lower() == ".webp" else {}
    frames[0].save(file, duration=1000 / fps, **animated)


def clips_of(made: Any) -> list[Clip]:
    """What a pipeline made, as frames: of pictures one each."""
    return [_frames(one) for one in made]


def _frames(one: Any) -> Clip:
    """The frames of a picture or of a video ``(F, H, W, 3)`` in [0, 1]."""
    if isinstance(one, Image.Image):
        return [one]
    if isinstance(one, np.ndarray):
        return [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in one]
    return list(one)
