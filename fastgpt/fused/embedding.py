"""The embeddings of a GPT as one autograd unit.

    x = wte[idx] + wpe[:T]      dwte[idx] += dx      dwpe[:T] = sum over B of dx

wte and the head's weight are one parameter. Its gradient through the head is dense; through the
embedding it is N rows. `embed` gives the head an alias of the weight, so that the head's gradient
comes back to `embed`, which adds the N rows to it. So there is no second dense gradient to allocate
and add.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.fused.launchers import AddRows
from fastgpt.kernels._autograd import differentiable_once


def embed(add_rows_: AddRows, idx: Tensor, wte: Tensor, wpe: Tensor) -> tuple[Tensor, Tensor]:
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
        if ctx.needs_input_grad[2]:
            if dwte is None:  # the head took no part in the loss
                dwte = dx.new_zeros(wte_shape)
            elif torch.compiler.is_compiling():
                # it may come from another graph, as between DDP's buckets, and PyTorch 2.6 writes
                # into no such input; in a graph of the whole model inductor drops the copy
                dwte = dwte.clone()
            # only this unit can reach the alias, so nobody else reads the head's gradient
            ctx.add_rows_(dwte, idx.flatten(), dx.reshape(-1, dx.shape[-1]))
        dwpe = dx.new_zeros(wpe_shape)
        dwpe[: idx.shape[1]] = dx.sum(0)
        return None, None, dwte, dwpe
