#!/usr/bin/env bash
# The pipeline on a GPU machine with TensorRT: trains and exports with one Python, builds and audits with another, which
# has TensorRT and need not have torch.
#
#   PYTHON=python3 DEPLOY_PYTHON="env PYTHONHOME=... python3.10" benchmarks/gpu_pipeline.sh OUTPUT_FOLDER
set -euo pipefail
out=$1 python=${PYTHON:-python3} deploy=${DEPLOY_PYTHON:-${PYTHON:-python3}}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
$python -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
time $python -m qat.train --model resnet50 --data digits --output "$out/model.qat" --workers 0
time $python -m export.onnx "$out/model.qat"
time $deploy -m deploy.build "$out/model.onnx" && code=0 || code=$?
echo "deploy.build exit code $code"
$deploy -m deploy.report "$out/model.engine"
