"""Every kernel behind a public op, called as fastgpt/examples.py calls the op: what the GPU suite
compares, repeats and sanitises.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import backend, ops, reference, use_backend
from fastgpt.examples import Sizes, example
from tests.close import DEVICE, evaluate

GPT2 = Sizes(2, 1024, 768, 12, 50304)
SMALL = Sizes(1, 17, 48, 3, 97)  # no power of two


class Case(NamedTuple):
    ours: Callable
    ref: Callable
    inputs: tuple[Tensor | None, ...]
    grads: list[Tensor]

    def run(self) -> list[Tensor]:
        """Outputs and gradients of ours, dropping the same scores every time."""
        torch.manual_seed(1)
        outputs, gradients = evaluate(self.ours, self.inputs, self.grads, None)
        return [t.detach() for t in outputs] + gradients


def cases() -> dict[str, functools.partial[Case]]:
    """A function of sizes and dtype per op and kernel, whose first argument, the op, is bound; and
    one with dropout, for PyTorch draws another mask.
    """
    kernels = {
        f"{op}, {name}": functools.partial(_case, op, name)
        for op, entry in backend.OPS.items()
        for name, path in entry.implementations.items()
        if entry.public and path.startswith("fastgpt.kernels.")
    }
    return kernels | {DROPOUT: functools.partial(_case, *DROPOUT.split(", ")[:2], dropout_p=0.1)}


DROPOUT = "packed_causal_attention, triton, dropout"  # has no reference to be compared with


def _case(op: str, name: str, sizes: Sizes, dtype: torch.dtype, **options: Any) -> Case:
    given = example(op, sizes, DEVICE, dtype)
    options = given.options | options

    def ours(*inputs: Tensor | None) -> Any:
        with use_backend("triton", **{op: name}):
            return getattr(ops, op)(*inputs, **options)

    ref = functools.partial(getattr(reference, op), **options)
    with torch.no_grad():
        out = ref(*given.inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in outputs]
    return Case(ours, ref, given.inputs, grads)
