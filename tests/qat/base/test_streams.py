"""Interrupts that wait for the end of what is short."""

from __future__ import annotations

import subprocess
import sys

from commands import ROOT

BEGIN = """
import os, signal
from pathlib import Path
from qat.base import streams
from qat.base.artifact import Sidecar, read_sidecar, write_artifact
streams.interrupt_on_signals()
interrupt = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
try:
"""
END = """
except KeyboardInterrupt:
    print("interrupted")
"""


def output_of(body: str, folder: str) -> list[str]:
    program = BEGIN + "".join(f"    {line}\n" for line in body.strip().splitlines()) + END
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_an_interrupt_comes_at_the_end_of_the_outermost_block(tmp_path: object) -> None:
    body = """
with streams.interrupts_held_back():
    with streams.interrupts_held_back():
        interrupt()
        print("inner")
    print("outer")
print("behind")
"""
    assert output_of(body, str(tmp_path)) == ["inner", "outer", "interrupted"]


def test_a_file_and_its_sidecar_are_both_new_or_both_old(tmp_path: object) -> None:
    body = """
real = os.replace
def replace(*given):
    real(*given)
    interrupt()
Path.replace = replace
write_artifact(Path("m.onnx"), Sidecar("onnx"), lambda path: path.write_bytes(b"new"))
"""
    assert output_of(body, str(tmp_path)) == ["interrupted"]
    assert output_of("print(read_sidecar(Path('m.onnx'), 'onnx').kind, *os.listdir())", str(tmp_path)) in (
        ["onnx", "m.onnx", "m.onnx.json"],
        ["onnx", "m.onnx.json", "m.onnx"],
    )


def test_an_interrupt_while_a_builder_is_loaded_is_no_failure_of_it(tmp_path: object) -> None:
    body = """
from deploy import installed
def find():
    try:
        interrupt()
    except KeyboardInterrupt:  # as bindings of native libraries do
        raise ImportError("initialization failed")
installed._find_rtx = find
installed.find_toolkit("tensorrt-rtx")
"""
    assert output_of(body, str(tmp_path)) == ["interrupted"]
