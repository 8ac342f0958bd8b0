"""Writes the ONNX files that benchmarks/gpu_benchmark.sh measures: ResNet50, 1000 classes, 224 px, random weights.

    python benchmarks/gpu_models.py FOLDER

Speed does not depend on the weights. Written are the Q/DQ network with each type of input, the same with ranges by
another calibrator (as post-training quantization leaves it), the float network, and for benchmarks/gpu_trials.py the
network with zero channels in layer1.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from export_and_build import write_checkpoint

from export.convert import export_checkpoint
from export.onnx import ExportOptions


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, calibrator in (("resnet50", "max"), ("resnet50_ptq", "percentile")):
        write_checkpoint(folder / f"{name}.qat", calibrator)
        export_checkpoint(ExportOptions(checkpoint=folder / f"{name}.qat"))
    checkpoint = folder / "resnet50.qat"
    export_checkpoint(ExportOptions(checkpoint=checkpoint, precision="float32"))
    for kind in ("uint8-nchw", "int8-nchw"):
        output = folder / f"resnet50_{kind}.onnx"
        export_checkpoint(ExportOptions(checkpoint=checkpoint, input=kind, output=output))
    onnx.save(padded(onnx.load(folder / "resnet50.onnx")), folder / "resnet50_padded.onnx")


def padded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with the 64 channels before each last convolution of layer1 padded to 128 by zeros."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def pad(name: str, axis: int, value: float = 0) -> None:
        array = onnx.numpy_helper.to_array(tensors[name])
        more = np.concatenate([array, np.full_like(array, value)], axis)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(more, name))

    for block in ("layer1.0", "layer1.1", "layer1.2"):
        pad(f"{block}.conv2.weight", 0)
        pad(f"{block}.conv2.weight_quantizer.scale", 0, 1)
        pad(f"{block}.conv2.weight_quantizer.zero_point", 0)
        pad(f"{block}.conv2.bias", 0)
        pad(f"{block}.conv3.weight", 1)
    del model.graph.value_info[:]
    return model


if __name__ == "__main__":
    main()
