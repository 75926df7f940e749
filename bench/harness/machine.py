"""Is the machine quiet enough to measure on? What a record keeps of that, and the warning.

    load    the load average of the last minute over the number of cores; it also remembers our own
            runs, so no warning comes from it
    busy    share of all cores that others used (or a hypervisor took) while this process slept;
            None where there is no /proc/stat
    spread  of one small computation's time on the device that is measured: (p90 - p10) / median.
            Clocks that change and neighbours show here.

`python -m bench.harness.machine` prints it.
"""

import itertools
import os
import statistics
import time
from pathlib import Path

import torch

MAX_BUSY, MAX_SPREAD = 0.1, 0.15
STAT = Path("/proc/stat")
Machine = dict[str, float | None]


def check(sleep: float = 1.0, repeats: int = 100, device: torch.device | None = None) -> Machine:
    return {
        "load": os.getloadavg()[0] / (os.cpu_count() or 1),
        "busy": _busy(sleep),
        "spread": _spread(repeats, device or torch.device("cpu")),
    }


def warning(machine: Machine) -> str:
    """Why this machine's times are to be doubted; empty if it is quiet."""
    reasons = []
    if (machine["busy"] or 0) > MAX_BUSY:
        reasons.append(f"others use {machine['busy']:.0%} of its cores")
    if (machine["spread"] or 0) > MAX_SPREAD:
        reasons.append(f"the same computation takes times {machine['spread']:.0%} apart")
    if not reasons:
        return ""
    return f"warning: this machine is not quiet: {', '.join(reasons)}; stop what else runs on it"


def _busy(sleep: float) -> float | None:
    if not STAT.exists():
        return None
    before = _cpu_ticks()
    time.sleep(sleep)
    idle, total = (b - a for a, b in zip(before, _cpu_ticks(), strict=True))
    return 1 - idle / total if total else None


def _cpu_ticks() -> tuple[int, int]:
    """(idle, all) of all cores; time that a hypervisor took counts as used."""
    ticks = [int(n) for n in STAT.read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)  # user nice system idle iowait irq softirq steal


def _spread(repeats: int, device: torch.device) -> float:
    times = (_of_gpu if device.type == "cuda" else _of_cpu)(repeats, device)
    low, *_, high = statistics.quantiles(times[repeats // 10 :], n=10)  # the first ones warm up
    return (high - low) / statistics.median(times)


def _of_cpu(repeats: int, device: torch.device) -> list[float]:
    a, times = torch.randn(384, 384, device=device), []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return times


def _of_gpu(repeats: int, device: torch.device) -> list[float]:
    """One after the other without a wait: what the host does in between does not matter."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            a @ a
            event.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]


if __name__ == "__main__":
    state = check()
    print(*(f"{name} {value}" for name, value in state.items()), sep="\n")
    print(warning(state) or "quiet")
