"""The commands, as a user types them."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_pipelines
from diffusers import PNDMScheduler
from PIL import Image
from safetensors.torch import load_file

from regrow import zoo
from regrow.lab.cli import demo, main
from regrow.lab.measure.images import feature_distances
from regrow.lab.measure.sampling import Pictures, make
from regrow.methods.catalogue import systems
from regrow.schedule import Schedule


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["regrow", *words])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["regrow", "methods", "--json"])
    with pytest.raises(SystemExit):
        runpy.run_module("regrow", run_name="__main__")
    assert "dato" in capsys.readouterr().out


def test_profile_as_json_has_the_documented_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("profile", "--arch", "emoji", "--method", "dato", "--preset", "b1", "--steps", "20", "--json")
    assert run(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"arch", "method", "calls", "baseline_macs_per_call", "baseline_macs", "macs", "macs_ratio"}
    assert keys | {"per_call"} <= set(found)
    assert found["calls"] == len(found["per_call"]) == 20
    assert found["macs_ratio"] == pytest.approx(found["baseline_macs"] / found["macs"])


def test_profile_takes_a_schedule_file_and_an_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    Schedule.every(5, 10).save(file)
    common = ("profile", "--arch", "emoji", "--method", "dato", "--steps", "10", "--json")
    results = []
    for plan in (("--schedule", str(file)), ("--interval", "5")):
        assert run(monkeypatch, *common, *plan) == 0
        results.append(json.loads(capsys.readouterr().out)["per_call"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("words", "full", "fewer"),
    [
        (("--method", "deepcache", "--interval", "5"), 2, 2.0),
        (("--method", "tome", "--ratio", "0.5"), 10, 1.0),
        (("--method", "deepcache:5+tome:0.5"), 2, 2.0),
    ],
)
def test_profile_of_the_baselines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    full: int,
    fewer: float,
) -> None:
    assert run(monkeypatch, "profile", "--arch", "emoji", *words, "--steps", "10", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    macs = found["per_call"]
    assert macs.count(max(macs)) == full
    assert found["macs_ratio"] > fewer


def test_a_preset_of_toca_goes_with_another_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("profile", "--arch", "cifar10", "--method", "toca", "--preset", "paper", "--steps", "12")
    assert run(monkeypatch, *words, "--interval", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kinds"][0]["count"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("profile",), "--arch, --model: give exactly one"),
        (("profile", "--arch", "sd15", "--ratio", "0.5"), "give --method too"),
        (
            ("profile", "--arch", "sd15", "--method", "magic"),
            "method: 'magic' is not known; use one of .*dato",
        ),
        (("profile", "--arch", "sd15", "--method", "l2c"), "regrow does not know the layers of UNet2D"),
        (
            ("profile", "--arch", "sd15", "--method", "toca", "--interval", "3"),
            "UNet2DConditionModel has no layer that can compute some of its tokens by themselves",
        ),
        (("profile", "--arch", "sd15", "--method", "atedm"), "it needs a choice such as atedm:paper, at"),
        (
            ("profile", "--arch", "dit-xl-256", "--method", "atedm", "--ratio", "0.5"),
            "recovery: AT-EDM's copy works on U-Nets, its reuse on SD3, PixArt, DiT and Flux",
        ),
        (
            ("profile", "--arch", "sd15", "--method", "sito:d", "--ratio", "0.5"),
            "--ratio: not allowed with --method sito:d",
        ),
        (("profile", "--arch", "sd15", "--method", "steps:5"), "method: 'steps:5' is not allowed"),
        (("profile", "--arch", "sd3-1024", "--method", "cat:0.3+fora:2"), "not allowed with cat"),
        (
            ("profile", "--arch", "sd15", "--method", "cat", "--preset", "paper"),
            "a call of UNet2DConditionModel can't compute some of its tokens only",
        ),
        (
            ("profile", "--arch", "dit-xl-256", "--method", "sito", "--preset", "d"),
            "tokens can't be left out of the layers of DiTTransformer2DModel yet",
        ),
        (
            ("profile", "--arch", "emoji", "--method", "sito", "--preset", "z"),
            "preset: 'z' is not a preset of SiTo",
        ),
        (("profile", "--arch", "emoji", "--method", "sito", "--ratio", "0.9"), "ratio: 0.9 is not allowed"),
        (("profile", "--arch", "emoji", "--method", "sito", "--ratio", "-1"), "ratio: -1.0 is not allowed"),
        (("profile", "--arch", "emoji", "--method", "dato"), "it needs a choice such as dato:b1"),
        (("profile", "--arch", "emoji", "--method", "dato", "--schedule", "none.yaml"), "none.yaml"),
        (
            ("bench", "--scheduler", "EulerMaruyama"),
            "scheduler: 'EulerMaruyama' is not allowed, it must be a class of diffusers",
        ),
        (
            ("search", "--scheduler", "FlowMatchEulerDiscrete", "--steps", "3"),
            "scheduler: FlowMatchEulerDiscreteScheduler is not allowed with this pipeline",
        ),
        (("bench", "--methods", "steps:2,sito:d,sito:d"), "--methods: sito:d is there 2 times"),
        (("bench", "--arch", "sd15", "--prompt", "pear"), "--prompt: --arch has random weights"),
        (
            ("bench", "--prompt", "a", "--prompt", "b", "--images", "1"),
            "--prompt: 2 are not allowed with --im",
        ),
        (("bench", "--plot", "bars.docx"), "--plot: bars.docx is not allowed, it must end in .* .png"),
        (("bench", "--out", "tests"), "--out: tests is not allowed, it is a folder"),
        (("generate", "--prompt", "pear", "--compare"), "--compare: it needs --method"),
        (
            ("generate", "--prompt", "pear", "--method", "steps:5+sito:d"),
            "method: 'steps:5.sito:d' is not allow",
        ),
        (
            ("generate", "--prompt", "10", "--model", "cifar10"),
            "prompt: '10' is not allowed, it .* 0 to 9, or",
        ),
        (("generate", "--prompt", "pear", "--dtype", "int8"), "dtype: 'int8' is not allowed"),
        (
            ("generate", "--prompt", "pear", "--device", "gpu"),
            "--device: 'gpu' can't be used; use",
        ),
        (("generate", "--prompt", "pear", "--device", "cuda:77"), "--device: 'cuda:77' can't be used"),
        (("generate", "--prompt", "pear", "--model", "./nowhere", "--steps", "1"), "nowhere"),
    ],
)
def test_mistakes_get_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    last = [line for line in error.splitlines() if line.startswith("regrow: ")]
    assert len(last) == 1
    assert re.search(message, error)


def test_a_wrong_schedule_file_is_named_with_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("depth: [1]\nratio: [much]\n")
    words = ("profile", "--arch", "emoji", "--method", "dato", "--schedule", str(file))
    assert run(monkeypatch, *words) == 2
    assert f"{file}:2: ratio.0: " in capsys.readouterr().err


def test_methods_lists_every_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "methods", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [s.name for s in systems()]
    presets = {row["name"]: row["presets"] for row in rows}
    assert presets["sito"] == ["a", "b", "c", "d", "e"]
    searched = ["emoji-quality", "emoji-balanced", "emoji-fast"]
    assert presets["dato"] == ["b1", "fast", "b1-released", *searched]
    assert run(monkeypatch, "methods") == 0
    blocks = capsys.readouterr().out
    assert max(map(len, blocks.splitlines())) <= 80
    assert "\natedm: AT-EDM (arXiv 2405.05252), partly\n" in blocks


def test_methods_says_all_of_one_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for system in systems():
        assert run(monkeypatch, "methods", system.name) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert run(monkeypatch, "methods", system.name, "--json") == 0
        fields = json.loads(capsys.readouterr().out)["fields"]
        own = [] if system.config is None else [*system.config.model_fields]
        assert [field["name"] for field in fields] == [
            n for n in own if n not in ("origin", "method", "version")
        ]
        assert all(field["about"] for field in fields)
        assert all(f"    {field['name']} (" in shown for field in fields)
    assert run(monkeypatch, "methods", "cat") == 0
    shown = capsys.readouterr().out
    for said in ("alone: --method cat, the preset paper", "alpha (default 0.3)", "paper: the defaults"):
        assert said in shown
    assert "balance=0.5, noise_scale=0.05" in shown
    assert run(monkeypatch, "methods", "deepcache") == 0
    assert "recovery (default reuse)" in capsys.readouterr().out
    assert run(monkeypatch, "methods", "sita") == 2
    assert re.search("name: 'sita' is not known; use one of .*dato, sito", capsys.readouterr().err)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_compares_with_the_unaccelerated_picture(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    small_emoji_folder: Path,
    dtype: str,
) -> None:
    out = tmp_path / "pictures" / "apple.png"
    words = ("generate", "--prompt", "red apple", "--prompt", "dog", "--method", "dato")
    words += ("--preset", "b1", "--steps", "3", "--compare", "--json", "--device", "cpu", "--out", str(out))
    words += ("--dtype", dtype)
    side = 128
    if dtype == "bfloat16":
        # Most processors convolve it slowly.
        side = 64
        words += ("--model", str(small_emoji_folder), "--height", str(side), "--width", str(side))
    assert run(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out)
    files = [Path(f) for f in found["files"]]
    assert [f.name for f in files] == ["apple-0.png", "apple-1.png", "apple-compare.png"]
    assert Image.open(files[0]).size == (side, side)
    assert [m["method"] for m in found["methods"]] == ["unaccelerated", "dato b1"]
    assert found["methods"][1]["macs_ratio"] > 2


@pytest.mark.usefixtures("small_emoji")
def test_generate_takes_another_scheduler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "owl.png"
    words = ("generate", "--prompt", "owl", "--steps", "3", "--device", "cpu", "--out", str(out))
    assert run(monkeypatch, *words, "--scheduler", "PNDM:skip_prk_steps=true") == 0
    pipeline = zoo.load("emoji")
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    options = {"num_inference_steps": 3, "guidance_scale": zoo.GUIDANCE["emoji"]}
    expected = pipeline("owl", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert Image.open(out).tobytes() == expected.tobytes()


EULER = ("--scheduler", "EulerDiscrete", "--device", "cpu")


@pytest.mark.usefixtures("small_emoji")
@pytest.mark.parametrize("command", ["bench", "trace", "eval"])
def test_every_command_that_makes_pictures_takes_another_scheduler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    words: dict[str, tuple[str, ...]] = {
        "bench": ("--rounds", "1", "--images", "1"),
        "trace": ("--prompts", "1", "--no-plots", "--out", str(tmp_path)),
        "eval": ("--prompts", "2", "--out", str(tmp_path)),
    }
    assert run(monkeypatch, command, "--methods", "steps:2,steps:1", *words[command], *EULER, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scheduler_given"] == "EulerDiscrete"
    if command == "eval":
        other = ("--prompts", "2", "--device", "cpu", "--out", str(tmp_path / "other"))
        assert run(monkeypatch, command, "--methods", "steps:2,steps:1", *other) == 0
        ((here,), (there,)) = (
            [load_file(file)["pictures"] for file in folder.glob("steps-2/*.safetensors")]
            for folder in (tmp_path, tmp_path / "other")
        )
        assert not torch.equal(here, there)
    else:
        assert result["scheduler"] == "EulerDiscreteScheduler"


def test_a_scheduler_that_does_not_suit_claims_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert run(monkeypatch, "eval", "--scheduler", "FlowMatchEulerDiscrete", "--out", str(out)) == 2
    assert "FlowMatchEulerDiscreteScheduler is not allowed with this pipeline" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("small_emoji")
def test_bench_fails_if_every_method_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("bench", "--steps", "1", "--rounds", "1", "--device", "cpu", "--json", "--methods")
    for methods, failed, code in (
        ("cat:0.3,toca:3", [True, True], 1),
        ("steps:1,toca:3", [False, True], 0),
    ):
        assert run(monkeypatch, *common, methods) == code
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [bool(row["error"]) for row in rows] == failed


def test_bench_knows_a_class_where_it_was_told_no_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformer_pipelines.dit().save_pretrained(tmp_path)
    words = ("--model", str(tmp_path), "--methods", "steps:2,steps:1", "--rounds", "1", "--device", "cpu")
    assert run(monkeypatch, "bench", *words, "--json") == 0
    assert [row["error"] for row in json.loads(capsys.readouterr().out)["rows"]] == [None, None]


def test_videos_are_timed_and_not_taken_for_pictures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformer_pipelines.wan_of_texts().save_pretrained(tmp_path / "wan")
    model = ("--model", str(tmp_path / "wan"), "--device", "cpu", "--height", "64", "--width", "96")
    words = ("--methods", "steps:3,fora:3", "--steps", "3", "--rounds", "1", "--frames", "5", "--json")
    assert run(monkeypatch, "bench", *model, *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["error"] for row in result["rows"]] == [None, None]
    assert result["frames"] == 5
    assert result["rows"][1]["macs_ratio"] > 1.5
    folder = tmp_path / "eval"
    assert run(monkeypatch, "eval", "--model", str(tmp_path / "wan"), "--out", str(folder)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "makes videos (WanPipeline); only regrow generate, bench and train take them" in said
    assert not folder.exists()
    assert run(monkeypatch, "bench", "--methods", "steps:1", "--frames", "5", "--device", "cpu") == 2
    assert "frames: StableDiffusionPipeline makes pictures" in capsys.readouterr().err


def test_videos_from_pictures_are_refused_before_their_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformer_pipelines.wan_from_picture(expand_timesteps=False).save_pretrained(tmp_path)
    assert run(monkeypatch, "bench", "--model", str(tmp_path), "--device", "cpu") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "(WanImageToVideoPipeline) needs image, not a text alone" in said


def test_generate_makes_pictures_of_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformer_pipelines.dit().save_pretrained(tmp_path / "dit")
    common = ("generate", "--model", str(tmp_path / "dit"), "--method", "fora", "--interval", "2")
    common += ("--steps", "4", "--device", "cpu", "--out", str(tmp_path / "picture.png"))
    assert run(monkeypatch, *common, "--prompt", "7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["methods"][0]["macs_ratio"] > 1.5
    assert Image.open(tmp_path / "picture.png").size == (32, 32)
    for wrong, named in (
        (("--prompt", "cat"), "prompt: 'cat'"),
        (("--height", "64", "--width", "64"), "height"),
    ):
        assert run(monkeypatch, *common, *(() if "--prompt" in wrong else ("--prompt", "7")), *wrong) != 0
        assert named in capsys.readouterr().err


def test_a_file_that_is_no_picture_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("regrow.lab.cli.models._load", lambda *_: pytest.fail("too late"))
    for name in ("picture", "picture.docx"):
        out = tmp_path / name
        assert run(monkeypatch, "generate", "--prompt", "owl", "--out", str(out), "--device", "cpu") == 2
        assert f"--out: {out} is not allowed, it must end like a picture" in capsys.readouterr().err


def test_the_model_of_photographs_is_profiled_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "profile", "--arch", "cifar10", "--method", "cat:0.3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [kind["ratio"] for kind in found["kinds"]] == [0.0, pytest.approx(0.7, abs=0.01)]


@pytest.mark.parametrize(
    ("words", "bad"),
    [
        (("demo",), "letter.txt"),
        (("trace", "--methods", "steps:2,steps:1", "--prompts", "1"), "letter.txt"),
        (("generate", "--prompt", "owl"), "letter.txt/owl.png"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    bad: str,
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr("regrow.lab.cli.models._load", lambda *_: pytest.fail("loaded"))
    assert run(monkeypatch, *words, "--out", str(tmp_path / bad)) == 2
    assert f"--out: {tmp_path / bad}" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.usefixtures("small_emoji")
def test_generate_warms_up_before_it_compares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        steps.append(options["steps"])
        return make(*arguments, **options)

    monkeypatch.setattr("regrow.lab.cli.generate.make", counted)
    words = ("generate", "--prompt", "owl", "--method", "dato", "--preset", "b1", "--steps", "3")
    words += ("--device", "cpu", "--out", str(tmp_path / "owl.png"))
    for compare, expected in (((), [3]), (("--compare",), [2, 3, 3])):
        steps.clear()
        assert run(monkeypatch, *words, *compare) == 0
        assert steps == expected


def test_the_demos_feature_distance_is_the_mean_over_prompts() -> None:
    red, green, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue"))
    pictures = {"plain": Pictures([red, green], 1.0), "mine": Pictures([red, blue], 1.0)}
    [[none, some]] = feature_distances([red, green], [red, blue])
    assert none < 1e-6 < 1e-3 < some
    assert demo._feature_distances(pictures) == {"mine": pytest.approx((none + some) / 2)}


@pytest.mark.slow
def test_demo_leaves_a_picture_and_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("regrow.lab.cli.demo.PROMPTS", demo.PROMPTS[:1])
    assert run(monkeypatch, "demo", "--out", str(tmp_path), "--steps", "2", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "demo.json").read_text())
    shown = ["unaccelerated", "1 steps", "plan 2x", "plan 4x", "plan 6x"]
    shown += ["sito:d", "dato:b1", "dato:emoji-fast", "deepcache:5", "spectrum:fast"]
    assert [r["method"] for r in printed["rows"]] == shown
    # A plan of two calls computes both.
    assert all(r["psnr"] is None or r["psnr"] > 5 for r in printed["rows"][1:])
    assert printed["rows"][1]["psnr"] > 5
    assert [r["macs_ratio"] for r in printed["rows"][:2]] == [1, 2]
    assert Image.open(tmp_path / "demo.png").width > 5 * 128
    assert Image.open(tmp_path / "papers.png").width > 6 * 128
