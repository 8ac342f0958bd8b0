"""Attention whose second product has the softmax on the right, v @ softmax^T: made the one that the rules know."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.emit import emit
from export.float_network import read_float_network
from export.fold import fold
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import run, session
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.network import Network
from qat.graph.tracing import network_of, trace
from qat.rules.attention_rules import attentions

SHAPE, HEADS = (64, 4, 4), 2


def turn(x: Tensor) -> Tensor:
    """The matrices of x transposed."""
    return x.transpose(-2, -1)


SECOND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transpose": lambda v, weights: v @ weights.transpose(-2, -1),
    "positive": lambda v, weights: torch.matmul(v, torch.transpose(weights, weights.ndim - 1, weights.ndim - 2)),
    "mT": lambda v, weights: v @ weights.mT,
    "permute": lambda v, weights: v @ weights.permute(*range(weights.ndim - 2), weights.ndim - 1, weights.ndim - 2),
    "negative": lambda v, weights: v.matmul(torch.permute(weights, (*range(weights.ndim - 2), -1, -2))),
    "movedim": lambda v, weights: v @ weights.movedim(-1, -2),
    "swapaxes": lambda v, weights: v @ weights.swapaxes(-1, -2),
    "bmm": lambda v, weights: torch.bmm(v, weights.mT),
    "einsum": lambda v, weights: torch.einsum(("bdj,bij->bdi", "bhdj,bhij->bhdi")[v.ndim - 3], v, weights),
    "back": lambda v, weights: turn(turn(turn(turn(v).contiguous()) @ turn(weights)).contiguous()).contiguous(),
}


class Mirrored(nn.Module):
    """An attention over the pixels of [N, C, 4, 4], whose q, k and v are [N, heads, d, pixels] or [N, d, pixels].

    Args:
        second: the second product, of v [..., d, pixels] and the softmax [..., pixels, pixels].
        heads: 0 for none, and three axes.
        scaled: "q", or "late" for the scores.
        width: of a head of q and k; v has 32.
        dropout: of the softmax.
        behind: what reads the answer of the second product: "layer", "sum", "both", or "output".
    """

    def __init__(
        self,
        second: Callable[[Tensor, Tensor], Tensor] = SECOND["transpose"],
        heads: int = HEADS,
        scaled: str = "late",
        width: int = 32,
        dropout: float = 0.0,
        behind: str = "layer",
    ) -> None:
        super().__init__()
        self.behind = behind
        self.second, self.heads, self.scaled, self.width = second, heads, scaled, width
        self.q, self.k = (nn.Conv2d(64, width * (heads or 1), 1) for _ in range(2))
        self.v = nn.Conv2d(64, 32 * (heads or 1), 1)
        self.drop, self.out = nn.Dropout(dropout), nn.Conv2d(32 * (heads or 1), 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 64, 4, 4] -> the same, or what the second product answers."""
        batch, _, height, width = x.shape
        parts = (batch, self.heads) if self.heads else (batch,)
        q, k, v = (layer(x).view(*parts, -1, height * width) for layer in (self.q, self.k, self.v))
        scale = self.width**-0.5
        scores = turn(q * scale) @ k if self.scaled == "q" else (turn(q) @ k) * scale
        mixed = self.second(v, self.drop(scores.softmax(-1)))
        if self.behind == "output":
            return mixed
        image = mixed.view(batch, -1, height, width)
        if self.behind == "sum":
            return x + image
        return (x if self.behind == "layer" else image) + self.out(image)


def network(form: str = "transpose", **options: object) -> Mirrored:
    torch.manual_seed(0)
    return Mirrored(SECOND[form], **options).eval()  # type: ignore[arg-type]


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def is_attention(view: Network) -> bool:
    """Whether both products, of two, are those of one attention."""
    products = [op.name for op in view if op.kind == "matrix_product"]
    return len(products) == 2 and attentions(view).keys() == set(products)


VARIANTS = [(form, heads) for form in SECOND for heads in (0, HEADS) if form != "bmm" or not heads]


