"""Quality against speed and MACs: every method a curve, on one model.

    python tools/compose_scenes.py --data noto.tgz --model src/regrow/zoo/emoji --decoded \\
        --count 1000 --out work/decoded
    python benchmarks/quality.py --prompts 1000 --reference work/decoded --dtype bfloat16 --engine ray
    python tools/cifar.py --data cifar-10-binary.tar.gz --count 1000 --out work/cifar-test
    python benchmarks/quality.py --model cifar10 --methods transformer --prompts 1000 \\
        --reference work/cifar-test --work work/quality-cifar10 --out benchmarks/results/quality-cifar10

First all variants are timed in turns (`regrow bench`, alone on the machine: killed, it begins anew), then
the pictures of all are made and compared (`regrow eval`: killed, it goes on). The result, a table and a
plot go to `--out`; `--table` only reads it. With `--only` they are of some variants, of which there may be
more pictures, with the times of the run of all; give them an `--out` of their own. `--times` takes the
times of another result, and `--also` the figures of variants that are not made here: hours of pictures can
be made on several days, or machines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

from regrow.lab.measure.prompts import named
from regrow.zoo import guidance_of

matplotlib.use("agg")
import matplotlib.pyplot as plt

Curves = Mapping[str, tuple[str, ...]]
ANYWHERE: Curves = {
    "fewer steps": tuple(f"steps:{n}" for n in (50, 40, 33, 25, 16, 12, 10, 8, 6, 5)),
    "FORA 2, 3, 5": tuple(f"fora:{n}" for n in (2, 3, 5)),
    "DeepCache 2 to 10": tuple(f"deepcache:{n}" for n in (2, 3, 5, 7, 10)),
}
UNET: Curves = ANYWHERE | {
    "AT-EDM .5": ("atedm:0.5",),
    "SiTo a to e": tuple(f"sito:{preset}" for preset in "abcde"),
    "ToMeSD .3 to .7": tuple(f"tome:{ratio}" for ratio in (0.3, 0.5, 0.7)),
    "DeepCache 2 to 10 + ToMeSD .5": tuple(f"deepcache:{n}+tome:0.5" for n in (2, 3, 5, 7, 10)),
    "DaTo every 2 to 10, r .5": tuple(f"dato:{n}" for n in (2, 3, 5, 7, 10)),
    "DaTo, the paper's b1 and fast": ("dato:b1", "dato:fast"),
    "DaTo, b1 as released": ("dato:b1-released",),
    "DaTo, searched": ("dato:emoji-quality", "dato:emoji-balanced", "dato:emoji-fast"),
}
TRANSFORMER: Curves = ANYWHERE | {
    "ToCa 2, 3, 5": tuple(f"toca:{n}" for n in (2, 3, 5)),
    "CAT Pruning .7 to .1": tuple(f"cat:{alpha}" for alpha in (0.7, 0.5, 0.3, 0.1)),
    "CAT Pruning .3 + DeepCache 2, 3": tuple(f"cat:0.3+deepcache:{n}" for n in (2, 3)),
    "AT-EDM .3 to .7, reused": tuple(f"atedm:reuse:ratio={ratio}" for ratio in (0.3, 0.5, 0.7)),
}
METHODS = {"unet": UNET, "transformer": TRANSFORMER}
# Told apart picture by picture: methods with the same calls, and those about as fast as fewer steps.
AGAINST = (
    *((f"dato:{n}", f"deepcache:{n}+tome:0.5") for n in (2, 3, 5, 7, 10)),
    ("dato:b1", "steps:12"),
    ("dato:emoji-quality", "steps:25"),
    ("dato:emoji-balanced", "steps:16"),
    ("dato:emoji-fast", "steps:12"),
    *((f"toca:{n}", f"fora:{n}") for n in (2, 3, 5)),
    ("deepcache:3", "steps:25"),
    ("deepcache:5", "steps:16"),
    ("cat:0.3", "steps:25"),
)
CURVES = UNET | TRANSFORMER


class Ratio(NamedTuple):
    """What methods are compared at.

    Args:
        field: of `Point`.
        title: over a table.
    """

    field: str
    title: str


SPEEDUP, MACS = Ratio("speedup", "a measured speed-up of"), Ratio("macs_ratio", "MACs fewer by")


class Measure(NamedTuple):
    """A figure of a variant.

    Args:
        field: of `Point`.
        title: over a table.
        label: of an axis.
        form: in which it is printed.
        best: ``min`` if less is better.
    """

    field: str
    title: str
    label: str
    form: str
    best: Callable[[Sequence[float]], float]


MEASURES = (
    Measure("psnr", "PSNR dB", "PSNR to own 50 steps, dB", ".1f", max),
    Measure("feature_distance", "feature distance", "feature distance to own 50 steps", ".3f", min),
    Measure("fd", "FD-EffNet", "FD-EffNet to true pictures", ".1f", min),
)
MARKERS = "osD^v*PXdh<"
TIMES = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
# Beyond its ends a curve keeps their value so far, in the logarithm: 25 steps are not quite twice as fast.
NEAR = 0.01


@dataclass(frozen=True)
class Point:
    """One variant: how much faster than 50 steps, and how good.

    Args:
        name: of the variant.
        speedup: measured, of whole generations.
        spread: of the slowest round over the fastest.
        macs_ratio: MACs of the baseline's denoiser over this one's.
        fd: Fréchet distance to the reference.
        psnr: median, dB, to the baseline's pictures of the same seeds; None for the baseline.
        ssim: mean, likewise.
        feature_distance: mean, likewise; None for the baseline too, from which no curve begins.
        peak_mib: peak memory of a generation above what was in use before; None if not measured.
        sfd: Fréchet distance of the spatial features to the reference.
        kd: kernel distance to the reference.
        precision: share of pictures within the reference's manifold.
        recall: share of the reference within the pictures' manifold.
        inception_score: on the extractor's classifier.
        disturbed: whether the machine did other things in a round.
    """

    name: str
    speedup: float
    spread: float
    macs_ratio: float
    fd: float
    psnr: float | None
    ssim: float
    feature_distance: float | None
    peak_mib: float | None
    sfd: float
    kd: float
    precision: float
    recall: float
    inception_score: float
    disturbed: bool


def points(quality: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, Point]:
    """What both results say of every variant that is in both.

    Raises:
        SystemExit: if the baseline is not among them, saying why.
    """
    timed = {row["name"]: row for row in speed["rows"] if row["error"] is None}
    base = quality["rows"][0]["name"]
    found = {
        row["name"]: Point(
            row["name"],
            timed[row["name"]]["speedup"],
            timed[row["name"]]["spread"],
            timed[row["name"]]["macs_ratio"],
            row["fd"],
            row["psnr"],
            row["ssim"],
            None if row["name"] == base else row["feature_distance"],
            timed[row["name"]]["peak_mib"],
            *(row[name] for name in ("sfd", "kd", "precision", "recall", "inception_score")),
            bool(timed[row["name"]]["disturbed"]),
        )
        for row in quality["rows"]
        if row["name"] in timed and row["fd"] is not None
    }
    if base not in timed:
        raise SystemExit(f"{base} was not timed")
    if base not in found:
        raise SystemExit(f"prompts: {quality['prompts']} are too few for the Fréchet distance of {base}")
    return found


def at(curve: Sequence[Point], ratio: Ratio, times: float, field: str) -> float | None:
    """A curve's value at a speed-up or so many times fewer MACs, linear in the logarithm; None outside of
    what was measured, but for `NEAR`."""
    known = sorted(
        (math.log(getattr(p, ratio.field)), value)
        for p in curve
        if (value := getattr(p, field)) is not None
    )
    if not known:
        return None
    within = min(max(math.log(times), known[0][0]), known[-1][0])
    if abs(within - math.log(times)) > NEAR:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x0 <= within <= x1:
            return y0 if x0 == x1 else y0 + (y1 - y0) * (within - x0) / (x1 - x0)
    return known[0][1]


def of_curves(found: Mapping[str, Point]) -> dict[str, list[Point]]:
    """The points of each curve; only fewer steps begin at the baseline."""
    curves = {name: [found[s] for s in specs if s in found] for name, specs in CURVES.items()}
    return {name: curve for name, curve in curves.items() if curve}


def table(found: Mapping[str, Point], measure: Measure, ratio: Ratio = SPEEDUP) -> list[str]:
    """Markdown: a row a curve, a column a speed-up; the best of a column of several in bold."""
    rows = {
        name: [at(curve, ratio, times, measure.field) for times in TIMES]
        for name, curve in of_curves(found).items()
    }
    # Methods that never are so fast have no row.
    rows = {name: values for name, values in rows.items() if any(v is not None for v in values)}
    columns = [[v for v in column if v is not None] for column in zip(*rows.values(), strict=True)]
    lines = [
        f"| {measure.title} at {ratio.title} | " + " | ".join(f"{t:g}x" for t in TIMES) + " |",
        "|---" * (len(TIMES) + 1) + "|",
    ]
    for name, values in rows.items():
        cells = []
        for value, column in zip(values, columns, strict=True):
            text = "" if value is None else f"{value:{measure.form}}"
            best = value is not None and len(column) > 1 and value == measure.best(column)
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def variants_table(found: Mapping[str, Point]) -> list[str]:
    """Markdown: every variant as it was measured."""
    lines = [
        "| method | speed-up | spread | fewer MACs | peak MiB | PSNR dB | SSIM | feature distance "
        "| FD-EffNet | sFD-EffNet | KD-EffNet | precision | recall | IS-EffNet |",
        "|---" * 14 + "|",
    ]
    for p in found.values():
        psnr = "" if p.psnr is None else f"{p.psnr:.1f}"
        distance = "" if p.feature_distance is None else f"{p.feature_distance:.4f}"
        peak = "" if p.peak_mib is None else f"{p.peak_mib:.0f}"
        name = f"`{p.name}` (disturbed)" if p.disturbed else f"`{p.name}`"
        cells = (
            *(name, f"{p.speedup:.2f}x", f"{p.spread:.2f}", f"{p.macs_ratio:.2f}x", peak, psnr),
            *(f"{p.ssim:.3f}", distance, f"{p.fd:.2f}", f"{p.sfd:.0f}", f"{p.kd:.4f}"),
            *(f"{p.precision:.3f}", f"{p.recall:.3f}", f"{p.inception_score:.2f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gains_table(quality: Mapping[str, Any]) -> list[str]:
    """Markdown: what methods have more than others, picture by picture; empty if none was compared."""
    lines = ["| method | over | PSNR gain dB |", "|---|---|---|"]
    for row in quality["rows"]:
        gain = row.get("gain")
        if gain is not None and gain["error"] is not None:
            value = f"{gain['psnr']:+.2f} ± {gain['error']:.2f}"
            lines.append(f"| `{row['name']}` | `{gain['over']}` | {value} |")
    return lines if len(lines) > 2 else []


def origin(machine: Mapping[str, Any]) -> str:
    """A machine, a day and a version of regrow in words."""
    return f"{machine['gpu'] or machine['processor']}, {machine['date']}, code {machine['code']}"


def origins(quality: Mapping[str, Any]) -> dict[str, list[str]]:
    """The variants whose pictures were compared on a machine on a day, by `origin`.

    One of which some pictures were made by other code or elsewhere, and not compared with those of this,
    is marked.
    """
    found: dict[str, list[str]] = {}
    for row in quality["rows"]:
        mark = " (some made by other code or elsewhere)" if row["made_otherwise"] else ""
        found.setdefault(origin(row["machine"]), []).append(f"`{row['name']}`{mark}")
    return found


def draw(found: Mapping[str, Point], file: Path, title: str) -> None:
    """Every figure against the measured speed-up, a line for every curve."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(15, 5.4), layout="constrained")
    for axis, measure in zip(axes, MEASURES, strict=True):
        for (name, curve), marker in zip(of_curves(found).items(), itertools.cycle(MARKERS), strict=False):
            known = [(p.speedup, v) for p in curve if (v := getattr(p, measure.field)) is not None]
            if not known:
                # The baseline alone is as far from itself as none.
                continue
            xs, ys = zip(*sorted(known), strict=True)
            axis.plot(xs, ys, marker=marker, markersize=5, linewidth=1.3, label=name)
        axis.set_xscale("log")
        axis.set_xticks((1, *TIMES), [f"{times:g}x" if times % 1 == 0 else "" for times in (1, *TIMES)])
        axis.minorticks_off()
        better = "lower is better" if measure.best is min else "higher is better"
        axis.set(xlabel="measured speed-up over 50 steps", ylabel=f"{measure.label} ({better})")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def claim(file: Path, inputs: dict[str, Any]) -> None:
    """Refuse to go on with what other arguments made.

    Raises:
        SystemExit: naming the argument.
    """
    if file.exists():
        before = json.loads(file.read_text())
        for name, value in inputs.items():
            if before.get(name) != value:
                raise SystemExit(
                    f"{name}: {file.parent} was made with {before.get(name)}; use another --work"
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(inputs, indent=1) + "\n")


