"""The head and its loss as one autograd unit: logits that become their own gradient in one pass.

logits = x @ w.T      losses = cross_entropy(logits, targets)      loss = mean of counted losses
dlogits = softmax(logits) - onehot(targets)      dx = dlogits @ w      dw = dlogits.T @ x
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.implementations.aten import wgrad
from fastgpt.kernels._autograd import differentiable_once

# Makes losses (N,) fp32 of logits (N, V), targets (N,), ignore_index and factor, and leaves
# factor * dlosses/dlogits in the logits.
InPlace = Callable[[Tensor, Tensor, int, float], Tensor]

# Bytes of logits at once, beyond which the rows are taken in chunks; and rows per chunk at least:
# fewer would not fill a GPU, while a CPU is soon filled and its memory less.
CHUNKS = {"cuda": (2**31, 4096), "cpu": (2**28, 1024)}


def mean_loss(
    cross_entropy_: InPlace,
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> Tensor:
    """ops.linear_cross_entropy of inputs that were checked: an fp32 scalar.

    x (N, C), weight (V, C), targets (N,). `low` is weight in x's dtype, as the matmuls read it;
    the gradient goes to `weight`.
    """
    apply = LinearCrossEntropy.apply
    try:
        return apply(cross_entropy_, x, weight, low, targets, ignore_index)
    except IndexError as error:
        raise with_limits(error, weight.shape[0], ignore_index) from None


def with_limits(error: IndexError, V: int, ignore_index: int) -> IndexError:
    """PyTorch says which target is wrong, but not what would be right."""
    allowed = f"Targets must lie in [0, {V}), the vocabulary, or be ignore_index={ignore_index}"
    return IndexError(f"{error} {allowed}")


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, C), w (V, C), low_w its values in x's dtype, targets (N,) -> mean loss, an fp32 scalar.

    The logits' gradients are kept for the backward; where the logits of all rows are too large for
    that, chunks of rows give their part of dx and dw at once instead.
    """

    @staticmethod
    def forward(ctx, cross_entropy_, x, w, low_w, targets, ignore_index):
        # a power of two, for what fp16 would flush to zero: p < 6e-8
        ctx.factor = 1024.0 if x.dtype == torch.float16 else 1.0
        ctx.dtype = w.dtype
        count = (targets != ignore_index).sum()
        needs_x, needs_w = ctx.needs_input_grad[1:3]
        max_bytes, min_rows = CHUNKS.get(x.device.type, CHUNKS["cuda"])
        rows = max(min_rows, max_bytes // (w.shape[0] * x.element_size()))
        ctx.chunked = len(x) > rows
        if not ctx.chunked:
            logits = x @ low_w.t()
            losses = cross_entropy_(logits, targets, ignore_index, ctx.factor)
            ctx.save_for_backward(logits, x, low_w, count)
            return losses.sum() / count
        dx = torch.empty_like(x) if needs_x else None
        dw, losses = torch.zeros_like(w) if needs_w else None, []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = x[part] @ low_w.t()
            losses.append(cross_entropy_(logits, targets[part], ignore_index, ctx.factor))
            if dx is not None:
                torch.mm(logits, low_w, out=dx[part])
            if dw is not None and dw.dtype == x.dtype:
                dw.addmm_(logits.t(), x[part])
            elif dw is not None:
                dw += wgrad(logits, x[part], w.dtype)
            del logits  # before the next chunk's are allocated
        ctx.save_for_backward(dx, dw, count)
        return torch.cat(losses).sum() / count

    @staticmethod
    def backward(ctx, dloss):
        differentiable_once()
        *saved, count = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[1:3]
        scale = dloss / (count.clamp(min=1) * ctx.factor)
        if ctx.chunked:
            dx, dw = (None if grad is None else _scaled(grad, scale) for grad in saved)
            return None, dx, dw, None, None, None
        dlogits, x, low_w = saved
        dx = _scaled(dlogits @ low_w, scale) if needs_x else None
        dw = None
        if needs_w and x.dtype == torch.float16:  # where x * scale would be flushed to zero
            dw = _scaled(wgrad(dlogits, x, ctx.dtype), scale)
        elif needs_w:
            dw = wgrad(dlogits, _scaled(x, scale), ctx.dtype)
        return None, dx, dw, None, None, None


def _scaled(t: Tensor, scale: Tensor) -> Tensor:
    """t * scale, a scalar tensor that must not be rounded to t's dtype first."""
    return (t.float() * scale).to(t.dtype)
