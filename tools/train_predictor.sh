#!/bin/sh
# Trains the predictor of the bundled model cifar10 on pictures that it makes itself: one thread of a CPU,
# about 10 minutes where nothing else runs. It goes on where it was stopped. Run it from the repository.
# The rate is for a model of 6 blocks; at the paper's lambda it would compute everything.
set -eu
out=${1:-work/predictor}
mkdir -p "$out"
OMP_NUM_THREADS=1 python -m regrow train predictor --model cifar10 --device cpu --out "$out" \
    --pictures 64 --picture-steps 12 --batch 4 --steps 400 --every 50 \
    --last-blocks 1 --lr 1e-3 --lambda 0.03
cp "$out/predictor.safetensors" "$out/predictor.json" src/regrow/zoo/cifar10/
