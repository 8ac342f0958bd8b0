"""The model repository for Triton: every field of config.pbtxt by Triton's own schema, the page, what is refused."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import ROOT, Run
from google.protobuf import json_format, text_format

from deploy.triton import TritonOptions, main
from deploy.triton_config import load_schema
from deploy.triton_repository import PAGE_MARK
from qat.base.artifact import ArtifactKind, Sidecar, TensorSpec, read_sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError

ONE = ({"min": 1, "opt": 8, "max": 32},)
SEVERAL = ({"min": 1, "opt": 1, "max": 1}, {"min": 1, "opt": 16, "max": 64}, {"min": 2, "opt": 8, "max": 16})
TENSORRT = {"name": "tensorrt", "version": "8.6.0"}
PREPROCESSING = {
    "height": 28,
    "width": 20,
    "mean": [0.5, 0.25, 0.125],
    "std": [0.3, 0.2, 0.1],
    "resize": 32,
    "interpolation": "bilinear",
    "color": "RGB",
}


def write_engine(
    path: Path,
    *,
    inputs: Sequence[TensorSpec] = (TensorSpec("input", (-1, 3, 28, 20), "float32"),),
    outputs: Sequence[TensorSpec] = (TensorSpec("logits", (-1, 3), "float32"),),
    class_names: Sequence[str] = ("cat", "dog", "sea lion"),
    kind: ArtifactKind = "engine",
    plan: bytes = b"a plan",
    preprocessing: dict[str, Any] = PREPROCESSING,
    **details: Any,
) -> Path:
    """An engine as deploy.build leaves it, but for its bytes: nothing here runs it. A detail of None is left out."""
    details = {"builder": TENSORRT, "gpu": "NVIDIA H200", "profiles": list(ONE)} | details
    sidecar = Sidecar(
        kind,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        preprocessing=preprocessing,
        class_names=tuple(class_names),
        details={key: value for key, value in details.items() if value is not None},
    )
    write_artifact(path, sidecar, lambda file: file.write_bytes(plan) and None)
    return path


def write_fixed_engine(path: Path, **changes: Any) -> Path:
    """An engine of batch 4 that takes bytes and has no class names."""
    inputs = (TensorSpec("input", (4, 28, 20, 3), "uint8"),)
    outputs = (TensorSpec("logits", (4, 3), "float32"),)
    return write_engine(path, **{"inputs": inputs, "outputs": outputs, "class_names": (), "profiles": [], **changes})


def read_config(path: Path) -> Any:
    """A config.pbtxt as Triton's schema reads it."""
    return text_format.Parse(path.read_text(), load_schema().ModelConfig())


def as_dict(path: Path) -> dict[str, Any]:
    """Every field that a config.pbtxt sets; 64-bit numbers are strings, as JSON has them for protobuf."""
    return json_format.MessageToDict(read_config(path), preserving_proto_field_name=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def page_of(engine: Path, repository: Path, **options: Any) -> str:
    main(TritonOptions(model=engine, out=repository, **options))
    return (repository / "README.md").read_text()


# --- config.pbtxt and the other files


def test_a_dynamic_batch_with_one_profile(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "digits.engine")
    main(TritonOptions(model=engine, out=repository))
    dims = ["3", "28", "20"]
    assert as_dict(repository / "digits" / "config.pbtxt") == {
        "name": "digits",
        "backend": "tensorrt",
        "platform": "tensorrt_plan",
        "max_batch_size": 32,
        "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": dims}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["3"], "label_filename": "labels.txt"}],
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "dynamic_batching": {"preferred_batch_size": [8], "max_queue_delay_microseconds": "100"},
        "optimization": {
            "cuda": {
                "graphs": True,
                "graph_spec": [{"batch_size": size, "input": {"input": {"dim": dims}}} for size in (1, 8, 32)],
            }
        },
        "model_warmup": [
            {
                "name": "batch_8",
                "batch_size": 8,
                "inputs": {"input": {"data_type": "TYPE_FP32", "dims": dims, "zero_data": True}},
            }
        ],
    }


