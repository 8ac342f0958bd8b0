"""The file of ranges: it comes back as it was written, for its own checkpoint, and one line for all that is not it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qat.base.errors import UserError
from qat.base.ranges_file import (
    ActivationDistribution,
    Distributions,
    Divergence,
    RangeChoice,
    WeightDistribution,
    complete_distributions,
    ranges_path,
    read_distributions,
    write_distributions,
)

CONTENT = Distributions(
    checkpoint="abc",
    calibrator="mse",
    percentile=99.99,
    images=64,
    activations=(
        ActivationDistribution(
            quantizer="x",
            tensors=("x", "y"),
            counts=(5, *[0] * 126, 1),
            limit=2.5,
            largest=2.4999,
            amax=2.0,
            choices=(RangeChoice("max", 2.4999, 0.0, None), RangeChoice("in use", 2.0, 12.5, 41.2)),
            kl=Divergence((1.0, 2.0), (None, 0.25)),
            problem="",
        ),
        ActivationDistribution("z", ("z",), (0,) * 128, 0.0, None, None, (), None, "It was not computed."),
    ),
    weights=(WeightDistribution("conv", 0, (0.5, 0.0), (1,)), WeightDistribution("up", None, (None,), ())),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = ranges_path(tmp_path / "model.qat")
    write_distributions(found, CONTENT)
    return found


def refused(path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_distributions(path, "abc")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_it_comes_back(path: Path) -> None:
    assert path.name == "model.ranges.json"
    assert read_distributions(path, "abc") == CONTENT
    content = json.loads(path.read_text())
    assert (content["format"], content["kind"]) == (1, "ranges")
    assert list(content["activations"][0]) == [
        "quantizer",
        "tensors",
        "counts",
        "limit",
        "largest",
        "amax",
        "choices",
        "kl",
        "problem",
    ]
    assert content["activations"][0]["choices"][0] == {"method": "max", "amax": 2.4999, "clipped": 0.0, "sqnr_db": None}
    assert content["activations"][0]["kl"] == {"amax": [1.0, 2.0], "cost": [None, 0.25]}
    assert content["weights"][0] == {"label": "conv", "axis": 0, "largest": [0.5, 0.0], "dead": [1]}


def test_another_checkpoint_and_a_run_that_goes_on(path: Path) -> None:
    with pytest.raises(UserError, match="belongs to a checkpoint with SHA-256 abc, and this one has def"):
        read_distributions(path, "def")
    write_distributions(path, replace(CONTENT, checkpoint=""))
    refused(path, "belongs to a run that has not ended")


def test_it_is_completed_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete_distributions(path, "def")  # another run's
    assert read_distributions(path, "abc") == CONTENT
    write_distributions(path, replace(CONTENT, checkpoint=""))
    complete_distributions(path, "def")
    assert read_distributions(path, "def") == replace(CONTENT, checkpoint="def")
    assert capsys.readouterr().err == ""
    path.write_text("{")
    complete_distributions(path, "def")
    assert path.read_text() == "{"
    assert "cannot be read as a file of ranges" in capsys.readouterr().err
    path.unlink()
    complete_distributions(path, "def")
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as a file of ranges"),
        (b"\xff\xfe", "is no file of ranges, or is truncated"),
        (b"[" * 100_000, "cannot be read as a file of ranges"),
        (b"[]", "is not a file of ranges"),
        (b'{"format": 1, "kind": "checkpoint"}', "is not a file of ranges"),
        (b'{"format": 2, "kind": "ranges"}', "has format version 2, but this program reads 1"),
        (b'{"format": 1, "kind": "ranges"}', "lacks or misstates an entry .'checkpoint'"),
    ],
)
def test_what_is_no_file_of_ranges(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    refused(path, said)


def _put(*keys: Any) -> Callable[[Any], None]:
    """Sets the entry that all but the last of ``keys`` lead to; the last is its value."""

    def change(content: Any) -> None:
        *way, last, value = keys
        for key in way:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _put("checkpoint", None),
        _put("images", -1),
        _put("images", True),
        _put("percentile", "99"),
        _put("activations", {}),
        _put("activations", [1]),
        _put("activations", 0, "counts", [1, 2]),
        _put("activations", 0, "counts", 0, 0.5),
        _put("activations", 0, "limit", None),
        _put("activations", 0, "limit", float("nan")),
        _put("activations", 0, "limit", float("inf")),
        _put("activations", 0, "limit", 10**400),
        _put("activations", 0, "tensors", "x"),
        _put("activations", 0, "choices", [{}]),
        _put("activations", 0, "kl", "amax", [1.0]),
        _put("activations", 0, "kl", 3),
        _put("weights", 0, "axis", "0"),
        _put("weights", 0, "dead", [2]),
        _put("weights", None),
    ],
)
def test_an_entry_that_is_not_as_it_was_written(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(path, "lacks or misstates an entry|is not a JSON number|too many digits")


def test_it_is_not_there_or_cannot_be_read(path: Path) -> None:
    path.unlink()
    refused(path, "no file .*; python -m qat.train and qat.calibrate write it")
    path.mkdir()
    refused(path, "cannot read the file of ranges .* is no regular file")
