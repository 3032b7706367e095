"""Compare pictures: distances and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from regrow.lab.measure.features import EfficientNetFeatures, feature_distance


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Compute the peak signal-to-noise ratio of two pictures in dB; infinite if they are equal.

    Raises:
        ValueError: if their sizes differ.
    """
    if a.size != b.size:
        raise ValueError(f"b: size {b.size} is not allowed, it must be the size of a, {a.size}")
    error = np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)
    mean = float((error**2).mean())
    return float("inf") if mean == 0 else 10 * float(np.log10(255**2 / mean))


def mean_psnr(pairs: Iterable[tuple[Image.Image, Image.Image]]) -> float | None:
    """Average the PSNR of the pairs that differ; None if none does."""
    values = [value for a, b in pairs if math.isfinite(value := psnr(a, b))]
    return sum(values) / len(values) if values else None


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Convert a picture to uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def on_white(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB; transparent parts become white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Convert values ``(3, H, W)`` in [0, 1] to a picture."""
    return Image.fromarray((pixels.permute(1, 2, 0).float().numpy() * 255).round().astype(np.uint8))


def feature_distances(a: Sequence[Image.Image], *others: Sequence[Image.Image]) -> list[list[float]]:
    """Measure how different pairs of pictures are for an ImageNet classifier.

    Args:
        a: pictures of one size.
        others: each as many pictures, of the same size.

    Returns:
        for each of ``others``, 1 - cosine of the EfficientNet-Lite0 features (1280-d) of its pictures and
        those of ``a``, 0 for equal pictures.

    Raises:
        MissingWeightsError: if the extractor is not installed (extra ``measure``).
    """
    extract = EfficientNetFeatures()
    one, *rest = (
        extract(torch.stack([to_tensor(picture) for picture in side]) / 255) for side in (a, *others)
    )
    return [feature_distance(one, other).tolist() for other in rest]


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    side: int = 128,
) -> Image.Image:
    """Arrange pictures in a grid with a label over each column and beside each row.

    Args:
        rows: the pictures, row by row, as many in each row as there are ``columns``.
        columns: text over each column; line breaks are kept.
        labels: text beside each row.
        side: width of a picture in the sheet, in pixels.

    Raises:
        ValueError: if rows and labels do not fit together.
    """
    if len(rows) != len(labels) or any(len(row) != len(columns) for row in rows):
        raise ValueError("rows: each row must have one label and one picture for each column")
    font = ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin, gap = 10, 8
    left = 2 * margin + max(int(measure.textlength(text, font=font)) for text in labels)
    head = 2 * margin + 17 * max(text.count("\n") + 1 for text in columns)
    first = rows[0][0]
    height = round(side * first.height / first.width)
    size = (left + (side + gap) * len(columns), head + (height + gap) * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(columns):
        centre = left + c * (side + gap) + side / 2
        draw.multiline_text((centre, margin), text, "black", font, anchor="ma", align="center")
    for r, (row, text) in enumerate(zip(rows, labels, strict=True)):
        top = head + r * (height + gap)
        draw.text((left - margin, top + height / 2), text, "black", font, anchor="rm")
        for c, picture in enumerate(row):
            resized = picture.convert("RGB").resize((side, height), Image.Resampling.LANCZOS)
            sheet.paste(resized, (left + c * (side + gap), top))
    return sheet
