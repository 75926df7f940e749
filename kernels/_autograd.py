"""What fastgpt's autograd functions and its dispatch share. Needs no triton."""

from collections.abc import Callable
from typing import Any

import torch


def constant_in_a_graph(fn: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result without its import of the whole compiler."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def differentiable_once() -> None:
    """For the first line of a backward: refuse create_graph, as there is no second derivative, and
    batched gradients, which no kernel takes.

    PyTorch's once_differentiable notices only incoming gradients that need a gradient themselves;
    with the constant one of loss.backward(create_graph=True) it would let a wrong constant through.
    """
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastgpt's kernels can be differentiated only once, create_graph=True asks for more; "
            'use fastgpt.use_backend("torch") for higher derivatives'
        )
    if _gradients_are_batched():
        raise RuntimeError(
            "fastgpt's kernels take one incoming gradient at a time, is_grads_batched=True gives "
            'several; use fastgpt.use_backend("torch"), around the forward too, or a loop'
        )


def _gradients_are_batched() -> bool:
    """Whether torch.autograd.grad runs this backward under its vmap (torch/_vmap_internals.py)."""
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return level > 1


def graph_is_kept() -> bool:
    """In a backward: whether the graph is kept for another one (retain_graph=True). If it is not, a
    saved tensor may be returned as a gradient.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()
