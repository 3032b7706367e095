"""Read and write videos: mp4, an animated picture, or a folder of frames."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from regrow.lab.measure.images import on_white

ANIMATED = (".gif", ".webp", ".png")
"""Endings of pictures that hold several frames."""
FORMATS = (".mp4", *ANIMATED)
READ = (".mp4", ".gif", ".webp")
"""Endings of videos that can be read."""
FRAMES = (".png", ".jpg", ".jpeg", ".bmp")
"""Endings of frames in a folder."""
# The encoder needs sides that are multiples of this.
EVEN = 2

Clip = list[Image.Image]
"""The frames of a video; a picture is one frame."""


def check_format(file: Path) -> None:
    """Refuse the name of a video that can't be written.

    Raises:
        ValueError: naming its ending, or the missing package.
    """
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"--out: {file} is not allowed, a video must end in {', '.join(FORMATS)}")
    check_codec("--out", file, ANIMATED)


def check_codec(option: str, file: Path, others: Sequence[str]) -> None:
    """Refuse an mp4 if the packages that read and write it are not installed.

    Args:
        option: name of the option with the file.
        file: file of a video.
        others: endings that need no package.

    Raises:
        ValueError: naming the missing packages.
    """
    missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if file.suffix.lower() == ".mp4" and missing:
        raise ValueError(
            f"{option}: {file} needs {' and '.join(missing)}; run pip install 'regrow[video]', or use "
            f"{' or '.join(others)}, which need no package"
        )


def save_clip(file: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Write the frames of a video, or a picture.

    Args:
        file: its ending is one of `FORMATS`; for a single frame, any ending of a picture.
        frames: at least one frame, all of one size.
        fps: frames per second.
    """
    if file.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video

        export_to_video(list(frames), str(file), fps=fps, macro_block_size=EVEN)
        return
    if len(frames) == 1:
        frames[0].save(file)
        return
    animated: dict[str, Any] = {"save_all": True, "append_images": list(frames[1:]), "loop": 0}
    # WebP's default quality loses small details.
    animated |= {"lossless": True} if file.suffix.lower() == ".webp" else {}
    frames[0].save(file, duration=1000 / fps, **animated)


def find_clips(folder: Path) -> list[Path]:
    """Find the videos in a folder and all folders in it: files of `READ`, and folders with frames."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    videos = {file for file in files if file.suffix.lower() in READ}
    return sorted(videos | {file.parent for file in files if _is_frame(file) and file.parent != folder})


def read_clip(video: Path, count: int) -> Clip:
    """Read the first frames of a video, in RGB on white.

    Args:
        video: one that `find_clips` finds; frames of a folder are in the order of their names.
        count: number of frames.

    Raises:
        OSError: if it can't be read.
        ValueError: if it has fewer frames.
    """
    frames = list(islice(_read(video), count))
    if len(frames) < count:
        raise ValueError(
            f"--data: {video} is not allowed, it must have at least {count} frames; it has {len(frames)}"
        )
    return frames


def _read(video: Path) -> Iterator[Image.Image]:
    if video.is_dir():
        for file in sorted(filter(_is_frame, video.iterdir())):
            with Image.open(file) as picture:
                yield on_white(picture)
    elif video.suffix.lower() == ".mp4":
        from imageio.v3 import imiter

        yield from (Image.fromarray(frame) for frame in imiter(video, plugin="FFMPEG"))
    else:
        with Image.open(video) as picture:
            yield from (on_white(frame) for frame in ImageSequence.Iterator(picture))


def _is_frame(file: Path) -> bool:
    return file.suffix.lower() in FRAMES


def clips_of(made: Any) -> list[Clip]:
    """Convert a pipeline's output to clips; a picture is a clip of one frame."""
    return [_frames(one) for one in made]


def _frames(one: Any) -> Clip:
    """Convert a picture, or a video ``(F, H, W, 3)`` in [0, 1], to frames."""
    if isinstance(one, Image.Image):
        return [one]
    if isinstance(one, np.ndarray):
        return [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in one]
    return list(one)
