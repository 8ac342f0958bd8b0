"""From a checkpoint to an ONNX file and its sidecar: what is written down, what is warned of, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import export.from_checkpoint
import export.parity
from deploy.reference import network_input
from export.fold import fold
from export.from_checkpoint import export_onnx
from export.parity import LayerParity, Parity
from export.session import run, session, session_with_tensors
from qat.base.artifact import Parent, Sidecar, TensorSpec, read_parent, read_sidecar, sha256_of
from qat.base.errors import UserError
from qat.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.quantizer import ActivationQuantizer, WeightQuantizer
from qat.models import ModelSpec


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def refused(match: str, checkpoint: Path, output: Path | None = None, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        export_onnx(checkpoint, output, **options)
    assert "\n" not in str(caught.value)


# --- the ordinary export


@pytest.fixture(scope="module")
def exported(chain: Path) -> Sidecar:
    return read_sidecar(chain / "model.onnx", "onnx")


def test_the_sidecar_names_the_checkpoint_and_describes_the_network(chain: Path, exported: Sidecar) -> None:
    checkpoint = read_sidecar(chain / "model.qat", "checkpoint")
    assert exported.parent == Parent("model.qat", sha256_of(chain / "model.qat"))
    assert read_parent(chain / "model.onnx", exported, "checkpoint") == (chain / "model.qat", checkpoint)
    assert exported.inputs == (TensorSpec("input", (-1, 3, 16, 16), "float32"),)
    assert exported.outputs == (TensorSpec("logits", (-1, 3), "float32"),)
    assert exported.preprocessing == checkpoint.preprocessing
    assert exported.class_names == checkpoint.class_names
    described = {name: value for name, value in exported.details.items() if name != "reference"}
    assert described == {
        "input": "float32-nchw",
        "precision": "int8",
        "weights": "int8",
        "float_type": "float32",
        "padded": [],
        "merged": [],
        "opset": 20,
        "dead_channels": [],
    }


def test_the_sidecar_agrees_with_the_file(chain: Path, exported: Sidecar) -> None:
    model = onnx.load(chain / "model.onnx")
    assert exported.sha256 == sha256_of(chain / "model.onnx")
    assert exported.figures["nodes"] == len(model.graph.node)
    assert exported.figures["bytes"] == (chain / "model.onnx").stat().st_size
    assert exported.figures["export_seconds"] > 0
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [exported.details["opset"]]
    (given,) = model.graph.input
    first, *rest = given.type.tensor_type.shape.dim
    assert first.dim_param
    assert [dimension.dim_value for dimension in rest] == [3, 16, 16]


def test_parity_on_the_test_split_is_stated(chain: Path, exported: Sidecar) -> None:
    found = exported.figures["parity"]
    quantizers = [node for node in onnx.load(chain / "model.onnx").graph.node if node.op_type == "QuantizeLinear"]
    assert found["source"].startswith("the test split of ")
    assert (found["images"], found["other_top1"]) == (60, 0)
    assert found["smallest_logit_cosine"] > 0.9999
    assert len(found["layers"]) == len(quantizers) + 1
    assert found["worst_layer"] in found["layers"]
    assert found["worst_layer"]["sqnr_db"] is None or found["worst_layer"]["sqnr_db"] > 100


def test_answers_that_differ_are_warned_of(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = chain / "model.qat", tmp_path / "model.onnx"
    export_onnx(*files)
    assert "other answers" not in capsys.readouterr().err
    real = export.from_checkpoint.measure

    def changed(parity: Parity) -> Iterator[Parity]:
        assert parity.smallest_logit_cosine is not None
        yield dataclasses.replace(parity, smallest_logit_cosine=-parity.smallest_logit_cosine)
        yield dataclasses.replace(parity, layers=(*parity.layers, LayerParity("somewhere", 12.0)))

    for index in range(2):

        def other(*given: Any, at: int = index, **options: Any) -> Any:
            parity, *answers = real(*given, **options)
            return list(changed(parity))[at], *answers

        monkeypatch.setattr(export.from_checkpoint, "measure", other)
        export_onnx(*files)
        assert "ONNX Runtime computes other answers than PyTorch" in capsys.readouterr().err


def test_the_file_alone_says_how_to_use_it(chain: Path, exported: Sidecar) -> None:
    found = metadata(chain / "model.onnx")
    assert json.loads(found["class_names"]) == ["red", "green", "blue"]
    assert json.loads(found["preprocessing"]) == exported.preprocessing
    assert found["checkpoint_sha256"] == sha256_of(chain / "model.qat")
    assert (found["input"], found["precision"], found["weights"]) == ("float32-nchw", "int8", "int8")
    assert json.loads(found["padded"]) == []
    assert str(chain) not in "".join(found.values())


# --- the reference file beside it


def test_the_reference_holds_the_test_images_and_what_pytorch_answers(chain: Path, exported: Sidecar) -> None:
    recorded = exported.details["reference"]
    path = chain / "model.reference.npz"
    assert recorded["file"] == path.name
    assert recorded["sha256"] == sha256_of(path)
    assert recorded["images"] == exported.figures["parity"]["images"] == 60
    assert recorded["source"] == exported.figures["parity"]["source"]

    checkpoint = load_checkpoint(chain / "model.qat")
    given = np.load(checkpoint.sidecar.details["data"]["source"])
    found = np.load(path)
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        "images": (np.uint8, (60, 16, 16, 3)),
        "labels": (np.int64, (60,)),
        "logits": (np.float32, (60, 3)),
    }
    np.testing.assert_array_equal(found["images"], given["test_images"])
    np.testing.assert_array_equal(found["labels"], given["test_labels"])
    x = checkpoint.preprocessing.normalize(torch.from_numpy(found["images"]).permute(0, 3, 1, 2))
    with torch.no_grad():
        answers = fold(checkpoint.model)[0](x).numpy()
    np.testing.assert_allclose(found["logits"], answers, rtol=1e-4, atol=1e-4)
    assert recorded["top1"] == pytest.approx(100 * (answers.argmax(1) == given["test_labels"]).mean())
    assert recorded["top1"] > 80


# --- raw bytes as input, a folder of its own


@pytest.mark.parametrize(("kind", "shape"), [("uint8-nhwc", (-1, 16, 16, 3)), ("uint8-nchw", (-1, 3, 16, 16))])
def test_uint8_input_computes_the_same_from_raw_images(
    chain: Path, tmp_path: Path, kind: Any, shape: tuple[int, ...]
) -> None:
    output = tmp_path / "new" / "bytes.onnx"
    written = export_onnx(chain / "model.qat", output, input=kind, parity_images=7)
    assert written.inputs == (TensorSpec("input", shape, "uint8"),)
    assert written.details["input"] == metadata(output)["input"] == kind
    assert written.figures["parity"]["images"] == written.details["reference"]["images"] == 7
    assert len(np.load(output.parent / "bytes.reference.npz")["images"]) == 7
    assert read_parent(output, written, "checkpoint")[0].samefile(chain / "model.qat")

    images = np.load(Path(read_sidecar(chain / "model.qat", "checkpoint").details["data"]["source"]))["test_images"]
    preprocessing = Preprocessing.from_json(dict(written.preprocessing))
    normalized = preprocessing.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    (from_bytes,) = session(output).run(None, {"input": network_input(images, written)})
    (from_floats,) = session(chain / "model.onnx").run(None, {"input": normalized})
    assert (from_bytes.argmax(1) == from_floats.argmax(1)).mean() > 0.98
    np.testing.assert_allclose(from_bytes, from_floats, atol=0.1)


def test_int8_input_leaves_quantizing_to_the_caller(chain: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.onnx"
    written = export_onnx(chain / "model.qat", output, input="int8-nchw")
    assert written.inputs == (TensorSpec("input", (-1, 3, 16, 16), "int8"),)
    images = np.load(output.with_name("codes.reference.npz"))["images"]
    codes = network_input(images, written)
    assert codes.dtype == np.int8
    assert len(np.unique(codes)) > 50
    (from_codes,) = session(output).run(None, {"input": codes})
    floats = network_input(images, read_sidecar(chain / "model.onnx", "onnx"))
    (from_floats,) = session(chain / "model.onnx").run(None, {"input": floats})
    np.testing.assert_array_equal(from_codes, from_floats)


def test_int8_input_of_a_network_that_does_not_quantize_it(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="computes nothing in INT8: leave out --input int8-nchw"):
        export_onnx(chain / "model.qat", tmp_path / "x.onnx", input="int8-nchw", precision="float32")
    assert list(tmp_path.iterdir()) == []


# --- float weights behind a QuantizeLinear


@pytest.mark.parametrize("kind", ["float32-nchw", "uint8-nchw"])
def test_float_weights_are_quantized_to_the_same_codes(chain: Path, tmp_path: Path, kind: Any) -> None:
    integers = export_onnx(chain / "model.qat", tmp_path / "int8.onnx", input=kind)
    floats = export_onnx(chain / "model.qat", tmp_path / "float.onnx", input=kind, weights="float")
    assert (integers.details["weights"], floats.details["weights"]) == ("int8", "float")
    assert metadata(tmp_path / "float.onnx")["weights"] == "float"
    assert floats.figures["parity"] == integers.figures["parity"]

    x = network_input(np.load(tmp_path / "float.reference.npz")["images"], floats)
    answers = [session(tmp_path / name).run(None, {"input": x})[0] for name in ("int8.onnx", "float.onnx")]
    np.testing.assert_array_equal(*answers)

    graphs = [onnx.load(tmp_path / name).graph for name in ("int8.onnx", "float.onnx")]
    codes, weights = ({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} for graph in graphs)
    quantizes = {node.input[0]: node for node in graphs[1].node if node.op_type == "QuantizeLinear"}
    dequantizes = {node.input[0]: node for node in graphs[1].node if node.op_type == "DequantizeLinear"}
    layers = ("conv1.weight", "conv2.weight", "fc.weight")
    assert {name for name in quantizes if name in weights} == {f"{name}.float" for name in layers}
    for name in layers:
        quantize = quantizes[f"{name}.float"]
        dequantize = dequantizes[quantize.output[0]]
        assert (quantize.name, dequantize.name) == (f"{name}_quantizer/quantize", f"{name}_quantizer/dequantize")
        assert quantize.input[1:] == dequantize.input[1:] == [f"{name}_quantizer.scale", f"{name}_quantizer.zero_point"]
        for node in (quantize, dequantize):
            assert ("axis", 0) in [(entry.name, entry.i) for entry in node.attribute]
        found = run(session_with_tensors(tmp_path / "float.onnx", [quantize.output[0]]), x)[quantize.output[0]]
        assert (weights[f"{name}.float"].dtype, codes[name].dtype) == (np.float32, np.int8)
        np.testing.assert_array_equal(found, codes[name])


@pytest.mark.parametrize("options", [{"weights": "float"}, {"pad_channels": True}, {"merge_shortcuts": True}])
def test_a_float_network_has_no_int8_weights(checkpoint: Path, options: dict[str, Any]) -> None:
    refused(
        f"--precision float16 computes nothing in INT8: leave out --{next(iter(options))[:3]}",
        checkpoint=checkpoint,
        precision="float16",
        **options,
    )
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["model.qat", "model.qat.json"]


# --- the same network in float, to compare with


@pytest.mark.parametrize(("precision", "close"), [("float32", 1e-5), ("float16", 1e-2)])
def test_a_float_export_is_the_network_without_quantizers(checkpoint: Path, precision: Any, close: float) -> None:
    written = export_onnx(checkpoint, precision=precision)
    output = checkpoint.with_name(f"model.{precision}.onnx")
    assert read_sidecar(output, "onnx") == written
    assert written.details["precision"] == metadata(output)["precision"] == precision
    assert written.inputs == (TensorSpec("input", (-1, 3, 16, 16), "float32"),)
    assert written.outputs == (TensorSpec("logits", (-1, 3), "float32"),)
    assert written.details["weights"] == "float"
    assert written.details["padded"] == written.details["dead_channels"] == []
    assert written.figures["parity"]["other_top1"] == 0
    assert written.figures["parity"]["worst_layer"]["tensor"] == "logits"
    assert not {node.op_type for node in onnx.load(output).graph.node} & {"QuantizeLinear", "DequantizeLinear"}

    reference = np.load(checkpoint.with_name(written.details["reference"]["file"]))
    loaded = load_checkpoint(checkpoint)
    for module in loaded.model.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.enabled = False
    x = loaded.preprocessing.normalize(torch.from_numpy(reference["images"]).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = loaded.model(x).numpy()
    (answers,) = session(output).run(None, {"input": x.numpy()})
    assert np.linalg.norm(answers - expected) < close * np.linalg.norm(expected)
    assert np.linalg.norm(reference["logits"] - expected) < 1e-5 * np.linalg.norm(expected)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        f"model.{precision}.onnx",
        f"model.{precision}.onnx.json",
        f"model.{precision}.reference.npz",
        "model.qat",
        "model.qat.json",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_overflow_inside_is_refused_though_the_answers_are_finite(
    value: float, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*given: Any) -> dict[str, np.ndarray]:
        found = run(*given)
        for tensor in found.values():
            tensor.flat[0] = value
        return found

    monkeypatch.setattr(export.parity, "run", overflowing)
    refused("computes NaN or infinity before .*another --precision or --float-type", checkpoint=checkpoint)


def test_values_beyond_float16_are_refused_and_nothing_is_written(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.model.get_parameter("fc.bias")[1] = 1e5
    save_again(loaded, checkpoint, loaded.sidecar.details)
    refused("answers NaN or infinity.*65504.*another --precision", checkpoint=checkpoint, precision="float16")
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["model.qat", "model.qat.json"]


def save_again(loaded: Checkpoint, path: Path, details: Mapping[str, Any]) -> None:
    spec, names = ModelSpec(**details["model"]), loaded.sidecar.class_names
    save_checkpoint(path, loaded.model, spec, loaded.preprocessing, names, loaded.sidecar.figures, details, 0)


# --- a checkpoint with a dead channel, whose images are gone


@dataclass(frozen=True)
class Exported:
    sidecar: Sidecar
    folder: Path
    warnings: list[str]


@pytest.fixture(scope="module")
def bereft(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Channel 3 of conv2 is zero; the images have been removed."""
    path = tmp_path_factory.mktemp("bereft") / "model.qat"
    loaded = load_checkpoint(trained / "model.qat")
    with torch.no_grad():
        loaded.model.get_parameter("conv2.weight")[3] = 0
    details = dict(loaded.sidecar.details)
    details["data"] = {**details["data"], "source": "gone/images.npz"}
    save_again(loaded, path, details)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        sidecar = export_onnx(path)
    return Exported(sidecar, path.parent, stderr.getvalue().splitlines())


