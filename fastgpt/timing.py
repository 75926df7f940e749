"""Time variants of one computation fairly: in turns, from a cold cache, device time only."""

import time
from collections.abc import Callable

import torch

Variants = dict[str, Callable[[], object]]


def in_turns(variants: Variants, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample a round, for about `seconds` in all.

    On CUDA the samples are device time between two events. Before them the L2 cache is overwritten,
    and a sleep on the device lets the host queue the whole call, so that no launch is waited for.
    """
    for call in variants.values():  # compile, allocate, load
        for _ in range(3):
            call()
    sample = _cuda_sample(device) if device.type == "cuda" else host_sample
    samples: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(len(s) >= 3 for s in samples.values()):
        for name, call in variants.items():
            samples[name].append(sample(call))
    return samples


def host_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_sample(device: torch.device) -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(2**28, device=device, dtype=torch.int8)  # several times any L2
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(call: Callable[[], object]) -> float:
        cache.zero_()
        torch.cuda._sleep(4_000_000)  # cycles: about two milliseconds
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3

    return sample
