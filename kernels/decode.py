"""A decoding step for few rows: every weight is read once, and the cache once.

    embed           x = wte[id] + wpe[position]
    linear          y = [residual +] [gelu] ([norm](x) @ w.T + bias), in decode_linear.py
    attend_project  x += softmax(q @ K.T / sqrt(D)) @ V @ w.T + bias,  K and V up to the position

Attention splits the keys of a head into chunks, a program each (flash decoding, arXiv 2311.01282);
the program whose chunk a new token falls into writes its key and value. Rows may be texts, or
tokens of one that follow each other: these see each other in qkv, where no program writes. Chunks
leave o, not divided by its sum, the sum and the maximum. Of one row the projection's programs join
them while they read: five launches a layer, six for several rows. What a kernel may do before the
one in front of it has ended is said in decode_linear.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._launch import (
    cdiv,
    device_problem,
    early,
    launch,
    power_of_2,
    start_next,
    wait,
)
from fastgpt.kernels._tuned import configured
from fastgpt.kernels.decode_linear import Weight, given, linear

MAX_CHUNKS = 16  # that the projection's programs join
MAX_HEAD_DIM = 256


@triton.jit
def _embed_kernel(
    ids_ptr, positions_ptr, wte_ptr, wpe_ptr,  # in: (B,) int64, (B,) int32, (V, C), (S, C)
    x_ptr,                                     # out: (B, C), NaN for an id outside the vocabulary
    V, C, EARLY: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if EARLY:
        start_next()
    b = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C).to(tl.int64)
    mask, token_id = cols < C, tl.load(ids_ptr + b)
    known = mask & (token_id >= 0) & (token_id < V)
    token = tl.load(wte_ptr + token_id * C + cols, mask=known, other=float("nan")).to(tl.float32)
    position = tl.load(positions_ptr + b).to(tl.int64)
    token += tl.load(wpe_ptr + position * C + cols, mask=mask).to(tl.float32)
    tl.store(x_ptr + b * C + cols, token, mask=mask)


@triton.jit
def _attend_kernel(
    qkv_ptr, keys_ptr, values_ptr, positions_ptr,  # (R, 3HD) fp32, (B, H, S, D) each, (R,) int32
    o_ptr, sum_ptr, top_ptr,                       # out: (R, H, P, D), (R, H, P) each, fp32
    H, S, P, NEW, scale,
    D: tl.constexpr, ALONE: tl.constexpr, EARLY: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if EARLY:
        start_next()
    part, head = tl.program_id(0) % P, (tl.program_id(0) // P).to(tl.int64)
    r, h = head // H, head % H
    position = tl.load(positions_ptr + r)
    old = position - r % NEW  # keys of the cache: behind them are the rows of this step
    cache = (r // NEW * H + h) * S
    ts, ds = part * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    at = (cache + ts)[:, None] * D + ds[None, :]
    is_old = (ts < old)[:, None] & (ds < D)[None, :]
    k = tl.load(keys_ptr + at, mask=is_old, other=0.0)
    v = tl.load(values_ptr + at, mask=is_old, other=0.0)
    if EARLY:
        wait()

    q_ptr = qkv_ptr + h * D + ds
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    dtype: tl.constexpr = keys_ptr.dtype.element_ty  # what new keys and values are rounded to
    q = tl.load(q_ptr + r * 3 * H * D, mask=ds < D, other=0.0) * scale
    new_k = tl.load(k_ptr + r * 3 * H * D, mask=ds < D, other=0.0).to(dtype)
    new_v = tl.load(v_ptr + r * 3 * H * D, mask=ds < D, other=0.0).to(dtype)
    own = (ts == position)[:, None]
    k, v = tl.where(own, new_k[None, :], k), tl.where(own, new_v[None, :], v)
    if NEW != 1:
        between_at = (r - position + ts)[:, None] * 3 * H * D
        between = ((ts >= old) & (ts < position))[:, None] & (ds < D)[None, :]
        k += tl.load(k_ptr[None, :] + between_at, mask=between, other=0.0).to(dtype)
        v += tl.load(v_ptr[None, :] + between_at, mask=between, other=0.0).to(dtype)
    if position // CHUNK == part:
        own_at = (cache + position) * D + ds
        tl.store(keys_ptr + own_at, new_k, mask=ds < D)
        tl.store(values_ptr + own_at, new_v, mask=ds < D)

    s = tl.sum(q[None, :] * k.to(tl.float32), 1)
    s = tl.where(ts <= position, s, -1e30)  # finite: a chunk behind the position leaves a sum of 0
    top = tl.max(s, 0)
    p = tl.where(ts <= position, tl.exp(s - top), 0.0)
    total = tl.sum(p, 0)
    o = tl.sum(p[:, None] * v.to(tl.float32), 0)
    out = head * P + part
    if ALONE:
        o /= total
    else:
        tl.store(sum_ptr + out, total)
        tl.store(top_ptr + out, top)
    tl.store(o_ptr + out * D + ds, o, mask=ds < D)


@triton.jit
def _join_kernel(
    o_ptr, sum_ptr, top_ptr,  # in:  (R, H, P, D), (R, H, P) each, fp32
    y_ptr,                    # out: (R, H, D) fp32
    P, D: tl.constexpr, EARLY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if EARLY:
        start_next()
        wait()
    head = tl.program_id(0).to(tl.int64)
    parts, ds = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    tops = tl.load(top_ptr + head * P + parts, mask=parts < P, other=-1e30)
    sums = tl.load(sum_ptr + head * P + parts, mask=parts < P, other=0.0)
    mask = (parts < P)[:, None] & (ds < D)[None, :]
    o = tl.load(o_ptr + (head * P + parts)[:, None] * D + ds[None, :], mask=mask, other=0.0)
    share = tl.exp(tops - tl.max(tops, 0))
    y = tl.sum(share[:, None] * o, 0) / tl.sum(share * sums, 0)
    tl.store(y_ptr + head * D + ds, y, mask=ds < D)


@triton.jit
def _project_kernel(
    o_ptr, sum_ptr, top_ptr,     # in:  (H, P, D), (H, P) each, fp32
    w_ptr, scales_ptr, bias_ptr, # in:  (N, H D), (N,) fp32 or None each
    y_ptr,                       # in and out: (N,) fp32, the residual stream
    N,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    if EARLY:
        start_next()
    outs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    heads, ds = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    head_mask = (heads < H)[:, None] & (ds < D)[None, :]
    w_at = outs[:, None, None] * (H * D) + heads[None, :, None] * D + ds[None, None, :]
    w_mask = (outs < N)[:, None, None] & head_mask[None, :, :]
    w = tl.load(w_ptr + w_at, mask=w_mask, other=0.0)
    scale, bias = given(scales_ptr, outs, outs < N, 1.0), given(bias_ptr, outs, outs < N, 0.0)
    if EARLY:
        wait()
    residual = tl.load(y_ptr + outs, mask=outs < N, other=0.0)
    parts = tl.arange(0, BLOCK_P)
    at = heads[None, :] * P + parts[:, None]
    mask = (heads < H)[None, :] & (parts < P)[:, None]
    tops = tl.load(top_ptr + at, mask=mask, other=-1e30)
    sums = tl.load(sum_ptr + at, mask=mask, other=0.0)
    o_at, o_mask = (
        at[:, :, None] * D + ds[None, None, :],
        mask[:, :, None] & (ds < D)[None, None, :],
    )
    o = tl.load(o_ptr + o_at, mask=o_mask, other=0.0)
    share = tl.exp(tops - tl.max(tops, 0)[None, :])
    total = tl.where(heads < H, tl.sum(share * sums, 0), 1.0)
    y = tl.sum((share / total[None, :])[:, :, None] * o, 0)
    z = tl.sum(tl.sum(w.to(tl.float32) * y[None, :, :], 2), 1)
    tl.store(y_ptr + outs, z * scale + bias + residual, mask=outs < N)


def _attend_config(D: int, R: int) -> dict[str, int]:
    """Among the fastest of 12 for heads of 64 on an H200, 1, 8 and 64 rows, of those that do not
    spill.
    """
    chunk, warps = (64, 2) if R == 1 else (64, 8) if R <= 16 else (32, 1)
    return dict(CHUNK=chunk, num_warps=min(16, max(1, warps * power_of_2(D) // 64)))


def _project_config(N: int, K: int, P: int) -> dict[str, int]:
    """Warps whose threads hold 128 numbers of the chunks: the fastest of 17 at 124M on an H200. K
    as it is padded.
    """
    return dict(BLOCK_N=2, num_warps=min(16, max(1, K * power_of_2(P) // 4096)))


def embed(out: Tensor, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    """ids, positions (B,), wte (V, C), wpe (block_size, C), rows contiguous -> out (B, C) fp32; NaN
    for an id outside the vocabulary, which a caller's own torch.multinomial may have drawn.
    """
    B, C = out.shape
    launch(_embed_kernel, B, ids, positions, wte, wpe, out, len(wte), C,
           EARLY=early(out)["EARLY"],
           BLOCK_C=power_of_2(C), num_warps=4)  # fmt: skip


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bucket: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (R, 3HD) fp32, keys, values (B, H, S, D), written to at `positions` (R,), all of them
    below `bucket` -> o (R, H, P, D), sums, maxima (R, H, P) of P chunks, fp32. A single chunk is
    divided by its sum, and neither sums nor maxima are written.
    """
    (B, H, S, D), R = keys.shape, len(qkv)
    config = configured(keys, "decode_attend", _attend_config, D, power_of_2(R))
    P = cdiv(bucket, config["CHUNK"])
    o = torch.empty(R, H, P, D, device=qkv.device, dtype=torch.float32)
    sums, tops = (torch.empty(R, H, P, device=qkv.device, dtype=torch.float32) for _ in range(2))
    launch(_attend_kernel, R * H * P, qkv, keys, values, positions, o, sums, tops,
           H, S, P, R // B, D**-0.5, D=D, ALONE=P == 1, BLOCK_D=power_of_2(D), **early(qkv),
           **config)  # fmt: skip
    return o, sums, tops


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bucket: int,
    weight: Weight, bias: Tensor | None,
) -> None:  # fmt: skip
    """out (R, N) fp32 += attention @ weight (N, HD).T + bias, for `attend`'s arguments."""
    o, sums, tops = attend(qkv, keys, values, positions, bucket)
    if len(qkv) == 1 and 1 < o.shape[2] <= MAX_CHUNKS:
        _project(out, o, sums, tops, weight, bias)
        return
    y = o.flatten(1) if o.shape[2] == 1 else _join(o, sums, tops)
    linear(out, y, weight, bias, residual=out)


def _join(o: Tensor, sums: Tensor, tops: Tensor) -> Tensor:
    """`attend`'s chunks -> (R, HD) fp32"""
    R, H, P, D = o.shape
    y = torch.empty(R, H * D, device=o.device, dtype=torch.float32)
    launch(_join_kernel, R * H, o, sums, tops, y, P, D=D, BLOCK_P=power_of_2(P),
           BLOCK_D=power_of_2(D), **early(o), num_warps=4)  # fmt: skip
    return y


def _project(
    out: Tensor, o: Tensor, sums: Tensor, tops: Tensor, weight: Weight, bias: Tensor | None
) -> None:
    """Both for a single row: its chunks are joined by each program that needs them."""
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    (_, H, P, D), N = o.shape, values.shape[0]
    block_h, block_d = power_of_2(H), power_of_2(D)
    config = configured(o, "decode_project", _project_config, N, block_h * block_d, P)
    launch(_project_kernel, cdiv(N, config["BLOCK_N"]), o, sums, tops, values, scales, bias, out, N,
           H=H, D=D, P=P, BLOCK_H=block_h, BLOCK_D=block_d, BLOCK_P=power_of_2(P),
           **early(o), **config)  # fmt: skip


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
