"""Sidecars and atomic writes: what is whole is found, what is damaged is named, nothing half-written stays."""

import errno
import json
import os
from pathlib import Path

import pytest
from commands import ROOT

from qat.base.artifact import Parent, Sidecar, TensorSpec, read_parent, read_sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError
from qat.base.writing import atomic_write, check_writable, disk_errors


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.onnx"
    sidecar = Sidecar("onnx", inputs=(TensorSpec("input", (-1, 3, 8, 8), "float32"),), class_names=("a", "b"))
    return path, write_artifact(path, sidecar, lambda file: file.write_bytes(b"content"), seed=3)


def edit(path, **changes):
    content = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(content | changes))


def test_what_was_written_is_read(written):
    path, sidecar = written
    assert read_sidecar(path, "onnx") == sidecar
    assert sidecar.made_by["seed"] == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


@pytest.mark.parametrize("keep", [0, 3])
def test_a_truncated_artifact_names_both_hashes(written, keep):
    path, sidecar = written
    path.write_bytes(b"content"[:keep])
    with pytest.raises(UserError, match=sidecar.sha256) as error:
        read_sidecar(path, "onnx")
    assert "truncated" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"format": 1}', '{"kind": "onnx"}', "null"])
def test_a_damaged_sidecar_is_one_line(written, text):
    path, _ = written
    sidecar_path(path).write_text(text)
    with pytest.raises(UserError, match=r"model\.onnx\.json.*make model\.onnx again"):
        read_sidecar(path, "onnx")


def test_another_format_version(written):
    edit(written[0], format=99)
    with pytest.raises(UserError, match="format version 99, but this program reads 1"):
        read_sidecar(written[0], "onnx")


def test_another_kind(written):
    with pytest.raises(UserError, match="kind 'onnx', but must be of kind 'engine'"):
        read_sidecar(written[0], "engine")


def test_no_file_and_no_sidecar(written, tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_sidecar(tmp_path / "absent.onnx", "onnx")
    sidecar_path(written[0]).unlink()
    with pytest.raises(UserError, match="no sidecar"):
        read_sidecar(written[0], "onnx")


def test_a_parent_that_is_another_file_is_refused_with_both_hashes(written, tmp_path):
    path, parent = written
    child = tmp_path / "model.engine"
    sidecar = write_artifact(child, Sidecar("onnx", Parent(path.name, parent.sha256)), lambda f: f.write_bytes(b"e"))
    assert read_parent(child, sidecar, "onnx") == (path, parent)
    newer = write_artifact(path, Sidecar("onnx"), lambda file: file.write_bytes(b"trained again"))
    with pytest.raises(UserError, match=f"{parent.sha256}.*{newer.sha256}"):
        read_parent(child, sidecar, "onnx")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(written):
    path, _ = written

    def fail(file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="disk is full"):
        write_artifact(path, Sidecar("onnx"), fail)
    assert path.read_bytes() == b"content"
    assert len(list(path.parent.iterdir())) == 2


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with atomic_write(tmp_path / "new") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_really_full_disk():
    path = Path("/dev/full")
    with pytest.raises(UserError, match="disk is full"), disk_errors(path), path.open("wb", buffering=0) as file:
        file.write(b"x")


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / "file" / "model.qat")
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path)


@pytest.mark.parametrize(
    "name", ["errors", "trust", "regular_file", "supervised", "onnx_structure", "onnx_file", "streams", "lock"]
)
def test_what_readers_rest_on_needs_the_standard_library_only(name: str):
    import ast
    import sys

    tree = ast.parse((ROOT / "qat" / "base" / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    free = (
        "errors",
        "regular_file",
        "supervised",
        "streams",
        "onnx_file",
        "exit_codes",
    )
    beside = {f"qat.base.{name}" for name in free}
    assert {module.split(".")[0] for module in imported - beside} <= set(sys.stdlib_module_names)


def test_a_parent_in_another_folder_is_found_there_and_after_both_were_moved_together(written, tmp_path):
    path, parent = written
    child = tmp_path / "other" / "model.engine"
    sidecar = Sidecar("onnx", Parent.from_file(child, path, parent.sha256))
    sidecar = write_artifact(child, sidecar, lambda file: file.write_bytes(b"e"))
    assert read_parent(child, sidecar, "onnx")[1] == parent
    for file in (path, sidecar_path(path)):
        file.rename(child.parent / file.name)
    assert read_parent(child, sidecar, "onnx")[1] == parent
