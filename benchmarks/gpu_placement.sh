#!/usr/bin/env bash
# benchmarks/gpu_placement.py for one network after another, shared among the GPUs of one machine.
#
#   DEPLOY_PYTHON="env PYTHONHOME=... python3.10" GPUS="0 1 2 3" benchmarks/gpu_placement.sh FOLDER OUTPUT NAME ...
#
# A GPU that is free takes the next network. Raw figures are in OUTPUT/NAME.jsonl, and all of them in
# OUTPUT/gpu_placement.jsonl; the table is printed. Builds take one to five minutes for each network.
set -euo pipefail
folder=$1 out=$2 python=${DEPLOY_PYTHON:-python3}
shift 2
mkdir -p "$out"
read -ra gpus <<<"${GPUS:-0}"
for gpu in "${gpus[@]}"; do
    for name in "$@"; do
        mkdir "$out/$name.taken" 2>/dev/null || continue
        CUDA_VISIBLE_DEVICES=$gpu $python -m benchmarks.gpu_placement "$folder" --models "$name" --runs 100 \
            --output "$out/$name.jsonl" >"$out/$name.log" 2>&1 || echo "$name failed: see $out/$name.log" >&2
    done &
done
wait
for name in "$@"; do cat "$out/$name.jsonl"; done >"$out/gpu_placement.jsonl"
$python -m benchmarks.gpu_placement --table "$out/gpu_placement.jsonl"
