#!/bin/bash
# Calibrated plans beside the public peers and fewer steps, on the same pictures, all in one run; with
# pip install 'regrow[peers]'. On two CPU cores some 10 minutes a model with four plans. Run it alone: it is timed.
#
#   bash benchmarks/plans_beside_peers.sh cifar10 PLANS
#   bash benchmarks/plans_beside_peers.sh emoji PLANS
#
# PLANS are names of calibrated plans, or files of regrow calibrate, separated by commas. The pictures have
# seeds, and where there are enough captions also captions, that regrow calibrate does not use. Writes
# benchmarks/results/plans-beside-peers-MODEL.{json,md} and -quality.json; killed, it keeps the pictures.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?cifar10 or emoji} plans=${2:?names or files of calibrated plans, separated by commas}
bin=${BIN:-.venv/bin} work=work/plans-beside-peers-$model
fewer=steps:50,steps:25,steps:16,steps:12

case $model in
cifar10)
    fewer=$fewer,steps:10
    options=(--images 4 --rounds 3 --prompts 16 --peers
        cache-dit:0.08,cache-dit:0.24,cache-dit-taylorseer:0.08,cache-dit-taylorseer:0.24,cache-dit-foca:0.24,cache-dit-dmd:0.24,taylorseer:5,seacache:0.25,magcache:0.06,magcache:0.12,pab:2)
    ;;
emoji)
    mkdir -p "$work"
    "$bin/python" -c "from regrow import zoo; print(*zoo.captions('emoji')[16:24], sep='\n')" >"$work/captions.txt"
    options=(--images 1 --rounds 2 --prompts "$work/captions.txt" --peers DeepCache:3,DeepCache:5,pab:2)
    ;;
*)
    echo "$model is not allowed, it must be cifar10 or emoji" >&2
    exit 2
    ;;
esac
"$bin/python" benchmarks/peers_table.py --model "$model" --device cpu --methods "$fewer,$plans" "${options[@]}" \
    --seed 10000 --batch 8 --quality "$work" --json "benchmarks/results/plans-beside-peers-$model.json"
