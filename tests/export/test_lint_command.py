"""python -m export.lint on what other tools write, its exit codes, its report, and one line for every bad input."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import Run
from onnx import TensorProto, helper
from onnx_graphs import Graph, save

from export.placement_rules import sentence


def classifier(path: Path) -> Path:
    """A float network with a residual block, a downsampling block, a pool and a classifier: [N, 3, 16, 16] -> 10."""
    graph = Graph()

    def conv(x: str, name: str, inputs: int, outputs: int, kernel: int = 3) -> str:
        return graph.conv(x, name, inputs, outputs, kernel, quantized=False)

    def relu(tensor: str) -> str:
        return graph.node("Relu", [tensor], f"{tensor}.relu")

    x = relu(conv("x", "stem", 3, 16))
    body = conv(relu(conv(x, "conv1", 16, 16)), "conv2", 16, 16)
    x = relu(graph.node("Add", [body, x], "add1"))
    body = conv(relu(conv(x, "conv3", 16, 32)), "conv4", 32, 32)
    x = relu(graph.node("Add", [body, conv(x, "shortcut", 16, 32, kernel=1)], "add2"))
    flat = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pool")], "flat")
    graph.node("Gemm", [flat, graph.random("fc.w", (10, 32)), graph.random("fc.b", (10,))], "fc", transB=1)
    return save(graph.model(("N", 3, 16, 16), opset=17), path)


class Batches:
    """What ONNX Runtime calibrates on: four batches of noise."""

    def __init__(self) -> None:
        self.left = [np.random.default_rng(seed).normal(size=(2, 3, 16, 16)).astype(np.float32) for seed in range(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"x": self.left.pop()} if self.left else None


def by_onnxruntime(folder: Path, **options: Any) -> Path:
    """``classifier`` quantized by ONNX Runtime's quantize_static; without options as its documentation shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        CalibrationDataReader.register(Batches)
        quantize_static(classifier(folder / "float.onnx"), folder / "ort.onnx", Batches(), **options)
    return folder / "ort.onnx"


def by_modelopt(path: Path) -> Path:
    """As ModelOpt's PyTorch export is: Q/DQ on the inputs of layers alone, one for each reader, weights in float."""
    graph = Graph()

    def pair(tensor: str, name: str, scale: float | np.ndarray = 0.05, **attributes: Any) -> str:
        scales = np.asarray(scale, np.float32)
        given = [graph.node("Constant", [], f"{name}/scale", value=_tensor(scales))]
        given.append(graph.node("Constant", [], f"{name}/zero", value=_tensor(np.zeros(scales.shape, np.int8))))
        codes = graph.node("QuantizeLinear", [tensor, *given], f"{name}/QuantizeLinear", **attributes)
        return graph.node("DequantizeLinear", [codes, *given], f"{name}/DequantizeLinear", **attributes)

    def conv(x: str, name: str, inputs: int, outputs: int) -> str:
        weight = graph.random(f"{name}.weight", (outputs, inputs, 3, 3))
        weight = pair(weight, f"{name}/weight_quantizer", np.full(outputs, 0.01), axis=0)
        x = pair(x, f"{name}/input_quantizer")
        return graph.node("Conv", [x, weight], name, kernel_shape=[3, 3], pads=[1] * 4)

    x = graph.node("Relu", [conv("x", "stem", 3, 16)], "relu")
    for block in range(2):
        y = graph.node("Relu", [conv(x, f"block{block}/conv1", 16, 16)], f"block{block}/relu1")
        y = graph.node("Add", [conv(y, f"block{block}/conv2", 16, 16), x], f"block{block}/add")
        x = graph.node("Relu", [y], f"block{block}/relu2")
    return save(graph.model(("N", 3, 16, 16), opset=17), path)


