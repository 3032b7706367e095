"""What a figure was measured on."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers")


def machine(device: torch.device | str = "cpu", packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Processor or GPU, threads, versions and date, as plain data."""
    device = torch.device(device)
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": processor(),
        "amx": "amx_bf16" in _cpuinfo(),
        "avx512_bf16": "avx512_bf16" in _cpuinfo(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The name of the processor."""
    names = [line.split(":")[1].strip() for line in _cpuinfo().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""
