"""Writes our placement of the zoo's networks as ONNX files, to be compared with other tools' of the same networks.

    PYTHONPATH=.:tests python benchmarks/placement_models.py FOLDER [NAME ...]

NAME is one of tests/zoo.py, or timm/ and any name of timm's. FOLDER/NAME/ours.onnx is calibrated on random images,
FOLDER/NAME/float32.onnx is the same network without Q/DQ nodes; 224 px (inception_v3: 299), weights at random.
benchmarks/modelopt_models.py puts another tool's files beside them.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
import zoo
from torch import Tensor, nn

from export.emit import emit
from export.fold import fold, fold_float, layer_paths
from export.fold_factors import fold_factors
from export.pad_groups import pad_groups
from export.split_projections import split_projections
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare


def write(model: nn.Module, x: Tensor, folder: Path) -> None:
    """Writes ours.onnx and float32.onnx of ``model``, calibrated on the images ``x``, [N, C, H, W]."""
    prepared = prepare(model, input_shape=x.shape[1:])
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    folded, _ = fold(prepared)
    split_projections(folded, prepared.meta["inputs"])
    ours = emit(folded, x[:2], {})
    fold_factors(ours)
    pad_groups(ours, placement_of(prepared), layer_paths(folded))
    ir.save(ours, folder / "ours.onnx")
    ir.save(emit(fold_float(prepared), x[:2], {}), folder / "float32.onnx")
    print(folder, flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    root, *names = sys.argv[1:]
    for name, folder in zoo.folders(Path(root), names):
        write(zoo.build(name, full=True), zoo.full_images(name, 4), folder)


if __name__ == "__main__":
    main()
