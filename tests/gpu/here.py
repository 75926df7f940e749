"""Where the GPU suite runs and at which sizes.

On a CUDA device: real ones. On a CPU everything here is skipped, unless FASTGPT_REHEARSAL=1 asks
for toy sizes in Triton's interpreter: that proves the tests' own code, and nothing about a GPU.
"""

import os
from typing import TypeVar

import pytest
import torch

from tests.close import DEVICE

Size = TypeVar("Size")
ON_GPU = DEVICE == "cuda"
REHEARSAL = not ON_GPU and os.environ.get("FASTGPT_REHEARSAL") == "1"

needs_gpu = pytest.mark.skipif(
    not ON_GPU and not REHEARSAL, reason="needs a CUDA device; this machine has none"
)


def size(real: Size, toy: Size) -> Size:
    return real if ON_GPU else toy


HALF = size(torch.bfloat16, torch.float16)  # the interpreter computes bf16 wrongly


def needs_memory(gib: float) -> None:
    """Skip, naming what is missing, where the device has less memory free."""
    if ON_GPU:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} GiB are free")
