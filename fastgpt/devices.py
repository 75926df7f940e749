"""The device and dtype to run on, and what a device can do."""

import functools
import os
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16 matmul peaks in FLOP/s, from the vendors' datasheets. Sparse figures, twice as high,
# are often quoted instead; no training step reaches those. The first name that occurs in
# torch.cuda.get_device_name() as whole words counts, so the more specific ones come first.
_PEAKS = (
    ("GB200", 2500e12),
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
    if "Laptop" in device_name:  # another chip under the same name
        return float("nan")
    matches = (peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", device_name))
    return next(matches, float("nan"))


def cpus() -> int:
    """Processors that this process may use, where the system says so."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@functools.cache
def cpu_info() -> str:
    """What Linux says of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def pick_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but PyTorch sees no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} was asked for; there are {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is none that fastgpt knows; use cpu, cuda or mps")
    return device


def pick_dtype(device: torch.device, name: str | None) -> torch.dtype:
    """The dtype to autocast to; float32 means not to."""
    if device.type != "cuda":
        if name == "float16":
            raise ValueError(f"float16 is for CUDA; on {device} use bfloat16 or float32")
        return DTYPES[name or "float32"]
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs only emulate it
    return DTYPES[name or ("bfloat16" if has_bf16 else "float16")]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
