"""ONNX files that bring native parsers down, given to the functions of the libraries: refused before any parser.

The commands run in a child process; these functions run in their caller's, so a crash would be the caller's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from onnx import TensorProto, helper

SECONDS = 120
"""To load torch and TensorRT, whatever else runs; the work on each file takes none."""
USES = """
import json, sys
from pathlib import Path
import numpy as np
import deploy, export
from deploy.settings import BuilderOptions

def build(path, **given):
    return deploy.build_engine(path, path.with_suffix(".engine"), builder="tensorrt-rtx", **given)

USES = {
    "lint_onnx": export.lint_onnx,
    "quantize_onnx": lambda path: export.quantize_onnx(path, inputs=np.zeros((2, 3, 8, 8), np.float32)),
    "quantize_onnx by a cache": lambda path: export.quantize_onnx(path, calibration_cache=CACHE),
    "build_engine": build,
    "migrate_engine": lambda path: deploy.migrate_engine(path, CACHE),
    "migrate_engine to explicit": lambda path: deploy.migrate_engine(GOOD, CACHE, explicit=path),
}
CACHE, GOOD, *files = map(Path, sys.argv[1:])
for path in files:
    for name, use in USES.items():
        print(json.dumps([path.name, name]), end=" ", flush=True)
        try:
            use(path)
            said = "was taken"
        except export.UserError as error:
            said = str(error)
        print(json.dumps(said), flush=True)
"""


def written(path: Path, *nodes: object, functions: tuple[object, ...] = ()) -> Path:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [image], [answer])
    opset = helper.make_opsetid("", 20)
    path.write_bytes(helper.make_model(graph, functions=functions, opset_imports=[opset]).SerializeToString())
    return path


def bomb(path: Path) -> Path:
    """Thirty functions that each call the one before twice."""
    functions = []
    for index in range(30):
        domain, called = ("my", f"f{index - 1}") if index else ("", "Relu")
        nodes = [helper.make_node(called, [a], [b], domain=domain) for a, b in (("a", "t"), ("t", "b"))]
        opset = helper.make_opsetid("", 20)
        functions.append(helper.make_function("my", f"f{index}", ["a"], ["b"], nodes, [opset]))
    return written(path, helper.make_node("f29", ["x"], ["y"], domain="my"), functions=tuple(functions))


def holes(path: Path) -> Path:
    """A terabyte that takes no room on the disk, and that nobody may read to its end."""
    path.write_bytes(b"")
    try:
        os.truncate(path, 1 << 40)
    except OSError:
        pytest.skip("this file system has no files with holes")
    return path


def test_functions_of_the_libraries_refuse_what_no_parser_may_see(tmp_path: Path) -> None:
    files = {
        written(tmp_path / "node_without_output.onnx", helper.make_node("Relu", ["x"], [])): "has no output",
        bomb(tmp_path / "bomb30.onnx"): "nodes once its functions are inlined",
        holes(tmp_path / "holes.onnx"): "is not an ONNX file",
    }
    good = written(tmp_path / "good.onnx", helper.make_node("Relu", ["x"], ["y"]))
    cache = tmp_path / "c.cache"
    cache.write_text("TRT-8600-EntropyCalibration2\nx: 3f800000\n")
    script = tmp_path / "uses.py"
    script.write_text(USES)
    done = subprocess.run(
        [sys.executable, script, cache, good, *files],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr  # -11: a parser has crashed
    lines = [line.split("] ", 1) for line in done.stdout.splitlines()]
    answers = {tuple(json.loads(use + "]")): json.loads(said) for use, said in lines}
    assert len(answers) == 6 * len(files)
    for path, words in files.items():
        for (name, use), said in answers.items():
            if name == path.name:
                assert str(path) in said, f"{use}: {said}"
                assert words in said, f"{use}: {said}"
    assert not list(tmp_path.glob("*.engine"))
    assert not list(tmp_path.glob("*.int8.onnx"))
