"""The MLP's two GEMMs next to GELU, each with GELU in its epilogue, for GPUs with TMA.

    fc      h  = x @ w.T + b             y = gelu(h)
    dgrad   dh = (dy @ w) * gelu'(h)     y = gelu(h)     db = sum over rows of dh

As many programs as the GPU has multiprocessors walk over the output's tiles. Tiles and K are one
loop, so that the next tile's operands are loaded during an epilogue. Tensors are read and written
through descriptors: the hardware computes the addresses, reads 0 beyond the ends and stores nothing
there. h, and the product in dgrad, are rounded to their dtype before they are used further, as if
each op were a separate pass.

With SPECIALIZED some warps only load and the others only compute; the compiler can do that for fc
with PARTS=1 and 4 warps. PARTS=2 halves the registers that the epilogue needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._launch import cdiv, has_tma, launch_with_descriptors, multiprocessors
from fastgpt.kernels._math import gelu, gelu_and_grad
from fastgpt.kernels._tuned import configured
from fastgpt.kernels.gelu import gelu_gradients


@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the index-th tile. GROUP_M row blocks are walked per column block, so that
    tiles computed at the same time share rows of x and w in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = index // (GROUP_M * tiles_n)
    inside = index % (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def _fc_kernel(
    x_ptr, w_ptr, b_ptr,  # in:  (M, K), (N, K), (N,) or None
    h_ptr, y_ptr,         # out: (M, N), (M, N)
    stride_xm, stride_wn,
    M, N, K,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    h = tl.make_tensor_descriptor(h_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // PARTS])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // PARTS])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0),
        flatten=not SPECIALIZED, warp_specialize=SPECIALIZED,
    ):  # fmt: skip
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x.load([row, k]), w.load([col, k]).T, acc, input_precision="ieee")
        if b_ptr is not None:
            cols = col + tl.arange(0, BLOCK_N)
            acc += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if PARTS == 2:
            left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            _store_gelu(h, y, left, row, col, TANH)
            _store_gelu(h, y, right, row, col + BLOCK_N // 2, TANH)
        else:
            _store_gelu(h, y, acc, row, col, TANH)


@triton.jit
def _store_gelu(h, y, acc, row, col, TANH: tl.constexpr):
    rounded = acc.to(h.dtype)
    h.store([row, col], rounded)
    y.store([row, col], gelu(rounded.to(tl.float32), TANH, h.dtype).to(y.dtype))


@triton.jit
def _dgrad_kernel(
    dy_ptr, w_ptr, h_ptr,   # in:  (M, K), (K, N), (M, N)
    dh_ptr, y_ptr, db_ptr,  # out: (M, N), (M, N) or None, partials (row blocks, N) fp32 or None
    stride_dym, stride_wk,
    M, N, K,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    dy = tl.make_tensor_descriptor(dy_ptr, [M, K], [stride_dym, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_wk, 1], [BLOCK_K, BLOCK_N])
    h = tl.make_tensor_descriptor(h_ptr, [M, N], [N, 1], [BLOCK_M, HALF])
    dh = tl.make_tensor_descriptor(dh_ptr, [M, N], [N, 1], [BLOCK_M, HALF])
    y = dh
    if y_ptr is not None:
        y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, HALF])
    for index in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0),
        flatten=True,
    ):  # fmt: skip
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(dy.load([row, k]), w.load([k, col]), acc, input_precision="ieee")
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _store_dgelu(h, dh, y, y_ptr, db_ptr, left, tile_m, row, col, N, TANH)
        _store_dgelu(h, dh, y, y_ptr, db_ptr, right, tile_m, row, col + HALF, N, TANH)


@triton.jit
def _store_dgelu(h, dh, y, y_ptr, db_ptr, acc, tile_m, row, col, N, TANH: tl.constexpr):
    pre = h.load([row, col]).to(tl.float32)
    activation, slope = gelu_and_grad(pre, TANH, h.dtype)
    grad = acc.to(dh.dtype).to(tl.float32) * slope
    dh.store([row, col], grad.to(dh.dtype))
    if y_ptr is not None:
        y.store([row, col], activation.to(y.dtype))
    if db_ptr is not None:  # rows beyond the end add 0, as dy has none
        cols = col + tl.arange(0, acc.shape[1])
        tl.store(db_ptr + tile_m.to(tl.int64) * N + cols, tl.sum(grad, axis=0), mask=cols < N)


def _fc_config() -> dict[str, int]:
    """128x256 tiles, which cuBLAS would take, spill beside erf. On an H200 slower than
    cuBLAS and a pass over its result, as dgrad is."""
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, PARTS=2, SPECIALIZED=False,
                num_warps=8, num_stages=4)  # fmt: skip


# Not searched by `fastgpt tune`: a race in the compiler's barriers would show only at times.
SPECIALIZED = _fc_config() | dict(PARTS=1, SPECIALIZED=True, num_warps=4, num_stages=3)


def _dgrad_config() -> dict[str, int]:
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=4)


def takes(*tensors: Tensor) -> bool:
    """Whether the GPU has TMA, these matrices can be described to it, and they are of 16 bits: of
    wider ones half a tile would fill shared memory.
    """
    return has_tma(tensors[0]) and all(
        t.element_size() == 2
        and t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0  # rows start at multiples of 16 bytes
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def fc(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), w (N, K), b (N,), N a multiple of 8 -> h, gelu(h), both (M, N)."""
    (M, K), N = x.shape, w.shape[0]
    h = torch.empty(M, N, device=x.device, dtype=x.dtype)
    y = torch.empty_like(h)
    config = configured(x, "gemm_tma_fc", _fc_config)
    launch_with_descriptors(
        _fc_kernel, _grid(x, N, config), x, w, None if b is None else b.contiguous(), h, y,
        x.stride(0), w.stride(0), M, N, K, TANH=tanh, **config)  # fmt: skip
    return h, y


def dgrad(
    dy: Tensor, w: Tensor, h: Tensor, tanh: bool, with_bias: bool, with_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (M, K), w (K, N), h (M, N) contiguous -> dh (M, N); gelu(h) or (0,); db (N,) or (0,)."""
    (M, K), N = dy.shape, w.shape[1]
    dh, y, db = gelu_gradients(dy, h, tanh, with_bias, with_output)
    config = configured(dy, "gemm_tma_dgrad", _dgrad_config)
    blocks = cdiv(M, config["BLOCK_M"])
    partial = torch.empty(blocks, N, device=h.device, dtype=torch.float32) if with_bias else None
    launch_with_descriptors(
        _dgrad_kernel, _grid(dy, N, config), dy, w, h, dh, y if with_output else None, partial,
        dy.stride(0), w.stride(0), M, N, K, TANH=tanh, **config)  # fmt: skip
    if partial is not None:
        db.copy_(partial.sum(0))
    return dh, y, db


def _grid(x: Tensor, N: int, config: dict[str, int]) -> int:
    tiles = cdiv(x.shape[0], config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    return min(tiles, multiprocessors(x))
