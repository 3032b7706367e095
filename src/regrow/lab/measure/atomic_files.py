"""Files that are whole or not there, and tensors that are computed once."""

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
"""What to do about a kept file that is damaged."""
# Bytes of a kept file: shards of pictures may be large.
_MOST = 1 << 36


def write_whole(file: Path, write: Callable[[Path], Any], writer: str = "") -> None:
    """Write a file so that it is whole or not there, also after the power was cut.

    Args:
        file: the file.
        write: writes it, whatever it is called meanwhile.
        writer: whose, where several may write the same file at once.
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
        value: what JSON can hold.
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
def opened_kept(file: Path, instead: str = REMOVE) -> Iterator[Any]:
    """A ``.safetensors`` that regrow kept, as `safe_open` gives it.

    Args:
        file: the file.
        instead: what to do if it is damaged.

    Raises:
        FileError: naming it, if it is damaged, or holds other tensors than are asked of it.
        OSError: if it can't be read.
    """
    check_file(file, _MOST)
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise damaged(file, instead) from error


def check_writable(name: str, place: Path, *, folder: bool = False) -> None:
    """Look whether a file or folder can be written, and make nothing.

    Args:
        name: of the option.
        place: the file or folder.
        folder: which of both it is.

    Raises:
        ValueError: if it can't, saying why.
    """
    if place.exists() and place.is_dir() != folder:
        raise ValueError(f"{name}: {place} is not allowed, it is a {'file' if folder else 'folder'}")
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    if (there.is_file() and there != place.absolute()) or not os.access(there, os.W_OK):
        raise ValueError(f"{name}: {place} can't be written, nothing can be made in {there}")


def kept(
    file: Path, key: str, compute: Callable[[], dict[str, Tensor]], writer: str = ""
) -> dict[str, Tensor]:
    """The tensors of a file if it was written under this key; else they are computed and written.

    Args:
        file: a ``.safetensors``.
        key: all that the tensors depend on.
        compute: makes them.
        writer: whose, where several may write the same file at once.

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
    """A short fingerprint of the tensors' bytes and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
