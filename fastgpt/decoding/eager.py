"""A decoding step's functions in PyTorch's ops, after the definitions in reference.py.

Each writes `out`: a step runs in memory that was allocated before it. The two other sets,
native.py's and kernels/decode.py's, have the same functions.
"""

import torch.nn.functional as F
from torch import Tensor

from fastgpt import reference

Norm = tuple[Tensor, Tensor | None]  # a LayerNorm's weight and bias


def embed(out: Tensor, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    """ids, positions (B,), wte (V, C), wpe (block_size, C) -> out (B, C)"""
    out.copy_(F.embedding(ids, wte)).add_(F.embedding(positions, wpe))


def linear(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None,
    residual: Tensor | None = None, approximate: str | None = None,
) -> None:  # fmt: skip
    """x (B, K), weight (N, K) -> out (B, N), which may be `residual`: reference.decode_linear."""
    out.copy_(reference.decode_linear(x, weight, bias, norm, residual, approximate))


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, longest: int,
    weight: Tensor, bias: Tensor | None,
) -> None:  # fmt: skip
    """out (R, C) += weight @ attention + bias: reference.decode_attention_ of qkv (R, 3C) and the
    cache keys, values (B, H, S, D), where no position is beyond `longest`.
    """
    seen = keys[:, :, : longest + 1], values[:, :, : longest + 1]
    y = reference.decode_attention_(*seen, qkv, positions)
    linear(out, y.to(out.dtype), weight, bias, residual=out)