def test_several_profiles_and_all_options(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "digits.engine", profiles=SEVERAL)
    options = {"name": "digits-2.0_b", "instances": 3, "max_queue_delay_us": 0}
    main(TritonOptions(model=engine, out=repository, **options))
    config = read_config(repository / "digits-2.0_b" / "config.pbtxt")
    assert config.name == "digits-2.0_b"
    assert config.max_batch_size == 64
    (group,) = config.instance_group
    assert (group.count, list(group.profile)) == (3, ["0", "1", "2"])
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 8, 16]
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert [graph.batch_size for graph in config.optimization.cuda.graph_spec] == [1, 2, 8, 16, 64]
    assert all(list(graph.input["input"].dim) == [3, 28, 20] for graph in config.optimization.cuda.graph_spec)
    assert [(sample.name, sample.batch_size) for sample in config.model_warmup] == [
        ("batch_1", 1),
        ("batch_8", 8),
        ("batch_16", 16),
    ]


def test_a_fixed_batch_is_part_of_every_shape(tmp_path: Path, repository: Path) -> None:
    engine = write_fixed_engine(tmp_path / "digits.engine")
    main(TritonOptions(model=engine, out=repository))
    dims = ["4", "28", "20", "3"]
    # max_batch_size and the graph's batch_size are 0, which the schema takes for not set
    assert as_dict(repository / "digits" / "config.pbtxt") == {
        "name": "digits",
        "backend": "tensorrt",
        "platform": "tensorrt_plan",
        "input": [{"name": "input", "data_type": "TYPE_UINT8", "dims": dims}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["4", "3"]}],
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "optimization": {"cuda": {"graphs": True, "graph_spec": [{"input": {"input": {"dim": dims}}}]}},
        "model_warmup": [
            {
                "name": "batch_1",
                "batch_size": 1,
                "inputs": {"input": {"data_type": "TYPE_UINT8", "dims": dims, "zero_data": True}},
            }
        ],
    }


def test_two_inputs_are_in_every_graph_and_sample(tmp_path: Path, repository: Path) -> None:
    inputs = (TensorSpec("left", (-1, 3, 8, 8), "float32"), TensorSpec("right:0", (-1, 5), "int32"))
    main(TritonOptions(model=write_engine(tmp_path / "pair.engine", inputs=inputs), out=repository))
    config = read_config(repository / "pair" / "config.pbtxt")
    assert [(entry.name, list(entry.dims)) for entry in config.input] == [("left", [3, 8, 8]), ("right:0", [5])]
    for graph in config.optimization.cuda.graph_spec:
        assert {name: list(shape.dim) for name, shape in graph.input.items()} == {"left": [3, 8, 8], "right:0": [5]}
    (sample,) = config.model_warmup
    assert sample.inputs["right:0"].data_type == load_schema().DataType.Value("TYPE_INT32")
    assert sample.inputs.keys() == {"left", "right:0"}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", "TYPE_FP32"),
        ("float16", "TYPE_FP16"),
        ("bfloat16", "TYPE_BF16"),
        ("uint8", "TYPE_UINT8"),
        ("int8", "TYPE_INT8"),
        ("int32", "TYPE_INT32"),
        ("int64", "TYPE_INT64"),
        ("bool", "TYPE_BOOL"),
    ],
)
def test_types(tmp_path: Path, repository: Path, dtype: str, expected: str) -> None:
    spec = TensorSpec("tensor", (-1, 7), dtype)
    engine = write_engine(tmp_path / "typed.engine", inputs=(spec,), outputs=(spec,))
    main(TritonOptions(model=engine, out=repository))
    config = as_dict(repository / "typed" / "config.pbtxt")
    found = [config["input"][0], config["output"][0], config["model_warmup"][0]["inputs"]["tensor"]]
    assert [entry["data_type"] for entry in found] == [expected] * 3


def test_an_output_of_one_number_for_each_image_is_reshaped(tmp_path: Path, repository: Path) -> None:
    outputs = (TensorSpec("best", (-1,), "int64"), TensorSpec("logits", (-1, 3), "float32"))
    main(TritonOptions(model=write_engine(tmp_path / "m.engine", outputs=outputs), out=repository))
    best, logits = read_config(repository / "m" / "config.pbtxt").output
    assert (list(best.dims), best.HasField("reshape"), list(best.reshape.shape)) == ([1], True, [])
    assert not logits.HasField("reshape")
    assert (best.label_filename, logits.label_filename) == ("", "labels.txt")


