"""Writes NVIDIA ModelOpt's quantized ONNX files of the zoo's networks, from PyTorch and from ONNX.

    PYTHONPATH=.:tests python benchmarks/modelopt_models.py FOLDER [NAME ...]

Needs nvidia-modelopt[onnx] 0.47 and requests, in an environment of their own. Written are
FOLDER/NAME/modelopt_torch.onnx (mtq.quantize with INT8_DEFAULT_CFG, exported as its deployment helper does) and
FOLDER/NAME/modelopt_onnx.onnx (its ONNX quantizer with default options on the float export, but without turning the
rest to FP16, which the engine's builder does for all files alike). Both calibrate on 8 random images.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path

import modelopt.torch.quantization as mtq
import onnx
import torch
import zoo
from modelopt.onnx.quantization import quantize
from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata
from torch import Tensor, nn

OPSET = 17


class Named(nn.Module):
    """Calls its input ``input``, as the graph's input will be called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        """As the network does."""
        answer: Tensor = self.network(input)
        return answer


def from_onnx(name: str, x: Tensor, folder: Path) -> None:
    source = folder / "float_legacy.onnx"
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": axes}
    torch.onnx.export(zoo.build(name, full=True), (x[:1],), source, dynamo=False, opset_version=OPSET, **names)
    quantize(
        str(source),
        quantize_mode="int8",
        calibration_data=x.numpy(),
        high_precision_dtype="fp32",
        output_path=str(folder / "modelopt_onnx.onnx"),
    )
    source.unlink()


def from_torch(name: str, x: Tensor, folder: Path) -> None:
    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    model = Named(mtq.quantize(zoo.build(name, full=True), mtq.INT8_DEFAULT_CFG, forward).eval()).eval()
    axes = {"input": {0: "batch"}}
    found, _ = get_onnx_bytes_and_metadata(
        model, (x[:1],), model_name=name, onnx_opset=OPSET, weights_dtype="fp32", dynamic_axes=axes
    )
    exported = onnx.load_from_string(OnnxBytes.from_bytes(found).get_onnx_model_file_bytes())
    onnx.save(exported, folder / "modelopt_torch.onnx")


def main() -> None:
    warnings.simplefilter("ignore")
    root, *names = sys.argv[1:]
    for name, folder in zoo.folders(Path(root), names):
        x = zoo.full_images(name, 8)
        for make in (from_onnx, from_torch):
            try:
                make(name, x, folder)
            except Exception:  # a network that the tool cannot take is a result, not the end
                print(f"{name}: {make.__name__} failed: {traceback.format_exc().splitlines()[-1]}", flush=True)
        print(folder, flush=True)


if __name__ == "__main__":
    main()
