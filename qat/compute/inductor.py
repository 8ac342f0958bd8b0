"""The backend of torch.compile for training: inductor, with better choices of what a backward pass writes to memory.

The time of a pointwise GPU kernel is the time to read and write its memory. inductor either writes an intermediate
tensor, or lets every kernel that reads it compute it again. It computes it again if that takes few input tensors, and
it counts a vector of channels like an activation. In a residual network this is wrong twice:

- The gradient of a residual sum has three readers: the two kernels of the normalization before it, and the gradient of
  the previous sum. Each would read the masks and gradients of several blocks. ``write_shared`` makes inductor write it.
- The mask of a quantizer after a normalization is computed from one activation, four vectors and a range, by more
  operations than inductor repeats. Its readers read that activation anyway, so ``_JOINED`` keeps inductor from writing
  the mask.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

_FROM = 3  # tensors; writing one and reading it instead of these pays if two or more kernels read it
_LARGE = 2**20  # elements; smaller tensors stay in the GPU's cache
_JOINED = {"realize_reads_threshold": 8, "realize_opcount_threshold": 60}  # tensors, operations
_WRITTEN = "inductor_realize_to_strides"  # key in a node's meta: inductor writes the tensor, in its layout


def training_backend(network: fx.GraphModule, inputs: Any, graphs: bool) -> Any:
    """The backend "inductor" for a training step, with CUDA graphs or without."""
    import torch._inductor.compile_fx as inductor  # takes a second

    # Without this tag, the keys of inductor's caches would not depend on the changes made here.
    keys: Any = torch.compiler.config
    tag = f"{keys.cache_key_tag} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    tagged = partial(keys.patch, cache_key_tag=tag)

    def compile_pass(graph: fx.GraphModule, inputs: Any, **about: Any) -> Any:
        backward = about.get("is_backward", False)
        if backward:
            write_shared(graph)
        with tagged(), torch._inductor.config.patch(_JOINED if backward else {}):
            return inductor.compile_fx_inner(graph, inputs, **about)

    # The backward pass is compiled later: these settings still hold then, but a context around this call would not.
    recorded = {"triton.cudagraphs": graphs}
    with tagged():
        return inductor.compile_fx(network, inputs, inner_compile=compile_pass, config_patches=recorded)


def write_shared(graph: fx.GraphModule) -> list[fx.Node]:
    """Makes inductor write the tensors that several kernels of ``graph`` would each compute from several large tensors.

    Returns the marked nodes, which are results of pointwise operations with more than one reader.
    """
    written = []
    reads: dict[fx.Node, set[fx.Node]] = {}  # the tensors in memory, of the node's size, from which it is computed
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
    """Whether ``node`` is read from memory in any case: no kernel computes it on the fly, or it is a slice."""
    if not _is_pointwise(node) or not all(_is_pointwise(user) or _is_reduction(user) for user in node.users):
        return True
    return any(_elements(source) > _elements(node) for source in node.all_input_nodes)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether inductor can compute ``node`` inside its readers: a view or an elementwise operation."""
    operation = node.target
    return isinstance(operation, torch._ops.OpOverload) and (operation.is_view or torch.Tag.pointwise in operation.tags)


def _is_reduction(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.reduction in node.target.tags


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _narrow_input(node: fx.Node) -> fx.Node:
    """The input of ``node`` if ``node`` only converts it to a wider type; else ``node``."""
    source = node.all_input_nodes[0]
    widens = node.target == torch.ops.prims.convert_element_type.default
    return source if widens and source.meta["val"].itemsize < node.meta["val"].itemsize else node
