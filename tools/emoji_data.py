"""Read the public emoji pictures (npm package emoji-datasource-google 16.0.0) with their names."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CATEGORIES = ("Food & Drink", "Animals & Nature")
_NPM_IMAGES = "package/img/google/64/"
_SKIN_TONE = re.compile(r"1f3f[b-f]")


@dataclass(frozen=True)
class Emoji:
    """One picture file, its caption and its category."""

    caption: str
    category: str
    image: str


@dataclass(frozen=True)
class EmojiSet:
    """Emoji with their pictures on white: `pictures` is uint8, (N, 3, H, W)."""

    emoji: list[Emoji]
    pictures: torch.Tensor

    def __len__(self) -> int:
        return len(self.emoji)

    @property
    def captions(self) -> list[str]:
        """The captions in the order of the pictures."""
        return [e.caption for e in self.emoji]

    def of(self, categories: tuple[str, ...]) -> EmojiSet:
        """The emoji of these categories; a ValueError names the known ones."""
        known = sorted({e.category for e in self.emoji})
        unknown = [c for c in categories if c not in known]
        if unknown:
            raise ValueError(f"unknown categories {unknown}; known: {', '.join(known)}")
        keep = [i for i, e in enumerate(self.emoji) if e.category in categories]
        return EmojiSet([self.emoji[i] for i in keep], self.pictures[keep])


def caption_of(name: str) -> str:
    """The caption a model is trained on, from an emoji's official name."""
    return name.lower().replace(":", "")


def read_emoji(path: Path) -> EmojiSet:
    """All base emoji (no skin-tone variants) of a zip with captions.json or of the npm tarball."""
    with _archive(path) as (index, read):
        entries = [
            (Emoji(caption_of(e["name"]), e["category"], e["image"]), read(e["image"]))
            for e in index
            if not _SKIN_TONE.search(e["image"])
        ]
    pairs = [(emoji, data) for emoji, data in entries if data is not None]
    if not pairs:
        raise ValueError(f"{path}: no emoji pictures inside")
    return EmojiSet([e for e, _ in pairs], torch.stack([on_white(data) for _, data in pairs]))


def on_white(png: bytes) -> torch.Tensor:
    """A PNG with transparency as uint8 (3, H, W) on a white ground."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    flat = np.array(Image.alpha_composite(ground, picture).convert("RGB"))
    return torch.from_numpy(flat).permute(2, 0, 1).contiguous()


@contextmanager
def _archive(path: Path) -> Iterator[tuple[list[dict], Callable[[str], bytes | None]]]:
    """The index of names and a reader of pictures by file name (None when it is not there)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as pack:
            files = set(pack.namelist())

            def read(name: str) -> bytes | None:
                inside = f"images/{name}"
                return pack.read(inside) if inside in files else None

            yield json.loads(pack.read("captions.json")), read
        return
    with tarfile.open(path) as tar:
        wanted = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name == "package/emoji.json" or member.name.startswith(_NPM_IMAGES)
        }
        yield (
            json.loads(wanted["package/emoji.json"]),
            lambda name: wanted.get(_NPM_IMAGES + name),
        )