def test_a_dead_channel_is_warned_of_and_recorded(bereft: Exported) -> None:
    assert bereft.warnings[0] == (
        "warning: conv2: dead channels 3, 1 in all: their weights are zero; the scales were floored"
    )
    assert bereft.sidecar.details["dead_channels"] == [{"layer": "conv2", "channel": 3}]
    assert bereft.sidecar.figures["parity"]["other_top1"] == 0


def test_without_the_images_parity_is_measured_on_random_ones(bereft: Exported) -> None:
    (warning,) = bereft.warnings[1:]
    assert warning.startswith("warning: the test images are not at hand (no file gone/images.npz")
    assert "random ones" in warning
    assert bereft.sidecar.figures["parity"]["source"] == "random images"
    assert bereft.sidecar.figures["parity"]["images"] == 8


def test_random_images_have_no_labels(bereft: Exported) -> None:
    recorded = bereft.sidecar.details["reference"]
    reference = np.load(bereft.folder / recorded["file"])
    assert (recorded["images"], recorded["source"], recorded["top1"]) == (8, "random images", None)
    assert reference["images"].shape == (8, 16, 16, 3)
    assert reference["labels"].tolist() == [-1] * 8
    assert reference["logits"].shape == (8, 3)


# --- what is refused


def test_an_output_that_is_the_checkpoint_is_refused(checkpoint: Path) -> None:
    before = sha256_of(checkpoint)
    roundabout = checkpoint.parent / "folder" / ".." / checkpoint.name
    (checkpoint.parent / "folder").mkdir()
    (checkpoint.parent / "link").symlink_to(checkpoint)
    for output in (checkpoint, roundabout, checkpoint.parent / "link"):
        refused("would overwrite the checkpoint", checkpoint=checkpoint, output=output)
    assert sha256_of(checkpoint) == before


