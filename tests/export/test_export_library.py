"""What ``from export import ...`` offers: it loads when it is used, and takes models in memory as well as files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import ROOT
from onnx import numpy_helper
from onnx_graphs import Graph, save
from torch import Tensor, fx, nn
from untrained import PREPROCESSING, checkpoint_of, lively, prepared

import export
from export import LintFinding, UserError, export_onnx, lint_onnx, quantize_onnx
from export.reference import Sample, write_reference

CLASSES = 10


class Net(nn.Module):
    """A residual block and a classifier: [N, 3, 16, 16] -> [N, 10]."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.body(x) + x).relu()
        return self.fc(x.mean((2, 3)))


def net(num_classes: int) -> nn.Module:
    return lively(Net())


@pytest.fixture(scope="module")
def model() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared(net(CLASSES))


def answers(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 16, 16)).astype(np.uint8)


# --- how it loads


def test_the_package_imports_neither_torch_nor_onnx_until_a_name_is_used() -> None:
    code = (
        "import sys, export; heavy = ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'); "
        "print([name for name in heavy if name in sys.modules]); "
        "export.LintFinding, export.UserError; "
        "print([name for name in heavy if name in sys.modules]); "
        "export.lint_onnx; print('onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "True"]


def test_every_public_name_is_there_and_none_is_the_name_of_a_module() -> None:
    modules = {path.stem for path in (ROOT / "export").glob("*.py")}
    assert sorted(export.__all__) == export.__all__ == dir(export)
    for name in export.__all__:
        assert getattr(export, name).__doc__
        assert name not in modules
    with pytest.raises(AttributeError, match="module 'export' has no attribute 'nothing'"):
        _ = export.nothing


# --- export_onnx


def test_a_model_with_preprocessing(model: fx.GraphModule, tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(CLASSES)]
    path = tmp_path / "m.onnx"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sidecar = export_onnx(model, path, preprocessing=PREPROCESSING, class_names=names, images=images())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sidecar.parent is None
    assert sidecar.class_names == tuple(names)
    assert sidecar.inputs[0].shape == (-1, 3, 16, 16)
    assert sidecar.outputs[0].shape == (-1, CLASSES)
    assert sidecar.preprocessing["height"] == 16
    assert (sidecar.figures["parity"]["source"], sidecar.figures["parity"]["images"]) == ("the caller's images", 5)
    assert sidecar.figures["parity"]["other_top1"] == 0
    assert lint_onnx(path) == []
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["class_names"]) == names
    assert "checkpoint_sha256" not in metadata
    with np.load(tmp_path / "m.reference.npz") as reference:
        np.testing.assert_array_equal(reference["images"], images().transpose(0, 2, 3, 1))
        x = PREPROCESSING.normalize(torch.from_numpy(images()))
        with torch.no_grad():
            np.testing.assert_allclose(reference["logits"], model(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["uint8-nhwc", "int8-nchw"])
def test_a_model_with_another_input_is_compared_on_random_images(
    model: fx.GraphModule, tmp_path: Path, kind: Any
) -> None:
    sidecar = export_onnx(model, tmp_path / "m.onnx", input=kind, preprocessing=PREPROCESSING)
    assert sidecar.inputs[0].dtype == kind.partition("-")[0]
    assert sidecar.class_names == ()
    assert (sidecar.figures["parity"]["source"], sidecar.figures["parity"]["images"]) == ("random images", 8)


def test_a_model_without_preprocessing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grey = prepared(lively(Net(channels=1)), (1, 16, 16)).train()
    x = np.random.default_rng(0).standard_normal((6, 1, 16, 16)).astype(np.float32)
    path = tmp_path / "m.onnx"
    sidecar = export_onnx(grey, str(path), images=x)
    assert grey.training
    assert sidecar.inputs[0].shape == (-1, 1, 16, 16)
    assert sidecar.preprocessing == {}
    assert sidecar.details["reference"] is None
    assert sidecar.details["network"][0]["shape"] == [1, 1, 16, 16]  # as no checkpoint records it
    assert sidecar.figures["parity"]["images"] == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    with torch.no_grad():
        np.testing.assert_allclose(answers(path, x), grey.eval()(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-3)
    assert export_onnx(grey, path).figures["parity"]["source"] == "random inputs"


def test_the_file_knows_no_autocast(model: fx.GraphModule, tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = export_onnx(model, tmp_path / "inside.onnx")
    assert inside.figures["parity"]["outputs"][0]["sqnr_db"] > 40
    export_onnx(model, tmp_path / "outside.onnx")
    files = [onnx.load(tmp_path / name).graph for name in ("inside.onnx", "outside.onnx")]
    assert files[0] == files[1]


def test_a_checkpoint_and_its_model_become_the_same_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = checkpoint_of(tmp_path, f"{__file__}:net")
    export_onnx(checkpoint)
    torch.manual_seed(0)
    export_onnx(prepared(net(CLASSES)), tmp_path / "memory.onnx", preprocessing=PREPROCESSING)
    files, memory = (onnx.load(tmp_path / name).graph for name in ("model.onnx", "memory.onnx"))
    assert files == memory


def test_a_float_model_needs_no_ranges(tmp_path: Path) -> None:
    ready = prepared(net(CLASSES))
    for name, amax in ready.named_buffers():
        if name.endswith("amax"):
            amax.fill_(torch.nan)
    export_onnx(ready, tmp_path / "f.onnx", precision="float32")
    assert {node.op_type for node in onnx.load(tmp_path / "f.onnx").graph.node}.isdisjoint({"QuantizeLinear"})
    with pytest.raises(UserError, match=r"has no range for 4 of 4 tensors, first x: calibrate it"):
        export_onnx(ready, tmp_path / "q.onnx")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"preprocessing": replace(PREPROCESSING, height=8)},
            r"makes images of \[3, 8, 16\], and the model was prepared for",
        ),
        ({"input": "uint8-nchw"}, "preprocessing part of the network, and there is none"),
        ({"images": images()}, r"images are torch.uint8 .* must be torch.float32"),
        ({"images": {"y": images()}}, "images are given for y, and the inputs are x"),
        ({"output_names": ("a", "b")}, "output_names are a, b: give one of its own for each of logits"),
        ({"preprocessing": PREPROCESSING, "images": images()[:, :1]}, r"must be torch.uint8 \['N', 3, 16, 16\]"),
        (
            {"preprocessing": PREPROCESSING, "class_names": ("a", "b")},
            r"answers \['N', 10\], and there are 2 class names: give one for each",
        ),
        ({"preprocessing": PREPROCESSING, "parity_images": 0}, "must be at least 1"),
        ({"preprocessing": PREPROCESSING, "output": None}, "output is missing"),
    ],
)
def test_a_request_that_cannot_be_met(
    model: fx.GraphModule, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        export_onnx(model, **{"output": tmp_path / "m.onnx"} | options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_prepared_model_is_refused(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    for source in (Net(), fx.symbolic_trace(Net().eval())):
        with pytest.raises(UserError, match=f"a {type(source).__name__} without quantizers cannot be exported"):
            export_onnx(source, output, preprocessing=PREPROCESSING)
    with pytest.raises(UserError, match="is a checkpoint, which has its own preprocessing"):
        export_onnx(trained / "model.qat", output, class_names=("a",))
    assert list(tmp_path.iterdir()) == []


class Several(nn.Module):
    """Two inputs and three outputs; a part of the network is called like an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classes = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, CLASSES)

    def forward(self, image: Tensor, hint: Tensor, flip: bool = False) -> dict[str, Any]:
        x = self.norm(self.stem(image.flip(3) if flip else image)).relu() + hint
        y = self.classes(x)
        return {"classes": self.head(y.mean((2, 3))), "maps": (y, None, x.amax(1))}


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_several_inputs_and_outputs_by_name(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    model = prepared(lively(Several()), {"image": (3, 16, 16), "hint": (16, 16, 16)})
    batch = {"image": torch.randn(5, 3, 16, 16), "hint": torch.rand(5, 16, 16, 16)}
    path = tmp_path / "m.onnx"
    sidecar = export_onnx(model, path, images=batch, precision=precision)
    assert [(spec.name, spec.shape) for spec in sidecar.inputs] == [
        ("image", (-1, 3, 16, 16)),
        ("hint", (-1, 16, 16, 16)),
    ]
    assert [(spec.name, spec.shape) for spec in sidecar.outputs] == [
        ("classes", (-1, CLASSES)),
        ("maps.0", (-1, 16, 16, 16)),
        ("maps.2", (-1, 16, 16)),
    ]
    parity = sidecar.figures["parity"]
    assert (parity["other_top1"], parity["smallest_logit_cosine"], parity["images"]) == (None, None, 5)
    assert [one["tensor"] for one in parity["outputs"]] == ["classes", "maps.0", "maps.2"]
    assert all(one["sqnr_db"] is None or one["sqnr_db"] > 50 for one in parity["outputs"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    if precision == "int8":
        with torch.no_grad():
            reference = model(**batch)
        for ours, theirs in zip(found, (reference["classes"], *reference["maps"][::2]), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=0.05)  # a code may differ
        assert lint_onnx(path) == []
    names = export_onnx(model, path, images=batch, input_names=["a", "b"], output_names=["c", "d", "e"])
    assert [spec.name for spec in (*names.inputs, *names.outputs)] == list("abcde")
    for kind in ("int8-nchw", "uint8-nchw"):
        with pytest.raises(UserError, match=r"several inputs|has 2 inputs"):
            export_onnx(model, path, input=kind)


def test_a_network_without_classes_is_compared_by_its_output(tmp_path: Path) -> None:
    layer = prepared(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)))
    sidecar = export_onnx(layer, tmp_path / "m.onnx", preprocessing=PREPROCESSING, images=images())
    assert (sidecar.outputs[0].name, sidecar.outputs[0].shape) == ("output", (-1, 16, 16, 16))
    assert sidecar.figures["parity"]["other_top1"] is None
    assert sidecar.details["reference"] | {"sha256": ""} == {
        "file": "m.reference.npz",
        "sha256": "",
        "images": 5,
        "source": "the caller's images",
        "top1": None,
    }
    with np.load(tmp_path / "m.reference.npz") as reference:
        assert reference["output_0"].shape == (5, 16, 16, 16)
        np.testing.assert_array_equal(reference["images"], images().transpose(0, 2, 3, 1))


def test_of_large_outputs_the_first_images_are_kept(tmp_path: Path) -> None:
    sample = Sample(torch.zeros(40, 3, 2, 2, dtype=torch.uint8), torch.full((40,), -1), "images")
    outputs = (torch.zeros(40, 1, 512, 512), torch.zeros(40, 2, dtype=torch.int64))  # a MiB of each image, and little
    record = write_reference(tmp_path / "r.npz", sample, outputs, logits=False)
    assert record["images"] == 31
    with np.load(tmp_path / "r.npz") as found:
        assert {name: len(found[name]) for name in found} == dict.fromkeys(
            ("images", "labels", "output_0", "output_1"), 31
        )


def test_no_class_is_counted_without_class_names(
    model: fx.GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sidecar = export_onnx(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING, images=images())
    parity, (output,) = sidecar.figures["parity"], sidecar.figures["parity"]["outputs"]
    assert (parity["other_top1"], parity["smallest_logit_cosine"]) == (None, None)
    assert output["sqnr_db"] is None or output["sqnr_db"] > 50
    assert "top-1" not in capsys.readouterr().out
    assert sidecar.details["reference"]["images"] == 5
    assert sidecar.details["reference"]["top1"] is None


class Labels(nn.Module):
    """The class of every pixel, and the scores that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.stem(x).relu())
        return {"label": scores.argmax(1), "scores": scores}


def test_outputs_of_integers_are_compared_by_equality(tmp_path: Path) -> None:
    sidecar = export_onnx(prepared(Labels()), tmp_path / "m.onnx")
    assert [(spec.name, spec.dtype) for spec in sidecar.outputs] == [("label", "int64"), ("scores", "float32")]
    label, scores = sidecar.figures["parity"]["outputs"]
    assert (label["tensor"], label["sqnr_db"]) == ("label", None)
    assert label["equal_percent"] > 99
    assert scores["equal_percent"] is None
    assert "label" not in [layer["tensor"] for layer in sidecar.figures["parity"]["layers"]]


# --- quantize_onnx and lint_onnx


def float_network(path: Path) -> Path:
    graph = Graph()
    x = graph.node("Relu", [graph.conv("x", "conv1", 16, 16, quantized=False)], "relu")
    graph.node("Add", [graph.conv(x, "conv2", 16, 16, quantized=False), x], "add")
    return save(graph.model(opset=17), path)


def test_a_float_file_is_quantized_on_an_array(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((12, 16, 8, 8)).astype(np.float32)
    source, output = float_network(tmp_path / "f.onnx"), tmp_path / "q.onnx"
    sidecar = quantize_onnx(source, output, inputs=x, calibrator="max")
    assert sidecar.figures["parity"]["inputs"] == 12
    assert sidecar.figures["parity"]["sqnr_db"] > 25
    scales = {t.name: numpy_helper.to_array(t) for t in onnx.load(output).graph.initializer}
    assert scales["x.scale"] == np.abs(x).max() / np.float32(127)
    assert lint_onnx(output) == []
    quantize_onnx(str(source), str(output), inputs=x, keep_float=["conv2"])
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(output).graph.node) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing tells the activation ranges"),
        ({"inputs": np.zeros((2, 16, 8, 8))}, r"the array of inputs holds float64 .* takes float32 \[-1, 16, 8, 8\]"),
        ({"inputs": np.zeros((2, 3, 8, 8), np.float32)}, "correct it"),
        ({"inputs": np.zeros((2, 16, 8, 8), np.float32), "data": "digits"}, "both data and inputs are given"),
        ({"inputs": np.zeros((2, 16, 8, 8), np.float32), "mean": (0, 0, 0)}, "leave out --mean and --std"),
    ],
)
def test_quantization_that_cannot_be_done(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        quantize_onnx(float_network(tmp_path / "f.onnx"), tmp_path / "q.onnx", **options)
    assert not (tmp_path / "q.onnx").exists()


def test_findings_are_objects_and_a_float_file_has_none_to_give(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("Relu", [graph.conv(graph.qdq("x", scale=0.0), "conv", 16, 16)], "relu")
    (finding,) = lint_onnx(save(graph.model(), tmp_path / "bad.onnx"))
    assert isinstance(finding, LintFinding)
    assert (finding.node, finding.rule, finding.severity) == ("x/quantize", "positive_scale", "error")
    assert str(finding).startswith("x/quantize: its scale is 0.0, not positive and finite")
    with pytest.raises(UserError, match="is a float network, with no Q/DQ node to check"):
        lint_onnx(str(float_network(tmp_path / "f.onnx")))
    with pytest.raises(UserError, match="no file"):
        lint_onnx(tmp_path / "no.onnx")


def test_a_file_that_no_onnx_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.float_weights._LARGEST_FILE", 1000)
    with pytest.raises(UserError, match=r"the file would hold .* of weights, and an ONNX file holds less than 2 GB"):
        export_onnx(prepared(net(CLASSES)), tmp_path / "m.onnx", precision="float32")
    assert list(tmp_path.iterdir()) == []
