"""Speed and memory of methods on one pipeline, all in one run, one after the other in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from regrow.apply import Run, apply
from regrow.macs import CallCounter
from regrow.measure.sampling import make, wait
from regrow.measure.variants import Variant
from regrow.models import denoiser_of
from regrow.run import without_data
from regrow.schedule import FULL

# A round this much slower than the median of its variant was disturbed by something else.
DISTURBED = 1.25


@dataclass(frozen=True)
class CallKind:
    """One kind of call of the denoiser.

    Args:
        depth: ``"full"`` or a number of up-path layers.
        ratio: share of tokens pruned where the method prunes.
        count: calls of this kind in a generation.
        seconds: median of one call, the whole batch.
    """

    depth: str
    ratio: float
    count: int
    seconds: float


@dataclass(frozen=True)
class BenchRow:
    """What one variant took; times are medians over rounds.

    Args:
        name: of the variant.
        seconds: of a generation of all pictures.
        seconds_per_image: the same for one picture.
        images_per_second: throughput.
        spread: the largest round over the smallest.
        disturbed: numbers of the rounds that something slowed down.
        speedup: of the first variant's time over this one's, median over rounds.
        denoiser_seconds: of all calls of the denoiser in a generation.
        macs: of the denoiser in a generation, the whole batch.
        macs_ratio: of the first variant's MACs over this one's.
        efficiency: denoiser speed-up measured over ``macs_ratio``.
        peak_mib: peak memory of a generation, above what was there before it; None if not measurable.
        calls: the kinds of calls.
        rounds: seconds of every round.
        error: why it did not run; all else is empty then.
    """

    name: str
    seconds: float = 0.0
    seconds_per_image: float = 0.0
    images_per_second: float = 0.0
    spread: float = 0.0
    disturbed: tuple[int, ...] = ()
    speedup: float = 0.0
    denoiser_seconds: float = 0.0
    macs: int = 0
    macs_ratio: float = 0.0
    efficiency: float = 0.0
    peak_mib: float | None = None
    calls: tuple[CallKind, ...] = ()
    rounds: tuple[float, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


@dataclass
class _Timed:
    """What the rounds of a variant gave."""

    seconds: list[float] = field(default_factory=list)
    denoiser: list[float] = field(default_factory=list)
    calls: list[list[float]] = field(default_factory=list)
    kinds: list[tuple[str, float]] = field(default_factory=list)
    macs: int = 0
    peak: float | None = None
    error: str | None = None


def bench(
    pipeline: Any,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    *,
    rounds: int = 3,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    on_generation: Callable[[str], None] = lambda name: None,
) -> list[BenchRow]:
    """Time variants in turns: round by round, each variant once.

    Before the rounds every variant makes one generation, untimed, in which memory is measured. A
    variant that fails gets a row with its error.

    Args:
        pipeline: the pipeline.
        variants: what to compare; the first is the baseline of the ratios.
        prompts: one a picture, all in one batch.
        rounds: timed rounds, >= 1.
        guidance: guidance scale; the pipeline's own if not given.
        height: in pixels.
        width: in pixels.
        on_generation: called with the variant's name after every generation.

    Raises:
        ValueError: if there is no variant, no prompt or no round.
    """
    for name, value in (("methods", len(variants)), ("images", len(prompts)), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: {value} is not allowed, it must be >= 1")
    options = {"guidance": guidance, "height": height, "width": width}
    found = [_Timed() for _ in variants]
    for number in range(rounds + 1):
        for one, timed in zip(variants, found, strict=True):
            if timed.error is None:
                try:
                    _generation(pipeline, one, prompts, options, timed, warm_up=number == 0)
                except Exception as error:
                    timed.error = (
                        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    )
            on_generation(one.name)
    return [_row(one, timed, found[0], len(prompts)) for one, timed in zip(variants, found, strict=True)]


def _generation(
    pipeline: Any,
    one: Variant,
    prompts: Sequence[str],
    options: dict[str, Any],
    timed: _Timed,
    *,
    warm_up: bool,
) -> None:
    """One generation of a variant, with the times of its calls."""
    denoiser = denoiser_of(pipeline)
    calls: list[float] = []
    inputs: list[Any] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if warm_up and not inputs:
            inputs.append((args, kwargs))
        wait(pipeline)
        calls.append(time.perf_counter())

    def after(*_: Any) -> None:
        wait(pipeline)
        calls[-1] = time.perf_counter() - calls[-1]

    with nullcontext() if one.config is None else apply(pipeline, one.config) as run:
        # Registered last, and so around the method's own.
        hooks = [
            denoiser.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(after),
        ]
        memory = Memory(pipeline.device) if warm_up else None
        try:
            seconds = make(pipeline, prompts, steps=one.steps, **options).seconds
        finally:
            for hook in hooks:
                hook.remove()
        if memory is not None:
            timed.peak = memory.peak_mib()
    if warm_up:
        _describe(denoiser, run, len(calls), inputs[0], timed)
        return
    timed.seconds.append(seconds)
    timed.denoiser.append(sum(calls))
    timed.calls.append(calls)


def _describe(denoiser: Any, run: Run | None, calls: int, inputs: Any, timed: _Timed) -> None:
    """Kinds of calls and MACs: of the run's report, or of the plain denoiser."""
    if run is not None:
        report = run.report()
        timed.kinds = [(c.depth, c.ratio) for c in report.calls]
        timed.macs = report.macs
        return
    timed.kinds = [("full", 0.0)] * calls
    timed.macs = calls * CallCounter(denoiser, None).count(FULL, 0.0, without_data(inputs)).denoiser


