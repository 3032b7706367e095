#!/bin/bash
# What needs a CUDA GPU, a stage at a time, each within ten minutes. A stage that was stopped goes on when it
# is called again (exit status 124: it has more to do).
#
#   npm pack @iconify-json/noto@1.2.9
#   bash benchmarks/gpu.sh train iconify-json-noto-1.2.9.tgz     # about three times
#   bash benchmarks/gpu.sh check iconify-json-noto-1.2.9.tgz
#   bash benchmarks/gpu.sh quality iconify-json-noto-1.2.9.tgz   # 5,000 pictures a method; several times
#   bash benchmarks/gpu.sh speed                                 # SD 1.5 and SDXL, random weights, all peers
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?train, check, quality or speed}
data=${2:-}
work=work/gpu results=benchmarks/results
mkdir -p "$work" "$results"

case $stage in
train)
    timeout 570 python tools/train_scenes.py --data "${data:?tarball}" --device cuda --out "$work/scenes" \
        --vae-minutes 4 --decoder-minutes 1 --minutes 21 --export "$work/model"
    ;;
check)
    timeout 570 python tools/check_scenes.py --data "${data:?tarball}" --model "$work/model" --device cuda \
        --batch 128 --json "$results/scenes-bar-gpu.json"
    ;;
quality)
    if [ ! -e "$work/reference/captions.txt" ]; then
        python tools/compose_scenes.py --data "${data:?tarball}" --model "$work/model" --count 5000 \
            --out "$work/reference"
    fi
    timeout 570 python benchmarks/quality.py --model "$work/model" --device cuda --dtype bfloat16 --batch 250 \
        --prompts "$work/reference/captions.txt" --reference "$work/reference" --work "$work/quality" \
        --images 16 --out "$results/quality-scenes-gpu"
    ;;
speed)
    for arch in sd15 sdxl; do
        for compiled in "" --compile; do
            out="$results/peers-$arch-bfloat16-gpu${compiled:+-compiled}.json"
            # The file is there once a table is done.
            [ -e "$out" ] || timeout 570 python benchmarks/peers_table.py --arch "$arch" --device cuda \
                --dtype bfloat16 --images 1 --rounds 3 --json "$out" $compiled
        done
    done
    ;;
*)
    echo "stage: $stage is not known; there are train, check, quality and speed" >&2
    exit 2
    ;;
esac
