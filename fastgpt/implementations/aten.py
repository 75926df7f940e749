"""The launchers of the fused path in PyTorch's own ops, for CPUs.

Functions on tensors without autograd, with the arguments and results of the launchers in kernels/.
The fused units (fused/launchers.py) call either.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import reference
from fastgpt.devices import cpu_info
from fastgpt.kernels._autograd import constant_in_a_graph, differentiable_once, graph_is_kept

aten = torch.ops.aten
STRIP = 2**19  # elements of the logits that cross_entropy_ works on at once: 2 MB in fp32
LARGE = 5_000_000  # multiplications of a product that oneDNN is faster at, of a row as for 12
_FROM_ACCUMULATOR = "dtype" in aten.mm.overloads()  # mm(out_dtype=), of PyTorch 2.8

_keeps_freed_memory = False


@constant_in_a_graph
def keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees for the next one, once a process.

    By default it returns freed blocks to the system, and every step faults them in again, 2 us for
    4 KB. When a mapped block is freed, glibc takes blocks of that size for common and keeps twice
    as much, up to this size (mallopt(3)). It is not written to, and a script's own settings of
    malloc stand.
    """
    global _keeps_freed_memory
    if not _keeps_freed_memory:
        torch.empty(2**25 - 2**16, dtype=torch.uint8)
        _keeps_freed_memory = True


@functools.cache
def _onednn_linear() -> Any:
    """oneDNN's x @ w.T + b, on the processors where it is faster than MKL's; None on others.

    MKL, which PyTorch multiplies fp32 matrices by, is made for another vendor's processors: on an
    EPYC with AVX-512 oneDNN takes 7 to 12 % less time (bench/NOTES.md). Not so for dy.T @ x.
    """
    on_amd = "AuthenticAMD" in cpu_info()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if on_amd else None


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x (..., K) @ w.T + b: w (N, K), b (N,) -> (..., N)."""
    flat = b is None or b.is_contiguous()  # or it reads past the end
    if flat and _onednn_takes(x, w) and (onednn_linear := _onednn_linear()):
        return onednn_linear(x, w, b, "none", [], "")
    return F.linear(x, w, b)


def dgrad(dy: Tensor, w: Tensor) -> Tensor:
    """dy (M, N) @ w (N, K) -> (M, K)."""
    if _onednn_takes(dy, w) and (onednn_linear := _onednn_linear()):
        return onednn_linear(dy, w.t(), None, "none", [], "")
    return dy @ w


def _onednn_takes(x: Tensor, w: Tensor) -> bool:
    """Whether these are fp32 on a CPU (in 16 bits PyTorch calls oneDNN itself), and large enough:
    a call of oneDNN takes 15 us at least, one of MKL 2.
    """
    return (
        x.dtype == w.dtype == torch.float32
        and x.device.type == w.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
        and w.numel() * max(x.shape[:-1].numel(), 12) >= LARGE
        and x.is_contiguous()
        and w.is_contiguous()
    )


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N) in `dtype`; where PyTorch can, written from the fp32 accumulator."""
    if _FROM_ACCUMULATOR and a.device.type == "cuda" and dtype != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    if a.dtype == torch.float16 and dtype == torch.float32:  # the sum may overflow fp16
        a, b = a.float(), b.float()
        if not torch.is_autocast_enabled(a.device.type):
            return a @ b
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    return (a @ b).to(dtype)


def wgrad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy.T @ x: dy (M, N), x (M, K) -> (N, K) in `dtype`."""
    return matmul(dy.t(), x, dtype)


def norm(x: Tensor, w: Tensor, b: Tensor | None, eps: float, dtype: torch.dtype):
    """x (M, N) -> y (M, N) in `dtype`; mean, rstd (M, 1)."""
    y, mean, rstd = torch.native_layer_norm(x, w.shape, w, b, eps)
    return y.to(dtype), mean, rstd


def add_norm(
    delta: Tensor, residual: Tensor, w: Tensor, b: Tensor | None, eps: float, dtype: torch.dtype
):
    """-> y (M, N) in `dtype`, s = residual + delta; mean, rstd (M, 1)."""
    s = residual + delta
    y, mean, rstd = norm(s, w, b, eps, dtype)
    return y, s, mean, rstd


def norm_backward(
    dy: Tensor, ds_out: Tensor | None, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor,
    has_bias: bool, delta_dtype: torch.dtype,
):  # fmt: skip
    """-> ds (M, N); the same in delta_dtype, (0, N) where that is ds's own; dw (N,); db or None."""
    ds, dw, db = aten.native_layer_norm_backward(
        dy.to(s.dtype), s, w.shape, mean, rstd, w, w if has_bias else None, [True, True, has_bias]
    )
    if ds_out is not None:
        ds += ds_out
    ddelta = ds.to(delta_dtype) if delta_dtype != s.dtype else ds.new_empty(0, s.shape[1])
    return ds, ddelta, dw, db


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """-> h = x @ w.T + b and gelu(h), both (M, N)."""
    h = linear(x, w, b)
    return h, F.gelu(h, approximate="tanh" if tanh else "none")


