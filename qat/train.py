"""Train an INT8 network: float training, quantizer placement, calibration, quantization-aware fine-tuning, checkpoint.

    python -m qat.train --model resnet50 --data digits --output runs/digits/model.qat
    python -m qat.train --model resnet50 --weights IMAGENET1K_V2 --float-epochs 0 --data path/to/folder

Next: python -m export.onnx runs/digits/model.qat
"""

from __future__ import annotations

from qat.base.console import run_command
from qat.options import TrainOptions


def main(options: TrainOptions) -> None:
    """Runs the training. Torch is imported here, so that --help answers at once."""
    from qat.compute.device import Compute
    from qat.run import train

    train(
        options.model,
        options.images(),
        options.output,
        weights=options.weights,
        float_recipe=options.float_recipe(),
        qat_recipe=options.qat_recipe(),
        calibration=options.calibration(),
        distillation=options.distillation(),
        keep_float=options.kept_float(),
        profile=options.kernel_profile(),
        bits=options.bits,
        learn_ranges=options.learn_ranges,
        compute=Compute.from_options(options.device, options.amp, options.compile),
        log_folder=options.log_folder,
        resume=options.resume,
        save_seconds=options.save_seconds,
        recorded=vars(options),
    )


def cli() -> None:
    """The console script qat-train."""
    run_command(main, TrainOptions)


if __name__ == "__main__":
    cli()
