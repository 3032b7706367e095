"""A worker whose jobs say what happens to it. Processes of a cluster import it from here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import torch


class Fate(Enum):
    """What a job does to its worker."""

    RETURN = auto()
    RAISE = auto()
    DIE = auto()
    DIE_ONCE = auto()


@dataclass(frozen=True)
class Job:
    """First it waits until a file is there, then it makes one."""

    number: int
    fate: Fate = Fate.RETURN
    after: Path | None = None
    leaves: Path | None = None


@dataclass(frozen=True)
class Result:
    square: int
    process: int
    threads: int


class Worker:
    """Counts in a folder how often it was built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "built").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def __call__(self, job: Job) -> Result:
        end = time.monotonic() + 300
        while job.after is not None and not job.after.exists():
            assert time.monotonic() < end, f"{job.after} never came"
            time.sleep(0.01)
        if job.leaves is not None:
            job.leaves.touch()
        if job.fate is Fate.RAISE:
            raise ValueError(f"number: {job.number} is not allowed")
        dead = self.folder / f"dead-{job.number}"
        if job.fate is Fate.DIE or (job.fate is Fate.DIE_ONCE and not dead.exists()):
            dead.touch()
            os._exit(1)
        return Result(job.number**2, os.getpid(), torch.get_num_threads())
