"""Commands that are told no methods take those that the model can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
import transformer_pipelines

from regrow.lab import cli
from regrow.lab.cli.default_methods import DefaultMethods, usual, usual_of
from regrow.lab.measure.architectures import NAMES
from regrow.lab.measure.variants import variant
from regrow.methods.base import DenoiserKind

UNET, TRANSFORMER, VIDEO = (
    usual_of(kind) for kind in (DenoiserKind.UNET, DenoiserKind.TRANSFORMER, DenoiserKind.VIDEO)
)


def test_methods_say_that_they_are_usual() -> None:
    cached = ("deepcache:3", "fora:3")
    assert {"dato:b1", "dato:fast", "sito:d", "tome:0.5", "deepcache:5"} <= set(UNET.measured)
    assert {"dato:b1", "sito:d", "deepcache:5"} <= set(UNET.traced) < set(UNET.measured)
    assert {"cat:0.5", *cached, "toca:3"} <= set(TRANSFORMER.measured)
    assert {"cat:0.5", "deepcache:3", "toca:3"} <= set(TRANSFORMER.traced) < set(TRANSFORMER.measured)
    assert set(cached) <= set(VIDEO.measured)
    assert set(cached) <= set(VIDEO.traced)


@pytest.mark.parametrize(
    ("found", "make"),
    [
        (UNET, pipelines.sd),
        (UNET, pipelines.sdxl),
        (TRANSFORMER, transformer_pipelines.dit),
        (TRANSFORMER, transformer_pipelines.pixart_sigma),
        (TRANSFORMER, transformer_pipelines.sd3),
        (TRANSFORMER, transformer_pipelines.flux),
        (VIDEO, transformer_pipelines.wan_of_texts),
    ],
)
def test_all_go_on_models_that_have_them(tmp_path: Path, found: DefaultMethods, make: Any) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path)
    assert usual(str(tmp_path)) == found
    for name in (*found.measured, *found.traced):
        variant(name, 50).check(pipe)


def test_every_architecture_has_some() -> None:
    kinds = {"sd15": UNET, "emoji": UNET, "cifar10": TRANSFORMER, "sd3-1024": TRANSFORMER}
    kinds |= {name: VIDEO for name in NAMES if name.startswith("wan")}
    for name, found in kinds.items():
        assert usual(None, name) == found
    assert all(usual(None, name).measured for name in NAMES)
    with pytest.raises(ValueError, match="arch: 'sd9' is not known"):
        usual(None, "sd9")


def test_commands_take_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def keep(request: Any, variants: Any, *others: Any) -> list[Any]:
        asked.append(tuple(one.name for one in variants))
        return []

    for function in ("bench.run_bench", "evaluate.run_eval", "trace.run_trace"):
        monkeypatch.setattr(f"regrow.lab.cli.{function}", keep)
    for command in ("bench", "eval", "trace"):
        monkeypatch.setattr("sys.argv", ["regrow", command, "--model", "cifar10", "--steps", "20"])
        with pytest.raises(SystemExit):
            cli.main()
    both = ("steps:20", "steps:10")
    measured = (*both, *TRANSFORMER.measured)
    assert asked == [measured, measured, (*both, *TRANSFORMER.traced)]


@pytest.mark.parametrize(
    "index", [{"unet": ["diffusers", "Kandinsky3UNet"]}, {"transformer": ["diffusers", "X"]}, {}]
)
def test_what_is_not_supported_has_none(tmp_path: Path, index: dict[str, list[str]]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index}))
    assert usual(str(tmp_path)) == DefaultMethods((), ())
