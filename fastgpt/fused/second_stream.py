"""A block's weight gradients on a second stream of the GPU.

Nothing in the backward reads a weight gradient, and beside its passes over memory the units that
multiply stand idle: there a product on a second stream costs less time than in front of them. Same
calls, same operands, same bits. What it reads stays alive, and nobody writes to it, until `join`
has made the first stream wait for the second, at the end of the block.
"""

import functools

import torch
from torch import Tensor

from fastgpt.implementations.aten import wgrad


class Beside:
    """dw = dy.T @ x on the second stream, once what was asked of the first is done."""

    def __init__(self) -> None:
        self.first = torch.cuda.current_stream()
        self.second = _second_stream(self.first.device)
        self.read: list[Tensor] = []  # the allocator would give their memory to the first stream

    def __call__(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        self.second.wait_stream(self.first)
        self.read += dy, x
        with torch.cuda.stream(self.second):
            return wgrad(dy, x, dtype)

    def join(self) -> None:
        self.first.wait_stream(self.second)
        self.read.clear()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
