"""The ``regrow`` command."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from regrow import __version__, zoo
from regrow.fields import MOST_CALLS, MOST_COUNT, MOST_GUIDANCE, MOST_PIXELS, MOST_SEED, check_within
from regrow.lab.cli.ablations import ABLATIONS, ablated, against, merged, pair
from regrow.lab.cli.default_methods import usual
from regrow.lab.cli.engine import Engine, Where
from regrow.lab.cli.harmless import in_one_line, in_plain_words
from regrow.lab.cli.terminal import busy, output, remarks, table
from regrow.lab.cli.train import train_app
from regrow.lab.measure.extractors import Network
from regrow.lab.search.search import Algorithm
from regrow.words import offer, one_line, shown

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(train_app, name="train")

FIELDS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of the commands that take the fields of the method they are told as options."""
STOPPED = 130
"""Exit code of a command that was stopped by Ctrl-C."""
_RESUMABLE = frozenset({"calibrate", "eval", "search", "train"})
# typer exports no more of the classes of what it raises for options it can't read.
_UsageError: Any = typer.BadParameter.__bases__[0]
_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

# Names are those of diffusers, so that a user can look them up there.
DTYPES = ("float32", "bfloat16", "float16")

SIDE = 8
"""Pixels of which a picture's sides are multiples."""

USUAL = "By default all steps, half, and what runs on the model."


def _methods(given: Optional[str], steps: int, usual: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """The names of methods that were asked for, or the usual ones beside all steps and half of them."""
    if given is None:
        fewer = [f"steps:{steps // 2}"] if steps > 1 else []
        return (f"steps:{steps}", *fewer, *usual())
    names = tuple(name.strip() for name in given.split(","))
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--methods: {name} is there {names.count(name)} times, each is allowed once")
    return names


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype: {shown(dtype)} is not allowed; allowed are {', '.join(DTYPES)}{offer(dtype, DTYPES)}"
        )
    return dtype


def _known_scheduler(text: Optional[str]) -> Optional[str]:
    if text is not None:
        from regrow.lab.measure.samplers import Sampler

        Sampler.parse(text)
    return text


def _known_guidance(value: Optional[float]) -> Optional[float]:
    if value is not None:
        check_within("guidance", value, 0, MOST_GUIDANCE)
    return value


def _known_side(option: typer.CallbackParam, value: Optional[int]) -> Optional[int]:
    if value is not None:
        check_within(str(option.name), value, SIDE, MOST_PIXELS)
        if value % SIDE:
            raise ValueError(
                f"{option.name}: {value} is not allowed, it must be a multiple of {SIDE}, such as "
                f"{value - value % SIDE}"
            )
    return value


def _known_seed(value: int) -> int:
    # Those of the pictures follow it.
    check_within("seed", value, 0, MOST_SEED - MOST_COUNT)
    return value


