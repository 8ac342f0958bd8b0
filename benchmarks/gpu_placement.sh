#!/usr/bin/env bash
# benchmarks/gpu_placement.py for several networks, shared among the GPUs of one machine.
#
#   DEPLOY_PYTHON="env PYTHONHOME=... python3.10" GPUS="0 1 2 3" benchmarks/gpu_placement.sh FOLDER OUTPUT NAME ...
#
# The GPUs share all builds, one to ten minutes for each engine (name the networks that take longest first). Then each
# measures some of the networks. All lines are in OUTPUT/gpu_placement.jsonl; the table is printed.
set -euo pipefail
folder=$1 out=$2 python=${DEPLOY_PYTHON:-python3}
shift 2
mkdir -p "$out"
read -ra gpus <<<"${GPUS:-0}"
each() { # runs it on all GPUs at the same time, with the GPU's index as the last argument
    for index in "${!gpus[@]}"; do
        CUDA_VISIBLE_DEVICES=${gpus[index]} "$@" "$index" >"$out/gpu$index.$1.log" 2>&1 &
    done
    wait
}
names=("$@")
builds() { $python -m benchmarks.gpu_placement "$folder" --output "$out" --models "${names[@]}" --build-only; }
measures() {
    for ((i = $1; i < ${#names[@]}; i += ${#gpus[@]})); do
        $python -m benchmarks.gpu_placement "$folder" --output "$out" --models "${names[i]}" ||
            echo "${names[i]}: failed"
    done
}
rm -f "$out"/*/placement.jsonl
each builds
each measures
cat "$out"/*/placement.jsonl >"$out/gpu_placement.jsonl"
$python -m benchmarks.gpu_placement --table "$out/gpu_placement.jsonl"
if grep -h ": failed$" "$out"/gpu*.log; then exit 1; fi
