"""Float ONNX files quantized without training: by data, by a calibration cache, and what is refused."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Graph, save
from PIL import Image
from torch import Tensor, nn

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings, Profile
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import run, session, sqnr_db
from qat.base.artifact import Sidecar, read_sidecar, write_artifact
from qat.base.calibration_cache import CalibrationCache
from qat.base.errors import UserError
from qat.graph.network_record import network_from_json


class Net(nn.Module):
    """Convolution with batch normalization, a residual addition, a pool and a classifier: 16 px, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.body(x) + x).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def to_onnx(net: nn.Module, path: Path, batch: int | None = None) -> Path:
    """As users have them: by the exporter of TorchScript, with the batch normalization in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (torch.randn(batch or 2, 3, 16, 16),),
            path,
            dynamo=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes=None if batch else {"input": {0: "batch"}},
            opset_version=17,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    return path


def export(path: Path, batch: int | None = None) -> Path:
    torch.manual_seed(0)
    net = Net().train()
    net(torch.randn(32, 3, 16, 16))  # statistics
    net.norm.weight.data.uniform_(-2, 2)
    return to_onnx(net, path, batch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("float") / "net.onnx")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "inputs.npy"
    np.save(path, np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype(np.float32))
    return path


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def answers(path: Path, inputs: Path) -> np.ndarray:
    return next(iter(run(session(path), np.load(inputs)).values()))


def test_it_quantizes_places_right_and_answers_nearly_the_same(model: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "net.int8.onnx"
    sidecar = quantize_onnx(model, data=str(inputs), output=output)
    found = operators(output)
    assert "BatchNormalization" not in found
    # input, relu for the body and the skip, relu for the pool, the pool for the classifier; and three weights
    assert (found.count("QuantizeLinear"), found.count("DequantizeLinear")) == (4, 7)
    weights = [t for t in onnx.load(output).graph.initializer if t.name.endswith(".codes")]
    assert [t.data_type for t in weights] == [TensorProto.INT8] * 3
    assert sum(np.prod(t.dims) for t in onnx.load(output).graph.initializer if t.data_type == TensorProto.FLOAT) < 200
    assert lint_onnx(output) == []
    exact, rounded = answers(model, inputs), answers(output, inputs)
    noise = sqnr_db(exact, rounded)
    assert noise is not None
    assert noise > 25
    assert sidecar.figures["parity"]["sqnr_db"] == pytest.approx(noise, abs=0.01)
    assert sidecar.figures["parity"]["inputs"] == 40
    assert read_sidecar(output, "onnx") == sidecar
    recorded = {op.name: op for op in network_from_json(sidecar.details["network"])}
    assert {tensor["tensor"] for tensor in sidecar.details["placement"]["tensors"]} <= recorded.keys()
    assert next(iter(recorded)) == "input"
    assert [op.weight for op in recorded.values() if op.weight] == [(16, 3, 3, 3), (16, 16, 3, 3), (4, 16)]


def test_tensorrt_builds_it_in_int8(model: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    quantize_onnx(model, data=str(inputs), output=output)
    settings = BuildSettings(profiles=(Profile(2, 2, 2),), capabilities=("8.9",))
    audit = build(find_toolkit("tensorrt-rtx"), output, settings).audit
    assert audit.count("convolution") == (2, 2)
    assert audit.count("matrix product") == (1, 1)
    assert audit.broken == ()


def test_scales_are_those_of_the_calibrator_and_weights_follow_the_specification(
    model: Path, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "q.onnx"
    quantize_onnx(model, data=str(inputs), output=output, calibrator="max")
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(output).graph.initializer}
    assert values["input.scale"] == pytest.approx(np.abs(np.load(inputs)).max() / 127)
    codes, scale = values["fc.weight.codes"], values["fc.weight.scale"]
    weight = next(numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer if t.name == "fc.weight")
    np.testing.assert_array_equal(scale, np.abs(weight).max(1) / np.float32(127))
    np.testing.assert_array_equal(codes, np.rint(weight / scale[:, None]).astype(np.int8))


def test_float_weights_answer_the_same_to_the_last_bit(model: Path, inputs: Path, tmp_path: Path) -> None:
    for weights in ("int8", "float"):
        output = tmp_path / f"{weights}.onnx"
        quantize_onnx(model, data=str(inputs), output=output, weights=weights)
        assert lint_onnx(output) == []
    np.testing.assert_array_equal(answers(tmp_path / "int8.onnx", inputs), answers(tmp_path / "float.onnx", inputs))
    types = [t.data_type for t in onnx.load(tmp_path / "float.onnx").graph.initializer if np.prod(t.dims) > 16]
    assert types == [TensorProto.FLOAT] * 3


def test_ready_inputs_are_not_normalized(model: Path, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"npy holds inputs as the network takes them: leave out --mean and --std"):
        quantize_onnx(model, data=str(inputs), output=tmp_path / "q.onnx", mean=(0.5, 0.5, 0.5))
    assert not (tmp_path / "q.onnx").exists()


def test_images_are_normalized_and_leave_a_reference(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    sidecar = quantize_onnx(model, output, data="digits", images=32, parity_images=24, mean=(0.1, 0.2, 0.3))
    assert tuple(sidecar.preprocessing["mean"]) == (0.1, 0.2, 0.3)
    assert sidecar.preprocessing["height"] == 16
    assert sidecar.details["reference"]["images"] == 24
    with np.load(tmp_path / "q.reference.npz") as reference:
        assert reference["images"].shape == (24, 16, 16, 3)
        assert reference["logits"].shape == (24, 4)


def test_a_fixed_batch_is_fed_whole(inputs: Path, tmp_path: Path) -> None:
    model = export(tmp_path / "fixed.onnx", batch=16)
    sidecar = quantize_onnx(model, data=str(inputs))
    assert sidecar.figures["parity"]["inputs"] == 32
    with pytest.raises(UserError, match=r"takes batches of 16, there are 8 inputs"):
        quantize_onnx(model, data=str(inputs), images=8)


def test_an_old_operator_set_is_converted(tmp_path: Path, inputs: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["y"], "conv"),
        helper.make_node("Dropout", ["y"], ["z"], "drop", ratio=0.5),
        helper.make_node("Relu", ["z"], ["out"], "relu"),
    ]
    shapes = {"input": ["N", 3, 16, 16], "out": ["N", 16, 14, 14]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "old", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
    onnx.save(old, tmp_path / "old.onnx")
    quantize_onnx(tmp_path / "old.onnx", data=str(inputs), output=tmp_path / "q.onnx")
    assert onnx.load(tmp_path / "q.onnx").opset_import[0].version >= 13
    assert lint_onnx(tmp_path / "q.onnx") == []


def test_keep_float_leaves_a_layer_alone(model: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    sidecar = quantize_onnx(model, data=str(inputs), output=output, keep_float=("/fc/*",))
    kept = [d for d in sidecar.details["placement"]["decisions"] if d["rule"] == "kept_float"]
    assert [d["label"] for d in kept] == ["/fc/Gemm"]
    assert "fc.weight" in {t.name for t in onnx.load(output).graph.initializer}


# --- what it says of the outputs


def two_convolutions(path: Path, *heads: tuple[str, dict[str, int]]) -> Path:
    """Two convolutions of [N, 3, 16, 16], called maps; ``heads`` read them, and come first among the outputs."""
    graph = Graph()
    x = graph.node("Relu", [graph.conv("x", "first", 3, 16, quantized=False)], "relu")
    graph.conv(x, "maps", 16, 8, quantized=False)
    for op, attributes in heads:
        graph.node(op, ["maps"], op.lower(), **attributes)
    model = graph.model(("N", 3, 16, 16), [*(op.lower() for op, _ in heads), "maps"], opset=17)
    for output, (op, _) in zip(model.graph.output, heads, strict=False):
        output.type.tensor_type.elem_type = TensorProto.INT64 if op == "ArgMax" else TensorProto.FLOAT
    return save(model, path)


def test_every_output_is_reported_integers_by_equality(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = two_convolutions(tmp_path / "f.onnx", ("ArgMax", {"axis": 1, "keepdims": 0}), ("Sigmoid", {}))
    sidecar = quantize_onnx(source, tmp_path / "q.onnx", data=str(inputs))
    both = [run(session(path), np.load(inputs)) for path in (source, tmp_path / "q.onnx")]
    exact, rounded = both
    equal = 100 * (exact["argmax"] == rounded["argmax"]).mean()
    assert 80 < equal < 100
    ratios = [sqnr_db(exact[name], rounded[name]) for name in ("sigmoid", "maps")]
    found = sidecar.figures["parity"]
    assert found["outputs"] == [
        {"tensor": "argmax", "sqnr_db": None, "equal_percent": pytest.approx(equal)},
        {"tensor": "sigmoid", "sqnr_db": pytest.approx(ratios[0]), "equal_percent": None},
        {"tensor": "maps", "sqnr_db": pytest.approx(ratios[1]), "equal_percent": None},
    ]
    assert found["sqnr_db"] == pytest.approx(min(filter(None, ratios)))
    said = (
        f"on 40 inputs: argmax {equal:.2f} % of the values equal, sigmoid {ratios[0]:.1f} dB, maps {ratios[1]:.1f} dB"
    )
    out = capsys.readouterr().out
    assert said in " ".join(out.split())
    assert "the same class" not in out
    assert {spec.name: spec.dtype for spec in sidecar.outputs} == {
        "argmax": "int64",
        "sigmoid": "float32",
        "maps": "float32",
    }


def test_an_only_output_of_integers_has_no_ratio(tmp_path: Path, inputs: Path) -> None:
    source = two_convolutions(tmp_path / "f.onnx", ("ArgMax", {"axis": 1, "keepdims": 0}))
    model = onnx.load(source)
    del model.graph.output[1]
    found = quantize_onnx(save(model, source), tmp_path / "q.onnx", data=str(inputs)).figures["parity"]
    assert found.keys() == {"inputs", "outputs"}
    assert 80 < found["outputs"][0]["equal_percent"] < 100


def test_no_class_is_counted_of_a_network_that_may_answer_anything(
    model: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = quantize_onnx(model, tmp_path / "q.onnx", data=str(inputs))
    images = quantize_onnx(model, tmp_path / "q.onnx", data="digits", images=16)  # of ten classes, and it answers four
    for sidecar in (arrays, images):
        assert "same_top1" not in sidecar.figures["parity"]
        assert sidecar.class_names == ()
    assert images.details["reference"]["top1"] is None
    assert "the same class" not in capsys.readouterr().out


def test_classes_are_counted_where_the_data_set_has_as_many(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8), np.arange(64) % 4
    names = np.array(["a", "b", "c", "d"])
    arrays = {"train_images": images[:32], "train_labels": labels[:32], "class_names": names}
    np.savez(tmp_path / "four.npz", **arrays, test_images=images[32:], test_labels=labels[32:])
    sidecar = quantize_onnx(model, tmp_path / "q.onnx", data=tmp_path / "four.npz", images=8)
    out = capsys.readouterr().out
    assert "logits is taken for logits of the data's classes, because both are 4" in out
    assert f"the same class on {round(32 * sidecar.figures['parity']['same_top1'] / 100)} of 32" in out
    assert sidecar.class_names == ("a", "b", "c", "d")
    assert sidecar.details["reference"]["top1"] is not None


def test_classes_are_counted_where_the_sidecar_of_the_float_file_names_them(
    model: Path, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, names = model.read_bytes(), ("a", "b", "c", "d")
    source = tmp_path / "float.onnx"
    write_artifact(source, Sidecar("onnx", class_names=names), lambda path: path.write_bytes(content) and None)
    sidecar = quantize_onnx(source, tmp_path / "q.onnx", data=str(inputs))
    assert sidecar.class_names == names
    assert sidecar.figures["parity"]["same_top1"] > 80
    to_onnx(Net(), source)
    assert quantize_onnx(source, tmp_path / "q.onnx", data=str(inputs)).class_names == ()
    assert "warning: no class names are taken from the sidecar of " in capfd.readouterr().err


# --- calibration caches


def write_cache(path: Path, scales: dict[str, float], header: str = "TRT-8601-EntropyCalibration2") -> Path:
    lines = [header, *(f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def tensors_of(model: Path) -> list[str]:
    """All tensors of the prepared network, as TensorRT would have calibrated them."""
    return ["input", *(name for node in onnx.load(model).graph.node for name in node.output)]


def test_a_cache_carries_its_scales_over_exactly(model: Path, tmp_path: Path) -> None:
    scales = {name: np.float32(0.01 * (1 + index)) for index, name in enumerate(tensors_of(model))}
    cache = write_cache(tmp_path / "c.cache", scales)
    output = tmp_path / "q.onnx"
    sidecar = quantize_onnx(model, calibration_cache=cache, output=output)
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(output).graph.initializer}
    quantized = [t["tensor"] for t in sidecar.details["placement"]["tensors"]]
    assert len(quantized) == 4
    for name in quantized:
        assert values[f"{name}.scale"] == scales[name]
    assert lint_onnx(output) == []


def test_scales_of_a_cache_keep_all_their_bits(tmp_path: Path) -> None:
    """Every bit pattern of a normal float32 above 0 is a possible scale."""
    layers = 1000
    graph = Graph()
    weight = graph.random("w", (16, 16, 1, 1))
    x = "x"
    for index in range(layers):
        x = graph.node("Conv", [x, weight], f"conv{index}", kernel_shape=[1, 1])
    model = save(graph.model(("N", 16, 4, 4), opset=17), tmp_path / "chain.onnx")
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F800000, layers).astype(np.uint32)
    scales = dict(zip(["x", *(f"conv{index}" for index in range(layers - 1))], bits.view(np.float32), strict=True))
    quantize_onnx(model, tmp_path / "q.onnx", calibration_cache=write_cache(tmp_path / "c.cache", scales))
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    found = np.array([values[f"{name}.scale"] for name in scales])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), bits)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-42])
def test_a_tensor_whose_scale_is_0_or_denormal_stays_float_with_a_warning(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], scale: float
) -> None:
    scales = dict.fromkeys(tensors_of(model), 0.02) | {"input": scale}
    sidecar = quantize_onnx(model, tmp_path / "q.onnx", calibration_cache=write_cache(tmp_path / "c.cache", scales))
    warnings = capfd.readouterr().err.splitlines()
    said = f"its scale in the cache is {np.float32(scale):.3g}, by which nothing can be quantized: input"
    assert warnings == [f"warning: {said} (what reads it stays in float)"]
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    quantized = {t["tensor"] for t in sidecar.details["placement"]["tensors"]}
    assert len(quantized) == 3
    assert all(values[f"{name}.scale"] == np.float32(0.02) for name in quantized)
    assert "input" not in quantized
    assert [finding.rule for finding in lint_onnx(tmp_path / "q.onnx")] == ["weighted_input"]  # the stem, in float


def test_with_data_a_tensor_whose_scale_is_0_is_calibrated(
    model: Path, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = write_cache(tmp_path / "c.cache", dict.fromkeys(tensors_of(model), 0.02) | {"input": 0.0})
    quantize_onnx(model, tmp_path / "q.onnx", calibration_cache=cache, data=str(inputs), calibrator="max")
    assert "by which nothing can be quantized: input (calibrated on the data)" in capfd.readouterr().err
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert values["input.scale"] == pytest.approx(np.abs(np.load(inputs)).max() / 127)


def test_a_scale_of_0_in_a_group_gives_way_to_that_of_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = to_onnx(Joined(), tmp_path / "j.onnx")
    relu = next(node.output[0] for node in onnx.load(model).graph.node if node.op_type == "Relu")
    cache = write_cache(tmp_path / "c.cache", dict.fromkeys(tensors_of(model), 0.02) | {relu: 0.0})
    sidecar = quantize_onnx(model, calibration_cache=cache)
    assert len(sidecar.details["placement"]["tensors"]) == 4
    assert f"{relu} (it shares the scale of one that is there)" in capfd.readouterr().err


def test_tensors_that_a_cache_lacks_are_named_and_stay_float(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    relu = next(node.output[0] for node in onnx.load(model).graph.node if node.op_type == "Relu")
    cache = write_cache(tmp_path / "c.cache", {name: 0.02 for name in tensors_of(model) if name != relu})
    sidecar = quantize_onnx(model, calibration_cache=cache, output=tmp_path / "q.onnx")
    assert f"not in the cache, or renamed by fusion: {relu} (what reads it stays in float)" in capfd.readouterr().err
    rules = {d["label"]: d["rule"] for d in sidecar.details["placement"]["decisions"]}
    assert rules["/body/Conv"] == "no_range"
    assert relu not in {t["tensor"] for t in sidecar.details["placement"]["tensors"]}


def test_with_data_the_missing_ones_are_calibrated(model: Path, inputs: Path, tmp_path: Path) -> None:
    relu = next(node.output[0] for node in onnx.load(model).graph.node if node.op_type == "Relu")
    cache = write_cache(tmp_path / "c.cache", {name: 0.02 for name in tensors_of(model) if name != relu})
    quantize_onnx(model, calibration_cache=cache, data=str(inputs), output=tmp_path / "q.onnx")
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert values["input.scale"] == pytest.approx(0.02)
    assert values[f"{relu}.scale"] != pytest.approx(0.02, rel=1e-3)


def test_a_cache_of_another_network_is_refused(model: Path, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c.cache", {"input": 0.1, "a": 0.1, "b": 0.2})
    with pytest.raises(UserError, match=r"is a cache for another network: it knows 1 of the 4 tensors"):
        quantize_onnx(model, calibration_cache=cache, output=tmp_path / "q.onnx")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a calibration cache"),
        ("hello\nx: 3c010a14\n", "its first line is 'hello'"),
        ("TRT-8601-EntropyCalibration2\n", "does not hold any tensor"),
        ("TRT-8601-EntropyCalibration2\nx 3c010a14\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nx: zz\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nx: 7fc00000\n", "line 2: the scale of x is nan, and must be finite"),
        ("TRT-8601-EntropyCalibration2\ny: 0\nx: 7f800000\n", "line 3: the scale of x is inf"),
        ("TRT-8601-EntropyCalibration2\nx: bc010a14\n", "line 2: the scale of x is -0.00787"),
        ("TRT-8601-EntropyCalibration2\nx: 80000001\n", "line 2: the scale of x is -1.4013e-45"),
    ],
)
def test_a_damaged_cache_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.cache"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        CalibrationCache.read(path)


def test_a_cache_is_read_with_names_that_hold_colons_and_spaces(tmp_path: Path) -> None:
    scales = {"(Unnamed Layer* 3) [Convolution]_output": 0.5, "a:0": 0.25}
    assert CalibrationCache.read(write_cache(tmp_path / "c", scales, "TRT-100300-MinMaxCalibration")).scales == scales


# --- bad input


def test_bad_input_is_one_line(model: Path, inputs: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q.onnx"
    quantize_onnx(model, data=str(inputs), output=quantized)
    bad_shape = tmp_path / "bad.npy"
    np.save(bad_shape, np.zeros((4, 3, 8, 8), np.float32))
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    cases = [
        ({"model": model}, "nothing tells the activation ranges"),
        ({"model": quantized, "data": str(inputs)}, "is quantized already"),
        (
            {"model": model, "data": str(bad_shape)},
            r"holds float32 \[4, 3, 8, 8\], the network takes float32 \[-1, 3, 16, 16\]",
        ),
        ({"model": model, "data": str(inputs), "output": model}, "would overwrite the float model"),
        ({"model": model, "data": str(inputs), "keep_float": ("nothing*",)}, "--keep-float nothing.* matches none"),
        ({"model": tmp_path / "no.onnx", "data": str(inputs)}, "no file"),
        ({"model": text, "data": str(inputs)}, "is not an ONNX file"),
        ({"model": model, "data": str(tmp_path / "no.npy")}, "cannot read inputs"),
        ({"model": model, "data": str(inputs), "images": 0}, "must be at least 1"),
    ]
    for options, says in cases:
        with pytest.raises(UserError, match=says):
            quantize_onnx(**{"output": tmp_path / "out.onnx"} | options)
    assert not (tmp_path / "out.onnx").exists()


def with_operator(path: Path, op: str, domain: str) -> Path:
    """A float convolution 3x3 of images of 16 px, and ``op`` of ``domain`` behind it."""
    graph = Graph()
    x = graph.node("Conv", ["x", graph.random("w", (16, 3, 3, 3))], "conv")
    graph.node(op, [x], "odd", domain=domain)
    model = graph.model(("N", 3, 16, 16), opset=17)
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    return save(model, path)


@pytest.mark.parametrize(("op", "domain"), [("QuickGelu", "com.microsoft"), ("Frobnicate", "my.own")])
def test_an_operator_that_tensorrt_refuses_is_refused(tmp_path: Path, inputs: Path, op: str, domain: str) -> None:
    source = with_operator(tmp_path / "float.onnx", op, domain)
    with pytest.raises(UserError, match=rf"TensorRT cannot run .*float.onnx: odd: {domain}.{op} is "):
        quantize_onnx(source, tmp_path / "q.onnx", data=str(inputs))
    assert not (tmp_path / "q.onnx").exists()


def test_a_plugin_is_warned_of_and_needs_a_cache_because_onnx_runtime_has_none(
    tmp_path: Path, inputs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = with_operator(tmp_path / "float.onnx", "Own_TRT", "")
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run .*float.onnx: .*Own_TRT"):
        quantize_onnx(source, tmp_path / "q.onnx", data=str(inputs))
    quantize_onnx(source, tmp_path / "q.onnx", calibration_cache=write_cache(tmp_path / "c.cache", {"x": 0.02}))
    assert "warning: odd: TensorRT needs the plugin Own_TRT" in capfd.readouterr().err
    assert operators(tmp_path / "q.onnx").count("DequantizeLinear") == 2


def test_a_function_with_the_name_of_an_operator_is_computed_as_the_file_says(tmp_path: Path, inputs: Path) -> None:
    model = onnx.load(with_operator(tmp_path / "float.onnx", "Relu", "my.own"))
    body = [helper.make_node("Add", ["given", "given"], ["twice"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("my.own", "Relu", ["given"], ["twice"], body, opsets))
    quantize_onnx(save(model, tmp_path / "float.onnx"), tmp_path / "q.onnx", data=str(inputs))
    assert operators(tmp_path / "q.onnx")[-1] == "Add"


def test_a_network_of_two_inputs_is_refused(tmp_path: Path, inputs: Path) -> None:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("a", "b", "sum")]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["sum"])], "two", ends[:2], ends[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "two.onnx")
    with pytest.raises(UserError, match=r"has 2 inputs \(a, b\)"):
        quantize_onnx(tmp_path / "two.onnx", data=str(inputs))


class Joined(nn.Module):
    """Two convolutions of the input, concatenated, and one of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 16), (3, 16), (32, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))