@pytest.mark.parametrize("scaled", ["late", "q"])
@pytest.mark.parametrize(("form", "heads"), VARIANTS)
def test_it_is_an_attention_however_it_is_spelt(form: str, heads: int, scaled: str) -> None:
    model = network(form, heads=heads, scaled=scaled)
    prepared = prepare(model, input_shape=SHAPE)
    assert is_attention(network_of(prepared))
    placement = placement_of(prepared)
    assert [one.quantized for one in placement.decisions_about("matrix_product")] == [True, True]
    view = network_of(prepared)
    _, mixed = (op for op in view if op.kind == "matrix_product")
    weights, values = (view[name] for name in mixed.inputs)
    assert (weights.shape or ())[-2:] == (16, 16)
    assert (values.shape or ())[-2:] == (16, 32)


@pytest.mark.parametrize(("form", "heads"), VARIANTS)
def test_answers_and_gradients_are_those_of_the_model(form: str, heads: int) -> None:
    model = network(form, heads=heads, dropout=0.3)
    traced = trace(model, SHAPE)
    assert is_attention(network_of(traced))
    for training in (False, True):
        answers, gradients = [], []
        for one in (copy.deepcopy(model), copy.deepcopy(traced)):
            torch.manual_seed(2)
            answers.append(one.train(training)(images()))
            answers[-1].square().sum().backward()
            gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
        torch.testing.assert_close(answers[1], answers[0])
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():  # the bias of k has none: a softmax takes no notice of it
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5)


ALONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "not transposed": lambda v, weights: v @ weights,
    "transposed twice": lambda v, weights: v @ weights.mT.mT,
    "other axes": lambda v, weights: v @ weights.permute(0, 1, 2, 3),
    "no softmax": lambda v, weights: v @ turn(weights + 1),
    "first": lambda v, weights: turn(weights @ turn(v)).contiguous(),
}


@pytest.mark.parametrize("form", ALONE)
def test_others_are_left_alone(form: str) -> None:
    model = Mirrored(ALONE[form], width=16).eval()  # a scale that is a power of 2, wherever it stands
    traced = trace(model, SHAPE)
    products = [node for node in traced.graph.nodes if getattr(node.target, "__name__", "") == "matmul"]
    before = [getattr(one.target, "__name__", one.target) for one in products[1].all_input_nodes]
    expected = {
        "not transposed": ["view", "dropout"],
        "transposed twice": ["view", "getattr"],
        "other axes": ["view", "permute"],
        "no softmax": ["view", "transpose"],
        "first": ["dropout", "transpose"],
    }[form]
    assert [str(name).removesuffix("drop") or "dropout" for name in before] == expected
    assert is_attention(network_of(traced)) is (form == "first")
    assert torch.equal(traced.eval()(images()), model(images()))


def test_the_condition_that_fails_is_named() -> None:
    for model, reason in (
        (network(width=24), "heads of 24 values: 16, 32 and 64 are fused"),
        (Wide(), "heads of 48 values: 16, 32 and 64 are fused"),
        (network(width=16), "heads of 16 values in q and k, and of 32 in v: only equal ones are fused"),
    ):
        decisions = placement_of(prepare(model, input_shape=SHAPE)).decisions_about("matrix_product")
        assert [(one.quantized, one.reason) for one in decisions] == [(False, reason)] * 2
    large = prepare(network(), input_shape=(64, 24, 24))
    (reason,) = {one.reason for one in placement_of(large).decisions_about("matrix_product")}
    assert reason == "576 tokens: at most 512 are fused"


