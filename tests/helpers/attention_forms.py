"""One attention, spelt in the ways in which people write it: [N, 3, 64, 64] -> [N, 10]."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD, HEADS = 32, 2
FORMS = ("three", "chunk", "index", "unbind", "bmm", "late", "divided", "fused", "bias", "mask", "causal", "module")


class Attention(nn.Module):
    """A patch embedding of ``tokens`` squared, a LayerNorm, an attention with a residual sum, and a head.

    Args:
        form: one of ``FORMS``, or "cross", "class" or "read", whose softmax something else reads, too.
        head: the width of a head.
        tokens: in height and width.
        dropout: of the softmax.
    """

    def __init__(self, form: str = "fused", head: int = HEAD, tokens: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.form, self.head, self.dropout = form, head, dropout
        width = head * HEADS
        self.embed, self.norm = nn.Conv2d(3, width, 64 // tokens, 64 // tokens), nn.LayerNorm(width)
        if form == "module":
            self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        elif form in ("chunk", "index", "unbind", "bmm"):
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        if form == "bias":
            self.bias = nn.Parameter(torch.randn(HEADS, tokens**2, tokens**2))
        self.project, self.classify = nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(images).flatten(2).transpose(1, 2)
        y = self.norm(x)
        queries = {"cross": 3, "class": 1}.get(self.form, y.shape[1])
        mixed = self.attention(y, y, y, need_weights=False)[0] if self.form == "module" else self._mix(y, queries)
        return self.classify((x[:, :queries] + self.project(mixed)).mean(1))

    def _mix(self, y: Tensor, queries: int) -> Tensor:
        batch, tokens, width = y.shape
        q, k, v = self._factors(y, queries)
        scale, dropout = self.head**-0.5, self.dropout if self.training else 0.0
        if self.form == "bmm":
            weights = torch.bmm(q * scale, k.transpose(1, 2)).softmax(-1)
            mixed = torch.bmm(weights, v).view(batch, HEADS, tokens, self.head)
        elif self.form in ("three", "index", "unbind", "late", "divided", "read"):
            if self.form == "late":
                scores = (q @ k.transpose(-2, -1)) * scale
            elif self.form == "divided":
                scores = torch.matmul(q, k.mT) / math.sqrt(self.head)
            else:
                scores = (q * scale) @ k.transpose(-1, -2)
            weights = F.softmax(scores, dim=-1)
            mixed = weights @ v
            if self.form == "read":
                mixed = mixed + weights.mean()
        else:
            mask = self.bias if self.form == "bias" else None
            if self.form == "mask":
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=y.device).tril(2)
            causal = self.form == "causal"
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return mixed.transpose(1, 2).reshape(batch, queries, width)

    def _factors(self, y: Tensor, queries: int) -> Iterable[Tensor]:
        batch, tokens, _ = y.shape
        if self.form == "chunk":
            return [part.view(batch, tokens, HEADS, self.head).transpose(1, 2) for part in self.qkv(y).chunk(3, -1)]
        if self.form in ("index", "unbind", "bmm"):
            parts = self.qkv(y).reshape(batch, tokens, 3, HEADS, self.head).permute(2, 0, 3, 1, 4)
            if self.form == "bmm":
                parts = parts.flatten(1, 2)
            return parts.unbind(0) if self.form == "unbind" else (parts[0], parts[1], parts[2])
        made = (self.q(y[:, :queries]), self.k(y), self.v(y))
        return [one.view(batch, -1, HEADS, self.head).transpose(1, 2) for one in made]


class Odd(nn.Module):
    """What a part of may look like one of ``Attention``: [N, 16, 64] -> [N, 16, 64] or less.

    Args:
        form: "flat", whose layer has the images' rows in one axis; "windows", with two windows an image and a mask for
            each; "half", in half precision; "heads", with a softmax over the heads; "behind", scaled after the second
            product; "similarity", a product that is the answer.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv, self.out = form, nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("bias", torch.randn(2, 16, 16))
        self.register_buffer("mask", torch.randn(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """The answer."""
        batch, tokens, width = x.shape
        if self.form == "similarity":
            y = self.out(x)
            return (y @ y.transpose(1, 2)) * 0.25
        if self.form == "windows":
            parts = self.qkv(x.reshape(batch * 2, 8, width)).reshape(batch, 2, 8, 3, 2, 32).permute(3, 0, 1, 4, 2, 5)
            q, k, v = parts.unbind(0)
            weights = ((q * 0.2) @ k.transpose(-2, -1) + self.mask).softmax(-1)
            return self.out((weights @ v).permute(0, 1, 3, 2, 4).reshape(batch, tokens, width))
        rows = self.qkv(x.reshape(-1, width) if self.form == "flat" else x)
        q, k, v = rows.reshape(batch, tokens, 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "half":
            mixed = F.scaled_dot_product_attention(q.half(), k.half(), v.half()).float()
        elif self.form == "heads":
            mixed = ((q * 0.2) @ k.mT).softmax(1) @ v
        elif self.form == "behind":
            mixed = F.scaled_dot_product_attention(q, k, v) * 0.5
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, self.bias)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
