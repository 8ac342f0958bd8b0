"""Artifacts and their sidecars: the files that every stage of the pipeline writes and the next stage checks.

The stages (qat, export, deploy) exchange only files. Each file ``F`` has a JSON sidecar ``F.json`` that records what
made it, its parent (by SHA-256), its inputs, outputs and classes, and what was measured on it. A file gets its final
name only when it is complete: it is written in the same folder under a temporary name and then renamed.

qat/base/trust.py says what is trusted of it. Every stage imports this module, also on machines without torch, ONNX or
TensorRT.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from qat.base.console import warn
from qat.base.errors import UserError
from qat.base.regular_file import check_regular, read_json
from qat.base.streams import interrupts_held_back, is_stdout, write_stdout
from qat.base.supervised import unfinished
from qat.base.trust import SEAL, is_known, remember, seal_of, untrusted_mode

FORMAT_VERSION = 1

ArtifactKind = Literal["checkpoint", "onnx", "engine", "timing-cache", "calibration-cache"]

_RECORDED_PACKAGES = ("int8-qat-pipeline", "torch", "torchvision", "timm", "onnx", "onnx-ir", "onnxruntime")

_said_changed: set[Path] = set()

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file is too large for this file system: choose another folder",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.ENOENT: "the folder does not exist and cannot be created: choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "that is a folder: give the name of a file",
}


class WrongKindError(UserError):
    """The file is an artifact, but of another kind than the one asked for."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: ``shape`` in elements, with -1 for the dynamic batch; ``dtype`` is NumPy's name of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Parent:
    """The file that an artifact was made from; ``file`` is its path relative to the folder of the artifact."""

    file: str
    sha256: str

    @classmethod
    def from_file(cls, child: Path, parent: Path, sha256: str) -> Parent:
        """What ``child`` records about the file ``parent`` from which it is made."""
        return cls(os.path.relpath(parent.absolute(), child.absolute().parent), sha256)


@dataclass(frozen=True)
class Sidecar:
    """The content of ``F.json`` beside an artifact ``F``.

    ``figures`` are measurements made on the artifact; ``details`` are facts that only this kind of artifact has
    (the placement of a checkpoint, the audit of an engine). ``sha256``, ``made_by`` and ``sidecar_sha256``, the hash of
    all the rest (qat/base/trust.py), are filled in on writing; of a sidecar that was read the latter is what it has.
    """

    kind: ArtifactKind
    parent: Parent | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    sidecar_sha256: str = ""

    @property
    def own(self) -> bool:
        """Whether this user wrote it on this machine, so that what it names may be used without a question."""
        return is_known(self.sidecar_sha256) and not untrusted_mode()


def sidecar_path(artifact: Path) -> Path:
    """``model.onnx`` -> ``model.onnx.json``."""
    return artifact.with_name(artifact.name + ".json")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    check_regular(path)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return digest.hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a UserError about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(f"cannot write {path}: {_DISK_ERRORS[error.errno]}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is renamed to ``path``, otherwise it is removed.

    Of a symbolic link the file that it leads to is replaced, not the link. ``-`` is the standard output, which gets the
    text of the file. Raises UserError when the folder cannot be created or written to, or when the disk is full; when
    ``path`` is a device or anything else that is no file.
    """
    if is_stdout(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, "stdout")
            write_stdout(Path(folder, "stdout").read_text(encoding="utf-8"))
        return
    with disk_errors(path):
        path = replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = None
        try:
            with interrupts_held_back():
                handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
                temporary = Path(name)
                os.close(handle)
            with unfinished(temporary):
                yield temporary
            _flush(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def replaceable(path: Path) -> Path:
    """The file to write for ``path``, which may be a symbolic link. Raises UserError or OSError when it is no file."""
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    if real.is_symlink():
        raise UserError(f"cannot write {path}: it is a symbolic link that leads to itself: remove it")
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        return real
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot write {path}: it is a {_kind_of(mode)}: give the name of a file")
    return real


def _kind_of(mode: int) -> str:
    return "pipe (FIFO)" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON; ``path`` appears only once it is complete. Raises UserError when that fails."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the result of a command as ``write_json`` does, with the command, the date and the versions."""
    write_json(path, {"made_by": _provenance(), **content})


def check_writable(path: Path) -> None:
    """Raises UserError when ``path`` could not be written. Call it before hours of work, not after them."""
    if is_stdout(path):
        return
    with disk_errors(path):
        path = replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_artifact(path: Path, sidecar: Sidecar, write: Callable[[Path], object], **made_by: Any) -> Sidecar:
    """Writes an artifact with ``write(temporary_path)``, and its sidecar; each appears only once it is complete.

    ``made_by`` adds to the recorded command, date and versions (a seed, versions of further packages).
    Returns the sidecar as written. Raises UserError when the files cannot be written.
    """
    # Both are complete before either is renamed; the artifact is renamed first.
    with (
        ExitStack() as renaming,
        atomic_write(sidecar_path(path)) as temporary_sidecar,
        atomic_write(path) as temporary,
    ):
        write(temporary)
        whole = dataclasses.replace(sidecar, sha256=sha256_of(temporary), made_by=_provenance() | made_by)
        text = json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(whole)}, allow_nan=False)
        content = json.loads(text)  # as a reader will see it: JSON has lists, not tuples
        content[SEAL] = seal_of(content)
        temporary_sidecar.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _flush(temporary_sidecar)
        renaming.enter_context(interrupts_held_back())  # not between the two
    remember(content[SEAL])
    return _sidecar_from_json(content)


