"""The backward of a table lookup: adds each row of a gradient to the table's row of its id.

    table[ids[i]] += rows[i]        for i in 0..N-1, in that order

A program owns all rows of one id: it starts where the sorted ids change, and adds the rows up in
fp32, a block at a time, in their order. There are no atomics, so the sum has the same bits each
time. Only table rows whose ids occur are read or written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._launch import cdiv, launch, power_of_2, register


@triton.jit
def _add_rows_kernel(
    table_ptr, ids_ptr, order_ptr, rows_ptr,  # (V, C) in and out; in: (N,) sorted, (N,), (N, C)
    stride_tv, stride_tc, stride_rn, stride_rc,
    N, V, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    cols = (tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    id = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    if (id != before) & (id >= 0) & (id < V):
        acc = tl.zeros([BLOCK_C], dtype=tl.float32)
        start = first
        more = True
        while more:
            at = start + tl.arange(0, BLOCK_R)
            same = tl.load(ids_ptr + at, mask=at < N, other=-1) == id
            order = tl.load(order_ptr + at, mask=same, other=0)
            ptrs = rows_ptr + order[:, None] * stride_rn + cols[None, :] * stride_rc
            rows = tl.load(ptrs, mask=same[:, None] & (cols < C)[None, :], other=0.0)
            acc += tl.sum(rows.to(tl.float32), axis=0)
            start += BLOCK_R
            more = tl.sum(same.to(tl.int32), axis=0) == BLOCK_R
        ptrs = table_ptr + id * stride_tv + cols * stride_tc
        acc += tl.load(ptrs, mask=cols < C, other=0.0).to(tl.float32)
        tl.store(ptrs, acc.to(table_ptr.dtype.element_ty), mask=cols < C)


def _config(C: int) -> dict[str, int]:
    """Eight rows in flight, so that a frequent id waits for memory less; nothing else was tried."""
    return dict(BLOCK_R=8, BLOCK_C=min(256, max(16, power_of_2(C))), num_warps=4)


def add_rows_(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """table (V, C), ids (N,) int64 or int32, rows (N, C), any strides and dtypes. An id outside
    [0, V) adds nothing.
    """
    (N, C), V = rows.shape, table.shape[0]
    if N == 0:
        return
    ids, order = torch.sort(ids.long(), stable=True)
    config = _config(C)
    launch(_add_rows_kernel, N * cdiv(C, config["BLOCK_C"]), table, ids, order, rows,
           *table.stride(), *rows.stride(), N, V, C, **config)  # fmt: skip


registered_add_rows_ = register(
    "add_rows_(Tensor(a!) table, Tensor ids, Tensor rows) -> ()",
    add_rows_, lambda table, ids, rows: None)  # fmt: skip
