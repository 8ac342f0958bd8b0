"""Measuring kernels, tuning, and the speed check, on the GPU at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import qdq_models

from deploy import Engine, Profile, build_engine
from deploy.builder import build
from deploy.kernel_sweep import kinds_of_layers, sweep_kernels
from deploy.measure import latencies_of_built
from deploy.settings import BuildSettings
from deploy.trt import Toolkit
from deploy.tuned_engine import tune_engine
from export.kernel_networks import LAYER, write_kernel_network
from export.pad_groups import set_group_widths
from export.session import session
from qat.base.artifact import read_sidecar
from qat.rules.kernel_profile import KernelProfile


def test_kernels_are_measured_and_not_measured_again(tmp_path: Path, toolkit: Toolkit) -> None:
    path = tmp_path / "p.json"
    found = sweep_kernels(("pools and gates",), 4, 20, 3.0, path)
    assert [one.kind for one in found.kinds] == kinds_of_layers()["pools and gates"]
    assert all(one.gain is None or one.gain > 0 for one in found.kinds)
    assert (found.tensorrt, found.batch) == (toolkit.version, 4)
    assert sweep_kernels(("pools and gates",), 4, 20, 3.0, path).kinds == found.kinds == KernelProfile.read(path).kinds


def test_groups_padded_with_zeros_answer_the_same_and_are_faster(tmp_path: Path, toolkit: Toolkit) -> None:
    kind = next(one for one in kinds_of_layers()["grouped"] if one.group_width == 24)
    plain, padded = tmp_path / "plain.onnx", tmp_path / "padded.onnx"
    write_kernel_network(plain, kind, 8, quantized=True)
    model = ir.load(plain)
    assert set_group_widths(model, {LAYER: (32, 32)}).original == {LAYER: (24, 24)}
    ir.save(model, padded)
    x = np.random.default_rng(0).standard_normal((8, 16, 56, 56)).astype(np.float32)
    expected = session(plain).run(None, {"input": x})[0]
    built = {path.stem: build(toolkit, path, BuildSettings()) for path in (plain, padded)}
    assert not any(one.audit.broken for one in built.values())
    with Engine.from_plan(built["padded"].plan, toolkit) as engine:
        found = engine(x)
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()
    times = latencies_of_built(toolkit, built, 8, 100)
    assert times["padded"].beats(times["plain"])


@pytest.mark.parametrize("fall_back", [False, True])
def test_the_speed_check_measures_both_and_says_which_is_written(fall_back: bool, tmp_path: Path) -> None:
    path = qdq_models.residual(tmp_path / "m.onnx")
    profiles = (Profile(8, 8, 8),)
    built = build_engine(
        path, tmp_path / "m.engine", builder="tensorrt", profiles=profiles, verify_speed=True, fall_back=fall_back
    )
    speed = read_sidecar(built.path, "engine").details["speed"]
    assert min(speed[name]["median"] for name in ("int8", "float16")) > 0
    assert speed["written"] == ("int8" if speed["int8_wins"] or not fall_back else "float16")


def test_a_tuned_engine_is_not_slower_than_the_rules(tmp_path: Path, toolkit: Toolkit) -> None:
    path = qdq_models.residual(tmp_path / "m.onnx")
    found = tune_engine(path, minutes=0.5, batch=8, runs=50)
    placement = found.placement
    assert (placement.tensorrt, placement.batch) == (toolkit.version, 8)
    assert placement.tuned_ms < 1.1 * placement.int8_ms
    with Engine.load(found.engine.path) as engine:
        assert engine(np.zeros((8, 3, 32, 32), np.float32)).shape == (8, 10)
