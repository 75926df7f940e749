"""The ceilings that times are held against: what a large matrix product, copy and read reach on
this device, measured as the times are.
"""

import functools
import statistics
from collections.abc import Callable

import torch

from fastgpt.commands.timing import host_sample, in_turns
from fastgpt.decoding.huge_pages import HugePages


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of a large product of random matrices; zeros would run faster than data does."""

    def product(n: int) -> Callable[[], object]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return functools.partial(torch.mm, a, b)

    n = 8192
    if device.type != "cuda":  # where a dtype may be a thousand times slower than another
        n = 256
        while n < 2048 and host_sample(product(n)) < 0.02:
            n *= 2
    samples = in_turns({"matmul": product(n)}, device, seconds)["matmul"]
    return 2 * n**3 / statistics.median(samples)


def copy_ceiling(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes/s, read plus written, of a copy many times the size of any cache."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    samples = in_turns({"copy": functools.partial(target.copy_, source)}, device, seconds)["copy"]
    return 2 * source.numel() / statistics.median(samples)


def read_ceiling(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes/s that all cores read from a tensor many times the size of any cache, by the faster of
    two ways to add it up. On Linux a CPU reads it from pages of 2 MB, faster than from 4 KB.
    """
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    if device.type == "cpu":
        HugePages([source]).move(seconds=10)
    ways: dict[str, Callable[[], object]] = {
        "sum": source.sum,
        "dot": functools.partial(torch.dot, source, source),
    }
    samples = in_turns(ways, device, seconds)
    return source.nbytes / min(statistics.median(taken) for taken in samples.values())