def test_the_plan_is_the_engine(tmp_path: Path, repository: Path) -> None:
    plan = bytes(range(256)) * 1000
    main(TritonOptions(model=write_engine(tmp_path / "m.engine", plan=plan), out=repository))
    assert (repository / "m" / "1" / "model.plan").read_bytes() == plan
    names = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert names == {"README.md", "m/config.pbtxt", "m/labels.txt", "m/1/model.plan"}


def test_labels_are_one_line_for_each_class(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "m.engine", class_names=("cat", "sea\nlion", "größer"))
    main(TritonOptions(model=engine, out=repository))
    assert (repository / "m" / "labels.txt").read_text(encoding="utf-8") == "cat\nsea lion\ngrößer\n"


def test_class_names_that_no_output_fits_are_warned_of(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(TritonOptions(model=write_engine(tmp_path / "m.engine", class_names=("a", "b")), out=repository))
    assert "no output of" in capsys.readouterr().err
    assert "label_filename" not in (repository / "m" / "config.pbtxt").read_text()


# --- for the Python backend


def write_onnx(path: Path, batch: int = -1) -> Path:
    """An ONNX file of uint8 [N, 3] -> float32 [N, 3], with its sidecar."""
    sides = [
        [onnx.helper.make_tensor_value_info(name, kind, ["N" if batch == -1 else batch, 3])]
        for name, kind in (("input", onnx.TensorProto.UINT8), ("logits", onnx.TensorProto.FLOAT))
    ]
    node = onnx.helper.make_node("Cast", ["input"], ["logits"], to=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph([node], "cast", *sides)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    inputs, outputs = (TensorSpec("input", (batch, 3), "uint8"),), (TensorSpec("logits", (batch, 3), "float32"),)
    sidecar = Sidecar("onnx", inputs=inputs, outputs=outputs, class_names=("cat", "dog", "sea lion"))
    write_artifact(path, sidecar, lambda file: onnx.save(model, file))
    return path


def test_an_onnx_file_runs_on_the_processor(tmp_path: Path, repository: Path) -> None:
    path = write_onnx(tmp_path / "digits.onnx")
    main(TritonOptions(model=path, out=repository, backend="python", instances=2, max_batch=8))
    version = repository / "digits" / "1"
    assert {file.name for file in version.iterdir()} == {"model.onnx", "model.onnx.json", "model.py"}
    assert (version / "model.onnx").read_bytes() == path.read_bytes()
    assert read_sidecar(version / "model.onnx", "onnx") == read_sidecar(path, "onnx")
    assert as_dict(repository / "digits" / "config.pbtxt") == {
        "name": "digits",
        "backend": "python",
        "max_batch_size": 8,
        "input": [{"name": "input", "data_type": "TYPE_UINT8", "dims": ["3"]}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["3"], "label_filename": "labels.txt"}],
        "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
        "dynamic_batching": {"preferred_batch_size": [8], "max_queue_delay_microseconds": "100"},
        "model_warmup": [
            {
                "name": "batch_8",
                "batch_size": 8,
                "inputs": {"input": {"data_type": "TYPE_UINT8", "dims": ["3"], "zero_data": True}},
            }
        ],
    }
    page = (repository / "README.md").read_text()
    assert "ONNX Runtime runs on the processor" in page
    assert "The processor runs 2 instances" in page
    assert "--shared-memory=system" in page
    assert "docker" not in page
    assert not re.search(r"TensorRT|GPU: |None|{{|{%", page)


def test_an_onnx_file_of_a_fixed_batch(tmp_path: Path, repository: Path) -> None:
    path = write_onnx(tmp_path / "digits.onnx", batch=4)
    main(TritonOptions(model=path, out=repository, backend="python"))
    config = read_config(repository / "digits" / "config.pbtxt")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [4, 3])
    assert not config.HasField("dynamic_batching")
    with pytest.raises(UserError, match="--max-batch is for ONNX files with a dynamic batch"):
        main(TritonOptions(model=path, out=repository, name="other", backend="python", max_batch=8))


