"""The head and its loss as one autograd unit: logits that become their own gradient in one pass.

logits = x @ w.T      losses = cross_entropy(logits, targets)      loss = mean of counted losses
dlogits = (softmax(logits) - onehot(targets)) / count     dx = dlogits @ w     dw = dlogits.T @ x

The loss's own gradient is 1 as a rule, and nothing is left to do; else dx and dw are multiplied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.implementations.aten import dgrad, linear, matmul, scaled, wgrad
from fastgpt.kernels._autograd import differentiable_once, graph_is_kept

# Makes losses (N,) fp32 of logits (N, V), targets (N,), ignore_index and factor () fp32, and leaves
# factor * dlosses/dlogits in the logits.
InPlace = Callable[[Tensor, Tensor, int, Tensor], Tensor]

# Out of place: logits, targets, ignore_index -> losses, and two (N,) that the backward reads.
Loss = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
# logits, targets, those two, a scale () fp32, another gradient of the logits or None, ignore_index
# -> scale * dlosses/dlogits + the other
LossBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int], Tensor]

# Bytes of logits at once, beyond which the rows are taken in chunks; and rows per chunk at least:
# fewer would not fill a GPU, while a CPU is soon filled and its memory less.
CHUNKS = {"cuda": (2**31, 4096), "cpu": (2**28, 1024)}

# Rows of logits begin at multiples of this many elements: where V is odd, as GPT-2's 50257 is,
# cuBLAS has its slowest kernels for them, and fastgpt's load them element by element.
ROW_MULTIPLE = {"cuda": 64}


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


def padded_linear(x: Tensor, w: Tensor, low: Tensor) -> Tensor:
    """x (B, T, C) @ w.T, w (V, C) -> logits (B, T, V), which are not contiguous where rows are
    padded; `low` as in mean_loss.
    """
    return _PaddedLinear.apply(x, w, low)


def is_padded(x: Tensor, V: int) -> bool:
    """Whether rows of x's logits are further apart than V. A compiler pads for itself."""
    return _row(x, V) != V


def _row(x: Tensor, V: int) -> int:
    multiple = 1 if torch.compiler.is_compiling() else ROW_MULTIPLE.get(x.device.type, 1)
    return -(-V // multiple) * multiple


def _logits(x: Tensor, w: Tensor) -> Tensor:
    """x (N, C) @ w.T -> (N, V)."""
    V = w.shape[0]
    if not is_padded(x, V):
        return linear(x, w, None)
    logits = x.new_empty(len(x), _row(x, V))[:, :V]  # cuBLAS reads 16 bytes at a time: past V too
    return torch.mm(x, w.t(), out=logits)


class _PaddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, low_w):
        ctx.save_for_backward(x, low_w)
        ctx.dtype = w.dtype
        return _logits(x.flatten(0, 1), low_w).unflatten(0, x.shape[:2])

    @staticmethod
    def backward(ctx, dlogits):
        differentiable_once()
        x, low_w = ctx.saved_tensors
        needs_x, needs_w, _ = ctx.needs_input_grad
        dlogits = dlogits.flatten(0, 1)
        dx = dgrad(dlogits, low_w).view_as(x) if needs_x else None
        dw = wgrad(dlogits, x.flatten(0, 1), ctx.dtype) if needs_w else None
        return dx, dw, None


def with_limits(error: IndexError, V: int, ignore_index: int) -> IndexError:
    """PyTorch says which target is wrong, but not what would be right."""
    allowed = f"Targets must lie in [0, {V}), the vocabulary, or be ignore_index={ignore_index}"
    return IndexError(f"{error} {allowed}")


