"""Causal attention by PyTorch's SDPA, held to one of its own backends.

By default SDPA picks one itself ("torch"). The objects here are for devices where a measurement
says which is fastest, and for the fused path (fused/block.py), which calls a backend's forward and
backward without autograd and passes q, k and v as strided views of one (B, T, 3C) tensor.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import reference
from fastgpt.kernels._autograd import constant_in_a_graph

aten = torch.ops.aten
State = tuple[Tensor | None, ...]  # for the backward: log-sum-exp, RNG state


class _Sdpa:
    """reference.py's attention, with SDPA's backend chosen here instead of by PyTorch."""

    def __init__(self, backend: SDPBackend):
        self.backend = backend
        self.name = backend.name  # PyTorch 2.14's Dynamo cannot ask the backend itself

    def unsupported(
        self, tensors: tuple[Tensor, ...], head_dim: int, dropout_p: float
    ) -> str | None:
        if not tensors[0].is_cuda:
            return f"{self.name} needs CUDA tensors"
        if any(t.element_size() != 2 for t in tensors):
            return f"{self.name} takes float16 and bfloat16, not {tensors[0].dtype}"
        if head_dim % 8 or head_dim > 128:
            return f"head dim {head_dim} is no multiple of 8 up to 128"
        return None

    def causal_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        with sdpa_kernel(self.backend):
            return reference.causal_attention(q, k, v, dropout_p, scale)

    def packed_causal_attention(self, qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        with sdpa_kernel(self.backend):
            return reference.packed_causal_attention(qkv, n_head, dropout_p)

    def packed_forward(self, qkv: Tensor, n_head: int, dropout_p: float) -> tuple[Tensor, State]:
        """qkv (B, T, 3C) -> y (B, T, C), state."""
        B, T, C3 = qkv.shape
        o, state = self._forward(*reference.split_heads(qkv, n_head), dropout_p)
        return o.transpose(1, 2).reshape(B, T, C3 // 3), state

    def packed_backward(
        self, dy: Tensor, qkv: Tensor, y: Tensor, state: State, n_head: int, dropout_p: float
    ) -> Tensor:
        """-> dqkv (B, T, 3C). SDPA allocates dq, dk and dv itself; one pass copies them into it."""
        q, k, v = reference.split_heads(qkv, n_head)
        do, o = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (dy, y))
        grads = self._backward(do, q, k, v, o, state, dropout_p)
        # SDPA lays them out in memory as (B, T, H, D), like q, k and v: so this is one copy
        return torch.cat([grad.transpose(1, 2).flatten(2) for grad in grads], -1)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> tuple[Tensor, State]:
        if self.backend is SDPBackend.CUDNN_ATTENTION:
            o, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, p, True, False
            )
        else:
            o, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
                q, k, v, p, True, False
            )
        return o, (lse, seed, offset)

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, state: State, p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse, seed, offset = state
        T = q.shape[2]
        if self.backend is SDPBackend.CUDNN_ATTENTION:
            return aten._scaled_dot_product_cudnn_attention_backward(
                do, q, k, v, o, lse, seed, offset, None, None, None, T, T, p, True
            )
        return aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, None, None, T, T, p, True, seed, offset
        )


class _Efficient(_Sdpa):
    """SDPA's backend for float32, with or without TF32."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> tuple[Tensor, State]:
        o, *state = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, p, True)
        return o, tuple(state)

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, state: State, p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [True, True, True, False]  # of q, k, v and a bias
        backward = aten._scaled_dot_product_efficient_attention_backward
        return backward(do, q, k, v, None, o, *state, p, wanted, True)[:3]


class _Cpu(_Sdpa):
    """SDPA's flash attention for CPUs; it has no dropout."""

    SHORT = 512  # up to this T its backward is slower in bf16 than in fp32, up to six times

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> tuple[Tensor, State]:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, p, True)
        return o, (lse,)

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, state: State, p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        short = q.dtype == torch.bfloat16 and q.shape[2] <= self.SHORT
        inputs = (t.float() if short else t for t in (do, q, k, v, o))
        dq, dk, dv = (t.to(q.dtype) for t in backward(*inputs, state[0], p, True))
        return dq, dk, dv


cudnn = _Sdpa(SDPBackend.CUDNN_ATTENTION)
flash = _Sdpa(SDPBackend.FLASH_ATTENTION)
efficient = _Efficient(SDPBackend.EFFICIENT_ATTENTION)
cpu = _Cpu(SDPBackend.FLASH_ATTENTION)


def choice(qkv: Tensor, n_head: int, dropout_p: float) -> _Sdpa | None:
    """The backend that SDPA itself would run, or None where its backward cannot be called alone."""
    if not qkv.is_cuda:
        return cpu if dropout_p == 0 else None
    if qkv.shape[-1] // (3 * n_head) % 8:  # which SDPA pads before it calls a backend
        return None
    T, C3 = qkv.shape[1:]
    if torch.compiler.is_compiling() and T > 1:
        T = 1024  # the same answer for every T, as a constant in the graph
    would_run = _would_run(qkv.device, qkv.dtype, T, C3, n_head, dropout_p > 0)
    return {held.name: held for held in (cudnn, flash, efficient)}.get(would_run)


@constant_in_a_graph
def _would_run(
    device: torch.device, dtype: torch.dtype, T: int, C3: int, n_head: int, dropout: bool
) -> str:
    """The name of an SDPBackend, for packed queries, keys and values with gradients."""
    qkv = torch.empty(1, T, C3, device=device, dtype=dtype, requires_grad=True)
    q, k, v = reference.split_heads(qkv, n_head)
    return SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.1 * dropout, True)).name
