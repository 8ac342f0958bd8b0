"""Groups padded with zero channels: in which files, that the channels are zero, and that no answer changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from untrained import checkpoint_of, lively, prepared

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.emit import emit
from export.fewer_quantizers import write_float_twin, write_variant
from export.fold import fold, fold_float, layer_paths
from export.from_checkpoint import export_onnx
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.pad_groups import GroupedAxis, pad_groups, set_group_widths, without_padding
from export.session import run, session
from qat.base.errors import UserError
from qat.fake_quantize.prepare import placement_of
from qat.rules.kernel_profile import KernelProfile, LayerKind, MeasuredKind

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """stem -> relu -> grouped 3x3 -> norm -> relu -> (gate) -> last -> head, with 24 channels in each of 4 groups."""

    def __init__(self, width: int = 24, gated: bool = False, between: nn.Module | None = None) -> None:
        super().__init__()
        channels = 4 * width
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.between = between or nn.ReLU()
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.squeeze, self.excite = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.gated = gated
        self.last = nn.Conv2d(channels, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.grouped(self.between(self.stem(x)))).relu()
        if self.gated:
            y = y * self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        return self.head(F.adaptive_avg_pool2d(self.last(y).relu(), 1).flatten(1))


class Functional(Block):
    """The grouped convolution is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.grouped.weight
        del self.grouped

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.stem(x).relu(), self.weight, padding=1, groups=4).relu()
        return self.head(F.adaptive_avg_pool2d(self.last(y).relu(), 1).flatten(1))


