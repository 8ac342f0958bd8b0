"""Gathers what a run has left: its checkpoint, ONNX file and engine, and the results of commands about them.

A result is taken only if it names, by its SHA-256, one of the artifacts that it lies beside. A stage that is missing is
named with the command that fills it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.base.artifact import (
    ArtifactKind,
    Sidecar,
    WrongKindError,
    read_parent,
    read_sidecar,
    sidecar_path,
)
from qat.base.errors import UserError
from qat.base.ranges_file import Distributions, ranges_path, read_distributions

Result = Mapping[str, Any]
_SUFFIXES: Mapping[ArtifactKind, str] = {"engine": ".engine", "onnx": ".onnx", "checkpoint": ".qat"}
_LARGEST_RESULT = 64 * 2**20
"""Bytes of a JSON file that is looked at."""


@dataclass(frozen=True)
class Missing:
    """A stage that has not been run, and the command that runs it; ``why`` says what for."""

    stage: str
    why: str
    command: str


@dataclass(frozen=True)
class Artifacts:
    """What there is of one run.

    Attributes:
        path: what was named.
        engine, onnx, checkpoint: the sidecars of its artifacts, None where there is none.
        paths: where these lie, by kind.
        results: the results of commands, by what they are: evaluation, benchmark, audit, sensitivity.
        distributions: what calibration saw, from the file beside the checkpoint.
        left_out: files that look like results and were not taken, each with the reason.
    """

    path: Path
    engine: Sidecar | None = None
    onnx: Sidecar | None = None
    checkpoint: Sidecar | None = None
    paths: Mapping[ArtifactKind, Path] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    distributions: Distributions | None = None
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a reader calls it: the name of the model and of the folder."""
        model = self.checkpoint.details["model"]["name"] if self.checkpoint else next(iter(self.paths.values())).stem
        model = Path(model).name if ".py:" in model else model
        folder = next(iter(self.paths.values())).absolute().parent.name
        return f"{model} in {folder}"

    @property
    def folder(self) -> Path:
        """The folder of the artifact that was made last."""
        return next(iter(self.paths.values())).parent

    @property
    def is_trained(self) -> bool:
        """Whether the network was trained with quantization in the loop."""
        return self.checkpoint is not None and "qat" in self.checkpoint.figures

    def missing(self) -> tuple[Missing, ...]:
        """The stages that have not been run."""
        named = {kind: str(self.paths.get(kind, f"MODEL{suffix}")) for kind, suffix in _SUFFIXES.items()}
        folder = self.folder
        wanted = [
            ("checkpoint", self.checkpoint, "training", "python -m qat.train --model NAME --data FOLDER"),
            ("onnx", self.onnx, "the ONNX file", f"python -m export.onnx {named['checkpoint']}"),
            ("engine", self.engine, "the engine", f"python -m deploy.build {named['onnx']}"),
        ]
        found = [Missing(kind, why, command) for kind, sidecar, why, command in wanted if sidecar is None]
        results = {
            "evaluation": ("the engine's own answers", f"python -m deploy.evaluate {named['engine']}"),
            "benchmark": ("speed against FP16", f"python -m deploy.benchmark {named['onnx']}"),
            "audit": ("the time of each layer", f"python -m deploy.audit {named['engine']}"),
            "sensitivity": ("what each layer costs in accuracy", f"python -m qat.sensitivity {named['checkpoint']}"),
        }
        for kind, (why, command) in results.items():
            if kind not in self.results:
                option = "--output" if kind == "benchmark" else "--json"
                found.append(Missing(kind, why, f"{command} {option} {folder / f'{kind}.json'}"))
        if self.checkpoint is not None and self.distributions is None:
            command = f"python -m qat.calibrate --model {self.checkpoint.details['model']['name']} ..."
            found.append(Missing("ranges", "distributions of activations", command))
        return tuple(found)


def gather(path: Path, named: Iterable[Path] = ()) -> Artifacts:
    """What lies at ``path``: a folder, or an engine, ONNX file or checkpoint with what lies beside it.

    ``named`` are results that must belong to it; others in the folder are taken if they do.

    Raises UserError when there is nothing, when an artifact is not the one that the next was made from, or when a named
    result is of something else.
    """
    artifact = _newest(path) if path.is_dir() else path
    found = _with_parents(artifact)
    known = {kind: sidecar for kind, sidecar in found.items() if sidecar is not None}
    paths = {kind: one for kind, (one, _) in known.items()}
    sidecars = {kind: sidecar for kind, (_, sidecar) in known.items()}
    hashes = {kind: sidecar.sha256 for kind, sidecar in sidecars.items()}
    results: dict[str, Result] = {}
    left_out: list[str] = []
    for one in named:
        kind, content = _read_result(one)
        if reason := _refusal(kind, content, hashes):
            raise UserError(f"{one} {reason}")
        results[kind] = content
    folders = dict.fromkeys(one.absolute().parent for one in paths.values())
    for one in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        if any(one == sidecar_path(artifact) for artifact in map(Path.absolute, paths.values())):
            continue
        try:
            kind, content = _read_result(one)
        except UserError:  # some other JSON file
            continue
        if reason := _refusal(kind, content, hashes):
            left_out.append(f"{one.name} {reason}")
        else:
            results.setdefault(kind, content)
    distributions = None
    if "checkpoint" in paths and ranges_path(paths["checkpoint"]).is_file():
        try:
            distributions = read_distributions(ranges_path(paths["checkpoint"]), hashes["checkpoint"])
        except UserError as error:
            left_out.append(str(error))
    return Artifacts(
        path=path,
        paths=paths,
        results=results,
        distributions=distributions,
        left_out=tuple(left_out),
        **{kind: sidecars.get(kind) for kind in ("engine", "onnx", "checkpoint")},
    )


