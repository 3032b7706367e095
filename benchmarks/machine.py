"""What a figure was measured on, and how much memory a call takes."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# glibc gives big blocks back to the system at once and takes a page fault for each page again.
FAST_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
# Every tensor in its own mapping, so that resident memory is what is alive.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def restart_with(settings: dict[str, str]) -> None:
    """Restart this script with environment variables that are read when a process begins."""
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, versions, date."""
    packages = ("torch", "diffusers", "transformers", "tomesd", "DeepCache")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "amx": "amx_bf16" in _cpuinfo(),
        "avx512_bf16": "avx512_bf16" in _cpuinfo(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def _processor() -> str:
    names = [line.split(":")[1].strip() for line in _cpuinfo().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes a call needs at its peak above what is resident before it.

    On a CPU the peak resident size that Linux keeps is reset and read; run with `EXACT_MALLOC`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
