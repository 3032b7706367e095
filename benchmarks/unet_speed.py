"""Speed and memory of single U-Net calls, every variant beside the others in one run.

The real architecture with random weights and a guided batch. Variants alternate round by round; figures
are medians over rounds of ratios within a round. Every pruning variant also runs with its selection given
for free, which is the bound for any way of choosing tokens. Results go to ``benchmarks/results/``.

    python benchmarks/unet_speed.py --arch sd15 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peers import peer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrow.core.engine import Engine
from regrow.core.install import Installed
from regrow.core.macs import CallCounter, free_selection
from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.lab.measure.architectures import CONFIGS, architecture
from regrow.lab.measure.machine import PACKAGES, machine
from regrow.lab.memory import PeakMemory, keep_freed_memory
from regrow.methods.dato import DaTo
from regrow.methods.pruning import TokenRule, Where
from regrow.methods.sito import SiTo
from regrow.schedule import FULL, Schedule
from regrow.tokens.grid import Grid
from regrow.tokens.select import Selection

RESULTS = Path(__file__).parent / "results"
CALLS_AT_MOST = 1000
# Cached calls take a tenth of a full one: a round times them more often.
CACHED_TURNS = 5


class Plain:
    """The U-Net as it is."""

    def __init__(self, unet: Any, inputs: Any) -> None:
        self.unet, self.inputs = unet, inputs

    def __enter__(self) -> Callable[[], Any]:
        return lambda: self.unet(*self.inputs[0], **self.inputs[1])

    def __exit__(self, *exception: object) -> None:
        pass


class Ours:
    """A method at one kind of call. Hooks are put on for each timing and taken off after it."""

    def __init__(
        self,
        unet: Any,
        inputs: Any,
        rule: TokenRule | None,
        depth: int,
        ratio: float,
        *,
        free: bool = False,
        idle: bool = False,
    ) -> None:
        self.unet, self.inputs = unet, inputs
        kinds = [(FULL, ratio), *[(depth, ratio)] * CALLS_AT_MOST]
        if idle:
            # Hooks for pruning and for skipping are all in place and have nothing to do.
            kinds = [(FULL, 0.0)] * CALLS_AT_MOST + [(1, ratio)]
        schedule = Schedule(depth=tuple(d for d, _ in kinds), ratio=tuple(r for _, r in kinds))
        self.engine = Engine(
            unet, Recipe(schedule, sites=_Free(rule) if rule is not None and free else rule)
        )
        self.stack = ExitStack()
        self.clock = self.stack.enter_context(self.engine.manual(len(kinds)))
        if depth != FULL:
            # A cached call needs what a full one leaves.
            with self as call:
                call()

    def __enter__(self) -> Callable[[], Any]:
        self.hooks = Installed(self.engine)
        return lambda: self.unet(*self.inputs[0], **self.inputs[1])

    def __exit__(self, *exception: object) -> None:
        self.hooks.remove()
        self.clock.step()


class _Free(TokenRule):
    """A rule whose choice costs nothing: each kind of selection is made once."""

    def __init__(self, rule: TokenRule) -> None:
        self._rule = rule
        self._known: dict[int, Selection] = {}

    @property
    def where(self) -> Where:
        return self._rule.where

    @property
    def patch(self) -> int | None:
        return self._rule.patch

    def select(
        self, x: torch.Tensor, grid: Grid, count: int, prepared: torch.Tensor | None, call: CallInfo
    ) -> Selection:
        if grid.tokens not in self._known:
            self._known[grid.tokens] = free_selection(x, count)
        return self._known[grid.tokens]


class ToMe:
    """tomesd as its users call it."""

    def __init__(self, unet: Any, inputs: Any, ratio: float) -> None:
        self.unet, self.inputs, self.ratio = unet, inputs, ratio

    def __enter__(self) -> Callable[[], Any]:
        self.stack = ExitStack()
        self.stack.enter_context(peer(f"tomesd:{self.ratio}", 1).applied(self.unet))
        return lambda: self.unet(*self.inputs[0], **self.inputs[1])

    def __exit__(self, *exception: object) -> None:
        self.stack.close()


class DeepCached:
    """A cached call of DeepCache at its own limit (branch 0), in a pipeline of U-Net and scheduler."""

    def __init__(self, unet: Any, inputs: Any) -> None:
        from DeepCache import DeepCacheSDHelper

        self.unet, self.inputs = unet, inputs
        steps = torch.arange(CALLS_AT_MOST, 0, -1)
        self.helper = DeepCacheSDHelper(
            pipe=SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=steps))
        )
        self.helper.set_params(cache_interval=CALLS_AT_MOST, cache_branch_id=0)
        self.steps, self.round = steps, 0
        self.kept: Any = None
        with self as call:
            call()

    def __enter__(self) -> Callable[[], Any]:
        self.helper.enable()
        if self.kept is not None:
            # Enabling forgets what is cached; timings alternate with other variants.
            self.helper.cached_output, self.helper.start_timestep = self.kept
        args, kwargs = self.inputs
        step = self.steps[self.round]
        return lambda: self.unet(args[0], step, *args[2:], **kwargs)

    def __exit__(self, *exception: object) -> None:
        self.kept = self.helper.cached_output, self.helper.start_timestep
        self.helper.disable()
        self.round += 1


def real_inputs(shapes: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Random tensors of the given shapes; the batch is one picture twice, as guidance makes it."""
    generator = torch.Generator().manual_seed(0)

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: real(v) for k, v in value.items()}
        if not value.is_floating_point():
            return torch.full(value.shape, 500, dtype=value.dtype, device=device)
        return torch.randn(value.shape, generator=generator).to(device, dtype)

    args, kwargs = shapes
    sample, *rest = (real(a) for a in args)
    sample = sample[: len(sample) // 2].repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    return (sample, *rest), real(kwargs)


def rule_of(config: Any) -> TokenRule:
    """How a method that prunes in layers selects tokens."""
    rule = recipe_of(config).sites
    assert isinstance(rule, TokenRule)
    return rule


def variants(unet: Any, inputs: Any, ratios: list[float], peers: bool) -> dict[str, Callable[[], Any]]:
    """All variants by name, to be made when their turn comes."""
    constant = Schedule.constant(0.5)
    sito, dato = rule_of(SiTo(ratio=0.5)), rule_of(DaTo(schedule=constant))
    nearby = rule_of(DaTo(schedule=constant, nearby=True))
    made: dict[str, Callable[[], Any]] = {
        "full": lambda: Plain(unet, inputs),
        "full, hooks idle": lambda: Ours(unet, inputs, dato, FULL, 0.5, idle=True),
    }

    def add(name: str, rule: TokenRule | None, depth: int, ratio: float, free: bool = False) -> None:
        made[name] = lambda: Ours(unet, inputs, rule, depth, ratio, free=free)

    for r in ratios:
        add(f"full r={r} SiTo", sito, FULL, r)
        add(f"full r={r} DaTo", dato, FULL, r)
        add(f"full r={r} free", sito, FULL, r, True)
    add("depth 1", None, 1, 0.0)
    for r in ratios:
        add(f"depth 1 r={r} DaTo", dato, 1, r)
        add(f"depth 1 r={r} free", dato, 1, r, True)
    for r in (0.5, 0.7):
        add(f"depth 1 r={r} DaTo-nearby", nearby, 1, r)
    add("full r=0.5 DaTo-nearby", nearby, FULL, 0.5)
    add("depth 0", None, 0, 0.0)
    if peers:
        made["tomesd 0.5"] = lambda: ToMe(unet, inputs, 0.5)
        made["tomesd 0.75"] = lambda: ToMe(unet, inputs, 0.75)
        made["DeepCache cached"] = lambda: DeepCached(unet, inputs)
    return made


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    made: dict[str, Any], device: torch.device, minutes: float, rounds: int
) -> list[dict[str, float]]:
    """Seconds of each variant, round by round, within a time budget (four rounds at least)."""
    seen: list[dict[str, float]] = []
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=rounds)
        while len(seen) < rounds:
            spent = (time.perf_counter() - begin) / 60
            if len(seen) >= 4 and spent * (len(seen) + 1) / len(seen) > minutes:
                break
            times: dict[str, list[float]] = {name: [] for name in made}
            for turn in range(CACHED_TURNS):
                for name, variant in made.items():
                    if turn == 0 or name.startswith(("depth", "DeepCache")):
                        with variant as call:
                            times[name].append(timed(call, device))
            seen.append({name: statistics.median(t) for name, t in times.items()})
            progress.advance(task)
    # The first round warms up caches and memory.
    return seen[1:]


