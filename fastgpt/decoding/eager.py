"""A decoding step's functions in PyTorch's ops, after the definitions in reference.py.

Each writes `out`: a step runs in memory that was allocated before it. The two other sets,
step_in_c.py's and kernels/decode.py's, have the same functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import reference

Norm = tuple[Tensor, Tensor | None]  # a LayerNorm's weight and bias
Weight = Tensor | tuple[Tensor, Tensor]  # or int8 values and their rows' scales


def embed(out: Tensor, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    """ids, positions (B,), wte (V, C), wpe (block_size, C) -> out (B, C)"""
    out.copy_(F.embedding(ids, wte)).add_(F.embedding(positions, wpe))


def linear(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None = None,
    residual: Tensor | None = None, approximate: str | None = None,
) -> None:  # fmt: skip
    """x (B, K), weight (N, K) -> out (B, N), which may be `residual`: reference.decode_linear."""
    if isinstance(weight, Tensor) or not has_int8(x):
        out.copy_(reference.decode_linear(x, weight, bias, norm, residual, approximate))
        return
    normed = x if norm is None else reference.layer_norm(x, *norm)
    y = int8_linear(normed, *weight)
    y = y if bias is None else y + bias
    y = y if approximate is None else F.gelu(y, approximate=approximate)
    out.copy_(y if residual is None else residual + y)


def has_int8(x: Tensor) -> bool:
    """Whether this PyTorch has a kernel for int8 weights and such rows: it reads past the end of
    others (2.13, with a crash).
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    available = has_kernel("aten::_weight_int8pack_mm", x.device.type.upper())
    return available and x.shape[1] % 32 == 0


def int8_linear(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """In PyTorch's kernel; in bfloat16, the one dtype of x in which it is fast."""
    low = torch.bfloat16
    return torch._weight_int8pack_mm(x.to(low), values, scales.to(low)).to(x.dtype)


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bucket: int,
    weight: Weight, bias: Tensor | None,
) -> None:  # fmt: skip
    """out (R, C) += weight @ attention + bias: reference.decode_attention_ of qkv (R, 3C) and the
    cache keys, values (B, H, S, D), where all positions are below `bucket`.
    """
    seen = keys[:, :, :bucket], values[:, :, :bucket]
    y = reference.decode_attention_(*seen, qkv, positions)
    linear(out, y.to(out.dtype), weight, bias, residual=out)


def advance(positions: Tensor, last: Tensor) -> None:
    """positions (B,) += 1, up to `last` (B,)"""
    torch.minimum(positions.add_(1), last, out=positions)
