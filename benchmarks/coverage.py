"""Which networks go all the way: one of every family that timm registers, and all of torchvision's.

    python -m benchmarks.coverage --workers 2 [--build] [--output benchmarks/coverage] [NAME ...]

Each network has random weights and the statistics of random images. It is traced and proved against the model, placed,
calibrated, exported in float32 and in INT8, linted, and run in ONNX Runtime. Placement must find the same layers in the
float32 file. The answers are compared with those of
the original float model: float32 within 1e-4 of their norm, INT8 as far from it as fake quantization in PyTorch is.
``--build`` also builds an engine with TensorRT-RTX. The table names what fails; the JSON beside it has all.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECONDS_TO_CHOOSE, SECONDS = 45, 300
LARGEST_SIDE = 320
FLOAT_TOLERANCE = 1e-4
EXPLAINED_DB = 3.0


@dataclass
class Result:
    """What became of one network: the stage that failed, and its error; '' for none."""

    name: str
    failed: str = ""
    error: str = ""
    trainable: bool = False
    not_trainable: str = ""
    quantized: int = 0
    layers: int = 0
    trace_seconds: float = 0.0
    float_error: float = 0.0
    int8_db: float | None = None
    fake_quantized_db: float | None = None
    findings: tuple[str, ...] = ()


def names() -> Iterator[str]:
    """torchvision's classification and segmentation models, then ``timm/@FAMILY``."""
    import timm
    from torchvision import models

    yield from models.list_models(module=models)
    yield from models.list_models(module=models.segmentation)
    yield from (f"timm/@{family}" for family in timm.list_modules())


def smallest_of(family: str) -> str:
    """The model of a family of timm with the fewest parameters, among those of at most 320 px."""
    import timm
    import torch

    start, best = time.time(), ((True, 0), "")
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # not every model can be made without memory
            continue
        side = model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
        key = (side > LARGEST_SIDE, sum(parameter.numel() for parameter in model.parameters()))
        if not best[1] or key < best[0]:
            best = (key, name)
        if time.time() - start > SECONDS_TO_CHOOSE:
            break
    return best[1] or timm.list_models(module=family)[0]


def build(name: str) -> tuple[Any, tuple[int, ...]]:
    """The model, and the shape of its input."""
    from qat.models import ModelSpec, build_model

    shape: tuple[int, ...] = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    model = build_model(ModelSpec(name, 21 if "lraspp" in name else 1000))
    return model, tuple(getattr(model, "pretrained_cfg", {}).get("input_size", shape))


def distance_db(reference: Any, other: Any) -> float:
    """SQNR of ``other`` in dB, over all outputs."""
    import torch

    pairs = list(zip(reference, other, strict=True))
    noise = sum(float((one.double() - two.double()).square().sum()) for one, two in pairs)
    signal_power = sum(float(one.double().square().sum()) for one, _ in pairs)
    return float(10 * torch.log10(torch.tensor(signal_power / max(noise, 1e-300))))


