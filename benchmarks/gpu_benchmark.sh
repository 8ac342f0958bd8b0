#!/usr/bin/env bash
# Speed of ResNet50 in INT8 on this machine's GPU, against its float engines and other tools' ONNX files, in one run.
#
#   PYTHON=python3 DEPLOY_PYTHON="env PYTHONHOME=... python3.10" REPEAT=2 GPUS="0 1 2 3" \
#       benchmarks/gpu_benchmark.sh OUTPUT_FOLDER [NAME=PEER.onnx ...]
#
# PYTHON has torch and exports; DEPLOY_PYTHON has TensorRT. The tables are printed, raw results are in benchmark.json.
# Every engine is built REPEAT times (2) and the fastest is kept. Nearly all of the time goes into builds, which several
# GPUS of one kind share; the first of them (0) measures everything. With REPEAT=1 the builds of one GPU share their timings
# of kernels: on two GPUs those of gpu_benchmark.txt took 10 minutes. With REPEAT=2 each build times all kernels anew: on two
# GPUs the run was not through after 15 minutes.
set -euo pipefail
out=$1 python=${PYTHON:-python3} deploy=${DEPLOY_PYTHON:-${PYTHON:-python3}}
shift
peers=("$@")
read -ra gpus <<<"${GPUS:-0}"
[[ -f $out/resnet50_int8-nchw.merged-padded.onnx ]] || PYTHONPATH=.:benchmarks:${PYTHONPATH:-} $python benchmarks/gpu_models.py "$out"

compare() {
    $deploy -m deploy.benchmark "$out/resnet50.onnx" --ptq "$out/resnet50_ptq.onnx" \
        --variants "zero channels=$out/resnet50.padded.onnx" "all merged, zero channels=$out/resnet50.merged-padded.onnx" \
        --peers "${peers[@]}" --inputs "uint8 input=$out/resnet50_uint8-nchw.onnx" "INT8 input=$out/resnet50_int8-nchw.onnx" \
        --full-batches 32 --batches 128 1 --host-to-host 128 --contexts 2 3 \
        --repeat "${REPEAT:-2}" --output "$out/benchmark.json" "$@"
}
# The most images a second: input that the host has quantized, the largest batch, several contexts.
most_images() {
    $deploy -m deploy.benchmark "$out/resnet50_int8-nchw.onnx" --variants "zero channels=$out/resnet50_int8-nchw.padded.onnx" \
        "all merged, zero channels=$out/resnet50_int8-nchw.merged-padded.onnx" \
        --precisions --batches --full-batches --sweep 2048 --contexts 1 2 3 \
        --repeat "${REPEAT:-2}" --output "$out/throughput.json" "$@"
}

if ((${#gpus[@]} > 1)); then # what the GPUs build here, the two commands at the end find
    for gpu in "${gpus[@]}"; do
        (
            export CUDA_VISIBLE_DEVICES=$gpu
            compare --build-only && most_images --build-only
        ) >"$out/gpu$gpu.log" 2>&1 &
    done
    wait
fi
export CUDA_VISIBLE_DEVICES=${gpus[0]}
compare
most_images