def undisturbed(seen: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rounds in which no variant of over 10 ms took more than 1.3 times its median."""
    median = {name: statistics.median(row[name] for row in seen) for name in seen[0]}
    return [r for r in seen if all(t < 1.3 * median[n] or t < 0.01 for n, t in r.items())] or seen


def composed(schedule: Schedule, seconds: dict[str, float], kind: str) -> float:
    """Speed-up of a schedule, from the times of its kinds of calls."""
    total = 0.0
    for step in schedule.resample(len(schedule)).steps():
        if step.depth == 0:
            total += seconds["depth 0"]
        else:
            depth = "full" if step.full else f"depth {step.depth}"
            total += seconds[f"{depth} r={step.ratio} {kind}"]
    return len(schedule) * seconds["full"] / total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", choices=sorted(CONFIGS), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=None, help="side of the picture in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures; guidance doubles them")
    parser.add_argument("--minutes", type=float, default=12, help="time for the rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    keep_freed_memory()

    arch = architecture(args.arch)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(arch.denoiser.config)
    unet = unet.eval().to(device, getattr(torch, args.dtype), memory_format=torch.channels_last)
    if args.compile:
        unet.compile_repeated_blocks()
    shapes = arch.inputs(args.size, args.size, 2 * args.batch)
    inputs = real_inputs(shapes, device, getattr(torch, args.dtype))
    ratios = [0.3, 0.4, 0.5, 0.6, 0.7]
    console = Console(stderr=True)
    what = "memory" if args.memory else "speed"
    with torch.no_grad():
        makers = variants(unet, inputs, [0.5, 0.7] if args.memory else ratios, not args.no_peers)
        made: dict[str, Any] = {}
        failed: dict[str, str] = {}
        with Progress(console=console) as progress:
            task = progress.add_task("warming up", total=len(makers))
            for name, maker in makers.items():
                try:
                    made[name] = maker()
                except Exception as error:
                    made.pop(name, None)
                    failed[name] = f"{type(error).__name__}: {error}"
                progress.advance(task)
        result: dict[str, Any] = {
            "what": f"{what} of single U-Net calls",
            "arch": args.arch,
            "dtype": args.dtype,
            "batch": 2 * args.batch,
            "latent": list(shapes[0][0].shape[-2:]),
            "compiled": args.compile,
            "machine": machine(device, (*PACKAGES, "tomesd", "DeepCache")),
            "failed": failed,
        }
        result |= peaks_of(made, device) if args.memory else speed(made, unet, shapes, device, args)
    compiled = "-compiled" if args.compile else ""
    name = f"unet-{what}-{args.arch}-{args.dtype}-{device.type}{compiled}.json"
    file = args.out or RESULTS / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(file)


def peaks_of(made: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Peak memory of a call above what is resident, in MiB; the median of three."""
    peaks = {}
    for name, variant in made.items():
        tries = []
        for _ in range(3):
            with variant as call, PeakMemory(device) as memory:
                call()
            if memory.mib is None:
                raise SystemExit("--memory: it is not allowed here, the system does not tell it")
            tries.append(memory.mib)
        peaks[name] = round(statistics.median(tries), 1)
    table = Table("call", "peak MiB", "of full")
    for name, peak in peaks.items():
        table.add_row(name, f"{peak:.0f}", f"{peak / peaks['full']:.2f}")
    Console().print(table)
    return {"peak_mib": peaks}


def speed(made: dict[str, Any], unet: Any, shapes: Any, device: torch.device, args: Any) -> dict[str, Any]:
    """Times, their ratios to a full call and to the bound, and whole schedules composed of them."""
    everything = measure(made, device, args.minutes, args.rounds)
    seen = undisturbed(everything)
    counter = CallCounter(unet, rule_of(DaTo(schedule=Schedule.constant(0.5))))
    rows: dict[str, dict[str, Any]] = {}
    for name in made:
        share = [r[name] / r["full"] for r in seen]
        row: dict[str, Any] = {
            "seconds": statistics.median(r[name] for r in seen),
            "of_full": statistics.median(share),
            "spread": [min(share), max(share)],
        }
        words = name.split()
        if words[0] in ("full", "depth") and "idle" not in name:
            depth = FULL if words[0] == "full" else int(words[1])
            ratio = next((float(w[2:]) for w in words if w.startswith("r=")), 0.0)
            macs = counter.count(depth, ratio, shapes).denoiser
            row["macs_of_full"] = macs / counter.count(FULL, 0.0, shapes).denoiser
            bound = " ".join([*words[:-1], "free"])
            if words[-1] in ("SiTo", "DaTo", "DaTo-nearby"):
                row["bound_over_measured"] = statistics.median(r[bound] / r[name] for r in seen)
                whole = "full" if depth == FULL else "depth 1"
                saved = statistics.median(r[whole] - r[bound] for r in seen)
                row["selection_of_saved"] = statistics.median(r[name] - r[bound] for r in seen) / saved
        rows[name] = row
    seconds = {name: row["seconds"] for name, row in rows.items()}
    schedules = {}
    for name in ("b1", "fast"):
        plan = DaTo.preset(name).schedule
        macs = sum(
            counter.count(s.depth, s.ratio if s.depth else 0.0, shapes).denoiser
            for s in plan.resample(len(plan)).steps()
        )
        theory = len(plan) * counter.count(FULL, 0.0, shapes).denoiser / macs
        mine, bound = (composed(plan, seconds, kind) for kind in ("DaTo", "free"))
        schedules[name] = {
            "speedup": mine,
            "speedup_free_selection": bound,
            "speedup_macs": theory,
            "of_bound": mine / bound,
            "of_macs": mine / theory,
        }
    print_table(rows, schedules)
    return {
        "rounds": len(everything),
        "rounds_used": len(seen),
        "calls": rows,
        "schedules": schedules,
        "every_round": everything,
    }


def print_table(rows: dict[str, Any], schedules: dict[str, Any]) -> None:
    """Print what was measured."""
    table = Table("call", "ms", "of full", "MACs of full", "bound / measured", "selection of saved")
    for name, row in rows.items():
        cells = [f"{row['seconds'] * 1e3:.1f}", f"{row['of_full']:.4f}"]
        for field, form in (
            ("macs_of_full", "{:.4f}"),
            ("bound_over_measured", "{:.3f}"),
            ("selection_of_saved", "{:.1%}"),
        ):
            cells.append(form.format(row[field]) if field in row else "-")
        table.add_row(name, *cells)
    Console().print(table)
    for name, s in schedules.items():
        print(
            f"{name}: {s['speedup']:.2f}x, with selection free {s['speedup_free_selection']:.2f}x "
            f"({s['of_bound']:.3f} of it), in MACs {s['speedup_macs']:.2f}x ({s['of_macs']:.3f} of it)"
        )


if __name__ == "__main__":
    main()