@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
def test_any_engine_runs_in_the_python_backend(tmp_path: Path, repository: Path, builder: str) -> None:
    engine = write_engine(tmp_path / "m.engine", builder={"name": builder, "version": "1.2.3"}, profiles=SEVERAL)
    main(TritonOptions(model=engine, out=repository, backend="python"))
    version = repository / "m" / "1"
    assert {file.name for file in version.iterdir()} == {"model.engine", "model.engine.json", "model.py"}
    assert read_sidecar(version / "model.engine", "engine") == read_sidecar(engine, "engine")
    config = read_config(repository / "m" / "config.pbtxt")
    (group,) = config.instance_group
    assert (config.backend, config.platform, config.max_batch_size) == ("python", "", 64)
    assert (group.kind, list(group.profile)) == (load_schema().ModelInstanceGroup.KIND_GPU, [])
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 8, 16]
    assert not config.HasField("optimization")
    page = (repository / "README.md").read_text()
    assert "which TensorRT-RTX 1.2.3 built" in page or "which TensorRT 1.2.3 built" in page
    assert "**GPU: NVIDIA H200.**" in page
    assert "docker" not in page
    assert "CUDA graph" not in page


def test_another_backend_replaces_all_files_of_the_model(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "m.engine")
    for backend, names in (
        ("tensorrt", {"model.plan"}),
        ("python", {"model.engine", "model.engine.json", "model.py"}),
        ("tensorrt", {"model.plan"}),
    ):
        main(TritonOptions(model=engine, out=repository, backend=backend, overwrite=True))
        assert {file.name for file in (repository / "m" / "1").iterdir()} == names


def test_what_the_backends_do_not_serve(tmp_path: Path, repository: Path) -> None:
    path = write_onnx(tmp_path / "digits.onnx")
    engine = write_engine(tmp_path / "m.engine", inputs=(TensorSpec("input", (-1, 3), "bfloat16"),))
    for options, message in (
        ({"model": path}, f"TensorRT backend serves engines, not {path}: give --backend python"),
        ({"model": path, "backend": "python", "max_batch": 0}, "--max-batch 0: must be at least 1"),
        ({"model": engine, "backend": "python"}, "has type bfloat16, but Triton takes float32, float16, uint8"),
        ({"model": engine, "max_batch": 8}, "--max-batch is for ONNX files"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            main(TritonOptions(out=repository, **options))
    assert not (repository / "digits").exists()


def test_onnx_files_that_cannot_be_served_are_refused_by_their_own_name(tmp_path: Path, repository: Path) -> None:
    path = write_onnx(tmp_path / "digits.onnx")
    sidecar = read_sidecar(path, "onnx")
    unknown = onnx.load(path)
    unknown.graph.node[0].op_type = "Odd"
    outside = onnx.load(path)
    outside.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(512, np.float32), "w"))
    onnx.save(outside, tmp_path / "outside.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    for content, message in (
        (b"no network", f"{path} is not an ONNX file"),
        (unknown.SerializeToString(), f"ONNX Runtime cannot run {path}: "),
        ((tmp_path / "outside.onnx").read_bytes(), f"{path} keeps weights in another file, which the repository"),
    ):
        write_artifact(path, sidecar, lambda file, content=content: file.write_bytes(content) and None)
        with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
            main(TritonOptions(model=path, out=repository, backend="python"))
        assert ".part" not in str(caught.value)
        assert not (repository / "digits").exists()


# --- replacing


def test_overwrite_replaces_all_files_of_the_model(tmp_path: Path, repository: Path) -> None:
    main(TritonOptions(model=write_engine(tmp_path / "m.engine"), out=repository))
    assert (repository / "m" / "labels.txt").exists()
    engine = write_fixed_engine(tmp_path / "m.engine", plan=b"another plan")
    main(TritonOptions(model=engine, out=repository, overwrite=True))
    assert (repository / "m" / "1" / "model.plan").read_bytes() == b"another plan"
    assert read_config(repository / "m" / "config.pbtxt").max_batch_size == 0
    assert not (repository / "m" / "labels.txt").exists()
    assert "4 x 28 x 20 x 3" in (repository / "README.md").read_text()


