"""How close is close enough: the error against float64 beside eager PyTorch's own in the same
dtype.

    |ours - truth| <= 2 * |eager - truth| + EPS_BUDGET * eps(dtype) * max|truth|      (maxima over
    elements)

The first term lets an op be as inexact as what it replaces, and follows matmul length and dtype by
itself. The second is one rounding of the result: where eager happens to be exact, its error alone
would allow none. Row ops on rows of mean 30 use `eager=False`: there eager's own error is large in
fp16, and statistics kept in half precision would hide behind it. A gradient that cancels to exactly
0, as attention's dq and dk do for a single token, may keep a thousandth of one rounding of the
case's largest result.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS_BUDGET = {torch.float32: 8.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def _wide(t: Tensor, step: int) -> Tensor:
    """t's values in every `step`-th column of a memory block twice as wide."""
    block = torch.full(
        (*t.shape[:-1], 2 * t.shape[-1]), float("nan"), device=t.device, dtype=t.dtype
    )
    view = block[..., ::2] if step == 2 else block[..., : t.shape[-1]]
    return view.copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "sliced": lambda t: _wide(t, 1),  # row stride is not the width
    "strided": lambda t: _wide(t, 2),  # column stride 2
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),  # stride 0, as from sum().backward()
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),  # misaligned
}


def evaluate(
    op: Callable,
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """op's outputs and the gradients of its floating inputs; dtype None leaves the inputs' own."""
    cast = [
        t if t is None or dtype is None or not t.is_floating_point() else t.to(dtype)
        for t in inputs
    ]
    leaves = [t if t is None else _leaf(t) for t in cast]
    out = op(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(
        outputs, [g if dtype is None else g.to(dtype) for g in grads[: len(outputs)]]
    )
    return outputs, [t.grad for t in leaves if t is not None and t.requires_grad]


def _leaf(t: Tensor) -> Tensor:
    """A detached leaf of the same memory and strides."""
    return t.detach().requires_grad_(t.is_floating_point())


def assert_as_accurate(
    op: Callable,
    ref: Callable,
    *inputs: Tensor | None,
    grads: Sequence[Tensor],
    eager: bool = True,
    budget: float = 1.0,
) -> None:
    """Outputs and gradients of op(*inputs), forced onto kernels, against `ref` in float64.

    `budget` multiplies EPS_BUDGET. Also: shapes and dtypes are eager's, nothing given is written
    to, and memory that a kernel leaves unwritten shows as NaN (deterministic mode fills torch.empty
    with it).
    """
    given = [t for t in (*inputs, *grads) if t is not None]
    before = [t.clone() for t in given]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with use_backend("triton"):
            ours = evaluate(op, inputs, grads, None)
    finally:
        torch.use_deterministic_algorithms(False)
    with use_backend("torch"):
        same = evaluate(ref, inputs, grads, None)
        truth = evaluate(ref, inputs, grads, torch.float64)
    for t, was in zip(given, before, strict=True):
        assert torch.equal(t, was), "an input or incoming gradient was written to"
    largest = max((t.abs().max() for t in (*truth[0], *truth[1]) if t.numel()), default=0.0)
    for kind, a, b, t in zip(("output", "gradient"), ours, same, truth, strict=True):
        for i, (mine, theirs, exact) in enumerate(zip(a, b, t, strict=True)):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, f"{kind} {i}"
            if exact.numel():
                eps = torch.finfo(mine.dtype).eps
                allowed = budget * EPS_BUDGET[mine.dtype] * eps * exact.abs().max()
                allowed += 1e-3 * eps * largest
                allowed += 2 * (theirs.double() - exact).abs().max() if eager else 0
                error = (mine.double() - exact).abs().max()
                # written so that NaN fails too
                assert error <= allowed, f"{kind} {i}: error {error:.2e} > {allowed:.2e}"
