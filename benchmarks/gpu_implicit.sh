#!/usr/bin/env bash
# Float, implicit and explicit INT8 of one network, and our scales against TensorRT's, on a GPU machine.
# PYTHON has torch, DEPLOY_PYTHON has TensorRT (8.6 or 10) and Pillow, and need not have torch.
#
#   PYTHON=python3 DEPLOY_PYTHON="env PYTHONHOME=... python3.10" benchmarks/gpu_implicit.sh OUT IMAGES train|table|scales [MODEL]
#
# train: trains MODEL in float (benchmarks.accuracy), calibrates it, trains it quantized, exports all of it into OUT.
# table: benchmarks.gpu_implicit.    scales: benchmarks.tensorrt_scales.
set -euo pipefail
out=$1 images=$2 step=$3 model=${4:-resnet18}
python=${PYTHON:-python3} deploy=${DEPLOY_PYTHON:-${PYTHON:-python3}}
mkdir -p "$out"
options=(--model "$model" --data "$images" --image-size 128 --weights "$out/flowers-$model-0.safetensors")
case $step in
train)
  [[ -f $out/flowers-$model-0.safetensors ]] || $python -m benchmarks.accuracy float "flowers-$model" --data "$images" --seed 0 --folder "$out"
  $python -m qat.calibrate "${options[@]}" --output "$out/ptq.qat"
  $python -m qat.train "${options[@]}" --float-epochs 0 --qat-epochs 6 --qat-lr 1e-4 --batch-size 64 --output "$out/qat.qat"
  $python -m export.onnx "$out/ptq.qat" --parity-images 10000 --output "$out/ptq.onnx"
  $python -m export.onnx "$out/ptq.qat" --parity-images 10000 --precision float32 --output "$out/float.onnx"
  $python -m export.onnx "$out/qat.qat" --parity-images 10000 --output "$out/qat.onnx"
  $python -m export.onnx "$out/qat.qat" --parity-images 10000 --precision float32 --output "$out/qat.float32.onnx"
  ;;
table)
  $deploy -m benchmarks.gpu_implicit "$out" --data "$images" --output "$out/implicit.json"
  ;;
scales)
  $python -m benchmarks.tensorrt_scales inputs "$out/float.onnx" --data "$images" --inputs "$out/inputs.npy"
  $python -m benchmarks.tensorrt_scales ours "$out/float.onnx" --inputs "$out/inputs.npy" --output "$out/ours.json"
  $deploy -m benchmarks.tensorrt_scales theirs "$out/float.onnx" --inputs "$out/inputs.npy" --output "$out/theirs.json"
  $python -m benchmarks.tensorrt_scales compare "$out/ours.json" "$out/theirs.json"
  ;;
esac
