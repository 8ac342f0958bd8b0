#!/usr/bin/env bash
# Speed of ResNet50 in INT8 on this machine's GPU, against its float engines and other tools' ONNX files, in one run.
#
#   PYTHON=python3 DEPLOY_PYTHON="env PYTHONHOME=... python3.10" benchmarks/gpu_benchmark.sh OUTPUT_FOLDER [NAME=PEER.onnx ...]
#
# PYTHON has torch and exports; DEPLOY_PYTHON has TensorRT. The tables are printed, raw results are in benchmark.json.
set -euo pipefail
out=$1 python=${PYTHON:-python3} deploy=${DEPLOY_PYTHON:-${PYTHON:-python3}}
shift
[[ -f $out/resnet50_int8-nchw.onnx ]] || PYTHONPATH=.:benchmarks:${PYTHONPATH:-} $python benchmarks/gpu_models.py "$out"
$deploy -m deploy.benchmark "$out/resnet50.onnx" --ptq "$out/resnet50_ptq.onnx" --full-batches 32 --batches 128 1 --pad-channels \
    --peers "$@" --inputs "uint8 input=$out/resnet50_uint8-nchw.onnx" "INT8 input=$out/resnet50_int8-nchw.onnx" \
    --host-to-host 128 --contexts 2 3 --output "$out/benchmark.json"
# The most images a second: input that the host has quantized, the largest batch, several contexts.
$deploy -m deploy.benchmark "$out/resnet50_int8-nchw.onnx" --precisions --batches --full-batches --pad-channels \
    --sweep 2048 --contexts 1 2 3 --output "$out/throughput.json"
