"""Causal attention by the flash-attn package, where it is installed and asked for.

It reads (B, T, H, D) and takes fp16 and bf16 on CUDA only. Its dropout mask is neither SDPA's nor
that of fastgpt's kernels.
"""

import torch
from torch import Tensor

try:
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func
except Exception as error:  # an extension built for another torch raises more than ImportError
    _problem: str | None = f"flash-attn cannot be imported: {error}; pip install 'fastgpt[flash]'"
else:
    _problem = None

_HEAD_DIMS = (64, 128)  # others have read uninitialised memory in some releases


def unsupported(tensors: tuple[Tensor, ...], head_dim: int, dropout_p: float) -> str | None:
    if _problem is not None:
        return _problem
    if not tensors[0].is_cuda:
        return "flash-attn needs CUDA tensors"
    if any(t.dtype not in (torch.float16, torch.bfloat16) for t in tensors):
        return f"flash-attn takes float16 and bfloat16, not {tensors[0].dtype}"
    if any(t.shape != tensors[0].shape for t in tensors):
        return "q, k and v differ in shape"
    if head_dim not in _HEAD_DIMS:
        return f"head dim {head_dim} is none of {_HEAD_DIMS}"
    return None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attn_func(
        q, k, v, dropout_p=dropout_p, softmax_scale=scale, causal=True
    ).transpose(1, 2)


def packed_causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    B, T, C3 = qkv.shape
    packed = qkv.view(B, T, 3, n_head, C3 // (3 * n_head))
    return flash_attn_qkvpacked_func(packed, dropout_p=dropout_p, causal=True).view(B, T, C3 // 3)
