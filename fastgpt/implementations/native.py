"""Causal attention and GELU on a CPU, in C (native.c): what PyTorch's ops leave of a step's time
beside its GEMMs.

PyTorch's attention for CPUs calls a BLAS for every small block, in bf16 several times slower than
in fp32; here the products are fp32 in registers, whatever the tensors are. Its GELU computes erf
and exp a second time in the backward; here the forward leaves the slope in place of the input.
Functions on tensors without autograd, as the fused path's launchers are (fused/launchers.py).
"""

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fastgpt.implementations.aten import dgrad, linear
from fastgpt.implementations.compiled import library
from fastgpt.implementations.sdpa import State

_SOURCE = Path(__file__).with_name("native.c")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS = {  # pointers, then sizes
    "attention": [ctypes.c_void_p] * 3 + [ctypes.c_int] * 5,
    "attention_backward": [ctypes.c_void_p] * 5 + [ctypes.c_int] * 5,
    "gelu": [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_int] * 2,
}


def unsupported(like: Tensor, dropout_p: float) -> str | None:
    """Why these cannot run on tensors such as `like`, or should not. Compiles at first."""
    if like.device.type != "cpu" or like.dtype not in _DTYPES:
        return f"{like.dtype} on {like.device.type} is neither float32 nor bfloat16 on a CPU"
    if dropout_p > 0:
        return "there is no dropout"
    if torch.compiler.is_compiling():
        return "the compiler cannot see into it"
    return _not_here(like.dtype)


@functools.cache
def _not_here(dtype: torch.dtype) -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it was not measured on {platform.machine()}"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return "this CPU multiplies bfloat16 by AMX, which PyTorch uses"
    outcome = library(_SOURCE)
    return outcome if isinstance(outcome, str) else None


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(library(_SOURCE), f"{name}_{_DTYPES[dtype]}")
    function.argtypes, function.restype = _ARGUMENTS[name], None
    return function


def attention(qkv: Tensor, n_head: int, dropout_p: float) -> tuple[Tensor, State]:
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, H, T) fp32."""
    qkv = qkv.contiguous()
    (B, T, C3), D = qkv.shape, qkv.shape[2] // 3 // n_head
    y = qkv.new_empty(B, T, C3 // 3)
    lse = qkv.new_empty(B, n_head, T, dtype=torch.float32)
    pointers = qkv.data_ptr(), y.data_ptr(), lse.data_ptr()
    with record_function("native_attention"):  # no op of PyTorch's would show it in a profile
        _function("attention", qkv.dtype)(*pointers, B, T, n_head, D, torch.get_num_threads())
    return y, (lse,)


def attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, state: State, n_head: int, dropout_p: float
) -> Tensor:
    """-> dqkv (B, T, 3C)."""
    dy, qkv = dy.contiguous(), qkv.contiguous()
    (B, T, C3), dqkv = qkv.shape, torch.empty_like(qkv)
    pointers = (t.data_ptr() for t in (dy, qkv, y, *state, dqkv) if t is not None)
    sizes = B, T, n_head, C3 // 3 // n_head
    _function("attention_backward", qkv.dtype)(*pointers, *sizes, torch.get_num_threads())
    return dqkv


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """h = x @ w.T + b -> gelu's slope at h, gelu(h), both (M, N)."""
    h = linear(x, w, b)
    y = torch.empty_like(h)
    pointers = h.data_ptr(), y.data_ptr()
    _function("gelu", h.dtype)(*pointers, h.numel(), tanh, torch.get_num_threads())
    return h, y


def gelu_dgrad(
    dy: Tensor, w: Tensor, slope: Tensor, tanh: bool, with_bias: bool, with_output: bool
) -> tuple[Tensor, None, Tensor | None]:
    """dy (M, K), w (K, N) -> dh (M, N), None, db (N,) or None; gelu(h) was kept."""
    assert not with_output
    dh = dgrad(dy, w).mul_(slope)
    return dh, None, dh.sum(0) if with_bias else None
