"""Artifacts and their sidecars: the files that every stage of the pipeline writes and the next stage checks.

The stages (qat, export, deploy) exchange only files. Each file ``F`` has a JSON sidecar ``F.json`` that records what
made it, its parent (by SHA-256), its inputs, outputs and classes, and what was measured on it. A file gets its final
name only when it is complete: it is written in the same folder under a temporary name and then renamed.

qat/base/trust.py says what is trusted of it. Every stage imports this module, also on machines without torch, ONNX or
TensorRT.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from qat.base import own_json
from qat.base.errors import UserError, one_line
from qat.base.input_files import sidecar_path as sidecar_path
from qat.base.regular_file import check_regular
from qat.base.schema.entries import Entries, check_forms, check_recorded
from qat.base.schema.leaves import Digest, Name, NumpyType, Shape
from qat.base.streams import interrupts_held_back
from qat.base.this_program import this_command, versions
from qat.base.trust import SEAL, is_known, remember, seal_of, untrusted_mode
from qat.base.writing import atomic_write, flush

FORMAT_VERSION = 1

ArtifactKind = Literal["checkpoint", "onnx", "engine", "timing-cache", "calibration-cache"]

_RECORDED_PACKAGES = ("int8-qat-pipeline", "torch", "torchvision", "timm", "onnx", "onnx-ir", "onnxruntime")

_said_changed: set[Path] = set()


class WrongKindError(UserError):
    """The file is an artifact, but of another kind than the one asked for."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: ``shape`` in elements, with -1 for the dynamic batch; ``dtype`` is NumPy's name of it."""

    name: str
    shape: Shape
    dtype: NumpyType


@dataclass(frozen=True)
class Parent:
    """The file that an artifact was made from; ``file`` is its path relative to the folder of the artifact."""

    file: Name
    sha256: Digest

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


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON; ``path`` appears only once it is complete. Raises UserError when that fails."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the result of a command as ``write_json`` does, with the command, the date and the versions."""
    write_json(path, {"made_by": _provenance(), **content})


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
        written = own_json.typed(content, Sidecar)
        if sidecar.kind in ("checkpoint", "onnx"):  # in which users of the library record figures and facts
            check_recorded(path, written.kind, *_forms(written))
        temporary_sidecar.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        flush(temporary_sidecar)
        renaming.enter_context(interrupts_held_back())  # not between the two
    remember(content[SEAL])
    return written


def read_sidecar(artifact: Path, kind: ArtifactKind, *, trust: bool = False) -> Sidecar:
    """Reads the sidecar of ``artifact``; checks that it is complete, of this format version and ``kind``, and its hash.

    With ``trust`` the hash is not checked, so the sidecar may have been written for another file. Raises UserError
    naming what was expected and what was found.
    """
    if not artifact.is_file():
        raise UserError(f"no file {artifact}: check the path, or make the file first")
    path, again = sidecar_path(artifact), f"make {artifact.name} again"
    if not path.exists():
        raise UserError(
            f"{artifact} has no sidecar {path.name}: copy it there from the folder in which the {kind} was made"
        )
    text = own_json.read_text(path, "sidecar", again)
    try:
        content = own_json.parse(text)
        if not isinstance(content, dict) or "format" not in content:
            raise own_json.JsonError("it has no format")
    except own_json.JsonError as fault:
        raise UserError(f"{path} is no sidecar, or is truncated ({one_line(fault)}): {again}") from fault
    seal, stated, version = seal_of(content), content.get(SEAL), content["format"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r:.20}, but this program reads {FORMAT_VERSION}: "
            f"{again} with this version"
        )
    try:
        sidecar = own_json.typed(content | {SEAL: seal}, Sidecar)
        if sidecar.kind != kind:
            raise WrongKindError(
                f"{artifact} is a file of kind {sidecar.kind!r}, but must be of kind {kind!r}: give the right file"
            )
        check_forms(sidecar.kind, *_forms(sidecar))
    except own_json.JsonError as fault:
        raise UserError(f"{path} lacks or misstates an entry ({one_line(fault)}): {again}") from fault
    figures, details = (
        Entries.of(getattr(sidecar, name), f"{path} lacks or misstates an entry ({name}")
        for name in ("figures", "details")
    )
    sidecar = dataclasses.replace(sidecar, figures=figures, details=details)
    if stated not in (None, seal) and path not in _said_changed:
        from qat.base.console import warn  # loads rich and tyro

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


def _provenance() -> dict[str, Any]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "command": this_command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": python} | versions(*_RECORDED_PACKAGES),
    }


def _forms(sidecar: Sidecar) -> tuple[Mapping[str, Any], ...]:
    return sidecar.figures, sidecar.details, sidecar.preprocessing, sidecar.made_by
