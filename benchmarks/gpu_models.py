"""Writes the ONNX files that benchmarks/gpu_benchmark.sh measures: ResNet50, 1000 classes, 224 px, random weights.

    python benchmarks/gpu_models.py FOLDER

Speed does not depend on the weights. Written are the Q/DQ network with each type of input, for float and INT8 input
with zero channels and with merged shortcuts too, the same with ranges by another calibrator (as post-training
quantization leaves it), and the float network.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from export_and_build import write_checkpoint

from export import export_onnx


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, calibrator in (("resnet50", "max"), ("resnet50_ptq", "percentile")):
        write_checkpoint(folder / f"{name}.qat", calibrator)
        export_onnx(folder / f"{name}.qat")
    checkpoint = folder / "resnet50.qat"
    padded: dict[str, Any] = {"pad_channels": True}
    merged = padded | {"merge_shortcuts": True}
    more: tuple[tuple[str, dict[str, Any]], ...] = (
        ("resnet50.float32", {"precision": "float32"}),
        ("resnet50.padded", padded),
        ("resnet50.merged-padded", merged),
        ("resnet50_uint8-nchw", {"input": "uint8-nchw"}),
        ("resnet50_int8-nchw", {"input": "int8-nchw"}),
        ("resnet50_int8-nchw.padded", {"input": "int8-nchw"} | padded),
        ("resnet50_int8-nchw.merged-padded", {"input": "int8-nchw"} | merged),
    )
    for name, options in more:
        export_onnx(checkpoint, folder / f"{name}.onnx", **options)


if __name__ == "__main__":
    main()
