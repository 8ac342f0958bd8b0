"""The two products of an attention: softmax(q @ k) @ v, however it is spelt."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING
from qat.rules.rule import GUIDE, PlacementState, Rule, Verdict

ATTENTION_PRODUCT = "attention_product"
HEAD_SIZES, MOST_TOKENS = (16, 32, 64), 512
"""What the fused INT8 attention of TensorRT 8.6 takes."""
_TO_SOFTMAX = ("activation", "add", "multiply", "mask", "dropout", "data_movement")


@dataclass(frozen=True)
class Attention:
    """The names of its operations: ``scores`` is the product of q and k, ``mixed`` that of the softmax and v."""

    scores: str
    softmax: str
    mixed: str


@functools.lru_cache(maxsize=2)
def attentions(network: Network) -> dict[str, Attention]:
    """All of a network, by both of their products."""
    found: dict[str, Attention] = {}
    for op in network:
        if op.kind != "softmax":
            continue
        scores, mixed = list(_products_before(network, op)), list(_products_behind(network, op))
        if len(scores) == 1 and len(mixed) == 1:
            attention = Attention(scores[0], op.name, mixed[0])
            found |= dict.fromkeys((attention.scores, attention.mixed), attention)
    return found


def _products_before(network: Network, softmax: Op) -> Iterator[str]:
    """The products whose output a softmax reads, scaled, masked, or with a bias added."""
    seen, waiting = set[str](), list(softmax.inputs)
    while waiting:
        op = network[waiting.pop()]
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.kind == "matrix_product":
            yield op.name
        elif op.kind in _TO_SOFTMAX:
            waiting += op.inputs


def _products_behind(network: Network, softmax: Op) -> Iterator[str]:
    """The products whose first factor is a softmax's output."""
    waiting = [softmax.name]
    while waiting:
        tensor = waiting.pop()
        for reader in network.readers(tensor):
            if reader.kind == "matrix_product" and reader.inputs[0] == tensor:
                yield reader.name
            elif reader.kind in COMMUTING:
                waiting.append(reader.name)


class AttentionProduct(Rule):
    """Both products read INT8, so that TensorRT computes the attention in one kernel; or neither does.

    All four factors are quantized: q (scaled before), k (transposed before), the softmax, and v.
    """

    name = ATTENTION_PRODUCT
    sentence = (
        "the two products of an attention read INT8 where TensorRT fuses them: heads of 16, 32 or 64 values, of v as "
        "many as of q and k, 2 to 512 tokens, and nothing else reads the softmax"
    )
    source = GUIDE
    cost = "the attention is not fused, and its products run in float"

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8 or float for a product of an attention; None for any other operation."""
        if op.kind != "matrix_product" or (attention := attentions(state.network).get(op.name)) is None:
            return None
        if reason := self._obstacle(attention, state.network):
            return self.keep_float(reason)
        if op.name == attention.mixed and not state.is_quantized(state.network[attention.scores]):
            return self.keep_float("the product of q and k stays in float")
        return self.quantize(*dict.fromkeys(op.inputs))

    @staticmethod
    def _obstacle(attention: Attention, network: Network) -> str:
        """Which condition fails; '' if none does."""
        scores, mixed = network[attention.scores], network[attention.mixed]
        if len(scores.inputs) != 2 or len(mixed.inputs) != 2:
            return "a factor is constant"
        query, values = network[scores.inputs[0]].shape, network[mixed.inputs[1]].shape
        if not query or not values:
            return "the number of tokens is not known"
        tokens = max(query[-2], values[-2])
        for head in (query[-1], values[-1]):
            if head not in HEAD_SIZES:
                return f"heads of {head} values: 16, 32 and 64 are fused"
        if query[-1] != values[-1]:  # INT8 then only costs: benchmarks/gpu_detectors.txt
            return f"heads of {query[-1]} values in q and k, and of {values[-1]} in v: only equal ones are fused"
        if query[-2] < 2:
            return "one query: TensorRT multiplies vectors in float"
        if tokens > MOST_TOKENS:
            return f"{tokens} tokens: at most {MOST_TOKENS} are fused"
        tensor = attention.softmax
        while tensor != attention.mixed:
            readers = network.readers(tensor)
            if len(readers) != 1:
                return "something else reads the softmax too"
            tensor = readers[0].name
        return ""
