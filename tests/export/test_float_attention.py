"""Attention in float ONNX files, as both of PyTorch's exporters write it: its shapes, its parts, its constants."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from attention_forms import Attention, Odd
from onnx import TensorProto, helper
from torch import nn
from torchvision.models import SwinTransformer

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.float_network import read_float_network
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.names import SPLIT
from export.projection_parts import Part, are_whole, part_of
from export.session import run, session
from export.shapes import find_shapes

IMAGES = np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32)


def exported(model: nn.Module, path: Path, *, dynamo: bool) -> Path:
    """A float file with a dynamic batch."""
    options: dict[str, object] = {"dynamic_axes": {"input": {0: "batch"}}, "opset_version": 17}
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "opset_version": 20, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (torch.from_numpy(IMAGES),),
            path,
            dynamo=dynamo,
            input_names=["input"],
            **options,  # type: ignore[arg-type]
        )
    return path


def network(form: str) -> nn.Module:
    torch.manual_seed(0)
    if form == "windows":
        return SwinTransformer([4, 4], 32, [2], [2], [2, 2], num_classes=10)
    return Attention(form)


@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    "form", ["module", *(pytest.param(form, marks=pytest.mark.slow) for form in ("unbind", "windows"))]
)
def test_it_is_int8_throughout_and_answers_the_same(form: str, dynamo: bool, tmp_path: Path) -> None:
    path, output = exported(network(form), tmp_path / "f.onnx", dynamo=dynamo), tmp_path / "q.onnx"
    sidecar = quantize_onnx(path, output, inputs=IMAGES, calibrator="max")
    decisions = sidecar.details["placement"]["decisions"]
    assert all(one["quantized"] for one in decisions if one["kind"] in ("matrix_product", "linear"))
    assert sidecar.figures["parity"]["sqnr_db"] > 25
    assert lint_onnx(output) == []
    built = build(find_toolkit("tensorrt-rtx"), output, BuildSettings(capabilities=("8.9",)))
    assert not built.audit.broken
    in_int8, of = built.audit.count("matrix product")
    assert in_int8 == of
    assert any(layer.is_attention for layer in built.audit.layers)


@pytest.mark.parametrize(
    ("form", "dynamo"),
    [
        ("unbind", True),
        ("windows", False),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("unbind", False), ("windows", True))),
    ],
)
def test_nothing_that_is_rewritten_changes_the_answers(form: str, dynamo: bool, tmp_path: Path) -> None:
    path = exported(network(form), tmp_path / "f.onnx", dynamo=dynamo)
    (expected,) = run(session(path), IMAGES).values()
    model = read_float_network(path)
    unknown = [
        value
        for node in model.graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT
        and (value.shape is None or sum(not isinstance(extent, int) for extent in value.shape.dims) > 1)
    ]
    assert unknown == []
    assert model.metadata_props[SPLIT].count("qkv") + model.metadata_props[SPLIT].count("MatMul")
    ir.save(model, path)
    (found,) = run(session(path), IMAGES).values()
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("form", ["flat", "windows", "behind", "similarity"])
def test_odd_ones_answer_the_same_for_any_batch(form: str, static: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = np.random.default_rng(0).standard_normal((6, 16, 64)).astype(np.float32)
    path, output = tmp_path / "f.onnx", tmp_path / "q.onnx"
    batch = 3 if static else 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = None if static else {"input": {0: "batch"}}
        x = torch.from_numpy(given[:batch])
        torch.onnx.export(Odd(form).eval(), (x,), path, dynamo=False, input_names=["input"], dynamic_axes=axes)
    quantize_onnx(path, output, inputs=given[:batch], calibrator="max")
    assert [one.name for one in session(output).get_outputs()] == [one.name for one in session(path).get_outputs()]
    split = ir.load(output).metadata_props.get(SPLIT, "[]")
    assert (split == "[]") is (form == "similarity")
    for count in (3,) if static else (1, 2, 5):
        (expected,), (found,) = (run(session(one), given[:count]).values() for one in (path, output))
        assert found.shape == expected.shape
        assert np.square(found - expected).sum() < 0.01 * np.square(expected).sum()


def test_shapes_that_depend_on_values_are_not_stated() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Transpose", ["where"], ["index"]),
        helper.make_node("GatherND", ["x", "index"], ["picked"]),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "zeros")]
    graph = helper.make_graph(nodes, "picks", ends[:1], [*ends[1:], helper.make_empty_tensor_value_info("picked")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    find_shapes(model)
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    picked = shapes["picked"]
    assert picked is None or not isinstance(picked.dims[0], int)
    assert shapes["zeros"] is not None
    assert shapes["zeros"].dims[1] == 4


SHAPE = (2, 5, 24)  # images, tokens, 3 parts of 2 heads of 4


def numbered() -> np.ndarray:
    return np.arange(2 * 5 * 24).reshape(SHAPE)


def test_a_part_is_told_by_where_its_values_come_from() -> None:
    parts = numbered().reshape(2, 5, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    found = [part_of(part, SHAPE) for part in parts]
    assert found[1] == Part(range(8, 16), (2, 5, 2, 4), (0, 2, 1, 3))
    assert are_whole([part for part in found if part], 24)
    rows = np.arange(2 * 5 * 8).reshape(2, 5, 8)  # a layer of these features alone
    assert np.array_equal(rows.reshape(2, 5, 2, 4).transpose(0, 2, 1, 3) * 0 + parts[1], parts[1])
    key = part_of(parts[1].swapaxes(-1, -2), SHAPE)
    assert key is not None
    assert key.order == (0, 2, 3, 1)


@pytest.mark.parametrize(
    "moved",
    [
        numbered()[:, :3],
        numbered()[..., ::2],
        numbered()[:1, ..., :8],
        numbered().reshape(-1),
        numbered()[..., [1, 0, 2]],
    ],
    ids=["some rows", "every other feature", "some images", "flat", "other order"],
)
def test_other_parts_are_none(moved: np.ndarray) -> None:
    assert part_of(moved, SHAPE) is None


def test_what_grows_with_the_batch_is_told_by_two_batches() -> None:
    one, two = Part(range(8), (2, 5, 8), (0, 1, 2)), Part(range(8), (3, 5, 8), (0, 1, 2))
    assert one.for_any_batch(two) == Part(range(8), (-1, 5, 8), (0, 1, 2))
    assert one.for_any_batch(one) == one
    assert one.for_any_batch(Part(range(8), (3, 6, 8), (0, 1, 2))) is None
    assert one.for_any_batch(Part(range(8), (3, 5, 8), (1, 0, 2))) is None


def test_parts_with_a_gap_or_an_overlap_are_not_whole() -> None:
    one, two, three = (Part(range(a, a + 8), (-1, 8), (0, 1)) for a in (0, 8, 16))
    assert are_whole([one, two, three], 24)
    assert not are_whole([one, three], 24)
    assert not are_whole([one, two], 24)
    assert not are_whole([one, one, two, three], 24)
    assert not are_whole([Part(range(24), (-1, 24), (0, 1))], 24)
