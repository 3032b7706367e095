"""Export pictures for tools that need another environment, and read the scores that they give."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from regrow.files import read_json, read_kept, said
from regrow.lab.measure.atomic_files import check_writable, write_json
from regrow.lab.measure.evaluate import PictureFolder, Setting
from regrow.lab.measure.variants import Variant
from regrow.words import offer, one_line, shown

Scores = Mapping[str, Mapping[str, float]]
"""By the name of a variant, its scores by metric."""

_LIST = "export.json"


def check_export(folder: Path, setting: Setting) -> dict[str, str]:
    """Find the variants that a folder already holds, by their subfolders.

    Raises:
        ValueError: if the folder can't be written, or holds anything but an export of this setting's
            pictures.
    """
    check_writable("export", folder, folder=True)
    if not folder.exists() or not any(folder.iterdir()):
        return {}
    file = folder / _LIST
    if file.is_file():
        held = read_kept(file, "use another folder")
        found = held.get("variants")
        if held.get("setting") == _plain(setting) and isinstance(found, dict):
            return found
    raise ValueError(f"export: {folder} holds other files; use another folder")


def export(
    folder: Path,
    pictures: PictureFolder,
    variants: Sequence[Variant],
    on_shard: Callable[[], None] = lambda: None,
) -> None:
    """Write pictures as PNG, a subfolder for each variant, with their prompts.

    ``export.json`` lists the subfolders with the variants' names. In each, ``000000.png`` and so on are
    the pictures and ``prompts.json`` maps the file names to prompts, as VBench's custom mode takes them.

    Args:
        folder: made if it does not exist.
        pictures: finished pictures.
        variants: variants to write.
        on_shard: called after every shard.

    Raises:
        ValueError: if the folder holds anything else than an export with these pictures' setting.
    """
    held = check_export(folder, pictures.setting)
    prompts = pictures.setting.prompts
    names = [f"{i:06d}.png" for i in range(len(prompts))]
    folder.mkdir(parents=True, exist_ok=True)
    for one in variants:
        held[pictures.folder_of(one).name] = one.name
    listing = {"setting": _plain(pictures.setting), "variants": held}
    write_json(folder / _LIST, listing, ascii_only=False)
    for one in variants:
        to = folder / pictures.folder_of(one).name
        to.mkdir(exist_ok=True)
        write_json(to / "prompts.json", dict(zip(names, prompts, strict=True)), ascii_only=False)
        left = iter(names)
        for number, _ in pictures.setting.shards():
            for picture in pictures.shard(one, number):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(to / next(left))
            on_shard()


def read_scores(files: Iterable[Path], variants: Sequence[Variant]) -> Scores:
    """Read scores that other tools gave the variants, ``{variant: {metric: number}}`` in each file.

    Args:
        files: JSON files.
        variants: variants that are allowed; some may be missing.

    Raises:
        ValueError: if a file has another form, names another variant or a metric twice, or a score is not a
            finite number.
        OSError: if a file can't be read.
    """
    known = [one.name for one in variants]
    found: dict[str, dict[str, float]] = {name: {} for name in known}
    for file in files:
        data, where = read_json(file), said(file)
        if not isinstance(data, dict) or not all(isinstance(own, dict) for own in data.values()):
            raise ValueError(f"scores: {where} must be of the form {{variant: {{metric: number}}}}")
        for name, own in data.items():
            if name not in found:
                raise ValueError(
                    f"scores: {shown(name)} in {where} is not allowed; allowed are "
                    f"{', '.join(known)}{offer(name, known)}"
                )
            for metric, value in own.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not abs(value) <= sys.float_info.max:
                    which = f"{shown(value)} of {name}, {one_line(metric, 100)}"
                    raise ValueError(f"scores: {which} in {where} must be a finite number")
                if metric in found[name]:
                    raise ValueError(f"scores: {shown(metric)} of {name} is given twice, again in {where}")
                found[name][metric] = float(value)
    return found


def _plain(setting: Setting) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(setting)))
    return plain
