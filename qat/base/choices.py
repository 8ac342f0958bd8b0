"""The values that options choose from; each list is defined only here. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal

Calibrator = Literal["max", "percentile", "mse", "entropy"]
"""How the range of an activation is chosen (qat/calibration/thresholds.py)."""

WeightCalibrator = Literal["max", "mse"]
"""How the range of a weight is chosen. max: it follows the largest magnitude; mse: it is fixed at the least squared
error."""

Schedule = Literal["one-cycle", "cosine"]
"""How the learning rate changes over a phase (Recipe.lr_at in qat/training/recipe.py)."""

Amp = Literal["auto", "float32", "bfloat16", "float16"]
"""The type in which training computes convolutions and matrix products."""

InputKind = Literal["float32-nchw", "uint8-nhwc", "uint8-nchw", "int8-nchw"]
"""What an exported network takes: normalized images, raw RGB bytes, or images that the caller has quantized."""

ExportPrecision = Literal["int8", "float32", "float16"]
"""int8: the network with its quantizers; float32, float16: without any, as a baseline to compare INT8 with."""

FloatType = Literal["float32", "float16", "bfloat16"]
"""What computes in a file with INT8 layers where it is not INT8."""

WeightStorage = Literal["int8", "float"]
"""int8: the ONNX file holds INT8 codes; float: it holds float weights, each followed by a QuantizeLinear that yields
the same codes."""

BuilderName = Literal["tensorrt", "tensorrt-rtx"]
"""tensorrt needs a GPU to build; tensorrt-rtx builds ahead of time, without one."""

EnginePrecision = Literal["explicit", "fp32", "tf32", "fp16", "bf16", "int8"]
"""``explicit``: INT8 where the Q/DQ nodes ask for it. The others are for a float network: FP32, TF32 tensor cores,
FP16, BF16, or implicit INT8 (``int8``), where the builder chooses INT8 or FP16 for any layer by its tensors' ranges."""

ImplicitCalibrator = Literal["entropy2", "minmax", "entropy", "legacy"]
"""TensorRT's calibrators for implicit INT8: IInt8EntropyCalibrator2 and its three siblings."""

Constraints = Literal["obey", "prefer", "none"]
"""What the builder makes of the precisions asked for single layers: it fails, warns, or may ignore them."""
