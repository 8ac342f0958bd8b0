"""What each calibrator costs a depthwise network whose weights are trained.

    python -m benchmarks.entropy_depthwise WEIGHTS flowers-mobilenet_v2 --data flowers160

WEIGHTS is a state dict of the setting's network (benchmarks/accuracy.py, group 'float'). For each calibrator one line:
how often the quantized network chooses the float network's class on the test images, with the 95 % interval (Wilson),
the mean cosine and the SQNR of the logits against the float network's, and top-1.
"""

from __future__ import annotations

import argparse
import math
from typing import get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.accuracy import SETTINGS
from benchmarks.stamp import stamp
from qat.base.choices import Calibrator
from qat.calibration.activation_ranges import observe, set_ranges
from qat.compute.device import Compute
from qat.compute.precision import exact_float32
from qat.data.splits import load_data
from qat.evaluate import inputs
from qat.fake_quantize.prepare import prepare
from qat.models import ModelSpec, build_model

METHODS = get_args(Calibrator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibrators", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    setting, compute = SETTINGS[options.setting], Compute.from_options("auto")
    torch.set_flush_denormal(True)
    data = load_data(options.data, setting.pixels, 0).on(compute.device)
    model = build_model(ModelSpec(setting.model, len(data.class_names)))
    model.load_state_dict(safetensors.torch.load_file(options.weights))
    model = compute.place(model.eval())
    prepared = compute.place(prepare(model, input_shape=(3, setting.pixels, setting.pixels))).eval()
    calibration = (x for x, _ in inputs(data.calibration, setting.batch, compute, 2))
    test = [(x.clone(), labels.clone()) for x, labels in inputs(data.test, 16, compute, 2)]
    labels = torch.cat([of_batch for _, of_batch in test]).cpu()
    images = [x for x, _ in test]

    print(stamp(f"python -m benchmarks.entropy_depthwise {options.weights} {options.setting} --data {options.data}"))
    with exact_float32():
        observers = observe(prepared, calibration)
        exact = logits(model, images)
        top1 = share(exact.argmax(1) == labels)
        print(f"{options.setting}: {len(labels)} test images, float top-1 {top1:.2f} %")
        print(
            f"{'calibrator':12} {'agreement, %':>12} {'95 % interval':>15} {'cosine':>8} {'SQNR, dB':>9} {'top-1':>9}"
        )
        for method in options.calibrators:
            set_ranges(prepared, observers, method)
            print(f"{method:12} {row(logits(prepared, images), exact, labels)}", flush=True)


def logits(model: nn.Module, images: list[Tensor]) -> Tensor:
    """[images, classes], float64, on the CPU."""
    with torch.no_grad():
        return torch.cat([model(x).double().cpu() for x in images])


def row(found: Tensor, exact: Tensor, labels: Tensor) -> str:
    """One line of the table: logits [images, classes] against the float network's, and labels [images]."""
    agreement = share(found.argmax(1) == exact.argmax(1))
    low, high = interval(agreement, len(labels))
    cosine = torch.nn.functional.cosine_similarity(found, exact).mean().item()
    sqnr = 10 * math.log10(exact.square().sum().item() / (found - exact).square().sum().item())
    top1 = share(found.argmax(1) == labels)
    return f"{agreement:12.2f} {f'{low:.1f} .. {high:.1f}':>15} {cosine:8.4f} {sqnr:9.2f} {top1:9.2f}"


def share(right: Tensor) -> float:
    """In percent."""
    return 100 * right.double().mean().item()


def interval(percent: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` images, in percent (Wilson)."""
    p, z = percent / 100, 1.96
    center, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return 100 * (center - half) / whole, 100 * (center + half) / whole


if __name__ == "__main__":
    main()
