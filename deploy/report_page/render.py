"""Renders the page: one file of HTML that needs no other, made of what deploy/report_page/artifacts.py gathers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from json import dumps
from pathlib import Path
from typing import Any

from deploy.report_page import agreements, answers, engine_view, summary
from deploy.report_page.artifacts import Artifacts, gather
from deploy.report_page.change import changes
from deploy.report_page.charts import Chart, Histogram, Series, histogram, line_chart
from deploy.report_page.layers import STATES, blocks_of, layers_of
from deploy.report_page.picture import draw
from deploy.report_page.roofline import roofline
from deploy.report_page.task_scores import task_scores_of
from deploy.report_page.verdict import judge, latencies_of, speeds_of, stages_of
from qat.base.console import say, table
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.base.outputs import check_apart
from qat.base.streams import is_stdout
from qat.base.text import decibels, megabytes
from qat.base.writing import atomic_write, check_writable

FOLDER = Path(__file__).parent
_CHANNELS_SHOWN, _DEAD_SHOWN = 100, 20
# Columns of the table of layers: the key of the rows' data, the title, and 1 for numbers, 2 for those on wide screens.
_COLUMNS = (
    ("label", "layer", 0),
    ("kind", "operation", 0),
    ("state", "computes in", 0),
    ("time", "time, us", 1),
    ("clipped", "clipped, %", 2),
    ("saved", "loss saved in float", 2),
)


def write_report(
    runs: Sequence[Path],
    output: Path,
    evaluation: Path | None = None,
    benchmark: Path | None = None,
    *,
    json: Path | None = None,
    markdown: Path | None = None,
) -> Path:
    """Writes the page about the first of ``runs``, compared with the others, and prints the verdict.

    Args:
        runs: folders, engines, ONNX files or checkpoints.
        output: the page.
        evaluation: what python -m deploy.evaluate --json wrote about the first run's engine.
        benchmark: what python -m deploy.benchmark wrote about its ONNX file.
        json, markdown: where the result in short goes; "-" is the standard output.

    Raises UserError when files are missing or do not belong together, and when the page cannot be written.
    """
    streams = [path for path in (json, markdown) if path is not None and is_stdout(path)]
    if is_stdout(output) or len(streams) > 1:
        raise UserError("only one of --json and --markdown can be -, the standard output, and not --output")
    named = [path for path in (evaluation, benchmark) if path is not None]
    gathered = [gather(path, named if index == 0 else ()) for index, path in enumerate(runs)]
    _check_outputs([path for path in (output, json, markdown) if path is not None and path not in streams], gathered)
    page = render(gathered)
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if json is not None:
        _write(json, dumps(summary.summary(gathered[0]), indent=1) + "\n")
    if markdown is not None:
        _write(markdown, summary.markdown(gathered[0]))
    if not streams:
        _print_result(gathered[0])
        say(f"report: {output}")
    return output


def _check_outputs(outputs: Sequence[Path], runs: Iterable[Artifacts]) -> None:
    """Raises UserError when an output cannot be written, or is a file that is read, or another output."""
    check_apart([("", path) for path in outputs], [("", file) for run in runs for file in run.files])
    for path in outputs:
        check_writable(path)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(runs: Sequence[Artifacts]) -> str:
    """The page about the first of ``runs``; the second is what it is compared with."""
    run = runs[0]
    stages, speeds, layers = stages_of(run), speeds_of(run), layers_of(run)
    verdict = judge(run, stages, speeds, layers)
    ids = {id(layer): f"l{index}" for index, layer in enumerate(layers)}
    others = runs[1:]
    change = changes(others[0], run) if others else None
    page: str = _template().render(
        run=run,
        int8=INT8.name,
        origin=_origin(run),
        verdict=verdict,
        answers=answers.answers_of(run, stages, speeds, layers, change),
        attention=answers.attention(run, layers),
        stages=stages,
        scores=task_scores_of(run),
        speeds=speeds,
        charts=_charts(runs),
        training=[*_sizes(run), *_training(run)],
        layers=layers,
        blocks=blocks_of(layers),
        ids=ids,
        states=STATES,
        columns=_COLUMNS,
        rules=_rules(run),
        histograms=_histograms(run),
        weights=_weights(run),
        picture=draw(run, layers, ids),
        engine=engine_view.view(run),
        roofline=roofline(run, layers),
        parity=agreements.parity(run),
        rewritten=agreements.rewritten(run),
        latencies=latencies_of(run),
        measured=run.results.get("benchmark"),
        change=change,
        missing=run.missing(),
        provenance=_provenance(run),
        commands=_commands(run),
    )
    return page


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["identity"] = id
    return environment.get_template("page.html.j2")


def _origin(run: Artifacts) -> str:
    parts = []
    if run.checkpoint is not None:
        how = "trained" if run.is_trained else "calibrated"
        classes = f"{len(run.checkpoint.class_names)} classes, " if run.checkpoint.class_names else ""
        parts.append(f"{classes}{how} on {run.data_source}" if run.data_source else f"{classes}saved from Python")
    if run.engine is not None:
        built = run.engine.details
        target = built["gpu"] or f"compute capabilities {', '.join(built['compute_capabilities'])}"
        parts.append(f"engine by {built['builder']['name']} {built['builder']['version']} for {target}")
    newest = run.engine or run.onnx or run.checkpoint
    assert newest is not None
    return "; ".join([*parts, str(newest.made_by.get("date", ""))[:10]])


def _rules(run: Artifacts) -> Mapping[str, str]:
    rules = run.checkpoint.details.get("rules", {}) if run.checkpoint else {}
    return {name: text if isinstance(text, str) else text[0] for name, text in rules.items()}


def _charts(runs: Sequence[Artifacts]) -> list[Chart]:
    """Curves of the training, and accuracy against speed if several runs are given."""
    run = runs[0]
    figures = run.checkpoint.figures if run.checkpoint else {}
    floats, quantized = (figures.get(f"{phase}_history", []) for phase in ("float", "qat"))
    start = len(floats)

    def curve(key: str) -> list[Series]:
        parts = (("float", "--orange", floats, 0), ("quantized", "--green", quantized, start))
        found = [
            Series(name, colour, [(first + at + 1, epoch[key]) for at, epoch in enumerate(history) if key in epoch])
            for name, colour, history, first in parts
            if history
        ]
        if len(found) > 1 and found[0].points:  # the second begins where the first ends
            found[1] = replace(found[1], points=[found[0].points[-1], *found[1].points])
        return found

    wanted = [
        line_chart("Validation accuracy", "epoch", "top-1, %", curve("validation_top1"), least_span=1.0),
        line_chart("Validation loss", "epoch", "loss", curve("validation_loss")),
        line_chart("Learning rate", "epoch", "learning rate (log)", curve("learning_rate"), logarithmic=True),
    ]
    return [chart for chart in (*wanted, _frontier(runs)) if chart is not None]


def _frontier(runs: Sequence[Artifacts]) -> Chart | None:
    """Accuracy against latency of several runs, at the largest batch size that all of them were measured at."""
    known = [(run, stages_of(run), {speed.batch: speed.int8 for speed in speeds_of(run)}) for run in runs]
    measured = [(run, stages[-1].top1, speeds) for run, stages, speeds in known if stages and speeds]
    if len(measured) < 2:
        return None
    batches = set.intersection(*(set(speeds) for _, _, speeds in measured))
    if not batches:
        return None
    batch = max(batches)
    colours = ("--blue", "--orange", "--green", "--violet", "--red")
    points = [
        Series(run.name, colours[index % len(colours)], [(speeds[batch], top1)])
        for index, (run, top1, speeds) in enumerate(measured)
    ]
    return line_chart(f"Accuracy against latency at batch {batch}", "latency, ms", "top-1, %", points, whole=False)


def _sizes(run: Artifacts) -> list[str]:
    """How large the network is in each form."""
    found = []
    source = run.checkpoint or run.onnx
    weights = [op["weight"] for op in source.details.get("network", []) if op["weight"]] if source else []
    if weights:
        found.append(f"weights in float32 {megabytes(4 * sum(map(math.prod, weights)))}")
    if run.onnx is not None and "bytes" in run.onnx.figures:
        found.append(f"ONNX file {megabytes(run.onnx.figures['bytes'])}")
    if run.engine is not None:
        found.append(f"engine {megabytes(run.engine.figures['engine_bytes'])}")
    return [f"Sizes: {', '.join(found)}."] if found else []


def _training(run: Artifacts) -> list[str]:
    """What the accuracies rest on."""
    if run.checkpoint is None:
        return []
    if not run.data_source:
        return ["The checkpoint was saved from Python: what it was calibrated and trained on is not recorded."]
    details = run.checkpoint.details
    splits, found = (
        details["splits"],
        f"Ranges from {details['splits'].get('calibration', 0)} calibration images ({details['calibrator']})",
    )
    if run.is_trained:
        found += f"; weights from {splits.get('train', 0)} training images"
        found += f"; epochs chosen on {splits.get('validation', 0)} validation images"
    else:
        steps = details.get("adaround", 0)
        how = f"rounded by AdaRound in {steps} steps a layer" if steps else "without training"
        found += f"; weights as they were given, {how}"
    agreement = run.checkpoint.figures.get("agreement")
    if agreement is None:
        return [f"{found}."]
    if agreement["top1"] is None:
        return [f"{found}.", f"{agreements.outputs_against_float(agreement)}."]
    alike = f"same class on {agreement['top1']:.2f} % of {agreement['images']} images"
    noise = f"SQNR of the logits {decibels(agreement['sqnr_db'])}"
    return [f"{found}.", f"Agreement with the float network: {alike}, {noise}."]


def _histograms(run: Artifacts) -> dict[str, Histogram]:
    given = run.distributions.activations if run.distributions else ()
    present = run.checkpoint.details.get("amax", {}) if run.checkpoint else {}
    drawn = {one.quantizer: histogram(one, present.get(one.quantizer)) for one in given}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _weights(run: Artifacts) -> dict[str, Chart]:
    """The ranges of weights by channel, sorted, of each layer."""
    charts = {}
    for one in run.distributions.weights if run.distributions else ():
        rising = sorted(value for value in one.largest if value is not None)
        every = max(1, len(rising) // _CHANNELS_SHOWN)
        last = len(rising) - 1
        points = [(at + 1, value) for at, value in enumerate(rising) if at % every == 0 or at == last]
        listed = ", ".join(map(str, one.dead[:_DEAD_SHOWN])) + (", ..." if len(one.dead) > _DEAD_SHOWN else "")
        dead = f"; dead channels: {listed}" if one.dead else ""
        title = f"Largest weight of each output channel{dead}"
        chart = line_chart(title, "channels, by their range", "max |w|", [Series(one.label, "--blue", points)])
        if chart is not None:
            charts[one.label] = chart
    return charts


def _provenance(run: Artifacts) -> list[dict[str, str]]:
    rows = []
    for kind in ("checkpoint", "onnx", "engine"):
        sidecar = getattr(run, kind)
        if sidecar is not None:
            device = sidecar.details.get("device") or {}
            gpu = f"{device['name']}, driver {device['driver']}" if device else ""
            seed = f"seed {sidecar.made_by['seed']}" if "seed" in sidecar.made_by else ""
            rows.append(
                {
                    "file": run.paths[kind].name,
                    "date": _minute(sidecar.made_by),
                    "versions": "; ".join(filter(None, (_versions(sidecar.made_by), seed, gpu))),
                    "sha256": sidecar.sha256,
                }
            )
    for path, result in zip(run.result_files, run.results.values(), strict=True):
        made_by = _made_by(result)
        rows.append({"file": path.name, "date": _minute(made_by), "versions": _versions(made_by), "sha256": ""})
    return rows


def _made_by(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a result says of the command that wrote it; {} of one of an older version."""
    found = result.get("made_by")
    return found if isinstance(found, dict) else {}


