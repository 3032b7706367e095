"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

# Processes that tests start compute in one thread too, or last digits depend on the machine's load.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from diffusers.utils import logging
from hypothesis import settings as hypothesis_settings

logging.set_verbosity_error()
# What a whole module shares is made before a test begins: in one thread as well.
torch.set_num_threads(1)
# Pipelines are so many objects that the default looks for garbage a tenth of the time.
gc.set_threshold(50_000)

import pipelines  # noqa: E402

from regrow.core.meta import KnownShapes  # noqa: E402

# A machine that does something else at the same time is no failure.
hypothesis_settings.register_profile("regrow", deadline=None)
hypothesis_settings.load_profile("regrow")


def pytest_collection_finish() -> None:
    """Garbage is not looked for among what the libraries brought."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


one_for_all = cache(KnownShapes)


@pytest.fixture(autouse=True)
def _shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What operations without data give is computed once for all tests: it takes longer than with data."""
    monkeypatch.setattr("regrow.core.macs.KnownShapes", one_for_all)


@pytest.fixture
def pipe() -> Any:
    """A small Stable Diffusion 1 pipeline with DDIM."""
    return pipelines.sd()


@pytest.fixture
def sdxl_pipe() -> Any:
    """A small SDXL pipeline with Euler."""
    return pipelines.sdxl()
