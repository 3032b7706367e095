"""regrow's methods beside the public accelerators on one pipeline, timed in turns as `regrow bench` does.

    python benchmarks/peers_table.py --arch sd15 --methods steps:50,dato:b1 --peers tomesd:0.5,DeepCache:5
    python benchmarks/peers_table.py --model emoji --images 2 --quality work/peers --prompts 32

    python benchmarks/peers_table.py --model cifar10 --images 8 --methods steps:50,steps:16,plan.json \
        --peers cache-dit-taylorseer:0.24,taylorseer:5 --quality work/peers --prompts 16 --seed 1000

With `--quality` the pictures of those that could be timed are then compared as `regrow eval` does. Those of
no calibrated plan are also compared, picture by picture, with the slowest plan that is at least as fast.
Beside the file of `--json`, and of its quality, goes the table of both as Markdown; `--table` makes that
only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import PEERS, peer

from regrow.lab.cli.bench import BenchRequest, noted, run_bench
from regrow.lab.cli.evaluate import EvalRequest, run_eval
from regrow.lab.cli.models import check_pictures
from regrow.lab.cli.terminal import amount
from regrow.lab.measure.bench import BenchRow
from regrow.lab.measure.machine import PACKAGES
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.calibrated import Calibrated


def rows(methods: str, peers: str, steps: int) -> tuple[Variant, ...]:
    """The rows by their names, separated by commas; "all" are all peers at their defaults.

    Raises:
        ValueError: if a name is not known.
    """
    everyone = [f"{name}:{kind.default}" for name, kind in PEERS.items()]
    specs = everyone if peers == "all" else [spec for spec in peers.split(",") if spec]
    own = [variant(spec.strip(), steps) for spec in methods.split(",")]
    return (*own, *(peer(spec.strip(), steps) for spec in specs))


def plans_beside(variants: Sequence[Variant], timed: Sequence[BenchRow]) -> dict[str, str]:
    """By names of rows that are no calibrated plan, the slowest plan that is at least as fast, if any is.

    Args:
        variants: the first is the baseline, which has none.
        timed: the row of each.
    """
    speeds = {one.name: row.speedup for one, row in zip(variants, timed, strict=True) if row.speedup}
    known = [one for one in variants[1:] if one.name in speeds]
    plans = [one.name for one in known if isinstance(one.config, Calibrated)]
    found: dict[str, str] = {}
    for name in (one.name for one in known if one.name not in plans):
        fast = [plan for plan in plans if speeds[plan] >= speeds[name]]
        if fast:
            found[name] = min(fast, key=lambda plan: speeds[plan])
    return found


def compare(args: argparse.Namespace, variants: Sequence[Variant], timed: Sequence[BenchRow]) -> None:
    """Quality of the rows that could be timed, into the folder and beside the result."""
    against = plans_beside(variants, timed)
    working = [one for one, row in zip(variants, timed, strict=True) if row.error is None]
    # What others are compared with comes first.
    working[1:] = sorted(working[1:], key=lambda one: one.name not in against.values())
    request = EvalRequest(
        model=args.model,
        prompts=args.prompts,
        reference=args.reference,
        steps=args.steps,
        seed=args.seed,
        guidance=args.guidance,
        height=args.height,
        width=args.width,
        device=args.device,
        dtype=args.dtype,
        batch=args.batch,
        out=args.quality,
    )
    run_eval(request, working, against)
    if args.json is not None:
        shutil.copy(args.quality / "result.json", quality_file(args.json))


def quality_file(times: Path) -> Path:
    """Where the quality of a table of times is kept."""
    return times.with_stem(f"{times.stem}-quality")


def write_table(times: Path) -> None:
    """The Markdown beside a result, from it and its quality, if there is one.

    Raises:
        ValueError: if the quality is of another run.
    """
    timed, file = json.loads(times.read_text()), quality_file(times)
    compared: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    rows = [BenchRow(**row) for row in timed["rows"]]
    if file.exists():
        missing = {row.name for row in rows if row.error is None} - {
            row["name"] for row in compared["rows"]
        }
        other = [name for name in ("model", "dtype", "guidance") if timed[name] != compared[name]]
        if missing or other:
            of = f"without {', '.join(sorted(missing))}" if missing else f"of another {other[0]}"
            raise ValueError(f"json: {file} is {of}; measure it anew with --quality, or remove it")
    lines = table(rows, compared["rows"])
    times.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(timed: Sequence[BenchRow], compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a row for every method and peer, also for what fails or changes nothing.

    Args:
        timed: rows of `regrow bench`.
        compared: rows of `regrow eval`; its columns are left out if there are none. Where rows are compared
            with calibrated plans, these columns stand for the distance of all pictures as a set.
    """
    quality = {row["name"]: row for row in compared}
    beside = any(row.get("gain") for row in compared)
    titles = ["method", "speed-up", "spread", "fewer MACs", "efficiency", "peak MiB"]
    titles += ["PSNR dB", "feature distance"] if quality else []
    titles += ["plan at least as fast", "plan nearer by dB"] if beside else ["FD-EffNet"] * bool(quality)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in timed:
        name = noted(row).replace(row.name, f"`{row.name}`", 1)
        if row.error is not None:
            error = " ".join(row.error.split()).replace("|", "\\|")
            cells = [name, f"fails: {error}", *[""] * (len(titles) - 2)]
        else:
            cells = [
                name,
                amount(row.speedup, ".2f", "x"),
                f"{row.spread:.2f}",
                amount(row.macs_ratio, ".2f", "x"),
                amount(row.efficiency, ".2f"),
                amount(row.peak_mib, ".0f"),
            ]
            if quality:
                seen = quality[row.name]
                # What equals the baseline's pictures has no distance to them.
                distance = None if seen["psnr"] is None else seen["feature_distance"]
                cells += [amount(seen["psnr"], ".1f"), amount(distance, ".4f")]
                cells += _nearer(seen["gain"]) if beside else [amount(seen["fd"], ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _nearer(gain: Mapping[str, Any] | None) -> list[str]:
    """The plan that a row is compared with, and how much nearer the plan is, with its standard error."""
    if gain is None:
        return ["", ""]
    if gain["psnr"] is None:
        return [f"`{gain['over']}`", "-"]
    return [f"`{gain['over']}`", f"{-gain['psnr']:+.1f} ± {amount(gain['error'], '.1f')}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="bundled name, folder or hub id of any pipeline from text")
    model.add_argument("--arch", help="sd15, sdxl, sd3-1024 and others, with random weights")
    parser.add_argument("--methods", default="steps:50,sito:d,dato:b1", help="the first is the baseline")
    parser.add_argument("--peers", default="all", help=f"all, or some of {', '.join(PEERS)}")
    parser.add_argument("--prompt", action="append", help="the model's own if none; may be repeated")
    parser.add_argument("--images", type=int, default=1, help="pictures in one batch")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps of methods and peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--frames", type=int, help="of a video")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    parser.add_argument("--quality", type=Path, default=None, help="folder for the pictures; gone on with")
    parser.add_argument(
        "--prompts", default="32", help="of --quality: a file, or a number of the model's own"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --quality: of the first picture")
    parser.add_argument("--reference", type=Path, default=None, help="of --quality: true pictures")
    parser.add_argument("--batch", type=int, default=16, help="of --quality: pictures in one batch")
    parser.add_argument("--table", action="store_true", help="only the Markdown, from the file of --json")
    args = parser.parse_args()
    if args.table:
        if args.json is None or not args.json.exists():
            parser.error(f"--json: {args.json} is not allowed with --table, it must be a result")
        try:
            write_table(args.json)
        except ValueError as error:
            parser.error(str(error))
        return
    if args.model is None and args.arch is None:
        parser.error("one of --model and --arch is needed")
    if args.quality is not None and (args.model is None or args.compile):
        parser.error("--quality: it needs --model, and goes without --compile")
    # cache-dit tells all it does, between the lines of the progress bar.
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        if args.quality is not None:
            check_pictures(args.model)
        variants = rows(args.methods, args.peers, args.steps)
        request = BenchRequest(
            model=args.model,
            arch=args.arch,
            prompt=tuple(args.prompt or ()),
            images=args.images,
            rounds=args.rounds,
            guidance=args.guidance,
            height=args.height,
            width=args.width,
            frames=args.frames,
            device=args.device,
            dtype=args.dtype,
            compiled=args.compile,
            out=args.json,
        )
        packages = dict.fromkeys((*PACKAGES, *(kind.package for kind in PEERS.values())))
        found = run_bench(request, variants, tuple(packages))
        if args.json is not None:
            # Of older times.
            quality_file(args.json).unlink(missing_ok=True)
            write_table(args.json)
        if args.quality is not None and found[0].error is not None:
            raise ValueError(f"methods: {found[0].name}, which all are compared with: {found[0].error}")
        if args.quality is not None:
            compare(args, variants, found)
        if args.json is not None:
            write_table(args.json)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"peers_table: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
