#!/bin/bash
# The papers' ablations on the bundled model. Killed, the same command goes on.
#
#   bash benchmarks/ablations.sh REFERENCE [PROMPTS] [FOLDER] [NAME...]
#
# REFERENCE is a folder of true pictures, or their features (docs/evaluation.md). Ablations share the unaccelerated
# pictures of FOLDER, and with benchmarks/quality.py those of its --work. Writes benchmarks/results/ablation-NAME.json.
set -euo pipefail
cd "$(dirname "$0")/.."
reference=${1:?folder of true pictures, or their features}
prompts=${2:-64}
folder=${3:-work/quality/pictures}
names=("${@:4}")
[ ${#names[@]} -gt 0 ] || names=(noise alignment score choice base recovery patch where levels steps)
bin=${BIN:-.venv/bin}

for name in "${names[@]}"; do
    "$bin/regrow" eval --model emoji --ablation "$name" --prompts "$prompts" --dtype bfloat16 --device cpu --engine ray \
        --workers 2 --reference "$reference" --out "$folder"
    cp "$folder/result.json" "benchmarks/results/ablation-$name.json"
done
