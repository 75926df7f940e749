"""From what a kernel does to microseconds: a model, with few constants, each with its source.

    memory     = bytes / (share of the peak bandwidth)
    issue      = warp instructions / (share of what the schedulers can issue)
    waiting    = waves of programs * loads of a program that wait for each other * LATENCY
    time       = max(memory, issue) + (min(memory, issue) + waiting) * ALONE / warps at once
                                                         of a Triton kernel; of a PyTorch op memory
    time       = max(memory, FLOPs / (share of the peak))           of a GEMM or of attention
    step       = sum over launches of time + GAP

Warps do not overlap with themselves, only with others on their multiprocessor: of what takes less
time a part shows, the larger the fewer they are. The constants are of one GPU at one size
(MEASURED_ON); that the shares hold on another GPU and for other sizes is assumed.
"""

from typing import NamedTuple

from bench.prediction.kernel import ATEN, ATTENTION, GEMM, Kernel
from fastgpt.devices import peak_flops_of

MEASURED_ON = "an H200, 124M at B=16: bench/results/nvidia-h200/train-20261126T032848.json"
BANDWIDTH = 0.90  # of the datasheet's: a device copy's 4.3 TB/s of 4.8 (harness/roofline.py)
ISSUE = 0.83  # of a warp instruction per scheduler and clock: _gelu_kernel, 57 M in 68.5 us
ALONE = 8  # warps on a multiprocessor with which nothing overlaps: those of _adamw_kernel
LATENCY = 0.8  # us from a load to its data when memory is busy: _adamw_kernel too
SMALLEST = 1.0  # us, that a kernel takes with next to nothing to do
GAP = 6.0  # us of a step per counted launch, beside kernels: 4.7 to 8.6 in the first two records
# of the peak FLOP/s: sums over all GEMMs of a phase, over both calls of cuDNN's with 64 a head
PRODUCTS = {"forward": 0.80, "dgrad": 0.75, "wgrad": 0.74}
ATTENTION_SHARE = {"forward": 0.32, "backward": 0.24}


class Gpu(NamedTuple):
    """Figures of the vendor's datasheets."""

    name: str  # as devices.py knows it
    arch: int
    processors: int
    clock: float  # Hz, boosted
    bandwidth: float  # bytes/s
    l2: int  # bytes
    shared: int  # bytes of a multiprocessor
    threads: int  # of a multiprocessor, at once

    def flops(self) -> float:
        return peak_flops_of(self.name)

    def issued(self) -> float:
        """Warp instructions/s, of four schedulers a multiprocessor."""
        return 4 * self.processors * self.clock


GPUS = {
    "H200": Gpu("NVIDIA H200", 90, 132, 1.98e9, 4.8e12, 50 << 20, 228 << 10, 2048),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 90, 132, 1.98e9, 3.35e12, 50 << 20, 228 << 10, 2048),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 80, 108, 1.41e9, 2.04e12, 40 << 20, 164 << 10, 2048),
    "RTX 4090": Gpu("NVIDIA GeForce RTX 4090", 89, 128, 2.52e9, 1.01e12, 72 << 20, 100 << 10, 1536),
}
_REGISTERS, _WARP, _MOST_PROGRAMS, _RESERVED = 65536, 32, 32, 1024


def programs_per_processor(kernel: Kernel, gpu: Gpu) -> int:
    """How many run at once, as registers, shared memory and threads allow; 0 of a library's."""
    if not kernel.grid:
        return 0
    of_warp = -(-kernel.registers * _WARP // 256) * 256
    limits = (
        _REGISTERS // (of_warp * kernel.warps),
        gpu.shared // (kernel.shared_bytes + _RESERVED),
        gpu.threads // (_WARP * kernel.warps),
        _MOST_PROGRAMS,
        -(-kernel.grid // gpu.processors),
    )
    return max(1, min(limits))


def live_bytes(kernel: Kernel, gpu: Gpu) -> float:
    """What the programs that run at once will read a second time; 0 if they read nothing twice."""
    if not kernel.grid:
        return 0.0
    return kernel.again / kernel.grid * programs_per_processor(kernel, gpu) * gpu.processors


def moved(kernel: Kernel, gpu: Gpu) -> float:
    """Bytes between the chip and its memory: a second reading counts if L2 cannot hold it."""
    return kernel.bytes - (kernel.again if live_bytes(kernel, gpu) < gpu.l2 else 0.0)


def microseconds(kernel: Kernel, gpu: Gpu) -> float:
    """Of one launch."""
    memory = 1e6 * moved(kernel, gpu) / (BANDWIDTH * gpu.bandwidth)
    if kernel.kind in (GEMM, ATTENTION):
        share = (PRODUCTS if kernel.kind == GEMM else ATTENTION_SHARE)[kernel.phase]
        return max(memory, 1e6 * kernel.flops / (share * gpu.flops()))
    if kernel.kind == ATEN:
        return max(memory, SMALLEST * kernel.parts)
    issue = 1e6 * kernel.instructions / (ISSUE * gpu.issued())
    at_once = programs_per_processor(kernel, gpu)
    waiting = LATENCY * kernel.waits * kernel.grid / (at_once * gpu.processors)
    shown = (min(memory, issue) + waiting) * ALONE / (at_once * kernel.warps)
    return max(memory, issue, SMALLEST) + shown


def launches(kernels: list[Kernel]) -> int:
    """Kernels started in a step, a library's several each for itself."""
    return sum(k.launches * k.parts for k in kernels)


def kernels_ms(kernels: list[Kernel], gpu: Gpu) -> float:
    return 1e-3 * sum(k.launches * microseconds(k, gpu) for k in kernels)


def step_ms(kernels: list[Kernel], gpu: Gpu) -> float:
    return kernels_ms(kernels, gpu) + 1e-3 * GAP * launches(kernels)
