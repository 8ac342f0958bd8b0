"""Attention: known however it is spelt, quantized on all four factors where TensorRT fuses it, else left as it was."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from attention_forms import FORMS, Attention, Odd
from torch import Tensor, fx, nn

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.emit import emit
from export.fold import fold, fold_float
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import session
from export.split_projections import split_projections
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import activation_quantizers, copy_for_evaluation, placement_of, prepare
from qat.fake_quantize.weight_ranges import learn_ranges
from qat.graph.tracing import network_of
from qat.rules.placement import Decision, Placement

SHAPE = (3, 64, 64)


def quick(*forms: str) -> list[Any]:
    """Three that differ, and the others as slow tests."""
    return [
        form if form in ("unbind", "bias", "module") else pytest.param(form, marks=pytest.mark.slow) for form in forms
    ]


def network(form: str = "fused", **options: float) -> Attention:
    torch.manual_seed(0)
    return Attention(form, **options).eval()  # type: ignore[arg-type]


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def sqnr(expected: Tensor, found: Tensor) -> float:
    """In dB."""
    return 10 * math.log10(float(expected.square().sum() / (expected - found).square().sum()))


def calibrated(model: nn.Module) -> fx.GraphModule:
    prepared = prepare(model, input_shape=SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [images()], "max")
    return prepared


def products(prepared: fx.GraphModule) -> tuple[Decision, ...]:
    return placement_of(prepared).decisions_about("matrix_product")


def targets(model: fx.GraphModule) -> Counter[str]:
    return Counter(getattr(node.target, "__name__", str(node.target)) for node in model.graph.nodes)


@pytest.mark.parametrize("form", FORMS)
def test_all_four_factors_are_quantized_however_it_is_spelt(form: str) -> None:
    model = network(form)
    prepared = calibrated(model)
    first, second = products(prepared)
    assert first.quantized
    assert second.quantized
    view = network_of(prepared)
    factors = [*view[first.op].inputs, *view[second.op].inputs]
    by_tensor = {tensor.tensor: tensor for tensor in placement_of(prepared).tensors}
    assert len({by_tensor[factor].quantizer for factor in factors}) == 4  # k and v, parts of one tensor, too
    query, key = (view[name] for name in view[first.op].inputs)
    assert query.shape is not None
    assert key.shape is not None
    assert query.shape[-1] == key.shape[-2] == 32  # k is transposed before it is quantized
    with torch.no_grad():
        assert sqnr(model(images()), prepared(images())) > 25


@pytest.mark.parametrize("form", quick(*FORMS))
def test_sums_and_what_a_normalization_reads_stay_in_float(form: str) -> None:
    placement = placement_of(prepare(network(form), input_shape=SHAPE))
    read = {tensor.tensor for tensor in placement.tensors}
    assert not any(one.quantized for one in placement.decisions_about("add"))
    assert not any(name == "transpose" or name.startswith("add") for name in read)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (network("fused", head=48), "heads of 48 values: 16, 32 and 64 are fused"),
        (network("fused", tokens=32), "1024 tokens: at most 512 are fused"),
        (network("class"), "one query: TensorRT multiplies vectors in float"),
        (network("read"), "something else reads the softmax too"),
    ],
    ids=["heads", "tokens", "class", "read"],
)
def test_the_condition_that_fails_is_named(model: nn.Module, reason: str) -> None:
    prepared = prepare(model, input_shape=SHAPE)
    assert [one.quantized for one in products(prepared)] == [False, False]
    assert products(prepared)[0].reason == reason


def test_cross_attention_is_known() -> None:
    assert all(one.quantized for one in products(prepare(network("cross"), input_shape=SHAPE)))


@pytest.mark.parametrize("form", ["fused", "bias", "module"])
def test_in_float_it_is_one_function_again(form: str) -> None:
    model = network(form)
    kept = prepare(model, input_shape=SHAPE, keep_float=["*matmul*"])
    assert targets(kept)["scaled_dot_product_attention"] == 1
    assert targets(kept)["softmax"] == targets(kept)["matmul"] == 0
    assert targets(prepare(model, input_shape=SHAPE))["scaled_dot_product_attention"] == 0
    with torch.no_grad():
        assert torch.allclose(copy_for_evaluation(kept, quantized=False)(images()), model(images()), atol=1e-5)


def test_attention_that_spreads_over_many_tokens_is_as_exact_as_any() -> None:
    model = network("fused", tokens=16)  # 16 x 16
    with torch.no_grad():
        for part in (model.q, model.k):
            part.weight.mul_(0.1)  # so that each of 256 weights is near 1/256
    prepared = calibrated(model)
    with torch.no_grad():
        assert sqnr(model(images()), prepared(images())) > 25
    (softmax,) = (name for name in activation_quantizers(prepared) if "softmax" in name)
    assert activation_quantizers(prepared)[softmax].amax < 0.02
    learn_ranges(prepared)
    assert isinstance(activation_quantizers(prepared)[softmax].amax, nn.Parameter)


def test_dropout_is_in_training_alone_and_gradients_reach_q_k_and_v() -> None:
    model = network("fused", dropout=0.5).train()
    prepared = calibrated(model)
    assert all(one.quantized for one in products(prepared))
    prepared.train()
    torch.manual_seed(0)
    one, other = prepared(images()), prepared(images())
    assert not torch.equal(one, other)
    one.sum().backward()
    for name in ("q", "k", "v"):
        gradient = prepared.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
    prepared.eval()
    assert torch.equal(prepared(images()), prepared(images()))


def test_a_placement_is_read_as_it_was_written() -> None:
    placement = placement_of(prepare(network(), input_shape=SHAPE))
    assert Placement.from_json(placement.to_json()) == placement


@pytest.mark.parametrize("form", quick(*FORMS, "cross"))
def test_the_engine_computes_it_in_int8_and_answers_as_pytorch(form: str, tmp_path: Path) -> None:
    prepared = calibrated(network(form))
    folded, _ = fold(prepared)
    cut = split_projections(folded, prepared.meta["inputs"])
    assert bool(cut) is (form in ("chunk", "index", "unbind", "module"))
    exported = emit(folded, images(2), {})
    kinds = Counter(node.op_type for node in exported.graph)
    assert not kinds["CastLike"] + kinds["Einsum"] + kinds["Shape"]
    path = tmp_path / "m.onnx"
    ir.save(exported, path)
    assert lint_onnx(path) == []
    with torch.no_grad():
        expected = prepared(images())
    (found,) = session(path).run(None, {"input": images().numpy()})
    assert sqnr(expected, torch.from_numpy(found)) > 80
    built = build(find_toolkit("tensorrt-rtx"), path, BuildSettings(capabilities=("8.9",)))
    assert not built.audit.broken
    in_int8, of = built.audit.count("matrix product")
    assert in_int8 == of > 4
    assert sum(layer.is_attention for layer in built.audit.layers) == 1


def test_one_query_is_not_declared_and_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ir.save(emit(fold(calibrated(network("class")))[0], images(2), {}), path)
    built = build(find_toolkit("tensorrt-rtx"), path, BuildSettings(capabilities=("8.9",)))
    assert not built.audit.broken
    assert {one.precision for one in built.audit.findings if "matmul" in one.node} == {"FP32"}


@pytest.mark.parametrize("form", ["late", "divided", pytest.param("module", marks=pytest.mark.slow)])
def test_a_float_onnx_file_is_placed_alike(form: str, tmp_path: Path) -> None:
    model = network(form)
    path, output = tmp_path / "f.onnx", tmp_path / "q.onnx"
    float_model = prepare(model, input_shape=SHAPE)
    ir.save(emit(fold_float(float_model), images(2), {}), path)
    if form in ("late", "divided"):
        _scale_behind_product(path)
    sidecar = quantize_onnx(path, output, inputs=images(16).numpy(), calibrator="max")
    decisions = sidecar.details["placement"]["decisions"]
    assert [one["quantized"] for one in decisions if one["kind"] == "matrix_product"] == [True, True]
    scales = {
        float(node.inputs[1].const_value.numpy())  # type: ignore[union-attr]
        for node in ir.load(output).graph
        if node.op_type == "QuantizeLinear" and "softmax" in (node.inputs[0].name or "").lower()  # type: ignore[union-attr]
    }
    (scale,) = scales
    assert 0 < scale < 1 / 127  # calibrated: no weight of this attention is near 1
    with torch.no_grad():
        expected = model(images())
    (found,) = session(output).run(None, {"input": images().numpy()})
    assert sqnr(expected, torch.from_numpy(found)) > 25


def _scale_behind_product(path: Path) -> None:
    """Undoes what the trace has done: q is scaled behind its product with k."""
    model = ir.load(path)
    scaled = next(node for node in model.graph if node.op_type == "Mul" and "Softmax" not in node.name)
    product = scaled.outputs[0].consumers()[0]
    assert product.op_type == "MatMul"
    product.replace_input_with(0, scaled.inputs[0])
    product.outputs[0].replace_all_uses_with(scaled.outputs[0])
    scaled.replace_input_with(0, product.outputs[0])
    model.graph.sort()
    ir.save(model, path)


@pytest.mark.parametrize(
    ("form", "quantized"),
    [("flat", True), ("windows", True), ("half", False), ("heads", False), ("behind", True), ("similarity", False)],
)
def test_odd_ones_answer_the_same_for_any_batch(form: str, quantized: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Odd(form).eval(), torch.randn(5, 16, 64)
    prepared = prepare(model, input_shape=(16, 64))
    assert {one.quantized for one in products(prepared)} == {quantized}
    with torch.no_grad():
        calibrate_ranges(prepared, [given], "max")
    folded, _ = fold(prepared)
    split_projections(folded, prepared.meta["inputs"])
    path = tmp_path / "m.onnx"
    ir.save(emit(folded, given[:2], {}), path)
    for batch in (1, 2, 3, 5):
        with torch.no_grad():
            expected = prepared(given[:batch])
        (found,) = session(path).run(None, {"input": given[:batch].numpy()})
        assert found.shape == tuple(expected.shape)
        assert sqnr(expected, torch.from_numpy(found)) > (50 if form == "half" else 80)
