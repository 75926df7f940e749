"""LayerNorm over the last dimension, optionally of a residual sum, forward and backward.

    s    = delta + residual   (or just x)       xhat = (s - mean) * rstd        y = xhat * w + b
    ds   = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds_out,  g = dy * w
    dw   = sum over rows of dy * xhat           db   = sum over rows of dy

A program owns BLOCK_M whole rows. In the backward a fixed number of programs stride over the rows,
so that dy and s are read once for ds, dw and db together, and the next rows are loaded while these
are computed. A second kernel adds up the programs' dw and db in a fixed order, which keeps
gradients bitwise reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._autograd import differentiable_once
from fastgpt.kernels._launch import (
    cdiv,
    device_problem,
    launch,
    multiprocessors,
    power_of_2,
    register,
)
from fastgpt.kernels._tuned import configured

MAX_WIDTH = 16384  # one row must fit in a program's registers


@triton.jit
def _forward_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr,        # in:  (M, N), (M, N) or None, (N,), (N,) or None
    y_ptr, s_ptr, mean_ptr, rstd_ptr,  # out: (M, N), (M, N) or None, (M,) fp32, (M,) fp32
    stride_xm, stride_xn, stride_rm, stride_rn,
    M, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    out = rows[:, None] * N + cols[None, :]

    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if r_ptr is not None:
        r_ptrs = r_ptr + rows[:, None] * stride_rm + cols[None, :] * stride_rn
        s = (x + tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + out, s, mask=mask)
        x = s.to(tl.float32)  # normalise what was stored, as two separate ops would

    mean = tl.sum(x, axis=1) / N
    xc = tl.where(mask, x - mean[:, None], 0.0)  # padding lanes must not enter the variance
    rstd = 1.0 / tl.sqrt(tl.sum(xc * xc, axis=1) / N + eps)
    y = xc * rstd[:, None] * tl.load(w_ptr + cols, mask=cols < N).to(tl.float32)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + cols, mask=cols < N).to(tl.float32)[None, :]

    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _backward_kernel(
    dy_ptr, ds_out_ptr, s_ptr, w_ptr, mean_ptr, rstd_ptr,  # in: ds_out (M, N) or None
    ds_ptr, ddelta_ptr,  # out: (M, N), and the same in delta's dtype or None
    dw_ptr, db_ptr,      # out: partials (programs, N) fp32; db or None
    stride_dym, stride_dyn, stride_dsm, stride_dsn, stride_sm, stride_sn,
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    for block in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn
        s_ptrs = s_ptr + rows[:, None] * stride_sm + cols[None, :] * stride_sn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]

        xhat = tl.where(mask, (s - mean) * rstd, 0.0)
        g = dy * w
        c1 = tl.sum(g, axis=1)[:, None] / N
        c2 = tl.sum(g * xhat, axis=1)[:, None] / N
        ds = rstd * (g - c1 - xhat * c2)
        dw += dy * xhat
        if db_ptr is not None:
            db += dy

        if ds_out_ptr is not None:
            ds_out_ptrs = ds_out_ptr + rows[:, None] * stride_dsm + cols[None, :] * stride_dsn
            ds += tl.load(ds_out_ptrs, mask=mask, other=0.0).to(tl.float32)
        out = rows[:, None] * N + cols[None, :]
        tl.store(ds_ptr + out, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + out, ds.to(ddelta_ptr.dtype.element_ty), mask=mask)

    partial = program.to(tl.int64) * N + cols
    tl.store(dw_ptr + partial, tl.sum(dw, axis=0), mask=cols < N)
    if db_ptr is not None:
        tl.store(db_ptr + partial, tl.sum(db, axis=0), mask=cols < N)


@triton.jit
def _sum_kernel(
    dw_partial_ptr, db_partial_ptr,  # in:  (P, N) fp32 each; db's or None
    dw_ptr, db_ptr,                  # out: (N,) each; db or None
    P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    dw = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P).to(tl.int64)
        at, mask = rows[:, None] * N + cols[None, :], (rows < P)[:, None] & (cols < N)[None, :]
        dw += tl.load(dw_partial_ptr + at, mask=mask, other=0.0)
        if db_ptr is not None:
            db += tl.load(db_partial_ptr + at, mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(dw, axis=0).to(dw_ptr.dtype.element_ty), mask=cols < N)
    if db_ptr is not None:
        tl.store(db_ptr + cols, tl.sum(db, axis=0).to(db_ptr.dtype.element_ty), mask=cols < N)


def _config(N: int) -> dict[str, int]:
    """About 4096 elements per program, a warp per 512. At N=768 within 2 % of the fastest
    of 13 on an H200."""
    block = max(power_of_2(N), 16)
    rows = max(1, 4096 // block)
    return dict(BLOCK_M=rows, BLOCK_N=block, num_warps=max(4, min(32, rows * block // 512)))


def _backward_config(N: int) -> dict[str, int]:
    """A warp per 512 elements, at about 128 registers: fewer warps, fewer barriers. Rows on
    their way lie in shared memory, where wide ones have no room. At N=768 2 % off the
    fastest of 30 on an H200.
    """
    block = max(power_of_2(N), 16)
    rows = max(1, 1024 // block)
    warps, stages = min(32, rows * block // 512), 2 if block <= 4096 else 1
    return dict(BLOCK_M=rows, BLOCK_N=block, STAGES=stages, num_warps=warps)


def _outputs(
    x: Tensor, w: Tensor, b: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape
    y = torch.empty(M, N, device=x.device, dtype=dtype)
    mean, rstd = (torch.empty(M, device=x.device, dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


def forward(
    x: Tensor, w: Tensor, b: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, N) -> y (M, N) in `dtype`; mean, rstd (M,) fp32."""
    M, N = x.shape
    y, mean, rstd = _outputs(x, w, b, eps, dtype)
    config = configured(x, "layer_norm_forward", _config, N)
    launch(_forward_kernel, cdiv(M, config["BLOCK_M"]), x, None, w, b, y, None, mean, rstd,
           *x.stride(), 0, 0, M, N, eps, **config)  # fmt: skip
    return y, mean, rstd


