"""GELU around cuBLAS: the activation, its gradient fused with the bias gradient, and the MLP on
them.

    h = x @ w.T + b        y  = gelu(h)
    dh = dy * gelu'(h)     db = sum over rows of dh       dx = dh @ w       dw = dh.T @ x

The GEMMs are PyTorch's, and so is adding b, which cuBLAS does in fp32 before it rounds h. What is
ours is the pass after them. Forward: gelu. Backward: one pass that reads dy and h and writes dh,
db's partials and, for the MLP, gelu(h) again, which the second GEMM's weight gradient needs and
nothing had to store.

The pre-activation h is kept for the backward, or computed again there from x (`recompute`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._autograd import differentiable_once
from fastgpt.kernels._launch import (
    device_problem,
    launch,
    multiprocessors,
    register,
)
from fastgpt.kernels._math import gelu, gelu_grad


@triton.jit
def _gelu_kernel(
    h_ptr, y_ptr,  # in, out: (SIZE,)
    SIZE, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, gelu(h, TANH).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr, h_ptr,          # in:  (M, N), (M, N)
    dh_ptr, y_ptr, db_ptr,  # out: (M, N), (M, N) or None, partials (strips, N) fp32 or None
    stride_dym, stride_dyn,
    M, N, STRIPS,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    strip, column = tl.program_id(0) % STRIPS, tl.program_id(0) // STRIPS
    cols = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    for block in range(strip, tl.cdiv(M, BLOCK_M), STRIPS):
        rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        at = rows[:, None] * N + cols[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)

        dh = dy * gelu_grad(h, TANH)
        db += dh

        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + at, gelu(h, TANH).to(y_ptr.dtype.element_ty), mask=mask)

    if db_ptr is not None:
        partial = strip.to(tl.int64) * N + cols
        tl.store(db_ptr + partial, tl.sum(db, axis=0), mask=cols < N)


def _backward_config(
    M: int, N: int, with_bias: bool, processors: int
) -> tuple[int, dict[str, int]]:
    """Strips of rows and tile; a bias gradient needs few strips. Not measured on any GPU yet."""
    tile = dict(BLOCK_M=16, BLOCK_N=128, num_warps=4)
    strips = triton.cdiv(M, tile["BLOCK_M"])
    if with_bias:
        strips = min(strips, max(1, 4 * processors // triton.cdiv(N, tile["BLOCK_N"])))
    return strips, tile


def _gelu_output(h: Tensor, tanh: bool) -> Tensor:
    return torch.empty(h.shape, device=h.device, dtype=h.dtype)


def gelu_forward(h: Tensor, tanh: bool) -> Tensor:
    """h (M, N) contiguous -> gelu(h)."""
    y = _gelu_output(h, tanh)
    launch(_gelu_kernel, triton.cdiv(h.numel(), 2048), h, y, h.numel(), TANH=tanh, BLOCK=2048)
    return y


def gelu_gradients(dy: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool):
    dh = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    y = torch.empty_like(dh) if with_output else dh.new_empty(0)
    return dh, y, dh.new_empty(h.shape[1] if with_bias else 0)


def gelu_backward(dy: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool):
    """dy (M, N) any strides, h (M, N) contiguous -> dh (M, N); gelu(h) or (0,); db (N,) or (0,)."""
    M, N = h.shape
    dh, y, db = gelu_gradients(dy, h, tanh, with_bias, with_output)
    strips, config = _backward_config(M, N, with_bias, multiprocessors(h))
    partial = torch.empty(strips, N, device=h.device, dtype=torch.float32) if with_bias else None
    launch(_gelu_backward_kernel, strips * triton.cdiv(N, config["BLOCK_N"]), dy, h,
           dh, y if with_output else None, partial, *dy.stride(), M, N, strips,
           TANH=tanh, **config)  # fmt: skip
    if partial is not None:
        db.copy_(partial.sum(0))
    return dh, y, db


_gelu_forward = register("gelu_forward(Tensor h, bool tanh) -> Tensor", gelu_forward, _gelu_output)
_gelu_backward = register(
    "gelu_backward(Tensor dy, Tensor h, bool tanh, bool with_bias, bool with_output)"
    " -> (Tensor, Tensor, Tensor)", gelu_backward, gelu_gradients)  # fmt: skip


def cublas_gelu(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), w (N, K), b (N,) -> h, gelu(h), both (M, N)."""
    h = F.linear(x, w, b)
    return h, _gelu_forward(h, tanh)


def cublas_dgrad(dy: Tensor, w: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool):
    """dy (M, K), w (K, N), h (M, N) -> gelu_backward's results of dy @ w."""
    return _gelu_backward(dy @ w, h, tanh, with_bias, with_output)


class Gemms(NamedTuple):
    """The matmuls with GELU after them: cuBLAS and a pass, or gemm_gelu's."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    dgrad: Callable[..., tuple[Tensor, Tensor, Tensor]]


CUBLAS = Gemms(cublas_gelu, cublas_dgrad)


class LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, tanh, recompute, gemms):
        h, y = gemms.forward(x, w, b, tanh)
        ctx.save_for_backward(x, w, b, None if recompute else h)
        ctx.tanh = tanh
        return y

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        x, w, b, h = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        h = F.linear(x, w, b) if h is None else h
        dh, _, db = _gelu_backward(dy, h, ctx.tanh, needs_b, False)
        dx = dh @ w if needs_x else None
        dw = dh.t() @ x if needs_w else None
        return dx, dw, db if needs_b else None, None, None, None


class Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, tanh, recompute, gemms):
        h, a = gemms.forward(x, w1, b1, tanh)
        ctx.save_for_backward(x, w1, b1, w2, None if recompute else h)
        ctx.tanh, ctx.dgrad = tanh, gemms.dgrad
        return F.linear(a, w2, b2)

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        x, w1, b1, w2, h = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        h = F.linear(x, w1, b1) if h is None else h
        dh, a, db1 = ctx.dgrad(dy, w2, h, ctx.tanh, needs_b1, needs_w2)
        dx = dh @ w1 if needs_x else None
        dw1 = dh.t() @ x if needs_w1 else None
        dw2 = dy.t() @ a if needs_w2 else None
        db2 = dy.sum(0) if needs_b2 else None
        return dx, dw1, db1 if needs_b1 else None, dw2, db2, None, None, None


def unsupported(tensors: tuple[Tensor, ...]) -> str | None:
    """Why these kernels cannot run on such tensors, or None."""
    if any(t.dtype != tensors[0].dtype for t in tensors):
        return f"dtypes differ: {', '.join(str(t.dtype) for t in tensors)}"
    return device_problem(tensors[0])


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    approximate: str = "none",
    recompute: bool = False,
    gemms: Gemms = CUBLAS,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = LinearGelu.apply(rows, weight, bias, approximate == "tanh", recompute, gemms)
    return y.view(*x.shape[:-1], weight.shape[0])


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "none",
    recompute: bool = False,
    gemms: Gemms = CUBLAS,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    tanh = approximate == "tanh"
    y = Mlp.apply(rows, fc_weight, fc_bias, proj_weight, proj_bias, tanh, recompute, gemms)
    return y.view(*x.shape[:-1], proj_weight.shape[0])
