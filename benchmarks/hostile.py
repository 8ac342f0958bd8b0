"""Makes hostile files by a seed, runs commands on them, and counts what each did within 10 s and 2 GiB.

    python -m benchmarks.hostile --seed 1 --mutated 40 | tee benchmarks/hostile.txt

Seconds are those of processor time, because other work may run on the machine.

Right: the command did its work. One line: exit code 2 and one line of error that names the file. Everything else is a
fault: internal error, memory (more than 2 GiB resident), hang, crash. The files are those that brought the program down
once (function bombs, absent data, archives that swell, FIFOs, loops of links, many nodes), and mutated ONNX files.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SECONDS, BYTES = 10, 2 << 30
WALL = 6  # times as long may pass: other work may run on the machine
LINT, QUANTIZE, BUILD = "export.lint", "export.quantize", "deploy.build"
Case = tuple[str, list[str]]  # the file's name, and the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutated", type=int, default=40, help="mutated ONNX files")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    print(f"seed {options.seed}; {options.seconds:g} s of processor time and {BYTES >> 30} GiB for each command")
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, command in cases(folder, random.Random(options.seed), options.mutated):
            outcome, said = run(command, folder / file, options.seconds)
            totals[outcome] += 1
            if outcome not in ("right", "one line") or not file.startswith("mutated"):
                print(f"{file:28} {command[0]:16} {outcome:15} {said.replace(name, '')[:150]}", flush=True)
    print("\n" + "\n".join(f"{outcome:15} {count}" for outcome, count in totals.most_common()))


def run(command: list[str], file: Path, seconds: float) -> tuple[str, str]:
    """What the command did, and its last line."""
    before = set(file.parent.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limited,
    )
    late = threading.Timer(WALL * seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    assert process.stderr is not None
    lines = [line.rstrip() for line in process.stderr]
    hung = not late.is_alive()
    late.cancel()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    faults = [line for line in lines if not line.startswith("warning: ")]
    said = faults[-1] if faults else ""
    left = [path.name for path in set(file.parent.iterdir()) - before if path.name.endswith(".part")]
    if hung or usage.ru_utime + usage.ru_stime > seconds:
        return "hang", f"{usage.ru_utime + usage.ru_stime:.1f} s of processor time"
    if process.returncode < 0:
        return "crash", signal.Signals(-process.returncode).name
    if usage.ru_maxrss * 1024 > BYTES:
        return "memory", f"{usage.ru_maxrss / 2**20:.1f} GiB"
    if "internal error" in said or "Traceback" in "".join(lines):
        return "internal error", said
    if process.returncode == 2:
        one = len(faults) == 1 and said.startswith("error: ") and file.name in said and not left
        return ("one line" if one else "not one line"), said or f"left {left}"
    return "right", ""


def limited() -> None:
    """In the child: no more data than ``BYTES``, and the kernel ends what computes for twice as long as it may."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))


# --- files


def cases(folder: Path, chance: random.Random, mutated: int) -> Iterator[Case]:
    inputs = folder / "inputs.npy"
    np.save(inputs, np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32))
    whole = network()
    (folder / "good.onnx").write_bytes(whole)
    for name, content in models(folder).items():
        if content:
            (folder / name).write_bytes(content)
        for command in (LINT, QUANTIZE, BUILD):
            given = ["--data", str(inputs)] if command == QUANTIZE else []
            output = [] if command == LINT else ["--output", str(folder / "written")]
            yield name, [command, str(folder / name), *given, *output]
    for index in range(mutated):
        name = f"mutated{index}.onnx"
        (folder / name).write_bytes(spoiled(whole, chance))
        yield name, [chance.choice((LINT, QUANTIZE, BUILD)), str(folder / name)]
    for name, make in DATA.items():
        make(folder / name)
        good = [str(folder / "good.onnx"), "--output", str(folder / "written")]
        yield name, [QUANTIZE, *good, "--data", str(folder / name)]
    (folder / "net.py").write_text(NET)
    for name, content in weights().items():
        (folder / name).write_bytes(content)
        others = ["--data", "digits", "--image-size", "16", "--output", str(folder / "written.qat")]
        yield name, ["qat.calibrate", "--model", f"{folder}/net.py:net", "--weights", str(folder / name), *others]
    for name in ("pipe.cache", "null.cache"):
        (os.mkfifo if name == "pipe.cache" else zeros)(folder / name)
        yield name, [QUANTIZE, str(folder / "good.onnx"), "--calibration-cache", str(folder / name)]
    os.mkfifo(folder / "good.onnx.json")
    yield "good.onnx.json", [BUILD, str(folder / "good.onnx"), "--output", str(folder / "written")]


