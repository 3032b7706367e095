"""Schedules to the hub and back, by the hub's own client, with a small server in its place."""

import base64
import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import regrow
from regrow import hub
from regrow.lab.cli.options import method_config
from regrow.lab.measure.variants import variant
from regrow.schedule import Schedule, ScheduleError

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for one small file."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.base}/me/plans", "id": "me/plans"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    self.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
            self.answer({"commitUrl": f"{self.base}/me/plans/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({})

    def do_HEAD(self) -> None:
        self.file(head=True)

    def do_GET(self) -> None:
        self.file(head=False)

    def file(self, *, head: bool) -> None:
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        content = self.files.get(name)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if not head and content is not None:
            self.wfile.write(content)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a hub without files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    handler = type("OneHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize("file", ["plan.yaml", "dato/plan.json"])
def test_schedule_comes_back_as_it_went(endpoint: str, file: str) -> None:
    schedule = Schedule.every(5, 50, ratio=0.5)
    address = hub.push(schedule, "me/plans", file, endpoint=endpoint)
    assert address.endswith(f"/commit/{COMMIT}")
    assert hub.pull("me/plans", file, endpoint=endpoint) == schedule


def test_a_configuration_comes_back_as_it_went(endpoint: str) -> None:
    config = regrow.Combined(caching=regrow.DeepCache(interval=3), tokens=regrow.ToMeSD(ratio=0.5))
    with pytest.raises(ValueError, match=r"file: 'plan\.yaml' is not allowed, it must end in \.json"):
        hub.push(config, "me/plans", "plan.yaml", endpoint=endpoint)
    hub.push(config, "me/plans", "plan.json", endpoint=endpoint)
    assert hub.pull("me/plans", "plan.json", endpoint=endpoint) == config


def test_the_one_kind_of_plan_is_not_taken_for_the_other(tmp_path: Path) -> None:
    schedule, config = tmp_path / "schedule.json", tmp_path / "config.json"
    Schedule.every(5, 50).save(schedule)
    config.write_text(regrow.SiTo(ratio=0.5).dump())
    with pytest.raises(ValueError, match=r"config\.json is the configuration of a method"):
        hub.load_schedule(config)
    assert hub.load_schedule(schedule) == variant(f"dato:{schedule}", 50).config.schedule
    assert hub.load_schedule(schedule) == variant(str(schedule), 50).config.schedule
    assert hub.load(config) == variant(str(config), 50).config


@pytest.mark.parametrize("place", ["hub:me/plans/plan.yaml", "hub:me/plans/plan.yaml@main"])
def test_a_shared_plan_is_a_method_by_its_address(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    schedule = Schedule.every(5, 50, ratio=0.5)
    hub.push(schedule, "me/plans", "plan.yaml", endpoint=endpoint)
    monkeypatch.setattr(hub, "pull", partial(hub.pull, endpoint=endpoint))
    assert variant(place, 50).config == regrow.DaTo(schedule=schedule)
    assert method_config(place, steps=50) == regrow.DaTo(schedule=schedule)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "more than 32 lists or mappings inside each other"),
        ('{"method": "sito", "method": "tome"}', "the key 'method' is there twice"),
        ('{"method": "dota"}', "did you mean 'dato'"),
        ("[1]", "neither a schedule nor the configuration of a method"),
        ('{"ratio": [0.5]}', "neither a schedule nor the configuration of a method"),
        ('{"method": "sito", "ratio": 2}', "ratio: "),
        ('{"method": "witchcraft"}', "method: 'witchcraft' is not known"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_name_of_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        hub.load(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_said(endpoint: str) -> None:
    with pytest.raises(OSError, match=r"plan\.yaml"):
        hub.pull("me/plans", "plan.yaml", endpoint=endpoint)


def test_endings_are_checked_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match=r"file: 'plan\.txt'"):
        hub.push(Schedule.constant(), "me/plans", "plan.txt", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("place", ["hub:me/plans", "hub:plan.yaml", "hub:me//plan.yaml"])
def test_places_on_the_hub_are_checked(place: str) -> None:
    with pytest.raises(ValueError, match=r"hub:owner/name/plan\.yaml"):
        hub.load(place)


def test_other_places_are_files(tmp_path: Path) -> None:
    schedule = Schedule.every(5, 50)
    schedule.save(tmp_path / "plan.yaml")
    assert hub.load(tmp_path / "plan.yaml") == schedule
    (tmp_path / "no.yaml").write_text("1")
    with pytest.raises(ScheduleError):
        hub.load(tmp_path / "no.yaml")
