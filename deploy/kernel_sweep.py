"""Measures which layers gain by INT8 on the GPU at hand: each inside of a small network, in INT8 and in float."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deploy.builder import BuiltEngine, build
from deploy.float_twin import onnx_package
from deploy.installed import find_toolkit
from deploy.measure import Latency, latencies_of_built
from deploy.settings import BuildSettings
from deploy.trt import Toolkit
from qat.base.console import say, table, warn
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.base.writing import check_writable
from qat.rules.kernel_profile import KernelProfile, LayerKind, MeasuredKind

GROUP_WIDTHS = (48, 24, 12, 4, 8, 16, 32, 64, 20, 40, 56, 80, 96, 112, 128, 160, 232)
PADDED_WIDTHS = (
    (12, 16),
    (20, 32),
    (24, 32),
    (40, 64),
    (48, 64),
    (56, 64),
    (80, 128),
    (96, 128),
    (112, 128),
    (232, 256),
    (36, 64),
    (18, 32),
)
"""Widths, and those which zeros would bring them to; one of as many groups is compared with the other in float."""
_CHANNELS = 240  # about so many does a grouped convolution have


def kinds_of_layers() -> dict[str, list[LayerKind]]:
    """The kinds that matter, by family."""

    def conv(inside: int, outside: int, size: int | tuple[int, int] = 3, **others: Any) -> LayerKind:
        kernel = (size, size) if isinstance(size, int) else size
        return LayerKind(operation="convolution", in_channels=inside, out_channels=outside, kernel=kernel, **others)

    def grouped(width: int, stride: int = 1, padded: int = 0) -> LayerKind:
        groups = max(2, round(_CHANNELS / width))
        pixels = 56 if width < 112 else 28
        channels = (padded or width) * groups
        return conv(channels, channels, groups=groups, stride=stride, pixels=pixels)

    def depthwise(size: int, stride: int = 1, dilation: int = 1, channels: int = 144) -> LayerKind:
        return conv(channels, channels, size, groups=channels, stride=stride, dilation=dilation)

    def transposed(inside: int, outside: int, size: int, stride: int) -> LayerKind:
        found = conv(inside, outside, size, stride=stride, pixels=28)
        return replace(found, operation="transposed_convolution", weight_scales="input")

    def linear(inside: int, outside: int) -> LayerKind:
        return LayerKind(operation="linear", in_channels=inside, out_channels=outside, pixels=196)

    def pool(size: int, stride: int = 1, channels: int = 256) -> LayerKind:
        return replace(conv(channels, channels, size, stride=stride, pixels=28), operation="average_pool")

    return {
        "grouped": [
            *map(grouped, GROUP_WIDTHS),
            *(grouped(width, 2) for width in (8, 16, 48)),
            *(conv(256, 256, 1, groups=256 // width) for width in (16, 32)),
        ],
        "padded groups": [grouped(width, padded=padded) for width, padded in PADDED_WIDTHS],
        "transposed": [  # equal scales, which deploy.transposed_scales states as each version wants them
            *(transposed(inside, inside // 2, 2, 2) for inside in (32, 64, 128, 256)),
            transposed(64, 32, 3, 2),
            *(transposed(inside, outside, 4, 2) for inside, outside in ((64, 64), (128, 64), (256, 256))),
            *(
                replace(transposed(inside, inside // 2, 2, 2), operation="shuffled_convolution", weight_scales="output")
                for inside in (32, 64, 128, 256)
            ),
        ],
        "depthwise": [
            *(depthwise(size) for size in (3, 5, 7, 31)),
            *(depthwise(size, 2) for size in (3, 5, 7)),
            depthwise(3, dilation=2),
            *(depthwise(3, channels=channels) for channels in (100, 28, 30, 50)),
        ],
        "few channels": [
            *(conv(inside, 32, 3, stride=2, pixels=224) for inside in (1, 3, 4)),
            conv(3, 64, 7, stride=2, pixels=224),
            *(conv(3, 64, size, stride=stride, pixels=224) for size, stride in ((7, 4), (11, 4), (2, 2))),
            *(conv(inside, 32, 3, pixels=112) for inside in (8, 12)),
            *(conv(32, outside, 3, pixels=112) for outside in (1, 3, 8, 12)),
            *(conv(inside, outside, 1) for inside, outside in ((32, 1), (20, 20), (36, 24), (100, 100))),
        ],
        "swish": [
            *(
                conv(inside, outside, 3, stride=2 if inside == 3 else 1, pixels=pixels, activation=activation)
                for inside, outside, pixels in ((3, 64, 640), (3, 16, 640), (3, 32, 224), (64, 64, 80))
                for activation in ("swish", "swish of codes")
            ),
            *(conv(3, outside, 3, stride=2, pixels=224, activation="swish") for outside in (64, 16)),
            *(conv(64, 64, 3, stride=stride, activation="swish") for stride in (1, 2)),
            conv(64, 64, 1, activation="swish"),
        ],
        "kernels": [
            *(conv(64, 64, size) for size in (1, 3, 5, 7)),
            *(conv(64, 64, size, pixels=28) for size in (31, (1, 7), (7, 1))),
            *(conv(64, 64, 3, stride=stride) for stride in (2, 3)),
            *(conv(64, 64, 3, dilation=dilation) for dilation in (2, 4, 12)),
            conv(3, 96, 4, stride=4, pixels=224),
            conv(3, 192, 16, stride=16, pixels=224),
            conv(96, 192, 2, stride=2),
        ],
        "linear": [
            linear(inside, outside)
            for inside, outside in ((8, 64), (12, 64), (16, 64), (64, 8), (64, 10), (64, 12), (64, 64), (768, 3072))
        ],
        "pools and gates": [
            pool(3),
            pool(2, 2),
            pool(0),
            *(LayerKind(operation="gate", in_channels=n, out_channels=n, pixels=28) for n in (64, 256)),
        ],
    }


class KernelSweep:
    """Builds and times the two networks of each kind. ``folder`` holds their files."""

    def __init__(self, toolkit: Toolkit, folder: Path, batch: int, runs: int = 200) -> None:
        self._toolkit, self._folder, self._batch, self._runs = toolkit, folder, batch, runs
        self._timings = b""

    def measure(self, kind: LayerKind) -> MeasuredKind:
        """One kind. That TensorRT refuses the network with the layer in INT8 is a result, too.

        Raises UserError when it refuses the other one.
        """
        from export.kernel_networks import LAYER

        kept = self.build(kind, quantized=False)
        try:
            int8 = self.build(kind, quantized=True)
        except UserError as error:
            return MeasuredKind(
                kind=kind, int8_ms=None, float_ms=None, in_int8=None, significant=False, error=str(error)
            )
        batch = self._batch * (kind.pixels if kind.operation == "linear" else 1)
        found = self._latencies({"int8": int8, "float": kept}, batch)
        layers = [one for one in int8.audit.findings if one.node == LAYER]
        return MeasuredKind(
            kind=kind,
            int8_ms=round(found["int8"].median, 5),
            float_ms=round(found["float"].median, 5),
            in_int8=layers[0].precision == INT8.name if layers else None,
            significant=found["int8"].beats(found["float"]) or found["float"].beats(found["int8"]),
        )

    def build(self, kind: LayerKind, *, quantized: bool) -> BuiltEngine:
        """The engine of a network with the layer in INT8, or in float. Raises UserError when TensorRT refuses it."""
        from export.kernel_networks import write_kernel_network

        path = self._folder / f"{'int8' if quantized else 'float'}.onnx"
        half = self._toolkit.typing() == "strong"  # then the types are those of the file
        write_kernel_network(path, kind, self._batch, quantized=quantized, half=half)
        built = build(self._toolkit, path, BuildSettings(), self._timings)
        self._timings = built.timing_cache_content
        return built

    def _latencies(self, built: dict[str, BuiltEngine], batch: int) -> dict[str, Latency]:
        return latencies_of_built(self._toolkit, built, batch, self._runs)


def sweep_kernels(
    families: Sequence[str], batch: int, runs: int, minutes: float, output: Path, *, again: bool = False
) -> KernelProfile:
    """Measures the kinds of ``families`` on this GPU, and keeps them in ``output`` after each.

    Args:
        families: some of ``kinds_of_layers()``; none: all of them.
        batch: images of a network.
        runs: how many timed inferences each network has, at least.
        minutes: no kind is begun after these.
        output: the profile. What it has of this GPU and version is kept and not measured again.
        again: measures that again.

    Raises UserError when there is no GPU, a family is not known, or ``output`` is of another GPU.
    """
    known = kinds_of_layers()
    if unknown := [name for name in families if name not in known]:
        raise UserError(f"--families {unknown[0]!r} is not known: choose from {', '.join(known)}")
    if batch < 1 or runs < 1 or minutes <= 0:
        raise UserError("--batch, --runs and --minutes must be above 0")
    check_writable(output)
    toolkit = find_toolkit("tensorrt")
    assert toolkit.device is not None
    device = toolkit.device
    profile = KernelProfile(
        device.name, device.capability, toolkit.version, _now(), batch, _earlier(output, toolkit, batch)
    )
    measured = {one.kind for one in profile.kinds}
    kinds = list(dict.fromkeys(kind for name in families or known for kind in known[name]))
    wanted = [kind for kind in kinds if again or kind not in measured]
    done = 0
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, onnx_package():
        sweep = KernelSweep(toolkit, Path(folder), batch, runs)
        for kind in wanted:
            if time.monotonic() >= end:
                break
            found = sweep.measure(kind)
            say(f"{found.kind}: {_gain(found)}")
            others = tuple(one for one in profile.kinds if one.kind != found.kind)
            profile = replace(profile, kinds=(*others, found), date=_now())
            profile.write(output)
            done += 1
    _show(profile)
    if left := len(wanted) - done:
        warn(f"{left} kinds were not measured in {minutes:g} minutes: run it again with this --output")
    return profile


def _earlier(output: Path, toolkit: Toolkit, batch: int) -> Sequence[MeasuredKind]:
    """What the file has of this GPU, version and batch size."""
    if not output.is_file():
        return ()
    found = KernelProfile.read(output)
    assert toolkit.device is not None
    mine = (toolkit.device.name, toolkit.device.capability, toolkit.version, batch)
    if (found.gpu, found.compute_capability, found.tensorrt, found.batch) != mine:
        raise UserError(
            f"{output} is of {found.gpu}, TensorRT {found.tensorrt} and batch {found.batch}: give another --output"
        )
    return found.kinds


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _gain(found: MeasuredKind) -> str:
    if found.gain is None:
        return f"not built in INT8: {found.error}"
    sure = "" if found.significant else ", within the spread"
    return f"{found.gain:.2f} times as fast in INT8{sure}" + (
        ", but the engine has it in float" if found.in_int8 is False else ""
    )


def _show(profile: KernelProfile) -> None:
    rows = []
    for one in profile.kinds:
        gain = "-" if one.gain is None else f"{one.gain:.2f}" + ("" if one.significant else " (spread)")
        times = ["-" if ms is None else f"{ms:.4f}" for ms in (one.float_ms, one.int8_ms)]
        rows.append((str(one.kind), *times, gain, {True: "yes", False: "no", None: "not told"}[one.in_int8]))
    title = (
        f"{profile.gpu}, TensorRT {profile.tensorrt}, batch {profile.batch}: a network with the layer in float, in INT8"
    )
    table(title, ("layer", "float, ms", "INT8, ms", "gain", "in INT8"), rows)