# What two results must have alike before figures of both stand in one table.
ALIKE = (
    *("what", "model", "model_key", "prompts", "prompts_key", "seed", "batch", "steps", "guidance"),
    *("scheduler_given", "height", "width", "dtype", "features", "reference", "reference_pictures", "clip"),
)


def together(here: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A result with the rows of others for variants that it has not; every row says what it was made on.

    Args:
        here: a result of `regrow eval`.
        others: such results, or what this function made of them; the first that has a variant counts.

    Raises:
        SystemExit: if one is not of the same model, prompts and settings, naming what differs.
    """
    order = [spec for specs in CURVES.values() for spec in specs]
    rows: dict[str, dict[str, Any]] = {}
    for result in (here, *others):
        for name in ALIKE:
            if result.get(name) != here.get(name):
                raise SystemExit(
                    f"--also: {name} {result.get(name)} is not allowed, it must be {here.get(name)}"
                )
        for row in result["rows"]:
            if row["name"] not in order:
                raise SystemExit(
                    f"--also: {row['name']} is not allowed, it must be one of {', '.join(order)}"
                )
            otherwise = row["name"] in result["made_otherwise"]
            rows.setdefault(row["name"], {"machine": result["machine"], "made_otherwise": otherwise} | row)
    found = sorted(rows.values(), key=lambda row: order.index(row["name"]))
    return {**here, "rows": found}


def times_of(file: Path, args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The times of a result of this script.

    Raises:
        SystemExit: if they are of another model or setting, or one of these variants was not timed.
    """
    speed: dict[str, Any] = json.loads(file.read_text())["speed"]
    asked = {
        "model": args.model,
        "dtype": args.dtype,
        "images": args.images,
        "guidance": guidance_of(args.model, args.guidance),
    }
    for name, value in asked.items():
        if speed[name] != value:
            raise SystemExit(f"--times: {name} {speed[name]} is not allowed, it must be {value}")
    timed = [row["name"] for row in speed["rows"]]
    for name in names:
        if name not in timed:
            raise SystemExit(f"--times: {file} has no time of {name}, only of {', '.join(timed)}")
    return speed


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run both commands for all variants; what is already made is not made again."""
    also = [json.loads(file.read_text())["quality"] for file in args.also]
    every = [spec for curve in METHODS[args.methods].values() for spec in curve]
    asked = every if args.only is None else args.only.split(",")
    for spec in asked:
        if spec not in every:
            raise SystemExit(f"--only: {spec} is not allowed, it must be one of {', '.join(every)}")
    if every[0] not in asked:
        raise SystemExit(f"--only: {every[0]} is missing, which all are compared with")
    seen = [spec for spec in every if spec in asked]
    extra = [row["name"] for result in also for row in result["rows"]]
    times = None if args.times is None else times_of(args.times, args, [*seen, *extra])
    common = ["--model", args.model, "--dtype", args.dtype, "--device", args.device]
    common += [] if args.guidance is None else ["--guidance", str(args.guidance)]
    regrow = str(Path(sys.executable).with_name("regrow"))
    pictures, speed = args.work / "pictures", args.work / "speed.json"
    claim(
        args.work / "inputs.json",
        {"reference": str(args.reference)}
        | {name: getattr(args, name) for name in ("model", "dtype", "device", "guidance")},
    )
    features = args.work / "reference.safetensors"
    texts = None if args.prompts.isdecimal() or named(args.prompts) else Path(args.prompts)
    # What is missing is missing before anything is timed.
    for name, file in (("prompts", texts), ("reference", None if features.exists() else args.reference)):
        if file is not None and not file.exists():
            raise SystemExit(f"--{name}: {file} is not allowed, it must exist")
    if times is None:
        times = measured(regrow, common, every, speed, args)
    words = ["--prompts", args.prompts, "--out", str(pictures), "--batch", str(args.batch)]
    words += ["--engine", args.engine, "--methods", ",".join(seen)]
    for pair in AGAINST:
        words += ["--against", ",".join(pair)] if set(pair) <= set(seen) else []
    words += [] if args.workers is None else ["--workers", str(args.workers)]
    if features.exists():
        words += ["--reference", str(features)]
    elif args.reference is not None:
        words += ["--reference", str(args.reference), "--save-reference", str(features)]
    subprocess.run([regrow, "eval", *common, *words], check=True)
    made = together(json.loads((pictures / "result.json").read_text()), also)
    return {"quality": made, "speed": times}


def measured(
    regrow: str, common: Sequence[str], every: Sequence[str], file: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """The times of all variants, of one run, which is kept in a file.

    Raises:
        SystemExit: if the baseline could not be timed, or the file's are of another number of pictures or
            rounds.
    """
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    there = sorted(row["name"] for row in found["rows"]) == sorted(every)
    if not there:
        words = ["--images", str(args.images), "--rounds", str(args.rounds), "--out", str(file)]
        subprocess.run([regrow, "bench", *common, *words, "--methods", ",".join(every)], check=True)
        found = json.loads(file.read_text())
    for name in ("images", "rounds"):
        asked = getattr(args, name)
        # Older files do not say their rounds.
        kept = found.get(name, asked)
        if kept != asked:
            raise SystemExit(f"--{name}: {asked} is not allowed, {file} has times of {kept}")
    first = found["rows"][0]
    if first["error"] is not None:
        file.unlink()
        raise SystemExit(f"{first['name']} could not be timed: {first['error']}")
    if there:
        print(f"times are those of {file}: {origin(found['machine'])}", file=sys.stderr)
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji", help="bundled name, folder or hub id")
    parser.add_argument("--methods", choices=METHODS, default="unet", help="those of which denoiser")
    parser.add_argument("--only", help="some of the variants, comma-separated")
    parser.add_argument("--times", type=Path, help="a result of this script, to take the times of")
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        help="a result of this script, to take variants of that are not made here; may be repeated",
    )
    parser.add_argument("--prompts", default="1000", help="a file, or a number of the model's own")
    parser.add_argument("--reference", type=Path, help="folder of true pictures; else the baseline's")
    parser.add_argument("--work", type=Path, default=Path("work/quality"), help="resumed if it exists")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality-emoji"))
    parser.add_argument("--images", type=int, default=4, help="pictures a timed generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, help="guidance scale; a bundled model's own if none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", default="local", help="of the pictures: local or ray")
    parser.add_argument("--workers", type=int, help="of Ray")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--table", action="store_true", help="only table and plot, from the result in --out"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, then write table and plot."""
    args = parse_arguments()
    result_file = args.out.with_suffix(".json")
    if not args.table:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result_file.write_text(json.dumps(run(args), indent=1) + "\n", encoding="utf-8")
    result = json.loads(result_file.read_text())
    quality = result["quality"]
    found = points(quality, result["speed"])
    title = f"{quality['model']}, {quality['prompts']} prompts, {quality['dtype']}"
    timed = result["speed"]["machine"]
    draw(found, args.out.with_suffix(".png"), f"{title}, times of {timed['gpu'] or timed['processor']}")
    lines = [f"{title}.", ""]
    for measure in MEASURES:
        for ratio in (SPEEDUP, MACS):
            lines += [*table(found, measure, ratio), ""]
    lines += variants_table(found)
    gains = gains_table(quality)
    lines += ["", *gains] if gains else []
    lines += ["", f"Times: {origin(timed)}."]
    failed = [row for row in result["speed"]["rows"] if row["error"] is not None]
    lines += [f"Not timed: `{row['name']}`, {row['error']}." for row in failed]
    lines += [f"Pictures of {', '.join(names)}: {where}." for where, names in origins(quality).items()]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
