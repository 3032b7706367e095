"""Lock a folder, so that only one process at a time writes to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows has no such locks; there two processes may write at the same time.
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder inside this context.

    The system frees the lock of a process that was killed. A folder that was made for the lock, and is
    still empty, is removed again.

    Args:
        name: name of the option with the folder.
        folder: made if it does not exist.

    Raises:
        ValueError: if another process is at work in it.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    try:
        held = _hold(name, file)
        try:
            yield
        finally:
            # Removed while it is held: a later process makes a new one.
            file.unlink(missing_ok=True)
            os.close(held)
    finally:
        with suppress(OSError):
            for place in missing:
                place.rmdir()


def _hold(name: str, file: Path) -> int:
    """Open the lock, and hold it."""
    while True:
        held = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(held)
        except BlockingIOError as error:
            who = os.read(held, 20).decode(errors="replace").strip()
            os.close(held)
            raise ValueError(
                f"{name}: another regrow, process {who or 'unknown'}, is at work in {file.parent}; wait "
                "for it, or use another folder"
            ) from error
        # The process before may have removed its file between opening and locking.
        if file.exists() and os.fstat(held).st_ino == file.stat().st_ino:
            os.truncate(held, 0)
            os.write(held, f"{os.getpid()}\n".encode())
            return held
        os.close(held)


def _lock(held: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # The file system has no locks.
        return
