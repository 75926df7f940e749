"""Causal attention, forward (FlashAttention-2, arXiv 2307.08691).

    s = scale * q @ k.T, causal     lse = log(sum(exp(s)))     o = drop(exp(s - lse)) @ v

A program owns BLOCK_M queries of one head and walks the keys left to right with a running maximum
and sum; blocks left of the diagonal need no mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._attention import (
    LOG2E,
    head_and_block,
    kept_scores,
    load_rows,
    store_rows,
)
from fastgpt.kernels._launch import cdiv, dot_precision, launch, power_of_2
from fastgpt.kernels._tuned import configured


@triton.jit
def _forward_blocks(
    acc, total, top, q, k_ptr, v_ptr, seed_ptr, head, rows, first, last,
    stride_kt, stride_kd, stride_vt, stride_vd, T, scale, dropout_p,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold keys first..last into the running output, sum and maximum."""
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, cols, stride_kt, stride_kd, T, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if DIAGONAL:
            s = tl.where(rows[:, None] >= cols[None, :], s, float("-inf"))

        new_top = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        top = new_top
        if seed_ptr is not None:
            kept = kept_scores(tl.load(seed_ptr), head, rows[:, None], cols[None, :], dropout_p)
            p = tl.where(kept, p, 0.0)

        v = load_rows(v_ptr, cols, stride_vt, stride_vd, T, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, seed_ptr,  # in:  (B, H, T, D) each, (1,) int64 or None
    o_ptr, lse_ptr,                 # out: (B, H, T, D), (B, H, T) fp32
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    H, T, scale, dropout_p, keep_scale,
    PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, head, b, h = head_and_block(BLOCK_M, T, H)
    block = tl.cdiv(T, BLOCK_M) - 1 - block  # the longest rows first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, stride_qd, T, D, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    diagonal = block * BLOCK_M
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_ptr, v_ptr, seed_ptr, head, rows, 0, diagonal,
        stride_kt, stride_kd, stride_vt, stride_vd, T, scale, dropout_p,
        False, PRECISION, D, BLOCK_N, BLOCK_D)  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_ptr, v_ptr, seed_ptr, head, rows,
        diagonal, min(diagonal + BLOCK_M, T),
        stride_kt, stride_kd, stride_vt, stride_vd, T, scale, dropout_p,
        True, PRECISION, D, BLOCK_N, BLOCK_D)  # fmt: skip

    o = acc * (keep_scale / total)[:, None]
    store_rows(o_ptr + b * stride_ob + h * stride_oh, o, rows, stride_ot, stride_od, T, D, BLOCK_D)
    lse = top / LOG2E + tl.log(total)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < T)


def _config(D: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles by head dim; BLOCK_M is a multiple of BLOCK_N. In 16 bits, for D=64 and 128, the
    fastest tried on an H200 (bench/NOTES.md); the rest so that sm_90 code does not spill (`fastgpt
    inspect`).
    """
    block_d = max(16, power_of_2(D))
    if dtype != torch.float32 and block_d > 128:
        block_m, block_n, warps, stages = 64, 32, 8, 2
    elif dtype != torch.float32:  # odd heads are read one element at a time, for many registers
        block_m, warps = (128, 8) if block_d == 128 and D % 16 else (64, 4)
        block_n, stages = 64, 3
    elif block_d <= 128:
        block_m, block_n, warps, stages = 64, 32 if block_d <= 64 else 16, 8, 2
    else:
        block_m, block_n, warps, stages = 32, 16, 4, 2
    return dict(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps, num_stages=stages
    )


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, o: Tensor, lse: Tensor,
    scale: float, dropout_p: float,
) -> None:  # fmt: skip
    """q, k, v, o (B, H, T, D) any strides, lse (B, H, T) fp32 contiguous: writes o and lse."""
    B, H, T, D = q.shape
    config = configured(q, "attention_forward", _config, D, q.dtype)
    launch(
        _forward_kernel, B * H * cdiv(T, config["BLOCK_M"]), q, k, v, seed, o, lse,
        *q.stride(), *k.stride(), *v.stride(), *o.stride(),
        H, T, scale, dropout_p, keep_scale(dropout_p),
        PRECISION=dot_precision(q), D=D, **config)  # fmt: skip


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the scores it keeps by; 0 where it keeps none."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