def _tensor(array: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(array)


def clean(path: Path) -> Path:
    graph = Graph()
    skip = graph.qdq(graph.node("Relu", [graph.conv(graph.qdq("x"), "stem", 16, 16)], "relu"))
    y = graph.node("Relu", [graph.conv(skip, "conv1", 16, 16)], "relu1")
    graph.node("Add", [graph.conv(graph.qdq(y), "conv2", 16, 16), skip], "add")
    return save(graph.model(), path)


# --- what other tools write


def report(command: Run, path: Path, *options: object, code: int) -> dict[str, Any]:
    """The report of a run that ends with ``code``."""
    done = command("export.lint", path, "--json", path.with_suffix(".json"), *options)
    assert (done.returncode, done.stderr) == (code, "")
    return json.loads(path.with_suffix(".json").read_text())


def rules(found: dict[str, Any]) -> dict[str, list[str]]:
    """rule -> nodes"""
    nodes: dict[str, list[str]] = {}
    for finding in found["findings"]:
        nodes.setdefault(finding["rule"], []).append(finding["node"])
    return nodes


def test_onnxruntime_by_default_is_asymmetric_with_quantized_biases(command: Run, tmp_path: Path) -> None:
    found = report(command, by_onnxruntime(tmp_path), code=1)
    nodes = rules(found)
    layers = ("stem", "conv1", "conv2", "conv3", "conv4", "shortcut", "fc")
    assert sorted(nodes["float_bias"]) == sorted(f"{name}.b_DequantizeLinear" for name in layers)
    assert "x_QuantizeLinear" in nodes["symmetric"]
    assert found["errors"] == len(nodes["float_bias"]) + len(nodes["symmetric"])
    assert nodes["residual_add"] == ["add1"]
    assert nodes["residual_add_of_convolutions"] == ["add2"]
    severities = [finding["severity"] for finding in found["findings"]]
    assert severities == ["error"] * found["errors"] + ["warning"] * found["warnings"]


def test_onnxruntime_with_uint8(command: Run, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    path = by_onnxruntime(tmp_path, activation_type=QuantType.QUInt8)
    nodes = rules(report(command, path, code=1))
    assert "x_QuantizeLinear" in nodes["int8_codes"]
    assert "symmetric" not in nodes


def test_onnxruntime_made_symmetric_quantizes_both_inputs_of_each_addition(command: Run, tmp_path: Path) -> None:
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    found = report(command, by_onnxruntime(tmp_path, per_channel=True, extra_options=symmetric), code=0)
    nodes = rules(found)
    assert found["errors"] == 0
    assert (nodes["residual_add"], nodes["residual_add_of_convolutions"]) == (["add1"], ["add2"])
    assert nodes["weighted_output"] == ["stem", "conv1", "conv3"]
    assert set(nodes) == {"residual_add", "residual_add_of_convolutions", "weighted_output"}
    (message,) = (finding["message"] for finding in found["findings"] if finding["node"] == "add1")
    assert message.startswith("every input is quantized, so the sum does not fuse into conv2")


def test_modelopt_from_pytorch_leaves_the_residual_branch_in_float(command: Run, tmp_path: Path) -> None:
    found = report(command, by_modelopt(tmp_path / "m.onnx"), code=0)
    assert rules(found) == {"residual_add": ["block0/add", "block1/add"]}
    assert found["findings"][0] == {
        "node": "block0/add",
        "rule": "residual_add",
        "message": "no input is quantized, so the sum does not fuse into block0/conv2: 1 extra reformat of 8.2 kB per "
        "image",
        "severity": "warning",
        "bytes_per_image": 8192,
    }
    assert (found["model"], found["errors"], found["warnings"], found["bytes_per_image"]) == ("m.onnx", 0, 2, 16384)


# --- the command


def test_what_is_right_says_so_and_exits_0(command: Run, tmp_path: Path) -> None:
    path = clean(tmp_path / "m.onnx")
    done = command("export.lint", path, "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no finding: TensorRT's hard rules hold, and the placement is right\n"
    assert report(command, path, code=0)["findings"] == []


def test_our_own_export_has_no_findings(command: Run, chain: Path) -> None:
    assert command("export.lint", chain / "model.onnx", "--strict").returncode == 0


def test_warnings_exit_0_and_with_strict_1(command: Run, tmp_path: Path) -> None:
    path = by_modelopt(tmp_path / "m.onnx")
    done = command("export.lint", path)
    assert done.returncode == 0
    first, *findings, last = done.stdout.splitlines()
    assert first == f"warning: residual_add, 2 times ({sentence('residual_add')})"
    assert findings == [
        f"  block{number}/add: no input is quantized, so the sum does not fuse into block{number}/conv2: "
        "1 extra reformat of 8.2 kB per image"
        for number in (0, 1)
    ]
    assert last == "0 errors, 2 warnings, about 16.4 kB more memory traffic for each image"
    assert command("export.lint", path, "--strict").returncode == 1


def test_show_limits_the_findings_of_each_rule(command: Run, tmp_path: Path) -> None:
    path = by_modelopt(tmp_path / "m.onnx")
    lines = command("export.lint", path, "--show", 1).stdout.splitlines()
    assert lines[2] == "  ... and 1 more"
    assert len(command("export.lint", path, "--show", 0).stdout.splitlines()) == 3
    assert len(report(command, path, "--show", 0, code=0)["findings"]) == 2


def test_errors_exit_1_and_come_first(command: Run, tmp_path: Path) -> None:
    path = by_modelopt(tmp_path / "m.onnx")
    model = onnx.load(path)
    scale = next(node for node in model.graph.node if node.name == "stem/input_quantizer/scale")
    scale.attribute[0].t.CopyFrom(_tensor(np.float32(0)))
    done = command("export.lint", save(model, path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "error: positive_scale, once"
    assert lines[1].startswith("  stem/input_quantizer/QuantizeLinear: its scale is 0.0, not positive and finite")
    assert lines[-1].startswith("1 error, 2 warnings")


# --- bad input


def refused(command: Run, path: Path, *options: object) -> str:
    done = command("export.lint", path, *options)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_float_network(command: Run, tmp_path: Path) -> None:
    assert "is a float network, with no Q/DQ node" in refused(command, classifier(tmp_path / "float.onnx"))


@pytest.mark.parametrize("opset", [6, 99])
def test_an_operator_set_that_is_too_old_or_too_new(command: Run, tmp_path: Path, opset: int) -> None:
    model = onnx.load(clean(tmp_path / "m.onnx"))
    model.opset_import[0].version = opset
    line = refused(command, save(model, tmp_path / "m.onnx"))
    assert f"has operator set {opset}, which must be 7 to " in line


def external(folder: Path, location: str = "weights.bin", **changed: int) -> Path:
    """A clean model whose initializers lie in weights.bin; its file says ``location`` and what else is ``changed``."""
    path = clean(folder / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        entry.value = str({"location": location, **changed}.get(entry.key, entry.value))
    return save(model, path)


def test_data_outside_the_file(command: Run, tmp_path: Path) -> None:
    path, data = external(tmp_path), tmp_path / "weights.bin"
    assert command("export.lint", path).returncode == 0
    data.write_bytes(data.read_bytes()[:100])
    assert f"of {data}, which is too short: it has 100" in refused(command, path)
    data.write_bytes(b"")
    assert f"of {data}, which is too short: it has 0" in refused(command, path)
    data.unlink()
    assert f"keeps weights in {data}, which is missing: put it beside the model" in refused(command, path)
    path = external(tmp_path, length=3)
    assert f"in 3 bytes of {data}, and it has 4: get it again" in refused(command, path)
    assert "in bytes -8 to -4 of" in refused(command, external(tmp_path, offset=-8))


def test_data_outside_the_folder(command: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for location in ("../weights.bin", "a/../../weights.bin", str(folder / "weights.bin"), str(tmp_path / "no.bin")):
        path = external(folder, location)
        (tmp_path / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
        assert f" in {location}, which is not a path inside the model's folder" in refused(command, path)
    path, data = external(folder), folder / "weights.bin"
    data.unlink()
    data.symlink_to(tmp_path / "weights.bin")
    assert f"in {data}, a link to {tmp_path / 'weights.bin'} outside of the model's folder" in refused(command, path)


@pytest.mark.parametrize("kept", [1, 10, 1000, -1000, -1])
def test_a_truncated_file(command: Run, tmp_path: Path, kept: int) -> None:
    path = clean(tmp_path / "m.onnx")
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    assert f"is truncated: it has {len(content)} bytes, and its fields tell of " in refused(command, path)


def test_an_empty_file_a_text_file_a_folder_and_nothing(command: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("")
    assert f"{text} is empty" in refused(command, text)
    text.write_text("I am not a model\n" * 9)
    assert f"{text} is not an ONNX file" in refused(command, text)
    text.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert f"{text} is a pointer of Git LFS, not the model itself" in refused(command, text)
    assert f"no file {tmp_path}" in refused(command, tmp_path)
    assert f"no file {tmp_path / 'no.onnx'}: check the path" in refused(command, tmp_path / "no.onnx")


def test_nodes_that_read_what_nothing_makes_or_go_in_a_circle(command: Run, tmp_path: Path) -> None:
    graph = Graph()
    graph.node("Relu", [graph.qdq("nowhere")], "relu")
    line = refused(command, save(graph.model(), tmp_path / "m.onnx"))
    assert "is inconsistent: QuantizeLinear nowhere/quantize reads nowhere, which nothing makes" in line

    graph = Graph()
    graph.node("Add", ["b", graph.qdq("x")], "a")
    graph.node("Relu", ["a"], "b")
    assert "is inconsistent (Graph contains a cycle" in refused(command, save(graph.model(), tmp_path / "m.onnx"))


def test_an_initializer_that_is_too_short(command: Run, tmp_path: Path) -> None:
    model = onnx.load(clean(tmp_path / "m.onnx"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv1.w")
    weight.raw_data = weight.raw_data[:50]
    assert "is inconsistent: initializer conv1.w declares [16, 16, 3, 3], 2,304 values, and holds 50: " in refused(
        command, save(model, tmp_path / "m.onnx")
    )


@pytest.mark.parametrize("kept", [0, 1])
def test_a_node_that_lacks_an_input(command: Run, tmp_path: Path, kept: int) -> None:
    model = onnx.load(clean(tmp_path / "m.onnx"))
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    del node.input[kept:]
    line = refused(command, save(model, tmp_path / "m.onnx"))
    assert f"is inconsistent: QuantizeLinear {node.name} lacks an input, of x, y_scale" in line


def test_an_attribute_of_another_type(command: Run, tmp_path: Path) -> None:
    model = onnx.load(clean(tmp_path / "m.onnx"))
    node = next(node for node in model.graph.node if any(one.name == "axis" for one in node.attribute))
    next(one for one in node.attribute if one.name == "axis").type = onnx.AttributeProto.UNDEFINED
    line = refused(command, save(model, tmp_path / "m.onnx"))
    assert f"{node.name} has axis of type UNDEFINED, and it must be INT: export it again" in line


def test_nodes_in_another_order_are_sorted(command: Run, tmp_path: Path) -> None:
    model = onnx.load(clean(tmp_path / "m.onnx"))
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert command("export.lint", save(model, tmp_path / "m.onnx"), "--strict").returncode == 0


def test_options_that_cannot_be_met(command: Run, tmp_path: Path) -> None:
    path = clean(tmp_path / "m.onnx")
    content = path.read_bytes()
    assert "would overwrite the input" in refused(command, path, "--json", path)
    assert "that is a folder" in refused(command, path, "--json", tmp_path)
    assert "--show -1 is not a number of findings" in refused(command, path, "--show=-1")
    assert path.read_bytes() == content


def test_layers_around_an_operator_that_nobody_knows_are_not_blamed(command: Run, tmp_path: Path) -> None:
    graph = Graph()
    y = graph.node("Frobnicate", [graph.conv(graph.qdq("x"), "conv", 16, 16)], "own", domain="my.own")
    graph.conv(graph.qdq(y), "behind", 16, 16)
    model = graph.model()
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("behind", TensorProto.FLOAT, None))
    found = report(command, save(model, tmp_path / "m.onnx"), code=1)
    assert rules(found) == {"unknown_operator": ["own"]}


def test_a_float_network_with_an_operator_that_tensorrt_refuses(command: Run, tmp_path: Path) -> None:
    graph = Graph()
    x = graph.node("FusedConv", ["x", graph.random("w", (16, 16, 3, 3))], "fused", domain="com.microsoft")
    graph.conv(x, "behind", 16, 16, quantized=False)
    found = report(command, save(graph.model(opset=17), tmp_path / "m.onnx"), code=1)
    assert rules(found) == {"unknown_operator": ["fused"]}
    assert found["findings"][0]["message"].startswith("com.microsoft.FusedConv is ONNX Runtime's own operator")
