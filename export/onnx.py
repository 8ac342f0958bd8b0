"""Export a checkpoint as explicit-precision ONNX: INT8 weights inside, every Q/DQ node written down.

    python -m export.onnx runs/model.qat
    python -m export.onnx runs/model.qat --input uint8-nhwc --output runs/model_uint8.onnx
    python -m export.onnx runs/model.qat --pad-channels
    python -m export.onnx runs/model.qat --precision float16

Beside model.onnx it writes model.reference.npz: test images with PyTorch's answers, to check an engine by.
Next: python -m deploy.build runs/model.onnx
"""

from __future__ import annotations

from export.options import ExportOptions
from qat.base.console import run_command


def main(options: ExportOptions) -> None:
    """Exports. Torch is imported here, so that --help answers at once."""
    from export.from_checkpoint import export_checkpoint

    export_checkpoint(options)


if __name__ == "__main__":
    run_command(main, ExportOptions)
