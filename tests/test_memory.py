"""Peak memory is what was alive at once, whatever the allocator keeps besides."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from regrow.cli import models
from regrow.memory import PeakMemory, keep_freed_memory

CPU = torch.device("cpu")


def test_the_peak_sees_what_was_freed_again() -> None:
    with PeakMemory(CPU) as memory:
        block = torch.ones(64, 2**20)
        del block
    assert memory.mib is None or 250 < memory.mib < 280


def test_blocks_one_after_the_other_take_the_room_of_one() -> None:
    with PeakMemory(CPU) as memory:
        # Each larger than the one before, so that none fits where that was.
        for mib in range(32, 48):
            torch.ones(mib, 2**18)
    assert memory.mib is None or 46 < memory.mib < 56


def test_memory_that_was_kept_from_before_counts_as_free() -> None:
    keep_freed_memory()
    # Too small for mappings of their own, whatever was asked for.
    blocks = [torch.ones(2**13) for _ in range(4000)]
    last = torch.ones(2**13)
    del blocks
    with PeakMemory(CPU) as memory:
        again = [torch.ones(2**13) for _ in range(4000)]
    assert memory.mib is None or 100 < memory.mib < 200
    del again, last


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
