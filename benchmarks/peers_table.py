"""regrow's methods beside the public accelerators on one pipeline, timed in turns as `regrow bench` does.

python benchmarks/peers_table.py --arch sd15 --methods steps:50,dato:b1 --peers tomesd:0.5,DeepCache:5
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from peers import PEERS, peer

from regrow.cli.bench import Request, run_bench
from regrow.measure.machine import PACKAGES
from regrow.measure.variants import Variant, variant


def rows(methods: str, peers: str, steps: int) -> tuple[Variant, ...]:
    """The rows by their names, separated by commas; "all" are all peers at their defaults.

    Raises:
        ValueError: if a name is not known.
    """
    specs = list(PEERS) if peers == "all" else [spec for spec in peers.split(",") if spec]
    own = [variant(spec.strip(), steps) for spec in methods.split(",")]
    return (*own, *(peer(spec.strip(), steps) for spec in specs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="bundled name, folder or hub id of any text-to-image pipeline")
    model.add_argument("--arch", help="sd15, sdxl, sd3-1024 and others, with random weights")
    parser.add_argument("--methods", default="steps:50,sito:d,dato:b1", help="the first is the baseline")
    parser.add_argument("--peers", default="all", help=f"all, or some of {', '.join(PEERS)}")
    parser.add_argument("--prompt", action="append", help="the model's own if none; may be repeated")
    parser.add_argument("--images", type=int, default=1, help="pictures in one batch")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps of methods and peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    args = parser.parse_args()
    # cache-dit tells all it does, between the lines of the progress bar.
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        request = Request(
            variants=rows(args.methods, args.peers, args.steps),
            model=args.model,
            arch=args.arch,
            prompts=tuple(args.prompt or ()),
            images=args.images,
            rounds=args.rounds,
            scheduler=None,
            guidance=args.guidance,
            height=args.height,
            width=args.width,
            device=args.device,
            dtype=args.dtype,
            compiled=args.compile,
            out=args.json,
            plot=None,
        )
        packages = dict.fromkeys((*PACKAGES, *(kind.package for kind in PEERS.values())))
        run_bench(request, as_json=False, packages=tuple(packages))
    except (ValueError, OSError, ImportError) as error:
        print(f"peers_table: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
