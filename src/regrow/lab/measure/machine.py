"""The machine and code that a figure was measured with."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from regrow import zoo
from regrow.files import read_kept

PACKAGES = ("torch", "diffusers", "transformers")
_MODEL = (".safetensors", ".bin", ".json", ".txt", ".model")
# Bytes read at each place of a file, and number of places.
_LOOKED_AT, _LOOKS = 2**16, 64


def machine(device: torch.device | str = "cpu", packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Describe the processor or GPU, threads, versions, `code_key` and date, as plain data."""
    device = torch.device(device)
    return {
        "processor": processor(),
        "amx": "amx_bf16" in _cpuinfo(),
        "avx512_bf16": "avx512_bf16" in _cpuinfo(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(packages),
        "code": code_key(),
        "date": datetime.date.today().isoformat(),
    }


def maker_key(device: torch.device | str) -> str:
    """Describe what makes pictures: `code_key`, and the GPU or the processor with its bfloat16 support."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{code_key()} on {torch.cuda.get_device_name(device)}"
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if name in _cpuinfo()]
    return f"{code_key()} on {device.type}: {' '.join([processor(), *bf16])}"


@cache
def code_key() -> str:
    """Compute a short key that changes with regrow's code and `PACKAGES`, but not with its models."""
    root = Path(__file__).parents[2]
    models = [Path("zoo", name) for name in zoo.MODELS]
    found = hashlib.sha256(repr(_versions(PACKAGES)).encode())
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root)
        ours = "__pycache__" not in inside.parts and not any(map(inside.is_relative_to, models))
        if file.is_file() and ours:
            found.update(inside.as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:12]


def text_key(texts: Sequence[str]) -> str:
    """Compute a short key that changes with any of the texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:12]


def model_key(model: str) -> str:
    """Compute a short key that changes when a model is trained further or its configuration changes.

    A file of weights counts by name, size and samples from all its parts, as it may have gigabytes.

    Args:
        model: name of a bundled model, or folder of a pipeline; for others the key is empty.
    """
    folder = zoo.path(model) if zoo.bundles(model) else Path(model)
    index = folder / "model_index.json"
    if not index.is_file():
        return ""
    found = hashlib.sha256(index.read_bytes())
    named = read_kept(index, "give the folder of a pipeline")
    # Only arguments of the pipeline's class are folders of parts; another name may lead outside the folder.
    parts = [folder / name for name in named if name.isidentifier() and len(name) < 64]
    files = [file for part in parts if part.is_dir() for file in part.iterdir()]
    for file in sorted(file for file in files if file.suffix in _MODEL):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
        with file.open("rb") as opened:
            for place in (*range(0, size, max(size // _LOOKS, _LOOKED_AT)), max(size - _LOOKED_AT, 0)):
                opened.seek(place)
                found.update(opened.read(_LOOKED_AT))
    return found.hexdigest()[:12]


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def processor() -> str:
    """Read the name of the processor."""
    names = [line.split(":")[1].strip() for line in _cpuinfo().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""
