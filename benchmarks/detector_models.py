"""Writes detectors and segmenters as ONNX files, whose speed benchmarks/gpu_placement.py compares.

    PYTHONPATH=.:tests python -m benchmarks.detector_models FOLDER NAME ...
    PYTHONPATH=.:tests python -m benchmarks.detector_models FOLDER NAME ... --ultralytics-qat

NAME is ultralytics/yolo11n.yaml or any other model that qat.calibrate takes. FOLDER/NAME/{ours,float32}.onnx hold the
outputs of the heads, before they are decoded; weights at random, calibrated on random images. With --ultralytics-qat
FOLDER/NAME/ultralytics_qat.onnx is what Ultralytics' own quantization-aware training starts from: its layers, its
export, through nvidia-modelopt 0.47 and huggingface_hub, which that needs (an environment of its own).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.models import ModelSpec, build_model

CLASSES, IMAGES = 80, 2
PIXELS = {"retinanet_resnet50_fpn": 512, "fcos_resnet50_fpn": 512, "ssdlite320_mobilenet_v3_large": 320}
_YOLO = 640
_LAST_OPSET = 17  # that TensorRT 8.6 takes


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode, with the batch statistics of random images, and such images, [N, 3, S, S]."""
    torch.manual_seed(0)
    model = build_model(ModelSpec(name, CLASSES))
    x = torch.randn(IMAGES, 3, *2 * (PIXELS.get(name, _YOLO if "/" in name else 224),))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # the plain mean over what is seen
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x


def ultralytics_qat(model: nn.Module, x: Tensor, folder: Path) -> None:
    """Writes what Ultralytics quantizes of ``model``, batch normalizations folded as its export does."""
    from ultralytics.utils.torch_utils import prepare_qat

    prepared = prepare_qat(model, [x], lambda batch: batch, 1).eval().fuse(verbose=False)
    outputs = list(prepared(x))
    axes = {name: {0: "batch"} for name in ("input", *outputs)}
    torch.onnx.export(
        prepared,
        (x,),
        folder / "ultralytics_qat.onnx",
        dynamo=False,
        opset_version=_LAST_OPSET,
        input_names=["input"],
        output_names=outputs,
        dynamic_axes=axes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--ultralytics-qat", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.names:
        folder = options.folder / name.replace("/", "_").removesuffix(".yaml")
        folder.mkdir(parents=True, exist_ok=True)
        if options.ultralytics_qat:
            ultralytics_qat(*network(name), folder)
        else:
            from benchmarks.placement_models import write

            write(*network(name), folder)


if __name__ == "__main__":
    main()
