"""Train an INT8 network: float training, placement, calibration, quantization-aware fine-tuning, a checkpoint.

    python -m qat.train --model resnet50 --data digits --output runs/digits/model.qat
    python -m qat.train --model resnet50 --weights IMAGENET1K_V2 --float-epochs 0 --data path/to/folder

Next: python -m export.onnx runs/digits/model.qat
"""

from __future__ import annotations

from qat.base.console import run_command
from qat.options import TrainOptions


def main(options: TrainOptions) -> int:
    """Runs the training. Torch is imported here, so that --help answers at once."""
    from qat.run import run

    return run(options)


if __name__ == "__main__":
    run_command(main, TrainOptions)