def test_a_second_model_leaves_the_first_alone(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "m.engine")
    main(TritonOptions(model=engine, out=repository))
    before = (repository / "m" / "config.pbtxt").read_bytes()
    main(TritonOptions(model=engine, out=repository, name="other", instances=2))
    assert (repository / "m" / "config.pbtxt").read_bytes() == before
    assert read_config(repository / "other" / "config.pbtxt").instance_group[0].count == 2


# --- the page


def commands(page: str) -> list[list[str]]:
    """The commands of the page, as a shell splits them."""
    lines = re.findall(r"^ {4}(.*)$", page.replace("\\\n", ""), re.MULTILINE)
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0] in ("docker", "tritonserver", "curl", "perf_analyzer")]


def perf_runs(page: str) -> list[dict[str, str]]:
    """The options of every run of perf_analyzer."""
    found = [" ".join(words).replace("=", " ").split()[1:] for words in commands(page) if words[0] == "perf_analyzer"]
    return [dict(zip(words[::2], words[1::2], strict=True)) for words in found]


def test_the_page_names_the_version_the_gpu_and_how_to_start(tmp_path: Path, repository: Path) -> None:
    page = page_of(
        write_engine(tmp_path / "digits.engine", builder={"name": "tensorrt", "version": "10.3.0.26"}), repository
    )
    assert page.startswith(PAGE_MARK)
    assert "tritonserver container of NVIDIA's catalogue whose TensorRT is\n10.3.0.26." in page
    assert "**TensorRT 10.3.0.26.**" in page
    assert "**GPU: NVIDIA H200.**" in page
    docker, server, curl = commands(page)[:3]
    assert docker[:2] == ["docker", "run"]
    assert docker[docker.index("-v") + 1] == "$PWD:/models:ro"
    assert docker[-3:] == ["$TRITON_IMAGE", "tritonserver", "--model-repository=/models"]
    assert server == ["tritonserver", "--model-repository=$PWD"]
    assert curl[-1] == "localhost:8000/v2/models/digits/ready"


def test_the_page_measures_a_dynamic_batch(tmp_path: Path, repository: Path) -> None:
    page = page_of(write_engine(tmp_path / "digits.engine"), repository, instances=2, max_queue_delay_us=250)
    latency, sweep, batches = perf_runs(page)
    for run in (latency, sweep, batches):
        assert (run["-m"], run["-i"], run["--shape"]) == ("digits", "grpc", "input:3,28,20")
        assert run["--percentile"] == "99"
    assert (latency["-b"], latency["--concurrency-range"]) == ("1", "1")
    assert (sweep["-b"], sweep["--concurrency-range"]) == ("1", "16:128:16")
    assert (batches["-b"], batches["--concurrency-range"]) == ("32", "1:4:1")
    assert len({run["-f"] for run in (latency, sweep, batches)}) == 3
    assert "within 250 microseconds" in page
    assert "Each GPU runs 2 instances" in page


def test_the_page_measures_a_fixed_batch(tmp_path: Path, repository: Path) -> None:
    page = page_of(write_fixed_engine(tmp_path / "digits.engine"), repository)
    runs = perf_runs(page)
    assert [(run["-b"], run["--shape"]) for run in runs] == [("1", "input:4,28,20,3")] * 2
    assert [run["--concurrency-range"] for run in runs] == ["1", "1:8:1"]
    assert "one inference is 4 images" in page
    assert "microseconds share a batch" not in page
    assert "labels.txt" not in page


def test_the_page_quotes_names_for_the_shell(tmp_path: Path, repository: Path) -> None:
    page = page_of(write_engine(tmp_path / "m.engine", inputs=(TensorSpec("in $0", (-1, 3), "float32"),)), repository)
    for words in commands(page):
        if words[0] == "perf_analyzer":
            assert words[words.index("--shape") + 1] == "in $0:3"
    assert "'in $0:3'" in page


