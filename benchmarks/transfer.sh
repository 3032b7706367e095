#!/bin/bash
# Do the bundled plans of the bundled model hold on other samplers and numbers of steps?
#
#   bash benchmarks/transfer.sh [FOLDER] [GENERATIONS] [PROMPTS]
#
# Searches so many generations with 20 steps, and with Euler's sampler, and compares in all settings. Killed, the
# same command goes on. Writes FOLDER and benchmarks/results/transfer.json.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work/transfer}
generations=${2:-3}
prompts=${3:-8}
regrow=${REGROW:-.venv/bin/regrow}
python=$(dirname "$regrow")/python
common=(--method dato --dtype bfloat16 --engine ray --workers 2 --budget "$generations" --no-plots)
mkdir -p "$folder"

$regrow search "${common[@]}" --model emoji --prompts 16 --steps 20 --out "$folder/ddim-20"
"$python" - "$folder" <<'END'
import sys
from pathlib import Path

from diffusers import EulerDiscreteScheduler

from regrow import zoo

folder = Path(sys.argv[1])
pipeline = zoo.load("emoji")
pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
pipeline.save_pretrained(folder / "euler")
(folder / "prompts.txt").write_text("\n".join(zoo.captions("emoji")[:16]) + "\n")
END
$regrow search "${common[@]}" --model "$folder/euler" --prompts "$folder/prompts.txt" --steps 50 \
    --guidance "$("$python" -c 'from regrow import zoo; print(zoo.GUIDANCE["emoji"])')" --out "$folder/euler-50"
"$python" benchmarks/transfer.py --plans src/regrow/presets/emoji-*.yaml --prompts "$prompts" \
    --there "DDIM, 20 steps=$folder/ddim-20" "Euler, 50 steps=$folder/euler-50" \
    --json benchmarks/results/transfer.json
