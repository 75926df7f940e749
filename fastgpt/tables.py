"""Which implementation runs where, by measurement.

CONSERVATIVE is for devices nobody has measured: GEMMs from cuBLAS, attention from PyTorch's SDPA
(cuDNN or flash), and the simple memory-bound kernels. A device's measurements go before it
(kernels/_tuned.py).
"""

import torch

from fastgpt.kernels import _tuned

CONSERVATIVE: dict[str, str] = {
    "layer_norm": "triton",
    "add_layer_norm": "triton",
    "linear_gelu": "cublas",
    "mlp": "cublas",
    "causal_attention": "torch",
    "packed_causal_attention": "torch",
    "cross_entropy": "triton",
    "linear_cross_entropy": "triton",
    "block": "triton",
    "adamw": "triton",
}

ATEN_ON_CPU = (
    "cross_entropy",
    "linear_cross_entropy",
    "block",
)  # where it beats PyTorch's autograd on a CPU


def implementation(op: str, device_name: str) -> tuple[str, str]:
    """The implementation to run, and why."""
    traced = torch.compiler.is_compiling()  # where no file can be read
    entry = {} if traced else _tuned.entry(device_name)
    measured = entry.get("implementations", {})
    if op in measured:
        return measured[op], f"measured on {device_name}, {entry['date']}"
    return CONSERVATIVE[op], "the conservative choice"