def _newest(folder: Path) -> Path:
    """The newest artifact of the last stage that a folder has."""
    for suffix in _SUFFIXES.values():
        found = [path for path in folder.glob(f"*{suffix}") if sidecar_path(path).is_file()]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    raise UserError(
        f"{folder} has no engine, ONNX file or checkpoint with its sidecar: give another folder, or make one with "
        "python -m qat.train"
    )


def _with_parents(artifact: Path) -> dict[ArtifactKind, tuple[Path, Sidecar] | None]:
    """The sidecars of an artifact and of those that it was made from. Raises UserError if they do not fit together."""
    found: dict[ArtifactKind, tuple[Path, Sidecar] | None] = dict.fromkeys(_SUFFIXES)
    if not artifact.exists():
        raise UserError(f"no file {artifact}: check the path, or make the file first")
    path, sidecar = artifact, _read_any(artifact)
    found[sidecar.kind] = (path, sidecar)
    if sidecar.kind == "engine":
        if sidecar.details["provenance"] != "known":
            return found
        path, sidecar = read_parent(path, sidecar, "onnx")
        found["onnx"] = (path, sidecar)
    if sidecar.kind == "onnx" and sidecar.parent is not None and "placement" not in sidecar.details:
        found["checkpoint"] = read_parent(path, sidecar, "checkpoint")
    return found


def _read_any(artifact: Path) -> Sidecar:
    """The sidecar of an artifact of any of the stages."""
    for kind in _SUFFIXES:
        try:
            return read_sidecar(artifact, kind)
        except WrongKindError as error:
            refusal = error
    raise refusal


# --- results of commands

_MARKS: Mapping[str, tuple[str, ...]] = {
    "evaluation": ("engine", "agreement", "images"),
    "benchmark": ("models", "builds"),
    "audit": ("totals", "layers", "findings"),
    "sensitivity": ("operations", "target_drop"),
}
_COMMANDS = {
    "evaluation": "deploy.evaluate",
    "benchmark": "deploy.benchmark",
    "audit": "deploy.audit",
    "sensitivity": "qat.sensitivity",
}


def _read_result(path: Path) -> tuple[str, Result]:
    """What a JSON file is, and its content. Raises UserError when it is none of the results of commands."""
    try:
        if path.stat().st_size > _LARGEST_RESULT:
            raise UserError(f"{path} has more than {_LARGEST_RESULT // 2**20} MB: it is not a result of a command")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a result of a command ({error}): run the command again") from error
    if isinstance(content, dict):
        for kind, marks in _MARKS.items():
            if all(mark in content for mark in marks):
                return kind, content
    raise UserError(f"{path} is not a result of a command: give what its --json or --output wrote")


def _refusal(kind: str, content: Result, hashes: Mapping[ArtifactKind, str]) -> str:
    """Why a result does not belong to the artifacts; '' if it does."""
    about: Mapping[str, tuple[ArtifactKind, Callable[[], Iterable[Any]]]] = {
        "evaluation": ("engine", lambda: [content["engine"]]),
        "audit": ("engine", lambda: [content.get("engine")]),
        "benchmark": ("onnx", lambda: [model["sha256"] for model in content["models"].values()]),
        "sensitivity": ("checkpoint", lambda: [content.get("checkpoint")]),
    }
    artifact, named = about[kind]
    try:
        digests = list(named())
    except (TypeError, KeyError, AttributeError) as error:
        return f"is not what {_COMMANDS[kind]} writes ({error}): run it again"
    if artifact not in hashes:
        return f"is about {_WHAT[artifact]}, and there is none here: name it"
    if hashes[artifact] not in digests:
        return f"is about another {_WHAT[artifact].removeprefix('an ').removeprefix('a ')}: run {_COMMANDS[kind]} again"
    return ""


_WHAT: Mapping[ArtifactKind, str] = {"engine": "an engine", "onnx": "an ONNX file", "checkpoint": "a checkpoint"}
