"""Time variants of one computation fairly: in turns, from a cold cache, device time only."""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

Variants = dict[str, Callable[[], object]]
FLUSH_BYTES = 2**28  # several times any L2
MAX_READS = 128  # in front of one call: about 10 ms on an H200


def in_turns(variants: Variants, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample a round, for about `seconds` in all.

    On CUDA the samples are device time between two events, from a cold L2 (_CudaTimer).
    """
    for call in variants.values():  # compile, allocate, load
        for _ in range(3):
            call()
    timers = _timers(variants, device)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(len(s) >= 3 for s in samples.values()):
        for name, sample in timers.items():
            samples[name].append(sample())
    return samples


def _timers(variants: Variants, device: torch.device) -> dict[str, Callable[[], float]]:
    if device.type != "cuda":
        return {name: functools.partial(host_sample, call) for name, call in variants.items()}
    buffer = torch.ones(FLUSH_BYTES // 4, device=device)
    return {name: _CudaTimer(call, device, buffer).sample for name, call in variants.items()}


def host_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _CudaTimer:
    """Device seconds of a call, from an L2 that holds nothing of it and nothing to write back.

    A large buffer is read in front of the call: reads evict what earlier calls left and leave clean
    lines, where overwriting would leave 50 MB for the call's first stores to wait for. The reads
    also keep the device busy while the host queues the call; an idle device would raise its clocks.
    If the device still comes to the call too early, there are twice as many reads from then on.
    """

    def __init__(self, call: Callable[[], object], device: torch.device, buffer: Tensor):
        self.call, self.device, self.buffer = call, device, buffer
        self.sum = torch.empty((), device=device)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.reads = 1

    def sample(self) -> float:
        host_was_late = self._run()
        while host_was_late and self.reads < MAX_READS:
            self.reads *= 2
            host_was_late = self._run()
        return self.start.elapsed_time(self.stop) / 1e3

    def _run(self) -> bool:
        """One timed call -> whether the device began it before the host had queued all of it."""
        for _ in range(self.reads):
            torch.sum(self.buffer, 0, out=self.sum)
        self.start.record()
        self.call()
        self.stop.record()
        host_was_late = self.start.query()
        torch.cuda.synchronize(self.device)
        return host_was_late
