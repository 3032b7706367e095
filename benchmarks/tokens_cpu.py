"""Speed of calls of a diffusion transformer that compute some of its tokens, beside their MACs.

A DiT with random weights, every variant beside the plain one in one run. *lean* is CAT Pruning: only the
chosen tokens go through the blocks. *full-stream* is ToCa: all tokens go through the blocks, and every
attention and feed-forward computes the chosen ones. The batch is guided: one latent twice. Calls of the
plain model alternate with those of each variant (A B A B); figures are medians over rounds of ratios within
a round. Results go to ``benchmarks/results/``.

    python benchmarks/tokens_cpu.py
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import regrow
from regrow import CATPruning, ToCa
from regrow.lab.measure.machine import PACKAGES, machine
from regrow.lab.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
# By share computed: the part of the MAC-theoretical speed-up to be reached.
TARGETS = {
    "lean": {0.5: 0.90, 0.3: 0.85, 0.1: 0.65},
    "full-stream": {0.5: 0.80, 0.3: 0.74, 0.1: 0.47},
}
# Calls before those that leave tokens out.
FULL_CALLS = 2
CALLS_AT_MOST = 1000


def lean(share: float) -> CATPruning:
    """CAT Pruning at a share computed."""
    return CATPruning(alpha=share, t0=FULL_CALLS)


def full_stream(share: float) -> ToCa:
    """ToCa, with the same share in the attention and the feed-forward of every block."""
    return ToCa(
        interval=CALLS_AT_MOST, ratio=1 - share, self_attention=1, layer_weight=0, step_weight=0, queries=64
    )


STREAMS: dict[str, Callable[[float], Any]] = {"lean": lean, "full-stream": full_stream}


@dataclass(frozen=True)
class Row:
    """One variant.

    Args:
        stream: ``"lean"`` or ``"full-stream"``.
        share: of the tokens computed.
        seconds: of a call, median over rounds.
        speedup: of the plain model's time over it, median over rounds.
        macs_ratio: of the plain model's MACs over its own, choosing tokens left out.
        of_macs: ``speedup / macs_ratio``.
        target: what ``of_macs`` should be at least.
        rounds: the speed-up of each round.
    """

    stream: str
    share: float
    seconds: float
    speedup: float
    macs_ratio: float
    of_macs: float
    target: float
    rounds: tuple[float, ...]


def model_of(layers: int, width: int, side: int) -> Any:
    """A DiT of random weights with ``side x side`` tokens."""
    torch.manual_seed(0)
    heads = max(width // 64, 1)
    return DiTTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        sample_size=2 * side,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()


def measure(
    model: Any, inputs: Any, stream: str, share: float, rounds: int, done: Callable[[], None]
) -> Row:
    """Plain and accelerated calls in turns."""
    plain = copy.deepcopy(model)
    speedups, seconds = [], []
    with regrow.apply(model, STREAMS[stream](share)) as run, run.generation(CALLS_AT_MOST) as clock:

        def accelerated() -> float:
            taken = timed(model, inputs)
            clock.step()
            return taken

        for _ in range(FULL_CALLS + 1):
            accelerated()
        last = run.report().calls[-1]
        theory = last.full_macs / last.macs
        timed(plain, inputs)
        for _ in range(rounds):
            before = timed(plain, inputs)
            # Short calls are timed more often.
            mine = statistics.median(accelerated() for _ in range(max(round(theory), 1)))
            seconds.append(mine)
            speedups.append(before / mine)
            done()
        calls = run.report().calls[FULL_CALLS:]
    assert len({(c.macs, c.ratio) for c in calls}) == 1, "calls of one kind are timed"
    speedup = statistics.median(speedups)
    return Row(
        stream,
        share,
        statistics.median(seconds),
        speedup,
        theory,
        speedup / theory,
        TARGETS[stream][share],
        tuple(speedups),
    )


def timed(model: Any, inputs: Any) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="channels")
    parser.add_argument("--side", type=int, default=32, help="tokens along one side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens-cpu.json")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    model = model_of(args.layers, args.width, args.side)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 2 * args.side, 2 * args.side, generator=generator)
    inputs = {
        "hidden_states": latent.repeat(args.batch, 1, 1, 1),
        "timestep": torch.full((args.batch,), 500),
        "class_labels": torch.arange(args.batch),
    }
    cases = [(stream, share) for stream, shares in TARGETS.items() for share in shares]
    with torch.no_grad(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=len(cases) * args.rounds)
        rows = [measure(model, inputs, *c, args.rounds, lambda: progress.advance(task)) for c in cases]

    table = Table("stream", "share", "ms", "speed-up", "in MACs", "of it", "target")
    for r in rows:
        table.add_row(
            r.stream,
            f"{r.share:g}",
            f"{1000 * r.seconds:.1f}",
            f"{r.speedup:.2f}",
            f"{r.macs_ratio:.2f}",
            f"{r.of_macs:.2f}",
            f"{r.target:.2f}",
        )
    Console().print(table)
    result = {
        "what": "calls of a DiT with random weights that compute a share of its tokens",
        "model": {"layers": args.layers, "width": args.width, "tokens": args.side**2, "batch": args.batch},
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "machine": machine(torch.device("cpu"), PACKAGES),
        "rows": [vars(r) for r in rows],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
