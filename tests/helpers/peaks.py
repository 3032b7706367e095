"""Peaks of some work in a process that has done nothing else. Prints them in MiB, as JSON."""

from __future__ import annotations

import json

import torch

from regrow.lab.memory import PeakMemory, keep_freed_memory

CPU = torch.device("cpu")


def one_block() -> float | None:
    """Of a block of 256 MiB that is freed again."""
    with PeakMemory(CPU) as memory:
        block = torch.ones(64, 2**20)
        del block
    return memory.mib


def one_after_the_other() -> float | None:
    """Of blocks of 32 to 47 MiB, each freed before the next."""
    with PeakMemory(CPU) as memory:
        # Each larger than the one before, so that none fits where that was.
        for mib in range(32, 48):
            torch.ones(mib, 2**18)
    return memory.mib


def kept_from_before() -> float | None:
    """Of 4000 blocks of 32 KiB in the room of as many that were freed before and kept."""
    keep_freed_memory()
    # Too small for mappings of their own, whatever was asked for.
    blocks = [torch.ones(2**13) for _ in range(4000)]
    last = torch.ones(2**13)
    del blocks
    with PeakMemory(CPU) as memory:
        again = [torch.ones(2**13) for _ in range(4000)]
    del again, last
    return memory.mib


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps({work.__name__: work() for work in (one_block, one_after_the_other, kept_from_before)})
    )
