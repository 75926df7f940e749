"""Causal attention, backward.

    delta = rowsum(do * o)          dp = drop(do @ v.T)         ds = p * (dp - delta)
    dv = drop(p).T @ do             dk = scale * ds.T @ q       dq = scale * ds @ k

One kernel owns queries, leaves their delta, and walks the keys left of them for dq; then another
owns keys and walks the queries below them for dk and dv. The scores are computed twice instead of
adding dq with atomics, so gradients are bitwise reproducible.
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
from fastgpt.kernels.attention_forward import keep_scale


@triton.jit
def _dq_blocks(
    dq, q, do, lse, delta, k_ptr, v_ptr, seed_ptr, head, rows, first, last,
    stride_kt, stride_kd, stride_vt, stride_vd, T, scale, dropout_p, keep_scale,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the share of keys first..last."""
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, cols, stride_kt, stride_kd, T, D, BLOCK_D)
        v = load_rows(v_ptr, cols, stride_vt, stride_vd, T, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(s - lse[:, None] * LOG2E)
        if DIAGONAL:
            p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if seed_ptr is not None:
            kept = kept_scores(tl.load(seed_ptr), head, rows[:, None], cols[None, :], dropout_p)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, lse_ptr, seed_ptr,  # in:  (B, H, T, D), lse (B, H, T)
    delta_ptr, dq_ptr,                                      # out: (B, H, T) fp32, (B, H, T, D)
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_dob, stride_doh, stride_dot, stride_dod,
    stride_ob, stride_oh, stride_ot, stride_od, stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    H, T, scale, dropout_p, keep_scale,
    PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, head, b, h = head_and_block(BLOCK_M, T, H)
    block = tl.cdiv(T, BLOCK_M) - 1 - block  # the longest rows first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, stride_qd, T, D, BLOCK_D)
    do = load_rows(do_ptr, rows, stride_dot, stride_dod, T, D, BLOCK_D)
    o = load_rows(o_ptr + b * stride_ob + h * stride_oh, rows, stride_ot, stride_od, T, D, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, delta, mask=rows < T)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    diagonal = block * BLOCK_M
    dq = _dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, seed_ptr, head, rows, 0, diagonal,
        stride_kt, stride_kd, stride_vt, stride_vd, T, scale, dropout_p, keep_scale,
        False, PRECISION, D, BLOCK_N, BLOCK_D)  # fmt: skip
    dq = _dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, seed_ptr, head, rows, diagonal,
        min(diagonal + BLOCK_M, T),
        stride_kt, stride_kd, stride_vt, stride_vd, T, scale, dropout_p, keep_scale,
        True, PRECISION, D, BLOCK_N, BLOCK_D)  # fmt: skip
    dq_ptr += b * stride_dqb + h * stride_dqh
    store_rows(dq_ptr, dq * scale, rows, stride_dqt, stride_dqd, T, D, BLOCK_D)


