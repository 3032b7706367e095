"""Measure speed and memory of methods on one pipeline, in alternating turns of one run."""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_flop_count

from regrow.apply import Run
from regrow.core.inputs import without_data
from regrow.core.install import around_calls
from regrow.core.macs import Flops, PlainCounter
from regrow.fields import MOST_COUNT, check_within
from regrow.lab.measure.sampling import Moment, Pictures, check_frames, make, moment, wait
from regrow.lab.measure.variants import Variant
from regrow.lab.memory import PeakMemory, keep_freed_memory
from regrow.models import module_of

# A generation slower than its variant's median by this factor was disturbed by something else.
DISTURBED = 1.25
# Attention on a CPU, which torch's counter does not count.
_UNKNOWN = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        sdpa_flop_count(query.shape, key.shape, value.shape)
    )
}


@dataclass(frozen=True)
class CallKind:
    """A kind of call of the denoiser; None is what the method does not report.

    Args:
        depth: ``"full"`` or a number of up-path layers.
        ratio: share of tokens pruned where the method prunes.
        count: number of calls of this kind in a generation.
        seconds: median time of one call, for the whole batch; the mean if kinds are not distinguished.
    """

    depth: str | None
    ratio: float | None
    count: int
    seconds: float


@dataclass(frozen=True)
class BenchRow:
    """The measurements of a variant; times are medians over its timed generations, None is not known.

    Args:
        name: name of the variant.
        seconds: time of a generation of all pictures.
        seconds_per_image: the same for one picture.
        images_per_second: throughput.
        spread: the slowest generation's time over the fastest's.
        disturbed: numbers of the generations that something slowed down.
        speedup: the first variant's time over this one's, median over rounds; the first one's time is the
            mean of its generations before and after. None if the first failed.
        denoiser_seconds: time of all calls of the denoiser in a generation.
        macs: MACs of the denoiser in a generation, for the whole batch; without choosing tokens if the
            method reports its MACs, with it if they were counted while it ran.
        macs_ratio: the first variant's MACs over this one's.
        efficiency: speed-up of the denoiser's calls over ``macs_ratio``.
        peak_mib: peak memory of a generation, above the memory in use before it.
        changes_nothing: whether every call of the denoiser gives, bit for bit, what it gives in the plain
            pipeline with as many steps; None if that is not one of the variants.
        calls: the kinds of calls.
        rounds: seconds of every timed generation: one a round, more for the first of several variants.
        error: why it did not run; then everything else is empty.
    """

    name: str
    seconds: float = 0.0
    seconds_per_image: float = 0.0
    images_per_second: float = 0.0
    spread: float = 0.0
    disturbed: tuple[int, ...] = ()
    speedup: float | None = None
    denoiser_seconds: float = 0.0
    macs: int | None = None
    macs_ratio: float | None = None
    efficiency: float | None = None
    peak_mib: float | None = None
    changes_nothing: bool | None = None
    calls: tuple[CallKind, ...] = ()
    rounds: tuple[float, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert the row to plain data."""
        return asdict(self)


class _Timed:
    """The generations of a variant, and their measurements.

    Args:
        pipeline: the pipeline.
        variant: the variant.
        prompts: prompts of each generation.
        options: options of `make`.
        plain: gives what counts the MACs of the plain pipeline's calls.
    """

    def __init__(
        self,
        pipeline: Any,
        variant: Variant,
        prompts: Sequence[str],
        options: Mapping[str, Any],
        plain: Callable[[], PlainCounter],
    ) -> None:
        self.variant = variant
        self.seconds: list[float] = []
        self.denoiser: list[float] = []
        self.beside: list[int] = []
        """Number of generations of the first variant before each timed generation."""
        self.calls: list[list[float]] = []
        self.kinds: Sequence[tuple[str | None, float | None]] = ()
        self.macs: int | None = None
        self.outputs = ""
        self.peak: float | None = None
        self.error: str | None = None
        self._pipeline, self._prompts, self._options, self._plain = pipeline, prompts, options, plain

    def turn(self, act: Callable[[_Timed], None]) -> None:
        """Run ``act``, unless the variant failed before; an exception becomes the variant's error."""
        if self.error is None:
            try:
                act(self)
            except Exception as error:
                self.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def warm_up(self) -> None:
        """Make one untimed generation; note what its calls compute and return."""
        inputs: list[Any] = []
        outputs = hashlib.sha256()

        def before(module: Any, args: Any, kwargs: Any) -> None:
            inputs.append(without_data((args, kwargs)))

        def after(module: Any, args: Any, output: Any) -> None:
            values = output if isinstance(output, torch.Tensor) else output[0]
            outputs.update(values.detach().contiguous().view(torch.uint8).cpu().numpy().data)

        run, _ = self._hooked(before, after)
        self.outputs = outputs.hexdigest()
        self.kinds = [(None, None)] * len(inputs)
        if run is not None:
            report = run.report()
            # A call without a known step is not in the report.
            if len(report.calls) == len(inputs):
                self.kinds = [(c.depth, c.ratio) for c in report.calls]
                self.macs = report.macs
        elif self.variant.config is None:
            self.kinds = [("full", 0.0)] * len(inputs)
            self.macs = self._plain_macs(inputs)
        else:
            self.macs = self._counted_macs()

    def time(self) -> None:
        """Make one generation, and time its calls."""
        calls: list[tuple[Moment, Moment]] = []
        begun: list[Moment] = []
        device = self._pipeline.device

        def before(module: Any, args: Any, kwargs: Any) -> None:
            begun.append(moment(device))

        def after(module: Any, args: Any, output: Any) -> None:
            calls.append((begun.pop(), moment(device)))

        _, seconds = self._hooked(before, after)
        wait(self._pipeline)
        if len(calls) != len(self.kinds):
            raise ValueError(
                f"{len(calls)} calls of the denoiser where an earlier run had {len(self.kinds)}"
            )
        taken = [begin.until(end) for begin, end in calls]
        self.seconds.append(seconds)
        self.denoiser.append(sum(taken))
        self.calls.append(taken)

    def measure_memory(self) -> None:
        """Make one generation to measure its peak memory."""
        with self._applied(), PeakMemory(self._pipeline.device) as memory:
            self._make()
        self.peak = memory.mib

    def _make(self) -> Pictures:
        one = self.variant
        return make(self._pipeline, self._prompts, steps=one.steps, **one.arguments(self._options))

    @contextmanager
    def _applied(self) -> Iterator[Run | None]:
        """Apply the variant to the pipeline; compiled blocks are compiled for it."""
        compiled = _compiled(module_of(self._pipeline))
        if compiled:
            torch._dynamo.reset()
        with self.variant.applied(self._pipeline) as run:
            if compiled:
                self._make()
                # Caches of diffusers continue from their old state, unless the denoiser has a cache mixin.
                for module in module_of(self._pipeline).modules():
                    registry: Any = getattr(module, "_diffusers_hook", None)
                    if registry is not None:
                        registry.reset_stateful_hooks(recurse=False)
            yield run

    def _hooked(
        self, before: Callable[[Any, Any, Any], None], after: Callable[[Any, Any, Any], None]
    ) -> tuple[Run | None, float]:
        """Make one generation with hooks around the denoiser's calls, and time it."""
        with self._applied() as run, around_calls(module_of(self._pipeline), before, after):
            return run, self._make().seconds

    def _plain_macs(self, inputs: Any) -> int | None:
        """Count the MACs of plain calls; None if the forward pass does not run on the meta device."""
        try:
            return self._plain().count(inputs)
        except Exception:
            # It ran on the real device before.
            return None

    def _counted_macs(self) -> int | None:
        """Count MACs in one more generation, if the method does not report them; None if impossible."""
        if _compiled(module_of(self._pipeline)) or self._pipeline.device.type not in ("cpu", "cuda"):
            return None
        begun: list[int] = []
        flops: list[int] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            begun.append(counter.total)

        def after(module: Any, args: Any, output: Any) -> None:
            flops.append(counter.total - begun.pop())

        try:
            with Flops(_UNKNOWN) as counter:
                self._hooked(before, after)
        except Exception:
            # It ran without being counted.
            return None
        return sum(flops) // 2


def bench(
    pipeline: Any,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    *,
    rounds: int = 3,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    on_generation: Callable[[str], None] = lambda name: None,
    on_timed: Callable[[int, BenchRow], None] = lambda number, row: None,
) -> list[BenchRow]:
    """Time variants in turns: in each round every variant once.

    Before the rounds every variant makes one untimed generation, in which the denoiser's outputs are
    compared with the plain pipeline's; a variant that does not report its MACs makes another, in which they
    are counted. In the rounds, the first of several variants is timed again whenever the others since its
    last turn took as long as it, and at the end, so that a machine whose speed drifts slows both sides of a
    comparison. After the rounds, when caches that belong to no method are filled, each variant makes one
    more generation to measure its memory. A variant that fails gets a row with its error. From now on
    glibc keeps freed memory (`keep_freed_memory`).

    If blocks are compiled, all compiled code of the process is dropped before each turn, and an untimed
    generation compiles it again: new hooks are new code for torch.compile, which stops compiling at its
    limit of recompilations.

    Args:
        pipeline: a diffusers pipeline, even one that regrow's methods do not support.
        variants: variants to compare; the first is the baseline of the ratios.
        prompts: a prompt for each picture, all in one batch.
        rounds: timed rounds, >= 1.
        guidance: guidance scale; default: the pipeline's own.
        height: height in pixels; default: the pipeline's own.
        width: width in pixels; default: the pipeline's own.
        frames: number of frames of a video; default: the pipeline's own.
        on_generation: called with a variant's name after its warm-up, after each turn in a round, and after
            its memory was measured.
        on_timed: called after each turn in a round with the round's number, from 0, and the variant's row
            until now.

    Raises:
        ValueError: if there is no variant, no prompt or no round, or frames are given and no video is made.
    """
    for name, value in (("methods", len(variants)), ("images", len(prompts)), ("rounds", rounds)):
        check_within(name, value, 1, MOST_COUNT)
    check_frames(pipeline, frames)
    options = {"guidance": guidance, "height": height, "width": width, "frames": frames}
    # One for all variants, made in the turn of the first that needs it: what fails there is its error.
    plain = functools.cache(lambda: PlainCounter(module_of(pipeline)))
    found = [_Timed(pipeline, one, prompts, options, plain) for one in variants]
    base, *others = found
    keep_freed_memory()
    for one in found:
        one.turn(_Timed.warm_up)
        on_generation(one.variant.name)

    def row(one: _Timed) -> BenchRow:
        plain = {t.variant.steps: t.outputs for t in found if t.variant.config is None and t.error is None}
        compared = None if one.variant.config is None else plain.get(one.variant.steps)
        return _row(one, base, len(prompts), compared)

    for number in range(rounds):
        base.turn(_Timed.time)
        on_generation(base.variant.name)
        on_timed(number, row(base))
        since = 0.0
        for one in others:
            if base.error is None and since >= base.seconds[-1]:
                base.turn(_Timed.time)
                since = 0.0
            one.beside.append(len(base.seconds))
            one.turn(_Timed.time)
            since += one.seconds[-1] if one.error is None else 0.0
            on_generation(one.variant.name)
            on_timed(number, row(one))
    if others:
        base.turn(_Timed.time)
    for one in found:
        one.turn(_Timed.measure_memory)
        on_generation(one.variant.name)
    return [row(one) for one in found]


def _compiled(denoiser: Any) -> bool:
    """Whether any of the denoiser's modules is compiled."""
    return any(module._compiled_call_impl is not None for module in denoiser.modules())


def _row(timed: _Timed, base: _Timed, images: int, plain: str | None) -> BenchRow:
    """Make the row of a variant; ``plain`` is the fingerprint of outputs that it is compared with."""
    if timed.error is not None:
        return BenchRow(timed.variant.name, error=timed.error)
    seconds = statistics.median(timed.seconds)
    kinds: dict[tuple[str | None, float | None], list[float]] = {}
    for calls in timed.calls:
        for kind, value in zip(timed.kinds, calls, strict=True):
            kinds.setdefault(kind, []).append(value)
    macs_ratio = base.macs / timed.macs if base.macs and timed.macs else None
    of_calls = _over(base, timed, lambda of: of.denoiser) if macs_ratio else None
    return BenchRow(
        name=timed.variant.name,
        seconds=seconds,
        seconds_per_image=seconds / images,
        images_per_second=images / seconds,
        spread=max(timed.seconds) / min(timed.seconds),
        disturbed=tuple(i for i, s in enumerate(timed.seconds) if s > DISTURBED * seconds),
        speedup=_over(base, timed, lambda of: of.seconds),
        denoiser_seconds=statistics.median(timed.denoiser),
        macs=timed.macs,
        macs_ratio=macs_ratio,
        efficiency=of_calls / macs_ratio if of_calls and macs_ratio else None,
        peak_mib=timed.peak,
        changes_nothing=None if plain is None else timed.outputs == plain,
        calls=tuple(
            CallKind(
                depth,
                ratio,
                timed.kinds.count((depth, ratio)),
                statistics.fmean(values) if depth is None else statistics.median(values),
            )
            for (depth, ratio), values in kinds.items()
        ),
        rounds=tuple(timed.seconds),
    )


def _over(base: _Timed, timed: _Timed, times: Callable[[_Timed], Sequence[float]]) -> float | None:
    """Compute the first variant's time, averaged before and after, over this one's; None if it failed."""
    if base.error is not None:
        return None
    if timed is base:
        return 1.0
    around = [statistics.fmean(times(base)[turn - 1 : turn + 1]) for turn in timed.beside]
    return statistics.median(b / t for b, t in zip(around, times(timed), strict=True))