class TwoFunctions(nn.Module):
    """Two grouped convolutions that one module's functions compute, with ``first`` and ``second`` channels a group."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 4 * first, 3, padding=1), nn.Conv2d(4 * first, 4 * second, 1)
        self.a = nn.Parameter(0.1 * torch.randn(4 * first, first, 3, 3))
        self.b = nn.Parameter(0.1 * torch.randn(4 * second, second, 3, 3))
        self.last = nn.Conv2d(4 * second, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x).relu(), self.a, padding=1, groups=4).relu()
        x = F.conv2d(self.middle(x).relu(), self.b, padding=1, groups=4).relu()
        return self.last(x).mean((2, 3))


def emitted(model: nn.Module) -> tuple[ir.Model, ir.Model, dict[str, GroupedAxis]]:
    """The file as it would be without padding, the padded one, and how tensors have changed."""
    ready = prepared(lively(model))
    folded, _ = fold(ready)
    plain, padded = (emit(folded, X[:2], {}) for _ in range(2))
    return plain, padded, pad_groups(padded, placement_of(ready), layer_paths(folded))


def content(model: ir.Model) -> bytes:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def answers(model: bytes) -> np.ndarray:
    (answer,) = run(session(model), X.numpy()).values()
    return answer


def constants(model: bytes) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(model).graph.initializer}


def test_an_axis_of_groups_is_filled_up_and_cut_off_again() -> None:
    axis = GroupedAxis(groups=2, width=3, new=4)
    values = np.arange(1, 13).reshape(2, 6)
    wider = axis.resized(values, 1)
    assert wider.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0], [7, 8, 9, 0, 10, 11, 12, 0]]
    assert axis.back.resized(wider, 1).tolist() == values.tolist()
    assert axis.resized(np.ones(6), 0, fill=5).tolist() == [1, 1, 1, 5] * 2


@pytest.mark.parametrize(
    "model",
    [Block(), Block(gated=True), Block(between=nn.SiLU()), Functional(), Block(width=12)],
    ids=["relu", "gate", "silu", "function", "12"],
)
def test_zero_channels_stand_between_the_convolutions_and_no_answer_changes(model: nn.Module) -> None:
    width = model.stem.out_channels // 4
    wider = {24: 32, 12: 16}[width]
    before, after, changed = emitted(model)
    plain, padded = content(before), content(after)
    np.testing.assert_allclose(answers(padded), answers(plain), rtol=1e-5, atol=1e-5)
    assert answers(plain).std() > 0.01

    old, new = constants(plain), constants(padded)
    assert old.keys() == new.keys()
    name = "conv2d.weight" if isinstance(model, Functional) else "grouped.weight"
    assert new[name].shape == (4 * wider, wider, 3, 3)
    groups = new[name].reshape(4, wider, wider, 3, 3)
    assert (groups[:, :width, :width].reshape(old[name].shape) == old[name]).all()
    assert not groups[:, width:].any()
    assert not groups[:, :, width:].any()
    stem, last = new["stem.weight"].reshape(4, wider, 3, 3, 3), new["last.weight"].reshape(32, 4, wider)
    assert (stem[:, :width].reshape(old["stem.weight"].shape) == old["stem.weight"]).all()
    assert not stem[:, width:].any()
    assert not new["stem.bias"].reshape(4, wider)[:, width:].any()
    assert (new["stem.weight_quantizer.scale"] > 0).all()
    assert not last[:, :, width:].any()
    same = {one for one in old if old[one].shape == new[one].shape}
    assert all((old[one] == new[one]).all() for one in same)
    assert "head.weight" in same
    assert {(axis.groups, axis.width, axis.new) for axis in changed.values()} == {(4, width, wider)}


@pytest.mark.parametrize(("widths", "padded"), [((48, 12), (64, 16)), ((24, 24), (32, 32)), ((16, 24), (16, 32))])
def test_functions_with_one_label_are_told_apart(widths: tuple[int, int], padded: tuple[int, int]) -> None:
    before, after, _ = emitted(TwoFunctions(*widths))
    plain, wider = content(before), content(after)
    np.testing.assert_allclose(answers(wider), answers(plain), rtol=1e-3, atol=1e-3)
    shapes = [one.shape for one in constants(wider).values() if one.ndim == 4 and one.shape[2] == 3]
    assert sorted(shapes) == sorted([(4 * padded[0], 3, 3, 3), *((4 * width, width, 3, 3) for width in padded)])


def test_widths_are_never_cut() -> None:
    plain, _, _ = emitted(Block(width=16))
    (grouped,) = (node for node in plain.graph if node.name == "grouped")
    assert not set_group_widths(plain, {grouped.outputs[0].name or "": (8, 8)}).original


def test_constants_that_are_no_initializers_are_left() -> None:
    plain, _padded, _ = emitted(Block())
    proto = ir.to_proto(plain)
    (bias,) = (one for one in proto.graph.initializer if one.name == "stem.bias")
    proto.graph.initializer.remove(bias)
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["stem.bias"], "constant", value=bias))
    model = ir.from_proto(proto)
    assert not set_group_widths(model, {"grouped": (32, 32)}).original
    assert (answers(content(model)) == answers(content(plain))).all()


def test_new_constants_get_names_that_nothing_has() -> None:
    """One bias serves two convolutions, and a tensor has the name that its copy would get."""
    plain, _, _ = emitted(Block(gated=True))
    bias = plain.graph.initializers["grouped.bias"]
    excite, grouped, squeeze = (
        next(node for node in plain.graph if node.name == name) for name in ("excite", "grouped", "squeeze")
    )
    excite.replace_input_with(2, bias)
    squeeze.outputs[0].name = "grouped.bias_1"
    before = answers(content(plain))
    assert set_group_widths(plain, {grouped.outputs[0].name or "": (32, 32)}).original
    np.testing.assert_allclose(answers(content(plain)), before, rtol=1e-5, atol=1e-5)


def test_what_was_padded_can_be_taken_out_again() -> None:
    plain, padded, _ = emitted(Block(gated=True))
    without_padding(padded)
    old, new = constants(content(plain)), constants(content(padded))
    assert old.keys() == new.keys()
    assert all((old[name] == new[name]).all() for name in old)


@pytest.mark.parametrize("stated", ["{", '{"elsewhere": [24, 24]}', '{"grouped": 24}', '["grouped"]'])
def test_padding_that_is_stated_and_not_there_is_refused(stated: str) -> None:
    plain, _, _ = emitted(Block())
    plain.metadata_props["padded_groups"] = stated
    with pytest.raises(UserError, match="cannot be taken out"):
        without_padding(plain)


def test_widths_with_a_kernel_stay_as_they_are() -> None:
    plain, padded, changed = emitted(Block(width=16))
    assert not changed
    assert content(plain) == content(padded)


def test_what_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The placement cannot see that a PReLU has a slope for each channel."""
    plain, padded, changed = emitted(Block(between=nn.PReLU(96)))
    assert not changed
    old, new = constants(content(plain)), constants(content(padded))
    assert all((old[name] == new[name]).all() for name in old)
    assert "the groups of grouped could not be padded" in capsys.readouterr().err