def test_the_page_says_what_to_send(tmp_path: Path, repository: Path) -> None:
    page = page_of(write_engine(tmp_path / "a.engine"), repository)
    assert "| `input` | batch x 3 x 28 x 20 | float32 |" in page
    assert "| `logits` | batch x 3 | float32 |" in page
    assert "a batch of 1 to 32" in page
    assert "short side has 32 pixels" in page
    assert "cut 28 x 20 pixels" in page
    assert "(x / 255 - mean) / std in the order NCHW, with mean 0.5, 0.25, 0.125 and std 0.3, 0.2, 0.1" in page

    page = page_of(write_fixed_engine(tmp_path / "b.engine"), repository)
    assert "| `input` | 4 x 28 x 20 x 3 | uint8 |" in page
    assert "send the bytes, 0 to 255, in the order NHWC" in page
    assert "mean" not in page

    page = page_of(write_engine(tmp_path / "c.engine", preprocessing={}), repository)
    assert "is not recorded" in page
    assert "decode" not in page

    camera = write_engine(
        tmp_path / "camera.engine",
        inputs=(TensorSpec("input", (-1, 90, 160, 3), "uint8"),),
        preprocessing={**PREPROCESSING, "letterbox": True, "source_size": [90, 160]},
    )
    page = page_of(camera, repository)
    assert "as the camera gives it, 90 x 160 pixels" in page
    assert "the network resizes it to 28 x 20" in page
    assert "send the bytes, 0 to 255, in the order NHWC" in page
    assert "114" not in page

    page = page_of(write_engine(tmp_path / "e.engine", preprocessing={**PREPROCESSING, "letterbox": True}), repository)
    assert "the largest that fits in 28 x 20 pixels" in page
    assert "grey of value 114" in page
    assert "short side" not in page
    assert "centre" not in page

    page = page_of(write_engine(tmp_path / "d.engine", profiles=SEVERAL, gpu=None), repository)
    assert "3 optimization profiles" in page
    assert "**GPU: the one that the engine was built on.**" in page


def test_the_page_names_no_registry_and_no_address(tmp_path: Path, repository: Path) -> None:
    for index, write in enumerate((write_engine, write_fixed_engine)):
        page = page_of(write(tmp_path / f"m{index}.engine"), repository)
        assert not re.search(r"https?:|nvcr|ngc|docker\.io|\bghcr|{{|{%", page)
        assert "None" not in page


def test_the_commands_of_the_page_are_shell(tmp_path: Path, repository: Path) -> None:
    page = page_of(write_engine(tmp_path / "m.engine"), repository)
    start = page.index("## Start it")
    script = "\n".join(line[4:] for line in page[start:].splitlines() if line.startswith("    "))
    assert script.count("perf_analyzer -m") == 3
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- what is refused


def rtx(engine: Path) -> tuple[str, ...]:
    write_engine(engine, builder={"name": "tensorrt-rtx", "version": "1.7.1.116"})
    return "built by tensorrt-rtx 1.7.1.116", "--builder tensorrt on a machine with an NVIDIA GPU"


def no_engine(engine: Path) -> tuple[str, ...]:
    return f"no file {engine}", "check the path"


def no_sidecar(engine: Path) -> tuple[str, ...]:
    sidecar_path(write_engine(engine)).unlink()
    return "has no sidecar m.engine.json", "copy it there"


def an_onnx_file(engine: Path) -> tuple[str, ...]:
    write_engine(engine, kind="onnx")
    return "is a file of kind 'onnx', but must be of kind 'engine'", "give the right file"


def another_engine_than_the_sidecar_s(engine: Path) -> tuple[str, ...]:
    write_engine(engine).write_bytes(b"another plan")
    return str(engine), "is another one"


def profiles_of_an_older_build(engine: Path) -> tuple[str, ...]:
    write_engine(engine, profiles=None, batch={"min": 1, "opt": 8, "max": 32})
    return "has missing or wrong optimization profiles", "details.profiles: it is missing", "build the engine again"


def a_profile_without_optimum(engine: Path) -> tuple[str, ...]:
    write_engine(engine, profiles=[{"min": 1, "max": 8}])
    return "lacks or misstates an entry (details.profiles[0]: ", "opt"