def test_shared_scales_are_one_initializer(tmp_path: Path, inputs: Path) -> None:
    to_onnx(Joined(), tmp_path / "j.onnx")
    quantize_onnx(tmp_path / "j.onnx", data=str(inputs))
    quantized = ir.load(tmp_path / "j.int8.onnx")
    scales = [node.inputs[1].name for node in quantized.graph if node.op_type == "QuantizeLinear"]
    assert len(scales) == 4
    assert len(set(scales)) == 2


def test_tensors_that_share_a_scale_get_the_largest_of_a_cache(tmp_path: Path) -> None:
    model = to_onnx(Joined(), tmp_path / "j.onnx")
    scales = {name: np.float32(0.01 * (3 + index)) for index, name in enumerate(tensors_of(model))}
    sidecar = quantize_onnx(model, calibration_cache=write_cache(tmp_path / "c.cache", scales))
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "j.int8.onnx").graph.initializer}
    groups: dict[str, list[str]] = {}
    for tensor in sidecar.details["placement"]["tensors"]:
        groups.setdefault(tensor["quantizer"], []).append(tensor["tensor"])
    assert sorted(map(len, groups.values())) == [1, 3]
    for quantizer, tensors in groups.items():
        assert values[f"{quantizer}.scale"] == max(scales[tensor] for tensor in tensors)


