"""Does a training step fit in memory? An estimate from the shapes, good to about a fifth.

Between steps 12 bytes a parameter are held, the weight and AdamW's two moments; during one, 4 more
for the gradient, what the layers keep for the backward, and the logits, their fp32 copy,
log-softmax and gradient.
"""

import os
from pathlib import Path

import torch

from bench.peers.training import matmul_dtype
from fastgpt import GPTConfig, weights

MEMINFO = Path("/proc/meminfo")


def parameters(config: GPTConfig) -> int:
    return weights.count_parameters(
        config.n_layer, config.n_embd, config.vocab_size, config.block_size
    )


def held_bytes(config: GPTConfig) -> int:
    return 12 * parameters(config)


def step_bytes(config: GPTConfig, batch_size: int, dtype: str) -> int:
    """At the peak of a step of eager nanoGPT, all in all."""
    C, tokens = config.n_embd, batch_size * config.block_size
    # per layer: residual stream before each norm, norms' outputs, qkv, attention, fc, GELU
    per_layer = 64 * C if matmul_dtype(dtype) == torch.float32 else 36 * C
    activations = tokens * (config.n_layer * per_layer + 16 * config.vocab_size)
    return 16 * parameters(config) + activations


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def missing(needed: int, device: torch.device) -> str:
    """Why `needed` bytes cannot fit; empty if they may. On a GPU it is tried instead: it fails
    cleanly there, where on a CPU the system would end the process."""
    free = free_bytes(device)
    if device.type == "cuda" or needed <= free:
        return ""
    return (
        f"does not fit: about {needed / 2**30:.0f} GiB are needed, {free / 2**30:.0f} GiB are "
        f"free, {(needed - free) / 2**30:.0f} GiB are missing"
    )


def all_at_once(
    config: GPTConfig, batch_size: int, dtype: str, device: torch.device, variants: int
) -> bool:
    """Whether `variants` of them can be alive together, one of them in its step."""
    rest = (variants - 1) * held_bytes(config)
    return rest + step_bytes(config, batch_size, dtype) <= 0.9 * free_bytes(device)