def _row(one: Variant, timed: _Timed, base: _Timed, images: int) -> BenchRow:
    """The medians of a variant."""
    if timed.error is not None:
        return BenchRow(one.name, error=timed.error)
    seconds = statistics.median(timed.seconds)
    kinds: dict[tuple[str, float], list[float]] = {}
    for calls in timed.calls:
        for kind, value in zip(timed.kinds, calls, strict=True):
            kinds.setdefault(kind, []).append(value)
    has_base = base.error is None
    ratios = [b / t for b, t in zip(base.seconds, timed.seconds, strict=True)] if has_base else [0.0]
    denoiser = [b / t for b, t in zip(base.denoiser, timed.denoiser, strict=True)] if has_base else [0.0]
    macs_ratio = base.macs / timed.macs if timed.macs else 0.0
    return BenchRow(
        name=one.name,
        seconds=seconds,
        seconds_per_image=seconds / images,
        images_per_second=images / seconds,
        spread=max(timed.seconds) / min(timed.seconds),
        disturbed=tuple(i for i, s in enumerate(timed.seconds) if s > DISTURBED * seconds),
        speedup=statistics.median(ratios),
        denoiser_seconds=statistics.median(timed.denoiser),
        macs=timed.macs,
        macs_ratio=macs_ratio,
        efficiency=statistics.median(denoiser) / macs_ratio if macs_ratio else 0.0,
        peak_mib=timed.peak,
        calls=tuple(
            CallKind(depth, ratio, timed.kinds.count((depth, ratio)), statistics.median(values))
            for (depth, ratio), values in kinds.items()
        ),
        rounds=tuple(timed.seconds),
    )


class Memory:
    """Peak memory from now on, above what is in use: the CUDA allocator's, or the process's on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 2**20
            return
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            # 5 sets the peak back to the present.
            reset.write_text("5")
        self.before = _resident("VmRSS") or 0.0

    def peak_mib(self) -> float | None:
        """MiB; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        peak = _resident("VmHWM")
        return None if peak is None else max(peak - self.before, 0.0)


def _resident(key: str) -> float | None:
    """A line of /proc/self/status in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line.split() for line in status.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(lines[0][1]) / 1024 if lines else None
