"""What was evaluated, line by line, safe against a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Records in a file of JSON lines; each is on the disk before it counts.

    Args:
        file: made if it is not there; what an earlier run wrote is read. A last line that a kill cut short
            is taken off.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.read_bytes() if file.exists() else b""
        end = whole.rfind(b"\n") + 1
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole[:end].splitlines()]
        self._file = file.open("ab")
        self._file.truncate(end)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record, and wait until the disk has it."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()
