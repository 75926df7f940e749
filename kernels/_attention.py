"""What forward and backward attention kernels share: tiles of a head, program order, dropout.

A tile that a program walks over is loaded by TMA or by pointers, as the constant TMA says. With a
descriptor of the head the hardware computes addresses and reads 0 outside (T, D), which takes fewer
instructions and registers; both read the same.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._launch import DESCRIPTORS, has_tma, multiplies_shared_memory

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is the hardware's exponential


@triton.jit
def load_rows(ptr, rows, stride_t, stride_d, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A (rows, BLOCK_D) tile of one head; 0 outside (T, D)."""
    ds = tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None]
    if D != BLOCK_D:
        mask = mask & (ds < D)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_t + ds.to(tl.int64)[None, :] * stride_d
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def tiles_of(
    ptr, stride_t, T,
    TMA: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What load_tile reads one head's (T, D) from: a descriptor, or ptr as it is."""
    if TMA:
        return _described_tiles(ptr, stride_t, T, D, BLOCK, BLOCK_D)
    else:
        return ptr


@triton.jit
def parts_of(ptr, T, TMA: tl.constexpr, BLOCK: tl.constexpr):
    """What load_part reads one head's (T,) fp32 from."""
    if TMA:
        return _described_parts(ptr, T, BLOCK)
    else:
        return ptr


def _described_tiles(ptr, stride_t, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.make_tensor_descriptor(ptr, [T, D], [stride_t, 1], [BLOCK, BLOCK_D])


def _described_parts(ptr, T, BLOCK: tl.constexpr):
    return tl.make_tensor_descriptor(ptr, [T], [1], [BLOCK])


if DESCRIPTORS:  # else Triton would look for the name above, whatever TMA is
    _described_tiles = triton.jit(_described_tiles)
    _described_parts = triton.jit(_described_parts)


@triton.jit
def load_tile(
    tiles, start, stride_t, stride_d, T,
    TMA: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The (BLOCK, BLOCK_D) tile from row `start` on; 0 outside (T, D)."""
    if TMA:
        return tiles.load([start, 0])
    else:
        return load_rows(tiles, start + tl.arange(0, BLOCK), stride_t, stride_d, T, D, BLOCK_D)


@triton.jit
def load_part(parts, start, T, TMA: tl.constexpr, BLOCK: tl.constexpr):
    """The (BLOCK,) numbers from `start` on; 0 outside (T,)."""
    if TMA:
        return parts.load([start])
    else:
        rows = start + tl.arange(0, BLOCK)
        return tl.load(parts + rows, mask=rows < T, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, stride_t, stride_d, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    ds = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_t + ds.to(tl.int64)[None, :] * stride_d
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(rows < T)[:, None] & (ds < D)[None, :])


@triton.jit
def kept_scores(seed, head, rows, cols, dropout_p):
    """Which scores dropout keeps; rows and cols broadcast against each other."""
    zero = (rows + cols) * 0
    draw, _, _, _ = tl.philox(seed, cols + zero, rows + zero, head + zero, zero)
    return tl.uint_to_uniform_float(draw) >= dropout_p


@triton.jit
def head_and_block(block_size: tl.constexpr, T, H):
    """Program id -> (block of T, b*H + h, b, h). Blocks of one head run together and share its k, v
    in L2.
    """
    blocks = tl.cdiv(T, block_size)
    head = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, head, (head // H).to(tl.int64), (head % H).to(tl.int64)


def describable(*heads: Tensor) -> bool:
    """Whether TMA should load tiles of these (B, H, T, D): the GPU has it and gains from it (of
    what is wider than 16 bits it does not), and each head can be described to it.
    """
    return (
        has_tma(heads[0])
        and multiplies_shared_memory(heads[0])
        and all(
            t.element_size() == 2
            and t.stride(3) == 1
            and t.stride(2) >= t.shape[3]
            and all(stride % 8 == 0 for stride in t.stride()[:3])  # multiples of 16 bytes
            and t.data_ptr() % 16 == 0
            for t in heads
        )
    )
