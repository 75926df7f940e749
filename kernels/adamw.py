"""AdamW on every parameter in one launch: unscaling, clipping, the update, and the weights' copy.

    g = scale * grad            m = m + (1 - beta1) * (g - m)     v = beta2 * v + (1 - beta2) * g^2
    p = p * (1 - lr * decay) - lr / c1 * m / (sqrt(v / c2) + eps)   copy = p in the matmuls' dtype

with c_i = 1 - beta_i^step. The operands are many tensors of many sizes, so their addresses come
from a table, and a program takes CHUNK elements of one tensor. `sum_of_squares` reads the gradients
once for their norm; from it follow, on the device and without a wait of the host, the scale, and
whether this step is taken at all: a scale of NaN leaves everything as it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._launch import device_problem, launch

CHUNK = 4096  # elements per program: about 112 KB of traffic. Not measured on any GPU yet


@triton.jit
def _square_kernel(
    table_ptr,   # in:  (P, 6) int64: addresses of p, m, v, copy or 0, and grad; elements
    chunks_ptr,  # in:  (chunks, 2) int64: tensor, first element
    out_ptr,     # out: (chunks,) fp32
    CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + 6 * tl.load(chunks_ptr + 2 * chunk)
    at = tl.load(chunks_ptr + 2 * chunk + 1) + tl.arange(0, CHUNK)
    g_ptrs = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + at
    g = tl.load(g_ptrs, mask=at < tl.load(row + 5), other=0.0)
    tl.store(out_ptr + chunk, tl.sum(g * g, axis=0))


@triton.jit
def _adamw_kernel(
    table_ptr, chunks_ptr,                  # in: (P, 6), (chunks, 2)
    scale_ptr, corrections_ptr, decay_ptr,  # in: () fp32, (P, 2) fp32: c1, c2, (P,) fp32
    copy_ptr,                               # any tensor in the copies' dtype, not read
    lr, beta1, beta2, eps,
    CHUNK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    if scale == scale:
        chunk = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks_ptr + 2 * chunk)
        row = table_ptr + 6 * tensor
        at = tl.load(chunks_ptr + 2 * chunk + 1) + tl.arange(0, CHUNK)
        mask = at < tl.load(row + 5)
        p_ptrs = tl.load(row).to(tl.pointer_type(tl.float32)) + at
        m_ptrs = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + at
        v_ptrs = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at
        g_ptrs = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + at
        g = tl.load(g_ptrs, mask=mask, other=0.0) * scale
        m = tl.load(m_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        p = tl.load(p_ptrs, mask=mask, other=0.0)

        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        denominator = tl.sqrt(v / tl.load(corrections_ptr + 2 * tensor + 1)) + eps
        p *= 1 - lr * tl.load(decay_ptr + tensor)
        p -= lr / tl.load(corrections_ptr + 2 * tensor) * m / denominator

        tl.store(m_ptrs, m, mask=mask)
        tl.store(v_ptrs, v, mask=mask)
        tl.store(p_ptrs, p, mask=mask)
        copy = tl.load(row + 3)
        if copy != 0:
            copy_ptrs = copy.to(copy_ptr.dtype) + at
            tl.store(copy_ptrs, p.to(copy_ptr.dtype.element_ty), mask=mask)


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
    """Of all gradients, () fp32. table (P, 6) int64, chunks (chunks, 2) int64."""
    out = torch.empty(len(chunks), device=table.device, dtype=torch.float32)
    launch(_square_kernel, len(chunks), table, chunks, out, CHUNK=CHUNK, num_warps=8)
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
           lr, *betas, eps, CHUNK=CHUNK, num_warps=8)  # fmt: skip


def unsupported(tensors: tuple[Tensor, ...]) -> str | None:
    """Why these kernels cannot update such parameters, or None."""
    if any(t.dtype != torch.float32 for t in tensors):
        return "parameters are not all float32"
    if not all(t.is_contiguous() for t in tensors):
        return "a parameter is not contiguous"
    return device_problem(tensors[0])
