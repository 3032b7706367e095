r"""ImageReward (Xu et al., 2023) of the pictures that ``regrow eval --export`` wrote.

ImageReward needs timm 0.6.13 and, at its import, a transformers and a diffusers of 2023, so it gets an
environment of its own (versions of that year; this set has not been tried)::

    python3.10 -m venv imagereward-env
    imagereward-env/bin/pip install torch==2.1.2 torchvision==0.16.2 "numpy<2" transformers==4.33.2 \
        diffusers==0.21.4 accelerate==0.23.0 huggingface_hub==0.17.3 image-reward==1.5 openai-clip
    regrow eval ... --export pictures
    imagereward-env/bin/python benchmarks/external/image_reward.py pictures --out imagereward.json
    regrow eval ... --scores imagereward.json

The first run fetches ImageReward-v1.0 from the hub. This script was written from the
documentation and sources of image-reward 1.5; the project's tests run it with a stand-in for that package
only, and no score of it has been published here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Score every variant and write ``{variant: {"ImageReward": mean}}``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path, help="folder of regrow eval --export")
    parser.add_argument("--out", type=Path, required=True, help="JSON for regrow eval --scores")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    options = parser.parse_args()

    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device=options.device)
    variants = json.loads((options.export / "export.json").read_text("utf-8"))["variants"]
    scores = {}
    for folder, name in variants.items():
        prompts = json.loads((options.export / folder / "prompts.json").read_text("utf-8"))
        rewards = [
            model.score(prompt, str(options.export / folder / file)) for file, prompt in prompts.items()
        ]
        scores[name] = {"ImageReward": sum(rewards) / len(rewards)}
        print(name, scores[name]["ImageReward"])
    options.out.write_text(json.dumps(scores, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
