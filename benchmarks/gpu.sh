#!/bin/bash
# What needs a CUDA GPU, a stage at a time, each within ten minutes. Training and pictures that were stopped (exit
# status 124) go on when the stage is called again; checks, scenes and times begin anew.
#
#   npm pack @iconify-json/noto@1.2.9
#   bash benchmarks/gpu.sh check iconify-json-noto-1.2.9.tgz       # the bars of the bundled model's card
#   bash benchmarks/gpu.sh reference iconify-json-noto-1.2.9.tgz   # 5,000 composed scenes
#   bash benchmarks/gpu.sh quality                                 # 5,000 pictures a method; several times
#   bash benchmarks/gpu.sh speed sd15                              # beside all peers, random weights
#   bash benchmarks/gpu.sh speed sdxl
#   bash benchmarks/gpu.sh speed-transformers sd3-1024 28          # beside the peers that run there
#   bash benchmarks/gpu.sh speed-transformers pixart-sigma-1024 28 # and with 50 steps
#
# Tables of speed take --compile as last argument. If ten minutes are too few for times, those of quality included,
# ROUNDS=1 before the command takes fewer than 3 rounds.
# If check finds a bar that is not met, train the model further, and give the result to the stages above:
#
#   bash benchmarks/gpu.sh train iconify-json-noto-1.2.9.tgz       # about three times
#   MODEL=work/gpu/trained bash benchmarks/gpu.sh check iconify-json-noto-1.2.9.tgz
#
# The same for the model of small photographs, with CIFAR-10 as published:
#
#   bash benchmarks/gpu.sh cifar-train cifar-10-binary.tar.gz      # about three times
#   bash benchmarks/gpu.sh cifar-check cifar-10-binary.tar.gz
#   bash benchmarks/gpu.sh cifar-reference cifar-10-binary.tar.gz  # 10,000 photographs
#   bash benchmarks/gpu.sh cifar-quality                           # 10,000 pictures a method; several times
set -euo pipefail
cd "$(dirname "$0")/.."
stages="check, reference, quality, speed, speed-transformers, train, cifar-train, cifar-check, cifar-reference, cifar-quality"
stage=${1:?one of $stages}
work=work/gpu results=benchmarks/results
model=${MODEL:-src/regrow/zoo/emoji} rounds=${ROUNDS:-3}
name=$(basename "$model")
mkdir -p "$work/$name" "$results"

# A table of speed: architecture, steps, "--compile" or "", and further arguments.
table() {
    timeout 570 python benchmarks/peers_table.py --arch "$1" --device cuda --dtype bfloat16 --images 1 \
        --rounds "$rounds" --steps "$2" --json "$results/peers-$1-$2-bfloat16-gpu${3:+-compiled}.json" $3 "${@:4}"
}

case $stage in
check)
    timeout 570 python tools/check_scenes.py --data "${2:?tarball}" --model "$model" --device cuda \
        --batch 128 --steps 20 --guidance 3 --bf16 --json "$results/$name-bar-gpu.json"
    ;;
train)
    timeout 570 python tools/train_scenes.py --data "${2:?tarball}" --device cuda --start src/regrow/zoo/emoji \
        --objects 10 --lr 0.0007 --out "$work/training" --minutes 24 --export "$work/trained"
    ;;
reference)
    timeout 570 python tools/compose_scenes.py --data "${2:?tarball}" --model "$model" --decoded \
        --count 5000 --out "$work/$name/reference"
    ;;
quality)
    timeout 570 python benchmarks/quality.py --model "$model" --device cuda --dtype bfloat16 --batch 250 \
        --prompts "$work/$name/reference/captions.txt" --reference "$work/$name/reference" --guidance 3 \
        --work "$work/$name/quality" --images 16 --rounds "$rounds" --out "$results/quality-$name-gpu"
    ;;
speed)
    table "${2:?sd15 or sdxl}" 50 "${3:-}" \
        --methods steps:50,steps:25,tome:0.5,deepcache:3,deepcache:3+tome:0.5,sito:d,dato:b1,dato:fast
    ;;
speed-transformers)
    table "${2:?sd3-1024 or pixart-sigma-1024}" "${3:?28 or 50 steps}" "${4:-}" \
        --methods "steps:$3,cat:0.5,cat:0.3,cat:0.3+deepcache:2:branch=11,fora:3,toca:3,deepcache:3" \
        --peers cache-dit,firstblock,pab,taylorseer
    ;;
cifar-train)
    timeout 570 python tools/train_cifar.py --data "${2:?archive}" --device cuda --out "$work/cifar" \
        --batch 128 --minutes 26 --export "$work/cifar-model"
    ;;
cifar-check)
    timeout 570 python tools/check_cifar.py --data "${2:?archive}" --model "$work/cifar-model" --device cuda \
        --batch 500 --images 10000 --json "$results/cifar-bar-gpu.json" --work "$work/cifar-check" \
        --settings 50:2 20:2 10:2 50:1 20:1 10:1 250:2 250:1 --sheet "$work/cifar-model/contact.png"
    ;;
cifar-reference)
    [ -e "$work/cifar-test/captions.txt" ] ||
        timeout 570 python tools/cifar.py --data "${2:?archive}" --count 10000 --out "$work/cifar-test"
    ;;
cifar-quality)
    timeout 570 python benchmarks/quality.py --model "$work/cifar-model" --methods transformer --device cuda \
        --dtype bfloat16 --batch 500 --prompts "$work/cifar-test/captions.txt" --reference "$work/cifar-test" \
        --guidance 2 --work "$work/cifar-quality" --images 64 --rounds "$rounds" --out "$results/quality-cifar10-gpu"
    ;;
*)
    echo "stage: $stage is not allowed, it must be one of $stages" >&2
    exit 2
    ;;
esac
