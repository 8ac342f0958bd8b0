"""The calibration cache as a file: used only if it is whole and was made of the same, and else said in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from deploy.calibration_cache_file import CacheKey, CalibrationCacheFile
from qat.base.artifact import Sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError

CONTENT = b"TRT-8600-EntropyCalibration2\ninput: 3caa1f6d\nconv1_output: 3d0a2c51\nzero: 0\n"
KEY = CacheKey("a" * 64, "b" * 64, "entropy2", "8.6.0")
WITHOUT_IMAGES = dataclasses.replace(KEY, images=None)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with its sidecar."""
    path = tmp_path / "float.cache"
    CalibrationCacheFile(path, KEY).save(CONTENT, 96)
    return path


def refused(path: Path, key: CacheKey = KEY) -> str:
    with pytest.raises(UserError) as caught:
        CalibrationCacheFile(path, key)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_was_saved_is_read_byte_by_byte(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    said = capsys.readouterr().out
    assert f"{cache}: written, 3 tensors" in said
    assert cache.read_bytes() == CONTENT
    again = CalibrationCacheFile(cache, KEY)
    assert again.content == CONTENT
    assert f"{cache}: used" in capsys.readouterr().out
    again.save(again.content, 96)
    assert cache.read_bytes() == CONTENT
    assert CalibrationCacheFile(cache, WITHOUT_IMAGES).content == CONTENT
    sidecar = json.loads(sidecar_path(cache).read_text())
    assert sidecar["kind"] == "calibration-cache"
    assert sidecar["details"] == dataclasses.asdict(KEY) | {"images_used": 96}
    assert sorted(path.name for path in cache.parent.iterdir()) == ["float.cache", "float.cache.json"]


def test_a_file_that_is_not_there_is_calibrated_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "float.cache"
    assert CalibrationCacheFile(path, KEY).content == b""
    assert "give --data" in refused(path, WITHOUT_IMAGES)
    assert not path.exists()


def test_a_cache_that_is_cut_anywhere_is_refused(cache: Path) -> None:
    for length in range(len(CONTENT)):
        cache.write_bytes(CONTENT[:length])
        assert "is refused" in refused(cache)
    cache.write_bytes(CONTENT)
    assert CalibrationCacheFile(cache, KEY).content == CONTENT


def test_a_cache_with_one_other_byte_is_refused(cache: Path) -> None:
    random = np.random.default_rng(0)
    for position in range(len(CONTENT)):
        changed = bytearray(CONTENT)
        changed[position] ^= int(random.integers(1, 256))
        cache.write_bytes(changed)
        assert "is refused" in refused(cache, (KEY, WITHOUT_IMAGES)[position % 2])


@pytest.mark.parametrize("content", [CONTENT + b"\n", b"", b"\0" * 90, bytes(range(256)), b"no cache\n", CONTENT * 2])
def test_another_file_under_its_name_is_refused(cache: Path, content: bytes) -> None:
    cache.write_bytes(content)
    message = refused(cache)
    assert "SHA-256" in message
    assert "delete it to calibrate again" in message


@pytest.mark.parametrize("content", [b"", b"junk", bytes(range(256)), b"TRT-8600-EntropyCalibration2\n"])
def test_what_is_no_cache_is_refused_although_its_sidecar_is_right(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "float.cache"
    sidecar = Sidecar("calibration-cache", details=dataclasses.asdict(KEY))
    write_artifact(path, sidecar, lambda temporary: temporary.write_bytes(content))
    assert "is refused" in refused(path)


def test_a_sidecar_that_is_cut_or_of_another_kind_is_refused(cache: Path) -> None:
    whole = sidecar_path(cache).read_text()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        sidecar_path(cache).write_text(whole[:length])
        assert "is refused" in refused(cache)
    sidecar_path(cache).write_text(whole.replace('"calibration-cache"', '"timing-cache"'))
    assert "kind" in refused(cache)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "c" * 64}, ["another model"]),
        ({"images": "c" * 64}, ["was made of other images:"]),
        ({"calibrator": "minmax"}, ["calibrator", "entropy2", "minmax"]),
        ({"tensorrt": "10.13.3"}, ["tensorrt", "8.6.0", "10.13.3"]),
        ({"model": "c" * 64, "images": "d" * 64, "tensorrt": "9"}, ["another model, other images, tensorrt"]),
    ],
)
def test_a_cache_of_something_else_is_said_and_not_used(
    cache: Path, change: dict[str, str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    key = dataclasses.replace(KEY, **change)
    capsys.readouterr()
    found = CalibrationCacheFile(cache, key)
    assert found.content == b""
    said = capsys.readouterr()
    assert said.err.startswith("warning: ")
    assert said.err.count("\n") == 1
    for part in [*says, "calibrating again", "--trust-cache"]:
        assert part in said.err
    assert cache.read_bytes() == CONTENT  # until the new one is there
    new = CONTENT.replace(b"3caa1f6d", b"3caa1f6e")
    found.save(new, 96)
    assert CalibrationCacheFile(cache, key).content == new

    CalibrationCacheFile(cache, KEY).save(CONTENT, 96)
    without = dataclasses.replace(key, images=None)
    if without == WITHOUT_IMAGES:  # any images are right
        assert CalibrationCacheFile(cache, without).content == CONTENT
    else:
        message = refused(cache, without)
        for part in ["--data", "--trust-cache", *(says if "images" not in change else ["another model, tensorrt"])]:
            assert part in message


def test_a_cache_without_a_sidecar_is_refused(cache: Path) -> None:
    sidecar_path(cache).unlink()
    for key in (KEY, WITHOUT_IMAGES):
        message = refused(cache, key)
        assert "has no sidecar" in message
        assert "--trust-cache" in message
    assert cache.read_bytes() == CONTENT


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(tmp_path / "file" / "float.cache")
    assert "that is a folder" in refused(tmp_path)