NET = """from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


def model(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], **others: object) -> bytes:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [image], [answer], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, **others)
    return bytes(made.SerializeToString())


def network() -> bytes:
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in (("a", (8, 3, 3, 3)), ("b", (8, 8, 3, 3)), ("c", (8, 10)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["i"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["i"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "c"], ["y"]),
    ]
    return model(nodes, weights)


def models(folder: Path) -> dict[str, bytes]:
    """ONNX files by their names; b"" for what is no regular file, which is made here."""

    def called(function: str, by: str) -> onnx.FunctionProto:
        nodes = [helper.make_node(function, ["a"], ["b"], domain="" if function == "Relu" else "my") for _ in "ab"]
        return helper.make_function("my", by, ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])

    bomb = [called("Relu", "f0"), *(called(f"f{n}", f"f{n + 1}") for n in range(29))]
    convolution = helper.make_node("Conv", ["x", "w"], ["y"])
    relus = [helper.make_node("Relu", [f"t{n}" if n else "x"], [f"t{n + 1}"]) for n in range(20_000)]
    relus[-1].output[0] = "y"
    constant = numpy_helper.from_array(np.array([1 << 30, 3, 16, 16], np.int64), "extents")
    os.mkfifo(folder / "pipe.onnx")
    (folder / "zero.onnx").symlink_to("/dev/zero")
    zeros(folder / "holes.onnx")
    return {
        "good.onnx": b"",
        "bomb30.onnx": model([helper.make_node("f29", ["x"], ["y"], domain="my")], [], functions=bomb),
        "circle.onnx": model(
            [helper.make_node("f", ["x"], ["y"], domain="my")], [], functions=[called("g", "f"), called("f", "g")]
        ),
        "node_without_output.onnx": model([helper.make_node("Relu", ["x"], [])], []),
        "nested1000.onnx": nested(1000),
        "absent_931GiB.onnx": model([convolution], [declared([10**6, 250_000])]),
        "external_absolute.onnx": model([convolution], [declared([8, 3, 1, 1], "/etc/hostname")]),
        "external_above.onnx": model([convolution], [declared([8, 3, 1, 1], "../w.bin")]),
        "external_missing.onnx": model([convolution], [declared([8, 3, 1, 1], "gone.bin")]),
        "nodes20000.onnx": model(relus, []),
        "computed_terabytes.onnx": model(
            [helper.make_node("ConstantOfShape", ["extents"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
            [constant],
        ),
        "computed_3GiB.onnx": model(
            [helper.make_node("ConstantOfShape", ["extents"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
            [numpy_helper.from_array(np.array([1 << 20, 3, 16, 16], np.int64), "extents")],
        ),
        "pipe.onnx": b"",
        "zero.onnx": b"",
        "holes.onnx": b"",
    }


def declared(extents: list[int], location: str = "") -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=extents)
    if location:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    return tensor


def nested(times: int) -> bytes:
    """Graphs within each other, deeper than protobuf itself would write."""

    def field(number: int, inside: bytes) -> bytes:
        length, size = len(inside), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + inside

    content = b""
    for _ in range(times):
        content = field(1, field(4, b"If") + field(2, b"y") + field(5, field(6, content)))
    return b"\x08\x0a" + field(7, content)


def spoiled(content: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 4)):
        start, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        chunk = chance.choice([b"\xff" * 8, bytes(8), chance.randbytes(3), content[start : start + 40]])
        content = chance.choice(
            [
                content[:start] + chunk + content[start + len(chunk) :],
                content[:start] + chunk + content[start:],
                content[:start] + content[min(end, start + 50) :],
                content[:end],
            ]
        )
    return content


# --- data


def zeros(path: Path) -> None:
    """A terabyte that takes no room on the disk."""
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)


def swelling(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("train_images.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (5 << 29,)})
        for _ in range(5 << 5):
            file.write(bytes(1 << 24))


def terabyte(path: Path) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)})


def large_images(path: Path) -> None:
    """Folders of PNGs of 13000x13000 pixels in half a megabyte."""
    png(path / "large.png", 13000)


def many_large_images(path: Path) -> None:
    """Sixteen of 80 million pixels, which Pillow's limit lets through."""
    for index in range(16):
        png(path / f"{index}.png", 9000)


def png(path: Path, side: int) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def loops(path: Path) -> None:
    for index in range(28):
        place = path / "ab"[index % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 9 * index, np.uint8)).save(place)
    for inner in ("a", "b"):
        (path / inner / "loop").symlink_to(path)
        (path / inner / "again").symlink_to("..")


def pipes(path: Path) -> None:
    loops(path)
    os.mkfifo(path / "a" / "pipe.png")
    (path / "b" / "zero.png").symlink_to("/dev/zero")


DATA: dict[str, Callable[[Path], None]] = {
    "swelling.npz": swelling,
    "terabyte.npy": terabyte,
    "large_images": large_images,
    "many_large_images": many_large_images,
    "loops": loops,
    "pipes": pipes,
    "pipe.npy": os.mkfifo,
}


def weights() -> dict[str, bytes]:
    import io

    header = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    swollen = io.BytesIO()
    with zipfile.ZipFile(swollen, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(3 << 29))
    return {
        "terabyte.safetensors": len(header).to_bytes(8, "little") + header,
        "long_header.safetensors": (1 << 50).to_bytes(8, "little") + b"{",
        "swelling.pt": swollen.getvalue(),
        "cut.pt": swollen.getvalue()[:1000],
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
