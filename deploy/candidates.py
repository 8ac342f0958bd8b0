"""The engines that a benchmark compares: each is built once, for one fixed batch size, and kept in a folder.

Nearly all of a benchmark's time goes into builds, so several runs that do nothing else, each on a GPU of its own, can
share them (``build_if_free``): a run claims an engine before it builds it, and leaves alone what another has claimed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.layers import EngineLayer
from deploy.settings import BuildSettings, Profile
from deploy.timing_cache import TimingCacheFile
from qat.base.artifact import Parent, Sidecar, disk_errors, read_sidecar, sha256_of, write_artifact
from qat.base.choices import EnginePrecision
from qat.base.console import say
from qat.base.errors import UserError

if TYPE_CHECKING:
    from deploy.trt import Toolkit


@dataclass(frozen=True)
class Candidate:
    """One engine for each batch size: a name, the ONNX file and the precision that it is built with."""

    name: str
    model: Path
    precision: EnginePrecision

    @property
    def file_name(self) -> str:
        """The name as part of a file's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


class CandidateEngines:
    """Builds engines, or takes those of an earlier run."""

    def __init__(
        self, toolkit: Toolkit, folder: Path, repeat: int, optimization_level: int, timing_iterations: int | None
    ) -> None:
        self.toolkit, self.folder, self.repeat = toolkit, folder, repeat
        self._optimization_level, self._timing_iterations = optimization_level, timing_iterations
        self.builds: list[dict[str, Any]] = []
        """What the builds said of the engines taken so far."""
        self._timings = b""
        """Of the kernels that this run has timed; each engine's are kept beside it for when its model changes."""

    def engine(self, candidate: Candidate, batch: int) -> bytes:
        """The engine of a candidate for a fixed batch: built, or taken from the folder where it is just that one."""
        from deploy.build import engine_sidecar, write_plan
        from deploy.builder import build
        from deploy.repeat import build_fastest

        settings = self._settings(candidate, batch)
        path, digest = self._path(candidate, batch), sha256_of(candidate.model)
        if (kept := self._kept(path, settings, digest)) is not None:
            self._note(candidate, batch, kept, again=False)
            return path.read_bytes()
        say(f"building {candidate.name} for batch {batch}")
        if self.repeat == 1:
            timings = TimingCacheFile(path.with_suffix(".timings"), self.toolkit, settings, ours=True)
            built = build(self.toolkit, candidate.model, settings, timings.content or self._timings)
            built = dataclasses.replace(built, timing_cache=timings.save(built))
            self._timings = built.timing_cache_content
        else:
            built = build_fastest(self.toolkit, candidate.model, settings, self.repeat)
        parent = Parent.from_file(path, candidate.model, digest)
        sidecar = engine_sidecar(built, self.toolkit, settings, None, parent)
        sidecar = write_artifact(path, sidecar, lambda temporary: write_plan(temporary, built.plan))
        self._note(candidate, batch, sidecar, again=True)
        return bytes(built.plan)

    def build_if_free(self, candidate: Candidate, batch: int) -> None:
        """Builds the engine unless it is there, or another run is building it."""
        path = self._path(candidate, batch)
        claim = path.with_name(path.name + ".claim")
        with _claim(claim) as ours:
            if ours:
                self.engine(candidate, batch)
            else:
                say(
                    f"{candidate.name} for batch {batch} is left to the run that made {claim}; "
                    "delete it if that is dead"
                )

    def _path(self, candidate: Candidate, batch: int) -> Path:
        return self.folder / f"{candidate.file_name}-{batch}.engine"

    def _settings(self, candidate: Candidate, batch: int) -> BuildSettings:
        return BuildSettings(
            precision=candidate.precision,
            profiles=(Profile(batch, batch, batch),),
            optimization_level=self._optimization_level,
            timing_iterations=self._timing_iterations,
        )

    def _note(self, candidate: Candidate, batch: int, sidecar: Sidecar, again: bool) -> None:
        """Keeps what the build said of the engine; ``again``: whether it was built in this run."""
        from deploy.builder import Repetition

        layers = [EngineLayer.from_json(layer) for layer in sidecar.details["layers"]]
        figures, found = sidecar.figures, sidecar.details["repetition"]
        repetition = Repetition(**found) if found else None
        entry = {
            "name": candidate.name,
            "batch": batch,
            "seconds": figures["build_seconds"],
            "bytes": figures["engine_bytes"],
            "layers": len(layers),
            "reformats": sum(layer.is_reformat for layer in layers),
            "convolutions": figures["convolutions"],
            "convolutions_int8": figures["convolutions_int8"],
            "built_in_this_run": again,
            "timing_cache": sidecar.details["timing_cache"],
            "repetition": {**found, "spread_percent": round(repetition.spread_percent, 2)} if repetition else None,
        }
        if not any((known["name"], known["batch"]) == (candidate.name, batch) for known in self.builds):
            self.builds.append(entry)
        when = "" if again else " in an earlier run"
        when += ", kernels timed before" if entry["timing_cache"] == "reused" else ""
        say(
            f"  {candidate.name}, batch {batch}: built in {entry['seconds']:.1f} s{when}, "
            f"{entry['layers']} layers, {entry['reformats']} reformats, "
            f"{entry['convolutions_int8']} of {entry['convolutions']} convolutions INT8"
        )
        if repetition:
            say(f"  {repetition}")

    def _kept(self, path: Path, settings: BuildSettings, digest: str) -> Sidecar | None:
        """The sidecar of an engine of an earlier run, where it is just the one that would be built."""
        try:
            sidecar = read_sidecar(path, "engine")
        except UserError:
            return None
        same_builder = sidecar.details["builder"]["version"] == self.toolkit.version
        same_gpu = self.toolkit.device is not None and sidecar.details["gpu"] == self.toolkit.device.name
        same_settings = sidecar.details["settings"] == json.loads(json.dumps(asdict(settings)))
        same_model = sidecar.parent is not None and sidecar.parent.sha256 == digest
        if not (same_builder and same_gpu and same_model and same_settings):
            return None
        repetition = sidecar.details["repetition"]
        built = len(repetition["milliseconds"]) if repetition else 1
        return sidecar if built == self.repeat else None


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether ``path`` could be made; then it is there for as long as the block runs."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            ours = True
        except FileExistsError:
            ours = False
    try:
        yield ours
    finally:
        if ours:
            path.unlink(missing_ok=True)
