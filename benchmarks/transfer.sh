#!/bin/bash
# Do the plans that were found for the bundled model at 50 DDIM steps hold elsewhere?
#
#   bash benchmarks/transfer.sh [FOLDER] [GENERATIONS] [PROMPTS]
#
# Searches so many generations at 20 steps, and compares in all settings. Killed, it goes on. Writes FOLDER,
# benchmarks/results/transfer.json and benchmarks/results/search/ddim-20/.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work/transfer}
generations=${2:-3}
prompts=${3:-16}
regrow=${REGROW:-.venv/bin/regrow}

$regrow search --model emoji --method dato --choices ratio=0,0.3,0.5,0.7 --steps 20 --prompts 16 --dtype bfloat16 \
    --engine ray --workers 2 --budget "$generations" --no-plots --out "$folder/ddim-20"
mkdir -p benchmarks/results/search/ddim-20
cp "$folder/ddim-20/search.json" benchmarks/results/search/ddim-20
"$(dirname "$regrow")/python" benchmarks/transfer.py --plans src/regrow/presets/emoji-*.yaml --prompts "$prompts" \
    --work "$folder" --there "DDIM, 20 steps=$folder/ddim-20" --json benchmarks/results/transfer.json
