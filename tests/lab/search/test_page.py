"""The page of a search shows its numbers, holds all it needs, and takes nothing in it for markup."""

from __future__ import annotations

import base64
import shlex
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import found
import numpy as np
import pytest
from PIL import Image

from regrow.lab.search.page import SIDE, page


class Reader(HTMLParser):
    """Cells of tables, code, pictures, and all tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.code: list[str] = []
        self._into: list[list[str]] = []
        self._table: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["class"].split()[-1], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._into.append(self._table[-1])
        elif tag == "code":
            self.code.append("")
            self._into.append(self.code)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "code"):
            into = self._into.pop()
            if tag == "code" and self._into:
                self._into[-1][-1] += into[-1]

    def handle_data(self, data: str) -> None:
        if self._into:
            self._into[-1][-1] += data

    def pictures(self) -> list[Image.Image]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        kind = "data:image/png;base64,"
        assert all(source.startswith(kind) for source in sources)
        return [Image.open(BytesIO(base64.b64decode(source.removeprefix(kind)))) for source in sources]


def plain(colour: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_the_front_is_a_table_with_speeds_and_files() -> None:
    result = found.result()
    rows = Reader(page(result, [], {}, [])).tables["front"]
    assert rows[0] == [
        "plan",
        "quality:deviation",
        "cost:macs",
        "times fewer MACs",
        "steps",
        "a good choice for",
        "file",
    ]
    assert len(rows) == 1 + len(result["front"])
    for row, plan in zip(rows[1:], result["front"], strict=True):
        far, share = plan["values"].values()
        assert row[0] == plan["name"]
        assert float(row[1]) == pytest.approx(far, rel=0.01)
        assert float(row[2].rstrip("%")) == pytest.approx(100 * share, abs=0.06)
        assert float(row[3].rstrip("x")) == pytest.approx(1 / share, abs=0.006)
        assert row[4:] == ["12", ", ".join(plan["picked"]), plan["file"]]


def test_what_it_is_compared_with_has_a_table_if_there_is_something() -> None:
    result = found.result()
    reader = Reader(page(result, [], {}, []))
    assert reader.tables["beside"][2] == ["deepcache:2", "0.04", "60.0%", "1.67x"]
    assert len(reader.tables["beside"]) == 5
    assert "beside" not in Reader(page(result | {"beside": []}, [], {}, [])).tables


def test_settings_are_said_in_words() -> None:
    result = found.result()
    said = dict(Reader(page(result, [], {}, [])).tables["settings"])
    assert said["model"] == "emoji (UNet2DConditionModel:ab12cd34ef56, float32)"
    assert said["sampler"] == "DDIMScheduler, 12 steps; unaccelerated, 12 calls"
    assert said["guidance"] == "3"
    assert said["pictures a plan"] == "4 prompts, seeds from 0 on; every plan on 1, the promising on 2, 4"
    assert said["proposals"].startswith("NSGA-II, all choices at once, seed 0; population 6, ")
    assert said["tried"] == "24 plans in 4 generations, 96 pictures, 2 min"
    assert said["given up early"] == "2 plans, 2 times further off than one that costs no more"
    assert said["hypervolume"] == "0.25 up to (0.4, 1); of what it is compared with, 0.2"
    assert said["machine"] == "A Processor, 2 threads; Python 3.11.1, torch 2.13.0; 2026-01-02"
    changes = {"steps": [6, 12], "guidance": None, "economy": {"prompts": [4], "patience": None}}
    said = dict(Reader(page(result | changes, [], {}, [])).tables["settings"])
    assert said["given up early"] == "2 plans, figures that are no numbers"
    for plan in result["plans"]:
        plan["given_up"] = False
    result["plans"][3].update(given_up=True, error="OutOfMemoryError: no memory")
    said = dict(Reader(page(result | changes, [], {}, [])).tables["settings"])
    assert "6 to 12 steps" in said["sampler"]
    assert said["guidance"] == "the pipeline's own"
    assert said["pictures a plan"].endswith("every plan on all of them")
    assert said["given up early"] == "none"
    assert said["could not be run"] == "1 plan, the last one: OutOfMemoryError: no memory"


def test_pictures_stand_in_the_page_a_row_a_prompt(tmp_path: Path) -> None:
    plot = tmp_path / "front.png"
    plain("white", (300, 20)).save(plot)
    pictures = {
        "unaccelerated": [plain("red"), plain("green")],
        "plan-00": [plain("blue", (4 * SIDE, 2 * SIDE)), plain("black")],
    }
    reader = Reader(page(found.result(), [plot], pictures, ["a pear", "a plum"]))
    shown = reader.pictures()
    assert [p.size for p in shown] == [(300, 20), (8, 8), (SIDE, SIDE // 2), (8, 8), (8, 8)]
    corners = [np.asarray(p)[0, 0].tolist() for p in shown[1:]]
    assert corners == [[255, 0, 0], [0, 0, 255], [0, 128, 0], [0, 0, 0]]
    rows = [[cell.strip() for cell in row] for row in reader.tables["pictures"]]
    assert rows == [["", "unaccelerated", "plan-00"], ["a pear", "", ""], ["a plum", "", ""]]
    alts = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    assert alts[2:4] == ["a pear, plan-00", "a plum, unaccelerated"]
    with pytest.raises(
        ValueError, match=r"pictures: 1 of 'plan-00' is not allowed, .* one for each prompt, 2"
    ):
        page(found.result(), [], {"plan-00": [plain("red")]}, ["a pear", "a plum"])


def test_nothing_comes_from_elsewhere() -> None:
    text = page(found.result(), [], {"unaccelerated": [plain("red")]}, ["a pear"])
    tags = Reader(text).tags
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in tags}
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text


def test_what_a_result_holds_is_text() -> None:
    bad = "<script>alert('&')</script>"
    result = found.result()
    result["model"] = result["front"][0]["name"] = result["beside"][0]["name"] = bad
    result["machine"]["processor"] = bad
    reader = Reader(page(result, [], {bad: [plain("red")]}, [f'"><img src=x>{bad}']))
    tags = [tag for tag, _ in reader.tags]
    assert "script" not in tags
    assert tags.count("img") == 1
    assert reader.tables["front"][1][0] == bad
    assert reader.tables["beside"][1][0] == bad
    assert reader.tables["pictures"][0][1] == bad
    assert bad in dict(reader.tables["settings"])["machine"]


def test_the_use_of_the_balanced_plan_is_shown() -> None:
    result = found.result()
    plan = next(p for p in result["front"] if "balanced" in p["picked"])
    command, code = Reader(page(result, [], {"a": [plain("red")]}, ["a pear's leaf"])).code[-2:]
    words = shlex.split(command)
    assert words[:4] == ["regrow", "generate", "--model", "emoji"]
    assert words[words.index("--schedule") + 1] == plan["file"]
    assert words[words.index("--prompt") + 1] == "a pear's leaf"
    assert words[words.index("--steps") + 1] == "12"
    compile(code, "page", "exec")
    assert f'regrow.DaTo(schedule=regrow.Schedule.load("{plan["file"]}"))' in code
    assert 'regrow.zoo.load("emoji")' in code
    assert "num_inference_steps=12, guidance_scale=3.0" in code


def test_a_plan_that_is_no_schedule_is_used_by_its_configuration() -> None:
    result = found.result() | {"model": "some/model", "guidance": None}
    for plan in result["front"]:
        plan["file"] = "front/plan.json"
    command, code = Reader(page(result, [], {}, [])).code[-2:]
    assert "--method front/plan.json" in command
    assert "--guidance" not in command
    compile(code, "page", "exec")
    assert 'regrow.apply(pipe, regrow.hub.load("front/plan.json"))' in code
    assert 'DiffusionPipeline.from_pretrained("some/model")' in code


def test_the_scheduler_that_was_given_is_used() -> None:
    result = found.result() | {"scheduler_given": "PNDM:skip_prk_steps=true"}
    command, code = Reader(page(result, [], {}, [])).code[-2:]
    words = shlex.split(command)
    assert words[words.index("--scheduler") + 1] == "PNDM:skip_prk_steps=true"
    compile(code, "page", "exec")
    assert 'Sampler.parse("PNDM:skip_prk_steps=true").put_into(pipe)' in code


def test_a_search_without_a_front_has_a_page() -> None:
    result = found.result() | {"front": [], "beside": [], "history": []}
    result["hypervolume"] = {"reference": [], "front": 0.0, "beside": 0.0}
    reader = Reader(page(result, [], {}, []))
    assert len(reader.tables["front"]) == 1
    assert not reader.code[1:]


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'regrow\[search\]'"):
        page(found.result(), [], {}, [])