@triton.jit
def _dkdv_blocks(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, seed_ptr, head, cols, first, last,
    stride_qt, stride_qd, stride_dot, stride_dod, T, scale, dropout_p, keep_scale,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the share of queries first..last. Scores are (cols, rows): fewer transposes."""
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, stride_qt, stride_qd, T, D, BLOCK_D)
        do = load_rows(do_ptr, rows, stride_dot, stride_dod, T, D, BLOCK_D)
        # past the end q and do are 0: whatever p is there, it counts for nothing
        lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)

        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(s - lse[None, :] * LOG2E)
        if DIAGONAL:
            p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dropped = p
        if seed_ptr is not None:
            kept = kept_scores(tl.load(seed_ptr), head, rows[None, :], cols[:, None], dropout_p)
            dropped = tl.where(kept, p * keep_scale, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])

        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, seed_ptr,  # in: lse, delta (B, H, T)
    dk_ptr, dv_ptr,                                             # out: (B, H, T, D) each
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_dob, stride_doh, stride_dot, stride_dod,
    stride_dkb, stride_dkh, stride_dkt, stride_dkd, stride_dvb, stride_dvh, stride_dvt, stride_dvd,
    H, T, scale, dropout_p, keep_scale,
    PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, head, b, h = head_and_block(BLOCK_N, T, H)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_dob + h * stride_doh
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, cols, stride_kt, stride_kd, T, D, BLOCK_D)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, cols, stride_vt, stride_vd, T, D, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    diagonal = block * BLOCK_N
    below = min(diagonal + BLOCK_N, T)
    dk, dv = _dkdv_blocks(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, seed_ptr, head, cols,
        diagonal, below,
        stride_qt, stride_qd, stride_dot, stride_dod, T, scale, dropout_p, keep_scale,
        True, PRECISION, D, BLOCK_M, BLOCK_D)  # fmt: skip
    dk, dv = _dkdv_blocks(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, seed_ptr, head, cols,
        below, T,
        stride_qt, stride_qd, stride_dot, stride_dod, T, scale, dropout_p, keep_scale,
        False, PRECISION, D, BLOCK_M, BLOCK_D)  # fmt: skip

    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh
    store_rows(dk_ptr, dk * scale, cols, stride_dkt, stride_dkd, T, D, BLOCK_D)
    store_rows(dv_ptr, dv, cols, stride_dvt, stride_dvd, T, D, BLOCK_D)


def _config(D: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles for dk/dv, where BLOCK_N is a multiple of BLOCK_M, and for dq, the other way around.

    In 16 bits, for D=64 and 128, the fastest tried on an H200 (bench/NOTES.md); the rest so that
    sm_90 code does not spill (`fastgpt inspect`): above a head dim of 128 only tiles too small for
    wgmma achieve that. Heads that do not start at multiples of 16 elements are read one element at
    a time, whose addresses take registers too.
    """
    block_d = max(16, power_of_2(D))

    def tile(block_m: int, block_n: int, warps: int, stages: int) -> dict[str, int]:
        shape = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d)
        return dict(shape, num_warps=warps, num_stages=stages)

    if dtype == torch.float32:
        wide = 32 if block_d <= 128 else 16
        return tile(16, wide, 4, 1), tile(wide, 16, 4, 1)
    if block_d <= 64:
        return tile(32, 64, 4, 3), tile(64, 64, 4, 3)
    if block_d <= 128 and D % 16:
        return tile(16, 64, 8, 2), tile(64, 16, 8, 2)
    if block_d <= 128:
        return tile(32, 64, 4, 3 if block_d == D else 2), tile(64, 64, 4, 2)
    return tile(32, 32, 8, 1), tile(32, 32, 8, 1)


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, scale: float, dropout_p: float,
) -> None:  # fmt: skip
    """All (B, H, T, D) of any strides but lse, (B, H, T) fp32 contiguous: writes dq, dk and dv."""
    B, H, T, D = q.shape
    for_dkdv, for_dq = configured(q, "attention_backward", _config, D, q.dtype)
    delta = torch.empty_like(lse)
    scalars = H, T, scale, dropout_p, keep_scale(dropout_p)
    strides = *q.stride(), *k.stride(), *v.stride(), *do.stride()
    launch(
        _dq_kernel, B * H * cdiv(T, for_dq["BLOCK_M"]),
        q, k, v, do, o, lse, seed, delta, dq, *strides, *o.stride(), *dq.stride(), *scalars,
        PRECISION=dot_precision(q), D=D, **for_dq)  # fmt: skip
    launch(
        _dkdv_kernel, B * H * cdiv(T, for_dkdv["BLOCK_N"]),
        q, k, v, do, lse, delta, seed, dk, dv, *strides, *dk.stride(), *dv.stride(), *scalars,
        PRECISION=dot_precision(q), D=D, **for_dkdv)  # fmt: skip
