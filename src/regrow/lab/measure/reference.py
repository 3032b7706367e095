"""Features of real pictures, from a folder, or from a file of an earlier run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from regrow.files import said
from regrow.lab.measure.atomic_files import opened_kept, write_whole
from regrow.lab.measure.extractors import Extractor
from regrow.lab.measure.images import on_white, to_tensor
from regrow.words import shown

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMAT = "regrow-reference"


@dataclass(frozen=True)
class Reference:
    """Features of the data that generated pictures are compared with.

    Args:
        name: name of the data, for captions of tables.
        pooled: pooled features ``(N, C)``.
        spatial: spatial features ``(N, S)``.
    """

    name: str
    pooled: Tensor
    spatial: Tensor

    def save(self, file: Path, extractor: Extractor) -> None:
        """Save them as a ``.safetensors``, with the name of their extractor."""
        tensors = {"pooled": self.pooled, "spatial": self.spatial}
        metadata = {"format": _FORMAT, "version": "1", "features": extractor.name, "name": self.name}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, partial(save_file, tensors, metadata=metadata))


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures of a folder and the folders in it, sorted.

    Raises:
        ValueError: if there are fewer than four: precision and recall need three neighbours.
        OSError: if the folder can't be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"reference: {said(folder)} must be a folder or a .safetensors")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS)
    if len(files) < 4:
        raise ValueError(f"reference: {said(folder)} holds {len(files)} pictures, it must hold >= 4")
    return files


def of_pictures(
    name: str, files: list[Path], extractor: Extractor, on_picture: Callable[[], None] = lambda: None
) -> Reference:
    """Compute the features of pictures of any sizes; transparent parts become white.

    Args:
        name: name of the data.
        files: the pictures.
        extractor: computes the features, one picture at a time.
        on_picture: called after each picture.

    Raises:
        OSError: if a file is not a picture.
    """
    pooled, spatial = [], []
    for file in files:
        try:
            with Image.open(file) as picture:
                seen = on_white(picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow's error does not name the broken file.
            raise OSError(f"reference: {said(file)} can't be read as a picture") from error
        features = extractor(to_tensor(seen)[None].float() / 255)
        pooled.append(features.pooled)
        spatial.append(features.spatial)
        on_picture()
    return Reference(name, torch.cat(pooled), torch.cat(spatial))


def load(file: Path, extractor: Extractor) -> Reference:
    """Load features that `Reference.save` wrote.

    Raises:
        ValueError: if the file is not such a file, or of another extractor.
        OSError: if it can't be read.
    """
    with opened_kept(file, "write it by --save-reference") as opened:
        metadata = opened.metadata() or {}
        of = metadata.get("features")
        if (metadata.get("format"), metadata.get("version")) != (_FORMAT, "1") or of is None:
            raise ValueError(f"reference: {said(file)} was not written by --save-reference")
        if of != extractor.name:
            raise ValueError(
                f"reference: {said(file)} holds features of {shown(of)}, it must be those of "
                f"{extractor.name!r}"
            )
        name = metadata.get("name", file.stem)
        return Reference(name, opened.get_tensor("pooled"), opened.get_tensor("spatial"))
