"""Scales of our calibrators against those of TensorRT's, on the same inputs.

    python -m benchmarks.tensorrt_scales inputs FLOAT.onnx --data FOLDER --inputs X.npy      (torch)
    python -m benchmarks.tensorrt_scales ours FLOAT.onnx --inputs X.npy --output OURS.json    (torch)
    python -m benchmarks.tensorrt_scales theirs FLOAT.onnx --inputs X.npy --output THEIRS.json    (TensorRT, a GPU)
    python -m benchmarks.tensorrt_scales compare OURS.json THEIRS.json

``compare`` pairs max with minmax, entropy with entropy2 and entropy, percentile with legacy at the same quantile and no
extrapolation, and counts the tensors whose scales differ by less than 5 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

PERCENTILE = 99.99
PAIRS = (("max", "minmax"), ("entropy", "entropy2"), ("entropy", "entropy"), ("percentile", "legacy"))
_CLOSE = 0.05


def write_inputs(model: Path, data: str, inputs: Path, images: int) -> None:
    """Normalized images for a float ONNX file, as an .npy file."""
    import numpy as np

    from deploy.calibration_inputs import calibration_inputs
    from deploy.settings import CalibrationSettings
    from qat.base.artifact import read_sidecar

    sidecar = read_sidecar(model, "onnx")
    found = calibration_inputs(CalibrationSettings(data=data, images=images), sidecar.inputs, sidecar)
    np.save(inputs, found.read(0, found.count)[sidecar.inputs[0].name])


def ours(model: Path, inputs: Path) -> dict[str, dict[str, float]]:
    """Scales by method and tensor."""
    import onnx
    from onnx import numpy_helper

    from export.from_float_onnx import quantize_onnx
    from qat.base.choices import Calibrator

    scales: dict[str, dict[str, float]] = {}
    for method in get_args(Calibrator):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "q.onnx"
            quantize_onnx(
                model, path, data=str(inputs), calibrator=method, percentile=PERCENTILE, images=100_000, parity_images=8
            )
            graph = onnx.load(path).graph
        constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        scales[method] = {
            node.input[0]: float(constants[node.input[1]])
            for node in graph.node
            if node.op_type == "QuantizeLinear" and node.input[0] not in constants
        }
    return scales


def theirs(model: Path, inputs: Path) -> dict[str, dict[str, float]]:
    """Scales by TensorRT's calibrator and tensor."""
    from deploy.engine_file import build_engine
    from deploy.settings import BuilderOptions, CalibrationSettings, Profile
    from qat.base.calibration_cache import CalibrationCache
    from qat.base.choices import ImplicitCalibrator

    scales = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in get_args(ImplicitCalibrator):
            cache = Path(folder) / f"{name}.cache"
            build_engine(
                model,
                Path(folder) / "m.engine",
                builder="tensorrt",
                profiles=[Profile(32, 32, 32)],
                timing_cache=Path(folder) / "timing.cache",
                calibration=CalibrationSettings(
                    data=str(inputs),
                    images=100_000,
                    calibrator=name,
                    quantile=PERCENTILE / 100,
                    calibrate_before_fusion=True,
                    calibration_cache=cache,
                ),
                settings=BuilderOptions(precision="int8", optimization_level=0),
            )
            scales[name] = CalibrationCache.read(cache).scales
    return scales


def compare(mine: dict[str, dict[str, float]], others: dict[str, dict[str, float]]) -> None:
    """Prints how many scales are close, and the farthest."""
    for method, calibrator in PAIRS:
        pairs = {
            tensor: (scale, others[calibrator][tensor])
            for tensor, scale in mine[method].items()
            if others[calibrator].get(tensor)
        }
        off = {tensor: one / other - 1 for tensor, (one, other) in pairs.items()}
        close = sum(abs(difference) < _CLOSE for difference in off.values())
        share = 100 * close / max(len(off), 1)
        print(f"{method:10} against {calibrator:8}: {close} of {len(off)} tensors ({share:.0f} %) within 5 %")
        for tensor, difference in sorted(off.items(), key=lambda one: -abs(one[1]))[:5]:
            print(f"    {100 * difference:+7.1f} %  {tensor}")


def main() -> None:
    """Runs one of the four steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("inputs", "ours", "theirs", "compare"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.step == "inputs":
        write_inputs(options.files[0], options.data, options.inputs, options.images)
        return
    if options.step == "compare":
        mine, others = (json.loads(path.read_text()) for path in options.files)
        compare(mine, others)
        return
    scales: Any = (ours if options.step == "ours" else theirs)(options.files[0], options.inputs)
    options.output.write_text(json.dumps(scales, indent=1))


if __name__ == "__main__":
    main()
