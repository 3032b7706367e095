#!/bin/bash
# The search on the bundled model, beside what it has to beat. Killed, the same command goes on.
#
#   bash benchmarks/search.sh [FOLDER] [MINUTES]
#
# One search with all savings, for so many minutes; one that measures every plan on all prompts, one in stages
# and one by chance, each for as long. Writes FOLDER, benchmarks/results/search.json and docs/search.png.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work/search}
minutes=${2:-50}
regrow=${REGROW:-.venv/bin/regrow}
beside=$(printf 'deepcache:%d,' 2 3 4 5 6 7 8 9 10)$(printf 'deepcache:%d+tome:0.5,' 2 3 5 8)
beside+=dato:b1,dato:fast,steps:25,steps:16,steps:10,steps:5
common=(--model emoji --method dato --steps 50 --prompts 16 --dtype bfloat16 --budget "${minutes}m")

$regrow search "${common[@]}" --beside "$beside" --out "$folder/nsga2"
if [ "${ALONE:-}" ]; then exit; fi
$regrow search "${common[@]}" --rungs 16 --patience 0 --no-plots --out "$folder/every-plan-on-all"
$regrow search "${common[@]}" --algorithm staged --no-plots --out "$folder/staged"
$regrow search "${common[@]}" --algorithm random --no-plots --out "$folder/chance"
"$(dirname "$regrow")/python" benchmarks/search_table.py "$folder/nsga2" --chance "$folder/chance" \
    --curves "$folder/every-plan-on-all" "$folder/staged" "$folder/chance" --plot "$folder" \
    --json benchmarks/results/search.json
cp "$folder/compare.png" docs/search.png
