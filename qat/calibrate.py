"""Quantize a trained network without training it. Activation ranges come from images, which need no labels.

    python -m qat.calibrate --model resnet50 --weights IMAGENET1K_V2 --data path/to/images --output runs/model.qat
    python -m qat.calibrate --model path/to/net.py:build --weights net.safetensors --data digits

Some of the images are held out to measure how often INT8 predicts the same class as the float network. If they have
labels, accuracies are measured too. If the result is not good enough, python -m qat.train also fine-tunes.

--explain TENSOR also shows how the range of a tensor is chosen, as a picture and a table.

Next: python -m export.onnx runs/model.qat
"""

from __future__ import annotations

from qat.base.console import run_command
from qat.options import CalibrateOptions


def main(options: CalibrateOptions) -> None:
    """Runs the calibration. Torch is imported here, so that --help answers at once."""
    from qat.compute.device import Compute
    from qat.post_training import quantize_pretrained

    quantize_pretrained(
        options.model,
        options.weights,
        options.images(),
        options.output,
        classes=options.classes,
        decoded=options.decode,
        calibration=options.calibration(),
        keep_float=options.kept_float(),
        profile=options.kernel_profile(),
        adaround_steps=options.adaround,
        explained=options.explain,
        compute=Compute.from_options(options.device, "float32", compiled=False),
    )


def cli() -> None:
    """The console script qat-calibrate."""
    run_command(main, CalibrateOptions)


if __name__ == "__main__":
    cli()
