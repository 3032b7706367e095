"""VBench's (Huang et al., 2024) picture qualities of the pictures that ``regrow eval --export`` wrote.

VBench is made for videos. Of its dimensions, those that look at single frames mean something for pictures:
imaging quality (MUSIQ) and aesthetic quality (the LAION predictor). It needs transformers 4.33.2 and
numpy 1, so it gets an environment of its own::

    python3.10 -m venv vbench-env
    vbench-env/bin/pip install torch torchvision vbench
    regrow eval ... --export pictures
    vbench-env/bin/python benchmarks/external/vbench_scores.py pictures --out vbench.json
    regrow eval ... --scores vbench.json

The first run fetches VBench's networks. This script was written from the documentation and sources of
vbench 0.1.5; the project's tests run it with a stand-in for that package only, and no score of it has been
published here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

DIMENSIONS = ("imaging_quality", "aesthetic_quality")


def main() -> None:
    """Score every variant and write ``{variant: {"VBench imaging quality": share, ...}}``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path, help="folder of regrow eval --export")
    parser.add_argument("--out", type=Path, required=True, help="JSON for regrow eval --scores")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    options = parser.parse_args()

    import torch
    from vbench import VBench

    variants = json.loads((options.export / "export.json").read_text("utf-8"))["variants"]
    scores = {}
    for folder, name in variants.items():
        prompts = json.loads((options.export / folder / "prompts.json").read_text("utf-8"))
        with tempfile.TemporaryDirectory() as results:
            # The second argument lists VBench's own prompts, which the custom mode does not read.
            VBench(torch.device(options.device), "", results).evaluate(
                videos_path=str(options.export / folder),
                name="scores",
                prompt_list=prompts,
                dimension_list=list(DIMENSIONS),
                mode="custom_input",
            )
            found = json.loads((Path(results) / "scores_eval_results.json").read_text("utf-8"))
        # Of each dimension: the mean, then the score of every picture.
        scores[name] = {f"VBench {d.replace('_', ' ')}": float(found[d][0]) for d in DIMENSIONS}
        print(name, scores[name])
    options.out.write_text(json.dumps(scores, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
