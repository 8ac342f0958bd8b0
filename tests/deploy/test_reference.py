"""The reference file: read back as it was written, refused when it is not the one that the sidecar records."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.reference import network_input, read_reference
from export.session import session
from qat.base.artifact import Sidecar, TensorSpec, read_sidecar, sha256_of
from qat.base.errors import UserError
from qat.data.preprocessing import Preprocessing

FLOAT = TensorSpec("input", (-1, 3, 16, 16), "float32")
BYTES = TensorSpec("input", (-1, 16, 16, 3), "uint8")


@pytest.fixture
def sidecar(chain: Path) -> Sidecar:
    return read_sidecar(chain / "model.onnx", "onnx")


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Path:
    """A copy of the ONNX file and its reference, to be changed."""
    for name in ("model.onnx", "model.reference.npz"):
        shutil.copy(chain / name, tmp_path)
    return tmp_path / "model.onnx"


def refused(onnx: Path, sidecar: Sidecar) -> str:
    with pytest.raises(UserError) as caught:
        read_reference(onnx, sidecar)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_onnx_file_answers_what_the_reference_says(chain: Path, sidecar: Sidecar) -> None:
    reference = read_reference(chain / "model.onnx", sidecar)
    given = network_input(reference.images, sidecar)
    assert given.shape == (60, 3, 16, 16)
    (answers,) = session(chain / "model.onnx").run(None, {"input": given})
    np.testing.assert_allclose(answers, reference.logits, atol=0.1)
    assert (answers.argmax(1) == reference.logits.argmax(1)).mean() > 0.98
    top1 = 100 * (reference.logits.argmax(1) == reference.labels).mean()
    assert top1 == pytest.approx(sidecar.details["reference"]["top1"])
    assert reference.source.startswith("the test split of ")


def test_it_is_found_beside_the_onnx_file_wherever_that_is(copied: Path, sidecar: Sidecar) -> None:
    assert len(read_reference(copied, sidecar).images) == 60


def test_a_missing_reference(copied: Path, sidecar: Sidecar) -> None:
    path = copied.with_name("model.reference.npz")
    path.unlink()
    message = refused(copied, sidecar)
    assert message.startswith(f"no reference file {path}: copy it from beside the ONNX file")
    assert "export again" in message


def test_another_reference(copied: Path, sidecar: Sidecar) -> None:
    path = copied.with_name("model.reference.npz")
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(copied, sidecar)
    for part in (str(path), sha256_of(path), "model.onnx", sidecar.details["reference"]["sha256"], "export again"):
        assert part in message


def test_an_onnx_file_of_an_older_version(copied: Path, sidecar: Sidecar) -> None:
    details = {name: value for name, value in sidecar.details.items() if name != "reference"}
    message = refused(copied, dataclasses.replace(sidecar, details=details))
    assert message == f"{copied} records no reference file: export it again with python -m export.onnx"
    message = refused(copied, dataclasses.replace(sidecar, details={**details, "reference": None}))
    assert message.startswith(f"{copied} has no reference file")
    assert message.endswith(": give --data")


@pytest.mark.parametrize("statistics", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.305,) * 3, (0.376,) * 3)])
def test_normalization_is_that_of_training_to_the_last_bit(statistics) -> None:
    mean, std = statistics
    preprocessing = Preprocessing(16, 16, mean, std, 16)
    sidecar = Sidecar("onnx", inputs=(FLOAT,), preprocessing=dataclasses.asdict(preprocessing))
    images = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)  # every value in every channel
    expected = preprocessing.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = network_input(images, sidecar)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected.numpy())


def test_a_network_of_raw_bytes_takes_them_unchanged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(network_input(images, Sidecar("onnx", inputs=(BYTES,))), images)


def test_raw_bytes_by_channel_are_turned() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    found = network_input(images, Sidecar("onnx", inputs=(TensorSpec("input", (-1, 3, 16, 16), "uint8"),)))
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("spec", [FLOAT, BYTES, dataclasses.replace(BYTES, dtype="float16")])
def test_images_that_do_not_fit_the_input_are_refused(spec: TensorSpec) -> None:
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3}
    sidecar = Sidecar("onnx", inputs=(spec,), preprocessing=preprocessing)
    size = 8 if spec.dtype != "float16" else 16
    with pytest.raises(UserError, match=f"input 'input' takes {spec.dtype}"):
        network_input(np.zeros((1, size, size, 3), np.uint8), sidecar)
