"""The engines that a benchmark compares. Each is built once, for one fixed batch size, and kept in a folder.

Most of a benchmark's time is spent on builds. Several runs that only build, each on its own GPU, can share them
(``build_if_free``): a run claims an engine before it builds it, and skips an engine that another run has claimed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.builder import Repetition, build
from deploy.calibration import RangeSources, range_sources
from deploy.candidates import Candidate
from deploy.dynamic_ranges import RangeTable
from deploy.engine_file import write_engine
from deploy.engine_layers import EngineLayer
from deploy.repeat import build_fastest
from deploy.settings import BuildSettings, Profile
from deploy.timing_cache import TimingCacheFile
from deploy.trt import Toolkit
from deploy.weak_typing import warn_of_tf32_override
from qat.base.artifact import Parent, Sidecar, read_sidecar, sha256_of, sidecar_path
from qat.base.console import say
from qat.base.errors import UserError
from qat.base.lock import HeldError, Holder, locked, remove_leftovers
from qat.base.number_format import INT8
from qat.base.onnx_structure import check_structure
from qat.base.this_program import this_command
from qat.base.writing import disk_errors

_SOME_AMAX = 4.0


class CandidateEngines:
    """Builds the engines of candidates, or takes them from an earlier run.

    Args:
        toolkit: the builder.
        folder: keeps the engines.
        repeat: how often each engine is built; the fastest is kept.
        optimization_level, timing_iterations: as in BuilderOptions.
        own_timings: batch sizes at which every engine times all of its kernels, so that build times can be compared.
            At others an engine uses what was timed for those before it.
    """

    def __init__(
        self,
        toolkit: Toolkit,
        folder: Path,
        repeat: int = 1,
        optimization_level: int = 3,
        timing_iterations: int | None = None,
        own_timings: Collection[int] = (),
    ) -> None:
        self.toolkit, self.folder, self.repeat = toolkit, folder, repeat
        self._optimization_level, self._timing_iterations = optimization_level, timing_iterations
        self._own_timings = own_timings
        self.builds: list[dict[str, Any]] = []
        """What the builds reported, for each engine that was used so far."""
        self._timings = b""
        """Timings of all kernels that this run has timed. Each engine's own are also kept beside it, for a new build
        when its model changes."""

    def engine(self, candidate: Candidate, batch: int) -> bytes:
        """The serialized engine of a candidate for a fixed batch, built unless the folder has exactly this engine."""
        settings = self._settings(candidate, batch)
        check_structure(candidate.model)  # before it is read to its end
        path, digest = self._path(candidate, batch), sha256_of(candidate.model)
        by_itself = candidate.calibration is None and candidate.ranges is None
        if by_itself and (sidecar := self._reusable_sidecar(path, settings, digest)) is not None:
            self._record_build(candidate, batch, sidecar, in_this_run=False)
            return path.read_bytes()
        say(f"building {candidate.name} for batch {batch}")
        warn_of_tf32_override(asdict(settings))
        sources = self._ranges(candidate, settings, digest)
        with sources.saved():
            if self.repeat == 1:
                timings = TimingCacheFile(path.with_suffix(".timings"), self.toolkit, settings, replace_unknown=True)
                content = b"" if batch in self._own_timings else timings.content or self._timings
                built = build(
                    self.toolkit,
                    candidate.model,
                    settings,
                    content,
                    ranges=sources.by_hand,
                    calibration=sources.calibration,
                )
                built = dataclasses.replace(built, timing_cache=timings.save(built))
                self._timings = built.timing_cache_content
            else:
                built = build_fastest(
                    self.toolkit, candidate.model, settings, self.repeat, sources.by_hand, sources.calibration
                )
        parent = Parent.from_file(path, candidate.model, digest)
        sidecar = write_engine(path, built, self.toolkit, settings, None, parent, sources)
        self._record_build(candidate, batch, sidecar, in_this_run=True)
        return bytes(built.plan)

    def build_if_free(self, candidate: Candidate, batch: int) -> None:
        """Builds the engine, unless it exists or another run is building it."""
        with _claimed(self._path(candidate, batch)) as other:
            if other is None:
                self.engine(candidate, batch)
            else:
                say(f"{candidate.name} for batch {batch} is left to {other}")

    def _ranges(self, candidate: Candidate, settings: BuildSettings, digest: str) -> RangeSources:
        """Where the ranges of implicit INT8 come from. What is calibrated for one batch size is kept for the others."""
        if candidate.precision != "int8":
            return RangeSources()
        if candidate.calibration is None and candidate.ranges is None:
            return RangeSources(RangeTable.constant(_SOME_AMAX))
        model, calibration = candidate.model, candidate.calibration
        if calibration is not None and calibration.calibration_cache is None:
            cache = self.folder / f"{candidate.file_name}.cache"
            calibration = dataclasses.replace(calibration, calibration_cache=cache)
        sidecar = read_sidecar(model, "onnx") if sidecar_path(model).exists() else None
        return range_sources(self.toolkit, model, sidecar, digest, settings, calibration, candidate.ranges)

    def _path(self, candidate: Candidate, batch: int) -> Path:
        return self.folder / f"{candidate.file_name}-{batch}.engine"

    def _settings(self, candidate: Candidate, batch: int) -> BuildSettings:
        return BuildSettings(
            precision=candidate.precision,
            profiles=(Profile(batch, batch, batch),),
            optimization_level=self._optimization_level,
            timing_iterations=self._timing_iterations,
        )

    def _record_build(self, candidate: Candidate, batch: int, sidecar: Sidecar, in_this_run: bool) -> None:
        """Keeps and prints what the build reported about the engine."""
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
            "built_in_this_run": in_this_run,
            "timing_cache": sidecar.details["timing_cache"],
            "repetition": {**found, "spread_percent": round(repetition.spread_percent, 2)} if repetition else None,
        }
        if not any((known["name"], known["batch"]) == (candidate.name, batch) for known in self.builds):
            self.builds.append(entry)
        when = "" if in_this_run else " in an earlier run"
        when += ", kernels timed before" if entry["timing_cache"] == "reused" else ""
        say(
            f"  {candidate.name}, batch {batch}: built in {entry['seconds']:.1f} s{when}, "
            f"{entry['layers']} layers, {entry['reformats']} reformats, "
            f"{entry['convolutions_int8']} of {entry['convolutions']} convolutions {INT8.name}"
        )
        if repetition:
            say(f"  {repetition}")

    def _reusable_sidecar(self, path: Path, settings: BuildSettings, digest: str) -> Sidecar | None:
        """The sidecar of an engine of an earlier run, if it is exactly the engine that would be built."""
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
def _claimed(engine: Path) -> Iterator[Holder | None]:
    """Holds the lock of an engine while the block runs; yields who has it if that is another run."""
    with contextlib.ExitStack() as stack:
        with disk_errors(engine):
            engine.parent.mkdir(parents=True, exist_ok=True)
            holder = None
            try:
                stack.enter_context(locked(engine, " ".join(this_command())))
                remove_leftovers(engine)
            except HeldError as error:
                holder = error.holder
        yield holder
