"""JSON files of ours: what is not as it was written is one line that names the file and the entry."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from qat.base import own_json
from qat.base.artifact import Sidecar, read_sidecar, write_artifact
from qat.base.errors import UserError
from qat.base.schema.entries import Entries
from qat.base.schema.leaves import Count, Number


@dataclass(frozen=True)
class Inner:
    count: Count
    value: Number | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    inner: tuple[Inner, ...] = ()
    free: dict[str, Any] = field(default_factory=dict)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        own_json.read(path, Outer, "outer file", "make it again")
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    for part in (str(path), *parts):
        assert part in line, line


def test_a_file_is_what_the_dataclass_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"name": "é", "inner": [{"count": 3, "value": 2}], "of_a_newer_version": [1]}')
    assert own_json.read(path, Outer, "outer file", "") == Outer("é", (Inner(3, 2.0),))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `name`"),
        ('{"name": 3}', "name: Expected `str`, got `int`"),
        ('{"name": null}', "name: Expected `str`, got `null`"),
        ('{"name": "a", "name": "b"}', "'name' comes twice"),
        ('{"name": "a", "free": {"x": 1, "x": 2}}', "'x' comes twice"),
        ('{"name": "a", "inner": [{"count": -1}]}', "inner[0].count: Expected `int` >= 0"),
        ('{"name": "a", "inner": [{"count": true}]}', "inner[0].count: Expected `int`, got `bool`"),
        ('{"name": "a", "inner": [{"count": 1.0e3000}]}', "is no finite number"),
        ('{"name": "a", "inner": [{"count": 1, "value": NaN}]}', "NaN is not a JSON number"),
        ('{"name": "a", "inner": [{"count": 1, "value": -Infinity}]}', "-Infinity is not a JSON number"),
        ('{"name": "a", "inner": [{"count": 1, "value": 1e300}]}', "inner[0].value: Expected `float` <= "),
        ('{"name": "a", "inner": [{"count": 1' + "0" * 5000 + "}]}", "has too many digits"),
        ('{"name": "a\\u0000"}', "a text has \\u0000"),
        ('{"name": "\\ud800"}', "half a letter"),
        ('{"name": "a", "free": {"x": ' + "[" * 10_000 + "]" * 10_000 + "}}", "nests more than 32 deep"),
        ("[" * 10_000_000, "nests more than 32 deep"),
        ('{"name": "a", "free": ' + '{"x":' * 40 + "1" + "}" * 41, "nests more than 32 deep"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    refused(path, says, "make it again")


def test_letters_beyond_the_first_plane_and_brackets_in_texts_are_letters(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"name": "\U0001f600 " + "[" * 100 + '\\" 12345678901234567890123'}))
    assert own_json.read(path, Outer, "outer file", "").name.startswith("\U0001f600 [[")


def test_large_files_devices_folders_and_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    refused(path, "has more than 32 MB")
    path.write_bytes(b'{"name": "\xff"}')
    refused(path, "or is truncated", "utf-8")
    path.unlink()
    refused(path, "is not there")
    path.mkdir()
    refused(path, "is no regular file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "is no regular file")


def test_an_entry_that_a_command_needs_and_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    write_artifact(path, Sidecar("onnx"), lambda file: file.write_bytes(b"x"))
    details = read_sidecar(path, "onnx").details
    with pytest.raises(UserError, match=r"a\.onnx\.json lacks or misstates an entry \(details\.opset: it is missing\)"):
        details["opset"]
    assert details.get("opset") is None
    assert isinstance(details, Entries)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot record that.*figures\.nodes: Expected `int`, got `str`"):
        write_artifact(tmp_path / "a.onnx", Sidecar("onnx", figures={"nodes": "many"}), lambda f: f.write_bytes(b"x"))
    assert list(tmp_path.iterdir()) == []


def test_the_forms_are_those_of_the_programs_own_classes() -> None:
    from deploy.builder import Repetition
    from deploy.cuda import Device
    from deploy.engine_layers import EngineLayer
    from deploy.kernel_trace import Kernel
    from deploy.layer_types import LayerType
    from deploy.measure import Latency
    from deploy.precision_audit import PrecisionFinding
    from deploy.settings import BuildSettings, Profile
    from qat.base.output_agreement import OutputAgreement
    from qat.base.schema import engines, networks
    from qat.data.preprocessing import Preprocessing
    from qat.graph.network_record import RecordedOp
    from qat.models import ModelCode, ModelSpec
    from qat.rules.placement import Decision, Placement, QuantizedRead, QuantizedTensor

    def names(kind: Any) -> set[str]:
        return {one.name for one in fields(kind)}

    same: list[tuple[Any, Any, set[str]]] = [
        (BuildSettings, engines.BuildEntry, set()),
        (Profile, engines.ProfileEntry, set()),
        (EngineLayer, engines.LayerEntry, {"precision", "milliseconds"}),
        (PrecisionFinding, engines.FindingEntry, set()),
        (Kernel, engines.KernelEntry, set()),
        (LayerType, engines.LayerTypeEntry, set()),
        (Repetition, engines.RepetitionEntry, set()),
        (Device, engines.DeviceEntry, set()),
        (Latency, engines.LatencyEntry, set()),
        (Preprocessing, networks.PreprocessingEntry, {"source_size", "input_scale"}),
        (Placement, networks.PlacementEntry, set()),
        (Decision, networks.DecisionEntry, set()),
        (QuantizedTensor, networks.TensorEntry, set()),
        (QuantizedRead, networks.ReadEntry, set()),
        (RecordedOp, networks.OpEntry, set()),
        (ModelSpec, networks.ModelEntry, set()),
        (ModelCode, networks.CodeEntry, set()),
        (OutputAgreement, networks.OutputEntry, set()),
    ]
    for program, form, more in same:
        assert names(form) == names(program) | more, program
