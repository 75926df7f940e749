"""The ops `mlp` and `linear_gelu`, its first half: autograd around the two GEMMs next to GELU.

    h  = x @ w1.T + b1             a   = gelu(h)        y   = a @ w2.T + b2
    dh = gelu'(h) * (dy @ w2)      dw2 = dy.T @ a       db2 = sum over rows of dy
    dx = dh @ w1                   dw1 = dh.T @ x       db1 = sum over rows of dh

h is kept for the backward; a is computed again from h by the pass that computes dh. `cublas` calls
PyTorch's GEMMs, which add the bias in fp32 before they round h, and a pass of gelu.py after each.
`own` calls the GEMM kernels of gemm_gelu.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import gemm_gelu
from fastgpt.kernels._autograd import differentiable_once
from fastgpt.kernels._launch import device_problem
from fastgpt.kernels.gelu import (
    gelu_backward,
    gelu_forward,
    registered_backward,
    registered_forward,
)


def _cublas_forward(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), w (N, K), b (N,) -> h, gelu(h), both (M, N)."""
    h = F.linear(x, w, b)
    run = registered_forward if torch.compiler.is_compiling() else gelu_forward
    return h, run(h, tanh)


def _cublas_dgrad(
    dy: Tensor, w: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (M, K), w (K, N), h (M, N) -> gelu_backward's results of dy @ w."""
    run = registered_backward if torch.compiler.is_compiling() else gelu_backward
    return run(dy @ w, h, tanh, with_bias, with_output)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, tanh, gemms):
        h, y = gemms.forward(x, w, b, tanh)
        ctx.save_for_backward(x, w, h)
        ctx.tanh = tanh
        return y

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        x, w, h = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dh, _, db = registered_backward(dy, h, ctx.tanh, needs_b, False)
        dx = dh @ w if needs_x else None
        dw = dh.t() @ x if needs_w else None
        return dx, dw, db if needs_b else None, None, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, tanh, gemms):
        h, a = gemms.forward(x, w1, b1, tanh)
        ctx.save_for_backward(x, w1, w2, h)
        ctx.tanh, ctx.dgrad = tanh, gemms.dgrad
        return F.linear(a, w2, b2)

    @staticmethod
    def backward(ctx, dy):
        differentiable_once()
        x, w1, w2, h = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        dh, a, db1 = ctx.dgrad(dy, w2, h, ctx.tanh, needs_b1, needs_w2)
        dx = dh @ w1 if needs_x else None
        dw1 = dh.t() @ x if needs_w1 else None
        dw2 = dy.t() @ a if needs_w2 else None
        db2 = dy.sum(0) if needs_b2 else None
        return dx, dw1, db1 if needs_b1 else None, dw2, db2, None, None


class Gemms(NamedTuple):
    """Two GEMMs, and the ops built on them."""

    # x, w, b, tanh -> h, gelu(h)
    forward: Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]
    # dy, w, h, tanh, with_bias, with_output -> dh; gelu(h) or (0,); db or (0,)
    dgrad: Callable[[Tensor, Tensor, Tensor, bool, bool, bool], tuple[Tensor, Tensor, Tensor]]

    def unsupported(self, tensors: tuple[Tensor, ...]) -> str | None:
        """Why these kernels cannot run on such tensors, or None."""
        if any(t.dtype != tensors[0].dtype for t in tensors):
            return f"dtypes differ: {', '.join(str(t.dtype) for t in tensors)}"
        return device_problem(tensors[0])

    def linear_gelu(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none"
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = _LinearGelu.apply(rows, weight, bias, approximate == "tanh", self)
        return y.view(*x.shape[:-1], weight.shape[0])

    def mlp(
        self,
        x: Tensor,
        fc_weight: Tensor,
        fc_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        approximate: str = "none",
    ) -> Tensor:
        rows, tanh = x.reshape(-1, x.shape[-1]), approximate == "tanh"
        y = _Mlp.apply(rows, fc_weight, fc_bias, proj_weight, proj_bias, tanh, self)
        return y.view(*x.shape[:-1], proj_weight.shape[0])


cublas = Gemms(_cublas_forward, _cublas_dgrad)
own = Gemms(gemm_gelu.registered_forward, gemm_gelu.registered_dgrad)