def gelu_dgrad(dy: Tensor, w: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool):
    """dy (M, K), w (K, N) -> dh (M, N); gelu(h) and db (N,), each None unless asked for."""
    approximate = "tanh" if tanh else "none"
    dh = dgrad(dy, w)
    aten.gelu_backward.grad_input(dh, h, approximate=approximate, grad_input=dh)
    y = F.gelu(h, approximate=approximate) if with_output else None
    return dh, y, dh.sum(0) if with_bias else None


def cross_entropy_(
    logits: Tensor, targets: Tensor, ignore_index: int, factor: Tensor | float
) -> Tensor:
    """logits (M, V) become factor * dlosses/dlogits, 0 in ignored rows -> losses (M,) fp32."""
    return _cross_entropy_into(logits, logits, targets, ignore_index, factor)


def _cross_entropy_into(
    dlogits: Tensor, logits: Tensor, targets: Tensor, ignore_index: int, factor: Tensor | float
) -> Tensor:
    """In strips of rows that stay in the cache. The loss is (max - picked) - log max(p), which is
    as exact as logsumexp and needs no second pass over the exponentials.
    """
    keep_freed_memory()
    counted = (targets != ignore_index)[:, None]
    ids = targets[:, None].masked_fill(~counted, 0)
    factors = counted.float() * factor  # not bool * factor, whose dtype is the default one
    losses = torch.empty_like(factors)
    rows = max(1, STRIP // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        x, strip, ids_here = logits[part].float(), dlogits[part], ids[part]
        p = strip if strip.dtype == torch.float32 else x
        top, picked = x.amax(-1, keepdim=True), _picked(x, ids_here)
        torch.softmax(x, -1, out=p)
        losses[part] = top - picked - p.amax(-1, keepdim=True).log()
        p.scatter_add_(1, ids_here, torch.full_like(picked, -1.0))
        p *= factors[part]
        if p is not strip:
            strip.copy_(p)
    return losses.masked_fill_(~counted, 0.0).squeeze(1)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made with the loss, while the logits are in the cache.

    fp16 would flush most of it to zero before the loss scale arrives: there it is larger by a
    power of two, so that scaling it down rounds no second time where dloss is one too.
    """

    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        count = (targets != ignore_index).sum()
        n = max(count.item(), 1)
        ctx.unit = 2.0 ** (14 + math.floor(math.log2(n))) if logits.dtype == torch.float16 else 1.0
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        losses = _cross_entropy_into(dlogits, logits, targets, ignore_index, ctx.unit / n)
        ctx.save_for_backward(dlogits)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        differentiable_once()
        (dlogits,) = ctx.saved_tensors
        scale = dloss / ctx.unit
        if scale != 1:
            return scaled(dlogits, scale, dlogits.dtype), None, None
        # as after loss.backward(): what was made is the caller's, who may write to it;
        # unless the graph is kept for another backward
        return dlogits.clone() if graph_is_kept() else dlogits, None, None


def scaled(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t * scale, a scalar tensor that must not be rounded to t's dtype first, in `dtype`."""
    return (t.float() * scale).to(dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """PyTorch's own two passes if the logits fit in one strip: as fast, in fewer calls."""
    small = logits.numel() <= STRIP
    if small or not logits.requires_grad or not torch.is_grad_enabled():
        return reference.cross_entropy(logits, targets, ignore_index)
    return _CrossEntropy.apply(logits, targets, ignore_index)


def _picked(p: Tensor, ids: Tensor) -> Tensor:
    try:
        return p.gather(1, ids)
    except RuntimeError:
        bad = ids[(ids < 0) | (ids >= p.shape[1])]
        raise IndexError(f"Target {bad[0].item()} is out of bounds.") from None


def unsupported(tensors: tuple[Tensor, ...]) -> str | None:
    """Why these functions are not for such tensors, or None."""
    return "this implementation is for CPUs" if tensors[0].is_cuda else None


def add_rows_(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """table[ids[i]] += rows[i] in the order of i: on a CPU the same bits each time."""
    table.index_add_(0, ids, rows.to(table.dtype))
