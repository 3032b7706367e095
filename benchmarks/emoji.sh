#!/bin/bash
# What is measured on the bundled text-to-image model, a stage at a time, on two CPU cores. Run a stage alone: all
# of it is timed or takes all cores. Writes into benchmarks/results/.
#
#   npm pack @iconify-json/noto@1.2.9
#   bash benchmarks/emoji.sh bench         # 8 minutes: speed and memory of a few methods, fp32
#   bash benchmarks/emoji.sh compiled      # 12 minutes: the same, its transformer blocks compiled (needs a C++ compiler)
#   bash benchmarks/emoji.sh eval          # 12 minutes with AMX: their quality on 64 captions, and how long that took
#   bash benchmarks/emoji.sh reference iconify-json-noto-1.2.9.tgz   # a minute: scenes that FD compares with, for all below
#   bash benchmarks/emoji.sh quality       # 9 hours with AMX: every method, its time, and its quality on 1,008 captions
#   bash benchmarks/emoji.sh peers         # 10 minutes: public peers, pip install 'regrow[peers]'
#   bash benchmarks/emoji.sh ablations     # an hour: the papers' ablations
#   bash benchmarks/emoji.sh trace         # 3 minutes: a look inside generations
#   bash benchmarks/emoji.sh check iconify-json-noto-1.2.9.tgz       # half an hour: the model itself, for its card
#
# Pictures that are killed go on when the stage is called again; times and traces begin anew. quality takes further
# options of benchmarks/quality.py: with --times R --also R --only steps:50,sito:d, where R is
# benchmarks/results/quality-emoji.json, it makes one variant and leaves the others as they are in R; told picture by
# picture from another (AGAINST in that file) only if that one is made too.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} results=benchmarks/results
few=steps:50,steps:25,sito:d,dato:b1,dato:fast,deepcache:5,tome:0.5
stages="bench, compiled, eval, reference, quality, peers, ablations, trace, check"

case ${1:?one of $stages} in
bench)
    "$bin/regrow" bench --model emoji --methods "$few" --images 4 --device cpu --out "$results/bench-emoji.json"
    ;;
compiled)
    "$bin/regrow" bench --model emoji --methods "$few" --images 4 --device cpu --compile \
        --out "$results/bench-emoji-compiled.json"
    ;;
eval)
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    begin=$SECONDS
    "$bin/regrow" eval --model emoji --methods "$few" --prompts 64 --device cpu --json --out "$folder" >"$folder/printed"
    seconds=$((SECONDS - begin))
    # Machine and settings are in the other file.
    printf '{"what": "regrow eval for eval-emoji.json, start to end", "minutes": %d.%02d}\n' \
        $((seconds / 60)) $((seconds % 60 * 100 / 60)) >"$results/eval-emoji-time.json"
    cp "$folder/printed" "$results/eval-emoji.json"
    ;;
reference)
    "$bin/python" tools/compose_scenes.py --data "${2:?tarball}" --model src/regrow/zoo/emoji --decoded \
        --count 1000 --out work/decoded
    ;;
quality)
    "$bin/python" benchmarks/quality.py --prompts 1008 --reference work/decoded --work work/quality --dtype bfloat16 \
        --device cpu --engine ray --workers 2 --images 2 --out "$results/quality-emoji" "${@:2}"
    ;;
peers)
    "$bin/python" benchmarks/peers_table.py --model emoji --images 2 --dtype bfloat16 --device cpu --quality work/peers --prompts 32 \
        --methods steps:50,steps:25,tome:0.5,deepcache:3,deepcache:5,dato:b1 --reference work/decoded \
        --json "$results/peers-emoji.json"
    ;;
ablations)
    features=work/quality/reference.safetensors
    bash benchmarks/ablations.sh "$([ -e "$features" ] && echo "$features" || echo work/decoded)"
    ;;
trace)
    "$bin/regrow" trace --model emoji --prompts 4 --device cpu --out "$results/trace-emoji" \
        --methods steps:50,steps:25,sito:d,dato:b1,dato:emoji-fast,deepcache:5
    ;;
check)
    "$bin/python" tools/check_scenes.py --data "${2:?tarball}" --model src/regrow/zoo/emoji --steps 20 --guidance 3 --bf16 \
        --json "$results/scenes-bar.json"
    "$bin/regrow" eval --model emoji --methods steps:50,steps:25,steps:16,steps:10,steps:5 --prompts 64 --dtype bfloat16 \
        --device cpu --reference work/decoded --out work/scenes-steps
    cp work/scenes-steps/result.json "$results/scenes-steps.json"
    ;;
*)
    echo "stage: $1 is not allowed, it must be one of $stages" >&2
    exit 2
    ;;
esac
