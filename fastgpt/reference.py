"""Every op in plain PyTorch: the definition, the path without a GPU, and the oracle of the tests.

The functions here are what the rest of the project is held to. They are as short as PyTorch allows,
they work in float64 (where the tests take their truth from), and they are what runs when no kernel
may.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    delta: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = residual + delta
    return layer_norm(total, weight, bias, eps), total


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none"
) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "none",
) -> Tensor:
    return F.linear(linear_gelu(x, fc_weight, fc_bias, approximate), proj_weight, proj_bias)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    if q.numel() == 0:  # nothing comes out; PyTorch 2.11's SDPA divides by the number of heads
        return (q @ k.transpose(-2, -1)) @ v
    # nanoGPT's call, argument for argument: what a script assigns to this name may take no other
    options: dict[str, Any] = dict(attn_mask=None, dropout_p=dropout_p, is_causal=True)
    if scale is not None:
        options["scale"] = scale
    return F.scaled_dot_product_attention(q, k, v, **options)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> q, k, v, each a (B, H, T, D) view into it: no copy."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)
    return q, k, v


def packed_causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    B, T, C3 = qkv.shape
    y = causal_attention(*split_heads(qkv, n_head), dropout_p)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    at_least_fp32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(at_least_fp32, targets, ignore_index=ignore_index)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1
) -> Tensor:
    return cross_entropy(F.linear(x, weight), targets, ignore_index)


def decode_linear(
    x: Tensor,
    weight: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
    approximate: str | None = None,
) -> Tensor:
    """[residual +] [gelu] ([norm](x) @ weight.T + bias) for few rows: x (B, K), weight (N, K).

    The product is in weight's dtype, all else in x's. A weight may be int8 values (N, K) and the
    scales (N,) of their rows.
    """
    normed = x if norm is None else layer_norm(x, *norm)
    if isinstance(weight, tuple):
        values, scales = weight
        y = F.linear(normed, values.to(x.dtype)) * scales.to(x.dtype)
        y = y if bias is None else y + bias
    else:
        low = None if bias is None else bias.to(weight.dtype)
        y = F.linear(normed.to(weight.dtype), weight, low).to(x.dtype)
    y = y if approximate is None else F.gelu(y, approximate=approximate)
    return y if residual is None else residual + y


def decode_attention_(keys: Tensor, values: Tensor, qkv: Tensor, positions: Tensor) -> Tensor:
    """Attention of new tokens, whose keys and values are written into the cache first: of R // B
    one after the other in each of its B texts.

    keys, values (B, H, S, D), qkv (R, 3 H D), positions (R,) below S -> (R, H D). Row r attends to
    its text's cache up to positions[r]; what lies behind all of them is not read.
    """
    (B, H, S, D), R = keys.shape, qkv.shape[0]
    q, k, v = split_heads(qkv[:, None].to(keys.dtype), H)
    text, at = torch.arange(R, device=keys.device) // (R // B), positions.long()
    keys[text, :, at], values[text, :, at] = k[:, :, 0], v[:, :, 0]
    if R != B:
        keys, values = keys[text], values[text]
    unseen = torch.arange(S, device=keys.device) > at[:, None]  # (R, S)
    scores = (q @ keys.transpose(-2, -1)).to(torch.promote_types(keys.dtype, torch.float32))
    scores = (scores * D**-0.5).masked_fill(unseen[:, None, None, :], float("-inf"))
    seen_values = values.masked_fill(unseen[:, None, :, None], 0)  # 0 * NaN is NaN
    return (F.softmax(scores, dim=-1).to(keys.dtype) @ seen_values).flatten(1)
