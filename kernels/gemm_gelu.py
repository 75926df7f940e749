"""Linear + bias + GELU as one GEMM kernel: GELU reads the sum from registers, not from memory.

    h = x @ w.T + b        y = gelu(h)

gemm_tma.py has faster kernels, also for the MLP's dgrad, for GPUs with TMA and tensors that TMA can
describe. This one takes any strides and runs on every GPU.

Each program owns one (BLOCK_M, BLOCK_N) tile of the output and accumulates over K in fp32. h is
rounded to its dtype before GELU reads it, so the backward (gelu.py) differentiates exactly what
the forward did.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import gemm_tma
from fastgpt.kernels._launch import cdiv, dot_precision, launch, register
from fastgpt.kernels._math import gelu
from fastgpt.kernels._tuned import configured
from fastgpt.kernels.gelu import gelu_backward, gelu_gradients
from fastgpt.kernels.gemm_tma import tile_at


@triton.jit
def _gemm_gelu_kernel(
    x_ptr, w_ptr, b_ptr,  # in:  (M, K), (N, K), (N,) or None
    h_ptr, y_ptr,         # out: (M, N), (M, N)
    stride_xm, stride_xk, stride_wn, stride_wk,
    M, N, K,
    TANH: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    # rows and columns past the end wrap around instead of being masked: they are never stored
    x_ptrs = x_ptr + (rows % M)[:, None] * stride_xm + ks[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + (cols % N)[None, :] * stride_wn + ks[:, None].to(tl.int64) * stride_wk
    step = tl.full([], BLOCK_K, dtype=tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(ks < K - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(ks < K - start)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk

    if b_ptr is not None:
        acc += tl.load(b_ptr + cols % N).to(tl.float32)[None, :]
    h = acc.to(h_ptr.dtype.element_ty)
    y = gelu(h.to(tl.float32), TANH, h.dtype)
    out = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(h_ptr + out, h, mask=mask)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


def _config(dtype: torch.dtype) -> dict[str, int]:
    """Tile by operand size: fp32 operands fill shared memory twice as fast. Not measured yet."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)


def _outputs(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    h = torch.empty(x.shape[0], w.shape[0], device=x.device, dtype=x.dtype)
    return h, torch.empty_like(h)


def forward(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), w (N, K) any strides, b (N,) -> h, gelu(h), both (M, N)."""
    if gemm_tma.takes(x, w) and w.shape[0] % 8 == 0:  # rows of h and y too
        return gemm_tma.fc(x, w, b, tanh)
    (M, K), N = x.shape, w.shape[0]
    h, y = _outputs(x, w, b, tanh)
    config = configured(x, "gemm_gelu", _config, x.dtype)
    grid = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    launch(_gemm_gelu_kernel, grid, x, w, None if b is None else b.contiguous(), h, y,
           *x.stride(), *w.stride(), M, N, K, TANH=tanh, EVEN_K=K % config["BLOCK_K"] == 0,
           PRECISION=dot_precision(x), **config)  # fmt: skip
    return h, y


def dgrad(
    dy: Tensor, w: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (M, K), w (K, N) any strides, h (M, N) contiguous -> gelu_backward's results of dy @ w."""
    if gemm_tma.takes(dy, w, h):
        return gemm_tma.dgrad(dy, w, h, tanh, with_bias, with_output)
    return gelu_backward(dy @ w, h, tanh, with_bias, with_output)


def _dgrad_outputs(
    dy: Tensor, w: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return gelu_gradients(dy, h, tanh, with_bias, with_output)


registered_forward = register(
    "gemm_gelu_forward(Tensor x, Tensor w, Tensor? b, bool tanh) -> (Tensor, Tensor)",
    forward, _outputs)  # fmt: skip
registered_dgrad = register(
    "gemm_gelu_dgrad(Tensor dy, Tensor w, Tensor h, bool tanh, bool with_bias, bool with_output)"
    " -> (Tensor, Tensor, Tensor)", dgrad, _dgrad_outputs)  # fmt: skip
