"""Questions of the rules about a network's structure: which operations fuse into a layer, which products are gates."""

from __future__ import annotations

import functools
from collections.abc import Callable

from qat.graph.network import Network, Op
from qat.graph.operations import ACTIVATIONS, WEIGHTED


def fusing_convolution(network: Network, tensor: str, quantized: set[str]) -> str | None:
    """The INT8 convolution that makes ``tensor`` in the engine, with at most batch normalization between; else None.

    Not a transposed one: TensorRT's list of fusions has none into it.
    """
    op = network[tensor]
    while len(network.readers(op.name)) == 1:
        if op.kind in WEIGHTED:
            return op.name if op.name in quantized and op.kind != "transposed_convolution" else None
        if op.kind not in ("batch_norm", "dropout"):
            return None
        op = network[op.inputs[0]]
    return None


def broadcasts(network: Network, op: Op) -> bool:
    """Whether the inputs of ``op`` are known to differ in shape."""
    shapes = {network[tensor].shape for tensor in op.inputs}
    return len(shapes) > 1 and None not in shapes


def stands_alone(network: Network, op: Op) -> bool:
    """Whether ``op`` is a batch normalization that does not fold into a convolution or linear layer."""
    if op.kind != "batch_norm":
        return False
    made = network[op.inputs[0]]
    while made.kind == "dropout" and len(network.readers(made.name)) == 1:  # dropout is not exported
        made = network[made.inputs[0]]
    return made.kind not in WEIGHTED or len(network.readers(made.name)) > 1


@functools.lru_cache(maxsize=2)
def gate_products(network: Network) -> set[str]:
    """The products of a tensor and a function of its own global pool, as in squeeze-and-excitation."""
    found = set()
    for op in network:
        if op.kind == "multiply" and len(set(op.inputs)) == 2:
            for value, gate in (op.inputs, op.inputs[::-1]):
                before = network.ancestors(value)
                between = [network[name] for name in network.ancestors(gate) - before]
                if any(made.kind == "global_pool" and made.inputs[0] in before for made in between):
                    found.add(op.name)
    return found


def written_by(network: Network, layer: Op, takes_in: Callable[[Op, str], bool]) -> str:
    """The tensor that the engine's kernel of the convolution ``layer`` writes, after all that fuses into the kernel.

    ``takes_in`` says whether an operation, the only reader of a tensor, fuses into the convolution that made it.
    """
    tensor = layer.name
    while True:
        readers = network.readers(tensor)
        following = readers[-1] if readers else layer
        fuses = len(readers) == 1 and takes_in(following, tensor)
        if not fuses and not (len(readers) == 2 and _is_swish(network, tensor, following)):
            return tensor
        tensor = following.name


def _is_swish(network: Network, tensor: str, product: Op) -> bool:
    """Whether ``product`` is ``tensor`` times an activation of ``tensor``."""
    others = [name for name in product.inputs if name != tensor]
    return (
        product.kind == "multiply"
        and len(others) == 1
        and network[others[0]].inputs == (tensor,)
        and network[others[0]].kind in ACTIVATIONS
    )