def stripped(engine: Path) -> tuple[str, ...]:
    write_engine(engine, settings={"strip_weights": True})
    return ("was built without weights",)


def a_profile_upside_down(engine: Path) -> tuple[str, ...]:
    write_engine(engine, profiles=[{"min": 1, "opt": 8, "max": 4}])
    return "lacks or misstates an entry (details.profiles[0]: 1, 8, 4 must rise"


def a_profile_and_a_fixed_batch(engine: Path) -> tuple[str, ...]:
    write_engine(engine, outputs=(TensorSpec("logits", (1, 3), "float32"),))
    return "tensor 'logits' has shape [1, 3]", "must start with a dynamic batch"


def a_dynamic_height(engine: Path) -> tuple[str, ...]:
    write_engine(engine, inputs=(TensorSpec("input", (-1, 3, -1, 20), "float32"),))
    return "tensor 'input' has shape [-1, 3, -1, 20]", "no other -1"


def a_dynamic_batch_without_profile(engine: Path) -> tuple[str, ...]:
    write_engine(engine, profiles=[])
    return "tensor 'input' has shape [-1, 3, 28, 20]", "no profile"


def an_unknown_type(engine: Path) -> tuple[str, ...]:
    write_engine(engine, outputs=(TensorSpec("logits", (-1, 3), "fp8"),))
    return "tensor 'logits' has type fp8", "float32, float16"


def no_tensors(engine: Path) -> tuple[str, ...]:
    write_engine(engine, inputs=())
    return "names no inputs", "make it again"


@pytest.mark.parametrize(
    "spoil",
    [
        rtx,
        no_engine,
        no_sidecar,
        an_onnx_file,
        another_engine_than_the_sidecar_s,
        profiles_of_an_older_build,
        a_profile_without_optimum,
        stripped,
        a_profile_upside_down,
        a_profile_and_a_fixed_batch,
        a_dynamic_height,
        a_dynamic_batch_without_profile,
        an_unknown_type,
        no_tensors,
    ],
)
def test_bad_engines(tmp_path: Path, repository: Path, spoil: Callable[[Path], tuple[str, ...]]) -> None:
    engine = tmp_path / "m.engine"
    parts = spoil(engine)
    with pytest.raises(UserError) as caught:
        main(TritonOptions(model=engine, out=repository))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not repository.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "'' cannot be the name of a model: give --name"),
        ({"name": "a/b"}, "'a/b' cannot be the name"),
        ({"name": ".."}, "'..' cannot be the name"),
        ({"name": "two words"}, "'two words' cannot be the name"),
        ({"name": "-m"}, "'-m' cannot be the name"),
        ({"name": "digits\n"}, "cannot be the name"),
        ({"instances": 0}, "--instances 0: must be at least 1"),
        ({"max_queue_delay_us": -1}, "--max-queue-delay-us -1: must be at least 0"),
    ],
)
def test_bad_options(tmp_path: Path, repository: Path, options: dict[str, Any], message: str) -> None:
    engine = write_engine(tmp_path / "m.engine")
    with pytest.raises(UserError, match=re.escape(message)):
        main(TritonOptions(model=engine, out=repository, **options))
    assert not repository.exists()


def test_an_engine_whose_name_cannot_be_that_of_a_model(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "my model.engine")
    with pytest.raises(UserError, match="'my model' cannot be the name of a model: give --name"):
        main(TritonOptions(model=engine, out=repository))
    main(TritonOptions(model=engine, out=repository, name="my-model"))
    assert (repository / "my-model" / "1" / "model.plan").exists()


def test_a_model_of_the_same_name_is_not_replaced_unasked(tmp_path: Path, repository: Path) -> None:
    main(TritonOptions(model=write_engine(tmp_path / "m.engine"), out=repository))
    with pytest.raises(UserError, match=re.escape(f"{repository / 'm'} exists: give --overwrite")):
        main(TritonOptions(model=write_engine(tmp_path / "m.engine", plan=b"new"), out=repository))
    assert (repository / "m" / "1" / "model.plan").read_bytes() == b"a plan"


