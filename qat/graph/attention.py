"""Multi-head attention of torch.nn as single operations, so that its projections and products can be quantized."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from qat.base.errors import UserError


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
