"""Models that tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import save_small_emoji

from regrow import zoo


@pytest.fixture(scope="session")
def small_emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundled model's small twin."""
    return save_small_emoji(tmp_path_factory.mktemp("emoji"))


@pytest.fixture
def small_emoji(monkeypatch: pytest.MonkeyPatch, small_emoji_folder: Path) -> None:
    """In this process, the name of the bundled model means its small twin."""
    bundled = zoo.path
    monkeypatch.setattr(zoo, "path", lambda name: small_emoji_folder if name == "emoji" else bundled(name))