def test_a_later_version_that_would_be_served_instead_is_named(tmp_path: Path, repository: Path) -> None:
    engine = write_engine(tmp_path / "m.engine")
    main(TritonOptions(model=engine, out=repository))
    (repository / "m" / "2").mkdir()
    with pytest.raises(UserError, match="has version 2, which Triton would serve"):
        main(TritonOptions(model=engine, out=repository, overwrite=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_page_of_somebody_else_is_not_replaced(tmp_path: Path, repository: Path, overwrite: bool) -> None:
    repository.mkdir()
    (repository / "README.md").write_text("# My project\n")
    with pytest.raises(UserError, match=r"README.md was not written by this command"):
        main(TritonOptions(model=write_engine(tmp_path / "m.engine"), out=repository, overwrite=overwrite))
    assert [path.name for path in repository.iterdir()] == ["README.md"]
    assert (repository / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_the_model(tmp_path: Path, repository: Path, overwrite: bool) -> None:
    repository.mkdir()
    (repository / "m").write_text("")
    with pytest.raises(UserError, match=re.escape(str(repository / "m"))):
        main(TritonOptions(model=write_engine(tmp_path / "m.engine"), out=repository, overwrite=overwrite))
    assert [path.name for path in repository.iterdir()] == ["m"]


def test_without_tritonclient_the_error_says_how_to_install_it(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = write_engine(tmp_path / "m.engine")
    monkeypatch.setitem(sys.modules, "tritonclient", None)  # Python's own way to say that a package is not there
    with pytest.raises(UserError, match=re.escape("pip install -e '.[triton]'")):
        main(TritonOptions(model=engine, out=repository))
    assert not repository.exists()


def test_a_tritonclient_without_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tritonclient").mkdir()
    (tmp_path / "tritonclient" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot load Triton's schema .*model_config_pb2.py .*pip install -e"):
        load_schema()


# --- the command line


def test_the_command_line(tmp_path: Path, repository: Path, command: Run) -> None:
    engine = write_engine(tmp_path / "m.engine")
    given = (engine, "--out", repository, "--name", "digits", "--instances", 2, "--max-queue-delay-us", 300)
    done = command("deploy.triton", *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {repository / 'digits'}" in done.stdout
    config = read_config(repository / "digits" / "config.pbtxt")
    assert (config.instance_group[0].count, config.dynamic_batching.max_queue_delay_microseconds) == (2, 300)

    refused = command("deploy.triton", *given)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert refused.stderr.startswith("error: ")
    assert "give --overwrite" in refused.stderr
    assert command("deploy.triton", *given, "--overwrite").returncode == 0


def test_a_full_disk_leaves_no_half_of_a_model(tmp_path: Path, repository: Path, command: Run) -> None:
    engine = write_engine(tmp_path / "m.engine", plan=bytes(100_000))
    done = command("deploy.triton", engine, "--out", repository, file_size=20_000)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"error: cannot write {repository / 'm' / '1' / 'model.plan'}" in done.stderr
    assert list(repository.iterdir()) == []

    main(TritonOptions(model=write_engine(tmp_path / "m.engine"), out=repository))
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    write_engine(engine, plan=bytes(100_000))
    done = command("deploy.triton", engine, "--out", repository, "--overwrite", file_size=20_000)
    assert done.returncode == 2
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_help_imports_nothing_heavy_and_the_schema_needs_no_grpc_and_does_not_warn() -> None:
    heavy = ("torch", "onnx", "tensorrt", "numpy", "jinja2", "google.protobuf", "grpc", "tritonclient")
    code = (
        "import sys, runpy\n"
        "sys.argv = ['deploy.triton', '--help']\n"
        "try: runpy.run_module('deploy.triton', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])\n"
        "from deploy.triton_config import load_schema\n"
        "name = load_schema().ModelConfig.DESCRIPTOR.full_name\n"
        "print('SCHEMA', name, [name for name in ('grpc', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *help_text, imported, schema = done.stdout.splitlines()
    assert "--max-queue-delay-us" in "\n".join(help_text)
    assert imported == "HEAVY []"
    assert schema == "SCHEMA inference.ModelConfig []"
