"""``regrow search``, as a user types it, on a small pipeline in a folder."""

import json
import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch

from regrow.files import FileError
from regrow.lab.cli import main
from regrow.lab.cli.models import load_pipeline
from regrow.lab.cli.search import Again, parse_budget, parse_choices, parse_steps, run_search
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import model_key
from regrow.lab.search.proposals import Operators
from regrow.lab.search.search import Budget, Economy, Search
from regrow.lab.search.settings import SearchSettings
from regrow.models import layout_of
from regrow.schedule import FULL, Schedule


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["regrow", *words])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("model")
    pipelines.sd(pipelines.one_level_unet()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a penguin\na pizza\n")
    return file


def words(model: Path, prompts: Path, out: Path) -> tuple[str, ...]:
    """A short search."""
    common = ("--model", str(model), "--prompts", str(prompts), "--guidance", "5")
    size = ("--height", "32", "--width", "32", "--steps", "6", "--population", "4")
    return ("search", *common, *size, "--device", "cpu", "--out", str(out))


@pytest.mark.slow
def test_search_leaves_schedules_a_result_and_a_page(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
) -> None:
    out = tmp_path / "search"
    asked = words(model, prompts, out)
    assert run(monkeypatch, *asked, "--budget", "2", "--beside", "deepcache:2,steps:3") == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "search.json").read_text())
    assert result["model_key"] == model_key(str(model))
    assert [row["name"] for row in result["beside"]] == ["deepcache:2", "steps:3"]
    assert result["hypervolume"]["front"] > 0
    files = sorted((out / "front").iterdir())
    assert [f"front/{f.name}" for f in files] == [row["file"] for row in result["front"]]
    for file, row in zip(files, result["front"], strict=True):
        schedule = Schedule.load(file)
        assert schedule.origin is not None
        assert schedule.origin.calls == len(schedule) == 6
        assert schedule.origin.cost["macs"] == pytest.approx(row["values"]["cost:macs"], rel=1e-5)
        assert row["name"] in printed
    assert f"page:  {out / 'search.html'}" in printed
    *_, last = printed.splitlines()
    assert last.startswith(f"next:  regrow generate --model {model} --schedule {out / 'front' / 'plan-'}")
    assert {f.name for f in out.glob("*.png")} == {
        "front.png",
        "evolution.png",
        "hypervolume.png",
        "plans.png",
    }
    assert (out / "search.html").read_text().count("data:image/png") > 4
    # The same command evaluates nothing again; a larger budget goes on.
    log = (out / "evaluations.jsonl").read_text()
    assert run(monkeypatch, *asked, "--budget", "2", "--no-plots") == 0
    assert (out / "evaluations.jsonl").read_text() == log
    assert run(monkeypatch, "search", "--resume", str(out), "--method", "sito") == 2
    assert "--method: not allowed with --resume" in capsys.readouterr().err
    assert run(monkeypatch, "search", "--resume", str(out), "--no-plots", "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluated"] == result["evaluated"]
    assert run(monkeypatch, "search", "--resume", str(out), "--budget", "3", "--no-plots", "--json") == 0
    more = json.loads(capsys.readouterr().out)
    assert len(more["history"]) == 3
    assert more["history"][:2] == [
        row | {"hypervolume": more["history"][i]["hypervolume"]} for i, row in enumerate(result["history"])
    ]
    # A plan of the front is used as any schedule.
    picture = tmp_path / "one.png"
    common = ("--model", str(model), "--height", "32", "--width", "32", "--guidance", "5", "--steps", "6")
    plan = ("--method", "dato", "--schedule", str(files[0]), "--prompt", "a penguin", "--out", str(picture))
    assert run(monkeypatch, "generate", *common, *plan) == 0
    assert picture.exists()


def test_search_for_another_scheduler_than_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
) -> None:
    asked = (*words(model, prompts, tmp_path), "--budget", "1", "--no-plots")
    assert run(monkeypatch, *asked, "--scheduler", "EulerDiscrete") == 0
    plan = Schedule.load(sorted((tmp_path / "front").iterdir())[0])
    assert plan.origin is not None
    assert plan.origin.scheduler == "EulerDiscreteScheduler"
    result = json.loads((tmp_path / "search.json").read_text())
    assert (result["scheduler"], result["scheduler_given"]) == ("EulerDiscreteScheduler", "EulerDiscrete")
    assert result["scheduler_settings"]["use_karras_sigmas"] is False
    assert run(monkeypatch, *asked) == 2
    assert "scheduler: the search in" in capsys.readouterr().err


