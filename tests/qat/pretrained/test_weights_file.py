"""Weights files: what training scripts save is read, no code runs, and a message says only what is certain."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qat.base.errors import UserError
from qat.pretrained.weights_file import read_weights_file

TENSORS = {"weight": torch.arange(4.0), "bias": torch.ones(2)}


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        read_weights_file(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    for part in (str(path), *parts):
        assert part in line, line


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.1, output_dir=pathlib.Path("runs"), size=torch.Size([3])),
        types.SimpleNamespace(lr=0.1),
        np.float64(0.5),
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.arange(3),
        np.dtype("float16"),
        torch.Size([1, 2]),
        torch.device("cpu"),
        torch.float16,
        pathlib.Path("a") / "b",
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        frozenset({1}),
        range(3),
        {"nested": [argparse.Namespace(a=np.float64(1.0))]},
    ],
    ids=str,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_inert_values_beside_the_tensors(tmp_path: Path, beside: Any, zipped: bool) -> None:
    torch.save({"model": TENSORS, "beside": beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights_file(tmp_path / "w.pth")
    assert all(torch.equal(found["model"][key], tensor) for key, tensor in TENSORS.items())


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_of_a_file_runs(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    code = f"open({str(made)!r}, 'w')"
    for content, name in ((Runs(eval, code), "eval"), (Runs(exec, code), "exec"), (Runs(Path.touch, made), "getattr")):
        torch.save({"model": TENSORS, "args": content}, tmp_path / "w.pth", pickle_protocol=protocol)
        refused(tmp_path / "w.pth", name if protocol == 2 else "Unsupported operand")  # torch reads protocol 2
        assert not made.exists()


def test_inert_types_are_not_built(tmp_path: Path) -> None:
    """A placeholder takes their place, so not even their constructors see what the file holds."""
    torch.save({"args": argparse.Namespace(a=1), "number": np.float64(2.0)}, tmp_path / "w.pth")
    found = read_weights_file(tmp_path / "w.pth")
    assert {type(value).__name__ for value in found.values()} == {"_Placeholder"}
    assert not any(vars(value) for value in found.values())


def test_a_whole_model_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    refused(
        tmp_path / "w.pth", "Python objects (torch.nn.modules.linear.Linear)", "torch.save(model.state_dict(), file)"
    )


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.pth")
    assert read_weights_file(tmp_path / "w.pth").keys() == TENSORS.keys()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    large = {"weight": torch.ones(1000), "bias": torch.ones(10)}
    torch.save(large, tmp_path / "w.pth")
    save_file(large, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path, "is truncated", "get it again")
    refused(tmp_path / "w.safetensors", f"and it has {int(share * len(whole))}")


def test_a_header_of_safetensors_that_is_cut_off(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:20])
    refused(tmp_path / "w.safetensors", "is truncated: its header tells of", "and it has 20")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html><'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        (b"nonsense" * 20, "begins with b'nonsensenonsense'"),
        (b"\x80\x02}q\x00X", "begins with"),
    ],
)
def test_other_files(tmp_path: Path, suffix: str, content: bytes, part: str) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    refused(path, part)
    with pytest.raises(UserError) as caught:
        read_weights_file(path)
    assert "truncated" not in str(caught.value)


def test_a_zip_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    refused(tmp_path / "w.pth", "cannot read weights file")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_in_torchs_words(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "TorchScript")


def test_a_tensor_beyond_the_end_of_a_safetensors_file_is_told_by_its_reader(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content.replace(b"F32", b"F99"))
    refused(tmp_path / "w.safetensors", "F99")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_end_in_one_line(tmp_path: Path, zipped: bool) -> None:
    path, random = tmp_path / "w.pth", np.random.default_rng(0)
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    whole, lines = path.read_bytes(), []
    for position in random.integers(len(whole), size=150):
        damaged = bytearray(whole)
        damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_weights_file(path)
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 10
    assert not any("\n" in line for line in lines)


def test_a_tensor_that_repeats_one_value(tmp_path: Path) -> None:
    """A stride of 0 makes a terabyte of four bytes."""
    path = tmp_path / "w.pt"
    torch.save({"conv.weight": torch.ones(3), "fc.weight": torch.zeros(1).expand(1 << 38)}, path)
    with pytest.raises(UserError, match=r"holds fc.weight of \[274877906944\], more values than the file has"):
        read_weights_file(path)
    torch.save({"mask": torch.zeros(1).expand(1 << 20)}, path)
    assert read_weights_file(path)["mask"].shape == (1 << 20,)


def test_dicts_that_hold_one_dict_many_times(tmp_path: Path) -> None:
    path, content = tmp_path / "w.pt", {"w": torch.ones(3)}
    for _ in range(4):
        content = {f"k{index}": content for index in range(300)}  # type: ignore[misc]
    torch.save(content, path)
    with pytest.raises(UserError, match="entries, which it repeats"):
        read_weights_file(path)
    inner = {"w": torch.ones(3)}
    inner["itself"] = inner  # type: ignore[assignment]
    torch.save(inner, path)
    assert read_weights_file(path)["w"].shape == (3,)  # nobody looks deeper than a few
