"""Mean cross entropy of logits (M, V), forward and backward.

    top = max(x)   total = sum(exp(x - top))
    loss = mean over counted rows of (top - x[target]) + log(total)
    dx   = (exp(x - top) / total - onehot(target)) * dloss / count,  and 0 in ignored rows

Both passes read the logits once, in blocks of V, with the softmax in fp32: the forward keeps a
running maximum and sum, which are all that the backward needs. They are stored separately: in
top + log(total), logits of 1e6 would round the logarithm to 1/16. `cross_entropy_` is both passes
at once, for logits that nobody reads afterwards: it overwrites them with their gradient, times a
factor. A target that is neither in [0, V) nor the ignored index is never used as an address; its
row's loss is NaN, so that the mistake shows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._autograd import differentiable_once
from fastgpt.kernels._launch import (
    cdiv,
    device_problem,
    launch,
    multiprocessors,
    power_of_2,
    register,
)
from fastgpt.kernels._tuned import configured


@triton.jit
def _top_and_total(x_rows, rows, stride_xv, M, V, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_M,) fp32 each, of the rows at x_rows, read once. A row of -inf has top 0, total 0."""
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < V)[None, :]
        x = tl.load(x_rows[:, None] + cols[None, :] * stride_xv, mask=mask, other=float("-inf"))
        x = x.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top), total


