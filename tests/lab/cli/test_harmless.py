"""What the command line says of others' text and of wrong options."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from regrow.files import FileError
from regrow.lab.cli import main
from regrow.lab.cli.terminal import Bar, Plain, busy, table
from regrow.lab.measure.evaluate import PictureFolder, Setting
from regrow.lab.measure.variants import Variant
from regrow.lab.search.log import Log
from regrow.lab.search.settings import SearchSettings
from regrow.schedule import Schedule

NAMES = [
    "[/x].yaml",
    "[red]a[/red]",
    "[b]",
    "a\\",
    "\\[b]",
    "[link=x]y",
    ":smile:",
    "a\x1b[31mb",
    "two\nlines",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_others_are_shown_as_they_are(name: str) -> None:
    said = name.replace("\x1b", r"\x1b").replace("\n", r"\n")
    names, out = table("", "name"), StringIO()
    names.add_row(name)
    console = Plain(file=out, width=60, force_terminal=True, color_system=None)
    console.print(names)
    with busy(console, name), Bar(console) as bar:
        bar.add_task(name, total=1, completed=1)
    assert out.getvalue().count(said) >= 3
    out = StringIO()
    with busy(Plain(file=out), name), Bar(Plain(file=out), every=0) as bar:
        bar.advance(bar.add_task(name, total=1))
    assert out.getvalue().count(said) >= 1 + ("\n" not in name)


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The only line that a wrong command says, without its beginning."""
    monkeypatch.setattr(sys, "argv", ["regrow", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert len(lines) == 1
    assert len(lines[0]) < 1100
    assert "Input should" not in lines[0]
    return lines[0].removeprefix("regrow: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--interval", "0"), "--interval: '0' is not allowed, it must be >= 1"),
        (("--interval=1" + "0" * 30,), "it must be <= 4000"),
        (("--interval", "many"), "--interval: 'many' is not allowed, it must be a whole number"),
        (("--ratio", "half"), "--ratio: 'half' is not allowed, it must be a number"),
        (("--ratio", "nan"), "ratio: nan is not allowed, it must be a finite number >= 0 and < 1"),
        (("--ratio", "1.5"), "ratio: 1.5 is not allowed, it must be >= 0 and < 1"),
        (("--steps", "0"), "--steps: '0' is not allowed, it must be >= 1"),
        (("--method", "dota"), "did you mean 'dato'?"),
        (("--preset", "fsat"), "did you mean 'fast'?"),
        (("--method", "tome:0.5:pach=2"), "did you mean 'patch'?"),
        (("--method", "cat:1e-17"), "alpha: 1e-17 is not allowed, it must be >= 1e-06 and <= 1"),
        (("--method", "deepcache:2:branch=999998"), "branch: 999998 is not allowed"),
        (("--method", "deepcache:" + "9" * 5000), "a whole number >= 1 and <= 4000"),
        (("--arch", "emoij", "--preset", "b1"), "did you mean 'emoji'?"),
        (("--scheduel", "x"), "--schedule"),
    ],
)
def test_a_wrong_option_is_one_line_with_its_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    usual = ("--arch", "emoji", "--method", "dato")
    given = [*words]
    for option, value in zip(usual[::2], usual[1::2], strict=True):
        given += [] if option in words else [option, value]
    assert said in fails(monkeypatch, capsys, "profile", *given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"method": "sito", "ratio": 0.5, "patch": 1000000000}', "patch: 1000000000 is not allowed"),
        ('{"method": "sito", "ratio": 0.5, "sede": 3}', "did you mean 'seed'?"),
        ('{"method": "toca", "feed_forward": 1e308}', "feed_forward: 1e+308 is not allowed"),
        ('{"method": "dato", "schedule": {"depth": [], "ratio": []}}', "depth: [] is not allowed"),
        ("", "it is no JSON"),
        ('{"method": "sito", "x' + "y" * 3_000 + '": 1}', "not permitted"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
    said: str,
) -> None:
    file = tmp_path / "[" / "x].json"
    file.parent.mkdir()
    file.write_text(text)
    line = fails(monkeypatch, capsys, "profile", "--arch", "emoji", "--method", str(file))
    assert line.startswith(f"{file}: ")
    assert said in line


@pytest.mark.parametrize("content", ["[1]", "{", '{"prompts": 3}', '{"prompts": [[1]]}', "\xff"])
def test_a_damaged_folder_of_pictures_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "setting.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"setting\.json.*; use another folder$") as refused:
        PictureFolder(tmp_path, Setting("emoji", ("a",)))
    assert "\n" not in str(refused.value)


def test_damaged_pictures_are_named_with_what_to_do(tmp_path: Path) -> None:
    pictures, one = PictureFolder(tmp_path, Setting("emoji", ("a",))), Variant("steps:2", None, 2)
    folder = pictures.folder_of(one)
    folder.mkdir()
    made = {"pictures": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "seconds": torch.ones(1)}
    whole = save(made, {"maker": "m"})
    (folder / "000000.safetensors").write_bytes(whole[:-50])
    for look in (pictures.shard, lambda one, _: pictures.made_otherwise(one)):
        with pytest.raises(FileError, match=r"000000\.safetensors: it is damaged .*; remove it, and it is"):
            look(one, 0)
    (folder / "000000.safetensors").write_bytes(whole)
    assert torch.equal(pictures.shard(one, 0), made["pictures"])
    (folder / "variant.json").write_text('["alike"]')
    with pytest.raises(FileError, match=r"variant\.json: .*; remove its folder, and the pictures are made"):
        pictures.missing(one)


@pytest.mark.parametrize("content", ["[1]", "{", '{"prompts": []}', '{"sede": 1}'])
def test_a_damaged_search_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json.*; use another folder$") as refused:
        SearchSettings.of(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff", b'{"a": 1, "a": 2}'])
def test_a_damaged_line_of_a_log_is_named(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "evaluations.jsonl"
    file.write_bytes(b'{"i": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"evaluations\.jsonl:2: the line is damaged; remove it"):
        Log(file)


def test_a_schedule_names_all_that_is_wrong_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("depth: [full, -1]\nratio: [0, 2]\n")
    line = fails(
        monkeypatch, capsys, "profile", "--arch", "emoji", "--schedule", str(file), "--method", "dato"
    )
    assert f"{file}:1: depth.1: -1 is not allowed" in line
    assert f"{file}:2: ratio.1: 2 is not allowed" in line
    Schedule.every(2, 2).save(file)
    assert Schedule.load(file)
