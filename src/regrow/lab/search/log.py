"""What was evaluated, line by line, safe against a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from regrow.files import FileError, check_file, parse_json, said

# Bytes of a log.
_MOST = 1 << 30


class Log:
    """Records in a file of JSON lines; each is on the disk before it counts.

    Args:
        file: made if it is not there; what an earlier run wrote is read. A last line that a kill cut short
            is taken off.

    Raises:
        FileError: naming the line, if one before it is damaged.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            check_file(file, _MOST)
        whole = file.read_bytes() if file.exists() else b""
        end = whole.rfind(b"\n") + 1
        self.file = file
        self.records: list[dict[str, Any]] = [
            self._record(number, line) for number, line in enumerate(whole[:end].splitlines(), 1)
        ]
        self._file = file.open("ab")
        self._file.truncate(end)

    def damaged(self, number: int) -> FileError:
        """The error of a record, by its line from 1, that can't be what was written."""
        return FileError(
            f"{said(self.file)}:{number}: the line is damaged; remove it, and it is measured anew"
        )

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = parse_json(line.decode("utf-8"), said(self.file))
        except ValueError as error:
            raise self.damaged(number) from error
        if not isinstance(record, dict):
            raise self.damaged(number)
        return record

    def append(self, record: dict[str, Any]) -> None:
        """Write a record, and wait until the disk has it."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()
