"""Attention as single operations, so that its projections and products can be quantized, and as one again.

Both of PyTorch's functions are traced as what they compute: multi_head_attention_forward with its projections, and
scaled_dot_product_attention. The latter is put back together where its products stay in float, because PyTorch has fast
kernels for it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qat.base.errors import UserError
from qat.graph.fx_network import function_name, kind_of

_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm")
_PERMUTATIONS = ("transpose", "swapaxes", "permute", "movedim")
FUSED = "scaled_dot_product_attention"
"""``meta`` of a product that was the end of such a function."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """torch.nn.functional.multi_head_attention_forward, whose arguments these are: (output [L, N, E], weights).

    Raises UserError for additional keys (bias_k, add_zero_attn) and padding masks.
    """
    extra = [bias_k, bias_v, static_k, static_v, key_padding_mask]
    if add_zero_attn or any(one is not None for one in extra):
        raise UserError("attention with a padding mask, add_bias_kv or add_zero_attn is not supported: leave these out")
    if use_separate_proj_weight:
        matrices = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        given = zip((query, key, value), matrices, biases, strict=True)
        q, k, v = (F.linear(x, weight, bias) for x, weight, bias in given)
    elif query is key and key is value:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        given = zip((query, key, value), in_proj_weight.chunk(3), biases, strict=True)
        q, k, v = (F.linear(x, weight, bias) for x, weight, bias in given)
    length, batch, width = q.shape
    q, k, v = (x.reshape(x.shape[0], batch, num_heads, width // num_heads).permute(1, 2, 0, 3) for x in (q, k, v))
    dropout = dropout_p if training else 0.0
    weights: Any = None
    if not need_weights:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    else:
        scores = (q * (width // num_heads) ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    joined = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
    return F.linear(joined, out_proj_weight, out_proj_bias), weights


def attention_of_products(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch.nn.functional.scaled_dot_product_attention, whose arguments these are, of operators that TensorRT parses.

    query, key, value: [N, heads, length, width]. What scales and transposes comes before the products, so that codes of
    their factors can be multiplied. Raises UserError for grouped queries.
    """
    if enable_gqa:
        raise UserError("attention with grouped queries (enable_gqa) is not supported: repeat its keys and values")
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


def fuse_attention(traced: fx.GraphModule, products: Collection[str]) -> None:
    """Makes attentions one operation again, except of those that end with one of ``products``, names of nodes.

    One with a mask of bools or with dropout stays as it was traced, and so does one whose insides something else reads.
    """
    for mixed in list(traced.graph.nodes):
        if not mixed.meta.get(FUSED) or mixed.name in products:
            continue
        weights, value = mixed.args
        scores = weights.args[0] if weights.target == "softmax" else None
        if scores is None:
            continue
        product, mask = scores, None
        if scores.target is operator.add:
            product, mask = scores.args
        if product.target is not operator.matmul:
            continue
        scaled, transposed = product.args
        inside = [weights, scores, product, scaled, transposed]
        if any(len(node.users) != 1 for node in inside):
            continue
        (query, factor), key = scaled.args, transposed.args[0]
        with traced.graph.inserting_before(mixed):
            fused = traced.graph.call_function(
                F.scaled_dot_product_attention, (query, key, value), {"attn_mask": mask, "scale": factor}
            )
        fused.meta = dict(mixed.meta)
        mixed.replace_all_uses_with(fused)
        for node in dict.fromkeys([mixed, *inside]):
            traced.graph.erase_node(node)


