"""Where ranges of implicit INT8 come from: what is read, refused and written around a build, without a builder."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.calibration import RangeSources, range_sources
from deploy.calibration_cache_file import CacheKey, CalibrationCacheFile
from deploy.dynamic_ranges import RangeTable
from deploy.settings import BuildSettings, CalibrationSettings
from qat.base.artifact import Sidecar, TensorSpec, sidecar_path, write_artifact
from qat.base.calibration_cache import check_cache
from qat.base.errors import UserError

CONTENT = b"TRT-8600-EntropyCalibration2\ninput: 3f800000\nconv1: 40000000\ndead: 0\n"
TOOLKIT: Any = SimpleNamespace(calibrator_class=lambda name: object, version="8.6.0")  # cannot parse a network
KEY = CacheKey("a" * 64, "b" * 64, "entropy2", "8.6.0")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "float.cache"
    CalibrationCacheFile(path, KEY).save(CONTENT, 96)
    return path


def sources(ranges: Path | None = None, **calibration: Any) -> RangeSources:
    settings = BuildSettings(precision="int8")
    return range_sources(TOOLKIT, Path("m.onnx"), None, "a" * 64, settings, CalibrationSettings(**calibration), ranges)


def test_a_cache_alone_is_used_for_any_images(cache: Path) -> None:
    found = sources(calibration_cache=cache)
    assert found.by_hand is None
    assert found.calibration is not None
    assert found.calibration.cache == CONTENT
    entry = found.to_json()
    assert entry is not None
    assert (entry["from_cache"], entry["images"], entry["calibrator"]) == (True, None, "entropy2")
    with found.saved():
        pass  # nothing was calibrated
    assert cache.read_bytes() == CONTENT


def test_what_a_build_has_calibrated_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new.cache"
    with pytest.raises(UserError, match="give --data"):
        sources(calibration_cache=path)
    calibration: Any = SimpleNamespace(calibrated=True, cache=CONTENT, images=96)
    found = RangeSources(None, calibration, CalibrationCacheFile(path, KEY))
    with pytest.raises(UserError, match="the build failed"), found.saved():
        raise UserError("the build failed")  # what was calibrated is kept all the same
    assert path.read_bytes() == CONTENT
    assert sources(calibration_cache=path).calibration is not None


def test_a_cache_of_another_calibrator_is_refused_without_images(cache: Path) -> None:
    with pytest.raises(UserError, match=r"calibrator entropy2 instead of legacy, quantile 0\.5") as caught:
        sources(calibration_cache=cache, calibrator="legacy", quantile=0.5)
    assert "--trust-cache" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trusted_cache_is_used_whatever_it_was_made_of(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar_path(cache).unlink()
    found = sources(calibration_cache=cache, trust_cache=True, calibrator="legacy")
    assert found.calibration is None
    assert found.by_hand is not None
    assert found.by_hand.amax == {"input": 127.0, "conv1": 254.0}
    assert found.by_hand.zero == ("dead",)
    assert "used as it is" in capsys.readouterr().out


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of two layers, which nobody need parse."""
    network = SimpleNamespace(inputs=(TensorSpec("input", (1, 3, 8, 8), "float32"),), makers={"conv1": 0, "dead": 0})
    monkeypatch.setattr("deploy.calibration.open_network", lambda *_: nullcontext(network))


def test_ranges_for_tensors_that_the_network_lacks_are_warned_of(
    parsed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand = tmp_path / "ranges.csv"
    by_hand.write_text("tensor,min,max\nconv1,-1,2\nimput,-1,1\nother,0,1\n")
    assert sources(by_hand).by_hand is not None
    said = " ".join("".join(capsys.readouterr()).split())
    assert "has ranges for 'imput' (did you mean input?) and 1 more tensors, which the network does not have" in said
    by_hand.write_text("tensor,min,max\nconv1,-1,2\n")
    sources(by_hand)
    assert "does not have" not in "".join(capsys.readouterr())


def test_ranges_by_hand_come_before_a_trusted_cache(parsed: None, cache: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "ranges.csv"
    by_hand.write_text("tensor,min,max\nconv1,-1,2\ndead,-3,3\n")
    found = sources(by_hand, calibration_cache=cache, trust_cache=True).by_hand
    assert found is not None
    assert found.amax == {"input": 127.0, "conv1": 2.0, "dead": 3.0}
    assert found.zero == ()


@pytest.mark.parametrize("data", [None, "images"])
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path, data: str | None) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "float.cache"):
        with pytest.raises(UserError, match="cannot write") as caught:
            sources(calibration_cache=path, data=data)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nothing_asked_for_is_nothing() -> None:
    assert sources() == RangeSources()
    assert sources().to_json() is None


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"calibrator": "minmax"}, True),
        ({"calibrator": "entropy", "calibrate_before_fusion": True}, True),
        ({"calibrate_before_fusion": True}, False),  # entropy2 always does
        ({"quantile": 0.5, "regression_cutoff": 0.5}, False),  # of the legacy calibrator only
        ({"images": 7, "mean": (0.5,), "std": (0.5,)}, False),  # are in the hash of the images
    ],
)
def test_what_the_name_of_a_method_tells_apart(change: dict[str, Any], other: bool) -> None:
    plain = CalibrationSettings(data="images")
    assert (dataclasses.replace(plain, **change).method != plain.method) is other
    legacy = dataclasses.replace(plain, calibrator="legacy")
    changes: list[dict[str, Any]] = [{}, {"quantile": 0.9999999}, {"quantile": 1.0}, {"regression_cutoff": 0.5}]
    methods = {dataclasses.replace(legacy, **one).method for one in changes}
    assert len(methods) == len(changes)


def test_a_cache_as_ranges_by_hand_is_checked_against_its_sidecar(tmp_path: Path) -> None:
    path, content = tmp_path / "c.cache", b"TRT-8600-EntropyCalibration2\ninput: 3d18b082\n"
    sidecar = Sidecar(kind="calibration-cache", details={"model": "abc1"})
    write_artifact(path, sidecar, lambda temporary: temporary.write_bytes(content))
    check_cache(path, "abc1")
    with pytest.raises(UserError, match="made of another model"):
        check_cache(path, "other")
    path.write_bytes(content.replace(b"3d", b"3e"))
    with pytest.raises(UserError, match="SHA-256"):
        check_cache(path, "abc1")


def test_the_library_takes_paths_as_text() -> None:
    assert CalibrationSettings(calibration_cache="c.cache").calibration_cache == Path("c.cache")  # type: ignore[arg-type]


def test_ranges_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"input": [0, 0]}')
    with pytest.raises(UserError, match="every range is 0"):
        RangeTable.read(tmp_path / "r.json")