def run(name: str, with_engine: bool) -> Result:
    """Takes one network through all stages."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(SECONDS)
    result, stage = Result(name), "build the model"
    try:
        if name.startswith("timm/@"):
            result.name = name = f"timm/{smallest_of(name.removeprefix('timm/@'))}"
        torch.manual_seed(0)
        model, shape = build(name)
        stages = _stages(model, shape, result, with_engine)
        while (reached := next(stages, None)) is not None:
            stage = reached
    except BaseException as error:  # whatever a network raises is a row of the table
        result.failed, result.error = stage, f"{type(error).__name__}: {_one_line(error)}"
    signal.alarm(0)
    return result


def _one_line(error: BaseException) -> str:
    """What was raised, without folders of this machine."""
    return re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))[:300]


def _stages(model: Any, shape: tuple[int, ...], result: Result, with_engine: bool) -> Iterator[str]:
    """Yields each stage before it begins."""
    import torch

    import export
    import qat
    from export.onnx_network import network_from_onnx
    from export.read import read_onnx
    from export.session import session
    from qat.fake_quantize.prepare import copy_for_evaluation
    from qat.graph.outputs import leaves
    from qat.rules.place import place

    _move_statistics(model, shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        reference = [value for _, value in leaves(model.eval()(x.clone())) if isinstance(value, torch.Tensor)]
    yield "trace"
    start = time.time()
    prepared = qat.prepare(model, input_shape=shape)
    result.trace_seconds = time.time() - start
    result.not_trainable = prepared.meta["evaluation_only"]
    result.trainable = not result.not_trainable
    yield "place"
    weights = qat.placement_of(prepared).weights
    result.quantized, result.layers = sum(decision.quantized for decision in weights), len(weights)
    qat.calibrate_ranges(prepared, [x])
    with torch.no_grad():
        quantized = [value for _, value in leaves(prepared.eval()(x.clone())) if isinstance(value, torch.Tensor)]
        in_float = copy_for_evaluation(prepared, quantized=False)
        plain = [value for _, value in leaves(in_float(x.clone())) if isinstance(value, torch.Tensor)]
    assert distance_db(reference, plain) > 60, "the prepared model without quantizers is not the model"
    result.fake_quantized_db = distance_db(reference, quantized)
    with tempfile.TemporaryDirectory() as folder:
        for stage, precision in (("export float32", "float32"), ("export INT8", "int8")):
            if precision == "float32" and bytes_of_weights(model) >= 2**31:
                continue  # no ONNX file can hold them
            yield stage
            path = Path(folder) / f"{precision}.onnx"
            export.export_onnx(prepared, path, precision=precision, images=x)
            answers = [torch.from_numpy(one) for one in session(path).run(None, {"input": x.numpy()})]
            decibels = distance_db(reference, answers)
            if precision == "float32":
                result.float_error = 10 ** (-decibels / 20)
                assert result.float_error < FLOAT_TOLERANCE, f"float32 differs by {result.float_error:.2g} of the norm"
                found = place(network_from_onnx(read_onnx(path)).network).weights
                placed = (sum(decision.quantized for decision in found), len(found))
                assert placed == (result.quantized, result.layers), (
                    f"{placed[0]} of {placed[1]} layers of the ONNX file would be INT8, and {result.quantized} of "
                    f"{result.layers} of the model"
                )
            else:
                result.int8_db = decibels
                least = result.fake_quantized_db - EXPLAINED_DB
                assert decibels > least, f"{decibels:.1f} dB, and fake quantization {result.fake_quantized_db:.1f} dB"
        yield "lint"
        quantizes = any(decision.quantized for decision in weights)
        result.findings = tuple(map(str, export.lint_onnx(path))) if quantizes else ()
        assert not result.findings, result.findings[0]
        if with_engine:
            yield "engine"
            import deploy

            deploy.build_engine(path, profiles=[deploy.Profile(1, 2, 4)])


def bytes_of_weights(model: Any) -> int:
    """Bytes of the parameters of ``model``."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _move_statistics(model: Any, shape: tuple[int, ...]) -> None:
    """Gives batch normalizations the statistics of random images, and weights that are zero random values."""
    import torch

    from qat.graph.proof import wake

    wake(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, *shape, generator=generator))


def _too_late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def _work(task: tuple[str, bool]) -> Result:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    return run(*task)


def report(results: list[Result], command: str) -> str:
    """The table: shares, and a line for each failure."""
    from benchmarks.stamp import stamp

    count = len(results)
    whole = [one for one in results if not one.failed]
    trainable = [one for one in results if one.trainable]
    lines = [
        stamp(command),
        f"{count} networks: post-training {len(whole)} ({100 * len(whole) / count:.1f} %) through all stages, "
        f"trainable {len(trainable)} ({100 * len(trainable) / count:.1f} %)",
        "",
        *(f"{one.name:48} failed at {one.failed}: {one.error}" for one in results if one.failed),
        *(f"{one.name:48} not trainable: {one.not_trainable}" for one in results if one.not_trainable),
        "",
        f"{'network':48} {'INT8 layers':>12} {'trace s':>8} {'float32 error':>14} {'INT8 dB':>8} {'PyTorch dB':>11}",
    ]
    for one in whole:
        layers = f"{one.quantized} of {one.layers}"
        lines.append(
            f"{one.name:48} {layers:>12} {one.trace_seconds:8.1f} {one.float_error:14.1e} {one.int8_db or 0:8.1f} "
            f"{one.fake_quantized_db or 0:11.1f}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all networks, or those that are named, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/coverage"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    tasks = [(name, options.build) for name in options.names or names()]
    results: list[Result] = []
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=4) as pool:
        for result in pool.imap_unordered(_work, tasks):
            results.append(result)
            options.output.with_suffix(".json").write_text(
                json.dumps([asdict(one) for one in results], indent=1) + "\n"
            )
    results.sort(key=lambda one: one.name)
    build_too = " --build" if options.build else ""
    text = report(results, f"python -m benchmarks.coverage --workers {options.workers}{build_too}")
    options.output.with_suffix(".txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