@triton.jit
def _forward_kernel(
    x_ptr, target_ptr,             # in:  (M, V), (M,) int64
    loss_ptr, top_ptr, total_ptr,  # out: (M,) fp32 each
    stride_xm, stride_xv, stride_t,
    M, V, ignore_index,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    x_rows = x_ptr + rows * stride_xm
    top, total = _top_and_total(x_rows, rows, stride_xv, M, V, BLOCK_M, BLOCK_V)
    target = tl.load(target_ptr + rows * stride_t, mask=rows < M, other=ignore_index)
    inside = (target >= 0) & (target < V)
    picked = tl.load(x_rows + target * stride_xv, mask=inside & (rows < M), other=float("nan"))
    loss = (top - picked.to(tl.float32)) + tl.log(total)
    tl.store(loss_ptr + rows, tl.where(target == ignore_index, 0.0, loss), mask=rows < M)
    tl.store(top_ptr + rows, top, mask=rows < M)
    tl.store(total_ptr + rows, total, mask=rows < M)


@triton.jit
def _exp(x):
    """x <= 0. tl.exp takes three instructions, for what is too small to be a normal number."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _in_place_kernel(
    x_ptr, target_ptr, factor_ptr,  # in and out: (M, V); in: (M,) int64, () fp32
    loss_ptr,                       # out: (M,) fp32
    stride_xm, stride_xv, stride_t,
    V, ignore_index,
    BLOCK: tl.constexpr, REST: tl.constexpr,  # as many as V has beyond whole blocks, or more
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    target = tl.load(target_ptr + row * stride_t)
    whole = V // BLOCK * BLOCK
    cols = tl.arange(0, BLOCK).to(tl.int64)
    if REST > 0:
        rest = whole + tl.arange(0, REST).to(tl.int64)
        rest_ptrs, rest_mask = x_row + rest * stride_xv, rest < V
    if target == ignore_index:
        for start in range(0, whole, BLOCK):
            tl.store(x_row + (start + cols) * stride_xv, tl.zeros([BLOCK], tl.float32))
        if REST > 0:
            tl.store(rest_ptrs, tl.zeros([REST], tl.float32), mask=rest_mask)
        tl.store(loss_ptr + row, 0.0)
    else:
        inside = (target >= 0) & (target < V)
        picked_ptr = x_row + target * stride_xv
        # before the sums, whose barriers keep every warp from overwriting it too early
        picked = tl.load(picked_ptr, mask=inside, other=float("nan")).to(tl.float32)
        top = -3.4028234663852886e38  # not -inf: from itself it would be NaN
        totals = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, whole, BLOCK):
            x = tl.load(x_row + (start + cols) * stride_xv).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x, axis=0))
            totals = totals * _exp(top - new_top) + _exp(x - new_top)
            top = new_top
        total = tl.sum(totals, axis=0)
        if REST > 0:
            x = tl.load(rest_ptrs, mask=rest_mask, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x, axis=0))
            total = total * _exp(top - new_top) + tl.sum(_exp(x - new_top), axis=0)
            top = new_top
        tl.store(loss_ptr + row, (top - picked) + tl.log(total))

        factor = tl.load(factor_ptr)
        of_exp = factor / total
        for start in range(0, whole, BLOCK):  # read a moment ago: it comes from L2
            x_ptrs = x_row + (start + cols) * stride_xv
            dx = _exp(tl.load(x_ptrs).to(tl.float32) - top) * of_exp
            tl.store(x_ptrs, dx.to(x_ptr.dtype.element_ty))
        if REST > 0:
            x = tl.load(rest_ptrs, mask=rest_mask, other=float("-inf")).to(tl.float32)
            tl.store(rest_ptrs, (_exp(x - top) * of_exp).to(x_ptr.dtype.element_ty), mask=rest_mask)
        tl.debug_barrier()
        hit = _exp(picked - top) * of_exp - factor
        tl.store(picked_ptr, hit.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, target_ptr,              # in:  (M, V), (M,) int64
    top_ptr, total_ptr, scale_ptr,  # in:  (M,) fp32 each, () fp32
    dx_out_ptr,                     # in:  (M, V) or None
    dx_ptr,                         # out: (M, V)
    stride_xm, stride_xv, stride_t, stride_dm, stride_dv, stride_m,
    M, V, ignore_index,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    target = tl.load(target_ptr + rows * stride_t, mask=rows < M, other=ignore_index)
    scale = tl.load(scale_ptr)
    top = tl.load(top_ptr + rows, mask=rows < M, other=0.0)
    of_exp = scale / tl.load(total_ptr + rows, mask=rows < M, other=1.0)
    counted = target != ignore_index
    for start in range(0, V, BLOCK_V):
        cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < V)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xv
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        hit = tl.where(cols[None, :] == target[:, None], scale, 0.0)
        dx = tl.exp(x - top[:, None]) * of_exp[:, None] - hit
        dx = tl.where(counted[:, None], dx, 0.0)
        if dx_out_ptr is not None:
            dx_out_ptrs = dx_out_ptr + rows[:, None] * stride_dm + cols[None, :] * stride_dv
            dx += tl.load(dx_out_ptrs, mask=mask, other=0.0).to(tl.float32)
        out = rows[:, None] * stride_m + cols[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rescale_kernel(t_ptr, scale_ptr, SIZE, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale != 1.0:  # only the device knows; without work a launch takes 3 us
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, SIZE, step):
            at = start + tl.arange(0, BLOCK)
            t = tl.load(t_ptr + at, mask=at < SIZE).to(tl.float32) * scale
            tl.store(t_ptr + at, t.to(t_ptr.dtype.element_ty), mask=at < SIZE)


def _config(V: int) -> dict[str, int]:
    """About 4096 logits at a time; several rows when the vocabulary is small. No other was
    tried on a GPU."""
    block = min(4096, max(16, power_of_2(V)))
    return dict(BLOCK_M=min(32, 4096 // block), BLOCK_V=block, num_warps=8)


def _outputs(x: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def forward(x: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, V), targets (M,) -> per-row loss, top and total, (M,) fp32."""
    M, V = x.shape
    if targets.device.type == "cpu":
        _check_targets(targets, V, ignore_index)
    loss, top, total = _outputs(x, targets, ignore_index)
    config = configured(x, "cross_entropy", _config, V)
    launch(_forward_kernel, cdiv(M, config["BLOCK_M"]), x, targets, loss, top,
           total, *x.stride(), *targets.stride(), M, V, ignore_index, **config)  # fmt: skip
    return loss, top, total


def _gradient(
    x: Tensor, targets: Tensor, top: Tensor, total: Tensor, scale: Tensor, dx_out: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """Its rows as far apart as x's, where those are a bit further than V (padded_linear)."""
    (M, V), (row, column) = x.shape, x.stride()
    apart = row if column == 1 and V < row < V + 64 else V
    return torch.empty(M, apart, device=x.device, dtype=x.dtype)[:, :V]


def backward(
    x: Tensor, targets: Tensor, top: Tensor, total: Tensor, scale: Tensor, dx_out: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """scale () fp32 is dloss / count, dx_out (M, V) what x gets from elsewhere -> dx (M, V)."""
    M, V = x.shape
    dx = _gradient(x, targets, top, total, scale, dx_out, ignore_index)
    config = configured(x, "cross_entropy", _config, V)
    launch(_backward_kernel, cdiv(M, config["BLOCK_M"]), x, targets, top, total, scale,
           dx_out, dx, *x.stride(), *targets.stride(),
           *(dx_out.stride() if dx_out is not None else (0, 0)), dx.stride(0),
           M, V, ignore_index, **config)  # fmt: skip
    return dx


def _in_place_config(V: int) -> dict[str, int]:
    """A row to a program, in at most 8192 logits at a time. 16 warps of more than 42 registers are
    two programs a multiprocessor, whose rows stay in L2 from the first pass to the second: 27 MB
    of an H200's 50, and as fast as the fastest of 12 there.
    """
    block = min(8192, 1 << (V.bit_length() - 1))
    return dict(BLOCK=block, num_warps=max(1, block // 512))


def cross_entropy_(x: Tensor, targets: Tensor, ignore_index: int, factor: Tensor) -> Tensor:
    """x (M, V) becomes factor * dlosses/dx, factor () fp32 -> losses (M,) fp32."""
    M, V = x.shape
    if targets.device.type == "cpu":
        _check_targets(targets, V, ignore_index)
    losses = torch.empty(M, device=x.device, dtype=torch.float32)
    config = configured(x, "cross_entropy_", _in_place_config, V)
    rest = V % config["BLOCK"]
    launch(_in_place_kernel, M, x, targets, factor, losses, *x.stride(), *targets.stride(), V,
           ignore_index, REST=power_of_2(rest) if rest else 0, **config)  # fmt: skip
    return losses


def rescale_(t: Tensor, scale: Tensor) -> None:
    """t *= scale, () fp32, for a contiguous t."""
    programs = min(cdiv(t.numel(), 4096), 8 * multiprocessors(t))
    launch(_rescale_kernel, programs, t, scale, t.numel(), BLOCK=4096)


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    """Check targets on a CPU. On CUDA that would wait for the device: a bad row's loss is NaN."""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bad.any():
        raise IndexError(f"Target {targets[bad][0].item()} is out of bounds.")


registered_forward = register(
    "cross_entropy_forward(Tensor x, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor)",
    forward, _outputs)  # fmt: skip
registered_backward = register(
    "cross_entropy_backward(Tensor x, Tensor targets, Tensor top, Tensor total, Tensor scale,"
    " Tensor? dx_out, int ignore_index) -> Tensor", backward, _gradient)  # fmt: skip
registered_cross_entropy_ = register(
    "cross_entropy_(Tensor(a!) x, Tensor targets, int ignore_index, Tensor factor) -> Tensor",
    cross_entropy_, lambda x, *_: torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
)  # fmt: skip


registered_rescale_ = register(
    "rescale_(Tensor(a!) t, Tensor scale) -> ()", rescale_, lambda t, scale: None
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, targets, ignore_index):
        loss, *top_and_total = registered_forward(x, targets, ignore_index)
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(x, targets, count, *top_and_total)
        ctx.ignore_index = ignore_index
        return loss.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        differentiable_once()
        x, targets, count, *top_and_total = ctx.saved_tensors
        scale = dloss / count
        dx = registered_backward(x, targets, *top_and_total, scale, None, ctx.ignore_index)
        return dx, None, None


def unsupported(tensors: tuple[Tensor, ...]) -> str | None:
    """Why these kernels cannot run on such tensors, or None."""
    return device_problem(tensors[0])


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    return _CrossEntropy.apply(logits, targets, ignore_index)
