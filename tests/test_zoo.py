"""Every network of the zoo through the pipeline: placed, exported, linted, in ONNX Runtime and in TensorRT-RTX."""

from __future__ import annotations

import cProfile
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import zoo
from commands import one_thread

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings, Profile
from export.emit import emit
from export.float_types import store_floats_as
from export.fold import fold
from export.fold_factors import fold_factors
from export.linter import lint_onnx
from export.parity import measure
from export.scale_rules import SMALLEST_HALF
from export.split_projections import split_projections
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.operations import WEIGHTED
from qat.graph.tracing import network_of, trace
from qat.rules.place import place

# Three that differ: residual additions, concatenations, transposed convolutions.
DIFFERENT = ("resnet18", "squeezenet1_1", "unet")
LARGEST_ERROR_DB = 60  # of a layer that gets the same codes in PyTorch and in ONNX Runtime


@pytest.mark.parametrize(
    "name", [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow) for name in zoo.NAMES]
)
def test_the_pipeline(name: str, tmp_path: Path) -> None:
    with one_thread():
        model, x = zoo.build(name), zoo.images(name, 4, seed=1)
    prepared = prepare(model, input_shape=x.shape[1:])
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    folded, _ = fold(prepared)
    split = split_projections(folded, prepared.meta["inputs"])
    path = tmp_path / "model.onnx"
    exported = emit(folded, x, {})
    half = ir.from_proto(ir.to_proto(exported))
    fold_factors(exported)
    ir.save(exported, path)

    assert lint_onnx(path) == []  # TensorRT takes it, and the ONNX file is placed as the torch.fx graph was
    parity, *_ = measure(folded, path, [(x, x)], 4)
    assert min(layer.sqnr_db for layer in parity.layers if layer.sqnr_db is not None) > LARGEST_ERROR_DB

    settings = BuildSettings(profiles=(Profile(2, 2, 2),), capabilities=("8.9",))
    audit = build(find_toolkit("tensorrt-rtx"), path, settings).audit
    assert audit.broken == ()
    fold_factors(half, SMALLEST_HALF)
    store_floats_as(half, "float16", [{"input": x.numpy()}])
    ir.save(half, tmp_path / "half.onnx")
    assert lint_onnx(tmp_path / "half.onnx") == []
    assert build(find_toolkit("tensorrt-rtx"), tmp_path / "half.onnx", settings).audit.broken == ()
    declared = [finding.declared_int8 for finding in audit.findings]
    decided = placement_of(prepared).decisions_about(*WEIGHTED, "matrix_product")
    assert sum(declared) == sum(decision.quantized for decision in decided) + 2 * len(split)  # q, k and v


@pytest.mark.parametrize(
    ("name", "calls"), [("resnet50", 60_000), pytest.param("efficientnet_v2_s", 500_000, marks=pytest.mark.slow)]
)
def test_placement_does_not_take_long(name: str, calls: int) -> None:
    """Counted in calls of Python functions, which do not depend on the machine: a million take about a second."""
    network = network_of(trace(zoo.build(name), (3, 224, 224)))
    profile = cProfile.Profile()
    profile.runcall(place, network)
    made = sum(entry.callcount for entry in profile.getstats())
    assert made < calls