def logits_and_loss(
    cross_entropy: tuple[Loss, LossBackward],
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """x @ low.T (N, V) and mean_loss of it; `weight` and `low` as there."""
    return _LogitsAndLoss.apply(cross_entropy, x, weight, low, targets, ignore_index)


class _LogitsAndLoss(torch.autograd.Function):
    """Logits that leave a graph of torch.compile always get a gradient back, as a rule zeros. It is
    added in the pass that computes dlogits, instead of in one more pass.
    """

    @staticmethod
    def forward(ctx, cross_entropy, x, w, low_w, targets, ignore_index):
        loss, ctx.loss_backward = cross_entropy
        logits = x @ low_w.t()
        losses, *state = loss(logits, targets, ignore_index)
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(logits, x, low_w, targets, count, *state)
        ctx.dtype, ctx.ignore_index = w.dtype, ignore_index
        ctx.set_materialize_grads(False)
        return logits, losses.sum() / count

    @staticmethod
    def backward(ctx, dlogits, dloss):
        differentiable_once()
        logits, x, low_w, targets, count, *state = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[1:3]
        dlogits = ctx.loss_backward(
            logits, targets, *state, dloss / count, dlogits, ctx.ignore_index
        )
        dx = dlogits @ low_w if needs_x else None
        dw = wgrad(dlogits, x, ctx.dtype) if needs_w else None
        return None, dx, dw, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, C), w (V, C), low_w its values in x's dtype, targets (N,) -> mean loss, an fp32 scalar.

    The logits' gradients are kept for the backward; where the logits of all rows are too large for
    that, chunks of rows give their part of dx and dw at once instead.

    fp16 holds a gradient only times the loss scale, which arrives in the backward. Until then
    dlogits are 2^15 times those of a sum, which is as much as fits, and their products are fp32.
    """

    @staticmethod
    def forward(ctx, cross_entropy_, x, w, low_w, targets, ignore_index):
        ctx.wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # of dlogits @ w
        ctx.dtypes = x.dtype, w.dtype
        count = (targets != ignore_index).sum()
        factor = count.clamp(min=1).float().reciprocal()
        if x.dtype == torch.float16:
            factor = torch.full_like(factor, 2.0**15)
        max_bytes, min_rows = CHUNKS.get(x.device.type, CHUNKS["cuda"])
        rows = max(min_rows, max_bytes // (w.shape[0] * x.element_size()))
        ctx.chunked = len(x) > rows
        if not ctx.chunked:
            logits = _logits(x, low_w)
            losses = cross_entropy_(logits, targets, ignore_index, factor)
            ctx.save_for_backward(logits, x, low_w, count)
            return losses.sum() / count
        needs_x, needs_w = ctx.needs_input_grad[1:3]
        dx = torch.empty_like(x, dtype=ctx.wide) if needs_x else None
        dw = torch.zeros_like(w, dtype=torch.float32) if needs_w else None
        losses = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = _logits(x[part], low_w)
            losses.append(cross_entropy_(logits, targets[part], ignore_index, factor))
            if dx is not None:
                dx[part] = _dx(logits, low_w, ctx.wide)
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
        scale = dloss
        if x_dtype == torch.float16:
            scale = dloss / count.clamp(min=1) / 2.0**15
        if ctx.chunked:
            dx, dw = saved
            if torch.compiler.is_compiling() or graph_is_kept():
                dx, dw = (t if t is None else t.clone() for t in saved)
        else:
            dlogits, x, low_w = saved
            wide = torch.float32 if x_dtype == torch.float16 else w_dtype
            dx = _dx(dlogits, low_w, ctx.wide) if needs_x else None
            dw = matmul(dlogits.t(), x, wide) if needs_w else None
        dx = _rescaled(dx, scale, x_dtype) if needs_x else None
        dw = _rescaled(dw, scale, w_dtype) if needs_w else None
        return None, dx, dw, None, None, None


def _dx(dlogits: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    return dgrad(dlogits, w) if dtype == w.dtype else matmul(dlogits, w, dtype)


def _rescaled(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t * scale in `dtype`, in t where it is of that: no pass over memory where scale is 1."""
    if t.device.type == "cuda" and t.dtype == dtype:  # PyTorch 2.6 does not trace is_cuda here
        from fastgpt.kernels.cross_entropy import registered_rescale_

        registered_rescale_(t, scale)
        return t
    if t.dtype == dtype and not torch.compiler.is_compiling() and scale == 1:
        return t
    return scaled(t, scale, dtype)
