"""Gathers what a run has left: its checkpoint, ONNX file and engine, and the results of commands about them.

A result is taken only if it names, by its SHA-256, one of the artifacts that it lies beside. A stage that is missing is
named with the command that fills it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.base import own_json
from qat.base.artifact import (
    ArtifactKind,
    Sidecar,
    WrongKindError,
    read_parent,
    read_sidecar,
    sidecar_path,
)
from qat.base.errors import UserError, one_line
from qat.base.number_format import INT8
from qat.base.ranges_file import Distributions, ranges_path, read_distributions
from qat.base.schema.results import RESULTS

Result = Mapping[str, Any]
_SUFFIXES: Mapping[ArtifactKind, str] = {"engine": ".engine", "onnx": ".onnx", "checkpoint": ".qat"}
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
        results: the results of commands, by what they are: evaluation, onnx_evaluation, benchmark, audit, ...
        result_files: the files that these were read from.
        distributions: what calibration saw, from the file beside the checkpoint.
        left_out: files that were not taken, each with the reason.
    """

    path: Path
    engine: Sidecar | None = None
    onnx: Sidecar | None = None
    checkpoint: Sidecar | None = None
    paths: Mapping[ArtifactKind, Path] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    result_files: tuple[Path, ...] = ()
    distributions: Distributions | None = None
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a reader calls it: the name of the model and of the folder."""
        built = self.checkpoint.details["model"] if self.checkpoint else None
        model = built["name"] if built else next(iter(self.paths.values())).stem
        model = Path(model).name if ".py:" in model else model
        folder = next(iter(self.paths.values())).absolute().parent.name
        return f"{model} in {folder}"

    @property
    def folder(self) -> Path:
        """The folder of the artifact that was made last."""
        return next(iter(self.paths.values())).parent

    @property
    def data_source(self) -> str:
        """Which images it was calibrated and trained on; '' where a program of one's own has saved the checkpoint."""
        details = self.checkpoint.details if self.checkpoint else {}
        return str(details["data"]["source"]) if {"data", "splits"} <= details.keys() else ""

    @property
    def is_trained(self) -> bool:
        """Whether the network was trained with quantization in the loop."""
        return self.checkpoint is not None and "qat" in self.checkpoint.figures

    @property
    def evaluation(self) -> Result:
        """What deploy.evaluate found of the engine, else of the ONNX file; {} of neither."""
        return self.results.get("evaluation") or self.results.get("onnx_evaluation", {})

    @property
    def _has_reference(self) -> bool:
        """Whether there are images with known answers beside the ONNX file; not of networks that take no images."""
        return self.onnx is None or self.onnx.details.get("reference") is not None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it was read from."""
        sidecars = [sidecar_path(path) for path in self.paths.values()]
        ranges = [ranges_path(self.paths["checkpoint"])] if "checkpoint" in self.paths else []
        return (*self.paths.values(), *sidecars, *ranges, *self.result_files)

    def missing(self) -> tuple[Missing, ...]:
        """The stages that have not been run, and can be."""
        found = []
        if self.checkpoint is None and self.onnx is None:
            found.append(Missing("checkpoint", "training", "python -m qat.train --model NAME --data FOLDER"))
        if self.onnx is None and "checkpoint" in self.paths:
            found.append(Missing("onnx", "the ONNX file", f"python -m export.onnx {_quoted(self.paths['checkpoint'])}"))
        if self.engine is None and "onnx" in self.paths:
            found.append(Missing("engine", "the engine", f"python -m deploy.build {_quoted(self.paths['onnx'])}"))
        labelled = self.checkpoint is not None and "float" in self.checkpoint.figures
        results: tuple[tuple[str, ArtifactKind, str, str, bool], ...] = (
            ("evaluation", "engine", "the engine's own answers", "deploy.evaluate", self._has_reference),
            ("benchmark", "onnx", "speed against FP16", "deploy.benchmark", True),
            ("audit", "engine", "the time of each layer", "deploy.audit", True),
            ("sensitivity", "checkpoint", "what each layer costs in accuracy", "qat.sensitivity", labelled),
        )
        for kind, artifact, why, command, possible in results:
            if kind not in self.results and artifact in self.paths and possible:
                option = "--output" if kind == "benchmark" else "--json"
                option = {"audit": "--peaks ", "evaluation": "--layers "}.get(kind, "") + option
                target = _quoted(self.folder / f"{kind}.json")
                found.append(
                    Missing(kind, why, f"python -m {command} {_quoted(self.paths[artifact])} {option} {target}")
                )
        if self.checkpoint is not None and self.distributions is None:
            command = "qat.train" if self.is_trained else "qat.calibrate"
            why = "distributions of activations, which this version keeps when it trains or calibrates"
            found.append(Missing("ranges", why, f"python -m {command} ..."))
        return tuple(found)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def gather(path: Path, named: Iterable[Path] = ()) -> Artifacts:
    """What lies at ``path``: a folder, or an engine, ONNX file or checkpoint with what lies beside it.

    ``named`` are results that must belong to it; others in the folder are taken if they do.

    Raises UserError when there is nothing, when an artifact is not the one that the next was made from, or when a named
    result is of something else.
    """
    left_out: list[str] = []
    artifact = _newest(path, left_out) if path.is_dir() else path
    known = _with_parents(artifact)
    paths = {kind: one for kind, (one, _) in known.items()}
    sidecars = {kind: sidecar for kind, (_, sidecar) in known.items()}
    hashes = {kind: sidecar.sha256 for kind, sidecar in sidecars.items()}
    results: dict[str, tuple[Path, Result]] = {}
    for one in named:
        kind, content = _read_result(one)
        if reason := _refusal(kind, content, hashes):
            raise UserError(f"{one} {reason}")
        results[kind] = (one, content)
    for one in _json_files(paths.values()):
        try:
            kind, content = _read_result(one)
        except DamagedResultError as error:
            left_out.append(str(error))
            continue
        except UserError:  # some other JSON file
            continue
        if reason := _refusal(kind, content, hashes):
            left_out.append(f"{one.name} {reason}")
        elif kind in results:
            left_out.append(f"{one.name} is older than {results[kind][0].name}, or that was named")
        else:
            results[kind] = (one, content)
    distributions = None
    if "checkpoint" in paths and ranges_path(paths["checkpoint"]).is_file():
        try:
            distributions = read_distributions(ranges_path(paths["checkpoint"]), hashes["checkpoint"])
        except UserError as error:
            left_out.append(str(error))
    return Artifacts(
        path=path,
        engine=sidecars.get("engine"),
        onnx=sidecars.get("onnx"),
        checkpoint=sidecars.get("checkpoint"),
        paths=paths,
        results={kind: content for kind, (_, content) in results.items()},
        result_files=tuple(file for file, _ in results.values()),
        distributions=distributions,
        left_out=tuple(left_out),
    )


def _json_files(artifacts: Iterable[Path]) -> list[Path]:
    """JSON files beside artifacts, without their sidecars, the newest first."""
    paths = [path.absolute() for path in artifacts]
    sidecars = {sidecar_path(path) for path in paths}
    found = {file for folder in {path.parent for path in paths} for file in folder.glob("*.json")}
    return sorted(found - sidecars, key=lambda file: (-file.stat().st_mtime, file.name))


def _newest(folder: Path, left_out: list[str]) -> Path:
    """The newest artifact of the last stage that a folder has, INT8 before float; others go into ``left_out``."""
    for kind, suffix in _SUFFIXES.items():
        found = [path for path in folder.glob(f"*{suffix}") if sidecar_path(path).is_file()]
        if found:
            first, *others = sorted(found, key=lambda path: (_is_float(path, kind), -path.stat().st_mtime))
            left_out += [f"{path.name} is there too: name it to see it" for path in others]
            return first
    raise UserError(
        f"{folder} has no engine, ONNX file or checkpoint with its sidecar: give another folder, or make one with "
        "python -m qat.train"
    )


def _is_float(path: Path, kind: ArtifactKind) -> bool:
    """Whether a file is the float baseline of another."""
    if kind != "onnx":
        return False
    try:
        return str(read_sidecar(path, kind, trust=True).details.get("precision", INT8.dtype)) != INT8.dtype
    except UserError:
        return False


def _with_parents(artifact: Path) -> dict[ArtifactKind, tuple[Path, Sidecar]]:
    """The sidecars of an artifact and of those that it was made from. Raises UserError if they do not fit together."""
    if not artifact.exists():
        raise UserError(f"no file {artifact}: check the path, or make the file first")
    path, sidecar = artifact, _read_any(artifact)
    found: dict[ArtifactKind, tuple[Path, Sidecar]] = {sidecar.kind: (path, sidecar)}
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

# Which entries tell one from another.
_EVALUATION = {"images", "source", "top1", "agreement"}
_MARKS: Mapping[str, set[str]] = {
    "evaluation": {"engine", *_EVALUATION},
    "onnx_evaluation": {"onnx", *_EVALUATION},
    "benchmark": {"models", "builds", "latency", "date", "tensorrt"},
    "audit": {"totals", "layers", "findings"},
    "sensitivity": {"operations", "target_drop", "quantized"},
}
_COMMANDS = {
    "evaluation": "deploy.evaluate",
    "onnx_evaluation": "deploy.evaluate",
    "benchmark": "deploy.benchmark",
    "audit": "deploy.audit",
    "sensitivity": "qat.sensitivity",
}


class DamagedResultError(UserError):
    """The file is the result of a command, by its entries, but one of them is not as the command writes it."""


def _read_result(path: Path) -> tuple[str, Result]:
    """What a JSON file is, and its content. Raises UserError when it is none of the results of commands."""
    try:
        content = own_json.parse(own_json.read_text(path, "result of a command", "run the command again"))
    except own_json.JsonError as fault:
        raise UserError(f"{path} is not a result of a command ({one_line(fault)}): run the command again") from fault
    for kind, marks in _MARKS.items():
        if isinstance(content, dict) and marks <= content.keys():
            try:
                own_json.typed(content, RESULTS[kind])
            except own_json.JsonError as fault:
                raise DamagedResultError(
                    f"{path} is not what {_COMMANDS[kind]} writes ({one_line(fault)}): run it again"
                ) from fault
            return kind, content
    raise UserError(f"{path} is not a result of a command: give what its --json or --output wrote")


def _refusal(kind: str, content: Result, hashes: Mapping[ArtifactKind, str]) -> str:
    """Why a result does not belong to the artifacts; '' if it does."""
    about: Mapping[str, tuple[ArtifactKind, Callable[[], Iterable[Any]]]] = {
        "evaluation": ("engine", lambda: [content["engine"]]),
        "onnx_evaluation": ("onnx", lambda: [content["onnx"]]),
        "audit": ("engine", lambda: [content.get("engine")]),
        "benchmark": ("onnx", lambda: [model["sha256"] for model in content["models"].values()]),
        "sensitivity": ("checkpoint", lambda: [content.get("checkpoint")]),
    }
    artifact, named = about[kind]
    digests = list(named())
    if artifact not in hashes:
        return f"is about {_WHAT[artifact]}, and there is none here: name it"
    if hashes[artifact] not in digests:
        return f"is about another {_WHAT[artifact].removeprefix('an ').removeprefix('a ')}: run {_COMMANDS[kind]} again"
    return ""


_WHAT: Mapping[ArtifactKind, str] = {"engine": "an engine", "onnx": "an ONNX file", "checkpoint": "a checkpoint"}
