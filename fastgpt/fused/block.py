"""A transformer block as one autograd unit: its whole forward and its whole backward.

    s1 = residual + delta      n1 = norm(s1)      a = proj(attention(qkv(n1)))
    s2 = s1 + a                n2 = norm(s2)      m = proj(gelu(fc(n2)))         -> m, s2

A block takes and returns the residual stream as two terms. Their sum is formed by the next block's
first norm, which reads both anyway; the backward passes one gradient for both. The backward is
written by hand instead of op by op in autograd: it computes gelu's output again rather than store
it (except on a CPU), writes dq, dk and dv as one dqkv without a copy, and needs no casts, as a norm
writes the dtype that the next matmul reads. Matmuls and the terms `delta`, `m` are in the compute
dtype; the residual stream, norms and parameters keep their own. The norms' eps is a literal, as
torch.compile would treat a global float as an input that may change.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.fused.launchers import Launchers
from fastgpt.fused.second_stream import Beside
from fastgpt.implementations.aten import dgrad, linear
from fastgpt.implementations.aten import wgrad as in_order
from fastgpt.kernels._autograd import differentiable_once


class Weights(NamedTuple):
    """A block's parameters, in nanoGPT's order."""

    ln_1: Tensor  # (C,)
    ln_1_bias: Tensor | None
    qkv: Tensor  # (3C, C)
    qkv_bias: Tensor | None
    attn_proj: Tensor  # (C, C)
    attn_proj_bias: Tensor | None
    ln_2: Tensor  # (C,)
    ln_2_bias: Tensor | None
    fc: Tensor  # (4C, C)
    fc_bias: Tensor | None
    mlp_proj: Tensor  # (C, 4C)
    mlp_proj_bias: Tensor | None


class Settings(NamedTuple):
    n_head: int
    tanh: bool
    dropout_p: float


def block(
    run: Launchers,
    settings: Settings,
    delta: Tensor | None,
    residual: Tensor,
    weights: Weights,
    low: Weights,
) -> tuple[Tensor, Tensor]:
    """delta (B, T, C) or None, residual (B, T, C) -> m, s2, both (B, T, C).

    `low` are the weights in the compute dtype, which the matmuls read; gradients go to `weights`.
    """
    return _Block.apply(run, settings, low, delta, residual, *weights)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, settings, low, delta, residual, *weights):
        w, (B, T, C), p = Weights(*weights), residual.shape, settings.dropout_p
        dtype = low.qkv.dtype
        residual = residual.reshape(-1, C)
        if delta is None:
            s1 = residual
            n1, *stats1 = run.norm(s1, w.ln_1, w.ln_1_bias, 1e-5, dtype)
        else:
            delta = delta.reshape(-1, C)
            n1, s1, *stats1 = run.add_norm(delta, residual, w.ln_1, w.ln_1_bias, 1e-5, dtype)
        qkv = linear(n1, low.qkv, low.qkv_bias).view(B, T, 3 * C)
        y, state = run.attention(qkv, settings.n_head, p)
        a, mask1 = _dropout(linear(y.view(-1, C), low.attn_proj, low.attn_proj_bias), p)
        n2, s2, *stats2 = run.add_norm(a, s1, w.ln_2, w.ln_2_bias, 1e-5, dtype)
        h, g = run.linear_gelu(n2, low.fc, low.fc_bias, settings.tanh)
        m, mask2 = _dropout(linear(g, low.mlp_proj, low.mlp_proj_bias), p)
        kept = g if run.keeps_gelu else None
        # as PyTorch's linear keeps views: `p.data = ...` before the backward changes nothing then
        matrices = [t.detach() for t in (low.qkv, low.attn_proj, low.fc, low.mlp_proj)]

        ctx.run, ctx.settings, ctx.has_delta = run, settings, delta is not None
        ctx.save_for_backward(
            *(w.ln_1, w.ln_2, *matrices),
            *(s1, n1, *stats1, qkv, y, mask1, s2, n2, *stats2, h, kept, mask2, *state),
        )
        return m.view(B, T, C), s2.view(B, T, C)

    @staticmethod
    def backward(ctx, dm, ds2):
        differentiable_once()
        run, (n_head, tanh, p) = ctx.run, ctx.settings
        ln_1, ln_2, w_qkv, w_attn_proj, w_fc, w_mlp_proj, *saved = ctx.saved_tensors
        s1, n1, mean1, rstd1, qkv, y, mask1, s2, n2, mean2, rstd2, h, kept, mask2, *state = saved
        needs = Weights(*ctx.needs_input_grad[5:])
        (B, T, C), dtype = dm.shape, n1.dtype

        beside = Beside() if run.overlaps else None
        wgrad = beside or in_order  # each before a pass that leaves room beside it
        dm = _dropout_backward(dm.reshape(-1, C), mask2, p)
        again = needs.mlp_proj and kept is None
        dh, g, db_fc = run.gelu_dgrad(dm, w_mlp_proj, h, tanh, needs.fc_bias, again)
        g = kept if kept is not None else g
        dn2 = dgrad(dh, w_fc)
        dw_mlp_proj = wgrad(dm, g, ln_1.dtype) if needs.mlp_proj else None
        db_mlp_proj = dm.sum(0) if needs.mlp_proj_bias else None
        dw_fc = wgrad(dh, n2, ln_1.dtype) if needs.fc else None
        del h, g, kept, dm, dh
        ds2, da, dln_2, dln_2_bias = run.norm_backward(
            dn2, ds2.reshape(-1, C), s2, ln_2, mean2, rstd2, needs.ln_2_bias, dtype
        )
        da = _dropout_backward(da if len(da) else ds2, mask1, p)
        dy = dgrad(da, w_attn_proj).view(B, T, C)
        dw_attn_proj = wgrad(da, y.view(-1, C), ln_1.dtype) if needs.attn_proj else None
        db_attn_proj = da.sum(0) if needs.attn_proj_bias else None
        dqkv = run.attention_backward(dy, qkv, y, state, n_head, p).view(-1, 3 * C)
        dn1 = dgrad(dqkv, w_qkv)
        dw_qkv = wgrad(dqkv, n1, ln_1.dtype) if needs.qkv else None
        db_qkv = dqkv.sum(0) if needs.qkv_bias else None
        ds1, ddelta, dln_1, dln_1_bias = run.norm_backward(
            dn1, ds2, s1, ln_1, mean1, rstd1, needs.ln_1_bias, dtype
        )
        if beside is not None:
            beside.join()
        ddelta = (ddelta if len(ddelta) else ds1).view(B, T, C) if ctx.has_delta else None
        return (
            None, None, None, ddelta, ds1.view(B, T, C),
            dln_1, _if(needs.ln_1_bias, dln_1_bias), dw_qkv, db_qkv, dw_attn_proj, db_attn_proj,
            dln_2, _if(needs.ln_2_bias, dln_2_bias), dw_fc, _if(needs.fc_bias, db_fc),
            dw_mlp_proj, db_mlp_proj,
        )  # fmt: skip


def norm(
    run: Launchers,
    delta: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """delta (B, T, C) or None, residual (B, T, C) -> norm(residual + delta) (B, T, C) in dtype."""
    return _Norm.apply(run, dtype, delta, residual, weight, bias)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, dtype, delta, residual, w, b):
        s, C = residual.reshape(-1, w.shape[0]), w.shape[0]
        if delta is None:
            y, *stats = run.norm(s, w, b, 1e-5, dtype)
        else:
            y, s, *stats = run.add_norm(delta.reshape(-1, C), s, w, b, 1e-5, dtype)
        ctx.run, ctx.delta_dtype = run, None if delta is None else delta.dtype
        ctx.save_for_backward(s, w, *stats)
        return y.view(residual.shape)

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        s, w, mean, rstd = ctx.saved_tensors
        has_bias, narrow = ctx.needs_input_grad[5], ctx.delta_dtype or s.dtype
        ds, ddelta, dw, db = ctx.run.norm_backward(
            dy.reshape(s.shape), None, s, w, mean, rstd, has_bias, narrow
        )
        ddelta = (ddelta if len(ddelta) else ds).view(dy.shape) if ctx.delta_dtype else None
        return None, None, ddelta, ds.view(dy.shape), dw, _if(has_bias, db)


def _if(needed: bool, gradient: Tensor) -> Tensor | None:
    return gradient if needed else None


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(x, p, True) if p > 0 else (x, None)


def _dropout_backward(dx: Tensor, mask: Tensor | None, p: float) -> Tensor:
    if mask is None:
        return dx
    scale = 1 / (1 - p) if p < 1 else 0.0
    return torch.ops.aten.native_dropout_backward(dx, mask, scale)