def read_sidecar(artifact: Path, kind: ArtifactKind, *, trust: bool = False) -> Sidecar:
    """Reads the sidecar of ``artifact``; checks that it is complete, of this format version and ``kind``, and its hash.

    With ``trust`` the hash is not checked, so the sidecar may have been written for another file. Raises UserError
    naming what was expected and what was found.
    """
    if not artifact.is_file():
        raise UserError(f"no file {artifact}: check the path, or make the file first")
    path = sidecar_path(artifact)
    try:
        content = read_json(path)
        seal, stated = seal_of(content), content.pop(SEAL, None)
        version = content.pop("format")
    except FileNotFoundError:
        raise UserError(
            f"{artifact} has no sidecar {path.name}: copy it there from the folder in which the {kind} was made"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a sidecar, or is truncated ({error}): make {artifact.name} again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, but this program reads {FORMAT_VERSION}: "
            f"make {artifact.name} again with this version"
        )
    try:
        sidecar = _sidecar_from_json(content | {SEAL: seal})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks or misstates an entry ({error}): make {artifact.name} again") from error
    if sidecar.kind != kind:
        raise WrongKindError(
            f"{artifact} is a file of kind {sidecar.kind!r}, but must be of kind {kind!r}: give the right file"
        )
    if stated not in (None, seal) and path not in _said_changed:
        _said_changed.add(path)
        warn(f"{path} was changed since it was written: what it says is nobody's measurement any more")
    if trust:
        return sidecar
    found = sha256_of(artifact)
    if found != sidecar.sha256:
        raise UserError(
            f"{artifact} has SHA-256 {found}, but its sidecar was written for {sidecar.sha256}: "
            "the file is truncated or is another one; make it again"
        )
    return sidecar


def parent_paths(child: Path, sidecar: Sidecar) -> tuple[Path, ...]:
    """Where the parent of ``child`` may be: where it was, or, if both were moved, beside ``child``.

    A sidecar that is not the user's own names no place outside of its folder. Raises UserError when it has no parent.
    """
    if sidecar.parent is None:
        raise UserError(f"{child} does not record its parent: make it with the pipeline's own commands")
    path = child.parent / sidecar.parent.file
    beside = child.parent / path.name
    inside = path.resolve().is_relative_to(child.parent.resolve())
    return (path, beside) if inside or sidecar.own else (beside,)


def read_parent(child: Path, sidecar: Sidecar, kind: ArtifactKind) -> tuple[Path, Sidecar]:
    """The path of the parent of ``child`` and its sidecar; it is sought where it was, then in the folder of ``child``.

    Raises UserError naming both hashes when the file found is not the one that ``child`` was made from.
    """
    places = parent_paths(child, sidecar)
    assert sidecar.parent is not None
    path = next((place for place in places if place.exists()), places[-1])
    if len(places) == 1 and not path.exists():
        raise UserError(f"no file {path}, and {child} was not made by you on this machine: put {path.name} beside it")
    parent = read_sidecar(path, kind)
    if parent.sha256 != sidecar.parent.sha256:
        raise UserError(
            f"{child} was made from {path.name} with SHA-256 {sidecar.parent.sha256}, "
            f"but {path} has {parent.sha256}: make {child.name} again from it"
        )
    return path, parent


def versions(*packages: str) -> dict[str, str]:
    """Versions of those of ``packages`` that are installed, without importing them."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def this_command() -> list[str]:
    """The words of the command line that runs this process."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script that was run by its path
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    return [*program, *sys.argv[1:]]


def _provenance() -> dict[str, Any]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "command": this_command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": python} | versions(*_RECORDED_PACKAGES),
    }


def _sidecar_from_json(content: dict[str, Any]) -> Sidecar:
    content = {key: value for key, value in content.items() if key != "format"}
    for key in ("inputs", "outputs"):
        content[key] = tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in content[key])
    content["parent"] = None if content["parent"] is None else Parent(**content["parent"])
    content["class_names"] = tuple(content["class_names"])
    return Sidecar(**content)


def _flush(path: Path) -> None:
    """Forces a written file to the disk, so that a full disk shows as an error now."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
