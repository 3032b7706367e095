"""The memory of a process: what glibc keeps of it, and how much a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from typing_extensions import Self

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEPT: Mapping[int, int] = MappingProxyType({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28})
# A tensor for which no room was left before has a mapping of its own, which goes when it is freed.
_GIVEN_BACK: Mapping[int, int] = MappingProxyType(
    {_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 2**16, _TRIM_THRESHOLD: 0, _TOP_PAD: 0}
)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensors of this process.

    By itself it gives large blocks back at once, and every page of the next one costs a fault. What was
    freed before is given back. Nothing happens on a system with another C library.
    """
    _set_glibc(_KEPT)


def _set_glibc(parameters: Mapping[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name, value in parameters.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


class PeakMemory:
    """Peak memory of the work within a ``with`` block, above what is in use before it.

    On a GPU the CUDA allocator's, else the process's on Linux. With glibc, freed memory is given back at
    once within the block, and kept after it (`keep_freed_memory`). Room that was left between blocks before
    is used again and stays: a process that has done other work may show some MiB more than the work needs.

    Args:
        device: where the work is done.

    Attributes:
        mib: MiB, after the block; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib: float | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: float | None = torch.cuda.memory_allocated(self.device) / 2**20
            return self
        _set_glibc(_GIVEN_BACK)
        try:
            # 5 sets the peak back to the present.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._before = None
        else:
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            peak: float | None = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = _resident("VmHWM")
            keep_freed_memory()
        if self._before is not None and peak is not None:
            self.mib = max(peak - self._before, 0.0)


def _resident(key: str) -> float | None:
    """A line of /proc/self/status in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line.split() for line in status.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(lines[0][1]) / 1024 if lines else None
