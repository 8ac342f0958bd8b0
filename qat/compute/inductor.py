"""The backend of torch.compile that training uses: inductor, told what a backward pass writes to memory.

A GPU's pointwise kernels take as long as the memory that they read and write. inductor has every kernel compute anew
what it reads, as long as that is computed from few tensors, among which it counts vectors of channels like activations.
That is wrong twice in a residual network:

- The gradient of a residual sum has three readers: the two kernels of the normalization before it, and the gradient of
  the sum before that. Each would read the masks and gradients of several blocks. ``write_shared`` has it written.
- The mask of a quantizer behind a normalization is computed from one activation, four vectors and a range, by more
  operations than inductor repeats. Its readers read that activation anyway: it is not written (``_JOINED``).
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

_FROM = 3  # tensors; to write one and read it in their place pays where two or more kernels do
_LARGE = 2**20  # elements; what is smaller stays in the GPU's cache
_JOINED = {"realize_reads_threshold": 8, "realize_opcount_threshold": 60}  # tensors, operations
_WRITTEN = "inductor_realize_to_strides"  # in a node's meta: inductor writes it, laid out as it is


def training_backend(network: fx.GraphModule, inputs: Any, graphs: bool) -> Any:
    """The backend "inductor", with CUDA graphs or without, for a training step."""
    import torch._inductor.compile_fx as inductor  # takes a second

    # The keys of inductor's caches know nothing of what this module changes.
    keys: Any = torch.compiler.config
    tag = f"{keys.cache_key_tag} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    tagged = partial(keys.patch, cache_key_tag=tag)

    def compile_pass(graph: fx.GraphModule, inputs: Any, **about: Any) -> Any:
        backward = about.get("is_backward", False)
        if backward:
            write_shared(graph)
        with tagged(), torch._inductor.config.patch(_JOINED if backward else {}):
            return inductor.compile_fx_inner(graph, inputs, **about)

    # Where it compiles the backward pass, which is later, these still hold; a context around it would not.
    recorded = {"triton.cudagraphs": graphs}
    with tagged():
        return inductor.compile_fx(network, inputs, inner_compile=compile_pass, config_patches=recorded)


def write_shared(graph: fx.GraphModule) -> list[fx.Node]:
    """Has inductor write to memory what several kernels of ``graph`` would each compute from several large tensors.

    Returns the nodes: results of pointwise operations with more than one reader.
    """
    written = []
    reads: dict[fx.Node, set[fx.Node]] = {}  # in memory and of a node's own size: what it is computed from
    for node in graph.graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        if _in_memory(node):
            reads[node] = {node}
            continue
        elements = _elements(node)
        alike = [reads[source] for source in node.all_input_nodes if _elements(source) == elements > 0]
        reads[node] = set().union(*alike)
        if len(node.users) > 1 and len(reads[node]) >= _FROM and elements >= _LARGE:
            narrow = _narrow_input(node)
            narrow.meta[_WRITTEN] = True
            written.append(narrow)
            reads[node] = {narrow}
    return written


def _in_memory(node: fx.Node) -> bool:
    """Whether it is read from memory, marked or not: no kernel computes it in passing, or it is a slice of more."""
    if not _is_pointwise(node) or not all(_is_pointwise(user) or _is_reduction(user) for user in node.users):
        return True
    return any(_elements(source) > _elements(node) for source in node.all_input_nodes)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether inductor can compute it in its readers: a view, or an operation element by element."""
    operation = node.target
    return isinstance(operation, torch._ops.OpOverload) and (operation.is_view or torch.Tag.pointwise in operation.tags)


def _is_reduction(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.reduction in node.target.tags


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _narrow_input(node: fx.Node) -> fx.Node:
    """Its input, where ``node`` only makes a wider type of it."""
    source = node.all_input_nodes[0]
    widens = node.target == torch.ops.prims.convert_element_type.default
    return source if widens and source.meta["val"].itemsize < node.meta["val"].itemsize else node
