"""What is certainly wrong with a file that is to be an ONNX model: found without a parser."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qat.base.onnx_file import flaw


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """All fields that a model can have."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="own")], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("own", "F", ["a"], ["b"], body, opsets[:1])
    made = helper.make_model(graph, opset_imports=opsets, functions=[function], producer_name="p", doc_string="d")
    made.domain, made.model_version, made.producer_version = "d", 300, "1"
    helper.set_model_props(made, {"key": "value"})
    onnx.save(made, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_a_whole_file_has_no_flaw(model: Path) -> None:
    assert flaw(model) == ""


def test_a_file_that_ends_in_a_field_is_truncated_and_in_front_of_one_it_is_not(model: Path) -> None:
    whole = model.read_bytes()
    found = []
    for size in range(1, len(whole)):
        model.write_bytes(whole[:size])
        found.append(flaw(model))
    assert {message.partition(":")[0] for message in found} == {"is truncated", "holds no network", ""}
    for size, message in enumerate(found, 1):
        if message.startswith("is truncated"):
            least = int(message.split()[-3])
            assert size < least <= len(whole)
    assert found.count("") < 6  # the ends of the fields behind the graph


def test_bytes_that_are_no_field_behind_fields_are_damage(model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content + bytes(9))
    assert flaw(model) == f"is damaged: no field of a model begins at byte {len(content)}"


def test_numbers_that_do_not_end_and_lengths_beyond_any_file(model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content + b"\x3a" + b"\xff" * 10_000)
    assert flaw(model) == f"is damaged: the field at byte {len(content)} has no length"
    model.write_bytes(content + b"\x3a" + b"\xff" * 9 + b"\x01")
    assert flaw(model).startswith(f"is truncated: it has {len(content) + 11} bytes")
    model.write_bytes(b"\xff" * 10_000)
    assert flaw(model) == "is not an ONNX file"
