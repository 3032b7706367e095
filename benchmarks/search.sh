#!/bin/bash
# The search on the bundled model, beside what it has to beat. Killed, the same command goes on.
#
#   bash benchmarks/search.sh [FOLDER] [MINUTES] [STAGED] [ALL] [PAPER]
#
# One search with all savings, for so many minutes, and for as many generations as that had one by chance. For STAGED
# generations one in stages, for ALL one that measures every plan on all prompts, and for PAPER one with the paper's
# ratios, which prune in every call. All plans reuse, as the paper's do. Two Ray workers of one thread each get more done on two cores than one process with two
# threads. Writes FOLDER, benchmarks/results/search.json, benchmarks/results/search/ and docs/search-*.png.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work/search}
minutes=${2:-18}
staged=${3:-2} all=${4:-4} ratios=${5:-11}
bin=${BIN:-.venv/bin}
python=$bin/python
beside=$(printf 'deepcache:%d,' 2 3 4 5 6 7 8 9 10)$(printf 'deepcache:%d+tome:0.5,' 2 3 5 8)
beside+=dato:b1,dato:fast,steps:25,steps:16,steps:10,steps:5
paper=(--model emoji --method dato --steps 50 --prompts 16 --dtype bfloat16 --engine ray --workers 2)
paper+=(--choices recovery=reuse)
common=("${paper[@]}" --choices ratio=0,0.3,0.5,0.7)

"$bin/regrow" search "${common[@]}" --budget "${minutes}m" --beside "$beside" --out "$folder/nsga2"
count=$("$python" -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["history"]))' "$folder/nsga2/search.json")
"$bin/regrow" search "${common[@]}" --budget "$count" --algorithm random --no-plots --out "$folder/chance"
"$bin/regrow" search "${common[@]}" --budget "$staged" --algorithm staged --no-plots --out "$folder/staged"
"$bin/regrow" search "${common[@]}" --budget "$all" --rungs 16 --patience 0 --no-plots --out "$folder/every-plan-on-all"
"$bin/regrow" search "${paper[@]}" --choices ratio=0.3,0.4,0.5,0.6,0.7 --budget "$ratios" --no-plots --out "$folder/paper-ratios"
"$python" benchmarks/search_table.py "$folder/nsga2" --plot "$folder" --json benchmarks/results/search.json \
    --against "$folder/chance" "$folder/staged" "$folder/every-plan-on-all" "$folder/paper-ratios"
for name in nsga2 chance staged every-plan-on-all paper-ratios; do
    mkdir -p "benchmarks/results/search/$name"
    cp "$folder/$name/search.json" "benchmarks/results/search/$name"
done
cp -r "$folder/nsga2/"{evaluations.jsonl,settings.json,front} benchmarks/results/search/nsga2
cp "$folder/compare.png" docs/search-compare.png
cp "$folder/nsga2/front.png" docs/search-front.png
cp "$folder/nsga2/plans.png" docs/search-plans.png
