"""Prompt sets in their public formats, from files and from the hub's cache."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from regrow.lab.cli.requests import prompts_of
from regrow.lab.measure.prompts import PromptSet, fetch, named, read_prompts


def test_prompt_files_of_the_public_formats_are_read(tmp_path: Path) -> None:
    files = {
        "own.txt": "a cat\n\n a dog \n",
        "parti.tsv": "Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\n",
        "drawbench.csv": 'Prompts,Category\na cat,x\n"a dog",x\n',
        "list.json": '["a cat", "a dog"]',
        "coco.json": json.dumps(
            {
                "annotations": [
                    {"image_id": 7, "caption": "a cat"},
                    {"image_id": 3, "caption": "a dog\n"},
                    {"image_id": 7, "caption": "another cat"},
                ]
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == ["a cat", "a dog"], name
    assert read_prompts(tmp_path / "own.txt", "a photo of {}")[1] == "a photo of a dog"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "holds none"),
        ("a.json", "{", "a.json: it is no JSON"),
        ("a.json", '{"images": []}', "neither a list"),
        ("a.json", '[{"prompt": "a cat"}]', "a list of something else than texts"),
        ("a.csv", "Prompt,x\na cat, red,x\n", "line 2 of .* more fields than its head"),
        ("a.tsv", 'x\tPrompt\nx\t"a cat\nand a dog"\n', "line 3 of .*a.tsv ends before its Prompt"),
        ("a.tsv", 'Prompt\n"a\tcat"\n', "line 2 of .* more fields .* not allowed in a .tsv"),
        ("a.csv", "text\na cat\n", "no column Prompt"),
        ("a.xlsx", "", "'.xlsx' is not allowed"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_class_names_by_number_are_read_in_order_with_their_first_name(tmp_path: Path) -> None:
    file = tmp_path / "id2label.json"
    file.write_text('{"10": "brambling, Fringilla", "0": "tench, Tinca tinca", "9": "ostrich"}')
    prompts = read_prompts(file)
    assert prompts[:3] == ["a photo of a tench", "a photo of a tench", "a photo of a ostrich"]
    assert prompts[5] == "a photo of a brambling"
    assert len(prompts) == 6
    file.write_text('{"0": ["n01440764", "tench"], "1": ["n01443537", "great_white_shark"]}')
    assert read_prompts(file, "{}", 1) == ["tench", "great white shark"]


def test_a_search_takes_names_of_classes_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "id2label.json").write_text('{"0": "tench, Tinca tinca"}')
    assert prompts_of("emoji", str(tmp_path / "id2label.json")) == ("tench",)


def test_the_first_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\na dog")
    assert read_prompts(tmp_path / "a.txt", each=2, first=3) == ["a cat", "a cat", "a dog"]
    with pytest.raises(ValueError, match=r"first: 3 is not allowed, .* holds 2 prompts"):
        read_prompts(tmp_path / "a.txt", first=3)
    with pytest.raises(ValueError, match="first: 0 is not allowed"):
        read_prompts(tmp_path / "a.txt", first=0)


def test_odd_characters_stay_in_prompts(tmp_path: Path) -> None:
    table = tmp_path / "drawbench.csv"
    table.write_text('\ufeffPrompts,Category\n"a cat, ""red""\nand fat",x\na {dog}\u2028here,x\n')
    assert read_prompts(table, "{} {x}") == ['a cat, "red"\nand fat {x}', "a {dog}\u2028here {x}"]
    table = tmp_path / "parti.tsv"
    table.write_text('Prompt\tNote\n"G O" on a wall\t"\n"a ""red"" cat"\t\n"a" and "b"\n"dog\n')
    assert read_prompts(table) == ['"G O" on a wall', 'a "red" cat', '"a" and "b"', '"dog']


@pytest.mark.parametrize(
    ("template", "each", "message"),
    [("a photo", 1, "template: 'a photo' is not allowed"), ("{}", 0, "each: 0 is not allowed")],
)
def test_nothing_to_make_of_a_prompt_is_refused(
    tmp_path: Path, template: str, each: int, message: str
) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "a.txt", template, each)


def parquet_of(columns: dict[str, list[Any]]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def test_tables_in_parquet_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "drawbench.parquet"
    table.write_bytes(parquet_of({"Category": ["x", "x", "x"], "Prompts": ["a cat", None, " a dog\n"]}))
    assert read_prompts(table) == ["a cat", "a dog"]
    table.write_bytes(parquet_of({"text": ["a cat"]}))
    with pytest.raises(ValueError, match="has no column Prompt"):
        read_prompts(table)
    table.write_bytes(parquet_of({"caption": [["a cat"], ["a dog"]]}))
    with pytest.raises(ValueError, match=r"caption of .* something else than texts"):
        read_prompts(table)
    table.write_text("a cat")
    with pytest.raises(ValueError, match="is no Parquet file"):
        read_prompts(table)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"regrow\[prompts\]"):
        read_prompts(table)


TEXTS = {
    PromptSet.COCO: '{"annotations": [{"image_id": 1, "caption": "a cat"}]}',
    PromptSet.PARTI: "Prompt\tCategory\na cat\tAnimals\n",
    PromptSet.DRAWBENCH: parquet_of({"Prompts": ["a cat"], "Category": ["Colors"]}),
    PromptSet.IMAGENET: '{"0": "cat, Felis"}',
}


@pytest.mark.parametrize("which", PromptSet)
def test_named_sets_come_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: PromptSet
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = which.value
    assert named(which.name.lower()) is which
    with pytest.raises(OSError, match=f"{which.name.lower()} could not be fetched .*{source.repository}"):
        fetch(which)
    repository = tmp_path / f"datasets--{source.repository.replace('/', '--')}"
    commit = "0" * 40
    file = repository / "snapshots" / commit / source.file
    file.parent.mkdir(parents=True)
    content = TEXTS[which]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    reference = repository / "refs" / (source.revision or "main")
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)
    found = read_prompts(fetch(which))
    assert found == (["a photo of a cat"] * 2 if which is PromptSet.IMAGENET else ["a cat"])


def test_other_names_are_no_set() -> None:
    assert named("vbench") is None
