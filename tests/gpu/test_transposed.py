"""An INT8 transposed convolution, whose scale the file states in another way than old versions of TensorRT take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import qdq_models

from deploy import Engine, Profile, build_engine
from export.session import session


def test_it_runs_in_int8_and_answers_as_onnx_runtime(tmp_path: Path) -> None:
    path = qdq_models.upsampling(tmp_path / "m.onnx")
    built = build_engine(path, tmp_path / "m.engine", builder="tensorrt", profiles=(Profile(8, 8, 8),))
    assert not built.audit.broken
    x = np.random.default_rng(0).standard_normal((8, 64, 28, 28)).astype(np.float32)
    expected = session(path).run(None, {"input": x})[0]
    with Engine.load(built.path) as engine:
        found = engine(x)
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()
