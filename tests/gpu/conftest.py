"""Engines of small networks, built once by the TensorRT of this machine.

These tests run where TensorRT and a GPU are, also without torch: scripts/test-gpu. Those of training, in
test_training.py, need torch and a GPU, and no TensorRT. Elsewhere they are skipped, and say what is missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import qdq_models

from deploy import Engine, Profile, build_engine
from deploy.installed import find_toolkit
from deploy.trt import Toolkit
from qat.base.artifact import Sidecar, TensorSpec, sha256_of, write_artifact
from qat.base.errors import UserError


def _toolkit() -> Toolkit | str:
    try:
        return find_toolkit("tensorrt")
    except UserError as error:
        return str(error)


def _missing_toolkit() -> str:
    return reason if isinstance(reason := _toolkit(), str) else ""


def _missing_torch() -> str:
    import torch

    return "" if torch.cuda.is_available() else "training on a GPU: torch finds none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    training = [item for item in here if item.path.name == "test_training.py"]
    engines = [item for item in here if item not in training]
    for wanted, missing in ((engines, _missing_toolkit), (training, _missing_torch)):
        if wanted and (reason := missing()):
            for item in wanted:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    return find_toolkit("tensorrt")


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """float32 [40, 3, 32, 32], each of a colour of its own, so that they are of several classes."""
    random = np.random.default_rng(1)
    colours = 2 * random.standard_normal((40, 3, 1, 1))
    return (colours + 0.3 * random.standard_normal((40, 3, 32, 32))).astype(np.float32)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qdq_models.residual(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="session")
def expected(model: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime answers on ``images``, [40, 10]."""
    from export.session import session

    return session(model).run(None, {"input": images})[0]


@pytest.fixture(scope="session")
def engine_path(model: Path) -> Path:
    """An engine with two profiles, 1 to 8 and 9 to 32 images."""
    profiles = (Profile(1, 4, 8), Profile(9, 32, 32))
    built = build_engine(model, model.with_name("two.engine"), builder="tensorrt", profiles=profiles)
    assert not built.audit.broken
    return built.path


@pytest.fixture
def engine(engine_path: Path):
    with Engine.load(engine_path, contexts=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, its sidecar and reference file as export writes them, and model.engine made of it.

    The reference is ONNX Runtime's own answer: there is no torch here.
    """
    from export.session import session

    folder = tmp_path_factory.mktemp("family")
    path = folder / "model.onnx"
    random = np.random.default_rng(2)
    colours = random.integers(0, 256, (300, 1, 1, 3))
    images = (colours + random.normal(0, 10, (300, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    given = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.25
    qdq_models.residual(path)
    logits = session(path).run(None, {"input": given})[0]
    np.savez(folder / "model.reference.npz", images=images, labels=logits.argmax(1), logits=logits)
    reference = {
        "file": "model.reference.npz",
        "sha256": sha256_of(folder / "model.reference.npz"),
        "source": "random images",
    }
    content = path.read_bytes()
    sidecar = Sidecar(
        kind="onnx",
        inputs=(TensorSpec("input", (-1, 3, 32, 32), "float32"),),
        outputs=(TensorSpec("logits", (-1, 10), "float32"),),
        preprocessing={"height": 32, "width": 32, "mean": mean, "std": std},
        class_names=tuple(map(str, range(10))),
        details={"reference": reference},
    )
    write_artifact(path, sidecar, lambda temporary: temporary.write_bytes(content) and None)
    profiles = (Profile(64, 64, 64),)  # 300 images: the last batch is padded
    assert not build_engine(path, builder="tensorrt", profiles=profiles).audit.broken
    return folder
