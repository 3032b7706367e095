"""Peak memory is what was alive at once, whatever the allocator keeps besides."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow.lab.cli import models
from regrow.lab.memory import PeakMemory, keep_freed_memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def peaks() -> dict[str, float | None]:
    """MiB by the name of the work. Room that earlier tests left between blocks would count as well."""
    script = Path(__file__).parents[1] / "helpers" / "peaks.py"
    done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True)
    found: dict[str, float | None] = json.loads(done.stdout)
    return found


def test_the_peak_sees_what_was_freed_again(peaks: dict[str, float | None]) -> None:
    mib = peaks["one_block"]
    assert mib is None or 250 < mib < 280


def test_blocks_one_after_the_other_take_the_room_of_one(peaks: dict[str, float | None]) -> None:
    mib = peaks["one_after_the_other"]
    assert mib is None or 46 < mib < 56


def test_memory_that_was_kept_from_before_counts_as_free(peaks: dict[str, float | None]) -> None:
    mib = peaks["kept_from_before"]
    assert mib is None or 100 < mib < 200


def test_the_peak_is_not_told_where_it_cannot_be_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path, text: str) -> None:
        raise PermissionError(file)

    monkeypatch.setattr(Path, "write_text", refuse)
    with PeakMemory(CPU) as memory:
        pass
    assert memory.mib is None


def test_an_error_in_the_work_is_handed_on() -> None:
    with pytest.raises(RuntimeError, match="the work"), PeakMemory(CPU):
        raise RuntimeError("the work")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is handed out otherwise")
def test_kept_memory_costs_no_page_faults_again() -> None:
    def faults(blocks: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(blocks):
            torch.ones(64, 2**18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    # The first ones find their place.
    faults(8)
    # A block.
    assert faults(8) < 2**26 // resource.getpagesize()


@pytest.mark.parametrize("library", ["", "musl"])
def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: (library, ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    keep_freed_memory()


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("meta", 0)])
def test_commands_keep_it_on_a_processor(monkeypatch: pytest.MonkeyPatch, device: str, kept: int) -> None:
    calls: list[str] = []
    monkeypatch.setattr(models, "_load", lambda *_: calls.append("loaded"))
    monkeypatch.setattr(models, "keep_freed_memory", lambda: calls.append("kept"))
    models.load_pipeline("emoji", device, torch.float32)
    assert calls == ["loaded", *["kept"] * kept], "what loading left over is given back"
