"""Causal attention without the (T, T) matrix in memory: the public ops on the forward and backward
kernels.

Everything is addressed by strides, so q, k, v may be views into one (B, T, 3C) projection and their
gradients views into another. A head dim that is no power of two is padded in registers only.
Outputs lie in memory as (B, T, H, D), which is what the next projection reads.

Dropout keeps score (b, h, row, col) by a Philox draw from (seed, b*H + h, row, col): the backward
draws the same mask again, whatever its block sizes, and `dropout_mask` writes it out. The seed is
drawn on the device from PyTorch's generator, so manual_seed and a checkpoint's recompute replay it
without a host wait.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._attention import head_and_block, kept_scores
from fastgpt.kernels._autograd import differentiable_once
from fastgpt.kernels._launch import cdiv, device_problem, launch, register
from fastgpt.kernels.attention_backward import launch_backward
from fastgpt.kernels.attention_forward import launch_forward

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


@triton.jit
def _mask_kernel(
    seed_ptr, mask_ptr,  # in: (1,) int64; out: (heads, T, T) bool
    T, dropout_p,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block, head, _, _ = head_and_block(BLOCK, T, 1)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    row_ptrs = mask_ptr + (head.to(tl.int64) * T + rows)[:, None] * T
    for start in range(0, T, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        kept = kept_scores(tl.load(seed_ptr), head, rows[:, None], cols[None, :], dropout_p)
        tl.store(row_ptrs + cols[None, :], kept, mask=(rows < T)[:, None] & (cols < T)[None, :])


def _split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> q, k, v as (B, H, T, D) views."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D) view."""
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)


def _empty_heads(B: int, H: int, T: int, D: int, like: Tensor) -> Tensor:
    """(B, H, T, D), lying in memory as (B, T, H, D)."""
    return torch.empty(B, T, H, D, device=like.device, dtype=like.dtype).transpose(1, 2)


def _empty_lse(B: int, H: int, T: int, like: Tensor) -> Tensor:
    return torch.empty(B, H, T, device=like.device, dtype=torch.float32)


def _outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    return _empty_heads(B, H, T, D, q), _empty_lse(B, H, T, q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, T, D) -> o (B, H, T, D), lse (B, H, T) fp32."""
    o, lse = _outputs(q)
    launch_forward(q, k, v, seed, o, lse, scale, dropout_p)
    return o, lse


def _gradients(do: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty_heads(*q.shape, like=q) for _ in range(3))
    return dq, dk, dv


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, dv (B, H, T, D)."""
    dq, dk, dv = _gradients(do, q)
    launch_backward(do, q, k, v, o, lse, seed, dq, dk, dv, scale, dropout_p)
    return dq, dk, dv


def _packed_outputs(qkv: Tensor, n_head: int, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    y = torch.empty(B, T, C3 // 3, device=qkv.device, dtype=qkv.dtype)
    return y, _empty_lse(B, n_head, T, qkv)


def packed_forward(
    qkv: Tensor, n_head: int, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, H, T) fp32."""
    y, lse = _packed_outputs(qkv, n_head)
    q, k, v = _split_heads(qkv, n_head)
    o = _heads(y, n_head)
    launch_forward(q, k, v, seed, o, lse, q.shape[-1] ** -0.5, dropout_p)
    return y, lse


def _packed_gradient(dy: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)


def packed_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, seed: Tensor | None,
    n_head: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    """-> dqkv (B, T, 3C): the kernels write dq, dk and dv straight into it."""
    dqkv = _packed_gradient(dy, qkv)
    q, k, v = _split_heads(qkv, n_head)
    do, o = _heads(dy, n_head), _heads(y, n_head)
    scale = q.shape[-1] ** -0.5
    launch_backward(do, q, k, v, o, lse, seed, *_split_heads(dqkv, n_head), scale, dropout_p)
    return dqkv


def _seed(dropout_p: float, like: Tensor) -> Tensor | None:
    """A draw from the device's generator, or None without dropout, which must not consume one."""
    return torch.randint(2**62, (1,), device=like.device) if dropout_p > 0 else None


def seeded_forward(qkv: Tensor, n_head: int, dropout_p: float) -> tuple[Tensor, tuple]:
    """packed_forward with a seed of its own -> y, what seeded_backward needs besides."""
    run = registered_packed_forward if torch.compiler.is_compiling() else packed_forward
    seed = _seed(dropout_p, qkv)
    y, lse = run(qkv, n_head, seed, dropout_p)
    return y, (lse, seed)


def seeded_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, state: tuple, n_head: int, dropout_p: float
) -> Tensor:
    run = registered_packed_backward if torch.compiler.is_compiling() else packed_backward
    lse, seed = state
    return run(dy, qkv, y, lse, seed, n_head, dropout_p)


def dropout_mask(seed: Tensor, B: int, H: int, T: int, dropout_p: float) -> Tensor:
    """The (B, H, T, T) bool mask of the scores that attention with this seed (1,) int64 keeps."""
    mask = torch.empty(B, H, T, T, device=seed.device, dtype=torch.bool)
    launch(_mask_kernel, B * H * cdiv(T, 64), seed, mask, T, dropout_p, BLOCK=64)
    return mask


registered_forward = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? seed, float scale, float dropout_p)"
    " -> (Tensor, Tensor)", forward, _outputs)  # fmt: skip
registered_backward = register(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    " Tensor? seed, float scale, float dropout_p) -> (Tensor, Tensor, Tensor)",
    backward, _gradients)  # fmt: skip
registered_packed_forward = register(
    "packed_attention_forward(Tensor qkv, int n_head, Tensor? seed, float dropout_p)"
    " -> (Tensor, Tensor)", packed_forward, _packed_outputs)  # fmt: skip
registered_packed_backward = register(
    "packed_attention_backward(Tensor dy, Tensor qkv, Tensor y, Tensor lse, Tensor? seed,"
    " int n_head, float dropout_p) -> Tensor", packed_backward, _packed_gradient)  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seed, scale, dropout_p):
        o, lse = registered_forward(q, k, v, seed, scale, dropout_p)
        ctx.save_for_backward(q, k, v, o, lse, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return o

    @staticmethod
    def backward(ctx, do):
        differentiable_once()
        q, k, v, o, lse, seed = ctx.saved_tensors
        dq, dk, dv = registered_backward(do, q, k, v, o, lse, seed, ctx.scale, ctx.dropout_p)
        return dq, dk, dv, None, None, None


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, seed, dropout_p):
        y, lse = registered_packed_forward(qkv, n_head, seed, dropout_p)
        ctx.save_for_backward(qkv, y, lse, seed)
        ctx.n_head, ctx.dropout_p = n_head, dropout_p
        return y

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        qkv, y, lse, seed = ctx.saved_tensors
        dqkv = registered_packed_backward(dy, qkv, y, lse, seed, ctx.n_head, ctx.dropout_p)
        return dqkv, None, None, None


def unsupported(tensors: tuple[Tensor, ...], head_dim: int, dropout_p: float) -> str | None:
    """Why these kernels cannot take such heads where the tensors live, or None."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head dim {head_dim} is not within {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if any(t.dtype != tensors[0].dtype or t.shape != tensors[0].shape for t in tensors):
        return "q, k and v differ in dtype or shape"
    return device_problem(tensors[0])


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, _seed(dropout_p, q), scale, dropout_p)


def packed_causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    return _PackedAttention.apply(qkv, n_head, _seed(dropout_p, qkv), dropout_p)
