"""Engines for a search (deploy/tuning.py): variants of one Q/DQ file with fewer quantizers, and its float twin."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from deploy.builder import BuiltEngine, build
from deploy.float_twin import build_float_twin, onnx_package
from deploy.layer_costs import LayerCosts
from deploy.measure import Latency, latencies_of_built, layer_times
from deploy.runtime import Engine
from deploy.settings import BuildSettings, Profile
from deploy.trt import Toolkit
from qat.base.console import say
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.graph.network import Network
from qat.rules.regions import Kept

_LAYER_RUNS = 50


class EngineBench:
    """Builds engines of a Q/DQ file on the GPU at hand. Kernels are timed once for all of them.

    Args:
        toolkit: the builder.
        model: the Q/DQ file.
        folder: holds the files of variants.
        batch: a fixed batch size.
        runs: how many timed inferences each engine of a comparison has, at least.
    """

    def __init__(self, toolkit: Toolkit, model: Path, folder: Path, batch: int, runs: int) -> None:
        self._toolkit, self._model, self._folder, self._batch, self._runs = toolkit, model, folder, batch, runs
        self._settings = BuildSettings(profiles=(Profile(batch, batch, batch),))
        self._timings = b""
        self._built: dict[Kept, BuiltEngine] = {}
        self._float: BuiltEngine | None = None
        self._wholes = self._read_wholes()

    def whole(self, label: str) -> str:
        """The label that a layer has in the model that was exported: export may make one layer several."""
        return next((whole for whole in self._wholes if label.startswith(f"{whole}.")), label)

    def _with_siblings(self, kept: Kept) -> Kept:
        """``kept``, with all parts of the layers of which some part is in it."""
        if not self._wholes or not kept:
            return kept
        wholes = {self.whole(label) for label in kept}
        return kept | {op.label for op in self.network if self.whole(op.label) in wholes}

    def _read_wholes(self) -> tuple[str, ...]:
        with onnx_package():
            from export.fewer_quantizers import split_layers

            return split_layers(self._model)

    @functools.cached_property
    def network(self) -> Network:
        """The neutral view of the float network. Raises UserError when the file cannot be read or has no Q/DQ nodes."""
        with onnx_package():
            from export.fewer_quantizers import float_network

            return float_network(self._model)

    def write(self, kept: Kept, path: Path) -> bool:
        """Writes the variant that leaves ``kept`` in float. Returns whether anything is left in INT8.

        Raises UserError when the file has no such operations.
        """
        with onnx_package():
            from export.fewer_quantizers import write_variant

            return write_variant(self._model, self._with_siblings(kept), path)

    def losses(self, kept: Kept) -> Mapping[str, float]:
        """As Bench.losses."""
        path = self._folder / "variant.onnx"
        self.write(kept, path)
        costs = LayerCosts.from_model(self._toolkit, path)
        with ExitStack() as stack:
            int8, floats = (
                costs.charge(layer_times(stack.enter_context(self._load(built)), self._batch, _LAYER_RUNS))
                for built in (self.engine(kept), self.float_engine())
            )
        inside = {one.node for one in self.engine(kept).audit.findings if one.precision == INT8.name}
        return {label: int8[label] - floats[label] for label in int8.keys() & floats.keys() & inside}

    def compare(self, best: Kept, other: Kept) -> tuple[Latency, Latency] | None:
        """As Bench.compare. Only these two engines are kept in memory."""
        try:
            built = {"best": self.engine(best), "other": self.engine(other)}
        except UserError as error:
            say(f"refused: {error}")
            return None
        found = self._latencies(built)
        self._built = {kept: self._built[kept] for kept in (best, other)}
        return found["best"], found["other"]

    def final(self, kept: Kept) -> tuple[Latency, Latency, Latency]:
        """The latencies of the rules' engine, of the float engine and of the tuned one, in turns."""
        found = self._latencies(
            {"rules": self.engine(frozenset()), "float": self.float_engine(), "tuned": self.engine(kept)}
        )
        return found["rules"], found["float"], found["tuned"]

    def engine(self, kept: Kept) -> BuiltEngine:
        """The engine that leaves ``kept`` in float. Raises UserError when TensorRT refuses it."""
        if kept not in self._built:
            path = self._folder / "variant.onnx"
            if self.write(kept, path):
                self._built[kept] = build(self._toolkit, path, self._settings, self._cache)
                self._timings = self._built[kept].timing_cache_content
            else:  # not every version builds it for INT8
                self._built[kept] = self.float_engine()
        return self._built[kept]

    def float_engine(self) -> BuiltEngine:
        """The FP16 engine of the same network. Raises UserError when TensorRT refuses it."""
        if self._float is None:
            self._float = build_float_twin(self._toolkit, self._model, self._settings, self._cache).built
            self._timings = self._float.timing_cache_content
        return self._float

    @property
    def _cache(self) -> bytes | None:
        return self._timings if self._toolkit.times_kernels else None

    def _load(self, built: BuiltEngine) -> Engine:
        return Engine.from_plan(built.plan, self._toolkit, contexts=1)

    def _latencies(self, built: Mapping[str, BuiltEngine]) -> dict[str, Latency]:
        return latencies_of_built(self._toolkit, built, self._batch, self._runs)
