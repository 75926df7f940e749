"""Dense bf16 matmul peaks of CUDA devices, in FLOP/s, from their vendor's datasheets.

Sparse figures, twice as high, are often quoted instead; no training step reaches those.
"""

import torch

# the first entry whose name occurs in torch.cuda.get_device_name(); the more specific names come
# first
_PEAKS = (
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak; NaN where it is not known, so that no ratio to it looks like
    one.
    """
    if device.type != "cuda":
        return float("nan")
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(device_name: str) -> float:
    return next((peak for name, peak in _PEAKS if name in device_name), float("nan"))
