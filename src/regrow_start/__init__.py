"""The ``regrow`` command from its first moment: Ctrl-C is answered in one line while libraries load."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

STOPPED = 130


def main() -> None:
    """Load the command and run it."""
    before = signal.signal(signal.SIGINT, _stopped)
    from regrow.lab.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()


def _stopped(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: an exception could be lost among the imports of libraries."""
    os.write(2, b"\nregrow: stopped while it was starting; nothing was done, type the same command again\n")
    os._exit(STOPPED)