def test_a_pipeline_that_no_name_opens_is_searched(tmp_path: Path, model: Path) -> None:
    settings = SearchSettings(
        model="no such model",
        steps=(4, 4),
        prompts=("a penguin",),
        economy=Economy(prompts=(1,)),
        operators=Operators(population=4),
        height=32,
        width=32,
    )
    opened = partial(load_pipeline, str(model), "cpu", torch.float32)
    asked = Again(budget="1", device="cpu", plots=False)
    outcome = run_search(settings, asked, tmp_path, opened)
    assert outcome.plans
    assert not outcome.stopped


def test_forecasts_of_the_output_are_searched_on_a_denoiser_without_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: Path
) -> None:
    model = tmp_path / "model"
    unknown = pipelines.unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        attention_head_dim=4,
    )
    assert not layout_of(unknown).is_known
    pipelines.sd(unknown).save_pretrained(model)
    out = tmp_path / "search"
    output = ("--choices", "depth=0,full", "--choices", "ratio=0")
    asked = words(model, prompts, out)
    assert run(monkeypatch, *asked, *output, "--budget", "2", "--no-plots", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert all(plan["error"] is None for plan in result["plans"])
    schedules = [plan["config"]["schedule"] for plan in result["plans"]]
    assert {depth for schedule in schedules for depth in schedule["depth"]} == {0, FULL}
    assert any(one["kind"] == "taylor" for schedule in schedules for one in schedule["recovery"])
    for row in result["front"]:
        full = row["depth"].count("full")
        assert row["values"]["cost:macs"] == pytest.approx(full / 6)
        assert len(row["recovery"]) == 6
        assert [*Schedule.load(out / row["file"]).depth].count(FULL) == full


@pytest.mark.slow
def test_folder_of_another_search_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
) -> None:
    asked = words(model, prompts, tmp_path)
    assert run(monkeypatch, *asked, "--method", "sito", "--budget", "1", "--no-plots") == 0
    # Other methods than DaTo leave their configurations.
    (config, *_) = sorted((tmp_path / "front").iterdir())
    assert json.loads(config.read_text())["method"] == "sito"
    assert json.loads(config.read_text())["origin"]["scheduler"] == "DDIMScheduler"
    assert run(monkeypatch, "profile", "--arch", "sd15", "--method", str(config), "--steps", "6") == 0
    assert run(monkeypatch, *asked, "--method", "tome", "--budget", "1", "--no-plots") == 2
    assert "method: the search in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_of_before_recoveries_goes_on_without_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
) -> None:
    asked = (*words(model, prompts, tmp_path), "--no-plots")
    assert run(monkeypatch, *asked, "--budget", "1", "--choices", "recovery=reuse") == 0
    file, log = tmp_path / "settings.json", tmp_path / "evaluations.jsonl"
    settings, done = json.loads(file.read_text()), log.read_text()
    assert settings.pop("version") == 2
    assert settings["choices"].pop("recovery") == ["reuse"]
    file.write_text(json.dumps(settings))
    capsys.readouterr()
    assert run(monkeypatch, *asked, "--budget", "1") == 2
    assert "choices: the search in" in capsys.readouterr().err
    assert run(monkeypatch, "search", "--resume", str(tmp_path), "--no-plots", "--budget", "2") == 0
    # What was measured is not measured again.
    added = log.read_text().removeprefix(done)
    assert len(added) < len(log.read_text())
    assert added.count('"generation"') == 1
    assert json.loads(file.read_text())["choices"] == {"recovery": ["reuse"]}
    plans = json.loads((tmp_path / "search.json").read_text())["plans"]
    assert {json.dumps(p["config"]["schedule"]["recovery"]) for p in plans} == {'[{"kind": "reuse"}]'}
    file.write_text(json.dumps(settings | {"version": 3}))
    assert run(monkeypatch, "search", "--resume", str(tmp_path)) == 2
    assert "version: 3 is not allowed, it must be 2" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["sito", "spectrum", "nothing", 3, None])
def test_settings_of_before_have_recoveries_where_the_method_has(tmp_path: Path, method: Any) -> None:
    fields = {"method": method, "prompts": ["a"], "economy": {"prompts": [1]}, "choices": {}}
    (tmp_path / "settings.json").write_text(json.dumps(fields))
    if method in ("sito", "spectrum"):
        assert SearchSettings.of(tmp_path).choices == {}
    else:
        with pytest.raises(FileError, match="method"):
            SearchSettings.of(tmp_path)


