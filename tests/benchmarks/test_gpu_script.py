"""What needs a GPU calls programs that are there, with arguments that they take."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quality

from regrow.measure.architectures import architecture
from regrow.measure.variants import variant

ROOT = Path(quality.__file__).parents[1]
STAGES = {
    "check": ["noto.tgz"],
    "train": ["noto.tgz"],
    "reference": ["noto.tgz"],
    "quality": [],
    "speed": ["sdxl", "--compile"],
    "speed-transformers": ["sd3-1024", "28"],
    "cifar-train": ["cifar.tar.gz"],
    "cifar-check": ["cifar.tar.gz"],
    "cifar-reference": ["cifar.tar.gz"],
    "cifar-quality": [],
}


def called(folder: Path, *words: str) -> tuple[list[str], str]:
    """The command of a stage, and what it printed, run in a copy of the script without any program."""
    script = folder / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "gpu.sh").read_text())
    programs, said = folder / "programs", folder / "said"
    programs.mkdir()
    (programs / "timeout").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >"{said}"\n')
    (programs / "timeout").chmod(0o755)
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", str(script), *words], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode == 0) == said.exists()
    return (said.read_text().splitlines() if said.exists() else []), run.stderr


class ParsedError(Exception):
    """Holds the arguments, instead of what would be done with them."""


def parsed(monkeypatch: pytest.MonkeyPatch, script: str, arguments: list[str]) -> argparse.Namespace:
    """What a program makes of its arguments."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any) -> Any:
        raise ParsedError(read(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(ParsedError) as found:
        importlib.import_module(Path(script).stem).main()
    (namespace,) = found.value.args
    return namespace


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_one_program_that_takes_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    (limit, python, script, *arguments), _ = called(tmp_path, stage, *STAGES[stage])
    assert int(limit) < 600
    assert python == "python"
    assert (ROOT / script).is_file()
    args = parsed(monkeypatch, script, arguments)
    assert str(getattr(args, "device", "cuda")) == "cuda"
    for name in ("model", "start"):
        if "src/regrow" in str(getattr(args, name, "")):
            assert (ROOT / getattr(args, name) / "model_index.json").is_file()
    if hasattr(args, "methods") and "," in args.methods:
        assert all(variant(spec, args.steps).steps > 0 for spec in args.methods.split(","))
        assert architecture(args.arch)


def test_a_compiled_table_has_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    eager, _ = called(tmp_path / "one", "speed", "sd15")
    compiled, _ = called(tmp_path / "two", "speed", "sd15", "--compile")
    changed = set(compiled) - set(eager)
    assert changed == {"--compile", "benchmarks/results/peers-sd15-50-bfloat16-gpu-compiled.json"}


def test_quality_is_of_the_bundled_models_guidance(tmp_path: Path) -> None:
    words, _ = called(tmp_path, "quality")
    assert float(words[words.index("--guidance") + 1]) == quality.guidance_of("emoji", None)
    assert "--decoded" in (ROOT / "benchmarks" / "gpu.sh").read_text()


@pytest.mark.parametrize(
    ("words", "said"), [(["fast"], "stage: fast is not allowed"), ([], "one of check")]
)
def test_a_stage_that_is_none_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in called(tmp_path, *words)[1]
