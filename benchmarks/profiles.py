"""MACs that README and docs name, by `regrow profile`: no weights, a minute or two.

    python benchmarks/profiles.py

writes into benchmarks/results/ profile-cat.json (CAT Pruning and AT-EDM, as the former's paper counts),
profile-plain.json, which has the plain calls and DaTo, profile-sito.json (where SiTo prunes), and
profile-choosing.json (what docs/choosing.md names).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rich.progress import track

from regrow.lab.cli.ablations import alternatives
from regrow.lab.measure.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
AS_THE_PAPER = "--exclude-attention --per-guided-image"
ARCHITECTURES = (
    "sd15",
    "sdxl",
    "dit-xl-256",
    "dit-xl-512",
    "pixart-alpha-256",
    "pixart-alpha-1024",
    "pixart-sigma-1024",
    "sd3-1024",
    "flux-1024",
)
STARTS = (
    "sd15",
    "sd2",
    "sdxl",
    "sd3-1024",
    "pixart-sigma-1024",
    "dit-xl-256",
    "flux-1024",
    "wan-1.3b-480",
)
PROFILES = {
    "profile-cat": [
        f"--arch {arch} --method {method} {AS_THE_PAPER} --steps {steps}"
        for arch in ("sd3-1024", "pixart-sigma-1024")
        for method in ("cat --preset paper", "atedm --preset reuse")
        for steps in (28, 50)
    ],
    "profile-plain": [
        *(f"--arch {arch}" for arch in ARCHITECTURES),
        *(f"--arch sd15 --method dato --preset b1 --ratio {ratio}" for ratio in (0, 0.3, 0.5, 0.7)),
        "--arch sd15 --method dato --preset fast",
        "--arch emoji --method dato --preset b1 --ratio 0.5",
    ],
    "profile-sito": [
        f"--arch emoji --method {spec}"
        for ablation in ("where", "levels")
        for group in alternatives(ablation)
        for spec in group
    ],
    "profile-choosing": [
        *(f"--arch {arch} --method deepcache:3" for arch in STARTS),
        *(
            f"--arch sdxl --method {method}"
            for method in (
                "dato --preset b1",
                "dato --schedule docs/sdxl-depth-4.yaml",
                "deepcache:5",
                "deepcache:5:branch=3",
                "deepcache:5:branch=3+tome:0.5",
                "tome:0.5",
                "tome:0.5:max_downsample=4",
            )
        ),
    ],
}


def profile(words: str) -> dict[str, object]:
    """What `regrow profile` prints, with its command, without the list of all calls."""
    regrow = str(Path(sys.executable).with_name("regrow"))
    printed = subprocess.run(
        [regrow, "profile", *words.split(), "--json"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(printed)
    found.pop("per_call", None)
    return {"command": f"regrow profile {words}", **found}


def main() -> None:
    """Write all files."""
    versions = machine()["versions"]
    for name, commands in PROFILES.items():
        rows = [profile(words) for words in track(commands, name)]
        result = {"what": "MACs", "versions": versions, "date": machine()["date"], "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