def test_a_search_does_not_go_on_with_a_model_that_was_trained_further(tmp_path: Path) -> None:
    pipeline, out = tmp_path / "model", tmp_path / "search"
    settings = SearchSettings(
        model=str(pipeline), steps=(4, 4), prompts=("a penguin",), economy=Economy(prompts=(1,))
    )
    # The model is not at hand yet.
    settings.claim(out, {"device": "cpu"})
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    settings.claim(out, {"device": "cpu"})
    assert settings.setting.model_key
    (pipeline / "unet" / "weights.safetensors").write_bytes(b"1")
    with pytest.raises(
        ValueError, match=r"model: .* was changed since the search in .* began; use another"
    ):
        settings.check(out)
    assert SearchSettings.of(out) == settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--budget", "soon"), "budget: 'soon'"),
        (("--steps", "9..3"), "steps: 9..3"),
        (("--objective", "quality:nice"), "objective: 'quality:nice'"),
        (("--objective", "quality:psnr"), "at least one of cost"),
        (("--choices", "width=3"), "choices: 'width'"),
        (("--choices", "ratio"), "choices: 'ratio'"),
        (("--rungs", "1,3"), "it must be the number of prompts, 2"),
        (("--method", "l2c"), "L2C has no plans to search"),
        (("--workers", "2"), "--engine ray"),
        (("--objective", "quality:clip", "--objective", "cost:macs"), "clip: give a CLIP model"),
        (("--beside", "nothing:1"), "nothing"),
        (("--choices", "ratio=2"), "choices: ratio.0: 2 is not allowed, it must be >= 0 and < 1"),
        (
            ("--choices", "ratio=half"),
            "choices: ratio.0: 'half' is not allowed, it must be a number",
        ),
        (
            ("--choices", "recovery=reuse,tailor"),
            "choices: recovery='tailor' is not allowed, it must be a recovery",
        ),
        (("--objective", "quality:psnr", "--objective", "cost:macs", "--patience", "3"), "patience: 3.0"),
        (
            ("--objective", "quality:fd", "--objective", "cost:macs", "--rungs", "1,2"),
            "prompts: (1, 2) is not allowed with quality:fd",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
    changes: tuple[str, ...],
    said: str,
) -> None:
    out = tmp_path / "none"
    assert run(monkeypatch, *words(model, prompts, out), *changes) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_model_that_is_not_there_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, prompts: Path
) -> None:
    asked = words(model / "nowhere", prompts, tmp_path / "out")
    assert run(monkeypatch, *asked) != 0
    assert not (tmp_path / "out").exists()


def test_resuming_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "search", "--resume", str(tmp_path)) == 2
    assert "holds no search" in capsys.readouterr().err


def test_options_are_read() -> None:
    assert parse_budget("30") == Budget(generations=30)
    assert parse_budget("30m") == Budget(seconds=1800)
    assert (parse_steps("50"), parse_steps("12..50")) == ((50, 50), (12, 50))
    found = parse_choices(["depth=0,1,full", "ratio=0,0.5", "center=none,0.3"])
    assert found == {"depth": (0, 1, FULL), "ratio": (0, 0.5), "center": (None, 0.3)}
    assert parse_choices(["recovery=reuse,taylor2"]) == {"recovery": ("reuse", "taylor2")}


def test_a_folder_is_written_by_one_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
) -> None:
    out = tmp_path / "search"
    forks = multiprocessing.get_context("fork")
    inside = forks.Event()

    def hold() -> None:
        with locked("--out", out):
            inside.set()
            time.sleep(600)

    monkeypatch.setattr("regrow.lab.cli.models._load", lambda *_: pytest.fail("loaded"))
    other = forks.Process(target=hold)
    other.start()
    assert inside.wait(60)
    for command in (
        (),
        ("calibrate", "--speedup", "2", "--out", str(out)),
        ("eval", "--out", str(out)),
    ):
        assert run(monkeypatch, *(command or words(model, prompts, out))) == 2
        said = capsys.readouterr().err
        assert f"--out: another regrow, process {other.pid}, is at work in {out}" in said
    # Killed, it leaves nothing locked.
    other.kill()
    other.join()
    with locked("--out", out):
        pass
    assert not (out / ".lock").exists()
    with locked("--out", tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("command", ["search", "calibrate", "eval"])
def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr("regrow.lab.cli.models._load", lambda *_: pytest.fail("loaded"))
    wish = ("--speedup", "2") if command == "calibrate" else ()
    for bad in (tmp_path / "letter.txt", tmp_path / "letter.txt" / "search"):
        assert run(monkeypatch, command, *wish, "--out", str(bad)) == 2
        assert f"--out: {bad}" in capsys.readouterr().err


def test_a_stopped_search_leaves_its_front_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    prompts: Path,
) -> None:
    ended = Search._end

    def stop(self: Search, *arguments: Any) -> None:
        ended(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_end", stop)
    assert run(monkeypatch, *words(model, prompts, tmp_path / "a"), "--no-plots") == 130
    said = capsys.readouterr()
    assert said.err.endswith("regrow: stopped; type the same command to continue where it was\n")
    assert f"next:  regrow generate --model {model} --schedule {tmp_path / 'a' / 'front'}" in said.out
    assert json.loads((tmp_path / "a" / "search.json").read_text())["evaluated"] > 0