class Wide(Mirrored):
    """Whose v has 48 values a head."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Conv2d(64, 48 * HEADS, 1), nn.Conv2d(48 * HEADS, 64, 1)


def sqnr(expected: Tensor, found: Tensor) -> float:
    """In dB."""
    return float(10 * (expected.square().sum() / (expected - found).square().sum()).log10())


@pytest.mark.parametrize(
    ("form", "heads", "behind"),
    [
        *(("transpose", HEADS, behind) for behind in ("layer", "sum", "both", "output")),
        *(("mT", 0, "layer"), ("back", HEADS, "both"), ("einsum", HEADS, "layer")),
    ],
)
def test_the_engine_computes_it_in_int8_and_answers_as_pytorch(
    form: str, heads: int, behind: str, tmp_path: Path
) -> None:
    model, path = network(form, heads=heads, behind=behind, width=32), tmp_path / "m.onnx"
    prepared = prepare(model, input_shape=SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [images()], "max")
        expected = prepared(images())
        assert sqnr(model(images()), expected) > 30
    ir.save(emit(fold(prepared)[0], images(2), {}), path)
    assert lint_onnx(path) == []
    (found,) = session(path).run(None, {"input": images().numpy()})
    assert sqnr(expected, torch.from_numpy(found)) > 80
    one_kernel = _fuses(path)
    if heads and behind in ("layer", "both"):  # an axis of heads, and INT8 behind: what TensorRT-RTX 1.7 fuses
        assert one_kernel


def _fuses(path: Path) -> bool:
    """Whether the attention, which is INT8 in the engine, is one kernel."""
    built = build(find_toolkit("tensorrt-rtx"), path, BuildSettings(capabilities=("8.9",)))
    assert not built.audit.broken
    assert built.audit.count("matrix product") == (2, 2)
    return any(layer.is_attention for layer in built.audit.layers)


def exported(model: nn.Module, path: Path) -> Path:
    """A float file with a dynamic batch, with one operator for each of PyTorch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (images(),),
            path,
            dynamo=False,
            do_constant_folding=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
            opset_version=17,
        )
    return path


@pytest.mark.parametrize(("form", "heads"), [("transpose", HEADS), ("permute", 0), ("back", HEADS), ("einsum", HEADS)])
def test_a_float_onnx_file_is_placed_alike(form: str, heads: int, tmp_path: Path) -> None:
    path, output = exported(network(form, heads=heads), tmp_path / "f.onnx"), tmp_path / "q.onnx"
    given = images().numpy()
    (expected,) = run(session(path), given).values()
    model = read_float_network(path)
    assert not any(node.op_type == "Einsum" for node in model.graph)
    assert all(value.shape is not None and value.dtype is not None for node in model.graph for value in node.outputs)
    ir.save(model, tmp_path / "read.onnx")
    (found,) = run(session(tmp_path / "read.onnx"), given).values()
    assert np.abs(found - expected).max() < 1e-5
    sidecar = quantize_onnx(path, output, inputs=given, calibrator="max")
    decisions = [one for one in sidecar.details["placement"]["decisions"] if one["kind"] == "matrix_product"]
    assert [one["rule"] for one in decisions] == ["attention_product"] * 2
    assert [(one["quantized"], one["reason"]) for one in decisions] == [(True, "")] * 2
    assert lint_onnx(output) == []
    for count in (1, 3):
        (expected,), (found,) = (run(session(one), given[:count]).values() for one in (path, output))
        assert sqnr(torch.from_numpy(expected), torch.from_numpy(found)) > 30
    _fuses(output)


@pytest.mark.parametrize("form", ["not transposed", "no softmax", "first"])
def test_others_are_left_alone_in_onnx(form: str, tmp_path: Path) -> None:
    path = exported(Mirrored(ALONE[form]).eval(), tmp_path / "f.onnx")
    count = sum(node.op_type == "Transpose" for node in ir.load(path).graph)
    model = read_float_network(path)
    assert sum(node.op_type == "Transpose" for node in model.graph) == count
    (second,) = (node for node in model.graph if node.op_type == "MatMul" and _reads_softmax(node, form))
    assert second.outputs[0].shape is not None


def _reads_softmax(node: ir.Node, form: str) -> bool:
    makers = [None if value is None else value.producer() for value in node.inputs]
    kinds = [None if maker is None else maker.op_type for maker in makers]
    return kinds == {"not transposed": ["Reshape", "Softmax"], "no softmax": ["Reshape", "Transpose"]}.get(
        form, ["Softmax", "Transpose"]
    )
