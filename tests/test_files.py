"""Files of others: checked before they are opened and parsed, named in what is said of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from regrow import Schedule, ScheduleError, hub
from regrow.fields import MOST_BLOCKS, MOST_CALLS
from regrow.files import DEEPEST, PLAN, FileError, parse_json, parse_yaml, read_json, read_kept, read_text
from regrow.lab.measure.atomic_files import kept, opened_kept, write_whole
from regrow.lab.measure.prompts import read_prompts
from regrow.words import one_line, shown

READERS: list[Callable[[Path], Any]] = [Schedule.load, hub.load, read_prompts, read_json, read_text]


def bomb(levels: int) -> str:
    """Few letters that are a list of 9 ** levels numbers."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels + 1)]
    return "\n".join([*lines, f"depth: *a{levels}", "ratio: [0]", ""])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(9), "1: anchors .* and aliases .* are not allowed"),
        ("&a\ndepth: *a\nratio: [0]\n", "1: anchors"),
        ("name: x\ndepth: *a\nratio: [0]\n", "2: anchors"),
        ("depth: " + "[" * 300 + "]" * 300 + "\nratio: [0]\n", f"1: it has more than {DEEPEST} lists"),
        ("depth: " + "[" * 100_000, f"1: it has more than {DEEPEST} lists"),
        ("- " * 300 + "1", f"1: it has more than {DEEPEST} lists"),
        ("name: x\ndepth: !!python/name:os.system x\nratio: [0]\n", "2: tags"),
        ("depth: [1]\ndepth: [2]\nratio: [0]\n", "2: a key is there twice: 'depth: .2.'"),
        ('{"depth": [1], "ratio": [0], "ratio": [1]}', "1: a key is there twice"),
        ("depth: [" + "9" * 5000 + "]\nratio: [0]\n", "1: it is no YAML or JSON"),
        ("date: 2001-13-45\n", "1: it is no YAML or JSON"),
        ("--- a\n--- b\n", "it is no YAML or JSON"),
    ],
)
def test_a_hostile_schedule_is_refused_at_once_in_a_few_words(text: str, said: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ScheduleError, match=rf"^plan\.yaml:{said}|^plan\.yaml:\d+: {said}") as refused:
        Schedule.parse(text, "plan.yaml")
    assert len(str(refused.value)) < 400
    assert time.monotonic() - begin < 5


def test_the_deepest_that_is_allowed_is_allowed() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text, "x") == parse_yaml(text, "x")
    with pytest.raises(FileError, match=f"<= {DEEPEST}"):
        parse_json(f"[{text}]", "x")
    # Brackets in texts are no lists.
    assert parse_json(json.dumps(["[" * 100 + '"{\\']), "x") == ["[" * 100 + '"{\\']


def test_many_errors_are_not_all_said(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(f"depth: [{', '.join(['-1'] * 5000)}]\nratio: [0]\n")
    with pytest.raises(ScheduleError, match="and 4996 more") as refused:
        Schedule.load(file)
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__qualname__)
@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "large", "latin"])
def test_what_is_no_such_file_is_named_and_never_opened(
    tmp_path: Path, read: Callable[[Path], Any], kind: str
) -> None:
    file = tmp_path / "plan.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "large":
        with file.open("wb") as opened:
            opened.truncate(1 << 40)
    elif kind == "latin":
        file.write_bytes('{"name":\n "für"}'.encode("latin-1"))
    said = {
        "folder": "it is a folder",
        "pipe": "it is a pipe or device",
        "missing": "there is no such file",
        "large": "it has 1,099,511,627,776 bytes, it must have <= ",
        "latin": "it is no text in UTF-8",
    }[kind]
    with pytest.raises((OSError, FileError), match=said) as refused:
        read(file)
    assert str(file) in str(refused.value)
    assert "codec" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + Schedule.every(2, 4).dump().encode())
    assert Schedule.load(file) == Schedule.every(2, 4)


def test_names_of_files_do_not_break_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a\nb\x1b[2Jc.json"
    file.write_text("{")
    with pytest.raises(FileError) as refused:
        hub.load(file)
    assert r"a\nb\x1b[2Jc.json" in str(refused.value)


@pytest.mark.parametrize("content", ["[1]", "{", "3", '{"a": 1, "a": 2}'])
def test_a_damaged_file_of_our_own_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    file = tmp_path / "setting.json"
    file.write_text(content)
    with pytest.raises(FileError, match=r"setting\.json: .*; use another folder$"):
        read_kept(file, "use another folder")


def test_kept_tensors_that_were_damaged_are_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    save_file({"x": torch.zeros(100)}, file, {"key": "k"})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FileError, match=r"kept\.safetensors: it is damaged .*; remove it, and it"):
        kept(file, "k", lambda: {"x": torch.zeros(100)})
    save_file({"x": torch.zeros(100)}, file)
    with pytest.raises(FileError, match=r"kept\.safetensors: it is damaged"), opened_kept(file) as opened:
        opened.get_tensor("y")


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, synced = tmp_path / "a.json", []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    write_whole(file, lambda to: to.write_text("text"))
    assert synced == [("a.json.partial", False), (tmp_path.name, True)]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(to: Path) -> None:
        to.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_whole(tmp_path / "a.json", fails)
    assert not list(tmp_path.iterdir())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=5),
)


@settings(max_examples=50)
@given(values)
def test_any_value_is_shown_in_a_short_line(value: Any) -> None:
    assert len(shown([value, 10**5000])) <= 200
    assert shown(value).isprintable()


@settings(max_examples=50)
@given(st.text(max_size=3000))
def test_any_text_becomes_one_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 1000
    assert line == text or not text.isprintable() or len(text) > 1000


def test_the_longest_plan_fits_into_a_file() -> None:
    plan = Schedule.every(3, MOST_CALLS, depth=MOST_BLOCKS, ratio=0.12345678901234568)
    assert len(plan.dump(as_json=True)) < PLAN
    assert len(plan.dump()) < PLAN
