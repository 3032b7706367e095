"""Every public accelerator on small real pipelines: what it does there, and that nothing of it stays."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peers_table
import pipelines
import pytest
import torch
import transformer_pipelines
from peers import PEERS, Peer, always_computed, peer
from torch import Tensor, nn

from regrow.lab.cli.bench import print_rows
from regrow.lab.measure.bench import BenchRow, bench
from regrow.lab.measure.evaluate import PictureFolder, Setting
from regrow.lab.measure.sampling import make, prompt_arguments
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.calibrated import Calibrated
from regrow.models import module_of
from regrow.schedule import Schedule

# cache-dit computes the first eight steps in full.
STEPS = 10
FEW = 5
LAYERS = 4
MODELS: dict[str, Callable[[], Any]] = {
    "sd": pipelines.sd,
    **{name: partial(make, LAYERS) for name, make in transformer_pipelines.KINDS.items()},
}
SIZE = {"height": 32, "width": 32}
SMALL = "--height 32 --width 32"
NO_CONTEXT = "ValueError: No cache context is set"
NO_UNET = "has no attribute 'unet'"
ACCELERATES, NOTHING = "accelerates", "changes nothing"
NO_RESIDUAL = "AssertionError: State 'transformer_blocks_Bn_residual' not found"
CALIBRATED = ("cache-dit-taylorseer:9", "cache-dit-foca:9", "cache-dit-dmd:9")
# Thresholds are above what two steps of random weights differ by.
WORKING = {
    "sd": ("tomesd", "DeepCache", "pab"),
    "sd3": ("cache-dit:9", "pab", "magcache"),
    "pixart": ("cache-dit:9", *CALIBRATED, "pab", "fastercache", "magcache"),
    "dit": ("cache-dit:9", *CALIBRATED, "pab", "magcache"),
    "flux": ("cache-dit:9", *CALIBRATED, "pab", "fastercache", "firstblock:9", "taylorseer", "magcache"),
}
OTHERS = {
    "sd": {
        **dict.fromkeys(["cache-dit", *CALIBRATED], "not officially supported"),
        "fastercache": "RuntimeError: chunk expects at least a 1-dimensional tensor",
        "firstblock": "IndexError: pop from empty list",
        "seacache": "ValueError: SeaCache found no repeated transformer blocks",
        "taylorseer": NOTHING,
        "magcache": NOTHING,
    },
    "sd3": {
        **dict.fromkeys(CALIBRATED, NO_RESIDUAL),
        "tomesd": "IndexError",
        "DeepCache": NO_UNET,
        "fastercache": "RuntimeError: The size of tensor",
        "firstblock": NO_CONTEXT,
        "taylorseer": NO_CONTEXT,
        "seacache": NOTHING,
    },
    "pixart": {
        "tomesd": "'ToMeBlock' object has no attribute 'norm3'",
        "DeepCache": NO_UNET,
        "firstblock": NO_CONTEXT,
        "taylorseer": NOTHING,
        "seacache": NOTHING,
    },
    "dit": {
        "tomesd": NOTHING,
        "DeepCache": NO_UNET,
        "fastercache": "RuntimeError: The size of tensor",
        "firstblock": NO_CONTEXT,
        "taylorseer": NOTHING,
        "seacache": NOTHING,
    },
    "flux": {"tomesd": "IndexError", "DeepCache": NO_UNET, "seacache": NOTHING},
}


def options(name: str) -> dict[str, Any]:
    return {} if name == "dit" else SIZE


def prompts(name: str) -> list[str]:
    return ["1", "2"] if name == "dit" else ["a penguin", "a pizza"]


def pictures(name: str, pipe: Any, steps: int = STEPS) -> Tensor:
    images = pipe(
        **prompt_arguments(pipe, prompts(name)),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        output_type="np",
        **options(name),
    ).images
    return torch.from_numpy(images)


def does(name: str) -> dict[str, str]:
    """What each peer does on a model, in one of the words of the tables above, or its error."""
    return dict.fromkeys(WORKING[name], ACCELERATES) | OTHERS[name]


def outcome(row: BenchRow) -> str:
    """What a row says of a peer, in one of the words of the tables above, or its error."""
    return row.error or (NOTHING if row.changes_nothing else ACCELERATES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("sd", ("tomesd", "DeepCache", "firstblock")),
        ("flux", ("cache-dit:9", "fastercache", "DeepCache", "seacache")),
        ("dit", ("pab", "firstblock", "taylorseer")),
    ],
)
def test_each_does_what_it_does_there_and_the_table_says_so(
    name: str, some: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = MODELS[name]()
    expected = {spec: what for spec, what in does(name).items() if spec in some}
    variants = [variant(f"steps:{STEPS}", STEPS), *(peer(spec, STEPS) for spec in expected)]
    plain, *rows = bench(pipe, variants, prompts(name), rounds=1, **options(name))
    assert (plain.error, plain.changes_nothing) == (None, None)
    assert plain.macs
    assert [(c.depth, c.count) for c in plain.calls] == [("full", STEPS)]
    for row in rows:
        assert expected[row.name] in outcome(row), row.name
        if row.error is None:
            assert (row.macs == plain.macs) == bool(row.changes_nothing)
            assert row.macs
            assert row.macs <= plain.macs
            assert row.efficiency
            assert [(c.depth, c.ratio, c.count) for c in row.calls] == [(None, None, STEPS)]
    print_rows([plain, *rows], plain.name)
    shown = capsys.readouterr().out
    for row in rows:
        assert row.error is None or f"{row.name}: {row.error}" in shown
        assert (f"{row.name} (changes nothing)" in shown) == bool(row.changes_nothing)


def test_macs_that_are_seen_are_those_that_are_told() -> None:
    variants = [variant(spec, STEPS) for spec in (f"steps:{STEPS}", "deepcache:3")]
    variants.append(peer("DeepCache:3", STEPS))
    _, told, seen = bench(MODELS["sd"](), variants, prompts("sd"), rounds=1, **SIZE)
    assert seen.macs == told.macs
    assert seen.macs_ratio == told.macs_ratio


@pytest.mark.slow
def test_macs_of_compiled_models_are_not_seen() -> None:
    pipe = MODELS["sd"]()
    pipe.unet.conv_out.compile(backend="eager")
    variants = [variant("steps:3", 3), peer("pab", 3)]
    plain, row = bench(pipe, variants, prompts("sd"), rounds=1, **SIZE)
    assert (plain.error, row.error) == (None, None)
    assert row.macs is row.macs_ratio is row.efficiency is None


class StopError(Exception):
    pass


def state(module: nn.Module) -> list[Any]:
    """Everything a peer could leave on modules and their classes."""
    return [
        (
            name,
            type(part),
            list(vars(part)),
            vars(part).get("forward"),
            list(part._modules),
            list(part._forward_pre_hooks),
            list(part._forward_hooks),
            dict(vars(type(part))),
        )
        for name, part in module.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_peer_is_named(name: str) -> None:
    assert {spec.partition(":")[0] for spec in does(name)} == set(PEERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_begins_anew_and_leaves_nothing_even_if_stopped(name: str) -> None:
    pipe = MODELS[name]()
    plain = {steps: pictures(name, pipe, steps) for steps in (STEPS, FEW)}
    before, of_class = state(module_of(pipe)), dict(vars(type(pipe)))

    def check(spec: str) -> None:
        assert state(module_of(pipe)) == before, spec
        assert dict(vars(type(pipe))) == of_class, spec

    for spec in WORKING[name]:
        steps = STEPS if "cache-dit" in spec else FEW
        one = peer(spec, steps)
        calls = 0

        def stop(*_: Any, last: int = steps - 1) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise StopError

        with one.applied(pipe):
            first = pictures(name, pipe, steps)
        check(spec)
        assert not torch.equal(first, plain[steps]), spec
        if spec in CALIBRATED[1:]:
            # The same cache with another forecast.
            continue
        with pytest.raises(StopError), one.applied(pipe):  # noqa: PT012
            hook = module_of(pipe).register_forward_pre_hook(stop)
            try:
                pictures(name, pipe, steps)
            finally:
                hook.remove()
        check(spec)
        torch.rand(1)
        with one.applied(pipe):
            assert torch.equal(pictures(name, pipe, steps), first), spec
        check(spec)
    assert torch.equal(pictures(name, pipe, FEW), plain[FEW])
    for spec, reason in OTHERS[name].items():
        one = peer(spec, STEPS)
        if reason == NOTHING:
            with one.applied(pipe):
                assert torch.equal(pictures(name, pipe), plain[STEPS]), spec
        else:
            with pytest.raises(Exception) as failed, one.applied(pipe):  # noqa: PT011
                pictures(name, pipe)
            assert reason in f"{failed.typename}: {failed.value}", spec
        check(spec)
    assert torch.equal(pictures(name, pipe, FEW), plain[FEW])


def test_sea_cache_works_on_wan_and_leaves_nothing() -> None:
    pipe = transformer_pipelines.wan()
    texts = torch.randn(2, 1, 8, transformer_pipelines.TEXT, generator=torch.Generator().manual_seed(1))

    def latents() -> Tensor:
        frames: Tensor = pipe(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            **SIZE,
            num_frames=5,
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames
        return frames

    plain, before = latents(), state(pipe.transformer)
    with peer("seacache:0.000001", STEPS).applied(pipe):
        assert torch.equal(latents(), plain)
    with peer("seacache:9", STEPS).applied(pipe):
        first = latents()
    assert state(pipe.transformer) == before
    assert not torch.equal(first, plain)
    assert torch.equal(latents(), plain)
    with peer("seacache:9", STEPS).applied(pipe):
        assert torch.equal(latents(), first)


def test_the_timestep_is_the_pipelines_own_from_its_first_generation_on() -> None:
    fresh, used = MODELS["flux"](), MODELS["flux"]()
    pictures("flux", used)
    one = peer("fastercache", STEPS)
    with one.applied(fresh), one.applied(used):
        assert torch.equal(pictures("flux", fresh), pictures("flux", used))


def test_a_hook_of_the_users_own_stays() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubled(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return (output[0] * 2,)

    pipe = pipelines.sd()
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Doubled(), "doubled")
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    registry = HookRegistry.check_if_exists_or_initialize(attention)
    doubled = pictures("sd", pipe)
    with peer("pab", STEPS).applied(pipe):
        assert len(registry.hooks) == 1
        pictures("sd", pipe)
    assert not registry.hooks
    assert torch.equal(pictures("sd", pipe), doubled)
    forward = pipe.unet.forward
    with peer("DeepCache", STEPS).applied(pipe):
        assert pipe.unet.forward is not forward
        pictures("sd", pipe)
    assert pipe.unet.forward is forward
    assert torch.equal(pictures("sd", pipe), doubled)
    assert not torch.equal(doubled, pictures("sd", pipelines.sd()))


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ("tomesd", 0.5),
        ("DeepCache:5", 5),
        ("cache-dit:0.2", 0.2),
        ("cache-dit-taylorseer:0.24", 0.24),
        ("taylorseer:5", 5),
        ("seacache", 0.25),
        ("pab:3", 3),
    ],
)
def test_a_peer_is_found_by_its_name(spec: str, number: float) -> None:
    name = spec.partition(":")[0]
    assert peer(spec, 20) == Peer(spec, number, 20, PEERS[name])
    assert peer(spec, 20).settings()[PEERS[name].number] == number


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toca:3", "peers: 'toca:3' is not known; before the colon comes one of tomesd, DeepCache"),
        ("DeepCache:2.5", "cache_interval, a whole number >= 1"),
        ("DeepCache:0", "cache_interval, a whole number >= 1"),
        ("tomesd:", "ratio, a number > 0"),
        ("tomesd:-1", "ratio, a number > 0"),
    ],
)
def test_wrong_names_are_refused_with_what_is_allowed(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peer(spec, 20)


@pytest.mark.parametrize("spec", ["tomesd", "DeepCache", "cache-dit", "cache-dit-dmd"])
def test_a_missing_package_is_named(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = PEERS[spec].package
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with (
        pytest.raises(ImportError, match=rf"{package} is not installed: pip install 'regrow\[peers\]'"),
        peer(spec, 20).applied(pipelines.sd()),
    ):
        pass


def test_an_evaluation_makes_a_peers_pictures_however_often_it_begins(tmp_path: Path) -> None:
    # FasterCache keeps what it cached for the next generation there.
    setting = Setting("tiny", ("a penguin", "a pizza", "a penguin"), height=32, width=32, shard=2)
    one, pipe = peer("fastercache", STEPS), MODELS["pixart"]()
    made = PictureFolder(tmp_path, setting)
    made.make(pipe, one)
    whole = list(made.of(one))
    assert [len(shard) for shard in whole] == [2, 1]
    for file in tmp_path.glob("*/000001.safetensors"):
        file.unlink()
    made.make(MODELS["pixart"](), one)
    assert all(torch.equal(a, b) for a, b in zip(whole, made.of(one), strict=True))
    with pytest.raises(ValueError, match="holds pictures of another fastercache"):
        made.missing(Peer("fastercache", 3, STEPS, PEERS["fastercache"]))


def test_a_pipeline_of_classes_takes_their_numbers_only() -> None:
    with pytest.raises(ValueError, match="prompt: 'a penguin' is not allowed, it must be the number of a"):
        make(MODELS["dit"](), ["1", "a penguin"], steps=STEPS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with prompts of its own."""
    folder: Path = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(folder)
    (folder / "captions.json").write_text('["a penguin", "a pizza"]')
    return folder