def _add_outputs(
    delta: Tensor, residual: Tensor, w: Tensor, b: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _outputs(delta, w, b, eps, dtype)
    s = torch.empty_like(y, dtype=torch.promote_types(delta.dtype, residual.dtype))
    return y, s, mean, rstd


def add_forward(
    delta: Tensor, residual: Tensor, w: Tensor, b: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta, residual (M, N) -> y (M, N) in `dtype`, their sum s (M, N); mean, rstd (M,) fp32."""
    M, N = delta.shape
    y, s, mean, rstd = _add_outputs(delta, residual, w, b, eps, dtype)
    config = configured(delta, "layer_norm_forward", _config, N)
    launch(_forward_kernel, cdiv(M, config["BLOCK_M"]), delta, residual, w, b, y, s, mean,
           rstd, *delta.stride(), *residual.stride(), M, N, eps, **config)  # fmt: skip
    return y, s, mean, rstd


def _gradients(
    dy: Tensor, ds_out: Tensor | None, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor,
    has_bias: bool, delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    M, N = s.shape
    ds = torch.empty(M, N, device=s.device, dtype=s.dtype)
    ddelta = torch.empty(M if delta_dtype != s.dtype else 0, N, device=s.device, dtype=delta_dtype)
    return ds, ddelta, torch.empty_like(w), torch.empty_like(w) if has_bias else w.new_empty(0)


def backward(
    dy: Tensor, ds_out: Tensor | None, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor,
    has_bias: bool, delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> ds (M, N); the same in delta_dtype, (0, N) where that is ds's own; dw (N,); db (N,) or
    (0,).
    """
    M, N = s.shape
    ds, ddelta, dw, db = _gradients(dy, ds_out, s, w, mean, rstd, has_bias, delta_dtype)
    config = configured(s, "layer_norm_backward", _backward_config, N)
    at_once = max(2, 14 // config["num_warps"])  # on a multiprocessor; a few left over would cost
    programs = min(cdiv(M, config["BLOCK_M"]), at_once * multiprocessors(s))
    dw_partial = torch.empty(programs, N, device=s.device, dtype=torch.float32)
    db_partial = torch.empty_like(dw_partial) if has_bias else None
    launch(_backward_kernel, programs, dy, ds_out, s, w, mean, rstd,
           ds, ddelta if delta_dtype != s.dtype else None, dw_partial, db_partial,
           *dy.stride(), *(ds_out.stride() if ds_out is not None else (0, 0)), *s.stride(),
           M, N, **config)  # fmt: skip
    launch(_sum_kernel, cdiv(N, 16), dw_partial, db_partial, dw, db if has_bias else None,
           programs, N, BLOCK_P=512, BLOCK_N=16, num_warps=8)  # fmt: skip
    return ds, ddelta, dw, db


registered_forward = register(
    "layer_norm_forward(Tensor x, Tensor w, Tensor? b, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)", forward, _outputs)  # fmt: skip
registered_add_forward = register(
    "add_layer_norm_forward(Tensor delta, Tensor residual, Tensor w, Tensor? b, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    add_forward, _add_outputs)  # fmt: skip
registered_backward = register(
    "layer_norm_backward(Tensor dy, Tensor? ds_out, Tensor s, Tensor w, Tensor mean, Tensor rstd,"
    " bool has_bias, ScalarType delta_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    backward, _gradients)  # fmt: skip


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, eps, dtype):
        y, mean, rstd = registered_forward(x, w, b, eps, dtype)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.has_bias = b is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        x, w, mean, rstd = ctx.saved_tensors
        dx, _, dw, db = registered_backward(dy, None, x, w, mean, rstd, ctx.has_bias, x.dtype)
        return dx, dw, db if ctx.has_bias else None, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta, residual, w, b, eps, dtype):
        y, s, mean, rstd = registered_add_forward(delta, residual, w, b, eps, dtype)
        ctx.save_for_backward(s, w, mean, rstd)
        ctx.has_bias = b is not None
        ctx.dtypes = delta.dtype, residual.dtype
        return y, s

    @staticmethod
    def backward(ctx, dy, ds_out):
        differentiable_once()
        s, w, mean, rstd = ctx.saved_tensors
        delta_dtype, residual_dtype = ctx.dtypes
        narrow = delta_dtype if delta_dtype != s.dtype else residual_dtype
        ds, ds_narrow, dw, db = registered_backward(
            dy, ds_out, s, w, mean, rstd, ctx.has_bias, narrow
        )
        ddelta = ds if delta_dtype == s.dtype else ds_narrow
        dresidual = ds if residual_dtype == s.dtype else ds_narrow
        return ddelta, dresidual, dw, db if ctx.has_bias else None, None, None


def unsupported(tensors: tuple[Tensor, ...], width: int) -> str | None:
    """Why these kernels cannot take rows of this width where the tensors live, or None."""
    if not 0 < width <= MAX_WIDTH:
        return f"rows are {width} wide; the kernel takes 1 to {MAX_WIDTH}"
    return device_problem(tensors[0])


def _out_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of y under autocast: fp32 on CUDA; on a CPU autocast does not change LayerNorm."""
    return torch.float32 if device.type == "cuda" and torch.is_autocast_enabled("cuda") else dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    N = x.shape[-1]
    w, b = weight.contiguous(), None if bias is None else bias.contiguous()
    return _LayerNorm.apply(x.reshape(-1, N), w, b, eps, _out_dtype(x.device, x.dtype)).view(
        x.shape
    )


def add_layer_norm(
    delta: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    N = delta.shape[-1]
    w, b = weight.contiguous(), None if bias is None else bias.contiguous()
    dtype = _out_dtype(delta.device, torch.promote_types(delta.dtype, residual.dtype))
    y, s = _AddLayerNorm.apply(delta.reshape(-1, N), residual.reshape(-1, N), w, b, eps, dtype)
    return y.view(delta.shape), s.view(delta.shape)
