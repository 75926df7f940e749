"""What forward and backward attention kernels share: tiles of a head, program order, dropout."""

import triton
import triton.language as tl

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
