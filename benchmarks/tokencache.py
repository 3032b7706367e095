"""TokenCache and Learning-to-Cache beside other methods at several numbers of steps, guided and not.

    python benchmarks/tokencache.py --learned work/learned
    python benchmarks/tokencache.py --learned work/learned --only 250 --pictures 256 --out work/more.json

On the bundled transformer. The folder holds what was trained for it besides the bundled predictor:
``lora.safetensors``, and for each number of steps ``router-STEPS.safetensors`` (see
tools/train_predictor.sh); rows of what is missing are left out. Pictures are compared with the
unaccelerated ones of the same seeds; nothing was trained or calibrated on these seeds. MACs are those of
the denoiser with those of choosing tokens. Killed, or asked for more, it goes on after the last row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from regrow import zoo
from regrow.apply import apply
from regrow.lab.calibration.calibrate import EQUAL, Calibration, Costs, Settings, plan_of
from regrow.lab.cli.models import load_pipeline
from regrow.lab.measure.atomic_files import write_json
from regrow.lab.measure.bench import bench
from regrow.lab.measure.images import feature_distances, psnr
from regrow.lab.measure.machine import machine
from regrow.lab.measure.sampling import make
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.calibrated import Calibrated

MODEL = "cifar10"
GUIDED = 2.0
FULL_STEPS = {250: 50, 50: 12, 20: 9, 10: 6}
"""I-steps of the paper, by steps."""
SEED = 20_000
BATCH, TIMED = 16, 8
PLAN = "calibrated plan"
OURS = "TokenCache, r 0.9"


@dataclass(frozen=True)
class Setting:
    """One table.

    Args:
        steps: of the sampler.
        guided: at `GUIDED`, or without guidance.
    """

    steps: int
    guided: bool

    @property
    def name(self) -> str:
        """As a key."""
        return f"{self.steps} steps, {'guided' if self.guided else 'unguided'}"

    @property
    def guidance(self) -> float:
        """Scale; 1 is none."""
        return GUIDED if self.guided else 1.0

    def methods(self, learned: Path) -> Iterator[tuple[str, str]]:
        """Rows and their short names."""
        ours = f"tokencache:{FULL_STEPS[self.steps]}:last_blocks=1"
        cost = FULL_STEPS[self.steps] / self.steps
        # What one call in so many costs when the others compute a tenth of five blocks and one block.
        share = cost + (1 - cost) * 0.28
        for count in dict.fromkeys((self.steps // 2, round(share * self.steps))):
            yield f"{count} steps", f"steps:{count}"
        for interval in (2, 3):
            yield f"FORA {interval}", f"fora:{interval}"
        for interval in (2, 3):
            yield f"ToCa {interval}", f"toca:{interval}"
        yield "CAT Pruning .3", "cat:0.3"
        router = learned / f"router-{self.steps}.safetensors"
        if router.exists():
            yield "Learning-to-Cache", f"l2c:{router}"
        for ratio in ("0.9", "0.5"):
            own = f"{ours}:ratio={ratio}"
            yield f"TokenCache, r {ratio}", own
            yield f"TokenCache, r {ratio}, forecast", f"{own}:recovery=taylor"
            yield f"TokenCache, r {ratio}, in turns", f"{own}:staleness=1"
            yield f"random tokens, r {ratio}", f"{own}:choice=random"
            yield f"random tokens, r {ratio}, in turns", f"{own}:choice=random:staleness=1"
        if (learned / "lora.safetensors").exists():
            yield "TokenCache, r 0.9, LoRA", f"{ours}:lora={learned / 'lora.safetensors'}"
        yield "all updates reused", f"{ours}:choice=random:ratio=1.0"
        yield "all updates forecast", f"{ours}:choice=random:ratio=1.0:recovery=taylor"


class Pictures:
    """Makes and compares the pictures of a setting."""

    def __init__(self, pipe: Any, setting: Setting, count: int) -> None:
        self.pipe, self.setting = pipe, setting
        self.prompts = zoo.prompts_of(MODEL, count, "")
        self._plain: list[Image.Image] = []

    def row(self, config: Any, steps: int) -> dict[str, Any]:
        """PSNR and feature distance of each picture, and how many MACs fewer."""
        self._plain = self._plain or self._made(None, self.setting.steps)[0]
        made, fewer = self._made(config, steps)
        pairs = list(zip(self._plain, made, strict=True))
        return {
            "psnr": [round(min(psnr(a, b), EQUAL), 3) for a, b in pairs],
            "features": [round(d, 5) for d in feature_distances(self._plain, made)[0]],
            "fewer_macs": round(fewer, 3),
        }

    def _made(self, config: Any, steps: int) -> tuple[list[Image.Image], float]:
        made: list[Image.Image] = []
        own = full = 0
        for begin in range(0, len(self.prompts), BATCH):
            prompts = self.prompts[begin : begin + BATCH]
            if config is None:
                made += self._batch(prompts, steps, begin, {})
                continue
            with apply(self.pipe, config) as run:
                made += self._batch(prompts, steps, begin, dict(config.arguments()))
            if not begin:
                report = run.report()
                own, full = report.macs + report.selection_macs, report.full_macs
        return made, full / own if own else self.setting.steps / steps

    def _batch(self, prompts: Any, steps: int, begin: int, more: dict[str, Any]) -> Any:
        guidance = self.setting.guidance
        return make(self.pipe, prompts, steps=steps, guidance=guidance, seed=SEED + begin, more=more).images


def planned(pipe: Any, setting: Setting, calls: int) -> Calibrated:
    """The plan of so many calls, calibrated on prompts and seeds of its own."""
    settings = Settings(setting.steps, setting.guidance, batch=4, model=MODEL)
    calibration = Calibration(pipe, zoo.prompts_of(MODEL, 16, ""), settings)
    return plan_of(calibration, calibration.find(calls, Costs(0.0, 0.0, None)))


def run(file: Path, learned: Path, steps: list[int], count: int, *, timed: bool) -> None:
    """Make all rows, and time them if wanted."""
    data: dict[str, Any] = {"machine": machine(), "pictures": count, "settings": {}}
    if file.exists():
        data = json.loads(file.read_text(encoding="utf-8"))
    if data["pictures"] != count:
        raise SystemExit(f"{file}: it is of {data['pictures']} pictures; use another --out")

    def save() -> None:
        write_json(file, data)

    pipe = load_pipeline(MODEL, "cpu", torch.float32, "DDIM")
    for setting in (Setting(one, guided) for guided in (True, False) for one in steps):
        rows = data["settings"].setdefault(setting.name, {"rows": {}, "times": []})
        pictures = Pictures(pipe, setting, count)
        names = dict(setting.methods(learned))
        for name, short in names.items():
            if name not in rows["rows"]:
                print(setting.name, name, flush=True)
                found = variant(short, setting.steps)
                rows["rows"][name] = pictures.row(found.config, found.steps) | {"method": short}
                save()
        calls = round(setting.steps / rows["rows"][OURS]["fewer_macs"])
        if PLAN not in rows["rows"] and setting.steps <= 50:
            print(setting.name, PLAN, flush=True)
            plan = planned(pipe, setting, calls)
            rows["rows"][PLAN] = pictures.row(plan, plan.steps) | {"plan": json.loads(plan.dump())}
            save()
        if timed and setting.guided and not rows["times"]:
            variants = [Variant(f"{setting.steps} steps", None, setting.steps)]
            for name, row in rows["rows"].items():
                own = variant(row["method"], setting.steps) if "method" in row else None
                config = Calibrated.model_validate(row["plan"]) if own is None else own.config
                variants.append(Variant(name, config, setting.steps if own is None else own.steps))
            rows["times"] = [
                row.to_dict()
                for row in bench(pipe, variants, pictures.prompts[:TIMED], guidance=setting.guidance)
            ]
            save()
        file.with_suffix(".md").write_text(tables(data), encoding="utf-8")


def tables(data: dict[str, Any]) -> str:
    """The result as tables of Markdown."""
    parts = [
        f"Model {MODEL}, DDIM; {data['pictures']} pictures; {data['machine']['processor']}. PSNR in dB and "
        "distance of EfficientNet-Lite0 features to the unaccelerated pictures; +- standard errors of "
        "paired differences."
    ]
    done = {name: one for name, one in data["settings"].items() if OURS in one["rows"]}
    for name, setting in done.items():
        rows, times = setting["rows"], {row["name"]: row["speedup"] for row in setting["times"]}
        lines = [
            f"| {name} | MACs fewer | speed-up | PSNR | feature distance | {OURS}, nearer by |",
            "|---|---|---|---|---|---|",
        ]
        ours = np.array(rows[OURS]["psnr"])
        for method, row in sorted(rows.items(), key=lambda item: item[1]["fewer_macs"]):
            own = np.array(row["psnr"])
            more = ours - own
            gain = f"{more.mean():+.1f} +- {more.std(ddof=1) / np.sqrt(len(more)):.1f}"
            time = f"{times[method]:.2f}x" if method in times else ""
            lines.append(
                f"| {method} | {row['fewer_macs']:.2f}x | {time} | {own.mean():.1f} "
                f"| {np.mean(row['features']):.4f} | {'' if method == OURS else gain} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--learned", type=Path, default=Path("work/learned"), help="folder of trained files"
    )
    parser.add_argument("--only", type=int, nargs="+", choices=tuple(FULL_STEPS), help="numbers of steps")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--untimed", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/tokencache.json")
    options = parser.parse_args()
    steps = options.only or list(FULL_STEPS)
    run(options.out, options.learned, steps, options.pictures, timed=not options.untimed)


if __name__ == "__main__":
    main()
