"""Outputs against inputs, for every option of every command; what is there; locks of outputs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import onnx
import pytest
from commands import ROOT
from onnx import TensorProto, helper

from qat.base.artifact import Parent, Sidecar, write_artifact
from qat.base.errors import UserError
from qat.base.lock import lock_path, locked, remove_leftovers
from qat.base.outputs import Reads, Writes, marked_fields, outputs_of
from qat.base.writing import atomic_write, check_writable

COMMANDS = {
    "qat": ("train", "calibrate", "placement", "sensitivity"),
    "export": ("onnx", "quantize", "lint"),
    "deploy": ("build", "audit", "benchmark", "kernels", "migrate", "evaluate", "report", "triton", "tune"),
}
# Options that are texts and name no file.
NAMES = {"keep_float", "device", "explain", "source_size", "compute_capabilities", "profiles", "tactic_sources"}
NAMES |= {"layer", "output_type", "families", "name"}


def options_of(command: str) -> type[Any]:
    """The dataclass that ``main`` of a command takes."""
    module = importlib.import_module(command)
    found: type[Any] = typing.get_type_hints(module.main)["options"]
    return found


OPTIONS = {
    f"{package}.{name}": options_of(f"{package}.{name}") for package, names in COMMANDS.items() for name in names
}


def leaves(kind: Any) -> set[Any]:
    """The types that a type consists of: ``tuple[Path, ...] | None`` -> Path, None."""
    if typing.get_origin(kind) in (typing.Union, UnionType, tuple):
        return set().union(*(leaves(one) for one in typing.get_args(kind)))
    return {kind}


def pairs() -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for command, options in OPTIONS.items():
        fields = list(marked_fields(options))
        written = [way for way, _, marks in fields if marks and all(isinstance(mark, Writes) for mark in marks)]
        read = [way for way, _, marks in fields if any(isinstance(mark, Reads) for mark in marks)]
        yield from ((command, output, given) for output in written for given in read if output != given)


def made(command: str, **given: Any) -> Any:
    """Options of a command with ``given``, by the last part of their names; what else is required is a new path."""
    options, values, inner = OPTIONS[command], dict[str, Any](), dict[str, dict[str, Any]]()
    kinds = {way: kind for way, kind, _ in marked_fields(options)}
    for way, kind in kinds.items():
        if way[-1] in given:
            value = given[way[-1]]
            value = value if Path in leaves(kind) else str(value)
            value = (value,) if typing.get_origin(kind) is tuple else value
            (inner.setdefault(way[0], {}) if len(way) > 1 else values)[way[-1]] = value
    for field in dataclasses.fields(options):
        if field.name in inner:
            values[field.name] = typing.get_type_hints(options)[field.name](**inner[field.name])
        elif field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            kind = kinds[(field.name,)]
            absent = Path("absent", field.name)
            values[field.name] = (absent,) if typing.get_origin(kind) is tuple else absent
            values[field.name] = values[field.name] if Path in leaves(kind) else "absent"
    return options(**values)


def check(options: Any) -> None:
    with outputs_of(options):
        pass


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- all options of all commands


def test_all_commands_are_here() -> None:
    from test_structure import COMMANDS as ALL

    assert set(OPTIONS) == set(ALL)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_that_names_a_file_is_marked(command: str) -> None:
    unmarked = {
        way[-1]
        for way, kind, marks in marked_fields(OPTIONS[command])
        if leaves(kind) & {Path, str} and not marks and way[-1] not in NAMES
    }
    assert unmarked == set()


def link(file: Path, name: Path) -> Path:
    os.symlink(file, name)
    return name


def hard_link(file: Path, name: Path) -> Path:
    os.link(file, name)
    return name


SAME: dict[str, Callable[[Path, Path], Path]] = {
    "itself": lambda file, name: file,
    "relative": lambda file, name: Path(os.path.relpath(file)),
    "through a folder": lambda file, name: Path(f"{file.parent}/../{file.parent.name}/{file.name}/"),
    "symbolic link": link,
    "hard link": hard_link,
}


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize(("command", "output", "given"), list(pairs()), ids=str)
def test_no_output_is_an_input(command: str, output: tuple[str, ...], given: tuple[str, ...], same: str) -> None:
    file = Path("inputs", "input.onnx").absolute()
    file.parent.mkdir()
    file.write_bytes(b"content")
    name = SAME[same](file, Path("other.onnx"))
    options = made(command, **{given[-1]: file, output[-1]: name})
    with pytest.raises(UserError, match=r"would overwrite|is not a folder|is a symbolic link"):
        check(options)
    assert file.read_bytes() == b"content"
    assert [path.name for path in file.parent.iterdir()] == ["input.onnx"]


def test_there_are_many_pairs() -> None:
    assert len(list(pairs())) > 60


@pytest.mark.parametrize(
    ("command", "output", "suffix"),
    [
        *[(name, "output", ".json") for name in ("qat.train", "qat.calibrate", "export.onnx", "deploy.build")],
        *[("qat.train", "output", suffix) for suffix in (".ranges.json", ".state")],
        ("qat.calibrate", "output", ".explain.html"),
        ("export.onnx", "output", ".reference.npz"),
        ("export.quantize", "output", ".reference.npz"),
        ("deploy.build", "timing_cache", ".json"),
        ("deploy.build", "calibration_cache", ".json"),
        *[("deploy.tune", "output", suffix) for suffix in (".onnx", ".onnx.json", ".engine", ".engine.json")],
    ],
)
def test_what_is_written_beside_an_output_is_no_input(command: str, output: str, suffix: str) -> None:
    name = {"qat": "m.qat", "export": "m.onnx", "deploy": "m.engine"}[command.partition(".")[0]]
    replaces = suffix in (".ranges.json", ".explain.html", ".reference.npz") or command == "deploy.tune"
    given = Path((name.rpartition(".")[0] if replaces else name) + suffix)
    given.write_bytes(b"content")
    option = next(
        way[-1]
        for way, _, marks in marked_fields(OPTIONS[command])
        if any(isinstance(mark, Reads) for mark in marks) and way[-1] != output
    )
    with pytest.raises(UserError, match="would overwrite"):
        check(made(command, **{output: Path(name), option: given}))


@pytest.mark.parametrize(
    ("command", "given", "default"),
    [
        ("export.onnx", {"checkpoint": Path("m.onnx")}, "m.onnx"),
        ("deploy.build", {"model": Path("m.engine")}, "m.engine"),
        ("deploy.report", {"runs": Path("report.html")}, "report.html"),
        ("deploy.benchmark", {"model": Path("benchmark.json")}, "benchmark.json"),
        ("deploy.benchmark", {"model": Path("m.onnx"), "output": Path("m.float32.onnx")}, "m.float32.onnx"),
        ("deploy.migrate", {"model": Path("m.onnx"), "calibration_cache": Path("m.int8.onnx")}, "m.int8.onnx"),
    ],
)
def test_outputs_and_inputs_that_are_not_named_count_too(command: str, given: dict[str, Path], default: str) -> None:
    for path in {Path(default), *given.values()}:
        path.write_bytes(b"content")
    with pytest.raises(UserError, match=f"{default} would overwrite"):
        check(made(command, **given))


def test_two_outputs_are_two_files() -> None:
    with pytest.raises(UserError, match="--svg x would overwrite another output, --json: give another name"):
        check(made("qat.placement", model="resnet18", json=Path("x"), svg=Path("x")))


def test_an_earlier_output_is_written_again() -> None:
    for name in ("m.qat", "m.qat.json", "m.ranges.json", "m.qat.state"):
        Path(name).write_bytes(b"earlier")
    check(made("qat.train", output=Path("m.qat"), data="digits"))
    assert sorted(os.listdir()) == ["m.qat", "m.qat.json", "m.qat.state", "m.ranges.json"]


# --- what belongs to an input


def test_sidecars_references_and_parents_are_inputs() -> None:
    os.mkdir("runs")
    details = {"reference": {"file": "m.reference.npz", "sha256": "0" * 64, "images": 1, "source": "", "top1": None}}
    model = write_artifact(Path("m.onnx"), Sidecar("onnx", details=details), lambda file: file.write_bytes(b"onnx"))
    engine, parent = Path("runs/m.engine"), Parent.from_file(Path("runs/m.engine"), Path("m.onnx"), model.sha256)
    write_artifact(engine, Sidecar("engine", parent), lambda file: file.write_bytes(b"engine"))
    Path("m.reference.npz").write_bytes(b"images")
    for name in ("runs/m.engine.json", "m.onnx", "m.onnx.json", "m.reference.npz"):
        with pytest.raises(UserError, match=rf"--json {name} would overwrite the input .*: give another name"):
            check(made("deploy.evaluate", engine=engine, json=Path(name)))
    check(made("deploy.evaluate", engine=engine, json=Path("evaluation.json")))


@pytest.mark.parametrize("parent", ["m.onnx", "", 7, "\0", None])
def test_a_sidecar_that_makes_no_sense_is_left_to_the_command(parent: Any) -> None:
    Path("m.onnx").write_bytes(b"onnx")
    Path("m.onnx.json").write_text(json.dumps({"parent": {"file": parent}, "details": {"reference": {"file": ""}}}))
    check(made("export.lint", model=Path("m.onnx"), json=Path("found.json")))


def test_external_data_is_an_input_whatever_its_name() -> None:
    os.mkdir("parts")
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64], bytes(256), raw=True)
    output = helper.make_tensor_value_info("w", TensorProto.FLOAT, [64])
    model = helper.make_model(helper.make_graph([], "g", [], [output], [weight]))
    onnx.save(model, "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UserError, match=r"--json weights.bin would overwrite data of the input m.onnx: give another"):
        check(made("export.lint", model=Path("m.onnx"), json=Path("weights.bin")))


@pytest.mark.parametrize(
    ("data", "output", "refused"),
    [
        ("set", "set/cat/1.png", True),
        ("set", "set/dog.jpg", True),
        ("set", "set/cat/labels.txt", True),
        ("set", "set/runs/m.qat", True),
        ("set", "set/m.qat", False),
        ("set", "runs/m.qat", False),
        ("splits", "splits/runs/m.qat", False),
        ("splits", "splits/train/runs/m.qat", True),
    ],
)
def test_an_output_in_a_folder_of_images_is_not_read_again(data: str, output: str, refused: bool) -> None:
    for folder in ("set/cat", "splits/train/cat", "splits/val/cat"):
        os.makedirs(folder)
        Path(folder, "1.png").write_bytes(b"image")
        Path(folder, "labels.txt").write_bytes(b"labels")
    options = made("qat.train", data=data, output=Path(output))
    if refused:
        with pytest.raises(UserError, match=f"--output {output} would become a part of the input {data}"):
            check(options)
    else:
        check(options)


# --- what is there


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def device(path: Path) -> None:
    os.symlink("/dev/null", path)


def loop(path: Path) -> None:
    os.symlink(path.name, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fifo, r"is a pipe \(FIFO\)"),
        (a_socket, "is a socket"),
        (device, "is a device"),
        (os.mkdir, "is a folder"),
        (loop, "leads to itself"),
    ],
)
def test_what_is_no_file_is_not_replaced(make: Callable[[Path], object], words: str) -> None:
    path = Path("x")
    make(path)
    before = os.lstat(path)
    options = made("export.lint", model=Path("m.onnx"), json=path)
    for write in (lambda: check(options), lambda: check_writable(path), lambda: atomic_write(path).__enter__()):
        with pytest.raises(UserError, match=words):
            write()
    assert os.lstat(path).st_mode == before.st_mode
    assert os.listdir() == ["x"]


@pytest.mark.parametrize(
    "path", [Path("m" * 236 + ".json"), Path("m" * 300), Path("m" * 300, "x.json"), Path("o/x.json")]
)
def test_a_name_that_cannot_be_is_told_before_the_work(path: Path) -> None:
    """That of the file while it is written is longer than its own."""
    os.symlink("o", "o")
    words = r"cannot write .*: (the name is too long|a part of the path is a symbolic link that leads to itself)"
    options = made("export.lint", model=Path("m.onnx"), json=path)
    for write in (lambda: check(options), lambda: check_writable(path), lambda: atomic_write(path).__enter__()):
        with pytest.raises(UserError, match=words):
            write()


def test_a_symbolic_link_is_written_through() -> None:
    os.mkdir("there")
    Path("there/target").write_text("earlier")
    os.symlink("there/target", "link")
    os.symlink("there/new", "dangling")
    for name in ("link", "dangling"):
        check(made("export.lint", model=Path("m.onnx"), json=Path(name)))
        with atomic_write(Path(name)) as temporary:
            temporary.write_text("new")
        assert Path(name).is_symlink()
        assert Path(name).read_text() == "new"
    assert sorted(os.listdir("there")) == ["new", "target"]


def test_a_link_with_a_sidecar_is_refused_because_it_would_part_them() -> None:
    os.symlink("model.qat", "latest.qat")
    with pytest.raises(UserError, match=r"--output latest.qat is a symbolic link.*: give .*/model.qat, or remove"):
        check(made("qat.train", output=Path("latest.qat"), data="digits"))


def test_a_link_that_the_user_has_not_named_is_not_written_through() -> None:
    """In a folder of a stranger a sidecar, or an output by its default name, may be a link to a file of the user."""
    Path("of_the_user").write_text("content")
    os.symlink("of_the_user", "m.engine.json")
    with pytest.raises(UserError, match=r"m.engine.json, which would be written, is a symbolic link to .*/of_the_user"):
        check(made("deploy.build", model=Path("m.onnx")))
    os.symlink("of_the_user", "benchmark.json")
    with pytest.raises(UserError, match=r"benchmark.json, which would be written, is a symbolic link"):
        check(made("deploy.benchmark", model=Path("m.onnx")))
    check(made("deploy.benchmark", model=Path("m.onnx"), output=Path("benchmark.json")))  # named


def test_standard_output_is_for_one_text() -> None:
    for name in ("-", "/dev/stdout"):
        with pytest.raises(UserError, match=f"--output {name}: this cannot go to the standard output: name a file"):
            check(made("deploy.build", model=Path("m.onnx"), output=Path(name)))
    with pytest.raises(UserError, match="only one output can be the standard output, not --json and --svg"):
        check(made("qat.placement", model="resnet18", json=Path("-"), svg=Path("/dev/stdout")))


# --- locks


def test_a_second_run_is_told_who_writes() -> None:
    options = made("qat.train", output=Path("runs/m.qat"), data="digits")
    os.mkdir("runs")
    with locked(Path("runs/m.qat"), "python -m qat.train --output runs/m.qat"):
        words = rf"--output runs/m.qat is being written by process {os.getpid()} since 20.*: python -m qat.train --out"
        with pytest.raises(UserError, match=words):
            check(options)
        os.symlink("runs", "same")
        with pytest.raises(UserError, match="is being written by"):
            check(made("qat.calibrate", output=Path("same/m.qat"), data="digits"))
        check(made("qat.train", output=Path("runs/other.qat"), data="digits"))
    check(options)
    assert os.listdir("runs") == []


def test_a_run_that_was_killed_has_a_while_to_end() -> None:
    ending = locked(Path("m.qat"), "python -m qat.train")
    ending.__enter__()
    timer = threading.Timer(0.2, ending.__exit__, (None, None, None))
    timer.start()
    check(made("qat.train", output=Path("m.qat"), data="digits"))
    timer.join()


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1, "since": "x", "command": "y"}', b"[]"])
def test_a_lock_of_a_dead_run_is_none_whatever_it_says(content: bytes) -> None:
    lock_path(Path("m.qat")).write_bytes(content)
    for name in ("m.qat", "m.qat.json", "m.ranges.json"):
        Path(f".{name}.abcd_123.part").write_bytes(b"half")
    others = {".other.qat.abcd_123.part", ".m.qat.onnx.abcd_123.part"}  # of outputs that other runs may be writing
    for name in others:
        Path(name).write_bytes(b"of another run")
    check(made("qat.train", output=Path("m.qat"), data="digits"))
    assert set(os.listdir()) == others


@pytest.mark.parametrize("make", [fifo, a_socket, os.mkdir, loop, lambda path: os.link("of_the_user", path)])
def test_what_is_no_lock_is_left_as_it_is(make: Callable[[Path], object]) -> None:
    Path("of_the_user").write_text("content")
    make(lock_path(Path("m.qat")))
    with pytest.raises(UserError, match=r"/.m.qat.lock, where a lock belongs, is no regular file"):
        check(made("qat.train", output=Path("m.qat"), data="digits"))
    assert Path("of_the_user").read_text() == "content"
    assert sorted(os.listdir()) == [".m.qat.lock", "of_the_user"]


def test_what_is_written_now_has_the_name_that_is_sought() -> None:
    with atomic_write(Path("m.qat")) as temporary:
        remove_leftovers(Path("m.qat"))
        assert not temporary.exists()
        temporary.write_bytes(b"again")


def test_a_lock_ends_with_its_process_not_with_its_children() -> None:
    program = """
        import os, time, pathlib, qat.base.lock as lock
        with lock.locked(pathlib.Path("m.qat"), "command"):
            ours, childs = os.pipe()
            if os.fork() == 0:
                os.write(childs, b"here")
                time.sleep(60)
            os.read(ours, 4)
            os.kill(os.getpid(), 9)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=environment, start_new_session=True)
    assert run.wait() == -signal.SIGKILL
    assert os.listdir() == [".m.qat.lock"]
    with locked(Path("m.qat"), "command"):
        os.killpg(run.pid, signal.SIGKILL)  # the child was alive until now
    with locked(Path("m.qat"), "command"):
        pass
    assert os.listdir() == []


def test_an_output_that_is_not_named_makes_no_folder() -> None:
    check(made("export.onnx", checkpoint=Path("typo/m.qat")))
    assert os.listdir() == []