def test_a_checkpoint_that_ends_in_onnx_is_not_overwritten(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("model.onnx"))
    refused("would overwrite the checkpoint", checkpoint=renamed)


def test_a_checkpoint_under_the_name_of_the_reference_is_not_overwritten(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("model.reference.npz"))
    refused("would overwrite the checkpoint", checkpoint=renamed, output=checkpoint.with_name("model.onnx"))


def test_a_reference_that_cannot_be_written_is_said_before_the_work(checkpoint: Path) -> None:
    checkpoint.with_name("model.reference.npz").mkdir()
    refused("cannot write .*model.reference.npz: that is a folder", checkpoint=checkpoint)


@pytest.mark.parametrize("count", ["parity_images", "layer_images"])
def test_parity_cannot_be_left_out(checkpoint: Path, count: str) -> None:
    refused("--parity-images and --layer-images must be at least 1", checkpoint=checkpoint, **{count: 0})
    assert not checkpoint.with_suffix(".onnx").exists()


def test_an_onnx_file_is_no_checkpoint(chain: Path, tmp_path: Path) -> None:
    refused(
        "is a file of kind 'onnx', but must be of kind 'checkpoint'",
        checkpoint=chain / "model.onnx",
        output=tmp_path / "x.onnx",
    )
    refused("is a file of kind 'onnx', but must be of kind 'checkpoint'", checkpoint=chain / "model.onnx")
    assert list(tmp_path.iterdir()) == []
