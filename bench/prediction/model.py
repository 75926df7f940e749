"""From what a kernel does to microseconds: a model, with few constants, each with its source.

    memory     = bytes / (share of the peak bandwidth)
    issue      = warp instructions / (share of what the schedulers can issue)
    waiting    = waves of programs * loads of a program that wait for each other * LATENCY
    time       = START + max(memory, issue) + (min(memory, issue) + waiting) * ALONE / warps at once
                                                of a Triton kernel; of a PyTorch op START + memory
    time       = max(memory, FLOPs / (share of the peak))           of a GEMM or of attention; of
                                                our attention START + the same, or issue
    step       = max(sum over launches of time + GAP, sum of time * DRAW)

Warps overlap only with others on their multiprocessor: of whatever takes less time a part shows, a
larger one the fewer warps there are. In a row of steps the GPU reaches its power limit: matrix
products at full clock would draw more, and passes over memory make up for a part of it only, so
that a millisecond of products costs more of a step than it takes by itself, and one of anything
else less. The constants are of one GPU at one size (MEASURED_ON); that the shares hold on another
GPU and for other sizes is assumed.
"""

from typing import NamedTuple

from bench.prediction.kernel import ATEN, ATTENTION, GEMM, Kernel
from fastgpt.devices import peak_flops_of

MEASURED_ON = "an H200, 124M at B=16: bench/results/nvidia-h200/train-20261126T052841.json"
BANDWIDTH = 0.95  # of the datasheet's, for which L2 does its part: a device copy has 0.89
ISSUE = 0.90  # of a warp instruction per scheduler and clock
ALONE = 6  # warps on a multiprocessor with which nothing overlaps
LATENCY = 1.2  # us from a load to its data when memory is busy
START = 1.3  # us, that a kernel takes with next to nothing to do
GAP = 1.3  # us from one kernel to the next where the host is ahead: eager, which is below the limit
# of what the GPU may draw, at full clock: least squares over steps at B=16; of all 19 that did not
# wait for the host, B=4 too, none is further than 3 % from the result
DRAW = {"products": 1.24, "the rest": 0.78}
# of the peak FLOP/s: sums over all GEMMs of a phase, over both calls of cuDNN's with 64 a head
PRODUCTS = {"forward": 0.80, "dgrad": 0.75, "wgrad": 0.74}
ATTENTION_SHARE = {"forward": 0.32, "backward": 0.24}
OWN_ATTENTION = 0.33  # of the peak FLOP/s, both kernels of our backward with 64 a head


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
        return memory + START * kernel.parts
    issue = 1e6 * kernel.instructions / (ISSUE * gpu.issued())
    products = 1e6 * kernel.flops / (OWN_ATTENTION * gpu.flops())
    at_once = programs_per_processor(kernel, gpu)
    waiting = LATENCY * kernel.waits * kernel.grid / (at_once * gpu.processors)
    shown = (min(memory, issue) + waiting) * ALONE / (at_once * kernel.warps)
    return START + max(max(memory, issue) + shown, products)


def launches(kernels: list[Kernel]) -> int:
    """Kernels started in a step, a library's several each for itself."""
    return sum(k.launches * k.parts for k in kernels)


def kernels_ms(kernels: list[Kernel], gpu: Gpu) -> float:
    return 1e-3 * sum(k.launches * microseconds(k, gpu) for k in kernels)


def step_ms(kernels: list[Kernel], gpu: Gpu) -> float:
    """Of steps one after the other, the slower of what they take and what they draw."""
    taken = kernels_ms(kernels, gpu) + 1e-3 * GAP * launches(kernels)
    return max(taken, drawn_ms(kernels, gpu))


def drawn_ms(kernels: list[Kernel], gpu: Gpu) -> float:
    """How long a step's energy lasts at what the GPU may draw."""
    products = kernels_ms([k for k in kernels if k.flops], gpu)
    rest = kernels_ms(kernels, gpu) - products
    return DRAW["products"] * products + DRAW["the rest"] * rest
