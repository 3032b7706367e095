#!/bin/bash
# Do the plans that were found for the bundled model at 50 DDIM steps hold elsewhere?
#
#   bash benchmarks/transfer.sh [FOLDER] [GENERATIONS] [PROMPTS]
#
# Searches so many generations in each setting as well, and compares. Killed, it goes on. Writes FOLDER,
# benchmarks/results/transfer.json and a folder for each of those searches in benchmarks/results/search/.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work/transfer}
generations=${2:-3}
prompts=${3:-16}
python=${PYTHON:-.venv/bin/python}

"$python" benchmarks/transfer.py --plans src/regrow/presets/emoji-*.yaml --prompts "$prompts" \
    --work "$folder" --generations "$generations" --json benchmarks/results/transfer.json
shopt -s nullglob
for file in "$folder"/*/search.json; do
    name=$(basename "$(dirname "$file")")
    mkdir -p "benchmarks/results/search/$name"
    cp "$file" "benchmarks/results/search/$name"
done