@pytest.mark.slow
def test_the_script_writes_what_it_prints_and_the_quality_of_those_that_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    out, quality, table = (tmp_path / name for name in ("peers.json", "peers-quality.json", "peers.md"))
    words = f"--model {model} --methods steps:2,deepcache:2 --peers DeepCache:2,firstblock --steps 2"
    words += f" --rounds 1 --quality {tmp_path / 'pictures'} --prompts 2 --device cpu --json {out} {SMALL}"
    monkeypatch.setattr("sys.argv", ["peers_table", *words.split()])
    monkeypatch.setenv("CACHE_DIT_LOG_LEVEL", "error")
    peers_table.main()
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    names = ["steps:2", "deepcache:2", "DeepCache:2", "firstblock"]
    assert [row["name"] for row in written["rows"]] == names
    assert "firstblock: IndexError: pop from empty list" in printed
    assert len(written["rows"][2]["rounds"]) == 1
    assert {"tomesd", "DeepCache", "cache-dit", "diffusers"} <= set(written["machine"]["versions"])
    kept = json.loads(quality.read_text())
    assert [row["name"] for row in kept["rows"]] == names[:3]
    _, own, other = kept["rows"]
    # Both reuse the same features.
    assert other["psnr"] == pytest.approx(own["psnr"], abs=0.5)
    lines = table.read_text().splitlines()
    assert lines[3].endswith(f"| {own['psnr']:.1f} | {own['feature_distance']:.4f} | - |")
    for changed, said in (
        ({"dtype": "float16"}, "another dtype"),
        ({"rows": kept["rows"][:2]}, "without DeepC"),
    ):
        quality.write_text(json.dumps(kept | changed))
        with pytest.raises(ValueError, match=f"peers-quality.json is (of )?{said}"):
            peers_table.write_table(out)
    quality.unlink()
    peers_table.write_table(out)
    lines = table.read_text().splitlines()
    # Whatever else the machine does while they are timed is marked.
    marked = [f"`{row['name']}`" + " (disturbed)" * bool(row["disturbed"]) for row in written["rows"]]
    assert [line.split("|")[1].strip() for line in lines[2:]] == marked
    assert lines[0].endswith("| efficiency | peak MiB |")
    assert lines[5].startswith("| `firstblock` | fails: IndexError: pop from empty list |")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--arch sd15 --peers toca", "peers_table: peers: 'toca' is not known"),
        ("--arch sd15 --quality x", "--quality: it needs --model, and goes without --compile"),
        ("--model emoji --compile --quality x", "--quality: it needs --model, and goes without --compile"),
    ],
)
def test_wrong_words_are_refused_by_the_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["peers_table", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        peers_table.main()
    assert said in capsys.readouterr().err


def test_rows_are_compared_with_the_slowest_plan_that_is_at_least_as_fast() -> None:
    plan = Calibrated(steps=2, schedule=Schedule.constant(), instead_of=4)
    configs = {"steps:4": None, "steps:2": None, "slow": plan, "fast": plan, "DeepCache": 3, "pab": 2}
    variants = [Variant(name, config, 4) for name, config in configs.items()]
    speeds = {"steps:4": 1.0, "steps:2": 2.0, "slow": 2.0, "fast": 3.0, "DeepCache": 2.5, "pab": 3.5}
    timed = [BenchRow(name, speedup=speed) for name, speed in speeds.items()]
    assert peers_table.plans_beside(variants, timed) == {"steps:2": "slow", "DeepCache": "fast"}
    timed[3] = BenchRow("fast", error="it fails")
    assert peers_table.plans_beside(variants, timed) == {"steps:2": "slow"}
    assert peers_table.plans_beside(variants[:2], timed[:2]) == {}


@pytest.mark.slow
def test_peers_are_compared_with_plans_picture_by_picture(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(Calibrated(steps=1, schedule=Schedule.constant(), instead_of=12).dump())
    words = f"--model {model} --steps 12 --methods steps:12,steps:8,{plan} --peers DeepCache:2"
    words += f" --quality {tmp_path / 'pictures'} --prompts 2 --seed 7 --rounds 1 --device cpu {SMALL}"
    monkeypatch.setattr("sys.argv", ["peers_table", *words.split(), "--json", str(tmp_path / "peers.json")])
    peers_table.main()
    quality = json.loads((tmp_path / "peers-quality.json").read_text())
    assert quality["seed"] == 7
    rows = {row["name"]: row for row in quality["rows"]}
    assert rows[str(plan)]["gain"] is None
    lines = (tmp_path / "peers.md").read_text().splitlines()
    assert lines[0].endswith("| PSNR dB | feature distance | plan at least as fast | plan nearer by dB |")
    assert lines[4].endswith("|  |  |")
    for line, name in ((lines[3], "steps:8"), (lines[5], "DeepCache:2")):
        gain = rows[name]["gain"]
        assert gain["over"] == str(plan)
        assert line.endswith(f"| `{plan}` | {-gain['psnr']:+.1f} ± {gain['error']:.1f} |")


@pytest.mark.slow
def test_no_quality_is_compared_with_a_baseline_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    words = f"--model {model} --steps 1 --methods toca:2,steps:1 --peers DeepCache:2 --rounds 1"
    words += f" --device cpu --quality {tmp_path / 'pictures'} --prompts 1"
    monkeypatch.setattr("sys.argv", ["peers_table", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        peers_table.main()
    assert "peers_table: methods: toca:2, which all are compared with:" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_the_table_says_how_much_nearer_a_plan_is() -> None:
    rows = [BenchRow(name, spread=1.0, speedup=1.0) for name in ("steps:2", "plan", "pab", "equal", "one")]
    compared: list[dict[str, Any]] = [
        {"name": row.name, "psnr": 20.0, "feature_distance": 0.1, "fd": 3.0, "gain": None} for row in rows
    ]
    compared[2]["gain"] = {"over": "plan", "psnr": -4.26, "error": 0.34}
    compared[3]["gain"] = {"over": "plan", "psnr": None, "error": None}
    compared[4]["gain"] = {"over": "plan", "psnr": 1.0, "error": None}
    ends = [line.split("| 0.1000 ")[1] for line in peers_table.table(rows, compared)[2:]]
    assert ends == ["|  |  |"] * 2 + ["| `plan` | +4.3 ± 0.3 |", "| `plan` | - |", "| `plan` | -1.0 ± - |"]


def test_all_peers_are_named_with_their_numbers() -> None:
    names = [one.name for one in peers_table.rows("steps:50", "all", 50)]
    assert names == ["steps:50", *(f"{name}:{kind.default}" for name, kind in PEERS.items())]
    assert "DeepCache:3" in names


def test_the_table_says_what_fails_or_changes_nothing() -> None:
    rows = [
        BenchRow("steps:2", spread=1.0, speedup=1.0),
        BenchRow(
            "taylorseer", spread=1.25, speedup=0.99, macs_ratio=1.0, changes_nothing=True, disturbed=(1,)
        ),
        BenchRow("firstblock", error="ValueError: one | two\nthree"),
    ]
    compared = [{"name": "steps:2", "psnr": None, "feature_distance": -1e-17, "fd": 170.834}]
    compared += [compared[0] | {"name": "taylorseer"}]
    assert peers_table.table(rows, compared)[2:] == [
        "| `steps:2` | 1.00x | 1.00 | - | - | - | - | - | 170.83 |",
        "| `taylorseer` (changes nothing, disturbed) | 0.99x | 1.25 | 1.00x | - | - | - | - | 170.83 |",
        "| `firstblock` | fails: ValueError: one \\| two three |  |  |  |  |  |  |  |",
    ]


@pytest.mark.parametrize("name", ["peers-emoji", "peers-cifar10", "plans-beside-peers-cifar10"])
def test_committed_tables_are_those_of_their_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    results = Path(peers_table.__file__).with_name("results")
    for file in results.glob(f"{name}*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("sys.argv", ["peers_table", "--table", "--json", str(tmp_path / f"{name}.json")])
    peers_table.main()
    assert (tmp_path / f"{name}.md").read_text() == (results / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table"], "--json: None is not allowed with --table, it must be a result"),
        (["--json", "x.json"], "one of --model and --arch is needed"),
    ],
)
def test_a_table_of_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["peers_table", *words])
    with pytest.raises(SystemExit, match="2"):
        peers_table.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "first"),
    [
        ({}, 8),
        ({"transformer_blocks": 24}, 8),
        ({"transformer_blocks": 6}, 3),
        ({"transformer_blocks": 1}, 1),
        ({"blocks": 30}, 8),
        ({"transformer_blocks": 19, "single_transformer_blocks": 4}, 2),
    ],
)
def test_cache_dit_computes_its_default_or_half_of_few_blocks(counts: dict[str, int], first: int) -> None:
    denoiser = SimpleNamespace(**{name: [None] * count for name, count in counts.items()})
    assert always_computed(denoiser, 8) == first
