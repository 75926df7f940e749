"""The two ends of a GPT as autograd units: embeddings, and the head with its loss.

    x = wte[idx] + wpe[:T]                    dwte[idx] += dx      dwpe[:T] = sum over B of dx
    losses = cross_entropy(x @ w.T, targets)  dlogits = softmax(logits) - onehot(targets)

wte and the head's w are one parameter. Its gradient through the head is dense, through the
embedding N rows: `embed` hands the head an alias of the weight, so that the head's gradient comes
back to `embed`, which adds its rows to it. A second dense gradient, and the sum of the two, never
exist.

`LinearCrossEntropy` lets the logits become their own gradient in one pass, at the forward.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.implementations.aten import matmul, scaled
from fastgpt.kernels._autograd import differentiable_once

# Bytes of logits at once, beyond which the rows are taken in chunks; and rows per chunk at least:
# fewer would not fill a GPU, while a CPU is soon filled and its memory less.
CHUNKS = {"cuda": (2**31, 4096), "cpu": (2**28, 1024)}


def embed(
    add_rows_: Callable[..., None], idx: Tensor, wte: Tensor, wpe: Tensor
) -> tuple[Tensor, Tensor]:
    """idx (B, T), wte (V, C), wpe (block_size, C) -> x (B, T, C), and wte for the head."""
    return _Embed.apply(add_rows_, idx, wte, wpe)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, add_rows_, idx, wte, wpe):
        ctx.add_rows_, ctx.sizes = add_rows_, (wte.shape, wpe.shape)
        ctx.save_for_backward(idx)
        ctx.set_materialize_grads(False)
        x = F.embedding(idx, wte) + wpe[: idx.shape[1]]
        return x, wte.view_as(wte)

    @staticmethod
    def backward(ctx, dx, dwte):
        differentiable_once()
        (idx,) = ctx.saved_tensors
        wte_shape, wpe_shape = ctx.sizes
        if dx is None:
            return None, None, dwte, None
        if dwte is None:  # the head took no part in the loss
            dwte = dx.new_zeros(wte_shape)
        if ctx.needs_input_grad[2]:
            # the head's matmul made this tensor for us alone: nobody else can reach the alias
            ctx.add_rows_(dwte, idx.flatten(), dx.reshape(-1, dx.shape[-1]))
        dwpe = dx.new_zeros(wpe_shape)
        dwpe[: idx.shape[1]] = dx.sum(0)
        return None, None, dwte, dwpe


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, C), w (V, C), low_w its values in x's dtype, targets (N,) -> mean loss, an fp32 scalar.

    `cross_entropy_(logits, targets, ignore_index, factor)` gives losses (N,) and leaves
    factor * dlosses/dlogits in the logits. These are kept for the backward; where the logits of all
    rows are too large for that, chunks of rows give their part of dx and dw at once instead.

    fp16 holds a gradient only times the loss scale, which arrives in the backward. Until then
    dlogits are 2^15 times too large, which is as much as fits, and their products are fp32.
    """

    @staticmethod
    def forward(ctx, cross_entropy_, x, w, low_w, targets, ignore_index):
        ctx.factor = 2.0**15 if x.dtype == torch.float16 else 1.0
        ctx.wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # of dlogits @ w
        ctx.dtypes = x.dtype, w.dtype
        count = (targets != ignore_index).sum()
        max_bytes, min_rows = CHUNKS.get(x.device.type, CHUNKS["cuda"])
        rows = max(min_rows, max_bytes // (w.shape[0] * x.element_size()))
        ctx.chunked = len(x) > rows
        if not ctx.chunked:
            logits = x @ low_w.t()
            losses = cross_entropy_(logits, targets, ignore_index, ctx.factor)
            ctx.save_for_backward(logits, x, low_w, count)
            return losses.sum() / count
        needs_x, needs_w = ctx.needs_input_grad[1:3]
        dx = torch.empty_like(x, dtype=ctx.wide) if needs_x else None
        dw = torch.zeros_like(w, dtype=torch.float32) if needs_w else None
        losses = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = x[part] @ low_w.t()
            losses.append(cross_entropy_(logits, targets[part], ignore_index, ctx.factor))
            if dx is not None:
                dx[part] = matmul(logits, low_w, ctx.wide)
            if dw is not None and dw.dtype == x.dtype:
                dw.addmm_(logits.t(), x[part])
            elif dw is not None:
                dw += matmul(logits.t(), x[part], dw.dtype)
            del logits  # before the next chunk's are allocated
        ctx.save_for_backward(dx, dw, count)
        return torch.cat(losses).sum() / count

    @staticmethod
    def backward(ctx, dloss):
        differentiable_once()
        *saved, count = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[1:3]
        x_dtype, w_dtype = ctx.dtypes
        scale = dloss / count.clamp(min=1) / ctx.factor
        if ctx.chunked:
            dx, dw = saved
            dx = scaled(dx, scale, x_dtype) if needs_x else None
            dw = scaled(dw, scale, w_dtype) if needs_w else None
            return None, dx, dw, None, None, None
        dlogits, x, low_w = saved
        dx = scaled(matmul(dlogits, low_w, ctx.wide), scale, x_dtype) if needs_x else None
        dw = None
        if needs_w and x_dtype == torch.float16:  # where x * scale would be flushed to zero
            dw = scaled(matmul(dlogits.t(), x, torch.float32), scale, w_dtype)
        elif needs_w:
            dw = matmul(dlogits.t(), scaled(x, scale, x_dtype), w_dtype)
        return None, dx, dw, None, None, None
