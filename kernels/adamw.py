"""AdamW on every parameter in one launch: unscaling, clipping, the update, and the weights' copy.

    g = scale * grad            m = m + (1 - beta1) * (g - m)     v = beta2 * v + (1 - beta2) * g^2
    p = p * (1 - lr * decay) - lr / c1 * m / (sqrt(v / c2) + eps)   copy = p in the matmuls' dtype

with c_i = 1 - beta_i^step. The operands are many tensors of many sizes, so their addresses come
from a table. A program updates CHUNK elements of one tensor, BLOCK at a time: without masks and 128
bits a thread if the block lies within the tensors and these begin at multiples of 16 bytes, as
nearly all do. `sum_of_squares` reads the gradients once for their norm. From that the scale is
computed on the device, so the host does not wait; a scale of NaN skips the step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._launch import device_problem, launch

CHUNK = 8192  # elements per program: about 224 KB of traffic; on an H200 1 % off the fastest of 11
TILE = dict(CHUNK=CHUNK, BLOCK=1024, num_warps=8)


@triton.jit
def _pointers(address, at, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    first = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        first = tl.multiple_of(first, 16)  # after the cast: Triton forgets it of an integer
    return first + at


@triton.jit
def _square_kernel(
    table_ptr,   # in:  (P, 6) int64: addresses of p, m, v, copy or 0, and grad; elements
    chunks_ptr,  # in:  (chunks, 2) int64: tensor, first element
    out_ptr,     # out: (chunks,) fp32
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + 6 * tl.load(chunks_ptr + 2 * chunk)
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), CHUNK)
    size, grad = tl.load(row + 5), tl.load(row + 4)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(first, tl.minimum(first + CHUNK, size), BLOCK):
        at = start + tl.arange(0, BLOCK)
        if (start + BLOCK <= size) & (grad % 16 == 0):
            g = tl.load(_pointers(grad, at, tl.float32, True))
        else:
            g = tl.load(_pointers(grad, at, tl.float32, False), mask=at < size, other=0.0)
        squares += g * g
    tl.store(out_ptr + chunk, tl.sum(squares, axis=0))


@triton.jit
def _adamw_kernel(
    table_ptr, chunks_ptr,                  # in: (P, 6), (chunks, 2)
    scale_ptr, corrections_ptr, decay_ptr,  # in: () fp32, (P, 2) fp32: c1, c2, (P,) fp32
    copy_ptr,                               # any tensor in the copies' dtype, not read
    lr, beta1, beta2, eps,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    if scale == scale:
        chunk = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks_ptr + 2 * chunk)
        row = table_ptr + 6 * tensor
        p, m, v, copy, grad = (tl.load(row + 0), tl.load(row + 1), tl.load(row + 2),
                               tl.load(row + 3), tl.load(row + 4))  # fmt: skip
        first = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), CHUNK)
        size = tl.load(row + 5)
        aligned = (p | m | v | copy | grad) % 16 == 0
        step1 = lr / tl.load(corrections_ptr + 2 * tensor)
        of_v = 1 / tl.load(corrections_ptr + 2 * tensor + 1)
        keep = 1 - lr * tl.load(decay_ptr + tensor)
        for start in range(first, tl.minimum(first + CHUNK, size), BLOCK):
            at = start + tl.arange(0, BLOCK)
            if aligned & (start + BLOCK <= size):
                _update(p, m, v, copy, grad, at, None, scale, step1, of_v, keep, beta1, beta2, eps,
                        copy_ptr.dtype.element_ty, True)  # fmt: skip
            else:
                _update(p, m, v, copy, grad, at, at < size, scale, step1, of_v, keep, beta1, beta2,
                        eps, copy_ptr.dtype.element_ty, False)  # fmt: skip


@triton.jit
def _update(
    p, m, v, copy, grad,  # addresses, that of copy may be 0
    at, mask,             # (BLOCK,)
    scale, step, of_v, keep, beta1, beta2, eps,
    copy_dtype: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    p_ptrs, m_ptrs = _pointers(p, at, tl.float32, ALIGNED), _pointers(m, at, tl.float32, ALIGNED)
    v_ptrs = _pointers(v, at, tl.float32, ALIGNED)
    g = tl.load(_pointers(grad, at, tl.float32, ALIGNED), mask=mask) * scale
    m, v, p = tl.load(m_ptrs, mask=mask), tl.load(v_ptrs, mask=mask), tl.load(p_ptrs, mask=mask)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * keep - step * m / (tl.sqrt(v * of_v) + eps)
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    tl.store(p_ptrs, p, mask=mask)
    if copy != 0:
        tl.store(_pointers(copy, at, copy_dtype, ALIGNED), p.to(copy_dtype), mask=mask)


def chunks(tensors: list[Tensor]) -> Tensor:
    """(chunks, 2) int64: tensor and first element, for every CHUNK elements of every tensor."""
    pairs = [(i, at) for i, t in enumerate(tensors) for at in range(0, t.numel(), CHUNK)]
    return torch.tensor(pairs, device=tensors[0].device).view(-1, 2)


def table(rows: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]]) -> list[int]:
    """(p, m, v, copy, grad) of each parameter, contiguous, fp32 but for the copy -> flat table."""
    return [
        number
        for p, m, v, copy, grad in rows
        for number in (
            *(t.data_ptr() for t in (p, m, v)),
            copy.data_ptr() if copy is not None else 0,
            grad.data_ptr(),
            p.numel(),
        )
    ]


def sum_of_squares(table: Tensor, chunks: Tensor) -> Tensor:
    """The sum over all gradients, () fp32. table (P, 6) int64, chunks (chunks, 2) int64."""
    out = torch.empty(len(chunks), device=table.device, dtype=torch.float32)
    launch(_square_kernel, len(chunks), table, chunks, out, **TILE)
    return out.sum()


def launch_update(
    table: Tensor, chunks: Tensor, scale: Tensor, corrections: Tensor, decay: Tensor,
    lr: float, betas: tuple[float, float], eps: float, copy_dtype: torch.dtype,
) -> None:  # fmt: skip
    """table (P, 6) int64, chunks (chunks, 2) int64, scale () fp32, corrections (P, 2) fp32, decay
    (P,) fp32. Writes to what the table points to.
    """
    like = torch.empty(0, device=table.device, dtype=copy_dtype)
    launch(_adamw_kernel, len(chunks), table, chunks, scale, corrections, decay, like,
           lr, *betas, eps, **TILE)  # fmt: skip


def unsupported(tensors: tuple[Tensor, ...]) -> str | None:
    """Why these kernels cannot update such parameters, or None."""
    if any(t.dtype != torch.float32 for t in tensors):
        return "parameters are not all float32"
    if not all(t.is_contiguous() for t in tensors):
        return "a parameter is not contiguous"
    return device_problem(tensors[0])
