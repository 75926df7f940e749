"""A decoding step for few rows: every weight is read once, and the cache once.

    embed           x = wte[id] + wpe[position]
    linear          y = [residual +] [gelu] ([norm](x) @ w.T + bias)
    attend_project  x += softmax(q @ K.T / sqrt(D)) @ V @ w.T + bias,  K and V up to the position

A program of `linear` owns BLOCK_N outputs of BLOCK_M rows, and norms the rows it reads by itself:
they are in L2, and a pass of their own would be another launch. Attention splits the keys of a head
into chunks, a program each (flash decoding, arXiv 2311.01282); the program whose chunk a new token
falls into writes its key and value. Rows may be texts, or tokens of one that follow each other:
these see each other in qkv, where no program writes. Chunks leave o, not divided by its sum, the
sum and the maximum; the projection's programs join them while they read. Five launches a layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastgpt.kernels._launch import cdiv, device_problem, launch, power_of_2
from fastgpt.kernels._math import gelu
from fastgpt.kernels._tuned import configured

Weight = Tensor | tuple[Tensor, Tensor]  # or int8 values and the fp32 scales of their rows

MAX_ROWS = 8  # that a program owns; for more, PyTorch's GEMMs use tensor cores
MAX_HEAD_DIM = 256


@triton.jit
def _embed_kernel(
    ids_ptr, positions_ptr, wte_ptr, wpe_ptr,  # in: (B,) int64, (B,) int32, (V, C), (S, C)
    x_ptr,                                     # out: (B, C)
    C, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C).to(tl.int64)
    mask = cols < C
    token = tl.load(wte_ptr + tl.load(ids_ptr + b) * C + cols, mask=mask).to(tl.float32)
    position = tl.load(positions_ptr + b).to(tl.int64)
    token += tl.load(wpe_ptr + position * C + cols, mask=mask).to(tl.float32)
    tl.store(x_ptr + b * C + cols, token, mask=mask)


@triton.jit
def _statistics(x_ptr, rows, M, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / deviation of rows of x (M, K), in two passes over what is in cache."""
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        sums += tl.sum(tl.load(x_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0), 1)
    mean = sums / K
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def _finish(
    acc, y_ptr, scales_ptr, bias_ptr, residual_ptr, rows, outs, M, N,
    GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Scales, bias, GELU, residual; acc (BLOCK_M, BLOCK_N) -> y (M, N)."""
    if scales_ptr is not None:
        acc *= tl.load(scales_ptr + outs, mask=outs < N, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outs, mask=outs < N, other=0.0)[None, :]
    if GELU:
        acc = gelu(acc, TANH, tl.float32)
    at, mask = rows[:, None] * N + outs[None, :], (rows < M)[:, None] & (outs < N)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, acc, mask=mask)


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr,                        # in:  (M, K) fp32, (N, K)
    scales_ptr, bias_ptr,                # in:  (N,) fp32 each or None
    norm_w_ptr, norm_b_ptr,              # in:  (K,) fp32 each or None
    residual_ptr,                        # in:  (M, N) fp32 or None
    y_ptr,                               # out: (M, N) fp32, which may be residual
    M, N, K, eps,
    GELU: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    outs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if norm_w_ptr is not None:
        mean, rstd = _statistics(x_ptr, rows, M, K, eps, BLOCK_M, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        w_mask = (outs < N)[:, None] & (cols < K)[None, :]
        w = tl.load(w_ptr + outs[:, None] * K + cols[None, :], mask=w_mask, other=0.0)
        x_mask = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], mask=x_mask, other=0.0)
        if norm_w_ptr is not None:
            gain = tl.load(norm_w_ptr + cols, mask=cols < K, other=0.0)
            x = (x - mean[:, None]) * rstd[:, None] * gain[None, :]
            if norm_b_ptr is not None:
                x += tl.load(norm_b_ptr + cols, mask=cols < K, other=0.0)[None, :]
        acc += tl.sum(x[:, None, :] * w.to(tl.float32)[None, :, :], 2)
    _finish(acc, y_ptr, scales_ptr, bias_ptr, residual_ptr, rows, outs, M, N, GELU, TANH)


@triton.jit
def _attend_kernel(
    qkv_ptr, keys_ptr, values_ptr, positions_ptr,  # (R, 3HD) fp32, (B, H, S, D) each, (R,) int32
    o_ptr, sum_ptr, top_ptr,                       # out: (R, H, P, D), (R, H, P) each, fp32
    H, S, P, NEW, scale,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(0) % P, (tl.program_id(0) // P).to(tl.int64)
    r, h = head // H, head % H
    position = tl.load(positions_ptr + r)
    old = position - r % NEW  # keys of the cache: behind them are the rows of this step
    cache = (r // NEW * H + h) * S
    ds = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + h * D + ds
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    dtype: tl.constexpr = keys_ptr.dtype.element_ty  # what new keys and values are rounded to
    if position // CHUNK == part:
        at = (cache + position) * D + ds
        new_k = tl.load(k_ptr + r * 3 * H * D, mask=ds < D, other=0.0)
        new_v = tl.load(v_ptr + r * 3 * H * D, mask=ds < D, other=0.0)
        tl.store(keys_ptr + at, new_k.to(dtype), mask=ds < D)
        tl.store(values_ptr + at, new_v.to(dtype), mask=ds < D)

    q = tl.load(q_ptr + r * 3 * H * D, mask=ds < D, other=0.0) * scale
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total, top = 0.0, -1e30  # finite: a chunk behind the position leaves a sum of 0
    for start in range(part * CHUNK, min(part * CHUNK + CHUNK, position + 1), BLOCK_S):
        ts = start + tl.arange(0, BLOCK_S)
        at = (cache + ts)[:, None] * D + ds[None, :]
        new_at = (r - position + ts)[:, None] * 3 * H * D
        is_old = (ts < old)[:, None] & (ds < D)[None, :]
        is_new = ((ts >= old) & (ts <= position))[:, None] & (ds < D)[None, :]
        k = tl.load(keys_ptr + at, mask=is_old, other=0.0)
        k += tl.load(k_ptr[None, :] + new_at, mask=is_new, other=0.0).to(dtype)
        s = tl.sum(q[None, :] * k.to(tl.float32), 1)
        s = tl.where(ts <= position, s, -1e30)
        new_top = tl.maximum(top, tl.max(s, 0))
        p = tl.where(ts <= position, tl.exp(s - new_top), 0.0)
        shrink = tl.exp(top - new_top)
        v = tl.load(values_ptr + at, mask=is_old, other=0.0)
        v += tl.load(v_ptr[None, :] + new_at, mask=is_new, other=0.0).to(dtype)
        acc = acc * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        total, top = total * shrink + tl.sum(p, 0), new_top

    out = head * P + part
    tl.store(o_ptr + out * D + ds, acc, mask=ds < D)
    tl.store(sum_ptr + out, total)
    tl.store(top_ptr + out, top)


@triton.jit
def _project_kernel(
    o_ptr, sum_ptr, top_ptr,     # in:  (R, H, P, D), (R, H, P) each, fp32
    w_ptr, scales_ptr, bias_ptr, # in:  (N, H D), (N,) fp32 or None each
    y_ptr,                       # in and out: (R, N) fp32, the residual stream
    M, N, H,
    D: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    outs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, H * D, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (cols < H * D)[None, :]
        at = (rows[:, None] * H + (cols // D)[None, :]) * P  # of the head's first chunk
        top = tl.full([BLOCK_M, BLOCK_K], -1e30, tl.float32)
        for part in tl.static_range(P):  # unrolled: loads that wait for each other would be slow
            top = tl.maximum(top, tl.load(top_ptr + at + part, mask=mask, other=0.0))
        total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        y = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for part in tl.static_range(P):
            share = tl.exp(tl.load(top_ptr + at + part, mask=mask, other=0.0) - top)
            total += share * tl.load(sum_ptr + at + part, mask=mask, other=0.0)
            o_at = (at + part) * D + (cols % D)[None, :]
            y += share * tl.load(o_ptr + o_at, mask=mask, other=0.0)
        y = y / tl.where(mask, total, 1.0)
        w_mask = (outs < N)[:, None] & (cols < H * D)[None, :]
        w = tl.load(w_ptr + outs[:, None] * H * D + cols[None, :], mask=w_mask, other=0.0)
        acc += tl.sum(y[:, None, :] * w.to(tl.float32)[None, :, :], 2)
    _finish(acc, y_ptr, scales_ptr, bias_ptr, y_ptr, rows, outs, M, N, False, False)


def _linear_config(M: int, N: int, K: int) -> dict[str, int]:
    """About two programs a multiprocessor where the outputs are few. Not measured on a GPU yet."""
    block_n = 16 if N > 16384 else 4
    block_k = min(power_of_2(K), max(64, 1024 // power_of_2(M)))
    return dict(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4)


def _attend_config(S: int, D: int, R: int) -> dict[str, int]:
    """Chunks that make a few programs a head; of many rows the heads are enough. Not measured on
    any GPU yet.
    """
    chunk = max(64, power_of_2(cdiv(S, 16) if R <= MAX_ROWS else S))
    return dict(CHUNK=chunk, BLOCK_S=min(chunk, 4096 // power_of_2(D)), num_warps=4)


def embed(out: Tensor, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    """ids, positions (B,), wte (V, C), wpe (block_size, C), rows contiguous -> out (B, C) fp32."""
    B, C = out.shape
    launch(_embed_kernel, B, ids, positions, wte, wpe, out, C, BLOCK_C=power_of_2(C), num_warps=4)


def linear(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None,
    norm: tuple[Tensor, Tensor | None] | None = None, residual: Tensor | None = None,
    approximate: str | None = None,
) -> None:  # fmt: skip
    """x (M, K) fp32, weight (N, K) -> out (M, N) fp32, which may be `residual`; all contiguous."""
    if len(x) > MAX_ROWS:
        _linear_of_many(out, x, weight, bias, norm, residual, approximate)
        return
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    (M, K), N = x.shape, values.shape[0]
    norm_w, norm_b = norm or (None, None)
    config = configured(x, "decode_linear", _linear_config, M, N, K)
    launch(_linear_kernel, cdiv(N, config["BLOCK_N"]), x, values, scales, bias, norm_w, norm_b,
           residual, out, M, N, K, 1e-5, GELU=approximate is not None, TANH=approximate == "tanh",
           BLOCK_M=power_of_2(M), **config)  # fmt: skip


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


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (R, 3HD) fp32, keys, values (B, H, S, D), written to at `positions` (R,), none of them
    beyond `longest` -> o (R, H, P, D), sums, maxima (R, H, P) of P chunks, fp32.
    """
    (B, H, S, D), R = keys.shape, len(qkv)
    config = configured(keys, "decode_attend", _attend_config, S, D, R)
    P = cdiv(longest + 1, config["CHUNK"])
    o = torch.empty(R, H, P, D, device=qkv.device, dtype=torch.float32)
    sums, tops = (torch.empty(R, H, P, device=qkv.device, dtype=torch.float32) for _ in range(2))
    launch(_attend_kernel, R * H * P, qkv, keys, values, positions, o, sums, tops,
           H, S, P, R // B, D**-0.5, D=D, BLOCK_D=power_of_2(D), **config)  # fmt: skip
    return o, sums, tops


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, longest: int,
    weight: Weight, bias: Tensor | None,
) -> None:  # fmt: skip
    """out (R, N) fp32 += attention @ weight (N, HD).T + bias, for `attend`'s arguments."""
    o, sums, tops = attend(qkv, keys, values, positions, longest)
    if len(qkv) > MAX_ROWS:
        share = torch.exp(tops - tops.amax(2, keepdim=True))[..., None]
        y = (share * o).sum(2) / (share * sums[..., None]).sum(2)
        _linear_of_many(out, y.flatten(1), weight, bias, None, out, None)
        return
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    (R, H, P, D), N = o.shape, values.shape[0]
    block_k = min(power_of_2(H * D), max(64, 1024 // power_of_2(R)))
    # 4 warps would hold 16 chunks' loads in more registers than there are
    launch(_project_kernel, cdiv(N, 4), o, sums, tops, values, scales, bias, out, R, N, H,
           D=D, P=P, BLOCK_M=power_of_2(R), BLOCK_N=4, BLOCK_K=block_k,
           num_warps=8 if P > 8 else 4)  # fmt: skip


def advance(positions: Tensor, last: Tensor) -> None:
    """positions (R,) += 1, up to `last` (R,)"""
    torch.minimum(positions.add_(1), last, out=positions)


def unsupported(tensors: tuple[Tensor, ...], head_dim: int, rows: int = 1) -> str | None:
    """Why a step with such a cache cannot run here, or None."""
    if head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim} is more than {MAX_HEAD_DIM}"
    if tensors[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {tensors[0].dtype} is not float32, float16 or bfloat16"
    return device_problem(tensors[0])
