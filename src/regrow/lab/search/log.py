"""The log of evaluations, line by line; it stays valid if the process is killed at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from regrow.files import FileError, check_file, parse_json, said

# Largest log, in bytes.
_MOST = 1 << 30


class Log:
    """Records in a file of JSON lines; each is on the disk before `append` returns.

    Args:
        file: the file, made if it does not exist; records of an earlier run are read. An incomplete last
            line, after a kill, is removed.

    Raises:
        FileError: naming the line, if another line is damaged.
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
        """Make the error of a damaged record, by its line from 1."""
        return FileError(
            f"{said(self.file)}:{number}: the line is damaged; remove it, and it is measured again"
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
        """Write a record, and wait until it is on the disk."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
