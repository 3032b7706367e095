#!/bin/bash
# What needs a CUDA GPU, a stage at a time, each within ten minutes. A stage that was stopped goes on when it
# is called again (exit status 124: it has more to do).
#
#   npm pack @iconify-json/noto@1.2.9
#   bash benchmarks/gpu.sh train iconify-json-noto-1.2.9.tgz     # about three times
#   bash benchmarks/gpu.sh check iconify-json-noto-1.2.9.tgz
#   bash benchmarks/gpu.sh quality iconify-json-noto-1.2.9.tgz   # 5,000 pictures a method; several times
#   bash benchmarks/gpu.sh speed                                 # SD 1.5 and SDXL, random weights, all peers
#   bash benchmarks/gpu.sh speed-transformers                    # SD3 and PixArt-Sigma at 1024; several times
#
# The same for the model of small photographs, with CIFAR-10 as published:
#
#   bash benchmarks/gpu.sh cifar-train cifar-10-binary.tar.gz    # about three times
#   bash benchmarks/gpu.sh cifar-check cifar-10-binary.tar.gz    # killed, it goes on
#   bash benchmarks/gpu.sh cifar-quality cifar-10-binary.tar.gz  # 10,000 pictures a method; several times
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?train, check, quality, speed, speed-transformers, cifar-train, cifar-check or cifar-quality}
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
                --dtype bfloat16 --images 1 --rounds 3 --json "$out" $compiled \
                --methods steps:50,steps:25,tome:0.5,deepcache:3,sito:d,dato:b1,dato:fast
        done
    done
    ;;
speed-transformers)
    for steps in 28 50; do
        for arch in sd3-1024 pixart-sigma-1024; do
            for compiled in "" --compile; do
                out="$results/peers-$arch-$steps-bfloat16-gpu${compiled:+-compiled}.json"
                [ -e "$out" ] || timeout 570 python benchmarks/peers_table.py --arch "$arch" --device cuda \
                    --dtype bfloat16 --images 1 --rounds 3 --steps "$steps" --json "$out" $compiled \
                    --methods "steps:$steps,cat:0.5,cat:0.3,cat:0.3+deepcache:2:branch=11,fora:3,toca:3,deepcache:3" \
                    --peers cache-dit,firstblock,pab,taylorseer
            done
        done
    done
    ;;
cifar-train)
    timeout 570 python tools/train_cifar.py --data "${data:?archive}" --device cuda --out "$work/cifar" \
        --batch 128 --minutes 26 --export "$work/cifar-model"
    ;;
cifar-check)
    timeout 570 python tools/check_cifar.py --data "${data:?archive}" --model "$work/cifar-model" --device cuda \
        --batch 500 --images 10000 --json "$results/cifar-bar-gpu.json" --work "$work/cifar-check" \
        --settings 50:2 20:2 10:2 50:1 20:1 10:1 250:2 250:1 --sheet "$work/cifar-model/contact.png"
    ;;
cifar-quality)
    if [ ! -e "$work/cifar-test/captions.txt" ]; then
        python tools/cifar.py --data "${data:?archive}" --count 10000 --out "$work/cifar-test"
    fi
    timeout 570 python benchmarks/quality.py --model "$work/cifar-model" --methods transformer --device cuda \
        --dtype bfloat16 --batch 500 --prompts "$work/cifar-test/captions.txt" --reference "$work/cifar-test" \
        --guidance 2 --work "$work/cifar-quality" --images 64 --out "$results/quality-cifar10-gpu"
    ;;
*)
    echo "stage: $stage is not known" >&2
    exit 2
    ;;
esac
