"""Quantize a float ONNX file from anywhere: calibrate, place Q/DQ nodes where TensorRT wants them, write INT8 weights.

    python -m export.quantize model.onnx --data path/to/images
    python -m export.quantize model.onnx --calibration-cache calibration.cache

For those who cannot train again. The second form carries over what an older TensorRT calibrated; tensors that the cache
does not know are named and stay in float, or are calibrated where --data is given too.
Next: python -m deploy.build model.int8.onnx
"""

from __future__ import annotations

from export.options import QuantizeOptions
from qat.base.console import run_command


def main(options: QuantizeOptions) -> None:
    """Quantizes. Torch is imported here, so that --help answers at once."""
    from export.post_training import quantize_file

    quantize_file(options)


if __name__ == "__main__":
    run_command(main, QuantizeOptions)
