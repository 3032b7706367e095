#!/bin/bash
# Time and quality of a few methods on the bundled model, each by one command, and how long the second one takes.
#
#   bash benchmarks/emoji.sh [PROMPTS]
#
# Writes benchmarks/results/bench-emoji.json, eval-emoji.json and eval-emoji-time.json there. Run it alone: both take
# all cores.
set -euo pipefail
cd "$(dirname "$0")/.."
prompts=${1:-64}
regrow=${REGROW:-.venv/bin/regrow}
results=benchmarks/results
methods=steps:50,steps:25,sito:d,dato:b1,dato:fast,deepcache:5,tome:0.5

$regrow bench --model emoji --methods "$methods" --images 4 --json >"$results/bench-emoji.json"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
begin=$SECONDS
$regrow eval --model emoji --methods "$methods" --prompts "$prompts" --json --out "$folder" >"$results/eval-emoji.json"
seconds=$((SECONDS - begin))
printf '{"what": "regrow eval, start to end", "prompts": %d, "methods": "%s", "minutes": %d.%02d}\n' \
    "$prompts" "$methods" $((seconds / 60)) $((seconds % 60 * 100 / 60)) >"$results/eval-emoji-time.json"
