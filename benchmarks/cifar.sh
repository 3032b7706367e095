#!/bin/bash
# What is measured on the bundled model of small photographs. Killed, the same command goes on.
#
#   bash benchmarks/cifar.sh "DATA..." [IMAGES] [PROMPTS]
#
# As it is on two CPU cores, two hours and a half; benchmarks/gpu.sh has all of it with 10,000 pictures.
# DATA is CIFAR-10 as published: cifar-10-binary.tar.gz, or its Parquet files. Writes into benchmarks/results/:
# quality-cifar10.{json,md,png} (methods of transformers), ablation-cat.json (CAT Pruning's choice of tokens),
# peers-cifar10.json and peers-cifar10-quality.json (public peers beside some of them, with pip install
# 'regrow[peers]'), trace-cifar10/ (deviation curves), cifar-bar.json and cifar-bar-10000.json (FD-EffNet and
# accuracy at several steps, with and without guidance). Run it alone: all of it is timed or takes all cores.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra data <<<"${1:?archive or Parquet files}"
images=${2:-256} prompts=${3:-96}
bin=${BIN:-.venv/bin} work=work/cifar10 results=benchmarks/results
mkdir -p "$work"

if [ ! -e "$work/test/captions.txt" ]; then
    "$bin/python" tools/cifar.py --data "${data[@]}" --count 1000 --out "$work/test"
fi
"$bin/python" benchmarks/quality.py --model cifar10 --methods transformer --prompts "$prompts" \
    --reference "$work/test" --dtype bfloat16 --engine ray --workers 2 --images 8 --work "$work/quality" \
    --out "$results/quality-cifar10"
"$bin/regrow" eval --model cifar10 --ablation cat --prompts "$prompts" --dtype bfloat16 --engine ray --workers 2 \
    --reference "$work/quality/reference.safetensors" --out "$work/quality/pictures"
cp "$work/quality/pictures/result.json" "$results/ablation-cat.json"
"$bin/python" benchmarks/peers_table.py --model cifar10 --dtype bfloat16 --images 8 \
    --methods steps:50,steps:25,deepcache:2,deepcache:3,fora:2,toca:2,cat:0.5 --quality "$work/peers" \
    --prompts "$prompts" --reference "$work/quality/reference.safetensors" --json "$results/peers-cifar10.json"
"$bin/regrow" trace --model cifar10 --prompts 10 --out "$results/trace-cifar10" --methods \
    steps:50,steps:25,steps:16,fora:3,deepcache:3,toca:3,cat:0.3,cat:0.3+deepcache:2,atedm:reuse:ratio=0.5
"$bin/python" tools/check_cifar.py --data "${data[@]}" --model src/regrow/zoo/cifar10 --bf16 --images "$images" \
    --settings 50:2 20:2 10:2 250:2 50:1 20:1 10:1 250:1 --json "$results/cifar-bar.json" --work "$work/check" \
    --sheet src/regrow/zoo/cifar10/contact.png
"$bin/python" tools/check_cifar.py --data "${data[@]}" --model src/regrow/zoo/cifar10 --bf16 --images 10000 \
    --settings 20:2 10:2 20:1 10:1 --json "$results/cifar-bar-10000.json" --work "$work/check"
