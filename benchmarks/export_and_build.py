"""Size and time of the ONNX file and of the TensorRT-RTX engine of ResNet50, 1000 classes, 224 px.

    python benchmarks/export_and_build.py

Weights and images are random: size, structure and time do not depend on them; accuracy is measured by scripts/demo.
Everything goes through the library; the times are those that it records.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from stamp import stamp

from deploy import build_engine
from export import export_onnx
from qat import ModelSpec, Preprocessing, build_model, calibrate_ranges, prepare, save_checkpoint

CLASSES, PIXELS = 1000, 224


def write_checkpoint(path: Path, calibrator: str = "max") -> None:
    torch.manual_seed(0)
    spec = ModelSpec("resnet50", CLASSES)
    model = prepare(build_model(spec), input_shape=(3, 224, 224))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # some start at zero, which would make their weights vanish
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    calibrate_ranges(model, torch.randn(16, 3, PIXELS, PIXELS).split(8), calibrator)
    preprocessing = Preprocessing(PIXELS, PIXELS, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256)
    save_checkpoint(path, model, spec, preprocessing, [str(index) for index in range(CLASSES)])


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.qat"
        write_checkpoint(checkpoint)
        onnx = export_onnx(checkpoint, checkpoint.with_suffix(".onnx")).figures
        engine = build_engine(checkpoint.with_suffix(".onnx"), builder="tensorrt-rtx").sidecar
    built = engine.figures
    print(stamp("python benchmarks/export_and_build.py"))
    print(f"ResNet50, {CLASSES} classes, {PIXELS} px; builder {engine.details['builder']}")
    print(f"  ONNX file                   {onnx['bytes'] / 1e6:7.2f} MB")
    print(f"  ONNX nodes                  {onnx['nodes']:7d}")
    print(f"  fold, emit and lint         {onnx['export_seconds']:7.1f} s")
    print(f"  engine weights memory       {built['weights_bytes'] / 1e6:7.2f} MB")
    print(f"  engine build                {built['build_seconds']:7.1f} s")
    print(f"  convolutions in INT8        {built['convolutions_int8']} of {built['convolutions']}")
    print(f"  matrix products in INT8     {built['matrix_products_int8']} of {built['matrix_products']}")


if __name__ == "__main__":
    main()