Model = Annotated[str, typer.Option(help="Bundled name, folder, file of weights, or hub id.")]
Method = Annotated[
    Optional[str],
    typer.Option(help="Method; see [b]regrow methods[/b]. Or with settings: cat:0.3+deepcache:2."),
]
Preset = Annotated[Optional[str], typer.Option(help="Preset of the method.")]
ScheduleFile = Annotated[
    Optional[Path], typer.Option(help="Schedule file, YAML or JSON, or hub:owner/name/file.")
]
Ratio = Annotated[Optional[float], typer.Option(help="One pruning ratio for all calls.")]
Interval = Annotated[
    Optional[int], typer.Option(help="A full call every N, depth 1 between.", min=1, max=MOST_CALLS)
]
Searched = Annotated[str, typer.Option(help="See [b]regrow methods[/b]; or two, as deepcache+tome.")]
Steps = Annotated[int, typer.Option(help="Sampler steps.", min=1, max=MOST_CALLS)]
MethodSteps = Annotated[int, typer.Option(help="Sampler steps of the methods.", min=1, max=MOST_CALLS)]
StepRange = Annotated[str, typer.Option(help="Sampler steps; 12..50 searches for their number too.")]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the first prompt; the others follow.", callback=_known_seed),
]
Scheduler = Annotated[
    Optional[str],
    typer.Option(
        help="Scheduler of diffusers instead of the model's: EulerDiscrete, PNDM:skip_prk_steps=true.",
        callback=_known_scheduler,
    ),
]
Guidance = Annotated[
    Optional[float],
    typer.Option(help="Guidance scale; the pipeline's own.", callback=_known_guidance),
]
Height = Annotated[
    Optional[int], typer.Option(help="Height in pixels; the model's own.", callback=_known_side)
]
Width = Annotated[
    Optional[int], typer.Option(help="Width in pixels; the model's own.", callback=_known_side)
]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, mps; the best there is.")]
Dtype = Annotated[str, typer.Option(help=" or ".join(DTYPES) + ".", callback=_known_dtype)]
Batch = Annotated[int, typer.Option(help="Pictures in one batch.", min=1, max=MOST_COUNT)]
EngineChoice = Annotated[Engine, typer.Option(help="What does the work: this process, or a Ray cluster.")]
WorkerCount = Annotated[Optional[int], typer.Option(help="Workers on the cluster; as many as fit.", min=1)]
Address = Annotated[
    Optional[str],
    typer.Option(help="Address of the cluster, or auto; one is started on this machine if none."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _say_version(asked: bool) -> None:
    if asked:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("diffusers", "torch"))
        print(f"regrow {__version__} ({versions}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def regrow(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Faster diffusion sampling by computing fewer tokens at fewer steps."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("demo-out"),
    steps: Steps = 50,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Six prompts: unaccelerated, fewer steps, SiTo d, DaTo b1, three plans searched for this model.

    No download, under three minutes on two CPU cores.

    Example: [b]regrow demo --out demo-out[/b]
    """
    from regrow.lab.cli.demo import run_demo

    run_demo(out, steps, seed, as_json)


@app.command(context_settings=FIELDS)
def generate(
    context: typer.Context,
    prompt: Annotated[
        Optional[list[str]], typer.Option(help="Prompt, or class; give it again for more pictures.")
    ] = None,
    prompts: Annotated[
        Optional[Path], typer.Option(help="Instead: a file of prompts, .txt with one a line; see eval.")
    ] = None,
    negative_prompt: Annotated[
        Optional[str], typer.Option(help="What the pictures shall not show.")
    ] = None,
    image: Annotated[
        Optional[Path], typer.Option(help="Picture to begin with, scaled to about the model's size.")
    ] = None,
    strength: Annotated[
        Optional[float], typer.Option(help="How much of --image is made anew, up to 1; the pipeline's own.")
    ] = None,
    model: Model = "emoji",
    method: Method = None,
    preset: Preset = None,
    schedule: ScheduleFile = None,
    ratio: Ratio = None,
    interval: Interval = None,
    steps: Annotated[
        Optional[int],
        typer.Option(min=1, max=MOST_CALLS, help="Sampler steps; 50, or those of a calibrated plan."),
    ] = None,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    frames: Annotated[Optional[int], typer.Option(help="Of a video; its own if none.", min=1)] = None,
    fps: Annotated[int, typer.Option(help="Frames of a video a second.", min=1, max=240)] = 8,
    out: Annotated[
        Path, typer.Option(help="Picture or video file (.mp4, .gif); more prompts get numbers.")
    ] = Path("out.png"),
    device: Device = None,
    dtype: Dtype = "float32",
    batch: Batch = 16,
    compare: Annotated[bool, typer.Option(help="Also unaccelerated, side by side.")] = False,
    save_schedule: Annotated[
        Optional[Path],
        typer.Option(help="File (.yaml, .json) for what the calls did, to be had again by --schedule."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make pictures or videos from texts or classes with a diffusers model, accelerated by a method.

    Beside the picture a JSON file of its name says what made it: versions, prompts, seed, method, settings.

    Example: [b]regrow generate --prompt "large owl on blue" --method dato --preset b1 --compare[/b]
    """
    from regrow.lab.cli.generate import Request, run_generate
    from regrow.lab.cli.options import method_config, method_label, refuse
    from regrow.lab.measure.prompts import read_prompts

    config, label = None, "unaccelerated"
    if method is None:
        refuse(context.args)
    if method is None and schedule is not None:
        method = "dato"
    if method is not None:
        config = method_config(
            method,
            preset=preset,
            schedule=schedule,
            ratio=ratio,
            interval=interval,
            steps=steps or 50,
            more=context.args,
        )
        label = method_label(method, preset, schedule, ratio, interval, context.args)
        steps = steps or config.sampler_steps
    elif any(value is not None for value in (preset, ratio, interval)):
        raise ValueError("--preset, --ratio, --interval: need --method")
    if bool(prompt) == (prompts is not None):
        raise ValueError("--prompt, --prompts: one of them must be given, and only one")
    run_generate(
        Request(
            model=model,
            prompts=tuple(prompt or read_prompts(prompts or Path())),
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            steps=steps or 50,
            scheduler=scheduler,
            guidance=guidance,
            seed=seed,
            height=height,
            width=width,
            frames=frames,
            fps=fps,
            batch=batch,
            out=out,
            device=device,
            dtype=dtype,
            compare=compare,
            save_schedule=save_schedule,
        ),
        config,
        label,
        as_json,
    )


@app.command()
def methods(
    name: Annotated[Optional[str], typer.Argument(help="A system: all its fields and presets.")] = None,
    as_json: AsJson = False,
) -> None:
    """The systems: what each does, where it works, its presets; or all of one.

    Example: [b]regrow methods[/b]
    or [b]regrow methods dato[/b]
    """
    from regrow.lab.cli.methods import run_methods

    run_methods(name, as_json)


@app.command(context_settings=FIELDS)
def profile(
    context: typer.Context,
    arch: Annotated[Optional[str], typer.Option(help="sd15, sdxl, emoji, sd3-1024 and others.")] = None,
    model: Annotated[Optional[str], typer.Option(help="Folder or hub id instead; no weights read.")] = None,
    height: Height = None,
    width: Width = None,
    method: Method = None,
    preset: Preset = None,
    schedule: ScheduleFile = None,
    ratio: Ratio = None,
    interval: Interval = None,
    steps: Annotated[int, typer.Option(help="Calls of the denoiser.", min=1, max=MOST_CALLS)] = 50,
    exclude_attention: Annotated[
        bool, typer.Option("--exclude-attention", help="Leave out products of queries, keys and values.")
    ] = False,
    per_guided_image: Annotated[
        bool, typer.Option("--per-guided-image", help="Count both halves of a guided batch, as papers do.")
    ] = False,
    text_in_full_calls: Annotated[
        Optional[bool],
        typer.Option(
            "--text-in-full-calls/--text-once",
            help="Count what depends on the text alone in every full call, or once a generation, as it is "
            "computed; once, or as papers do with --per-guided-image in every full call.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count MACs of a generation on the meta device: no weights, a few seconds.

    Per image, batch 1, attention counted unless told otherwise, choosing tokens counted apart.

    Example: [b]regrow profile --arch sd15 --method dato --preset b1 --ratio 0.5[/b]
    or [b]regrow profile --arch sd3-1024 --steps 28 --exclude-attention --per-guided-image[/b]
    The second is how the CAT Pruning paper counts.
    """
    from regrow.lab.cli.models import config_of
    from regrow.lab.cli.options import method_config, method_label, refuse
    from regrow.lab.measure import architecture, architecture_of
    from regrow.lab.measure import profile as count

    if method is None:
        refuse(context.args)
    if (arch is None) == (model is None):
        raise ValueError("--arch, --model: give exactly one of them")
    config, label = None, "unaccelerated"
    if method is not None:
        config = method_config(
            method,
            preset=preset,
            schedule=schedule,
            ratio=ratio,
            interval=interval,
            steps=steps,
            more=context.args,
        )
        label = method_label(method, preset, schedule, ratio, interval, context.args)
    if method is None and any(value is not None for value in (preset, schedule, ratio, interval)):
        raise ValueError("--preset, --schedule, --ratio, --interval: need --method")
    what = architecture(arch) if arch is not None else architecture_of(config_of(model or ""))
    with busy(remarks(), "counting MACs"):
        result = count(
            what,
            config,
            steps,
            name=label,
            height=height,
            width=width,
            attention=not exclude_attention,
            guided=per_guided_image,
            text_once=not (per_guided_image if text_in_full_calls is None else text_in_full_calls),
        )
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    shown = table("", "calls", "depth", "pruned", "GMACs a call", "of full", "choosing tokens")
    for kind in result.kinds:
        share = kind.macs / result.baseline_macs_per_call
        chosen = f"{kind.selection_macs / 1e9:.2f}" if kind.selection_macs else "-"
        shown.add_row(
            str(kind.count),
            kind.depth,
            f"{kind.ratio:.0%}",
            f"{kind.macs / 1e9:.2f}",
            f"{share:.2%}",
            chosen,
        )
    output().print(shown)
    print(
        f"{result.arch}, {result.method}: {result.macs / 1e9:.1f} of {result.baseline_macs / 1e9:.1f} "
        f"GMACs in {result.calls} calls, {result.macs_ratio:.2f}x fewer"
    )


@app.command()
def bench(
    methods: Annotated[
        Optional[str],
        typer.Option(help=f"Comma-separated; the first is the baseline. {USUAL}"),
    ] = None,
    model: Annotated[Optional[str], typer.Option(help="Bundled name, folder, or hub id.")] = None,
    arch: Annotated[
        Optional[str],
        typer.Option(
            help="sd15, sdxl, sd3-1024 and others, random weights, without text encoder and decoder."
        ),
    ] = None,
    images: Annotated[
        Optional[int], typer.Option(help="Made in one batch; by default one a prompt.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 3,
    steps: MethodSteps = 50,
    prompt: Annotated[Optional[list[str]], typer.Option(help="Prompt; the model's own if none.")] = None,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Annotated[Optional[int], typer.Option(help="Of a video; its own if none.", min=1)] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the transformer blocks.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="JSON file for the result.")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Bar chart of the speed-ups, PNG or SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time methods on one pipeline in turns: latency, memory, MACs, efficiency.

    Methods: steps:25, sito:d, tome:0.5, deepcache:5, dato:b1, dato:FILE, deepcache:5+tome:0.5. Also of a
    pipeline of videos from text.

    What is known is printed after each timed generation, and --out holds it. --json prints one object: its
    "timed" grows by a line a generation, its "rows" come last; "complete" is false if it was stopped.

    Example: [b]regrow bench --model emoji --methods steps:50,sito:d,dato:b1 --images 4[/b]
    """
    from regrow.lab.cli.bench import Request, run_bench
    from regrow.lab.measure.variants import variant

    if model is not None and arch is not None:
        raise ValueError("--arch, --model: only one of them is allowed")
    if arch is not None and prompt:
        raise ValueError(
            "--prompt: --arch has random weights, whose text is random too; it must not be given"
        )
    texts = prompt or []
    images = max(len(texts), 1) if images is None else images
    if len(texts) > images:
        raise ValueError(f"--prompt: {len(texts)} are not allowed with --images {images}")
    if arch is None:
        model = model or "emoji"
    names = _methods(methods, steps, lambda: usual(model, arch).measured)
    rows = run_bench(
        Request(
            variants=tuple(variant(name, steps) for name in names),
            model=model,
            arch=arch,
            prompts=tuple(texts),
            images=images,
            rounds=rounds,
            scheduler=scheduler,
            guidance=guidance,
            height=height,
            width=width,
            frames=frames,
            device=device,
            dtype=dtype,
            compiled=compiled,
            out=out,
            plot=plot,
        ),
        as_json,
    )
    if all(row.error is not None for row in rows):
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    methods: Annotated[
        Optional[str],
        typer.Option(help=f"Comma-separated; the first is the baseline. {USUAL}"),
    ] = None,
    ablation: Annotated[Optional[str], typer.Option(help="Instead: " + ", ".join(ABLATIONS) + ".")] = None,
    pairs: Annotated[
        Optional[list[str]],
        typer.Option(
            "--against", help="Two of the methods, a comma between: the first's gain over the second."
        ),
    ] = None,
    model: Model = "emoji",
    prompts: Annotated[
        str,
        typer.Option(
            help="A file (.txt, COCO's captions .json, PartiPrompts' .tsv, DrawBench's .csv), "
            "coco, parti, drawbench or imagenet from the hub, or a number of the model's own."
        ),
    ] = "64",
    template: Annotated[
        Optional[str], typer.Option(help='What each prompt is put into: "a photo of a {}".')
    ] = None,
    each: Annotated[
        Optional[int], typer.Option(help="Pictures a prompt; 2 of ImageNet's classes, else 1.")
    ] = None,
    first: Annotated[Optional[int], typer.Option(help="So many of a file's prompts.", min=1)] = None,
    features: Annotated[
        Network, typer.Option(help="Network of FD and so on; inception is FID's, by torch-fidelity.")
    ] = Network.EFFNET,
    reference: Annotated[
        Optional[Path], typer.Option(help="Folder of true pictures, or what --save-reference wrote.")
    ] = None,
    save_reference: Annotated[
        Optional[Path], typer.Option(help="Keep the reference's features here, .safetensors.")
    ] = None,
    clip: Annotated[
        Optional[str], typer.Option(help="CLIP model for the CLIP score: folder or id.")
    ] = None,
    scores: Annotated[
        Optional[list[Path]], typer.Option(help="JSON of other tools' scores; see benchmarks/external.")
    ] = None,
    export: Annotated[
        Optional[Path], typer.Option(help="Write the pictures here as PNG, for other tools.")
    ] = None,
    steps: MethodSteps = 50,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch: Batch = 16,
    engine: EngineChoice = Engine.LOCAL,
    workers: WorkerCount = None,
    address: Address = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and results; gone on with.")] = Path(
        "eval"
    ),
    as_json: AsJson = False,
) -> None:
    """Make pictures of many prompts by each method and compare them. Killed, it goes on where it was.

    Example: [b]regrow eval --model emoji --methods steps:50,steps:10,dato:b1 --prompts 64[/b]
    or [b]regrow eval --ablation alignment[/b]
    """
    from regrow.lab.cli.evaluate import Request, run_eval
    from regrow.lab.measure.variants import variant

    if ablation is not None and methods is not None:
        raise ValueError("--ablation, --methods: only one of them is allowed")
    if ablation is None:
        names = _methods(methods, steps, lambda: usual(model).measured)
    else:
        names = ablated(ablation, steps)
    run_eval(
        Request(
            variants=tuple(variant(name, steps) for name in names),
            against=merged(
                ({} if ablation is None else against(ablation, steps)).items(), map(pair, pairs or ())
            ),
            model=model,
            prompts=prompts,
            template=template,
            each=each,
            first=first,
            features=features,
            reference=reference,
            save_reference=save_reference,
            clip=clip,
            scores=tuple(scores or ()),
            export=export,
            steps=steps,
            seed=seed,
            scheduler=scheduler,
            guidance=guidance,
            height=height,
            width=width,
            device=device,
            dtype=dtype,
            batch=batch,
            where=Where(engine, workers, address),
            out=out,
        ),
        as_json,
    )


@app.command()
def trace(
    methods: Annotated[
        Optional[str],
        typer.Option(help=f"Comma-separated; the first is unaccelerated. {USUAL}"),
    ] = None,
    model: Model = "emoji",
    prompt: Annotated[Optional[list[str]], typer.Option(help="Prompt; give it again for more.")] = None,
    prompts: Annotated[
        Optional[int], typer.Option(help="Instead: so many of the model's own.", min=1)
    ] = None,
    module: Annotated[
        Optional[list[str]],
        typer.Option(help="Module whose output's change is shown, instead of the pruned blocks' inputs."),
    ] = None,
    steps: MethodSteps = 50,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch: Batch = 4,
    out: Annotated[Path, typer.Option(help="Folder for trace.json and the plots.")] = Path("trace"),
    plots: Annotated[bool, typer.Option(help="Draw PNGs as well.")] = True,
    as_json: AsJson = False,
) -> None:
    """Look inside generations: deviation at each step, change of features, how often tokens are computed.

    Example: [b]regrow trace --methods steps:50,sito:d,dato:b1 --prompt "large owl on blue" --out trace[/b]
    """
    from regrow.lab.cli.trace import Request, prompts_of, run_trace

    texts = prompts_of(model, prompt or (), prompts)
    run_trace(
        Request(
            methods=_methods(methods, steps, lambda: usual(model).traced),
            model=model,
            prompts=texts,
            modules=tuple(module or ()),
            steps=steps,
            seed=seed,
            scheduler=scheduler,
            guidance=guidance,
            height=height,
            width=width,
            device=device,
            dtype=dtype,
            batch=batch,
            out=out,
            plots=plots,
        ),
        as_json,
    )


@app.command()
def search(
    context: typer.Context,
    model: Model = "emoji",
    method: Searched = "dato",
    steps: StepRange = "50",
    prompts: Annotated[str, typer.Option(help="A file of prompts, or a number of the model's own.")] = "16",
    objective: Annotated[
        Optional[list[str]],
        typer.Option(
            help="quality:deviation, psnr, features, fd, clip or imagereward; cost:macs, latency or "
            "memory. Give it again for more."
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Generations of plans such as 30, or minutes such as 30m.")
    ] = "30",
    algorithm: Annotated[Algorithm, typer.Option(help="How plans are proposed.")] = Algorithm.NSGA2,
    population: Annotated[int, typer.Option(help="Plans in a generation.", min=2)] = 20,
    crossover: Annotated[float, typer.Option(help="Probability of crossover.", min=0, max=1)] = 0.7,
    crossover_eta: Annotated[float, typer.Option(help="Its distribution index.")] = 7.0,
    mutation: Annotated[float, typer.Option(help="Probability of mutation.", min=0, max=1)] = 0.4,
    mutation_eta: Annotated[float, typer.Option(help="Its distribution index.")] = 15.0,
    uniform: Annotated[
        float, typer.Option(help="Share of the first generation that is the same at every step.")
    ] = 0.5,
    rungs: Annotated[
        Optional[str],
        typer.Option(help="Numbers of prompts of successive halving, as 2,4,8,16; by default doubling."),
    ] = None,
    patience: Annotated[
        Optional[float],
        typer.Option(
            help="A plan so many times worse than a cheaper one is given up; 2 if it can be; 0: never."
        ),
    ] = None,
    choices: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Other choices of a variable, as ratio=0,0.5, depth=0,1,full or recovery=reuse,taylor. "
            "Give it again for another variable."
        ),
    ] = None,
    w_ps: Annotated[
        Optional[float], typer.Option("--w-ps", help="Pick the plan of least quality + w_ps cost as well.")
    ] = None,
    beside: Annotated[
        Optional[str], typer.Option(help="Methods to stand beside the front, as deepcache:5,dato:b1.")
    ] = None,
    seed: Seed = 0,
    search_seed: Annotated[int, typer.Option(help="Seed of the search.", min=0, max=MOST_SEED)] = 0,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch: Batch = 16,
    clip: Annotated[Optional[str], typer.Option(help="CLIP model of quality:clip.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs in turns for cost:latency.", min=1)] = 3,
    engine: EngineChoice = Engine.LOCAL,
    workers: WorkerCount = None,
    address: Address = None,
    resume: Annotated[
        Optional[Path], typer.Option(help="Go on with the search in this folder, with its settings.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the search; gone on with.")] = Path("search"),
    plots: Annotated[bool, typer.Option(help="Draw plots and a page as well.")] = True,
    as_json: AsJson = False,
) -> None:
    """Find the plans of a method that cost least for each quality. Killed, it goes on where it was.

    A plan of DaTo has for each call a depth of 0, 1 or full, a ratio of 0 or .3 to .7, and a recovery:
    reuse, taylor or taylor2. With [b]--choices depth=0,full --choices ratio=0[/b] it forecasts the output,
    on any denoiser.

    Example: [b]regrow search --model emoji --method dato --budget 30m --beside deepcache:5,dato:b1[/b]
    or [b]regrow search --resume search --budget 60m[/b]
    """
    from regrow.lab.cli import search as command
    from regrow.lab.search.settings import SearchSettings

    asked = command.Asked(budget, tuple(beside.split(",")) if beside else (), w_ps)
    if resume is not None:
        out, settings = resume, SearchSettings.of(resume)
        asked = command.resumed(context, command.Asked.of(resume), asked)
    else:
        names = tuple(objective or ("quality:deviation", "cost:macs"))
        texts = command.prompts_of(model, prompts)
        settings = command.settings_of(
            model=model,
            method=method,
            steps=command.parse_steps(steps),
            prompts=texts,
            objectives=names,
            algorithm=algorithm,
            operators={
                "population": population,
                "crossover": crossover,
                "crossover_eta": crossover_eta,
                "mutation": mutation,
                "mutation_eta": mutation_eta,
                "uniform": uniform,
            },
            economy=command.parse_economy(rungs, patience, len(texts), names),
            budget=budget if algorithm is Algorithm.STAGED else None,
            choices=command.parse_choices(choices or ()),
            search_seed=search_seed,
            seed=seed,
            scheduler=scheduler,
            guidance=zoo.guidance_of(model, guidance),
            height=height,
            width=width,
            dtype=dtype,
            batch=batch,
            clip=clip,
            rounds=rounds,
        )
    request = command.Request(
        settings=settings,
        asked=asked,
        where=Where(engine, workers, address),
        device=device,
        out=out,
        plots=plots,
    )
    outcome = command.run_search(request)
    if as_json:
        print(json.dumps(outcome.result))
    else:
        command.print_search(outcome, request)
    if outcome.stopped:
        raise typer.Exit(STOPPED)


@app.command()
def calibrate(
    speedup: Annotated[
        Optional[float], typer.Option(help="Less time by this factor, as measured on this machine.")
    ] = None,
    fewer_macs: Annotated[
        Optional[float], typer.Option(help="Instead: fewer MACs of the denoiser by this factor.")
    ] = None,
    psnr: Annotated[
        Optional[float],
        typer.Option(help="Instead: the fastest plan whose pictures are as near, in dB."),
    ] = None,
    model: Model = "emoji",
    steps: Steps = 50,
    prompts: Annotated[str, typer.Option(help="A file of prompts, or a number of the model's own.")] = "16",
    seed: Seed = 0,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch: Annotated[
        int, typer.Option(help="Pictures in one batch, also where time is measured.", min=1, max=MOST_COUNT)
    ] = 4,
    out: Annotated[Path, typer.Option(help="Folder of the plan and of pictures.")] = Path("calibration"),
    as_json: AsJson = False,
) -> None:
    """Find the plan for a model that is nearest to its unaccelerated pictures at a speed.

    It is never worse than fewer steps: where these are nearest, the plan is fewer steps. Half of the
    prompts are run and recorded, forecasts of skipped calls are fitted to them, and the best are compared
    on the other half. The plan is a file for --method.

    Example: [b]regrow calibrate --model emoji --speedup 3[/b]
    """
    from regrow.lab.calibration.calibrate import Settings, Wish
    from regrow.lab.cli.calibrate import Request, run_calibrate
    from regrow.lab.cli.search import prompts_of

    wish = Wish(speedup, fewer_macs, psnr)
    settings = Settings(
        steps=steps,
        guidance=zoo.guidance_of(model, guidance),
        seed=seed,
        height=height,
        width=width,
        batch=batch,
        model=model,
    )
    run_calibrate(
        Request(
            settings=settings,
            prompts=prompts_of(model, prompts),
            scheduler=scheduler,
            device=device,
            dtype=dtype,
            out=out,
        ),
        wish,
        as_json,
    )


@app.command()
def share(
    file: Annotated[Path, typer.Argument(help="A plan: a schedule, or a method's configuration.")],
    repository: Annotated[str, typer.Argument(help="Of models on the Hugging Face hub: owner/name.")],
    name: Annotated[Optional[str], typer.Option(help="Its name there; that of the file.")] = None,
) -> None:
    """Put a plan on the Hugging Face hub, with the token of [b]hf auth login[/b].

    Example: [b]regrow share search/front/plan-03.yaml me/plans[/b], and then
    --schedule hub:me/plans/plan-03.yaml, or --method hub:me/plans/plan-03.json
    """
    from regrow import hub
    from regrow.schedule import Schedule

    plan = hub.load(file)
    address = hub.push(plan, repository, name or file.name)
    option = "--schedule" if isinstance(plan, Schedule) else "--method"
    print(f"{address}\n{option} {hub.PREFIX}{repository}/{name or file.name}")


def main() -> None:
    """Run the command. A mistake of the user becomes one line and exit code 2, Ctrl-C one and 130."""
    from safetensors import SafetensorError

    from regrow.models import UnsupportedModelError

    with warnings.catch_warnings(), _library_remarks():
        warnings.showwarning = _warn
        for kind in _FOR_DEVELOPERS:
            warnings.simplefilter("ignore", kind)
        try:
            code = app(prog_name="regrow", standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = STOPPED
        except _UsageError as error:
            where = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
            _fail(f"{in_plain_words(error, sys.argv)}{where}")
        except BrokenPipeError:
            # Whoever read the output wanted no more of it; nothing must be flushed into it at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (
            *(ValueError, OSError, UnsupportedModelError, ImportError),
            *(SafetensorError, MemoryError),
        ) as error:
            _fail(in_one_line(error))
    if code == STOPPED:
        again = "type the same command to "
        again += "go on where it was" if {*sys.argv[1:2]} & _RESUMABLE else "begin again"
        print(f"regrow: stopped; {again}", file=sys.stderr)
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    print(f"regrow: {message}", file=sys.stderr)
    sys.exit(2)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line."""
    print(f"regrow: warning: {one_line(' '.join(str(message).split()))}", file=sys.stderr)


@contextmanager
def _library_remarks() -> Iterator[None]:
    """Have remarks of diffusers look like regrow's warnings, and no one see those of transformers.

    They are about processors of pictures and the like, which a user of a pipeline does not choose.
    """
    transformers = logging.getLogger("transformers")
    level = transformers.level
    transformers.setLevel(logging.ERROR)
    handlers = logging.getLogger("diffusers").handlers
    before = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("regrow: warning: %(message)s"))
    try:
        yield
    finally:
        transformers.setLevel(level)
        for handler, formatter in zip(handlers, before, strict=False):
            handler.setFormatter(formatter)