def test_exported_files_are_padded_and_agree_with_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).read_text().partition("def emitted")[0]
    Path("net.py").write_text(f"{source}\n\ndef net(num_classes):\n    torch.manual_seed(0)\n    return Block()\n")
    sidecar = export_onnx(checkpoint_of(tmp_path, "net.py:net"), "model.onnx")
    layers = sidecar.figures["parity"]["layers"]
    assert len(layers) > 4
    assert "groups padded with zero channels: grouped (1)" in capsys.readouterr().out
    assert all(layer["sqnr_db"] is None or layer["sqnr_db"] > 100 for layer in layers)
    assert constants(Path("model.onnx").read_bytes())["grouped.weight"].shape == (128, 32, 3, 3)

    write_float_twin(Path("model.onnx"), Path("float.onnx"), half=False)
    shapes = {one.shape for one in constants(Path("float.onnx").read_bytes()).values()}
    assert (96, 24, 3, 3) in shapes
    assert (128, 32, 3, 3) not in shapes
    assert write_variant(Path("model.onnx"), ["head"], Path("variant.onnx"))
    variant = constants(Path("variant.onnx").read_bytes())
    assert [one.shape for one in variant.values() if one.ndim == 4].count((128, 32, 3, 3)) == 1
    assert not write_variant(Path("model.onnx"), ["stem", "grouped", "last", "head"], Path("variant.onnx"))
    audit = build(find_toolkit("tensorrt-rtx"), Path("model.onnx"), BuildSettings(capabilities=("8.9",))).audit
    assert audit.broken == ()


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    ir.save(emit(fold_float(prepared(lively(Block()))), X[:2], {}), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def grouped_shapes(path: Path) -> list[tuple[int, ...]]:
    found = [one.shape for one in constants(path.read_bytes()).values()]
    return [shape for shape in found if shape[2:] == (3, 3) and shape[1] > 3]


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_float_files_are_padded(weights: Any, float_file: Path) -> None:
    found = quantize_onnx(float_file, inputs=X.numpy(), weights=weights)
    assert found.figures["parity"]["sqnr_db"] > 30
    quantized = float_file.with_suffix(".int8.onnx")
    assert grouped_shapes(quantized) == [(128, 32, 3, 3)]
    write_float_twin(quantized, float_file.with_name("twin.onnx"), half=False)
    assert grouped_shapes(float_file.with_name("twin.onnx")) == [(96, 24, 3, 3)]
    assert write_variant(quantized, [], float_file.with_name("variant.onnx"))
    assert grouped_shapes(float_file.with_name("variant.onnx")) == [(128, 32, 3, 3)]
    variant, same = (answers(path.read_bytes()) for path in (float_file.with_name("variant.onnx"), quantized))
    np.testing.assert_allclose(variant, same, rtol=1e-4, atol=1e-4)


def test_a_given_profile_decides_what_is_padded_and_lint_knows_it(float_file: Path) -> None:
    kind = LayerKind(operation="convolution", in_channels=96, out_channels=96, groups=4, kernel=(3, 3))
    gains = MeasuredKind(kind=kind, int8_ms=1.0, float_ms=2.0, in_int8=True, significant=True)
    profile = KernelProfile("A GPU", "12.0", "10.16", "2026-11-30", 32, (gains,))
    quantize_onnx(float_file, inputs=X.numpy(), profile=profile)
    quantized = float_file.with_suffix(".int8.onnx")
    assert grouped_shapes(quantized) == [(96, 24, 3, 3)]
    assert lint_onnx(quantized, profile) == []
    (finding,) = lint_onnx(quantized)
    assert "its groups are not padded: grouped, 24 channels in a group" in str(finding)
    assert write_variant(quantized, ["head"], float_file.with_name("variant.onnx"))  # as in the file
    assert grouped_shapes(float_file.with_name("variant.onnx")) == [(96, 24, 3, 3)]
