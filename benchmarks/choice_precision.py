"""What measuring similarity in float32 costs a bfloat16 model, and what it gains (the option ``exact``).

Time: choosing the tokens of one self-attention of Stable Diffusion 1.5 (4,096 tokens of 320 channels, a
guided batch of 2), rounded and exact in turns (A B A B), on one thread, medians. A call has five of
them, one of depth 1 has one. They stand beside the times of calls in ``results/unet-speed-
sd15-bfloat16-cpu.json``, which may have had more threads. Gain: on the bundled U-Net in bfloat16, the
share of tokens whose most similar base token is that of float64 arithmetic on the same features. The
result goes to ``benchmarks/results/``.

    python benchmarks/choice_precision.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import zoo
from regrow.lab.measure.machine import machine
from regrow.lab.memory import keep_freed_memory
from regrow.models import layout_of
from regrow.tokens.grid import Grid, best_of_patch
from regrow.tokens.scores import random_score
from regrow.tokens.select import complement, most_similar, prune_similar

RESULTS = Path(__file__).parent / "results"
ATTENTIONS = 5


def base_of(x: Tensor, grid: Grid) -> Tensor:
    """A token of each patch by chance, the same in all samples."""
    score = random_score(grid.tokens, torch.Generator().manual_seed(0))
    return best_of_patch(score, grid).expand(len(x), -1)


def seconds(rounds: int) -> dict[str, float]:
    """Of the processor's time, to choose the tokens of one self-attention."""
    grid = Grid(64, 64)
    x = torch.randn(2, grid.tokens, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    base, count = base_of(x, grid), grid.pruned(0.5)
    seen: dict[str, list[float]] = {"rounded": [], "exact": []}
    for turn in range(rounds + 1):
        for name, times in seen.items():
            start = time.process_time()
            prune_similar(x, base, grid, count, exact=name == "exact")
            if turn:  # The first one warms up.
                times.append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


def features(steps: int) -> list[Tensor]:
    """What the finest transformer blocks of the bundled U-Net read in a generation, in bfloat16."""
    pipe = zoo.load("emoji", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    found: list[Tensor] = []

    def note(module: Any, args: Any) -> None:
        found.append(args[0].clone())

    layout = layout_of(pipe.unet)
    for block in layout.blocks:
        if block.downsample == layout.top_level:
            block.block.register_forward_pre_hook(note)
    generator = torch.Generator().manual_seed(1)
    pipe("large owl on blue", generator=generator, num_inference_steps=steps, output_type="latent")
    return found


def agreement(all_features: list[Tensor]) -> dict[str, float]:
    """The share of tokens whose source is that of float64 arithmetic, the mean over layers and calls."""
    shares: dict[str, list[float]] = {"rounded": [], "exact": []}
    for x in all_features:
        side = round(x.shape[1] ** 0.5)
        base = base_of(x, Grid(side, side))
        rest = complement(base, x.shape[1])
        expected = most_similar(x.double(), rest, base)[1]
        for name, found in shares.items():
            source = most_similar(x, rest, base, exact=name == "exact")[1]
            found.append(float((source == expected).float().mean()))
    return {name: statistics.mean(found) for name, found in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--steps", type=int, default=10, help="of the generation whose features are compared"
    )
    parser.add_argument("--speed", type=Path, default=RESULTS / "unet-speed-sd15-bfloat16-cpu.json")
    parser.add_argument("--json", type=Path, default=RESULTS / "choice-precision.json")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    speed = json.loads(args.speed.read_text())
    call, threads = speed["calls"]["full"]["seconds"], speed["machine"]["threads"]
    shallow = speed["calls"]["depth 1 r=0.5 DaTo"]["seconds"]
    with torch.no_grad():
        chosen = seconds(args.rounds)
        right = agreement(features(args.steps))
    more = ATTENTIONS * (chosen["exact"] - chosen["rounded"])
    result = {
        "what": "choosing tokens of a bfloat16 model by rounded and by float32 similarities",
        "machine": machine(),
        "rounds": args.rounds,
        "seconds_of_one_attention": chosen,
        "attentions_of_a_call": ATTENTIONS,
        "seconds_of_a_call": call,
        "threads_of_the_call": threads,
        "more_of_a_call_at_most": more / call,
        "more_of_a_call_if_threads_share_it": more / call / threads,
        "seconds_of_a_call_of_depth_1": shallow,
        "more_of_a_call_of_depth_1_at_most": more / ATTENTIONS / shallow,
        "same_source_as_float64": right,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"one attention: {1e3 * chosen['rounded']:.1f} ms rounded, {1e3 * chosen['exact']:.1f} ms exact; "
        f"of a call {more / call / threads:.2%} to {more / call:.2%} more, of one of depth 1 up to "
        f"{more / ATTENTIONS / shallow:.1%}; source as in float64: "
        f"{right['rounded']:.1%} rounded, {right['exact']:.1%} exact"
    )


if __name__ == "__main__":
    main()
