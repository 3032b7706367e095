"""The command from its first moment to its last line, as a process of its own where that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import regrow
from regrow.lab import cli
from regrow.lab.cli.main import STOPPED

ROOT = Path(__file__).parents[3]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["regrow", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_memory_that_is_not_enough_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("regrow.lab.cli.generate.run_generate", generate)
    assert run(monkeypatch, "generate", "--prompt", "owl") == 2
    told = capsys.readouterr().err
    assert told.startswith("regrow: CUDA out of memory.; Tried to allocate 2 GiB; use a smaller --batch")
    assert told.count("\n") == 1


def test_version_and_short_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith(f"regrow {regrow.__version__} (diffusers ")
    for words in (("-h",), ("search", "-h"), ("share", "-h"), ()):
        assert run(monkeypatch, *words) == 0
        assert f"Usage: {' '.join(('regrow', *words[:-1]))}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("share",), "regrow: missing argument 'file'; see regrow share --help"),
        (("profile", "--archh", "sd15"), "regrow: no such option: --archh"),
        (
            ("bench", "--rounds", "many"),
            "regrow: --rounds: 'many' is not allowed, it must be a whole number",
        ),
        (("frob",), "regrow: no such command 'frob'; see regrow --help"),
        (
            ("generate", "--prompt", "a", "--guidance", "nan"),
            "regrow: guidance: nan is not allowed, it must be >= 0 and <= 1000",
        ),
        (("eval", "--guidance", "-1"), "regrow: guidance: -1.0 is not allowed, it must be >= 0"),
        (
            ("search", "--height", "100"),
            "regrow: height: 100 is not allowed, it must be a multiple of 8, s",
        ),
        (
            ("trace", "--width", "0"),
            "regrow: width: 0 is not allowed, it must be >= 8 and <= ",
        ),
        (
            ("calibrate", "--seed", str(2**63)),
            f"regrow: seed: {2**63} is not allowed, it must be >= 0 and <= ",
        ),
    ],
)
def test_a_wrong_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_warnings_are_one_line_and_those_for_developers_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*_: object) -> None:
        warnings.warn("the plan\n may not suit", stacklevel=1)
        warnings.warn("renamed", FutureWarning, stacklevel=1)

    shown = warnings.showwarning
    monkeypatch.setattr("regrow.lab.cli.demo.run_demo", warned)
    assert run(monkeypatch, "demo") == 0
    assert capsys.readouterr().err == "regrow: warning: the plan may not suit\n"
    assert warnings.showwarning is shown


@pytest.mark.parametrize(
    ("command", "function", "how"),
    [
        ("eval", "regrow.lab.cli.evaluate.run_eval", "continue where it was"),
        ("demo", "regrow.lab.cli.demo.run_demo", "begin again"),
    ],
)
def test_a_stopped_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    function: str,
    how: str,
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, stopped)
    assert run(monkeypatch, command) == STOPPED
    assert capsys.readouterr().err == f"regrow: stopped; type the same command to {how}\n"


def test_a_command_may_be_stopped_while_it_starts(tmp_path: Path) -> None:
    # Instead of libraries that take long to load.
    (tmp_path / "regrow").mkdir()
    (tmp_path / "regrow" / "__init__.py").write_text(
        "import time\nprint('loading', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT / "src")))
    with subprocess.Popen(
        [sys.executable, "-c", "import regrow_start; regrow_start.main()"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == STOPPED
    assert error.strip() == (
        "regrow: stopped while it was starting; nothing was done, type the same command again"
    )


def test_the_demo_installs_what_it_needs_and_no_more() -> None:
    # As if nothing had been made yet.
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert '--editable ".[measure]"' in planned
    assert "regrow demo" in planned
    for other in ("cluster", "dev", "test", "peers"):
        assert other not in planned


def test_a_methods_fields_are_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("profile", "--arch", "dit-xl-256", "--method", "tokencache", "--steps", "10", "--json")
    assert run(monkeypatch, *words, "--full-steps", "5", "--last-blocks=2", "--ratio", ".5") == 0
    told = json.loads(capsys.readouterr().out)
    assert {(kind["depth"], kind["ratio"], kind["count"]) for kind in told["kinds"]} == {
        ("full", 0.0, 5),
        ("sites", 0.5, 5),
    }
    assert run(monkeypatch, *words, "--full-step", "5") == 2
    assert capsys.readouterr().err.startswith("regrow: no such option: --full-step; did you mean")
    assert run(monkeypatch, *words, "--full-steps") == 2
    assert "--full-steps" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--full-steps", "0") == 2
    assert "full_steps: 0 is not allowed" in capsys.readouterr().err
