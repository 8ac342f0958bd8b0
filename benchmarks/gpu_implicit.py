"""All precisions of one network in one run: float, implicit INT8 by each calibrator and by QAT ranges, explicit INT8.

    python -m benchmarks.gpu_implicit FOLDER --data IMAGES --output FILE.json

FOLDER has what benchmarks/gpu_implicit.sh makes: float.onnx (the network before quantization), ptq.onnx and qat.onnx
(Q/DQ, without and with training), qat.float32.onnx (the weights of qat.onnx without quantizers), each with its sidecar.
Needs TensorRT with implicit INT8 and a GPU, and no torch.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from deploy.builder import open_network
from deploy.candidate_engines import CandidateEngines
from deploy.candidates import Candidate
from deploy.engine_table import EngineTable, Questions, measure_engines
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings, CalibrationSettings
from qat.base.artifact import write_json
from qat.base.choices import ImplicitCalibrator


def main() -> None:
    """Builds, asks, measures, prints, writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True, help="images to calibrate on")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128, 32])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    toolkit = find_toolkit("tensorrt")
    before, ptq, qat, after = (
        options.folder / name for name in ("float.onnx", "ptq.onnx", "qat.onnx", "qat.float32.onnx")
    )

    def calibrated(name: ImplicitCalibrator) -> CalibrationSettings:
        return CalibrationSettings(data=options.data, calibrator=name, images=options.images)

    candidates = [
        Candidate("FP32", before, "fp32"),
        Candidate("TF32", before, "tf32"),
        Candidate("FP16", before, "fp16"),
        *(
            Candidate(f"implicit, {name}", before, "int8", calibration=calibrated(name))
            for name in get_args(ImplicitCalibrator)
        ),
        Candidate("implicit, QAT ranges", after, "int8", ranges=qat),
        Candidate("implicit, QAT ranges, minmax for the rest", after, "int8", calibrated("minmax"), qat),
        Candidate("explicit, PTQ", ptq),
        Candidate("explicit, QAT", qat),
    ]
    with open_network(toolkit, before, BuildSettings()) as network:
        questions = Questions.of_model(before, None, 100_000, network.inputs)
    engines = CandidateEngines(toolkit, options.folder / "engines", own_timings=options.batches[-1:])
    device = asdict(toolkit.device) if toolkit.device else None

    def keep(table: EngineTable) -> None:
        write_json(options.output, {"device": device, "tensorrt": toolkit.version} | table.to_json())
        table.show()

    measure_engines(engines, candidates, options.batches, questions, on_batch=keep)


if __name__ == "__main__":
    main()
