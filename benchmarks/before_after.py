"""Calls of two versions of regrow, timed in turns in one run.

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before/src src

Each version runs in a process of its own, one thread each, and the driver asks them in turns (A B A B) for
the processor time of a call of each case. Figures are medians over rounds, and the middle half of them, of
the ratio after / before within a round: above 1 is slower. Random weights, a guided batch, no pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CALLS = 1000
REPEATS = 3
"""Calls of a case in a turn, of which the least time counts."""


def cases() -> dict[str, tuple[str, Callable[[], Any] | None, int]]:
    """By name: the model, the method, and the calls before those that are timed."""
    import regrow

    def schedule(depth: Any, ratio: float) -> Any:
        plan = regrow.Schedule(depth=("full", *[depth] * (CALLS - 1)), ratio=(0.0, *[ratio] * (CALLS - 1)))
        return regrow.DaTo(schedule=plan)

    def toca(ratio: float) -> Any:
        return regrow.ToCa(
            interval=CALLS, ratio=ratio, self_attention=1, layer_weight=0, step_weight=0, queries=64
        )

    return {
        "DiT, plain": ("dit", None, 0),
        "DiT, CAT Pruning, half of the tokens": ("dit", lambda: regrow.CATPruning(alpha=0.5, t0=2), 3),
        "DiT, CAT Pruning, a tenth": ("dit", lambda: regrow.CATPruning(alpha=0.1, t0=2), 3),
        "DiT, ToCa, half of the tokens": ("dit", lambda: toca(0.5), 2),
        "DiT, FORA, cached": ("dit", lambda: regrow.FORA(interval=CALLS), 2),
        "DiT, DeepCache, cached": ("dit", lambda: regrow.DeepCache(interval=CALLS), 2),
        "U-Net, plain": ("unet", None, 0),
        "U-Net, SiTo, ratio .5": ("unet", lambda: regrow.SiTo(ratio=0.5), 1),
        "U-Net, DaTo, cached, depth 1, ratio .5": ("unet", lambda: schedule(1, 0.5), 2),
        "U-Net, output reused": ("unet", lambda: schedule(0, 0.0), 2),
        "U-Net, FORA, cached": ("unet", lambda: regrow.FORA(interval=CALLS), 2),
    }


def models() -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name: a model of random weights, and the arguments of a call."""
    import torch
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_layers=6,
        num_attention_heads=8,
        attention_head_dim=64,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()
    unet = UNet2DConditionModel(
        block_out_channels=(128, 256, 256, 256), cross_attention_dim=256, attention_head_dim=4
    ).eval()
    latent = torch.randn(1, 4, 32, 32).repeat(2, 1, 1, 1)
    time_step = torch.tensor([500, 500])
    return {
        "dit": (
            dit,
            {"hidden_states": latent, "timestep": time_step, "class_labels": torch.tensor([1, 1000])},
        ),
        "unet": (
            unet,
            {
                "sample": latent,
                "timestep": torch.tensor(500),
                "encoder_hidden_states": torch.randn(2, 77, 256),
            },
        ),
    }


def work() -> None:
    """Answer the names of cases on standard input with seconds."""
    import torch

    import regrow

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    known, made = cases(), models()
    print(json.dumps({"regrow": regrow.__file__}), flush=True)
    for line in sys.stdin:
        name, method, before = known[line.strip()]
        model, arguments = made[name]
        if method is None:
            print(min(timed(model, arguments) for _ in range(REPEATS)), flush=True)
            continue
        with regrow.apply(model, method()) as run, run.generation(CALLS) as clock:
            taken = []
            for _ in range(before + REPEATS):
                taken.append(timed(model, arguments))
                clock.step()
        print(min(taken[before:]), flush=True)


def timed(model: Any, arguments: dict[str, Any]) -> float:
    """The processor time of a call."""
    before = time.process_time()
    model(**arguments)
    return time.process_time() - before


class Side:
    """A version of regrow in a process of its own."""

    def __init__(self, source: Path) -> None:
        words = [sys.executable, __file__, "--work"]
        env = {**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=env, stdin=pipe, stdout=pipe, text=True)
        loaded = json.loads(self._line())["regrow"]
        if not Path(loaded).is_relative_to(source.resolve()):
            raise SystemExit(f"{source}: regrow was loaded from {loaded}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def time(self, case: str) -> float:
        """Seconds of a call."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return float(self._line())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="src folder of the earlier version")
    parser.add_argument("after", type=Path, help="src folder of the later one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "before-after.json")
    args = parser.parse_args()

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from regrow.lab.measure.atomic_files import write_json
    from regrow.lab.measure.machine import machine

    sides = [Side(args.before), Side(args.after)]
    names = list(cases())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in track(range(args.rounds + 1), "rounds"):
        for name in names:
            # Each side comes first in every other round; the first round warms up.
            order = (0, 1) if number % 2 else (1, 0)
            found = {side: sides[side].time(name) for side in order}
            if number:
                times[name].append((found[0], found[1]))
    shown = Table("case", "before, ms", "after, ms", "after / before", "middle half")
    rows = []
    for name, pairs in times.items():
        ratios = [after / before for before, after in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        rows.append(
            {"case": name, "before": before, "after": after, "ratio": middle, "quartiles": [low, high]}
        )
        shown.add_row(
            name, f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"
        )
    Console().print(shown)
    write_json(args.out, {"rounds": args.rounds, "machine": machine("cpu"), "rows": rows})
    print(args.out)


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        main()
