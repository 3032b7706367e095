"""Jobs get done by this process and by a real Ray cluster alike, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import stub
import torch
from jobs import Fate, Job, Worker
from safetensors.torch import load_file

from regrow.lab import cli
from regrow.lab.search.search import Budget
from regrow.lab.workers import LocalWorkers, RayWorkers, WorkerDiedError

CPUS = 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _started() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Its processes import the worker from the folder of the tests.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        # Workers would wait for all other tests.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init("local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def _cluster(_started: None) -> Iterator[None]:
    """A cluster that every test leaves as it was."""
    yield
    assert ray.is_initialized()
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != CPUS and time.monotonic() < end:
        time.sleep(0.05)
    assert ray.available_resources()["CPU"] == CPUS


def built(folder: Path) -> list[int]:
    """The processes that workers were built in."""
    return [int(line) for line in (folder / "built").read_text().split()]


def numbers(*which: int) -> list[Job]:
    return [Job(number) for number in which]


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["regrow", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.usefixtures("_cluster")
def test_pictures_by_two_processes_are_those_of_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    small_emoji_folder: Path,
) -> None:
    words = ("eval", "--model", str(small_emoji_folder), "--methods", "steps:2,dato:b1", "--steps", "2")
    words += ("--prompts", "4", "--batch", "2")
    rows = {}
    for name, engine in (("local", ()), ("ray", ("--engine", "ray", "--workers", "2"))):
        out = ("--device", "cpu", "--json", "--out", str(tmp_path / name))
        assert command(monkeypatch, *words, *engine, *out) == 0
        rows[name] = json.loads(capsys.readouterr().out)["rows"]
    assert rows["ray"] == rows["local"]
    files = sorted(file.relative_to(tmp_path / "local") for file in tmp_path.glob("local/*/0*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, other = (load_file(tmp_path / name / file)["pictures"] for name in ("local", "ray"))
        assert torch.equal(one, other)
    assert not any(row["made_otherwise"] for row in rows["ray"])


def test_this_process_builds_one_worker_for_the_first_job(tmp_path: Path) -> None:
    with LocalWorkers(partial(Worker, tmp_path)) as workers:
        assert list(workers.run([])) == []
        assert not (tmp_path / "built").exists()
        for which in ((3, 1, 2), (5,)):
            results = [(index, result.square) for index, result in workers.run(numbers(*which))]
            assert results == list(enumerate(number**2 for number in which))
        with pytest.raises(ValueError, match="number: 7 is not allowed"):
            list(workers.run([Job(7, Fate.RAISE)]))
    assert built(tmp_path) == [os.getpid()]


@pytest.mark.usefixtures("_cluster")
def test_jobs_are_done_side_by_side_and_an_exception_ends_them(tmp_path: Path) -> None:
    with RayWorkers(partial(Worker, tmp_path)) as workers:
        # Each of the first two needs the other to go on.
        first, second = tmp_path / "first", tmp_path / "second"
        jobs = [Job(2, after=second, leaves=first), Job(3, leaves=second), *numbers(4, 5, 6)]
        found = dict(workers.run(jobs))
        assert {index: result.square for index, result in found.items()} == {
            0: 4,
            1: 9,
            2: 16,
            3: 25,
            4: 36,
        }
        assert {result.threads for result in found.values()} == {1}
        again = dict(workers.run(numbers(7, 8, 9)))
        assert {index: result.square for index, result in again.items()} == {0: 49, 1: 64, 2: 81}
        processes = {result.process for result in (*found.values(), *again.values())}
        assert processes <= set(built(tmp_path))
        assert len(built(tmp_path)) == CPUS
        # An iterator that is closed leaves no job behind.
        running = workers.run([Job(2), Job(3, after=tmp_path / "never")])
        index, result = next(running)
        assert (index, result.square) == (0, 4)
        running.close()
        later = tmp_path / "later"
        jobs = [Job(7, Fate.RAISE), Job(1, leaves=later)]
        with pytest.raises(ValueError, match="number: 7 is not allowed") as caught:
            list(workers.run(jobs))
        assert type(caught.value) is ValueError
        assert not later.exists()
    with pytest.raises(RuntimeError, match="closed"):
        next(workers.run(numbers(1)))


@pytest.mark.usefixtures("_cluster")
def test_a_worker_that_dies_costs_its_job_only_and_a_job_that_always_kills_is_named(tmp_path: Path) -> None:
    with RayWorkers(partial(Worker, tmp_path), count=1, attempts=2) as workers:
        results = [
            (index, result.square)
            for index, result in workers.run([Job(2), Job(3, Fate.DIE_ONCE), Job(4), Job(5)])
        ]
        assert results == [(0, 4), (2, 16), (3, 25), (1, 9)]
        assert len(built(tmp_path)) == 2
        running = workers.run([Job(2, Fate.DIE), Job(3)])
        with pytest.raises(WorkerDiedError, match=r"job 0, Job\(number=2, .*: 2 workers died at it"):
            list(running)
    assert len(built(tmp_path)) == 3


@pytest.mark.usefixtures("_cluster")
def test_search_on_workers_killed_by_the_system_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Only the search is killed: the cluster goes on, and is free again."""
    whole, rest = stub.Stub(), stub.Stub()
    expected = stub.front_of(stub.search(tmp_path / "one", whole).run(Budget(generations=6)))
    address = ray.get_runtime_context().gcs_address
    words = [sys.executable, stub.__file__, str(tmp_path / "two"), "5", address]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(words, check=False, env=os.environ | path).returncode == -signal.SIGKILL
    log = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len(log) == 5
    assert stub.front_of(stub.search(tmp_path / "two", rest).run(Budget(generations=6))) == expected
    assert len(rest.jobs) == len(whole.jobs) - 5


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: 0 is not allowed, it must be >= 1"),
        ({"count": 3}, "count: 3 is not allowed, the cluster has room for 2 workers of 1 CPUs and 0 GPUs"),
        ({"count": 5, "cpus": 0.5}, "count: 5 is not allowed, the cluster has room for 4 workers"),
        ({"gpus": 1}, "the cluster has room for 0 workers of 1 CPUs and 1 GPUs"),
        ({"cpus": 0}, "cpus: 0 is not allowed, it must be > 0"),
        ({"gpus": -1}, "gpus: -1 is not allowed, it must be >= 0"),
        ({"attempts": 0}, "attempts: 0 is not allowed, it must be >= 1"),
        (
            {"address": "127.0.0.1:1"},
            "address: '127.0.0.1:1' is not allowed, it must be None: this process is connected",
        ),
    ],
)
def test_what_is_not_allowed_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayWorkers(partial(Worker, tmp_path), **arguments)
    assert not (tmp_path / "built").exists()


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'regrow\[cluster\]'"):
        RayWorkers(partial(Worker, tmp_path))
