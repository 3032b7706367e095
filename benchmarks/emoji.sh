#!/bin/bash
# What is measured on the bundled text-to-image model, a stage at a time, on two CPU cores. Run a stage alone: all
# of it is timed or takes all cores. Writes into benchmarks/results/.
#
#   npm pack @iconify-json/noto@1.2.9
#   bash benchmarks/emoji.sh bench         # 8 minutes: speed and memory of a few methods, fp32
#   bash benchmarks/emoji.sh compiled      # the same, its transformer blocks compiled (needs a C++ compiler)
#   bash benchmarks/emoji.sh eval          # 12 to 18 minutes: their quality on 64 captions, and how long that took
#   bash benchmarks/emoji.sh reference iconify-json-noto-1.2.9.tgz   # a minute: scenes that FD compares with, for all below
#   bash benchmarks/emoji.sh quality       # 75 minutes: every method, its time, and its quality on 32 captions
#   bash benchmarks/emoji.sh quality-1008  # 10 hours more: the same on 1,008 captions
#   bash benchmarks/emoji.sh peers         # 15 minutes: public peers, pip install 'regrow[peers]'
#   bash benchmarks/emoji.sh ablations     # an hour: the papers' ablations
#   bash benchmarks/emoji.sh trace         # 3 minutes: a look inside generations
#
# Stages from quality on can be killed, and go on when called again; times begin anew.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} results=benchmarks/results
few=steps:50,steps:25,sito:d,dato:b1,dato:fast,deepcache:5,tome:0.5
stages="bench, compiled, eval, reference, quality, quality-1008, peers, ablations, trace"

quality() {
    "$bin/python" benchmarks/quality.py --prompts "$1" --reference work/decoded --work work/quality --dtype bfloat16 \
        --engine ray --workers 2 --images 2 "${@:2}"
}

case ${1:?one of $stages} in
bench)
    "$bin/regrow" bench --model emoji --methods "$few" --images 4 --json >"$results/bench-emoji.json"
    ;;
compiled)
    "$bin/regrow" bench --model emoji --methods "$few" --images 4 --compile --json >"$results/bench-emoji-compiled.json"
    ;;
eval)
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    begin=$SECONDS
    "$bin/regrow" eval --model emoji --methods "$few" --prompts 64 --json --out "$folder" >"$results/eval-emoji.json"
    "$bin/python" - $((SECONDS - begin)) "$few" >"$results/eval-emoji-time.json" <<'PYTHON'
import json, sys
from regrow.measure.machine import machine
said = {"what": "regrow eval, start to end", "prompts": 64, "methods": sys.argv[2]}
print(json.dumps(said | {"minutes": round(int(sys.argv[1]) / 60, 2), "machine": machine("cpu")}, indent=1))
PYTHON
    ;;
reference)
    "$bin/python" tools/compose_scenes.py --data "${2:?tarball}" --model src/regrow/zoo/emoji --decoded \
        --count 1000 --out work/decoded
    ;;
quality)
    quality 32
    ;;
quality-1008)
    quality 1008 --times "$results/quality-emoji.json" --out "$results/quality-emoji-1008" "${@:2}"
    ;;
peers)
    "$bin/python" benchmarks/peers_table.py --model emoji --images 2 --dtype bfloat16 --quality work/peers --prompts 32 \
        --methods steps:50,steps:25,tome:0.5,deepcache:3,deepcache:5,dato:b1 --reference work/decoded \
        --json "$results/peers-emoji.json"
    ;;
ablations)
    bash benchmarks/ablations.sh work/decoded
    ;;
trace)
    "$bin/regrow" trace --model emoji --prompts 4 --out "$results/trace-emoji" \
        --methods steps:50,steps:25,sito:d,dato:b1,dato:emoji-fast,deepcache:5
    ;;
*)
    echo "stage: $1 is not allowed, it must be one of $stages" >&2
    exit 2
    ;;
esac