def _goes_to_softmax(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a softmax reads what comes of ``node``, and no layer or product before."""
    waiting, seen = [node], {node}
    while waiting:
        for reader in waiting.pop().users:
            name = getattr(reader.target, "__name__", str(reader.target))
            layer = traced.get_submodule(str(reader.target)) if reader.op == "call_module" else None
            if name == "softmax" or isinstance(layer, torch.nn.Softmax):
                return True
            if layer is None and reader.target not in _PRODUCTS and reader.op != "output" and reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return False


def scale_before_product(traced: fx.GraphModule) -> None:
    """Multiplies the first factor of a product of two tensors by the number that its result is multiplied by.

    So attentions have one form, in which their factors can be quantized: (s * q) @ k instead of s * (q @ k).
    """
    for node in list(traced.graph.nodes):
        times = node.target in (operator.mul, torch.mul, "mul")
        by = node.target in (operator.truediv, torch.div, "div")
        if not (times or by) or len(node.args) != 2:
            continue
        product, factor = node.args
        if node.kwargs or not _goes_to_softmax(node, traced):
            continue
        if times and isinstance(product, (int, float)):
            product, factor = factor, product
        if not isinstance(factor, (int, float)) or not factor:
            continue
        if not isinstance(product, fx.Node) or product.target not in _PRODUCTS:
            continue
        if len(product.users) != 1 or len(product.all_input_nodes) != 2:
            continue
        first = product.args[0]
        if not isinstance(first, fx.Node) or not first.meta.get("tensor"):
            continue
        with traced.graph.inserting_before(product):
            scaled = traced.graph.call_function(operator.mul, (first, factor if times else 1 / factor))
        scaled.meta = dict(node.meta)
        product.args = (scaled, *product.args[1:])
        node.replace_all_uses_with(product)
        traced.graph.erase_node(node)


def softmax_before_values(traced: fx.GraphModule) -> None:
    """Makes the softmax of an attention the first factor: (softmax @ v^T)^T instead of v @ softmax^T.

    Both are the same sums of the same products, and the rules know the first. A softmax that is not transposed and
    products without one stay as they are.
    """
    modules = dict(traced.named_modules())
    for product in list(traced.graph.nodes):
        if product.target not in _PRODUCTS or len(product.args) != 2 or product.kwargs:
            continue
        values, turned = product.args
        matrices = all(isinstance(one, fx.Node) and one.meta.get("rank", 0) > 1 for one in (values, turned))
        if not matrices or not _swaps_last_axes(turned) or not _is_softmax(turned.args[0], modules):
            continue
        before = list(product.users)
        with traced.graph.inserting_before(product):
            swapped = values.args[0] if _swaps_last_axes(values) else _swapped(values, traced)
        product.args = (turned.args[0], swapped)
        with traced.graph.inserting_after(product):
            behind = _swapped(product, traced)
        with traced.graph.inserting_after(behind):  # a view of it may follow
            result = traced.graph.call_method("contiguous", (behind,))
        result.meta = dict(product.meta)
        for reader in before:
            if _swaps_last_axes(reader):
                reader.replace_all_uses_with(product)
                traced.graph.erase_node(reader)
            else:
                reader.replace_input_with(product, result)
        for unread in (result, behind, turned, values):
            if not unread.users:
                traced.graph.erase_node(unread)


def _swapped(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    made = traced.graph.call_method("transpose", (node, -2, -1))
    made.meta = dict(node.meta)
    return made


def _swaps_last_axes(node: fx.Node) -> bool:
    """Whether ``node`` transposes the matrices of a tensor, however that is written."""
    rank, name = node.meta.get("rank", 0), function_name(node)
    if rank < 2 or len(node.all_input_nodes) != 1:
        return False
    if name == "getattr":
        return bool(node.args[1] == "mT")
    if name not in _PERMUTATIONS:
        return False
    given = torch.empty(tuple(range(rank)), device="meta")  # no two axes are alike
    called = getattr(torch.Tensor, name)
    made: torch.Tensor = called(given, *node.args[1:], **node.kwargs)
    return tuple(made.shape) == tuple(given.mT.shape)


def _is_softmax(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether ``node`` is a softmax over the last axis, with dropout or without."""
    while kind_of(node, modules) == "dropout":
        node = node.all_input_nodes[0]
    return kind_of(node, modules) == "softmax"