def test_a_folder_without_labels_is_calibrated_on(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(20):
        (tmp_path / "images" / "some").mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "some" / f"{index}.png")
    torch.manual_seed(0)
    model = to_onnx(Net(), tmp_path / "net.onnx")
    largest = quantize_onnx(model, data=tmp_path / "images", images=8, weight_calibrator="max")
    assert largest.figures["parity"]["inputs"] == 12
    assert largest.details["reference"]["images"] == 12
    assert largest.details["reference"]["top1"] is None
    least = quantize_onnx(model, tmp_path / "mse.onnx", data=tmp_path / "images", images=8, weight_calibrator="mse")
    assert least.details["weight_calibrator"] == "mse"
    clipped, whole = (
        {value.name: numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
        for path in (tmp_path / "mse.onnx", tmp_path / "net.int8.onnx")
    )
    names = [name for name in whole if name.endswith("codes")]
    assert names
    for name in names:
        scale = name.removesuffix("codes") + "scale"
        assert (clipped[scale] <= whole[scale]).all()
    assert any((clipped[name] != whole[name]).any() for name in names)


def test_inputs_of_one_channel_are_grey_images(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    model = tmp_path / "grey.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net.eval(), (torch.randn(1, 1, 16, 16),), model, dynamo=False, input_names=["input"])
    sidecar = quantize_onnx(model, data="digits", images=8)
    assert sidecar.preprocessing["color"] == "grey"
    assert sidecar.preprocessing["mean"] == [0.305]
    with pytest.raises(UserError, match=r"--mean has 3 numbers, the network takes 1 channels: give 1"):
        quantize_onnx(model, data="digits", images=8, mean=(0.5, 0.5, 0.5))
