"""Scripts of measurements call programs that are there, with arguments that they take."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers_table
import pytest
import quality
import typer

from regrow.lab import cli
from regrow.lab.cli.ablations import ABLATIONS, ablated
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.variants import variant

ROOT = Path(quality.__file__).parents[1]
OF_TRANSFORMERS = ("cat", "predictor", "ratio", "spacing", "blocks")
EMOJI_STAGES = {
    "bench": ["regrow bench"],
    "compiled": ["regrow bench"],
    "eval": ["regrow eval"],
    "reference": ["python tools/compose_scenes.py"],
    "quality": ["python benchmarks/quality.py"],
    "peers": ["python benchmarks/peers_table.py"],
    "ablations": ["regrow eval"] * (len(ABLATIONS) - len(OF_TRANSFORMERS)),
    "trace": ["regrow trace"],
    "check": ["python tools/check_scenes.py", "regrow eval"],
}
"""And what they call; of the ablations all that are for U-Nets."""

STAGES = {
    "check": ["noto.tgz"],
    "train": ["noto.tgz"],
    "reference": ["noto.tgz"],
    "quality": [],
    "speed": ["sdxl", "--compile"],
    "speed-transformers": ["pixart-sigma-1024", "50"],
    "cifar-train": ["cifar.tar.gz"],
    "cifar-check": ["cifar.tar.gz"],
    "cifar-reference": ["cifar.tar.gz"],
    "cifar-quality": [],
}


def run_script(
    folder: Path, script: str, programs: Sequence[str], *words: str
) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """The commands that a script calls, in a folder with scripts but no other program, and how it ended.

    Args:
        folder: an empty one.
        script: of benchmarks/.
        programs: that only write down how they are called.
        words: arguments of the script.
    """
    shutil.copytree(
        ROOT / "benchmarks",
        folder / "benchmarks",
        ignore=shutil.ignore_patterns("*.json"),
        dirs_exist_ok=True,
    )
    own, said = folder / "programs", folder / "said"
    own.mkdir()
    for name in programs:
        # An argument a line, an empty one after the last.
        # What is asked of Python itself is answered with a number.
        lines = (
            "#!/bin/bash",
            '[ "$1" = -c ] && echo 7 && exit',
            f'printf "%s\\n" {name} "$@" "" >>"{said}"',
        )
        (own / name).write_text("\n".join((*lines, "")))
        (own / name).chmod(0o755)
    ended = subprocess.run(
        ["bash", str(folder / "benchmarks" / script), *words],
        env={"PATH": f"{own}{os.pathsep}{os.environ['PATH']}", "BIN": str(own)},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = said.read_text().split("\n\n")[:-1] if said.exists() else []
    return [call.splitlines() for call in calls], ended


def called(folder: Path, *words: str) -> tuple[list[str], str]:
    """The command of a stage on a GPU, and what it printed."""
    calls, ended = run_script(folder, "gpu.sh", ["timeout"], *words)
    assert (ended.returncode == 0) == (len(calls) == 1)
    return (calls[0][1:] if calls else []), ended.stderr


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


def check(monkeypatch: pytest.MonkeyPatch, call: list[str]) -> None:
    """Whether a program takes its arguments."""
    if call[0] == "regrow":
        command = typer.main.get_command(cli.app).commands[call[1]]
        given = command.make_context(call[1], call[2:]).params
        if call[1] == "search":
            return
        methods = given["methods"] or ",".join(ablated(given["ablation"], given["steps"]))
    else:
        args = parsed(monkeypatch, call[1], call[2:])
        methods = getattr(args, "methods", None)
        if hasattr(args, "peers"):
            assert peers_table.rows(methods, args.peers, args.steps)
    if methods in (None, "unet", "transformer"):
        return
    assert [variant(spec, 50).name for spec in methods.split(",")] == methods.split(",")


@pytest.mark.parametrize("stage", EMOJI_STAGES)
def test_a_stage_on_the_bundled_model_calls_what_takes_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for kept in ("quality/pictures", "scenes-steps"):
        (tmp_path / "work" / kept).mkdir(parents=True)
        (tmp_path / "work" / kept / "result.json").touch()
    words = ["noto.tgz"] if stage in ("reference", "check") else []
    calls, ended = run_script(tmp_path, "emoji.sh", ["python", "regrow"], stage, *words)
    assert ended.returncode == 0, ended.stderr
    assert [" ".join(call[:2]) for call in calls] == EMOJI_STAGES[stage]
    for call in calls:
        check(monkeypatch, call)


def test_a_variant_is_added_to_the_quality_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--only", "steps:50,sito:d", "--times", "r.json", "--also", "r.json"]
    (call,), ended = run_script(tmp_path, "emoji.sh", ["python"], "quality", *words)
    assert ended.returncode == 0, ended.stderr
    args = parsed(monkeypatch, call[1], call[2:])
    assert (args.only, args.times, args.also) == ("steps:50,sito:d", Path("r.json"), [Path("r.json")])


def test_the_search_is_called_with_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "work" / "search"
    for name in ("nsga2/front", "chance", "staged", "every-plan-on-all", "paper-ratios"):
        (made / name).mkdir(parents=True)
        (made / name.split("/")[0] / "search.json").touch()
    for name in ("evaluations.jsonl", "settings.json", "front.png", "plans.png"):
        (made / "nsga2" / name).touch()
    (made / "compare.png").touch()
    (tmp_path / "docs").mkdir()
    calls, ended = run_script(tmp_path, "search.sh", ["python", "regrow"])
    assert ended.returncode == 0, ended.stderr
    wanted = ["regrow search"] * 5 + ["python benchmarks/search_table.py"]
    assert [" ".join(call[:2]) for call in calls] == wanted
    assert calls[1][calls[1].index("--budget") + 1] == "7", "as many by chance as the first had"
    for call in calls:
        check(monkeypatch, call)
    assert (tmp_path / "benchmarks" / "results" / "search" / "staged" / "search.json").exists()


@pytest.mark.parametrize("model", ["cifar10", "emoji"])
def test_plans_are_measured_beside_peers_with_what_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (call,), ended = run_script(tmp_path, "plans_beside_peers.sh", ["python"], model, "deepcache:2,fora:3")
    assert ended.returncode == 0, ended.stderr
    check(monkeypatch, call)
    args = parsed(monkeypatch, call[1], call[2:])
    assert (args.model, args.seed, args.methods.split(",")[-2:]) == (
        model,
        10000,
        ["deepcache:2", "fora:3"],
    )


def test_plans_of_other_models_are_not_measured(tmp_path: Path) -> None:
    calls, ended = run_script(tmp_path, "plans_beside_peers.sh", ["python"], "flux", "deepcache:2")
    assert (calls, ended.returncode) == ([], 2)
    assert "flux is not allowed, it must be cifar10 or emoji" in ended.stderr


def test_the_model_of_photographs_is_measured_with_what_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "work" / "cifar10" / "quality" / "pictures"
    kept.mkdir(parents=True)
    (kept / "result.json").touch()
    monkeypatch.syspath_prepend(ROOT / "tools")
    calls, ended = run_script(tmp_path, "cifar.sh", ["python", "regrow"], "cifar.tar.gz")
    assert ended.returncode == 0, ended.stderr
    assert [" ".join(call[:2]) for call in calls] == [
        "python tools/cifar.py",
        "python benchmarks/quality.py",
        "regrow eval",
        "python benchmarks/peers_table.py",
        "regrow trace",
        *["python tools/check_cifar.py"] * 2,
    ]
    for call in calls:
        check(monkeypatch, call)


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
    if hasattr(args, "peers"):
        assert peers_table.rows(args.methods, args.peers, args.steps)
        assert architecture(args.arch)


def test_a_compiled_table_has_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    eager, _ = called(tmp_path / "one", "speed", "sd15")
    compiled, _ = called(tmp_path / "two", "speed", "sd15", "--compile")
    changed = set(compiled) - set(eager)
    assert changed == {"--compile", "benchmarks/results/peers-sd15-50-bfloat16-gpu-compiled.json"}


def test_scenes_are_compared_as_the_autoencoder_shows_them(tmp_path: Path) -> None:
    assert "--decoded" in called(tmp_path, "reference", "noto.tgz")[0]


def test_quality_is_of_the_bundled_models_guidance(tmp_path: Path) -> None:
    words, _ = called(tmp_path, "quality")
    assert float(words[words.index("--guidance") + 1]) == quality.guidance_of("emoji", None)


@pytest.mark.parametrize(
    ("words", "said"), [(["fast"], "stage: fast is not allowed"), ([], "one of check")]
)
def test_a_stage_that_is_none_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in called(tmp_path, *words)[1]


def test_how_long_an_evaluation_took_is_written_down(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    _, ended = run_script(tmp_path, "emoji.sh", ["regrow"], "eval")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "benchmarks" / "results" / "eval-emoji-time.json").read_text())
    assert 0 <= found["minutes"] < 1
