"""How close is close enough: the error against float64 beside eager PyTorch's own in the same
dtype.

    |ours - truth| <= 2 * |eager - truth| + EPS_BUDGET * eps(dtype) * max|truth|      (maxima over
    elements)

The first term lets an op be as inexact as what it replaces, and follows matmul length and dtype by
itself. The second is one rounding of the result: where eager happens to be exact, its error alone
would allow none. Row ops on rows of mean 30 use `eager=False`: there eager's own error is large in
fp16, and statistics kept in half precision would hide behind it. Where the truth cancels to 0, as
attention's dq and dk do for a single token, what stays are roundings of the terms: max|truth| is
then that of the case's largest result.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

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


def _aligned(tensors: Sequence[Any]) -> list[Any]:
    """For PyTorch's own ops: on CUDA its attention faults on fp32 between addresses of 16 bytes."""
    return [t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in tensors]


def _leaf(t: Tensor) -> Tensor:
    """A detached leaf of the same memory and strides."""
    return t.detach().requires_grad_(t.is_floating_point())


class Comparison(NamedTuple):
    """One output or gradient; errors are absolute, against float64, maxima over elements."""

    what: str  # "output", "gradient of weight"
    dtype: torch.dtype
    error: float
    eager_error: float
    allowed: float
    scale: float  # the largest true element, of all results where this one cancels to 0

    def assert_allowed(self) -> None:
        message = f"{self.what}: error {self.error:.2e} > {self.allowed:.2e}"
        assert self.error <= self.allowed, message  # written so that NaN fails too


def _names(op: Callable, inputs: Sequence[Tensor | None], outputs: int) -> list[str]:
    """What `evaluate` returns, by the names of op's arguments."""
    named = list(inspect.signature(op).parameters)
    named[len(named) - 1 :] += [f"{named[-1]} {i}" for i in range(len(inputs))]  # for *weights
    arguments = zip(named, inputs, strict=False)
    differentiable = [name for name, t in arguments if t is not None and t.is_floating_point()]
    outs = ["output"] if outputs == 1 else [f"output {i + 1}" for i in range(outputs)]
    return outs + [f"gradient of {name}" for name in differentiable]


def compare(
    op: Callable,
    ref: Callable,
    *inputs: Tensor | None,
    grads: Sequence[Tensor],
    eager: bool = True,
    budget: float = 1.0,
) -> list[Comparison]:
    """Outputs and gradients of op(*inputs), forced onto kernels, and of `ref`, against float64.

    `budget` multiplies EPS_BUDGET. Asserts that shapes and dtypes are eager's and that nothing
    given is written to. Memory that a kernel leaves unwritten shows as NaN (deterministic mode
    fills torch.empty with it). Empty results are left out.
    """
    given = [t for t in (*inputs, *grads) if t is not None]
    before = [t.clone() for t in given]
    torch.set_deterministic_debug_mode("warn")  # the other spelling imports torch's compiler
    try:
        with use_backend("triton"):
            outputs, gradients = evaluate(op, inputs, grads, None)
    finally:
        torch.set_deterministic_debug_mode("default")
    with use_backend("torch"):
        same = list(chain(*evaluate(ref, _aligned(inputs), _aligned(grads), None)))
        truth = list(chain(*evaluate(ref, inputs, grads, torch.float64)))
    for t, was in zip(given, before, strict=True):
        assert torch.equal(t, was), "an input or incoming gradient was written to"

    names = _names(ref, inputs, len(outputs))
    largest = max((t.abs().max().item() for t in truth if t.numel()), default=0.0)
    found = []
    for what, a, b, t in zip(names, outputs + gradients, same, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        if t.numel():
            eps, top = torch.finfo(a.dtype).eps, t.abs().max().item()
            error, eager_error = ((x.double() - t).abs().max().item() for x in (a, b))
            scale = top if top > 1e-12 * largest else largest
            allowed = budget * EPS_BUDGET[a.dtype] * eps * scale + (2 * eager_error if eager else 0)
            found.append(Comparison(what, a.dtype, error, eager_error, allowed, scale))
    return found


def assert_as_accurate(op: Callable, ref: Callable, *inputs: Tensor | None, **how: Any) -> None:
    """That `compare` finds every error within what is allowed."""
    for found in compare(op, ref, *inputs, **how):
        found.assert_allowed()
