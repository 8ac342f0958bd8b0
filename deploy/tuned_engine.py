"""A Q/DQ file tuned for the GPU at hand: the placement, its ONNX file and its engine."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.engine_file import EngineFile, build_engine
from deploy.float_twin import float_precision
from deploy.installed import find_toolkit
from deploy.settings import BuilderOptions, Profile
from deploy.tuning import frontier, search
from deploy.tuning_bench import EngineBench
from qat.base.artifact import Parent, Sidecar, read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.console import say, table, warn
from qat.base.errors import UserError
from qat.base.writing import check_writable
from qat.graph.network import Network
from qat.graph.operations import WEIGHTED
from qat.rules.float_steps import FloatStep, read_float_steps
from qat.rules.regions import Kept
from qat.rules.tuned import FrontierPoint, TunedPlacement


@dataclass(frozen=True)
class TunedEngine:
    """What was written, and whether the engine is faster than FP16 beyond the spread."""

    placement: TunedPlacement
    model: Path
    engine: EngineFile
    beats_float: bool


def tune_engine(
    model: str | Path,
    output: str | Path | None = None,
    *,
    minutes: float = 10.0,
    batch: int = 32,
    runs: int = 200,
    costs: str | Path | None = None,
    max_drop: float | None = None,
    trust_code: bool = False,
) -> TunedEngine:
    """Finds which layers of a Q/DQ file are faster in float on this GPU, and writes what it found.

    Args:
        model: the Q/DQ file, or a checkpoint of qat, which is exported first, as MODEL.onnx (that needs torch). The
            sidecar of the file is used if there is one.
        output: the placement; by default MODEL.tuned.json. Beside it are written MODEL.tuned.onnx, in which what is
            still quantized has the same scales and codes, and MODEL.tuned.engine.
        minutes: nothing is tried after these.
        batch: the batch size to tune for.
        runs: how many timed inferences each engine of a comparison has, at least.
        costs: what qat.sensitivity --json wrote about the network: its accuracy with more and more in float. These
            placements are timed, too, in as many minutes again.
        max_drop: how many percentage points of accuracy below the float network are acceptable: the fastest placement
            within them is chosen. None: the fastest of all.
        trust_code: run the code that a stranger's checkpoint names (docs/trust.md).

    Raises UserError when there is no GPU, the file has no Q/DQ nodes, TensorRT refuses it or its float twin, or
    ``costs`` are of another network.
    """
    given = model = Path(model)
    if minutes <= 0 or min(batch, runs) < 1:
        raise UserError("--budget must be above 0, --batch and --runs at least 1")
    if max_drop is not None and (costs is None or not max_drop >= 0):
        raise UserError(
            "--max-drop is at least 0 percentage points, and needs --costs: python -m qat.sensitivity --json"
        )
    steps: Sequence[FloatStep] = () if costs is None else read_float_steps(Path(costs))
    if not model.is_file():
        raise UserError(f"no file {model}: check the path, or make it with python -m export.onnx")
    if given.suffix == ".qat":
        model = given.with_suffix(".onnx")
    output = model.with_suffix(".tuned.json") if output is None else Path(output)
    tuned, engine = output.with_suffix(".onnx"), output.with_suffix(".engine")
    if model.resolve() in (output.resolve(), tuned.resolve()):
        raise UserError(f"{tuned} is the model itself: give --output another name")
    for path in (output, tuned, engine):
        check_writable(path)
    toolkit = find_toolkit("tensorrt")
    assert toolkit.device is not None
    if model != given:
        exported_to_tune(given, model, trust_code=trust_code)
    with tempfile.TemporaryDirectory() as folder:
        bench = EngineBench(toolkit, model, Path(folder), batch, runs)
        network = bench.network
        steps = [replace(step, kept=_parts(step.kept, network, bench)) for step in steps]
        _check_steps(steps, network, {bench.whole(op.label) for op in network}, costs)
        found = search(network, bench, minutes)
        points = frontier(bench, found.kept, steps, minutes)
        kept = _within(points, max_drop, found.kept)
        rules, floats, last = bench.final(kept)
        placement = TunedPlacement(
            keep_float=tuple(sorted({bench.whole(label) for label in kept})),
            layers=tuple(dict.fromkeys(bench.whole(op.label) for op in network if op.kind in WEIGHTED)),
            gpu=toolkit.device.name,
            tensorrt=toolkit.version,
            batch=batch,
            int8_ms=round(rules.median, 5),
            float_ms=round(floats.median, 5),
            tuned_ms=round(last.median, 5),
            trials=found.trials,
            frontier=tuple(points),
        )
        placement.write(output)
        sidecar, written = _sidecar(model, tuned, placement), list[bool]()
        write_artifact(tuned, sidecar, lambda path: written.append(bench.write(kept, path)))
    if not found.complete:
        warn(f"{minutes:g} minutes ended the search: a larger --budget may find more")
    _show(placement)
    options = BuilderOptions() if any(written) else BuilderOptions(precision=float_precision(toolkit))
    built = build_engine(tuned, engine, builder="tensorrt", profiles=[Profile(batch, batch, batch)], settings=options)
    if not last.beats(floats):
        warn(f"FP16 takes {floats.median:.4f} ms, the tuned engine {last.median:.4f}: deploy FP16")
    say(f"wrote {output}, {tuned} and {engine}")
    return TunedEngine(placement, tuned, built, last.beats(floats))


def _parts(kept: Kept, network: Network, bench: EngineBench) -> Kept:
    """The labels of the file for those of the model."""
    return kept | {op.label for op in network if bench.whole(op.label) in kept}


def _check_steps(
    steps: Sequence[FloatStep], network: Network, wholes: Collection[str], costs: str | Path | None
) -> None:
    """Raises UserError when the steps name operations that the network has not."""
    known = {op.label for op in network}
    if unknown := sorted({label for step in steps for label in step.kept} - known.union(wholes)):
        raise UserError(f"{costs} is of another network: this one has no {unknown[0]}; measure its own")


def _within(points: Sequence[FrontierPoint], max_drop: float | None, kept: Kept) -> Kept:
    """The fastest placement that is accurate enough; of none the most accurate, which is warned of."""
    if max_drop is None or not points:
        return kept
    enough = [point for point in points if point.drop <= max_drop]
    chosen = min(enough, key=lambda point: point.milliseconds) if enough else min(points, key=lambda point: point.drop)
    if not enough:
        least = f"the most accurate is {chosen.drop:.2f} below"
        warn(f"no placement is within {max_drop:g} points of the float network; {least}")
    return frozenset(chosen.keep_float)


def exported_to_tune(checkpoint: Path, output: Path, *, trust_code: bool) -> None:
    """Exports a checkpoint. Raises UserError where torch is missing, and as export_onnx does."""
    try:
        from export.from_checkpoint import export_onnx
    except ImportError as error:
        raise UserError(
            f"exporting {checkpoint} needs another package ({error.name}): run python -m export.onnx {checkpoint} "
            "where torch is, and give its file"
        ) from error
    export_onnx(checkpoint, output, trust_code=trust_code)


def _sidecar(model: Path, tuned: Path, placement: TunedPlacement) -> Sidecar:
    """That of the tuned file: the model's, without figures, which were measured of another network."""
    source = read_sidecar(model, "onnx") if sidecar_path(model).exists() else Sidecar(kind="onnx")
    digest = source.sha256 or sha256_of(model)
    details = {key: value for key, value in source.details.items() if key not in ("reference", "placement", "network")}
    return replace(
        source,
        parent=Parent.from_file(tuned, model, digest),
        figures={},
        details=details
        | {
            "tuned": {"keep_float": placement.keep_float, "gpu": placement.gpu, "tensorrt": placement.tensorrt},
            "reference": None,
        },
    )


def _show(placement: TunedPlacement) -> None:
    rows = [
        (one.what, "refused" if one.milliseconds is None else f"{one.milliseconds:.4f}", "yes" if one.kept else "no")
        for one in placement.trials
    ]
    if rows:
        table("What was tried", ("change", "ms", "kept"), rows)
    points = [
        (
            f"{point.drop:.2f}",
            str(len(point.keep_float)),
            f"{point.milliseconds:.4f}",
            f"{placement.float_ms / point.milliseconds:.2f}",
        )
        for point in placement.frontier
    ]
    if points:
        table("Accuracy against speed", ("points below float", "in float", "ms", "times FP16"), points)
    summary = [
        ("FP16", f"{placement.float_ms:.4f}", "1.00"),
        ("INT8 by rules", f"{placement.int8_ms:.4f}", f"{placement.float_ms / placement.int8_ms:.2f}"),
        ("INT8 tuned", f"{placement.tuned_ms:.4f}", f"{placement.float_ms / placement.tuned_ms:.2f}"),
    ]
    title = f"{placement.gpu}, TensorRT {placement.tensorrt}, batch {placement.batch}"
    table(title, ("engine", "ms", "times FP16"), summary)
