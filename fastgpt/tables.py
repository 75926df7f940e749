"""Which implementation runs where, by measurement.

CONSERVATIVE is for devices nobody has measured: GEMMs from cuBLAS, attention from PyTorch's SDPA
(cuDNN or flash), and the simple memory-bound kernels. MEASURED overrides it per device name; an
entry is added only together with the record under bench/results/ it was read from, and carries that
record's date.
"""

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

ATEN_ON_CPU = ("linear_cross_entropy", "block")  # where it beats PyTorch's autograd on a CPU

MEASURED: dict[str, dict[str, str]] = {}  # torch.cuda.get_device_name() -> op -> implementation


def implementation(op: str, device_name: str) -> str:
    return MEASURED.get(device_name, CONSERVATIVE).get(op, CONSERVATIVE[op])
