"""The values that options choose from, each list written down once. No torch is imported here."""

from __future__ import annotations

from typing import Literal

Calibrator = Literal["max", "percentile", "mse", "entropy"]
"""How the range of an activation is chosen (qat/calibration/thresholds.py)."""

WeightCalibrator = Literal["max", "mse"]
"""How the range of a weight is chosen: it follows the largest magnitude, or is fixed at the least squared error."""

Schedule = Literal["one-cycle", "cosine"]
"""How the learning rate moves over a phase (qat/training/schedule.py)."""

Amp = Literal["auto", "float32", "bfloat16", "float16"]
"""The type that convolutions and matrix products of training compute in."""

InputKind = Literal["float32-nchw", "uint8-nhwc", "uint8-nchw", "int8-nchw"]
"""What an exported network takes: normalized images, raw RGB bytes, or images that the caller has quantized."""

ExportPrecision = Literal["int8", "float32", "float16"]
"""With its quantizers, or without any as the baseline that INT8 is compared with."""

WeightStorage = Literal["int8", "float"]
"""INT8 codes in the ONNX file, or the same codes as float weights in front of a QuantizeLinear."""

BuilderName = Literal["tensorrt", "tensorrt-rtx"]
"""TensorRT, which needs a GPU, or TensorRT-RTX, which builds ahead of time."""

EnginePrecision = Literal["explicit", "fp32", "tf32", "fp16", "implicit"]
"""``explicit``: INT8 where the Q/DQ nodes say so. The others build a float network, for comparison: in FP32, with TF32
tensor cores, in FP16, or in ``implicit`` INT8, where the builder is free to take INT8 or FP16 anywhere."""
