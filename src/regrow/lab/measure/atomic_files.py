"""Files that are complete or do not exist, and tensors that are computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regrow.files import check_file, damaged

REMOVE = "remove it, and it is made again"
"""Advice about a damaged file that regrow kept."""
# Largest kept file, in bytes: shards of pictures may be large.
_MOST = 1 << 36


def write_whole(file: Path, write: Callable[[Path], Any], writer: str = "") -> None:
    """Write a file so that it is complete or does not exist, even after a power failure.

    Args:
        file: the file.
        write: writes the file under the temporary name that it is given.
        writer: name of the writer, if several may write the same file at the same time.
    """
    unfinished = file.with_name(f"{file.name}{writer}.partial")
    try:
        write(unfinished)
        _to_disk(unfinished)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _to_disk(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write a text as `write_whole` does."""
    write_whole(file, lambda to: to.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Any, *, ascii_only: bool = True) -> None:
    """Write plain data as `write_whole` does.

    Args:
        file: the file.
        value: plain data that JSON can hold.
        ascii_only: escape all other characters.
    """
    write_text(file, json.dumps(value, indent=1, ensure_ascii=ascii_only) + "\n")


def _to_disk(place: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def opened_kept(file: Path, hint: str = REMOVE) -> Iterator[Any]:
    """Open a ``.safetensors`` that regrow kept, by `safe_open`.

    Args:
        file: the file.
        hint: advice in the error for a damaged file.

    Raises:
        FileError: naming it, if it is damaged or lacks a tensor.
        OSError: if it can't be read.
    """
    check_file(file, _MOST)
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise damaged(file, hint) from error


def check_writable(name: str, place: Path, *, folder: bool = False) -> None:
    """Check that a file or folder can be written, without making it.

    Args:
        name: name of the option.
        place: the file or folder.
        folder: whether it is a folder.

    Raises:
        ValueError: if it can't be written, with the reason.
    """
    if place.exists() and place.is_dir() != folder:
        raise ValueError(f"{name}: {place} is not allowed, it is a {'file' if folder else 'folder'}")
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    if (there.is_file() and there != place.absolute()) or not os.access(there, os.W_OK):
        raise ValueError(f"{name}: {place} can't be written, {there} is not a writable folder")


def kept(
    file: Path, key: str, compute: Callable[[], dict[str, Tensor]], writer: str = ""
) -> dict[str, Tensor]:
    """Read the tensors of a file if its key is the same; otherwise compute and write them.

    Args:
        file: a ``.safetensors``.
        key: text with everything that the tensors depend on.
        compute: computes them.
        writer: name of the writer, if several may write the same file at the same time.

    Raises:
        FileError: naming the file, if it is damaged.
    """
    if file.exists():
        with opened_kept(file) as opened:
            if opened.metadata() == {"key": key}:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, partial(save_file, tensors, metadata={"key": key}), writer)
    return tensors


def digest(tensors: Iterable[Tensor]) -> str:
    """Compute a short fingerprint of the tensors' bytes and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
