#!/usr/bin/env bash
# The pipeline on a GPU machine with TensorRT: trains and exports with one Python; builds, audits and evaluates the engine
# with another, which has TensorRT and need not have torch.
#
#   PYTHON=python3 DEPLOY_PYTHON="env PYTHONHOME=... python3.10" benchmarks/gpu_pipeline.sh OUTPUT_FOLDER [qat.train options]
set -euo pipefail
out=$1 python=${PYTHON:-python3} deploy=${DEPLOY_PYTHON:-${PYTHON:-python3}}
shift
[[ $# -gt 0 ]] || set -- --data digits
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
$python -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
time $python -m qat.train --model resnet50 --output "$out/model.qat" --workers 0 "$@"
time $python -m export.onnx "$out/model.qat" --parity-images 10000
run() { echo "== deploy.$*"; $deploy -m "deploy.$@" && code=0 || code=$?; echo "exit code $code"; }
run build "$out/model.onnx" --timing-cache "$out/timing.cache"
run build "$out/model.onnx" --timing-cache "$out/timing.cache"
run evaluate "$out/model.engine" --json "$out/evaluation.json"
run build "$out/model.onnx" --profiles 32 --output "$out/fixed.engine"
run evaluate "$out/fixed.engine" --json "$out/evaluation_fixed.json"
run audit "$out/fixed.engine" --json "$out/audit.json"
run report "$out/model.engine" --evaluation "$out/evaluation.json"
