#!/bin/sh
# Trains the predictor of the bundled model cifar10 on pictures that it makes itself: one thread of a CPU,
# about 10 minutes where nothing else runs. It goes on where it was stopped. Run it from the repository.
# The rate is for a model of 6 blocks; at the paper's lambda it would compute everything. Then trains, some 7 minutes,
# what else benchmarks/tokencache.py compares.
set -eu
out=${1:-work/predictor}
mkdir -p "$out"
OMP_NUM_THREADS=1 python -m regrow train predictor --model cifar10 --device cpu --out "$out" \
    --pictures 64 --picture-steps 12 --batch 4 --steps 400 --every 50 \
    --last-blocks 1 --lr 1e-3 --lambda 0.03
cp "$out/predictor.safetensors" "$out/predictor.json" src/regrow/zoo/cifar10/

# What benchmarks/tokencache.py takes besides: Learning-to-Cache's routers, and updates of the last block.
learned=${2:-work/learned}
mkdir -p "$learned"
for steps in 250 50 20 10; do
    OMP_NUM_THREADS=1 python -m regrow train router --model cifar10 --device cpu --out "$out/router-$steps" \
        --sampler-steps "$steps" --pictures 64 --picture-steps 12 --batch 4 --steps 300 --every 100 \
        --lr 0.1 --lambda 5e-5
    for end in safetensors json; do
        cp "$out/router-$steps/router.$end" "$learned/router-$steps.$end"
    done
done
OMP_NUM_THREADS=1 python -m regrow train refine --model cifar10 --device cpu --out "$out/refined" --last-blocks 1 \
    --ratio 0.9 --pictures 64 --picture-steps 12 --batch 4 --steps 400 --every 100 --lr 1e-3
cp "$out/refined/lora.safetensors" "$out/refined/lora.json" "$learned/"