def _minute(made_by: Mapping[str, Any]) -> str:
    return str(made_by.get("date", ""))[:16].replace("T", " ")


def _versions(made_by: Mapping[str, Any]) -> str:
    versions = made_by.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "int8-qat-pipeline")


def _commands(run: Artifacts) -> str:
    """The commands of all stages, to copy."""
    sidecars = (getattr(run, kind) for kind in ("checkpoint", "onnx", "engine"))
    records = [sidecar.made_by for sidecar in sidecars if sidecar is not None] + [*map(_made_by, run.results.values())]
    return "\n".join(shlex.join(map(str, made_by["command"])) for made_by in records if made_by.get("command"))


def _print_result(run: Artifacts) -> None:
    stages, speeds = stages_of(run), speeds_of(run)
    rows = [(f"{stage.label}, top-1 on {stage.images} test images", f"{stage.top1:.2f} %") for stage in stages]
    scores = task_scores_of(run)
    rows += scores.lines() if scores else []
    rows += [
        (f"{INT8.name} against FP16, batch {speed.batch}", f"{speed.int8:.4f} against {speed.fp16:.4f} ms")
        for speed in speeds
    ]
    agreement = run.checkpoint.figures.get("agreement") if run.checkpoint else None
    if agreement and agreement["top1"] is not None:
        what = f"{INT8.name} and float, same class on {agreement['images']} images"
        rows.append((what, f"{agreement['top1']:.2f} %"))
    elif agreement:
        what = f"{INT8.name} and float on {agreement['images']} images"
        rows += [(f"{what}, {one['tensor'] or 'output'}", agreements.distance(one)) for one in agreement["outputs"]]
    if run.engine is not None:
        figures = run.engine.figures
        rows += [
            (f"convolutions in {INT8.name}", f"{figures['convolutions_int8']} of {figures['convolutions']}"),
            (f"matrix products in {INT8.name}", f"{figures['matrix_products_int8']} of {figures['matrix_products']}"),
        ]
    if rows:
        table("Result", ("what", "measured"), rows)
    say(judge(run, stages, speeds, layers_of(run)).sentence)
