"""y = [residual +] [gelu] ([norm](x) @ w.T + bias) for few rows: a decoding step's linear layers.

A program owns BLOCK_N outputs of all rows or of BLOCK_M, and norms the rows itself: they are in L2,
and a pass of their own would be another launch. One row is a sum of products in registers, which
hold all of it. Several are multiplied on tensor cores, as the sum of two numbers of the weights'
dtype, in SPLIT ranges of K side by side: one after the other they take longer than the reading.

Where the GPU can, a kernel starts while the one in front of it still runs (programmatic dependent
launch), reads its weights, and only then waits. `wait` returns when the kernel in front has ended,
and that one had waited too: so behind `wait` all earlier kernels have ended, and what they read may
be written. In front of it stands nothing but weights, and in attention positions and a cache up to
them: those are written by an earlier step, and `embed`, which begins one, starts in the usual way,
after all that came before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastgpt.kernels import layer_norm
from fastgpt.kernels._launch import (
    DESCRIPTORS,
    INTERPRETED,
    cdiv,
    dot_precision,
    early,
    launch,
    power_of_2,
    start_next,
    wait,
)
from fastgpt.kernels._math import gelu
from fastgpt.kernels._tuned import configured

Weight = Tensor | tuple[Tensor, Tensor]  # or int8 values and the fp32 scales of their rows

MAX_ROWS = 64  # of 16-bit weights; for more, a GEMM of PyTorch's
MAX_WIDE_ROWS = 16  # of fp32 weights, which need more arithmetic: less is no block of a product
_OF_INT8 = tl.constexpr(tl.float16 if INTERPRETED else tl.bfloat16)  # both hold these integers
MAX_NORMED_ROWS = 16  # by each program: more are normed once, by a launch of their own


@triton.jit
def given(ptr, at, mask, default: tl.constexpr):
    """What is there, or `default` where there is no such tensor."""
    if ptr is not None:
        return tl.load(ptr + at, mask=mask, other=default)
    else:
        return tl.full(at.shape, default, tl.float32)


@triton.jit
def _row_kernel(
    x_ptr, w_ptr,                        # in:  (K,) fp32, (N, K)
    scales_ptr, bias_ptr,                # in:  (N,) fp32 each or None
    norm_w_ptr, norm_b_ptr,              # in:  (K,) fp32 each or None
    residual_ptr,                        # in:  (N,) fp32 or None
    y_ptr,                               # out: (N,) fp32, which may be residual
    N, eps,
    K: tl.constexpr, GELU: tl.constexpr, TANH: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if EARLY:
        start_next()
    outs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    w_mask = (outs < N)[:, None] & (cols < K)[None, :]
    w = tl.load(w_ptr + outs[:, None] * K + cols[None, :], mask=w_mask, other=0.0)
    scale, bias = given(scales_ptr, outs, outs < N, 1.0), given(bias_ptr, outs, outs < N, 0.0)
    gain, shift = given(norm_w_ptr, cols, cols < K, 1.0), given(norm_b_ptr, cols, cols < K, 0.0)
    if EARLY:
        wait()
    x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
    residual = given(residual_ptr, outs, outs < N, 0.0)
    if norm_w_ptr is not None:
        centred = tl.where(cols < K, x - tl.sum(x, 0) / K, 0.0)
        x = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)) * gain + shift
    y = tl.sum(w.to(tl.float32) * x[None, :], 1) * scale + bias
    if GELU:
        y = gelu(y, TANH, tl.float32)
    tl.store(y_ptr + outs, y + residual, mask=outs < N)


@triton.jit
def _statistics(x_ptr, rows, M, eps, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Mean and 1 / deviation of rows of x (M, K), in two passes, the second in cache. Sums are kept
    apart up to the end: threads exchange numbers twice, not in every block.
    """
    cols = tl.arange(0, 128)
    sums = tl.zeros([BLOCK_M, 128], dtype=tl.float32)
    for start in tl.static_range(0, K, 128):
        mask = (rows < M)[:, None] & (start + cols < K)[None, :]
        sums += tl.load(x_ptr + rows[:, None] * K + (start + cols)[None, :], mask=mask, other=0.0)
    mean = tl.sum(sums, 1) / K
    squares = tl.zeros([BLOCK_M, 128], dtype=tl.float32)
    for start in tl.static_range(0, K, 128):
        mask = (rows < M)[:, None] & (start + cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + (start + cols)[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def _fetch(w_ptr, first, last, LINES: tl.constexpr):
    """Bring bytes first..last of w into L2, by lines of 128 bytes. Waits for nothing."""
    at = tl.minimum(first + 128 * tl.arange(0, LINES), last)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [w_ptr.to(tl.int64) + at], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _rows_kernel(
    x_ptr, w_ptr,                        # in:  (M, K) fp32, (N, K)
    scales_ptr, bias_ptr,                # in:  (N,) fp32 each or None
    norm_w_ptr, norm_b_ptr,              # in:  (K,) fp32 each or None
    residual_ptr,                        # in:  (M, N) fp32 or None
    y_ptr,                               # out: (M, N) fp32, which may be residual
    M, N, eps,
    K: tl.constexpr, GELU: tl.constexpr, TANH: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr, LINES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N
    outs = first + tl.arange(0, BLOCK_N)
    if EARLY:
        start_next()
        size: tl.constexpr = K * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
        _fetch(w_ptr, first * size, N.to(tl.int64) * size - 1, LINES)
        wait()
    if norm_w_ptr is not None:
        mean, rstd = _statistics(x_ptr, rows, M, eps, K, BLOCK_M)
    ranges, ks = tl.arange(0, SPLIT) * BLOCK_K, tl.arange(0, BLOCK_K)
    acc = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        cols = start + ranges[:, None] + ks[None, :]
        w_at = outs[None, None, :] * K + cols[:, :, None]
        w_mask = (outs < N)[None, None, :] & (cols < K)[:, :, None]
        w = tl.load(w_ptr + w_at, mask=w_mask, other=0.0)
        x_mask = (rows < M)[None, :, None] & (cols < K)[:, None, :]
        x_at = rows[None, :, None] * K + cols[:, None, :]
        x = tl.load(x_ptr + x_at, mask=x_mask, other=0.0)
        if norm_w_ptr is not None:
            gain = given(norm_w_ptr, cols, cols < K, 1.0)
            shift = given(norm_b_ptr, cols, cols < K, 0.0)
            x = (x - mean[None, :, None]) * rstd[None, :, None] * gain[:, None, :]
            x += shift[:, None, :]
        if w.dtype == tl.int8:
            w = w.to(_OF_INT8)
        rounded = x.to(w.dtype)
        acc = tl.dot(rounded, w, acc, input_precision=PRECISION)
        if w.dtype != x.dtype:  # else a token would depend on how many rows there are
            rest = (x - rounded.to(tl.float32)).to(w.dtype)
            acc = tl.dot(rest, w, acc, input_precision=PRECISION)
    y = tl.sum(acc, 0) * given(scales_ptr, outs, outs < N, 1.0)[None, :]
    y += given(bias_ptr, outs, outs < N, 0.0)[None, :]
    if GELU:
        y = gelu(y, TANH, tl.float32)
    at, mask = rows[:, None] * N + outs[None, :], (rows < M)[:, None] & (outs < N)[None, :]
    tl.store(y_ptr + at, y + given(residual_ptr, at, mask, 0.0), mask=mask)


def _row_config(N: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """A thread loads 16 times 16 bytes of the weight: at 124M on an H200 the fastest of 6 to 13, or
    nearly.
    """
    block_k = power_of_2(K)
    held = 4096 * 2 // max(2, dtype.itemsize)  # by a warp
    block_n = max(1, min(16 if N > 16384 else 4, 16 * held // block_k))
    return dict(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=max(1, block_n * block_k // held))


def _rows_config(M: int, N: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Small blocks, for as many programs as there can be; near the fastest of 23 to 55 at 124M on
    an H200, 8 and 64 rows.
    """
    block_m = 32 if M > 16 and (N > 16384 or K < 2048) else 16
    block_n, block_k, split, stages = 16, 64, 4, 3
    if dtype == torch.float32:
        block_k = 32
    elif N > 16384:
        block_n, split = 64, 2
    elif K > 1024:
        block_k = 128 if M <= 16 else 64
    elif M <= 16:
        stages = 2
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
                SPLIT=split, num_warps=split, num_stages=stages)  # fmt: skip


def linear(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None,
    norm: tuple[Tensor, Tensor | None] | None = None, residual: Tensor | None = None,
    approximate: str | None = None,
) -> None:  # fmt: skip
    """x (M, K) fp32, weight (N, K) -> out (M, N) fp32, which may be `residual`; all contiguous."""
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    (M, K), N = x.shape, values.shape[0]
    if most_rows(values.dtype) < M:
        _linear_of_many(out, x, weight, bias, norm, residual, approximate)
        return
    if norm is not None and M > MAX_NORMED_ROWS:
        low = torch.float16 if INTERPRETED else torch.bfloat16
        low = low if values.dtype == torch.int8 else values.dtype
        x, _, _ = layer_norm.forward(x, *norm, 1e-5, low)
        norm = None
    norm_w, norm_b = norm or (None, None)
    args = x, values, scales, bias, norm_w, norm_b, residual, out
    shared = dict(K=K, GELU=approximate is not None, TANH=approximate == "tanh") | early(x)
    if M == 1:
        config = configured(x, "decode_row", _row_config, N, K, values.dtype)
        launch(_row_kernel, cdiv(N, config["BLOCK_N"]), *args, N, 1e-5, **shared, **config)
        return
    config = configured(x, "decode_rows", _rows_config, power_of_2(M), N, K, values.dtype)
    lines = power_of_2(cdiv(config["BLOCK_N"] * K * values.element_size(), 128))
    launch(_rows_kernel, cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]), *args, M, N, 1e-5,
           **shared, PRECISION=dot_precision(values), LINES=lines,
           **config)  # fmt: skip


def most_rows(dtype: torch.dtype) -> int:
    """Of a weight of this dtype, that a kernel of ours takes."""
    if not DESCRIPTORS and not INTERPRETED:  # Triton before 3.4 crashes on products in SPLIT ranges
        return 1
    return MAX_WIDE_ROWS if dtype == torch.float32 else MAX_ROWS


def _linear_of_many(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None,
    norm: tuple[Tensor, Tensor | None] | None, residual: Tensor | None, approximate: str | None,
) -> None:  # fmt: skip
    """`linear` by a GEMM of PyTorch's, which reads a weight once for all rows."""
    y = x if norm is None else F.layer_norm(x, x.shape[1:], *norm)
    if isinstance(weight, Tensor):
        y = F.linear(y.to(weight.dtype), weight).float()
    else:
        values, scales = weight
        y = F.linear(y.bfloat16(), values.bfloat16()).float() * scales  # integers that 16 bits hold
    y = y if bias is None else y + bias
    y = y if approximate is None else F.gelu(y, approximate=approximate)
    out.copy_(y if residual is None else residual + y)
