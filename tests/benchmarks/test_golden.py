"""What small pipelines give is compared bit for bit with what was kept of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import golden
import pytest
import torch

ONLY = ["--only", "auraflow/s*:output*/guided"]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    golden.pipeline.cache_clear()


@pytest.mark.slow
def test_a_changed_bit_is_found_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    assert golden.main(["write", folder, *ONLY]) == 0
    assert golden.main(["compare", folder, *ONLY]) == 0
    assert "5 of 5 cases are equal" in capsys.readouterr().out
    weight = golden.pipeline("auraflow", torch.float64).transformer.proj_out.weight
    with torch.no_grad():
        weight[0, 0] += 1e-12
    assert golden.main(["compare", folder, *ONLY]) == 1
    said = capsys.readouterr().out
    assert "latents" in said
    assert "largest difference" in said
    assert "0 of 5 cases are equal" in said


def test_a_changed_report_and_a_lacking_case_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    golden.main(["write", folder, "--only", "auraflow/l2p:given/guided"])
    monkeypatch.setattr(golden.regrow.RunReport, "full_macs", 7)
    assert golden.main(["compare", folder, "--only", "auraflow/[lp]*[n]/guided"]) == 1
    said = capsys.readouterr().out
    assert "of 7, selection" in said
    assert "was not written" in said


def test_a_refusal_is_kept_and_a_damaged_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, only = str(tmp_path), ["--only", "auraflow/tome:0.5/guided"]
    assert golden.main(["write", folder, *only]) == 0
    assert golden.main(["compare", folder, *only]) == 0
    assert "1 UnsupportedModelError" in capsys.readouterr().out
    file = tmp_path / "auraflow.json"
    file.write_text(file.read_text().replace('"sha256": null', '"sha256": "0"'))
    with pytest.raises(SystemExit):
        golden.main(["compare", folder, *only])
    assert "is not the one that was written" in capsys.readouterr().err
