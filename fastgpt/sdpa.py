"""Causal attention by PyTorch's SDPA, held to one of its own backends on CUDA.

Left to itself SDPA picks one ("torch"). These are for a device where a measurement says which wins.
"""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import reference


class _Sdpa:
    """reference.py's attention with the choice of backend taken away from PyTorch."""

    def __init__(self, backend: SDPBackend):
        self.backend = backend

    def unsupported(
        self, tensors: tuple[Tensor, ...], head_dim: int, dropout_p: float
    ) -> str | None:
        if not tensors[0].is_cuda:
            return f"{self.backend.name} needs CUDA tensors"
        if any(t.element_size() != 2 for t in tensors):
            return f"{self.backend.name} takes float16 and bfloat16, not {tensors[0].dtype}"
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


cudnn = _Sdpa(SDPBackend.CUDNN_ATTENTION)
flash = _Sdpa(SDPBackend.FLASH_ATTENTION)
